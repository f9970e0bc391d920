"""How far the GPU tests let a kernel's states be off: rounding of operands to bf16 is, what is wrong is not."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.oracle import BOUND, state_bound


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("v_first", [False, True])
def test_states_of_many_channels_have_the_plain_bound(v_first: bool) -> None:
    S = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    size = S.double().flatten(2).norm(dim=-1)
    allowed = state_bound(S, v_first)
    assert (allowed > BOUND * size).all() and (allowed < 1.02 * BOUND * size).all()
    assert not state_bound(torch.zeros_like(S), v_first).any()


def test_state_of_one_token_in_a_few_channels() -> None:
    """S = Kr U^T, U = T v, with Kr, T, U and S rounded. Most of the states are in one to three channels."""
    generator = torch.Generator().manual_seed(0)
    heads = 4000
    T, v = (
        torch.rand(heads, 1, 1, generator=generator) + 0.1,
        torch.randn(heads, 1, 128, generator=generator).bfloat16(),
    )
    k = torch.randn(heads, 16, 1, generator=generator) * torch.exp2(-8 * torch.rand(heads, 16, 1, generator=generator))
    S = k.double() * T.double() * v.double()
    got = rounded(rounded(k) * rounded(rounded(T) * v.double()))
    error, size = (x.flatten(1).norm(dim=-1) for x in (got - S, S))
    assert (error > BOUND * size).any()  # so the plain bound would not do
    assert (error < state_bound(S, False)).all()
    assert (0.02 * size > state_bound(S, False)).all()  # a decay that is wrong by 2 %
