"""The public operations: `chunk_kda` with fla's signature, `fwd` with FlashKDA's, and `chunk_kda_summary`."""

from __future__ import annotations

from typing import Any

import torch

from . import checkpoints, contract, dispatch, known_calls, memory, torch_ops
from .call import Call

_is_compiling, _known = torch.compiler.is_compiling, known_calls.run
_dispatch_modes = torch._C._len_torch_dispatch_stack


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
    null_index: int = -1,
    has_initial_state: torch.Tensor | None = None,
    checkpoint_interval: int | None = None,
    checkpoint_offsets: torch.Tensor | None = None,
    checkpoint_state: torch.Tensor | None = None,
    checkpoint_indices: torch.Tensor | None = None,
    batch_invariant: bool = False,
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
        state_indices: [N], int32 or int64. initial_state then is a pool of P states, [P, HV, ...]: sequence n begins
            with state state_indices[n] and leaves its last one there, in place, or in final_state, a pool as large. No
            two sequences may have the same state. The final state in the result is the pool. A pool is never copied:
            stride(0) may be any multiple of 16 bytes, each state is contiguous.
        null_index: -1 or 0. Indices up to it are null: o of such a sequence is zero, and no state is read or written.
            So it is with indices that are not below P.
        has_initial_state: [N], bool. Where it is False the sequence begins with zero, whatever initial_state has, and
            leaves its last state all the same.
        checkpoint_interval: a multiple of 32 tokens. The states before tokens 0, checkpoint_interval, ... of every
            sequence are a third result, fp32: [B, ceil(T / checkpoint_interval), HV, ...]; with cu_seqlens
            [1, R, HV, ...], sequence by sequence, R such that there is room for any cu_seqlens; what is left of it is
            not written.
        checkpoint_offsets: [N] or [N, M], int32 or int64. The state after so many tokens of a sequence goes to its
            checkpoint_state; none for 0 and for more tokens than there are. Multiples of 32 take less time: others are
            reached token by token.
        checkpoint_state: for them, bf16 or fp32: [N, HV, ...] or [N, M, HV, ...]; with checkpoint_indices, of the shape
            of checkpoint_offsets, slots of a pool [R, HV, ...], which may be initial_state. null_index counts here too.
        batch_invariant: the bits of a sequence's results depend on nothing else in the call, nor, with fp32 states, on
            how it is split between calls at multiples of 32 tokens, if its numbers are finite. Takes more time where
            heads are few and gates weak.
        out: o, in the dtype of q. final_state: the last states, bf16 or fp32, each contiguous.
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

    Both are differentiable, without backward kernels yet: see `gradients`. torch.compile and export take the call
    as one operator. Under torch.autocast q, k and v in fp32 are taken in its dtype.

    With KDA_CUTE_CHECK=1 in the environment at import the values of cu_seqlens, and those of g under safe_gate, are
    checked too, which waits for the GPU.
    """
    if fla_kwargs:
        state_v_first = contract.check_fla_kwargs(fla_kwargs, state_v_first)
    if state_indices is not None and final_state is None:
        final_state = initial_state
    call = (
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, safe_gate, lower_bound, state_v_first, cu_seqlens, A_log, dt_bias,
        state_indices, null_index, has_initial_state, batch_invariant, backend, out, final_state, None, None, None,
        None, checkpoint_state, checkpoint_offsets, checkpoint_indices, None, False,
    )  # fmt: skip
    if checkpoint_interval is not None or (fla_kwargs and fla_kwargs.get("return_intermediate_states")):
        return checkpoints.run(Call(*call), checkpoint_interval, fla_kwargs)
    if _is_compiling() or _dispatch_modes():
        return torch_ops.traced(call)
    return _known(call) or dispatch.run(Call(*call), torch_ops.traced)


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
    null_index: int = -1,
    has_initial_state: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    update_state: bool = True,
    output_token_states: bool = False,
    token_states: torch.Tensor | None = None,
    token_state_indices: torch.Tensor | None = None,
    replay: torch.Tensor | None = None,
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
        state_indices: also [N, S], as in fla and vLLM: sequence n begins with state state_indices[n, 0] and leaves the
            one after token t in state_indices[n, t], if t is below S.
        num_accepted_tokens: [N], int32 or int64: how many tokens of the call before count. With state_indices [N, S]
            the state to begin with is state_indices[n, num_accepted_tokens[n] - 1].
        update_state: False leaves states as they are.
        output_token_states: return the state after each token too, fp32, [B, T, HV, ...], to go back to one of them;
            zero after tokens of no sequence.
        token_states: a contiguous tensor of that shape for them, bf16 or fp32.
        token_state_indices: [N], int32 or int64. token_states then is [R, S, HV, ...], and the state after token t of
            sequence n goes to token_states[token_state_indices[n], t], if t is below S; none with a negative index.
        replay: [R, S, HV, V / 32, 2 K + 32], fp32, as `replay_shape` gives it: speculative decoding without states of
            single tokens. The first num_accepted_tokens[n] tokens on record in row n, or token_state_indices[n], are
            applied to the state of sequence n first, and what comes out is its final state. Then o of this call's
            tokens is computed, and they take their place on record, with their decay, k and u, k as it enters the
            state. No state after them is stored.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state or None; with token states those too.

    Has no gradient: where one is asked for, it raises NotImplementedError.
    """
    if fla_kwargs:
        state_v_first = contract.check_fla_kwargs(fla_kwargs, state_v_first, "fused_recurrent_kda")
    if final_state is None and update_state and (state_indices is not None or replay is not None):
        final_state = initial_state
    if not update_state and (final_state is not None or replay is not None):
        name = "final_state" if replay is None else "replay"
        raise ValueError(f"{name} is given: must be None with update_state=False")
    if output_token_states and token_states is None:
        token_states = _token_states(
            q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, use_gate_in_kernel=use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
            lower_bound=lower_bound, state_v_first=state_v_first, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
            state_indices=state_indices, out=out, final_state=final_state, recurrent=True,
        )  # fmt: skip
    call = (
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, False, lower_bound, state_v_first, cu_seqlens, A_log, dt_bias,
        state_indices, null_index, has_initial_state, False, backend, out, final_state, token_states, replay,
        token_state_indices, num_accepted_tokens, None, None, None, None, True,
    )  # fmt: skip
    if _is_compiling() or _dispatch_modes():
        o, S = torch_ops.traced(call)
    else:
        o, S = _known(call) or dispatch.run(Call(*call), torch_ops.traced)
    return (o, S) if token_states is None else (o, S, token_states)


def _token_states(**call: Any) -> torch.Tensor:
    B, T, _, HV, K, V, _ = torch_ops.check(call)
    shape = contract.state_shape(B * T, HV, K, V, call["state_v_first"])[1:]
    return torch.empty((B, T, *shape), dtype=contract.state_dtype(call["v"]), device=call["v"].device)


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
    if not (_is_compiling() or _dispatch_modes()):
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
