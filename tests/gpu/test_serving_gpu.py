"""What servers ask of chunk_kda and fused_recurrent_kda, with the launches that real calls have. `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kda_cute import chunk_kda, fused_recurrent_kda, known_calls
from tests.gpu.oracle import BOUND, give_memory_back, relative_error
from tests.strategies import Case, make

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NAMES = ("q", "k", "v", "g", "beta")
LENGTHS = (3000, 700, 20000, 33)


def part(kwargs: dict[str, Any], begin: int, end: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the last state of some tokens, in a call of their own."""
    cut = {name: kwargs[name][:, begin:end] for name in NAMES}
    cuts = torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE)
    return chunk_kda(**{**kwargs, **cut, "cu_seqlens": cuts, "initial_state": state})


@pytest.mark.parametrize("decay", ["strong", "weak", "mixed"])
@pytest.mark.parametrize("H", [4, 40])
def test_batch_invariant(decay: str, H: int) -> None:
    """The bits of a sequence alone, and cut at a multiple of 32 tokens, are those in a batch."""
    case = Case(61, LENGTHS, "int32", H=H, decay=decay, initial_state="fp32", final_state="new")
    kwargs = {**make(case, DEVICE).kwargs, "batch_invariant": True}
    o, S = chunk_kda(**kwargs)
    for n, (begin, end) in enumerate(zip(case.cuts[:-1], case.cuts[1:], strict=True)):
        first = kwargs["initial_state"][n : n + 1]
        alone, last = part(kwargs, begin, end, first)
        assert torch.equal(o[:, begin:end], alone) and torch.equal(S[n : n + 1], last)
        cut = begin + (end - begin) // 2 // 32 * 32
        left, state = part(kwargs, begin, cut, first)
        right, last = part(kwargs, cut, end, state)
        assert torch.equal(o[:, begin:end], torch.cat([left, right], 1)) and torch.equal(S[n : n + 1], last)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
def test_pool_past_2_31_elements(function: Any, v_first: bool) -> None:
    """Slots 2^29 elements apart, with nothing of the rest written."""
    give_memory_back(0)
    case = Case(62, (70, 1, 40), "int32", H=2, initial_state="bf16", state_v_first=v_first)
    kwargs = make(case, DEVICE).kwargs
    if function is fused_recurrent_kda:
        kwargs.pop("safe_gate")
    size, pitch = 2 * 128 * 128, 1 << 29
    flat = torch.full((5 * pitch + size,), 3.0, dtype=torch.bfloat16, device=DEVICE)
    pool = flat.as_strided((6, 2, 128, 128), (pitch, 128 * 128, 128, 1))
    slots = torch.tensor([5, 0, 4], device=DEVICE)
    pool[slots] = kwargs["initial_state"]
    o, S = function(**{**kwargs, "initial_state": pool, "state_indices": slots})
    want_o, want = function(**{**kwargs, "output_final_state": True}, backend="reference")
    assert S is pool and relative_error(o, want_o) <= BOUND and relative_error(pool[slots], want) <= BOUND
    pool[slots] = 3.0
    assert bool((flat == 3.0).all())


@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
def test_graph_replays_with_other_slots(function: Any) -> None:
    """Padding of a batch comes and goes between replays: slots, null ones among them, and who has a state."""
    case = Case(63, (40, 1, 33, 8), "int32", H=4, initial_state="fp32", pool=3, null_index=0, has_initial=True)
    kwargs = make(case, DEVICE).kwargs
    if function is fused_recurrent_kda:
        kwargs.pop("safe_gate")
    pool, slots, has = (kwargs[name] for name in ("initial_state", "state_indices", "has_initial_state"))
    pool.copy_(torch.randn_like(pool))
    before, out = pool.clone(), torch.empty_like(kwargs["v"])
    function(**kwargs, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(**kwargs, out=out)
    for indices, flags in (([3, 0, 2, 1], [1, 1, 0, 1]), ([0, -1, 6, 5], [0, 0, 0, 0]), ([0] * 4, [1] * 4)):
        slots.copy_(torch.tensor(indices))
        has.copy_(torch.tensor(flags, dtype=torch.bool))
        pool.copy_(before)
        graph.replay()
        o, states = out.clone(), pool.clone()
        pool.copy_(before)
        function(**kwargs, out=out)
        assert torch.equal(o, out) and torch.equal(states, pool)
        for n, slot in enumerate(indices):
            if slot <= 0:
                assert (o[:, case.cuts[n] : case.cuts[n + 1]] == 0).all()
        others = [i for i in range(len(pool)) if i not in indices or i == 0]
        assert torch.equal(pool[others], before[others])


def test_known_calls_have_checkpoints() -> None:
    """The third call like others is launched without checks, and its offsets are its own."""
    known_calls.known.clear()
    kwargs = make(Case(64, (100, 64), "int32", H=2, initial_state="fp32", final_state="new"), DEVICE).kwargs
    kept = torch.zeros(2, 2, 128, 128, device=DEVICE)
    for offsets in ([32, 0], [0, 64], [64, 17], [100, 1], [7, 7]):
        kept.fill_(-1.0)
        given = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        chunk_kda(**kwargs, checkpoint_offsets=given, checkpoint_state=kept)
        want = torch.full_like(kept, -1.0)
        chunk_kda(**kwargs, checkpoint_offsets=given, checkpoint_state=want, backend="reference")
        assert relative_error(kept, want) <= BOUND
    assert any(known is not None for known in known_calls.known.values())
