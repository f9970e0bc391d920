"""fused_recurrent_kda on a Hopper GPU against the fp64 reference on the same GPU. Needs one; `pytest -m gpu`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kda_cute import chunk_kda, fused_recurrent_kda, known_calls, replay_shape
from tests import by_token
from tests.gpu.oracle import BOUND, relative_error
from tests.gpu.test_kda_gpu import DEVICE, check
from tests.strategies import Case, cases, make

pytestmark = pytest.mark.gpu
# Arithmetic is fp32; o is rounded to bf16, a state perhaps too: 1.7e-3 both.
AT_MOST = 2.5e-3


def decode(safe_gate: bool = False, **kwargs: Any) -> Any:
    return fused_recurrent_kda(**kwargs)


def short(case: Case) -> Case:
    """At most 16 tokens a sequence, no checkpoints."""
    return replace(
        case, lengths=tuple(n % 17 for n in case.lengths), checkpoint_interval=None, offsets=None, batch_invariant=False
    )


@settings(settings.get_profile(os.environ.get("KDA_CUTE_GPU_PROFILE", "gpu")))
@given(case=cases(served=True, max_tokens=400).map(short))
def test_call(case: Case) -> None:
    check(case, decode, AT_MOST, draw=0.0)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
@pytest.mark.parametrize("v_first", [False, True])
def test_every_length(length: int, gate: str, v_first: bool) -> None:
    case = Case(41, (length,) * 3, H=2, gate=gate, initial_state="fp32", final_state="fp32", state_v_first=v_first)
    check(replace(case, out=True), decode, AT_MOST, draw=0.0)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), v_first=st.booleans(), bf16=st.booleans())
def test_states_after_each_token(seed: int, v_first: bool, bf16: bool) -> None:
    case = Case(
        seed, (3, 0, 7, 1), "int32", tail=2, H=2, initial_state="fp32", final_state="new", state_v_first=v_first
    )
    call = make(case, DEVICE)
    shape = (1, case.T, *case.state_shape[1:])
    states = torch.full(shape, float("nan"), dtype=torch.bfloat16 if bf16 else torch.float32, device=DEVICE)
    o, S, states = decode(**call.kwargs, token_states=states)
    plain_o, plain_S = decode(**call.kwargs)
    assert torch.equal(o[:, : case.cuts[-1]], plain_o[:, : case.cuts[-1]]) and torch.equal(S, plain_S)
    want = fused_recurrent_kda(**{k: x for k, x in call.kwargs.items() if k != "safe_gate"}, output_token_states=True,
                               backend="reference")[2]  # fmt: skip
    assert relative_error(states[:, : case.cuts[-1]], want[:, : case.cuts[-1]]) <= AT_MOST
    assert (states[:, case.cuts[-1] :] == 0).all()


def near(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x.double() - y.double()).norm() <= AT_MOST * y.double().norm())


@settings(settings.get_profile(os.environ.get("KDA_CUTE_GPU_PROFILE", "gpu")))
@given(call=by_token.calls)
def test_call_by_token(call: dict[str, Any]) -> None:
    """Slots and rows for single tokens, tokens on record: as the reference has it, and nothing else written."""
    kwargs = by_token.arguments(DEVICE, **call)
    given, want = by_token.copied(kwargs), by_token.copied(kwargs)
    o = fused_recurrent_kda(**given)[0]
    expected = fused_recurrent_kda(**want, backend="reference")[0]
    assert near(o, expected)
    for name in by_token.WRITTEN:
        if name not in kwargs:
            continue
        x, y, before = given[name], want[name], kwargs[name]
        same = (y == before).flatten(-2).all(-1)
        assert torch.equal(x[same], before[same]), f"{name} is written where it must not be"
        assert near(x[~same], y[~same]), name


@pytest.mark.parametrize("v_first", [False, True])
def test_steps_with_replay_are_those_without(v_first: bool) -> None:
    """Three tokens a step, of which some count: the states are those of the tokens that do, one after the other."""
    case = Case(77, (30,) * 5, H=4, initial_state="fp32", state_v_first=v_first)
    kwargs, names = make(case, DEVICE).kwargs, ("q", "k", "v", "g", "beta")
    state = kwargs.pop("initial_state").clone()
    record = torch.zeros(replay_shape(5, 3, 4, 128, 128), device=DEVICE)
    accepted, at, counted = torch.zeros(5, dtype=torch.int32, device=DEVICE), [0] * 5, state.clone()
    for step in range(6):
        drafts = {name: torch.stack([kwargs[name][n, at[n] : at[n] + 3] for n in range(5)]) for name in names}
        o, _ = decode(**{**kwargs, **drafts, "initial_state": state, "replay": record, "num_accepted_tokens": accepted})
        assert relative_error(state, counted) <= AT_MOST
        plain, _ = decode(**{**kwargs, **drafts, "initial_state": counted, "output_final_state": True})
        assert relative_error(o, plain) <= AT_MOST
        accepted = torch.tensor([1 + (step + n) % 3 for n in range(5)], dtype=torch.int32, device=DEVICE)
        for n, count in enumerate(accepted.tolist()):
            one = {name: kwargs[name][n : n + 1, at[n] : at[n] + count] for name in names}
            one = {**kwargs, **one, "initial_state": counted[n : n + 1], "output_final_state": True}
            counted[n : n + 1] = decode(**one)[1]
            at[n] += count


@pytest.mark.parametrize("v_first", [False, True])
def test_prefill_and_then_token_by_token(v_first: bool) -> None:
    case = Case(42, (200,) * 3, H=4, group=2, initial_state="fp32", final_state="new", state_v_first=v_first)
    kwargs, names = make(case, DEVICE).kwargs, ("q", "k", "v", "g", "beta")
    o, S = chunk_kda(**kwargs)
    first, state = chunk_kda(**{**kwargs, **{name: kwargs[name][:, :190] for name in names}})
    pieces = [first]
    for t in range(190, 200):
        one = {name: kwargs[name][:, t : t + 1] for name in names}
        pieces.append(decode(**{**kwargs, **one, "initial_state": state, "final_state": state})[0])
    assert relative_error(torch.cat(pieces, 1), o) <= BOUND and relative_error(state, S) <= BOUND


def test_graph_replays_with_other_inputs() -> None:
    call, other = (make(Case(seed, (1,) * 8, H=4, initial_state="fp32"), DEVICE) for seed in (1, 2))
    kwargs = {name: x for name, x in call.kwargs.items() if name != "safe_gate"}
    state = kwargs["initial_state"]
    decode(**kwargs, final_state=state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = decode(**kwargs, final_state=state)
    for name, x in call.tensors.items():
        x.copy_(other.tensors[name])
    want = other.tensors["initial_state"].clone()
    graph.replay()
    want_o, _ = decode(**{**other.kwargs, "initial_state": want, "final_state": want})
    assert torch.equal(o, want_o) and torch.equal(state, want)


def test_host_remembers_a_call() -> None:
    kwargs = make(Case(5, (1,) * 4, H=2, initial_state="fp32"), DEVICE).kwargs
    for _ in range(3):
        decode(**kwargs)
    assert any(known is not None for known in known_calls.known.values())
