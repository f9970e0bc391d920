"""What must hold whatever the numbers are, for chunk_kda on the CPU. All exact up to fp64's rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from kda_cute.ops import chunk_kda, chunk_kda_summary
from tests.strategies import Case, cases, make

TOKENWISE = ("q", "k", "v", "g", "beta")
varlen_cases = cases(served=False, max_tokens=100, max_heads=2).map(
    lambda case: replace(case, dtype="fp64", cu_seqlens="int64", tail=0, initial_state="fp32")
)


def run(kwargs: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    o, S = chunk_kda(**{**kwargs, "output_final_state": True, **changes})
    assert S is not None and S.dtype == torch.float64
    return o, S


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def select(kwargs: dict[str, Any], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: kwargs[name][:, tokens] for name in TOKENWISE}


@given(case=cases(served=False, max_tokens=100, max_heads=2), where=st.floats(0, 1))
def test_split_and_carry_the_state(case: Case, where: float) -> None:
    case = replace(case, dtype="fp64", cu_seqlens=None, lengths=case.lengths[:1] * 2, tail=0)
    kwargs = make(case).kwargs
    o, S = run(kwargs)
    cut = round(where * case.T)
    first = {name: kwargs[name][:, :cut] for name in TOKENWISE}
    second = {name: kwargs[name][:, cut:] for name in TOKENWISE}
    o1, S1 = run(kwargs, **first)
    o2, S2 = run(kwargs, **second, initial_state=S1)
    close(torch.cat((o1, o2), 1), o)
    close(S2, S)


def summary(kwargs: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    unused = ("q", "scale", "initial_state", "output_final_state", "out", "final_state")
    return chunk_kda_summary(**{name: x for name, x in {**kwargs, **changes}.items() if name not in unused})


@given(case=cases(served=False, max_tokens=100, max_heads=2))
def test_summary(case: Case) -> None:
    """The final state is the map applied to the initial one."""
    case = replace(case, dtype="fp64", initial_state="fp32")
    kwargs = make(case).kwargs
    _, S = run(kwargs)
    M, C = summary(kwargs)
    S0 = kwargs["initial_state"].double()
    close(S0 @ M + C if case.state_v_first else M @ S0 + C, S)


@given(case=cases(served=False, max_tokens=100, max_heads=2), where=st.floats(0, 1))
def test_summaries_compose(case: Case, where: float) -> None:
    case = replace(case, dtype="fp64", cu_seqlens=None, lengths=case.lengths[:1] * 2, tail=0, state_v_first=True)
    kwargs = make(case).kwargs
    cut = round(where * case.T)
    M1, C1 = summary(kwargs, **{name: kwargs[name][:, :cut] for name in TOKENWISE})
    M2, C2 = summary(kwargs, **{name: kwargs[name][:, cut:] for name in TOKENWISE})
    M, C = summary(kwargs)
    close(M1 @ M2, M)
    close(C1 @ M2 + C2, C)


@given(case=varlen_cases, data=st.data())
def test_permuted_sequences(case: Case, data: st.DataObject) -> None:
    kwargs = make(case).kwargs
    o, S = run(kwargs)
    order = data.draw(st.permutations(range(case.N)))
    cuts = case.cuts
    tokens = torch.tensor([t for n in order for t in range(cuts[n], cuts[n + 1])], dtype=torch.int64)
    permuted = replace(case, lengths=tuple(case.lengths[n] for n in order))
    o_permuted, S_permuted = run(
        kwargs,
        **select(kwargs, tokens),
        initial_state=kwargs["initial_state"][list(order)],
        cu_seqlens=torch.tensor(permuted.cuts),
    )
    close(o_permuted, o[:, tokens])
    close(S_permuted, S[list(order)])


@given(case=varlen_cases, data=st.data())
def test_empty_sequences_change_nothing(case: Case, data: st.DataObject) -> None:
    kwargs = make(case).kwargs
    o, S = run(kwargs)
    at = sorted(data.draw(st.lists(st.integers(0, case.N), min_size=1, max_size=4)))
    lengths, source = [], []  # source: the sequence this one was, or -1 for an empty one
    for n in range(case.N + 1):
        lengths += [0] * at.count(n) + list(case.lengths[n : n + 1])
        source += [-1] * at.count(n) + ([n] if n < case.N else [])
    old = torch.tensor(source) >= 0
    state = torch.randn(len(source), *S.shape[1:], dtype=torch.float64)
    state[old] = kwargs["initial_state"].double()
    cuts = replace(case, lengths=tuple(lengths)).cuts
    o_padded, S_padded = run(kwargs, initial_state=state, cu_seqlens=torch.tensor(cuts))
    close(o_padded, o)
    close(S_padded[old], S)
    assert torch.equal(S_padded[~old], state[~old])


@given(case=varlen_cases, c=st.sampled_from((2.0, -0.5, 1024.0, 0.0)))
def test_scaling_v_scales_o(case: Case, c: float) -> None:
    """v and the initial state times a power of two: o and the final state times that, to the last bit."""
    kwargs = make(case).kwargs
    o, S = run(kwargs)
    o_scaled, S_scaled = run(kwargs, v=c * kwargs["v"], initial_state=c * kwargs["initial_state"])
    for scaled, x in ((o_scaled, c * o), (S_scaled, c * S)):
        torch.testing.assert_close(scaled, x, rtol=0, atol=1e-300)  # subnormal numbers have fewer bits to keep


@given(case=varlen_cases)
def test_packed_is_one_by_one(case: Case) -> None:
    kwargs = make(case).kwargs
    o, S = run(kwargs)
    for n in range(case.N):
        tokens = torch.arange(case.cuts[n], case.cuts[n + 1])
        o_n, S_n = run(
            kwargs, **select(kwargs, tokens), cu_seqlens=None, initial_state=kwargs["initial_state"][n : n + 1]
        )
        close(o_n, o[:, tokens])
        close(S_n, S[n : n + 1])


@given(case=varlen_cases)
def test_grouped_values_are_repeated_queries_and_keys(case: Case) -> None:
    kwargs = make(case).kwargs
    o, S = run(kwargs)
    q, k = (kwargs[name].repeat_interleave(case.group, 2) for name in "qk")
    o_repeated, S_repeated = run(kwargs, q=q, k=k)
    close(o_repeated, o)
    close(S_repeated, S)


@given(case=varlen_cases)
def test_state_layouts_are_transposes(case: Case) -> None:
    kwargs = make(case).kwargs
    o, S = run(kwargs)
    o_other, S_other = run(
        kwargs,
        state_v_first=not case.state_v_first,
        initial_state=kwargs["initial_state"].transpose(-1, -2).contiguous(),
    )
    assert torch.equal(o_other, o) and torch.equal(S_other, S.transpose(-1, -2))


@given(case=varlen_cases, data=st.data())
def test_a_pool_of_states_is_gathered_and_scattered(case: Case, data: st.DataObject) -> None:
    """Sequences begin with and update the states that they point to; others stay as they were, to the bit."""
    kwargs = make(case).kwargs
    P = case.N + data.draw(st.integers(0, 2))
    order = data.draw(st.permutations(range(P)))[: case.N]
    null = data.draw(st.sampled_from((-1, 0)))
    dtype = data.draw(st.sampled_from((torch.int32, torch.int64)))
    indices = torch.tensor([-1 if data.draw(st.booleans()) else i for i in order], dtype=dtype)
    has = torch.tensor([data.draw(st.booleans()) for _ in order], dtype=torch.bool)
    pool = torch.randn(P, *case.state_shape[1:], dtype=torch.float64)
    state = torch.zeros(case.state_shape, dtype=torch.float64)
    kept = indices > null
    state[kept & has] = pool[indices[kept & has]]
    before = pool.clone()
    o, S = run(kwargs, initial_state=state)
    for n in range(case.N):
        if not kept[n]:
            o[:, case.cuts[n] : case.cuts[n + 1]] = 0
    o_pool, S_pool = run(kwargs, initial_state=pool, state_indices=indices, null_index=null, has_initial_state=has)
    assert S_pool is pool and torch.equal(o_pool, o)
    before[indices[kept]] = S[kept]
    assert torch.equal(pool, before)


@given(case=varlen_cases, interval=st.sampled_from((32, 64, 96)), packed=st.booleans())
def test_checkpoints_are_the_final_states_of_prefixes(case: Case, interval: int, packed: bool) -> None:
    kwargs = make(case if packed else replace(case, lengths=case.lengths[:1] * 2, cu_seqlens=None)).kwargs
    o, S = run(kwargs)
    o_kept, S_kept, states = chunk_kda(**{**kwargs, "output_final_state": True}, checkpoint_interval=interval)
    close(o_kept, o)
    close(S_kept, S)
    cuts = kwargs["cu_seqlens"].tolist() if packed else [0, kwargs["q"].shape[1]]
    at = 0
    for n, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        for i, stop in enumerate(range(begin, end, interval)):
            tokens = torch.arange(begin, stop)
            if packed:
                part = {**select(kwargs, tokens), "initial_state": kwargs["initial_state"][n : n + 1]}
                want = run(kwargs, **part, cu_seqlens=None)[1][0]
            else:
                want = run(kwargs, **select(kwargs, tokens))[1]
            close(states[0, at + i] if packed else states[:, i], want)
        at += len(range(begin, end, interval))
    exact = chunk_kda(**{**kwargs, "output_final_state": True}, return_intermediate_states=True, chunk_size=32)[2]
    assert exact.shape[1] == (sum(-(-(b - a) // 32) for a, b in zip(cuts[:-1], cuts[1:], strict=True)))
