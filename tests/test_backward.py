"""The chunked backward by hand: against autograd of the recurrence in fp64, finite differences, and its memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kda_cute.call import DIFFERENTIABLE
from kda_cute.reference import backward, chunked_backward, recurrence
from tests.strategies import DTYPES, Case, cases, make
from tests.test_library import operator_arguments

DECAYS = ("strong", "weak", "mixed", "extreme")


def in_fp64(case: Case) -> dict[str, Any]:
    """The call's arguments in fp64, so that gradients are not rounded to less."""
    kwargs = make(case).oracle_kwargs
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in kwargs.items()}


def gradients_of_results(case: Case, which: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Random do and d_final_state of which one may be absent; nothing is zero by chance, other than by absence."""
    generator = torch.Generator().manual_seed(case.seed)
    do = torch.randn(case.B, case.T, case.HV, case.V, generator=generator, dtype=dtype)
    dS = torch.randn(case.state_shape, generator=generator, dtype=dtype)
    return (do if which != "state" else None), (dS if which != "o" else None)


def by_autograd(kwargs: dict[str, Any], do: Any, dS: Any, run: Any = recurrence, **options: Any) -> dict[str, Any]:
    leaves = {
        name: kwargs[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE if kwargs.get(name) is not None
    }
    results = run(**{**kwargs, **leaves, "output_final_state": True}, **options)
    pairs = [(x, d) for x, d in zip(results, (do, dS), strict=True) if d is not None and x.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    outputs, of_outputs = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), of_outputs, allow_unused=True)
    return {
        name: torch.zeros_like(x) if dx is None else dx for (name, x), dx in zip(leaves.items(), found, strict=True)
    }


def differences(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """|got - want| / |want|, in units of 1 where |want| is smaller."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.shape == want[name].shape and x.dtype == want[name].dtype and x.is_contiguous(), name
        assert x.isfinite().all(), name
    return {name: ((x - want[name]).norm() / want[name].norm().clamp(min=1)).item() for name, x in got.items()}


@given(
    case=cases(served=False, max_tokens=100, max_heads=3),
    chunk_size=st.sampled_from((1, 3, 16, 32, 64)),
    which=st.sampled_from(("both", "o", "state")),
    lanes=st.sampled_from((None, 1, 2)),
)
def test_is_autograd_of_the_recurrence(case: Case, chunk_size: int, which: str, lanes: int | None) -> None:
    kwargs = in_fp64(case)
    do, dS = gradients_of_results(case, which, torch.float64)
    want = by_autograd(kwargs, do, dS)
    with pytest.MonkeyPatch.context() as patch:
        if lanes is not None:  # heads and sequences in many parts
            size = lanes * backward.KEPT_EVERY * case.K * (chunk_size**2 + case.V)
            patch.setattr(backward, "ELEMENTS", {"cpu": size})
        got = chunked_backward(do, dS, **kwargs, chunk_size=chunk_size)
    for name, error in differences(got, want).items():
        assert error <= 1e-9, name
    if case.tail:
        for name in ("q", "k", "v", "g", "beta"):
            assert (got[name][:, case.cuts[-1] :] == 0).all()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_over_many_states_that_are_kept(gate: str, decay: str, dtype: torch.dtype) -> None:
    """Sequences that end in all kinds of places between two of them."""
    case = Case(5, (700, 0, 256, 257, 1, 511), "int64", 3, H=1, group=2, K=16, V=8, dtype="fp64", g_dtype="fp64",
                gate=gate, decay=decay, initial_state="fp32", neg_eigval=gate == "safe")  # fmt: skip
    kwargs = in_fp64(case)
    do, dS = gradients_of_results(case, "both", torch.float64)
    want = by_autograd(kwargs, do, dS)
    for name, error in differences(chunked_backward(do, dS, **kwargs, dtype=dtype), want).items():
        assert error <= (2e-5 if dtype == torch.float32 else 1e-10), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes(dtype: torch.dtype) -> None:
    """Gradients have the dtype of what they are of; those of the parameters are summed before they are rounded."""
    case = Case(6, (300, 300), H=2, group=2, K=8, V=16, initial_state="fp32", dt_bias="heads")
    kwargs = {
        name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in make(case).oracle_kwargs.items()
    }
    kwargs["A_log"] = kwargs["A_log"].view(1, 1, -1, 1)
    do, dS = gradients_of_results(case, "both", torch.float32)
    do = do[:, :1].expand(do.shape)
    got = chunked_backward(do, dS, **kwargs, dtype=torch.float64)
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in kwargs.items()}
    for name, want in by_autograd(exact, do.double(), dS.double()).items():
        assert got[name].dtype == dtype and got[name].shape == kwargs[name].shape
        torch.testing.assert_close(
            got[name].double(), want.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4
        )


def test_finite_differences() -> None:
    """Of the chunked forward's own results, so that nothing here comes from autograd."""
    case = Case(7, (5, 0, 4), "int32", 1, H=1, group=2, K=3, V=2, dtype="fp64", g_dtype="fp64", gate="softplus",
                initial_state="fp32", state_v_first=True)  # fmt: skip
    kwargs = in_fp64(case)
    do, dS = gradients_of_results(case, "both", torch.float64)
    got = chunked_backward(do, dS, **kwargs, chunk_size=3)
    step = 1e-6

    def loss(name: str, x: torch.Tensor) -> float:
        o, S = recurrence(**{**kwargs, name: x})
        assert S is not None
        return ((o * do).sum() + (S * dS).sum()).item()

    for name, gradient in got.items():
        x = kwargs[name]
        for i in range(x.numel()):
            moved = torch.zeros(x.numel(), dtype=x.dtype).index_fill(0, torch.tensor(i), step).view(x.shape)
            difference = (loss(name, x + moved) - loss(name, x - moved)) / (2 * step)
            assert abs(difference - gradient.flatten()[i].item()) <= 1e-7 * max(1, abs(difference)), (name, i)


def test_a_log_decay_of_a_thousand_has_no_gradient_from_its_neighbours() -> None:
    """Gates multiply by it: a rounding of what weak tokens around it have would come out a thousand times as large."""
    kwargs = in_fp64(Case(8, (64,), gate="log", K=16, V=16, initial_state="fp32"))
    strong = torch.arange(64) % 7 == 3
    for decay in (-1000.0, -math.inf):
        kwargs["g"] = torch.where(strong.view(1, 64, 1, 1), decay, torch.full_like(kwargs["g"], -1e-3))
        do, dS = torch.ones_like(kwargs["v"]), None
        for dtype in (torch.float32, torch.float64):
            dg = chunked_backward(do, dS, **kwargs, dtype=dtype)["g"]
            assert dg.isfinite().all() and (dg[:, strong] == 0).all() and (dg[:, ~strong] != 0).any()


@pytest.mark.parametrize("gate", ["safe", "softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_gates_at_their_ends(gate: str, dtype: torch.dtype) -> None:
    """exp(A_log) overflows."""
    case = Case(1, (40,), H=5, K=8, V=8, dtype="fp64", g_dtype="fp64", gate=gate, initial_state="fp32")
    kwargs = in_fp64(case)
    kwargs["A_log"] = torch.tensor([88.0, 100.0, 1000.0, -math.inf, -1000.0], dtype=torch.float64)
    kwargs["g"] = torch.where(torch.arange(40).view(40, 1, 1) % 3 == 0, 1e4 * kwargs["g"].sign(), kwargs["g"])
    do, dS = gradients_of_results(case, "both", torch.float64)
    want = by_autograd(kwargs, do, dS, dtype=dtype)
    for name, error in differences(chunked_backward(do, dS, **kwargs, dtype=dtype), want).items():
        assert error <= (1e-3 if dtype == torch.float32 else 1e-9), name


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "do"])
def test_what_is_not_finite_stays_in_its_sequence_and_head(name: str, poison: float) -> None:
    case = Case(9, (20, 33, 20), "int64", 2, H=3, K=8, V=8, dtype="fp32", g_dtype="fp32", beta_dtype="fp32",
                gate="safe", initial_state="fp32", dt_bias="heads")  # fmt: skip
    kwargs = make(case).oracle_kwargs
    do, dS = gradients_of_results(case, "both", torch.float32)
    before = chunked_backward(do, dS, **kwargs, dtype=torch.float32)
    given = {**kwargs, "do": do}
    given[name] = given[name].clone()
    given[name][0, 30, 1] = poison
    given[name][0, -1] = poison  # of no sequence
    after = chunked_backward(d_final_state=dS, **given, dtype=torch.float32)
    if name not in ("g", "beta") or poison != math.inf:  # whose sigmoids are finite
        assert not after["q"][0, 30, 1].isfinite().all()
    for x, y in zip(after.values(), before.values(), strict=True):
        if x.dim() > 2 and x.shape[1] == case.T:
            x[0, 20:53, 1] = y[0, 20:53, 1]
    after["initial_state"][1, 1] = before["initial_state"][1, 1]
    for name in ("A_log", "dt_bias"):
        after[name][1] = before[name][1]
    for name, x in after.items():
        assert torch.equal(x, before[name]), name


def test_nothing_to_differentiate() -> None:
    kwargs = in_fp64(Case(1, (5, 5), K=4, V=4, initial_state="fp32"))
    for x in chunked_backward(None, None, **kwargs).values():
        assert (x == 0).all()


# ---- memory


def peak(run: Any) -> int:
    """The most bytes that are allocated at a time, of those that `run` allocates, its results among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = run()
    assert results is not None and profile.profiler is not None
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    now = most = 0
    for x in sorted(events, key=lambda x: x.start_ns()):
        now += x.nbytes()
        most = max(most, now)
    return most


SMALL = Case(1, (2048,), H=1, K=64, V=64, dtype="fp32", g_dtype="fp32", beta_dtype="fp32", initial_state="fp32")
LARGER = {
    "tokens": replace(SMALL, lengths=(4096,)),
    "heads": replace(SMALL, H=2),
    "sequences": replace(SMALL, lengths=(2048, 2048)),
    "short sequences": replace(SMALL, lengths=(2048, *[256] * 8), cu_seqlens="int32"),
}


def bytes_a_token(larger: Case, backward_of: Any) -> float:
    """What 2048 tokens and heads more take, besides the gradients."""

    def run(case: Case) -> float:
        kwargs = make(case).kwargs
        do, dS = gradients_of_results(case, "both", torch.float32)
        results = sum(x.nbytes for name, x in kwargs.items() if name in DIFFERENTIABLE and x is not None)
        return peak(lambda: backward_of(do, dS, kwargs)) - results

    return (run(larger) - run(SMALL)) / 2048


@pytest.mark.parametrize("larger", LARGER.values(), ids=LARGER)
def test_memory(larger: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more tokens a state every 16 chunks, of more heads and sequences nothing: they take turns."""
    monkeypatch.setitem(backward.ELEMENTS, "cpu", 1)

    def operator(do: Any, dS: Any, kwargs: dict[str, Any]) -> Any:
        arguments = [*operator_arguments(kwargs), [True] * len(DIFFERENTIABLE)]
        return torch.ops.kda_cute.chunk_kda_backward(do, dS, *arguments)

    kept = 64 * 64 * 4 / (16 * backward.KEPT_EVERY) if larger is LARGER["tokens"] else 0
    assert abs(bytes_a_token(larger, operator) - kept) < 8


def test_memory_to_work_with() -> None:
    """As the docstring says: six times ELEMENTS."""
    kwargs = make(replace(SMALL, lengths=(512, 512), H=16, K=128, V=128)).kwargs
    do, dS = torch.ones_like(kwargs["v"]), torch.ones_like(kwargs["initial_state"])
    most = peak(lambda: chunked_backward(do, dS, **kwargs, dtype=torch.float32))
    kept = 32 * 512 * 256
    results = sum(x.nbytes for name, x in kwargs.items() if name in DIFFERENTIABLE)
    assert most - results - kept <= 6 * backward.ELEMENTS["cpu"] * 4
