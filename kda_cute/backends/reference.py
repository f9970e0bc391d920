"""torch, on any device: in fp32, or in fp64 for fp64 inputs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..call import Call
from ..contract import Sizes
from ..reference.chunked import chunked
from ..reference.recurrence import recurrence
from ..reference.transforms import sequence_bounds

OF_TORCH = True


def why_not(call: Call, sizes: Sizes) -> str | None:
    return None


def run(call: Call, sizes: Sizes) -> tuple[Tensor, Tensor | None, None]:
    final_state, indices = call.final_state, call.state_indices
    given = call._asdict()
    given["output_final_state"] = call.output_final_state or final_state is not None
    if indices is not None and call.initial_state is not None:
        given["initial_state"] = _from_pool(call.initial_state, indices)
    if (call.token_states is None and call.checkpoints is None) or call.q.is_meta:
        o, state = forward(given, call.recurrent)
    else:
        o, state = _piecewise(given, call)
    out = o.to(call.q.dtype) if call.out is None else call.out.copy_(o)
    if final_state is None or state is None:
        return out, state, None
    if indices is not None:
        return out, _into_pool(state, final_state, indices), None
    return out, final_state.copy_(state), None


_OPTIONS = [*Call._fields[: Call._fields.index("state_indices")]]  # of a call that `chunked` and `recurrence` take


def forward(call: dict[str, Any], recurrent: bool = False) -> tuple[Tensor, Tensor | None]:
    """o and the final state in fp32, or in fp64 for fp64 inputs, also under autocast."""
    options = {name: call[name] for name in _OPTIONS}
    device = call["q"].device.type
    as_it_is = contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with as_it_is:
        return (recurrence if recurrent else chunked)(**options, dtype=contract.state_dtype(call["v"]))


def _from_pool(pool: Tensor, indices: Tensor) -> Tensor:
    """A state a sequence, zero where its index is negative."""
    state = pool.new_zeros(len(indices), *pool.shape[1:])
    if not pool.is_meta:  # where there are no indices to go by
        stored = indices >= 0
        state[stored] = pool[indices[stored]]
    return state


def _into_pool(state: Tensor, pool: Tensor, indices: Tensor) -> Tensor:
    if not pool.is_meta:
        stored = indices >= 0
        pool[indices[stored]] = state[stored].to(pool.dtype)
    return pool


def _piecewise(given: dict[str, Any], call: Call) -> tuple[Tensor, Tensor | None]:
    """From one state that is kept to the next."""
    first, step = None, 1
    if call.checkpoints is not None:
        states, first, step = call.checkpoints.states, call.checkpoints.first, 32 * call.checkpoints.every
    else:
        assert call.token_states is not None
        states = call.token_states
    B, T, HV, _ = call.v.shape
    tensors = {name: given[name].reshape(1, B * T, *given[name].shape[2:]) for name in ("q", "k", "v", "g", "beta")}
    dtype = contract.state_dtype(call.v)
    o = call.v.new_zeros((1, B * T, HV, call.v.shape[-1]), dtype=dtype)
    shape = states.shape[-2:]
    states = states.view(-1, HV, *shape)
    if first is None:  # tokens of no sequence have zeros
        states.zero_()
    finals = [o.new_zeros(0, HV, *shape)]
    for n, (begin, end) in enumerate(sequence_bounds(B, T, call.cu_seqlens)):
        S = o.new_zeros(1, HV, *shape)
        if given["initial_state"] is not None:
            S = given["initial_state"][n : n + 1].to(dtype)
        for i, at in enumerate(range(begin, end, step)):
            if first is not None:
                states[int(first[n]) + i] = S[0].to(states.dtype)
            tokens = slice(at, min(at + step, end))
            part = {name: x[:, tokens] for name, x in tensors.items()}
            part.update(initial_state=S, output_final_state=True, cu_seqlens=None)
            o[:, tokens], last = forward({**given, **part}, call.recurrent)
            assert last is not None
            S = last
            if first is None:
                states[at] = S[0].to(states.dtype)
        finals.append(S)
    return o.view(call.v.shape), torch.cat(finals) if given["output_final_state"] else None
