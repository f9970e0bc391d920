"""The choice of a configuration by shape: plain Python."""

from __future__ import annotations

from typing import Literal

import pytest

from kda_cute.kernels.config import (
    FLAGS_BYTES,
    LISTED,
    MAX_SMEM_BYTES,
    KdaFwdConfig,
    all_configs,
    v_split,
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
        (8192, 1, 1, 2),
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
    assert len({v_split(T, 1, 48, SMS) for T in (1, 31, 32, 33, 8192, 1 << 20)}) == 1


@pytest.mark.parametrize(
    ("N", "H", "packed", "split", "needed"),
    [
        (1, 132, False, 1, False),  # a block for each
        (1, 133, False, 1, True),
        (1, 66, False, 2, False),
        (1, 67, False, 2, True),
        (LISTED, 96, True, 1, True),
        (LISTED + 1, 96, True, 1, False),
        (LISTED + 1, 96, False, 1, True),  # all have the same length
    ],
)
def test_workspace(N: int, H: int, packed: bool, split: Literal[1, 2], needed: bool) -> None:
    size = workspace_bytes(N, H, packed, split, SMS)
    assert size == (FLAGS_BYTES + SMS * 128 * 128 * 4 // split if needed else 0)
    assert SMS * 2 // split * 8 <= FLAGS_BYTES


def test_names_are_unique_and_rings_fit() -> None:
    configs = all_configs()
    assert len({config.name for config in configs}) == len(configs) == 16
    for config in configs:
        stage = (36 + 8 * (config.g_dtype == "fp32") - 4 * (config.v_split == 2)) << 10
        assert config.stages * stage < MAX_SMEM_BYTES
    assert KdaFwdConfig().v_split == 1
