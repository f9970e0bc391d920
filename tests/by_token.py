"""Calls of fused_recurrent_kda that keep something of single tokens, for the CPU and the GPU tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from kda_cute import replay_shape
from tests.strategies import DTYPES, Case, make

KINDS = ("slots", "accepted", "rows", "both", "replay")
calls = st.fixed_dictionaries(dict(
    seed=st.integers(0, 1000), kind=st.sampled_from(KINDS), v_first=st.booleans(), null=st.sampled_from((-1, 0)),
    dtypes=st.tuples(*[st.sampled_from(("fp32", "bf16"))] * 2), wide=st.booleans(), update=st.booleans(),
    has=st.booleans(), lengths=st.sampled_from(((3, 1, 0, 7), (1,) * 5, (9, 17, 2), (4,) * 4, (40, 1))),
    group=st.sampled_from((1, 2)), gate=st.sampled_from(("safe", "softplus", "log")), gap=st.sampled_from((0, 4)),
    packed=st.booleans(),
))  # fmt: skip


def arguments(
    device: Any, *, seed: int, kind: str, v_first: bool, null: int, dtypes: tuple[str, str], wide: bool, update: bool,
    has: bool, lengths: tuple[int, ...], group: int, gate: str, gap: int, packed: bool, dtype: str = "bf16",
    K: int = 128, V: int = 128,
) -> dict[str, Any]:  # fmt: skip
    """slots: [N, S] state_indices; accepted: with num_accepted_tokens; rows: token_states by token_state_indices, the
    pool read only if not `update`; both; replay: tokens on record."""
    if not packed:
        lengths = (lengths[0],) * len(lengths)
    index = torch.int64 if wide else torch.int32
    case = Case(
        seed, lengths, "int32" if packed else None, tail=2 * packed, H=2, group=group, gate=gate, K=K, V=V,
        state_v_first=v_first, dtype=dtype, beta_strided=seed % 2 == 0,
    )  # fmt: skip
    call = make(case, device).kwargs
    del call["safe_gate"], call["output_final_state"]
    generator = torch.Generator(device).manual_seed(seed)
    N, T = case.N, max(lengths)

    def permutation(n: int) -> torch.Tensor:
        return torch.randperm(n, generator=generator, device=device)

    S = 1 + seed % (T + 1)
    per = S if kind in ("slots", "accepted", "both") else 0
    P = N * max(per, 1) + 3
    pool = torch.randn(P, case.HV + gap, *case.state_shape[2:], generator=generator, device=device)
    call["initial_state"] = pool.to(DTYPES[dtypes[0]])[:, : case.HV]
    slots = permutation(P)[: N * max(per, 1)]
    slots[seed % 4 :: 4] = -1
    call.update(state_indices=slots.view(N, per).to(index) if per else slots.to(index), null_index=null)
    if has:
        call["has_initial_state"] = torch.rand(N, generator=generator, device=device) < 0.5
    if kind in ("accepted", "both", "replay"):
        most = S + (kind == "replay")
        call["num_accepted_tokens"] = (torch.rand(N, generator=generator, device=device) * most).to(index)
        if kind != "replay":
            call["num_accepted_tokens"] += 1
    if kind != "replay":
        call["update_state"] = update
    if kind in ("rows", "both"):
        states = torch.full((N + 2, S, *case.state_shape[1:]), 7.0, dtype=DTYPES[dtypes[1]], device=device)
        call.update(token_states=states, token_state_indices=permutation(N + 2)[:N].to(index))
        call["token_state_indices"][seed % 3 :: 3] = -1
    if kind == "replay":
        shape = replay_shape(N + 2, S, case.HV, K, V)
        record = 0.5 * torch.rand(shape, generator=generator, device=device)
        record[..., : 2 * K] = record[..., :1, : 2 * K]  # all rows have the same decay and k
        call.update(replay=record, token_state_indices=permutation(N + 2)[:N].to(index))
        call["token_state_indices"][seed % 3 :: 3] = -1
        if seed % 2:
            del call["token_state_indices"]
    return call


WRITTEN = ("initial_state", "token_states", "replay")


def copied(call: dict[str, Any]) -> dict[str, Any]:
    """With copies of what is written, strides and all."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    return {name: copy(x) if name in WRITTEN else x for name, x in call.items()}
