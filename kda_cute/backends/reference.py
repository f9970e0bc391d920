"""torch, on any device: in fp32, or in fp64 for fp64 inputs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..call import Call
from ..contract import Sizes
from ..reference.backward import chunked_backward
from ..reference.chunked import chunked
from ..reference.recurrence import recurrence
from ..reference.transforms import sequence_bounds, transform

OF_TORCH = True


def why_not(call: Call, sizes: Sizes) -> str | None:
    return None


def run(call: Call, sizes: Sizes) -> tuple[Tensor, Tensor | None, None]:
    final_state, indices = call.final_state, call.state_indices
    slots = None if indices is None or call.initial_state is None else _slots(call, indices)
    given = call._asdict()
    given["output_final_state"] = call.output_final_state or final_state is not None
    given["initial_state"] = _initial(call, slots)
    kept = call.token_states, call.checkpoints, call.checkpoint_state, call.replay
    if (all(x is None for x in kept) and (slots is None or slots.dim() == 1)) or call.q.is_meta:
        o, state = forward(given, call.recurrent)
    else:
        o, state = _piecewise(given, call, slots)
    if slots is not None and not call.q.is_meta:
        o = _without_null(o, call, slots)
    out = o.to(call.q.dtype) if call.out is None else call.out.copy_(o)
    if final_state is None or state is None:
        return out, None if final_state is None and slots is not None else state, None
    if slots is None:
        return out, final_state.copy_(state), None
    if slots.dim() == 1 and not final_state.is_meta:
        final_state[slots[slots >= 0]] = state[slots >= 0].to(final_state.dtype)
    return out, final_state, None


_OPTIONS = [*Call._fields[: Call._fields.index("state_indices")]]  # of a call that `chunked` and `recurrence` take


def forward(call: dict[str, Any], recurrent: bool = False) -> tuple[Tensor, Tensor | None]:
    """o and the final state in fp32, or in fp64 for fp64 inputs, also under autocast."""
    options = {name: call[name] for name in _OPTIONS}
    with _no_autocast(call):
        return (recurrence if recurrent else chunked)(**options, dtype=contract.state_dtype(call["v"]))


def backward(call: dict[str, Any], do: Tensor, dht: Tensor | None) -> dict[str, Tensor]:
    """The gradients of what is given of DIFFERENTIABLE, made in the dtype that `forward` has."""
    options = {name: call[name] for name in _OPTIONS}
    state, has = call["initial_state"], call["has_initial_state"]
    if state is not None and has is not None:
        options["initial_state"] = torch.where(has.view(-1, 1, 1, 1), state, 0)
    with _no_autocast(call):
        made = chunked_backward(do, dht, **options, dtype=contract.state_dtype(call["v"]))
    if state is not None and has is not None:
        made["initial_state"] = torch.where(has.view(-1, 1, 1, 1), made["initial_state"], 0)
    return made


def _no_autocast(call: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    device = call["q"].device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _slots(call: Call, indices: Tensor) -> Tensor:
    """state_indices, -1 for null ones."""
    return indices.where(indices > call.null_index, -1).long()


def _initial(call: Call, slots: Tensor | None) -> Tensor | None:
    """The state that each sequence begins with."""
    state, has = call.initial_state, call.has_initial_state
    if state is None or state.is_meta:
        if state is not None and slots is not None:
            return state.new_zeros(len(slots), *state.shape[1:])
        return state
    if slots is not None:
        if slots.dim() == 2:
            first = torch.zeros_like(slots[:, 0])
            if call.num_accepted_tokens is not None:
                first = (call.num_accepted_tokens.long() - 1).clamp(0, slots.shape[1] - 1)
            slots = slots.gather(1, first[:, None])[:, 0]
        pool, state = state, state.new_zeros(len(slots), *state.shape[1:])
        state[slots >= 0] = pool[slots[slots >= 0]]
    if has is not None:
        state = torch.where(has.view(-1, 1, 1, 1), state, 0)
    return state


def _without_null(o: Tensor, call: Call, slots: Tensor) -> Tensor:
    """o, zero in null sequences."""
    B, T = call.v.shape[:2]
    o = o.clone()
    for n, (begin, end) in enumerate(sequence_bounds(B, T, call.cu_seqlens)):
        if _is_null(call, slots, n):
            o.view(-1, *o.shape[2:])[begin:end] = 0
    return o


def _is_null(call: Call, slots: Tensor | None, n: int) -> bool:
    if slots is None:
        return False
    if slots.dim() == 1:
        return int(slots[n]) < 0
    accepted = 1 if call.num_accepted_tokens is None else int(call.num_accepted_tokens[n])
    return int(slots[n, min(max(accepted - 1, 0), slots.shape[1] - 1)]) < 0


def _piecewise(given: dict[str, Any], call: Call, slots: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """From one state that is kept to the next."""
    B, T, HV, V = call.v.shape
    tensors = {name: given[name].reshape(1, B * T, *given[name].shape[2:]) for name in ("q", "k", "v", "g", "beta")}
    dtype = contract.state_dtype(call.v)
    o = call.v.new_zeros((1, B * T, HV, V), dtype=dtype)
    shape = contract.state_shape(1, HV, call.q.shape[-1], V, call.state_v_first)
    states, rows = call.token_states, call.token_state_indices
    if states is not None and rows is None:
        states.zero_()  # of tokens of no sequence too
    finals = [o.new_zeros(0, *shape[1:])]
    for n, (begin, end) in enumerate(sequence_bounds(B, T, call.cu_seqlens)):
        S = o.new_zeros(shape)
        if _is_null(call, slots, n):
            finals.append(S)
            continue
        if given["initial_state"] is not None:
            S = given["initial_state"][n : n + 1].to(dtype)
        record = _record(call, n)
        if record is not None:
            S = final = _replayed(S, record, call, n)
        cuts = _cuts(call, n, end - begin)
        for at, until in zip([0, *cuts], [*cuts, end - begin], strict=True):
            if at in cuts:
                _keep(call, n, at, S)
            if at == until:
                continue
            tokens = slice(begin + at, begin + until)
            part = {name: x[:, tokens] for name, x in tensors.items()}
            part.update(initial_state=S, output_final_state=True, cu_seqlens=None)
            before, (o[:, tokens], last) = S, forward({**given, **part}, call.recurrent)
            assert last is not None
            S = last
            if call.recurrent:
                _keep_token(call, slots, n, begin, at, S)
                if record is not None and at < record.shape[0]:
                    _write_record(call, record[at], part, before)
        finals.append(S if record is None else final)
    return o.view(call.v.shape), torch.cat(finals) if given["output_final_state"] else None


def _cuts(call: Call, n: int, tokens: int) -> list[int]:
    """Before which of a sequence's tokens there is a state to keep; if `recurrent`, all but the first."""
    if call.recurrent:
        return list(range(1, tokens))
    if call.checkpoints is not None:
        return list(range(0, tokens, 32 * call.checkpoints.every))
    assert call.checkpoint_offsets is not None
    offsets = call.checkpoint_offsets[n].reshape(-1).tolist()
    return sorted({x for x in offsets if 0 < x <= tokens})


def _keep(call: Call, n: int, at: int, S: Tensor) -> None:
    """The state before token `at`, where it is asked for."""
    if call.checkpoints is not None:
        states, first, every = call.checkpoints
        states[int(first[n]) + at // (32 * every)] = S[0].to(states.dtype)
    if call.checkpoint_offsets is not None and call.checkpoint_state is not None:
        states, offsets = call.checkpoint_state, call.checkpoint_offsets
        per = offsets[0].numel()
        for m, offset in enumerate(offsets[n].reshape(-1).tolist()):
            if offset != at:
                continue
            if call.checkpoint_indices is None:
                to = states[n] if offsets.dim() == 1 else states[n, m]
            else:
                row = int(call.checkpoint_indices.reshape(-1, per)[n, m])
                if row <= call.null_index:
                    continue
                to = states[row]
            to.copy_(S[0])


def _keep_token(call: Call, slots: Tensor | None, n: int, begin: int, t: int, S: Tensor) -> None:
    """The state after token t of sequence n, where it is asked for."""
    states, rows = call.token_states, call.token_state_indices
    if states is not None and rows is None:
        states.view(-1, *states.shape[2:])[begin + t] = S[0].to(states.dtype)
    elif states is not None and rows is not None and int(rows[n]) >= 0 and t < states.shape[1]:
        states[int(rows[n]), t] = S[0].to(states.dtype)
    pool = call.final_state
    if slots is not None and slots.dim() == 2 and pool is not None and t < slots.shape[1] and int(slots[n, t]) >= 0:
        pool[int(slots[n, t])] = S[0].to(pool.dtype)


def _record(call: Call, n: int) -> Tensor | None:
    """Sequence n's row of `replay`."""
    if call.replay is None:
        return None
    row = n if call.token_state_indices is None else int(call.token_state_indices[n])
    return call.replay[row] if row >= 0 else call.replay[:0].flatten(0, 1)


def _replayed(S: Tensor, record: Tensor, call: Call, n: int) -> Tensor:
    """The state [1, HV, ...] behind the tokens on record that count."""
    accepted = 0 if call.num_accepted_tokens is None else int(call.num_accepted_tokens[n])
    K = call.q.shape[-1]
    for x in record[: max(accepted, 0)].to(S.dtype):
        a, k, u = x[:, 0, :K], x[:, 0, K : 2 * K], x[:, :, 2 * K :].flatten(1)
        if call.state_v_first:
            S = S * a[:, None, :] + u[:, :, None] * k[:, None, :]
        else:
            S = S * a[:, :, None] + k[:, :, None] * u[:, None, :]
    return S


def _write_record(call: Call, record: Tensor, part: dict[str, Any], S: Tensor) -> None:
    """Decay, k and u of a token. k is as it enters the state."""
    names = (
        "scale", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval",
        "lower_bound", "A_log", "dt_bias",
    )  # fmt: skip
    options = {name: getattr(call, name) for name in names}
    inputs = [part[name] for name in ("q", "k", "v", "g", "beta")]
    _, k, v, g, beta = (x[0, 0] for x in transform(*inputs, **options, dtype=S.dtype))
    a, K = g.exp(), k.shape[-1]
    S = S[0] if call.state_v_first else S[0].transpose(-1, -2)
    u = beta[:, None] * (v - (S * a[:, None, :] * k[:, None, :]).sum(-1))
    record[:, :, :K], record[:, :, K : 2 * K] = a[:, None], k[:, None]
    record[:, :, 2 * K :] = u.view(u.shape[0], -1, contract.VALUE_ROWS)
