"""Segments that begin with what the maps of those before give: long sequences, few heads, weak gates. Needs a GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch

from kda_cute import known_calls
from kda_cute.backends import hopper
from kda_cute.kernels.config import ITEM_COST, part
from kda_cute.reference import chunked
from tests.gpu.oracle import BOUND, relative_error
from tests.gpu.test_kda_gpu import bits, multiprocessors, run, uncut
from tests.strategies import Call, Case, make

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ONE, FOUR = (3000,), (1500, 33, 0, 2500)


@contextlib.contextmanager
def maps() -> Iterator[None]:
    """However short sequences are."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hopper, "v_split", lambda *_: 1)
        m.setattr(hopper, "builds_maps", lambda *_: True)
        m.setattr(known_calls, "known", {})
        yield


@contextlib.contextmanager
def no_maps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hopper, "v_split", lambda *_: 1)
        m.setattr(known_calls, "known", {})
        with uncut():
            yield


def call_of(inputs: str, lengths: tuple[int, ...], count: int, **case: object) -> Call:
    H, sms = 3, count or torch.cuda.get_device_properties(DEVICE).multi_processor_count
    units = [-(-length // 32) + ITEM_COST for length in lengths]
    assert part(H * sum(units), max(units), sms)[1] > 0, "no segments"
    decay = inputs if inputs in ("strong", "mixed") else "weak"
    cu_seqlens = "int64" if len(lengths) > 1 else None
    call = make(
        Case(29, lengths, cu_seqlens, H=H, decay=decay, initial_state="fp32", final_state="new", **case), DEVICE
    )
    x = call.tensors
    if inputs == "turning":  # each head forgets at other times
        x["A_log"][:] = 0
        x["g"][:, :, 0] -= 12
        x["g"][:, 700:1400, 1] -= 12
        x["g"][:, 2000:, 2] += 12
    elif inputs == "poisoned":
        x["v"][0, 1000, :, 5] = math.nan
        x["initial_state"][0, :, :, 9] = math.inf
    elif inputs == "infinite":  # C overflows, or the product of a state and M
        x["v"][0, 1000:1030] *= 1e37
        x["initial_state"] *= 1e37
    return call


@pytest.mark.parametrize("count", [0, 24])
@pytest.mark.parametrize("lengths", [ONE, FOUR], ids=["one", "four"])
@pytest.mark.parametrize("inputs", ["strong", "weak", "mixed", "turning"])
def test_accuracy_with_maps(inputs: str, lengths: tuple[int, ...], count: int) -> None:
    """The bound is that of a run without segments."""
    call = call_of(inputs, lengths, count)
    o_true, S_true = chunked(**call.oracle_kwargs)
    with maps(), multiprocessors(count):
        o, S = run(call)
        for _ in range(5):
            o_again, S_again = run(call)
            assert torch.equal(o, o_again) and torch.equal(S, S_again)
    assert S_true is not None
    assert relative_error(o, o_true) <= BOUND and relative_error(S, S_true) <= BOUND
    if inputs == "strong":
        with no_maps():
            o_whole, S_whole = run(call)
        assert torch.equal(bits(o), bits(o_whole)) and torch.equal(bits(S), bits(S_whole))


@pytest.mark.parametrize("neg_eigval", [False, True])
@pytest.mark.parametrize("state", ["bf16", "fp32", None])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("g_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("gate", ["safe", "log"])
def test_every_configuration_with_maps(
    gate: str, g_dtype: str, state_v_first: bool, state: str | None, neg_eigval: bool
) -> None:
    case = Case(
        30, (1700,), H=2, decay="weak", gate=gate, g_dtype=g_dtype, initial_state=state, final_state="new",
        state_v_first=state_v_first, neg_eigval=neg_eigval,
    )  # fmt: skip
    call = make(case, DEVICE)
    o_true, S_true = chunked(**call.oracle_kwargs)
    with maps():
        o, S = run(call)
    assert S_true is not None
    assert relative_error(o, o_true) <= BOUND and relative_error(S, S_true) <= BOUND


@pytest.mark.parametrize("count", [0, 24])
@pytest.mark.parametrize("lengths", [ONE, FOUR], ids=["one", "four"])
@pytest.mark.parametrize("inputs", ["poisoned", "infinite"])
def test_maps_change_no_nan(inputs: str, lengths: tuple[int, ...], count: int) -> None:
    call = call_of(inputs, lengths, count)
    with no_maps():
        o_whole, S_whole = run(call)
    if inputs == "poisoned":
        assert not S_whole.isfinite().all()
    with maps(), multiprocessors(count):
        o, S = run(call)
    assert torch.equal(o.isnan(), o_whole.isnan()) and torch.equal(S.isnan(), S_whole.isnan())


def test_graph_with_maps() -> None:
    """Weak gates and strong ones through one graph: what is built is decided anew each time."""
    weak, strong = call_of("weak", ONE, 0), call_of("strong", ONE, 0)
    with maps():
        expected = [tuple(x.clone() for x in run(call)) for call in (weak, strong)]
        call = call_of("weak", ONE, 0)
        run(call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, S = run(call)
    for other, (o_eager, S_eager) in ((strong, expected[1]), (weak, expected[0]), (strong, expected[1])):
        for name, x in call.tensors.items():
            x.copy_(other.tensors[name])
        o.fill_(math.nan), S.fill_(math.nan)
        graph.replay()
        assert torch.equal(o, o_eager) and torch.equal(S, S_eager)
