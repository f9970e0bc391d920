"""The public operations: `chunk_kda` with fla's signature, `fwd` with FlashKDA's, and `chunk_kda_summary`."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from . import contract, library, memory
from .reference.transforms import sequence_bounds

try:
    TensorGuards: Any = torch._C._dynamo.guards.TensorGuards  # by attribute: torch 2.4 does not import it from there
except AttributeError:  # a torch that has them no more: every call is checked in full
    TensorGuards = None

_log = logging.getLogger("kda_cute")

KNOWN_MAX = 256  # kinds of calls that are remembered

# By names of one part: each further one is a look-up in every call.
_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_increment_version = memory.increment_version


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    checkpoint_interval: int | None = None,
    out: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    backend: str | None = None,
    **fla_kwargs: Any,
) -> Any:
    """Kimi Delta Attention, forward. Per head, with the state S [V, K] and a_t = exp(g_t) per key channel:

        S <- S diag(a_t);   u_t = beta_t (v_t - S k_t);   S <- S + u_t k_t^T;   o_t = scale S q_t

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V]; HV a multiple of H, value head h uses q and k of head h // (HV // H).
        g: [B, T, HV, K], log decay; with use_gate_in_kernel what the gate makes it from.
        beta: [B, T, HV]; with use_beta_sigmoid_in_kernel its logits.
        scale: K ** -0.5 unless given.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with state_v_first; bf16 or fp32. None is zero.
        output_final_state: return the last state of every sequence (fp32), else None. final_state= implies it.
        use_qk_l2norm_in_kernel: q and k become x / sqrt(sum(x^2) + 1e-6).
        use_gate_in_kernel: with lower_bound, g becomes lower_bound * sigmoid(exp(A_log) * (g + dt_bias)); without,
            -exp(A_log) * softplus(g + dt_bias).
        use_beta_sigmoid_in_kernel: beta becomes sigmoid(beta), with allow_neg_eigval 2 * sigmoid(beta).
        safe_gate: the caller's promise that a precomputed g is in [-5, 0]; a gate in the kernel then needs lower_bound.
        lower_bound: in [-5, 0).
        cu_seqlens: [N + 1], int32 or int64, on the device of q: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1]
            of the one batch entry. It starts at 0, never decreases and ends at T or before. o of tokens of no sequence
            is zero, also where its values are wrong. The GPU path never reads it back to the host.
        A_log: [HV] or [1, 1, HV, 1]. dt_bias: [HV * K] or [HV, K]. Both only with use_gate_in_kernel, both may be None
            with lower_bound.
        state_indices: [N], int32. initial_state then is a pool of P states, [P, HV, ...]: sequence n begins with state
            state_indices[n] and leaves its last one there, in place; with a negative index it begins with zero and
            leaves none. No two sequences may have the same state. The final state in the result is the pool.
        checkpoint_interval: a multiple of 32 tokens. The states before tokens 0, checkpoint_interval, ... of every
            sequence are a third result, fp32: [B, ceil(T / checkpoint_interval), HV, ...]; with cu_seqlens
            [1, R, HV, ...], sequence by sequence, R such that there is room for any cu_seqlens; what is left of it is
            not written.
        out: o, in the dtype of q. final_state: the last states, contiguous, bf16 or fp32.
        backend: None takes "cute" for CUDA tensors and "reference" for those on the CPU. "reference" is torch on any
            device, also on meta, in fp32 (fp64 for fp64 inputs).
        fla_kwargs: what fla takes besides: disable_recompute, cu_seqlens_cpu, chunk_size, use_graph and max_num_seqs
            change nothing here, transpose_state_layout is state_v_first, return_intermediate_states gives states as
            checkpoint_interval=chunk_size (64) does, in bf16 and no more than there are, for which the host reads
            cu_seqlens_cpu or waits for cu_seqlens; cp_context is not served.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state or None; with checkpoint_interval those states too.

    NaN and infinity stay in their sequence and value head, and what comes before them is what it would be without
    them. The last bits of a result may depend on what else is in the call and on tokens that come later, about 1e-4 of
    it: what a call is cut into for the GPU depends on all of its lengths.

    Both are differentiable, by running the forward pass again: see `library`. torch.compile and export take the call as
    one operator. Under torch.autocast q, k and v in fp32 are taken in its dtype.

    With KDA_CUTE_CHECK=1 in the environment at import the values of cu_seqlens, and those of g under safe_gate, are
    checked too, which waits for the GPU.
    """
    if fla_kwargs:
        state_v_first = contract.check_fla_kwargs(fla_kwargs, state_v_first)
    arguments = (
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, safe_gate, lower_bound, state_v_first, cu_seqlens, A_log, dt_bias,
        state_indices, backend,
    )  # fmt: skip
    if state_indices is not None and final_state is None:
        final_state = initial_state
    if checkpoint_interval is not None or (fla_kwargs and fla_kwargs.get("return_intermediate_states")):
        call = dict(zip(library.ARGUMENTS, arguments, strict=True))
        return _with_checkpoints(call, out, final_state, checkpoint_interval, fla_kwargs)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return library.traced(arguments, out, final_state)
    return run(arguments, out, final_state)


def run(
    arguments: tuple[Any, ...], out: torch.Tensor | None = None, final_state: torch.Tensor | None = None,
    kept: Any = None, recurrent: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`chunk_kda`, or fused_recurrent_kda, for tensors that hold numbers; the arguments are those of the operators.
    kept: the states after each token if `recurrent`, to be written; else those on the way, the number of each
    sequence's first one, and the chunks of 32 tokens between two of them."""
    (
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, safe_gate, lower_bound, state_v_first, cu_seqlens, A_log, dt_bias,
        state_indices, backend,
    ) = arguments  # fmt: skip
    grad = _grad()
    in_place = final_state is initial_state  # torch's guards refuse a tensor that comes twice
    guarded = kept if recurrent else None
    tensors = (
        q, k, v, g, beta, initial_state, None if in_place else final_state, cu_seqlens, A_log, dt_bias, state_indices,
        out, guarded,
    )  # fmt: skip
    key: tuple | None
    try:
        key = (
            q.shape, cu_seqlens is not None and cu_seqlens.shape,
            grad or -_inference(),  # torch's guards take one tensor for another, across the modes
            scale, lower_bound, backend,
            not output_final_state, not use_qk_l2norm_in_kernel, not use_gate_in_kernel,
            not use_beta_sigmoid_in_kernel, not allow_neg_eigval, not safe_gate, not state_v_first, in_place,
            initial_state is None, final_state is None, A_log is None, dt_bias is None,
            state_indices is None, out is None, recurrent, kept is None,
        )  # fmt: skip
        known = _known.get(key)
    except Exception:  # q is no tensor, scale has no hash ...: the checks say what is wrong
        key = known = None
    if kept is not None and not recurrent:
        key = known = None
    if known is not None and not contract.CHECK_VALUES and forward_ad._current_level < 0:
        alike, present, launch, state_shape, empty_like = known
        if alike(*present(tensors)):
            o = empty_like(v, memory_format=torch.contiguous_format) if out is None else out
            S = final_state
            if S is not None:
                _increment_version((S,) if out is None else (S, out))
            else:
                if out is not None:
                    _increment_version((out,))
                if output_final_state:
                    S = torch.empty(state_shape, dtype=torch.float32, device=q.device)
            if kept is not None:
                _increment_version((kept,))
            if launch(q, k, v, g, beta, o, initial_state, S, A_log, dt_bias, cu_seqlens, state_indices, kept):
                return o, S

    # The guards refuse calls that torch.jit.trace or torch.func sees: their dispatch keys are others.
    if torch._C._get_tracing_state() is not None:
        return _as_operator(arguments, out, final_state, kept, recurrent)
    if state_indices is not None and final_state is None:
        raise ValueError("final_state is None: must be a pool of states with state_indices")
    call = dict(zip(library.ARGUMENTS, arguments, strict=True))
    named = {**call, "out": out, "final_state": final_state, "token_states": guarded}
    plain, ranges = memory.plain(named)
    if plain is not None:
        *arguments, out, final_state, token_states = plain.values()  # type: ignore[assignment]
        with torch._C.DisableTorchFunctionSubclass():
            return run(tuple(arguments), out, final_state, token_states if recurrent else kept, recurrent)
    call["q"], call["k"], call["v"] = q, k, v = library.autocast(q, k, v)
    B, T, _, HV, K, V, N = contract.check_named({**call, "out": out, "final_state": final_state})
    scale = contract.check_scale(scale, K)
    if guarded is not None:
        contract.check_token_states(guarded, q, (B, T, HV, K, V), state_v_first)
    reference = _takes_reference(q, backend)
    if not reference:
        why_not = contract.not_served(K, V, q, g, beta)
        if why_not:
            raise NotImplementedError(f'{why_not} on the GPU; backend="reference" serves it, slowly')
        library.refuse_transforms(call)
        if any(map(library.is_of_functorch, (*call.values(), out, final_state, kept))):
            if recurrent or not (out is final_state is kept is None):
                raise NotImplementedError(
                    "out, final_state, state_indices and checkpoint_interval must be None under torch.vmap, which does "
                    'not serve fused_recurrent_kda: B is for many sequences, backend="reference" works here, slowly'
                )
            return library.traced(arguments, None, None)  # torch calls it for one after the other
    if grad and library.wants_grad(call):
        if out is not None or final_state is not None:
            library.refuse_outputs(call)
        if recurrent:
            library.refuse(call, library.NO_GRADIENT)
        if kept is not None:
            library.refuse(call, "must not with checkpoints, which have no gradient; torch.no_grad() says so")
        if not reference:
            o, state = library.chunk_kda(*call.values())
            return o, state if output_final_state else None

    memory.check_written(named, ranges)

    checked = contract.CHECK_VALUES and (reference or not torch.cuda.is_current_stream_capturing())
    if reference or checked:
        tokens = T if cu_seqlens is None else contract.check_cu_seqlens(cu_seqlens, T)
        if checked and safe_gate and not use_gate_in_kernel:
            contract.check_log_decay(g, tokens)
        if state_indices is not None and initial_state is not None:
            contract.check_state_indices(state_indices, initial_state.shape[0])

    if reference:
        given = {**call, "output_final_state": output_final_state or final_state is not None}
        if state_indices is not None and initial_state is not None:
            given["initial_state"] = _from_pool(initial_state, state_indices)
        whole = kept is None or q.is_meta
        o, state = library.by_reference(given, recurrent) if whole else _piecewise(given, kept, recurrent)
        out = o.to(q.dtype) if out is None else out.copy_(o)
        if final_state is None or state is None:
            return out, state
        if state_indices is not None:
            return out, _into_pool(state, final_state, state_indices)
        return out, final_state.copy_(state)

    state_shape = contract.state_shape(N, HV, K, V, state_v_first)
    if final_state is None and output_final_state:
        final_state = torch.empty(state_shape, dtype=torch.float32, device=q.device)
    o = torch.empty((B, T, HV, V), dtype=q.dtype, device=q.device) if out is None else out
    if T == 0 or N == 0:
        o.zero_()
        if state_indices is None and final_state is not None:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        if N == 0 or state_indices is None or in_place:
            return o, final_state
        recurrent, kept = True, None  # that kernel takes no tokens too, and carries states from pool to pool

    launch = _sm90().prepare(
        q, v, g, beta, initial_state, final_state, cu_seqlens, state_indices, kept, recurrent, scale=scale,
        lower_bound=None if lower_bound is None else float(lower_bound),
        use_qk_l2norm_in_kernel=bool(use_qk_l2norm_in_kernel), use_gate_in_kernel=bool(use_gate_in_kernel),
        use_beta_sigmoid_in_kernel=bool(use_beta_sigmoid_in_kernel), allow_neg_eigval=bool(allow_neg_eigval),
        state_v_first=bool(state_v_first),
    )  # fmt: skip
    _increment_version([x for x in (out, named["final_state"], guarded) if x is not None])
    asked = (q, k, v, g, beta, o, initial_state, final_state, A_log, dt_bias, cu_seqlens, state_indices)
    taken = (
        q if _tma_can_address(q, 8) else _copied("q", q),
        k if _tma_can_address(k, 8) else _copied("k", k),
        v if _tma_can_address(v, 8) else _copied("v", v),
        g if _tma_can_address(g, 16 // g.element_size()) else _copied("g", g),
        beta if beta.is_contiguous() else _copied("beta", beta),
        o if _tma_can_address(o, 8) else _copied("out", o),
        initial_state
        if initial_state is None or (initial_state.is_contiguous() and not initial_state.data_ptr() % 16)
        else _copied("initial_state", initial_state),
        final_state if final_state is None or not final_state.data_ptr() % 16 else _copied("final_state", final_state),
        A_log if A_log is None else _parameter(A_log),
        dt_bias if dt_bias is None else _parameter(dt_bias),
        cu_seqlens if cu_seqlens is None or cu_seqlens.is_contiguous() else _copied("cu_seqlens", cu_seqlens),
        state_indices
        if state_indices is None or state_indices.is_contiguous()
        else _copied("state_indices", state_indices),
    )
    if not launch(*taken, kept, checked=True):
        raise AssertionError("the kernel refuses what was copied for it")
    o_taken, final_taken = taken[5], taken[7]
    if o_taken is not o:
        o.copy_(o_taken)
    if final_state is not None and final_taken is not None and final_taken is not final_state:
        final_state.copy_(final_taken)
    if key is not None and all(map(operator.is_, asked, taken)):
        _remember(key, (q, k, v, *tensors[3:]), launch, state_shape)
    return o, final_state


def _from_pool(pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A state a sequence, zero where its index is negative."""
    state = pool.new_zeros(len(indices), *pool.shape[1:])
    if not pool.is_meta:  # where there are no indices to go by
        stored = indices >= 0
        state[stored] = pool[indices[stored]]
    return state


def _into_pool(state: torch.Tensor, pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    if not pool.is_meta:
        stored = indices >= 0
        pool[indices[stored]] = state[stored].to(pool.dtype)
    return pool


def _as_operator(
    arguments: tuple[Any, ...], out: torch.Tensor | None, final_state: torch.Tensor | None, kept: Any, recurrent: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if recurrent:
        return library.traced_recurrent(arguments, out, final_state, kept)
    return library.traced(arguments, out, final_state)


def _with_checkpoints(
    call: dict[str, Any], out: torch.Tensor | None, final_state: torch.Tensor | None, interval: int | None,
    fla_kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        raise NotImplementedError("checkpoint_interval is given: must be None under torch.compile and torch.jit.trace")
    dtype = torch.float32
    if interval is None:  # fla's return_intermediate_states
        interval, dtype = fla_kwargs.get("chunk_size", 64), torch.bfloat16
    interval = contract.check_interval(interval)
    named = {**call, "out": out, "final_state": final_state}
    *arguments, out, final_state = (memory.plain(named)[0] or named).values()
    call = dict(zip(library.ARGUMENTS, arguments, strict=True))
    B, T, _, HV, K, V, N = contract.check_named({**call, "out": out, "final_state": final_state})
    v, cu_seqlens = call["v"], call["cu_seqlens"]
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
        first = _first_checkpoints(cu_seqlens, T, interval, room)
    shape = (V, K) if call["state_v_first"] else (K, V)
    states = torch.empty((room, HV, *shape), dtype=dtype, device=v.device)
    o, S = run(tuple(call.values()), out, final_state, (states, first, interval // 32))
    return o, S, states[:rows].view(B if cu_seqlens is None else 1, -1 if rows else 0, HV, *shape)


def _first_checkpoints(cu_seqlens: torch.Tensor, T: int, interval: int, rows: int) -> torch.Tensor:
    """The number of each sequence's first state. That of its last one is below `rows`, whatever cu_seqlens says."""
    cuts = cu_seqlens.clamp(0, T)  # as the kernel takes them
    counts = (cuts.diff().clamp(min=0) + interval - 1) // interval
    return torch.minimum(counts.cumsum(0) - counts, rows - counts).int()


def _piecewise(call: dict[str, Any], kept: Any, recurrent: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By the reference, from one state that is kept to the next."""
    states, first, step = (kept, None, 1) if recurrent else (kept[0], kept[1], 32 * kept[2])
    B, T, HV, _ = call["v"].shape
    names = ("q", "k", "v", "g", "beta")
    tensors: dict[str, Any] = {name: call[name].reshape(1, B * T, *call[name].shape[2:]) for name in names}
    v, dtype = call["v"], library.state_dtype(call["v"])
    o = v.new_zeros((1, B * T, HV, v.shape[-1]), dtype=dtype)
    shape = states.shape[-2:]
    states = states.view(-1, HV, *shape)
    if recurrent:  # tokens of no sequence have zeros
        states.zero_()
    finals = [o.new_zeros(0, HV, *shape)]
    for n, (begin, end) in enumerate(sequence_bounds(B, T, call["cu_seqlens"])):
        S = o.new_zeros(1, HV, *shape)
        if call["initial_state"] is not None:
            S = call["initial_state"][n : n + 1].to(dtype)
        for i, at in enumerate(range(begin, end, step)):
            if first is not None:
                states[int(first[n]) + i] = S[0].to(states.dtype)
            tokens = slice(at, min(at + step, end))
            part = {name: x[:, tokens] for name, x in tensors.items()}
            part.update(initial_state=S, output_final_state=True, cu_seqlens=None)
            o[:, tokens], last = library.by_reference({**call, **part}, recurrent)
            assert last is not None
            S = last
            if first is None:
                states[at] = S[0].to(states.dtype)
        finals.append(S)
    return o.view(v.shape), torch.cat(finals) if call["output_final_state"] else None


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    state_indices: torch.Tensor | None = None,
    output_token_states: bool = False,
    token_states: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    backend: str | None = None,
    **fla_kwargs: Any,
) -> Any:
    """What `chunk_kda` computes, token by token and in fp32: for decoding, where a sequence has a few new tokens and
    reading and writing its state is what takes time. Any length is right; for 64 sequences and more, of 8 tokens and
    more, `chunk_kda`, with its products in bf16, takes less time.

    Args:
        all as in `chunk_kda`, in fla's order. With final_state=initial_state states are updated in place.
        output_token_states: return the state after each token too, fp32, [B, T, HV, ...], to go back to one of them;
            zero after tokens of no sequence.
        token_states: a contiguous tensor of that shape for them, bf16 or fp32.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state or None; with token states those too.

    Has no gradient: where one is asked for, it raises NotImplementedError.
    """
    if fla_kwargs:
        state_v_first = contract.check_fla_kwargs(fla_kwargs, state_v_first, "fused_recurrent_kda")
    arguments = (
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, False, lower_bound, state_v_first, cu_seqlens, A_log, dt_bias,
        state_indices, backend,
    )  # fmt: skip
    if state_indices is not None and final_state is None:
        final_state = initial_state
    if output_token_states and token_states is None:
        call = dict(zip(library.ARGUMENTS, arguments, strict=True))
        B, T, _, HV, K, V, _ = library.check({**call, "out": out, "final_state": final_state})
        shape = contract.state_shape(B * T, HV, K, V, state_v_first)[1:]
        token_states = torch.empty((B, T, *shape), dtype=library.state_dtype(v), device=v.device)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        o, S = library.traced_recurrent(arguments, out, final_state, token_states)
    else:
        o, S = run(arguments, out, final_state, token_states, True)
    return (o, S) if token_states is None else (o, S, token_states)


def chunk_kda_summary(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What tokens do to the state, without knowing it: an affine map, (M, C) for every sequence and head.

    With the state S [K, V] before them it is M S + C after them; with state_v_first, S [V, K], it is S M + C. So a
    sequence can be cut between GPUs: each summarises its part, the parts before it give the state that it begins with,
    and `chunk_kda` takes that as initial_state.

    M is what chunk_kda makes of the identity without values, C what it makes of no state: two of its passes.

    Args:
        all as in `chunk_kda`, which raises what is raised; l2norm concerns k alone.

    Returns:
        M [N, HV, K, K] and C [N, HV, K, V], or [N, HV, V, K] with state_v_first; fp32 (fp64 for fp64 inputs).
    """
    if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()):
        named: dict[str, Any] = dict(
            k=k, v=v, g=g, beta=beta, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias, backend=backend
        )  # fmt: skip
        k, v, g, beta, cu_seqlens, A_log, dt_bias, _ = (memory.plain(named)[0] or named).values()
    arguments: dict[str, Any] = dict(
        output_final_state=True, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval, safe_gate=safe_gate,
        lower_bound=lower_bound, state_v_first=state_v_first, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
        backend=backend,
    )  # fmt: skip
    _, C = chunk_kda(k, k, v, g, beta, **arguments)
    assert C is not None
    K, (N, HV) = k.shape[-1], C.shape[:2]
    identity = torch.eye(K, dtype=C.dtype, device=k.device).repeat(N, HV, 1, 1)
    no_values = v.new_zeros((*v.shape[:-1], K))
    _, M = chunk_kda(k, k, no_values, g, beta, initial_state=identity, **arguments)
    assert M is not None
    return M, C


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """FlashKDA's entry point: raw gate, beta logits, q and k to be normalised; states are [N, H, V, K]. Writes out."""
    if out is None:
        raise TypeError("out is a NoneType: must be a torch.Tensor")
    with torch.no_grad():  # FlashKDA has no autograd: parameters may be passed as they are
        chunk_kda(
            q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, safe_gate=True, lower_bound=lower_bound, state_v_first=True,
            cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias, out=out, final_state=final_state,
        )  # fmt: skip


def _takes_reference(q: torch.Tensor, backend: str | None) -> bool:
    """Whether torch does the work. If not, q is on a GPU that the kernel runs on."""
    if backend == "reference" or (backend is None and q.is_cpu):
        return True
    if backend is not None and backend != "cute":
        raise ValueError(f'backend is {backend!r}: must be None, "cute" or "reference"')
    if not q.is_cuda:
        raise ValueError(
            f'q is on {q.device}: must be on a CUDA device for backend={backend!r}; backend="reference" works here'
        )
    capability, name = _gpu(q.get_device())
    if torch.version.hip is not None:
        raise RuntimeError(
            f"q is on {q.device}, a {name} under ROCm: the kernel needs an NVIDIA Hopper GPU such as the H100 or H200; "
            'backend="reference" works here, slowly'
        )
    if capability != (9, 0):
        major, minor = capability
        raise RuntimeError(
            f"q is on {q.device}, a {name} (compute capability {major}.{minor}): the kernel needs a Hopper GPU such as "
            f'the H100 or H200 (9.0); backend="reference" works here, slowly'
        )
    return False


# Calls that were right and needed no copy: all that decides about one except its tensors -> torch's guards (are tensors
# the same in type, device, dtype, shape, strides and requires_grad?), what picks the tensors that are no None for them,
# the launch, the shape of a state, what makes o. None after one such call. For ten tensors the guards take 1 us;
# reading as much from Python takes 4 us, comparing not counted.
_known: dict[
    tuple,
    tuple[Callable[..., bool], operator.itemgetter, Callable[..., bool], tuple[int, ...], Callable[..., Any]] | None,
] = {}


def _remember(
    key: tuple, tensors: tuple[torch.Tensor | None, ...], launch: Callable[..., bool], state_shape: tuple[int, ...]
) -> None:
    if key not in _known:
        if len(_known) == KNOWN_MAX:
            _known.clear()
        _known[key] = None  # a call that is never repeated does not pay for guards
    elif TensorGuards is not None:
        present = operator.itemgetter(*[i for i, x in enumerate(tensors) if x is not None])
        try:
            guards = TensorGuards(*present(tensors), dynamic_dims_sizes=None, dynamic_dims_strides=None)
        except TypeError:  # a torch that makes them otherwise: every call is checked in full
            return
        _known[key] = guards.check, present, launch, state_shape, memory.empty_like_for(tensors[2])


@functools.cache
def _gpu(index: int) -> tuple[tuple[int, int], str]:
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)


@functools.cache
def _sm90() -> Any:
    from . import sm90  # here, because it imports what a CPU user need not have

    return sm90


def _tma_can_address(x: torch.Tensor, quantum: int) -> bool:
    """Whether a TMA descriptor can describe x [B, T, HV, D]; quantum: the elements in 16 bytes, a power of two.

    The unit the hardware demands for strides and the address. An expanded dimension (stride 0) goes the slow way too.
    """
    s0, s1, s2, s3 = x.stride()
    return s3 == 1 and s0 > 0 and s1 > 0 and s2 > 0 and not (s0 | s1 | s2) % quantum and not x.data_ptr() % 16


_copies_logged: set[str] = set()


def _copied(name: str, x: torch.Tensor) -> torch.Tensor:
    if name not in _copies_logged:
        _copies_logged.add(name)
        _log.warning(
            "%s with strides %s is copied in every such call (said once): without a copy its last dimension must be "
            "contiguous, its other strides and its address multiples of 16 bytes",
            name,
            x.stride(),
        )
    # Not x.contiguous(): that returns x itself if only its address, or the stride of a dimension of 1, is at fault.
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _parameter(x: torch.Tensor) -> torch.Tensor:
    """A_log and dt_bias as the kernel takes them, by address: fp32, contiguous, at a multiple of 16 bytes."""
    x = x.float().contiguous()
    return x.clone() if x.data_ptr() % 16 else x
