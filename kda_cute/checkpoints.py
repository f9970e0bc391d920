"""The states of `chunk_kda` on the way: room for them, and which sequence has which of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import contract, dispatch, memory, torch_ops
from .call import Call, Checkpoints


def run(call: Call, interval: int | None, fla_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """(o, final state, states): every `interval` tokens, or as fla's return_intermediate_states has them."""
    if call.checkpoint_offsets is not None:
        raise ValueError("checkpoint_offsets is given: must be None with checkpoint_interval")
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        raise NotImplementedError("checkpoint_interval is given: must be None under torch.compile and torch.jit.trace")
    dtype = torch.float32
    if interval is None:  # fla's return_intermediate_states
        interval, dtype = fla_kwargs.get("chunk_size", 64), torch.bfloat16
    interval = contract.check_interval(interval)
    call = Call(**(memory.plain(call._asdict())[0] or call._asdict()))
    B, T, _, HV, K, V, N = contract.check_named(call._asdict())
    v, cu_seqlens = call.v, call.cu_seqlens
    if v.dtype == torch.float64:
        dtype = v.dtype
    if cu_seqlens is None:
        count = -(-T // interval)
        rows = room = B * count
        first = count * torch.arange(B, dtype=torch.int32, device=v.device)
    else:
        rows = room = T // interval + N
        if fla_kwargs.get("return_intermediate_states"):  # as many as there are, which the host has to know
            cuts = fla_kwargs.get("cu_seqlens_cpu")
            cuts = cu_seqlens if cuts is None else cuts
            if cuts.is_meta:
                raise NotImplementedError(
                    "cu_seqlens is on meta: return_intermediate_states needs its values, which cu_seqlens_cpu may have"
                )
            cuts = cuts.tolist()
            rows = sum(-(-(b - a) // interval) for a, b in zip(cuts[:-1], cuts[1:], strict=True))
            room = max(rows, -(-T // interval))  # the copy on the host may be another one
        first = first_rows(cu_seqlens, T, interval, room)
    shape = (V, K) if call.state_v_first else (K, V)
    # Null sequences have none, and may have been given room.
    new = torch.empty if call.state_indices is None else torch.zeros
    states = new((room, HV, *shape), dtype=dtype, device=v.device)
    call = call._replace(checkpoints=Checkpoints(states, first, interval // 32))
    o, S = dispatch.run(call, torch_ops.traced)
    return o, S, states[:rows].view(B if cu_seqlens is None else 1, -1 if rows else 0, HV, *shape)


def first_rows(cu_seqlens: Tensor, T: int, interval: int, rows: int) -> Tensor:
    """The row of each sequence's first state. That of its last one is below `rows`, whatever cu_seqlens says."""
    cuts = cu_seqlens.clamp(0, T)  # as the kernel takes them
    counts = (cuts.diff().clamp(min=0) + interval - 1) // interval
    return torch.minimum(counts.cumsum(0) - counts, rows - counts).int()
