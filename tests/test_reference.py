"""The reference against itself: chunks against the recurrence, the recurrence against loops over numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kda_cute.reference import chunked, recurrence
from tests.strategies import Case, cases, make

AGREE = 1e-10


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """max |x - y|, in units of the largest |y| where that is over 1."""
    assert x.shape == y.shape and x.dtype == y.dtype
    if not y.numel():
        return 0.0
    return ((x - y).abs().max() / y.abs().max().clamp(min=1)).item()


@given(case=cases(served=False, max_tokens=150, max_heads=3), chunk_size=st.sampled_from((1, 3, 16, 32, 64)))
def test_chunked_is_the_recurrence(case: Case, chunk_size: int) -> None:
    kwargs = make(case).oracle_kwargs
    o, S = recurrence(**kwargs)
    o_chunked, S_chunked = chunked(**kwargs, chunk_size=chunk_size)
    assert S is not None and S_chunked is not None
    assert o.shape == (case.B, case.T, case.HV, case.V) and S.shape == case.state_shape
    assert o.isfinite().all() and S.isfinite().all()
    assert difference(o_chunked, o) <= AGREE
    assert difference(S_chunked, S) <= AGREE


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("log_decay", [-1e-6, -1e-3, -1.0, -5.0, -80.0, -1000.0])
def test_constant_log_decay(log_decay: float, chunk_size: int) -> None:
    case = Case(1, (200, 200), H=2, gate="log", dtype="fp64", g_dtype="fp64", K=32, V=16, initial_state="fp32")
    kwargs = make(case).oracle_kwargs
    kwargs["g"] = torch.full_like(kwargs["g"], log_decay)
    for x, y in zip(chunked(**kwargs, chunk_size=chunk_size), recurrence(**kwargs), strict=True):
        assert difference(x, y) <= AGREE


def test_decay_to_nothing() -> None:
    """A log decay of -inf forgets all: a state of 0, never 0 * inf."""
    kwargs = make(
        Case(2, (40,), gate="log", dtype="fp64", g_dtype="fp64", K=8, V=8, initial_state="fp32")
    ).oracle_kwargs
    kwargs["g"] = torch.where(torch.rand_like(kwargs["g"]) < 0.3, -math.inf, kwargs["g"])
    for x, y in zip(chunked(**kwargs), recurrence(**kwargs), strict=True):
        assert y.isfinite().all()
        assert difference(x, y) <= AGREE


def test_weak_decay_behind_a_strong_one_in_fp32() -> None:
    """The exponents of a chunk are sums of their own: after -1e5 nats a difference of cumulated ones has lost 1e-2."""
    kwargs = make(Case(3, (128,), H=2, gate="log", dtype="fp32", g_dtype="fp32", K=32, V=32)).oracle_kwargs
    kwargs["g"] = torch.full_like(kwargs["g"], -0.01)
    kwargs["g"][:, ::16] = -1e5
    o, S = recurrence(**kwargs)
    o_fp32, S_fp32 = chunked(**kwargs, dtype=torch.float32, chunk_size=64)
    assert S is not None and S_fp32 is not None and o_fp32.dtype == S_fp32.dtype == torch.float32
    assert difference(o_fp32.double(), o) <= 1e-5
    assert difference(S_fp32.double(), S) <= 1e-5


def loops(case: Case, a: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The definition (README, The operation), number by number. Shares nothing with reference/."""
    x = {n: t.double().numpy() for n, t in a.items() if isinstance(t, torch.Tensor)}
    scale = case.K**-0.5 if case.scale is None else case.scale
    o = np.zeros((case.B, case.T, case.HV, case.V))
    final = np.zeros((case.N, case.HV, case.V, case.K))
    for n in range(case.N):
        b = n if case.cu_seqlens is None else 0
        first, end = (0, case.T) if case.cu_seqlens is None else case.cuts[n : n + 2]
        for h in range(case.HV):
            S = np.zeros((case.V, case.K))
            if "initial_state" in x:
                S = x["initial_state"][n, h] if case.state_v_first else x["initial_state"][n, h].T
            for t in range(first, end):
                q, k = x["q"][b, t, h // case.group], x["k"][b, t, h // case.group]
                if case.l2norm:
                    q, k = (y / math.sqrt(sum(y * y) + 1e-6) for y in (q, k))
                decay = []
                for c in range(case.K):
                    g = x["g"][b, t, h, c]
                    if case.gate != "log":
                        rate = math.exp(x["A_log"][h]) if "A_log" in x else 1.0
                        g += x["dt_bias"].reshape(case.HV, case.K)[h, c] if "dt_bias" in x else 0.0
                        if case.gate == "safe":
                            g = case.lower_bound / (1 + math.exp(-rate * g))
                        else:
                            g = -rate * (math.log1p(math.exp(g)) if g < 30 else g)
                    decay.append(math.exp(g))
                beta = x["beta"][b, t, h]
                if case.beta_sigmoid:
                    beta = (2 if case.neg_eigval else 1) / (1 + math.exp(-beta))
                S = S @ np.diag(decay)
                S = S + np.outer(beta * (x["v"][b, t, h] - S @ k), k)
                o[b, t, h] = scale * (S @ q)
            final[n, h] = S
    return o, final if case.state_v_first else final.swapaxes(-1, -2)


LOOPED = [
    Case(4, (9, 9), H=2, group=2, K=5, V=3, dtype="fp64", gate="safe", initial_state="fp32", lower_bound=-3.0),
    Case(5, (7, 0, 4), "int32", 2, H=1, group=3, K=4, V=6, gate="softplus", neg_eigval=True, state_v_first=True),
    Case(6, (3, 8), "int64", H=2, K=4, V=4, gate="log", l2norm=False, beta_sigmoid=False, scale=0.7),
    Case(7, (6,), H=2, K=4, V=4, A_log=False, dt_bias=None, initial_state="bf16"),
]


@pytest.mark.parametrize("case", LOOPED, ids=lambda case: case.gate + str(case.seed))
def test_recurrence_is_the_definition(case: Case) -> None:
    call = make(case)
    o, S = recurrence(**call.oracle_kwargs)
    assert S is not None
    o_loops, S_loops = loops(case, call.tensors)
    np.testing.assert_allclose(o.numpy(), o_loops, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(S.numpy(), S_loops, rtol=1e-10, atol=1e-12)


def leaves(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Fresh fp64 leaves that require grad, in place of all floating tensors."""
    return {
        name: x.double().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in kwargs.items()
    }


@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
def test_gradcheck(gate: str) -> None:
    case = Case(8, (4, 0, 3), "int64", 1, group=2, K=3, V=2, dtype="fp64", g_dtype="fp64", gate=gate, decay="mixed",
                initial_state="fp32", neg_eigval=True)  # fmt: skip
    kwargs = leaves(make(case).oracle_kwargs)
    names = [name for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(*tensors: torch.Tensor) -> Any:
        return chunked(**{**kwargs, **dict(zip(names, tensors, strict=True))}, chunk_size=3)

    assert torch.autograd.gradcheck(call, [kwargs[name] for name in names])


@given(case=cases(served=False, max_tokens=40, max_heads=2))
def test_gradients_are_those_of_the_recurrence(case: Case) -> None:
    plain = make(case).oracle_kwargs
    gradients = []
    for function in (recurrence, chunked):
        kwargs = leaves(plain)
        o, S = function(**kwargs)
        assert S is not None
        loss = o.square().sum() + S.square().sum()
        if loss.requires_grad:  # not without any sequence
            loss.backward()
        gradients.append({n: x.grad for n, x in kwargs.items() if isinstance(x, torch.Tensor) and x.requires_grad})
    for name, expected in gradients[0].items():
        got = gradients[1][name]
        if expected is None:
            expected = torch.zeros_like(plain[name], dtype=torch.float64)
        got = torch.zeros_like(expected) if got is None else got
        assert expected.isfinite().all() and difference(got, expected) <= 1e-9, name


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_nan_stays_in_its_sequence_and_head(name: str, poison: float) -> None:
    case = Case(9, (20, 33, 20), "int64", H=3, K=8, V=8, dtype="fp32", g_dtype="fp32", beta_dtype="fp32",
                gate="log", l2norm=False, beta_sigmoid=False, initial_state="fp32")  # fmt: skip
    kwargs = make(case).oracle_kwargs
    o, S = chunked(**kwargs)
    kwargs[name] = kwargs[name].clone()
    kwargs[name][0, 30, 1] = poison
    o_bad, S_bad = chunked(**kwargs)
    assert S is not None and S_bad is not None
    assert not o_bad[0, 30, 1].isfinite().all()
    o_bad[0, 20:53, 1], S_bad[1, 1] = o[0, 20:53, 1], S[1, 1]
    assert torch.equal(o_bad, o) and torch.equal(S_bad, S)
