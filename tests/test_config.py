"""The choice of a configuration by shape: plain Python."""

from __future__ import annotations

from typing import Literal

import pytest

from kda_cute.kernels.config import (
    ITEM_COST,
    LISTED,
    MAX_SMEM_BYTES,
    MAX_WARM,
    MIN_PART,
    STATE_BYTES,
    KdaBuildConfig,
    KdaDecodeConfig,
    KdaFusedDecodeConfig,
    KdaFwdConfig,
    all_configs,
    builds_maps,
    maps_at,
    maps_bytes,
    part,
    v_split,
    words_bytes,
    workspace_bytes,
)

SMS = 132  # of an H100 or H200


@pytest.mark.parametrize(
    ("T", "N", "H", "expected"),
    [
        (8192, 1, 64, 2),  # 64 blocks leave half of the GPU idle
        (8192, 1, 96, 2),  # 96 a quarter, which 66 pairs of blocks do not
        (8192, 1, 102, 2),
        (8192, 1, 103, 1),
        (8192, 1, 1, 1),  # segments, and their maps where gates are weak
        (8192, 1, 37, 1),
        (8192, 1, 38, 2),
        (3000, 1, 8, 2),  # too short for maps
        (8192, 8, 96, 1),
        (8192, 8, 64, 1),
        (8192, 6, 64, 1),
        (8192, 1024, 32, 1),
        (1, 1, 1, 2),
    ],
)
def test_v_split(T: int, N: int, H: int, expected: int) -> None:
    assert v_split(T, N, H, SMS) == expected


def test_v_split_fills_what_gpu_there_is() -> None:
    assert [v_split(8192, 1, 64, sms) for sms in (64, 78, 114, 128, 144)] == [1, 1, 2, 2, 2]


def test_the_length_decides_nothing_if_all_are_alike() -> None:
    assert len({v_split(T, 1, 48, SMS) for T in (1, 31, 32, 33, 8192, 1 << 20)}) == 1  # too many heads for maps


@pytest.mark.parametrize(
    ("T", "H", "N", "packed", "split", "expected"),
    [
        (8192, 16, 1, False, 1, True),
        (8192, 16, 1, False, 2, False),
        (8192, 8, 4, False, 1, True),
        (8192, 8, 5, False, 1, False),  # 40 items
        (4065, 1, 1, False, 1, True),
        (4064, 1, 1, False, 1, False),
        (69_803, 8, 51, True, 1, True),  # one of them may be long
        (8192, 96, 6, True, 1, False),
        (1 << 20, 1, LISTED + 1, True, 1, False),
    ],
)
def test_builds_maps(T: int, H: int, N: int, packed: bool, split: Literal[1, 2], expected: bool) -> None:
    assert builds_maps(T, H, N, packed, split, SMS) is expected


def test_maps_lie_behind_all_else() -> None:
    assert maps_at(SMS, 1) == workspace_bytes(8192, 1, 8, False, 1, SMS)
    assert maps_bytes(SMS) >= SMS * (4 * STATE_BYTES + 4)


@pytest.mark.parametrize(
    ("T", "N", "H", "packed", "split", "needed"),
    [
        (192, 1, 132, False, 1, False),  # a block for each, and too short for segments
        (193, 1, 132, False, 1, True),
        (192, 1, 133, False, 1, True),
        (192, 1, 66, False, 2, False),
        (192, 1, 67, False, 2, True),
        (8192, 1, 1, False, 2, True),
        (200, LISTED, 96, True, 1, True),
        (8192, LISTED + 1, 96, True, 1, False),
        (200, LISTED + 1, 96, False, 1, True),  # all have the same length
    ],
)
def test_workspace(T: int, N: int, H: int, packed: bool, split: Literal[1, 2], needed: bool) -> None:
    size = workspace_bytes(T, N, H, packed, split, SMS)
    states = SMS * 2 // split * STATE_BYTES
    assert size == (words_bytes(SMS // split, split) + states if needed else 0)
    assert words_bytes(SMS // split, split) >= 8 * (2 * SMS // split + 3 * SMS * SMS)


@pytest.mark.parametrize(
    ("lengths", "H", "workers", "expected"),
    [
        ((8192,), 96, 66, (377, 0)),  # parts are longer than items
        ((8192,), 64, 66, (259, 0)),  # an item for each; cutting it would save 3 %
        ((8192,), 16, 66, (63, 1)),
        ((8192,), 16, 132, (32, 1)),
        ((65536,), 16, 66, (498, 15)),
        ((1 << 20,), 8, 66, (3973, MAX_WARM)),
        ((2048,), 12, 132, (MIN_PART, 1)),
        ((200,), 1, 66, (MIN_PART, 1)),
        ((128,), 1, 66, (7, 0)),  # shorter than a part must be
        ((60_000, *range(20, 400, 8)), 8, 132, (143, 4)),  # a long sequence beside short ones
    ],
)
def test_part(lengths: tuple[int, ...], H: int, workers: int, expected: tuple[int, int]) -> None:
    units = [-(-length // 32) + ITEM_COST for length in lengths]
    total = H * sum(units)
    length, warm = part(total, max(units), workers)
    assert (length, warm) == expected
    assert length * workers >= total and (warm > 0 or length >= max(units))


def test_names_are_unique_and_rings_fit() -> None:
    configs = all_configs()
    assert len({config.name for config in [*configs, *all_configs("fp16")]}) == 2 * len(configs)
    assert len({config.name for config in configs}) == len(configs) == 62
    for config in configs:
        if isinstance(config, (KdaDecodeConfig, KdaFusedDecodeConfig)):
            continue
        kib = 24 if isinstance(config, KdaBuildConfig) else 36 - 4 * (config.v_split == 2)
        stage = (kib + 8 * (config.g_dtype == "fp32")) << 10
        assert config.stages * stage < MAX_SMEM_BYTES
    assert KdaFwdConfig().v_split == 1
