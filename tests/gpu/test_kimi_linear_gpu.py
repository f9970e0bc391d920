"""The example model with the kernels: the same logits any way, and its answers. Needs a Hopper GPU; `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kda_cute import devices, known_calls
from kda_cute.backends import reference as reference_backend
from kda_cute.demo import CHECKPOINT, answer
from kda_cute.examples.kimi_linear.model import Cache, KimiLinear
from kda_cute.examples.kimi_linear.recall import sample
from tests.gpu.oracle import relative_error
from tests.gpu.test_kda_gpu import DEVICE

pytestmark = pytest.mark.gpu
ROUNDING = 2e-2  # of logits: bf16 between layers, relative Frobenius


@pytest.fixture(scope="module")
def model() -> KimiLinear:
    return KimiLinear.load(CHECKPOINT, DEVICE)


def streams(length: int, count: int, seed: int = 0) -> Any:
    return sample(count, length, torch.Generator(DEVICE).manual_seed(seed))


@torch.no_grad()
def test_prefill_and_decoding_are_one_forward_pass(model: KimiLinear) -> None:
    tokens = streams(16384, 4).tokens
    whole = model(tokens)
    cache, half = Cache(), tokens.shape[1] // 2
    parts = [model(piece, cache) for piece in tokens[:, : half + 7].split(half // 3, 1)]
    parts += [model(tokens[:, t : t + 1], cache) for t in range(half + 7, half + 40)]
    got = torch.cat(parts, 1)
    assert relative_error(got, whole[:, : got.shape[1]]) <= ROUNDING


@torch.no_grad()
def test_kernels_and_reference_give_the_same_logits(model: KimiLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = streams(4096, 4).tokens
    logits = model(tokens)
    cache = Cache()
    steps = [model(tokens[:, :-5], cache), *(model(tokens[:, t : t + 1], cache) for t in range(-5, -1))]
    monkeypatch.setattr(devices, "backend_of", lambda *_: reference_backend)
    monkeypatch.setattr(known_calls, "known", {})  # or what is remembered would launch kernels
    reference = model(tokens)
    assert relative_error(logits, reference) <= ROUNDING
    assert relative_error(torch.cat(steps, 1), reference[:, :-1]) <= ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("times", [1, 4])
def test_recall(model: KimiLinear, times: int) -> None:
    stream = streams(times * model.config.trained_tokens, 64 // times, 7)
    assert answer(model, stream)[0] >= 0.99
