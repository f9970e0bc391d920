"""The reference against itself: chunks against the recurrence, the recurrence against loops over numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp  # which torch needs

from kda_cute.reference import chunked, recurrence, transforms
from tests.strategies import DTYPES, Case, cases, make

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
    """The definition (docs/api.md, The operation), number by number. Shares nothing with reference/."""
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


# ---- gates and norms at their ends, against 60 digits

ENDS_OF_A_LOG = (-math.inf, -1000.0, -88.0, -3.0, 0.0, 1.5, 88.0, 89.0, 95.0, 100.0, 104.0, 120.0, 170.0, 340.0, 1000.0)
ENDS_OF_X = (
    0.0, 1.0, -1.0, 30.0, -15.9, -16.0, -20.0, -37.0, -80.0, -90.0, -100.0, -120.0, -700.0, -740.0, 1e4, -1e4,
    1e-20, 1e-38, -1e-38, 3e-42, 1e38,
)  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def exact_safe_gate(A_log: float, x: float) -> Any:
    y = mp.exp(mp.mpf(A_log)) * mp.mpf(x)
    return -5 / (1 + mp.exp(-max(min(y, mp.mpf(10**6)), mp.mpf(-(10**6)))))


def exact_softplus_gate(A_log: float, x: float) -> Any:
    return -mp.exp(mp.mpf(A_log)) * mp.log1p(mp.exp(mp.mpf(x)))


@dtypes
@pytest.mark.parametrize("by", ["g", "dt_bias"])
@pytest.mark.parametrize("gate", ["safe", "softplus"])
def test_gates_at_their_ends(gate: str, by: str, dtype: torch.dtype) -> None:
    """exp(A_log) overflows, exp(A_log) times what follows may not; -inf is only what is too large for the dtype."""
    info = torch.finfo(dtype)
    A_log = torch.tensor(ENDS_OF_A_LOG, dtype=dtype)
    x = torch.tensor([x for x in ENDS_OF_X if abs(x) < info.max], dtype=dtype)
    HV, K = len(A_log), len(x)
    g = x.expand(1, 1, HV, K).contiguous()
    dt_bias = None
    if by == "dt_bias":
        g, dt_bias = torch.zeros_like(g), g[0, 0]
    if gate == "safe":
        got = transforms.safe_gate(g, A_log, dt_bias, -5.0)
    else:
        got = transforms.softplus_gate(g, A_log, dt_bias)
    with mp.workdps(60):
        for i, a in enumerate(A_log.tolist()):
            for j, y in enumerate(x.tolist()):
                value = got[0, 0, i, j].item()
                want = (exact_safe_gate if gate == "safe" else exact_softplus_gate)(a, y)
                if abs(want) > info.max:
                    assert value == -math.inf
                    continue
                # the argument of the exponential is rounded too
                argument = min(abs(y) * math.exp(min(a, 700)), 800) if gate == "safe" else max(-y, 0)
                error = info.eps * (6 + 4 * argument + 2 * min(abs(a), 1e3))
                assert abs(value - want) <= error * abs(want) + info.smallest_normal, (a, y, value, float(want))


@dtypes
@pytest.mark.parametrize("gate", ["safe", "softplus"])
def test_gradients_of_gates_at_their_ends(gate: str, dtype: torch.dtype) -> None:
    """Of a decay, which is flat where its exponent is too large: finite, and those of smaller numbers."""
    A_log = torch.tensor(ENDS_OF_A_LOG, dtype=dtype, requires_grad=True)
    x = torch.tensor([x for x in ENDS_OF_X if abs(x) >= 1], dtype=dtype)  # exp(1000) is too large as a derivative at 0
    g = x.expand(1, 1, len(A_log), len(x)).contiguous().requires_grad_()
    if gate == "safe":
        decay = transforms.safe_gate(g, A_log, None, -5.0).exp()
    else:
        decay = transforms.softplus_gate(g, A_log, None).exp()
    decay.sum().backward()
    assert A_log.grad is not None and A_log.grad.isfinite().all()
    assert g.grad is not None and g.grad.isfinite().all()
    plain = [i for i, a in enumerate(ENDS_OF_A_LOG) if abs(a) <= 3]
    A_plain, g_plain = (
        A_log.detach()[plain].double().requires_grad_(),
        g.detach()[:, :, plain].double().requires_grad_(),
    )
    if gate == "safe":
        decay = (-5 * (A_plain.exp()[:, None] * g_plain).sigmoid()).exp()
    else:
        decay = (-A_plain.exp()[:, None] * -torch.nn.functional.logsigmoid(-g_plain)).exp()
    decay.sum().backward()
    tolerance: dict[str, Any] = dict(rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps)
    torch.testing.assert_close(A_log.grad[plain].double(), A_plain.grad, **tolerance)
    torch.testing.assert_close(g.grad[:, :, plain].double(), g_plain.grad, **tolerance)


def test_a_gate_that_is_zero_under_an_overflowing_factor() -> None:
    """0 * inf: the sigmoid of 0, with a gradient for A_log that is 0."""
    A_log = torch.tensor([89.0, 1000.0], requires_grad=True)
    log_decay = transforms.safe_gate(torch.zeros(1, 1, 2, 4), A_log, None, -5.0)
    assert (log_decay == -2.5).all()
    log_decay.sum().backward()
    assert A_log.grad is not None and (A_log.grad == 0).all()


@dtypes
def test_gates_at_their_ends_in_a_call(dtype: torch.dtype) -> None:
    """Results and gradients of the whole are finite and those of the recurrence."""
    for gate in ("safe", "softplus"):
        case = Case(1, (40,), H=5, K=8, V=8, dtype="fp64", g_dtype="fp64", gate=gate, initial_state="fp32")
        kwargs = make(case).oracle_kwargs
        kwargs["A_log"] = torch.tensor([88.0, 100.0, 1000.0, -math.inf, -1000.0], dtype=torch.float64)
        kwargs["g"] = torch.where(torch.arange(40).view(40, 1, 1) % 3 == 0, 1e4 * kwargs["g"].sign(), kwargs["g"])
        got = []
        for function in (recurrence, chunked):
            given = leaves(kwargs)
            o, S = function(**given, dtype=dtype)
            assert S is not None and o.isfinite().all() and S.isfinite().all()
            (o.square().sum() + S.square().sum()).backward()
            got.append((o, S, *(x.grad for x in given.values() if isinstance(x, torch.Tensor))))
        for x, y in zip(*got, strict=True):
            assert x.isfinite().all() and difference(y, x) <= (1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("of", ["bf16", "fp16", "fp32", "fp64"])
@dtypes
def test_l2norm_at_its_ends(of: str, dtype: torch.dtype) -> None:
    """Squares of the largest numbers overflow, those of the least underflow below the 1e-6."""
    info, compute = torch.finfo(DTYPES[of]), torch.finfo(dtype)
    rows = torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    rows[:, 0] = 1
    sizes = torch.tensor([info.max, info.max / 3, 2.0**20, 300, 1, 1e-3, 1e-6, info.tiny], dtype=torch.float64)
    sizes = sizes.clamp(max(info.tiny, compute.tiny), min(info.max, compute.max))
    x = (rows * sizes[:, None]).to(DTYPES[of]).requires_grad_()
    got = transforms.l2norm(x.to(dtype))
    with mp.workdps(60):
        for row, values in zip(x.tolist(), got.tolist(), strict=True):
            norm = mp.sqrt(sum(mp.mpf(y) ** 2 for y in row) + mp.mpf("1e-6"))
            for value, y in zip(values, row, strict=True):
                assert abs(value - y / norm) <= 4 * compute.eps * abs(max(map(abs, row)) / norm)
    got.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# ---- what comes later, in other heads and in other sequences


@st.composite
def poisoned(draw: st.DrawFn) -> tuple[Case, str, float, int, int, int | None]:
    """A call, and which argument of which token and head (of that argument) is what, in all channels or in one."""
    case = draw(cases(served=False, max_tokens=70, max_heads=3).filter(lambda case: case.cuts[-1] > 0))
    name = draw(st.sampled_from(["q", "k", "v", "g", "beta"]))
    tokens = case.B * case.T if case.cu_seqlens is None else case.cuts[-1]
    heads, channels = (case.H, case.K) if name in "qk" else (case.HV, case.V if name == "v" else case.K)
    channel = None if name == "beta" else draw(st.none() | st.integers(0, channels - 1))
    poison = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return case, name, poison, draw(st.integers(0, tokens - 1)), draw(st.integers(0, heads - 1)), channel


@given(drawn=poisoned(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_one_token_spoils_only_what_comes_after_it(drawn: Any, dtype: torch.dtype) -> None:
    """What it cannot reach keeps its bits, in its own sequence and head up to rounding; the rest is finite where the
    definition is."""
    case, name, poison, token, head, channel = drawn
    kwargs = make(case).oracle_kwargs
    before = chunked(**kwargs, dtype=dtype)
    rows = kwargs[name].clone().contiguous()
    rows.view(-1, *rows.shape[2:])[token, head] = (
        poison
        if channel is None
        else rows.view(-1, *rows.shape[2:])[token, head].index_fill(0, torch.tensor(channel), poison)
    )
    after = chunked(**{**kwargs, name: rows}, dtype=dtype)
    truth = recurrence(**{**kwargs, name: rows}, dtype=dtype)
    for x, y in zip(after, truth, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())
    sequences = [(n * case.T, (n + 1) * case.T) for n in range(case.B)]
    if case.cu_seqlens is not None:
        sequences = list(zip(case.cuts[:-1], case.cuts[1:], strict=True))
    (n, begin, end), = [(n, a, b) for n, (a, b) in enumerate(sequences) if a <= token < b]  # fmt: skip
    heads = slice(head * case.group, (head + 1) * case.group) if name in "qk" else slice(head, head + 1)
    (o, S), (o_after, S_after) = ((o.flatten(0, 1), S) for o, S in (before, after))
    close = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(o_after[begin:token, heads], o[begin:token, heads], rtol=close, atol=close)
    o_after[begin:end, heads], S_after[n, heads] = o[begin:end, heads], S[n, heads]
    for x, y in ((o_after, o), (S_after, S)):  # what is not finite makes the others go another way, in other roundings
        torch.testing.assert_close(x, y, rtol=close, atol=close)


@pytest.mark.parametrize("function", [recurrence, chunked])
def test_gradients_stay_in_their_head_and_sequence(function: Any) -> None:
    case = Case(3, (20, 33, 20), "int64", H=3, K=8, V=8, dtype="fp64", g_dtype="fp64", gate="log", initial_state="fp32")
    kwargs = leaves(make(case).oracle_kwargs)
    poison = torch.zeros_like(kwargs["v"])
    poison[0, 40, 1] = math.nan
    (function(**{**kwargs, "v": kwargs["v"] + poison})[0][0, :20].sum()).backward()
    for name in ("q", "k", "v", "g", "beta"):
        assert kwargs[name].grad[:, :, [0, 2]].isfinite().all() and kwargs[name].grad[:, :20].isfinite().all()


# ---- arguments that the recurrence has no rows for


@pytest.mark.parametrize("function", [recurrence, chunked])
@pytest.mark.parametrize("cuts", [[0, 9, 8], [0, 21], [-1, 20], [0, 7, 21, 20]])
def test_tokens_that_are_not_there(function: Any, cuts: list[int]) -> None:
    """On a GPU an index past the end ends the process's use of it, so values are looked at before."""
    kwargs = make(Case(1, (20,), K=8, V=8)).oracle_kwargs
    with pytest.raises(ValueError, match=r"cu_seqlens is \[.*\]: must be within 0 and T = 20, and never decrease"):
        function(**kwargs, cu_seqlens=torch.tensor(cuts))
