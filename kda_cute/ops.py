"""The public operation: `chunk_kda` with fla's signature, and `fwd` with FlashKDA's."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from . import contract
from .reference.chunked import chunked

_log = logging.getLogger("kda_cute")


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
    out: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    backend: str | None = None,
    **fla_kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
            of the one batch entry. It starts at 0, never decreases and ends at T or before; o of tokens past its end is
            not written (and is whatever the memory held). The GPU path never reads it back to the host.
        A_log: [HV]. dt_bias: [HV * K] or [HV, K]. Both only with use_gate_in_kernel, both may be None with lower_bound.
        out: o, in the dtype of q. final_state: the last states, contiguous, bf16 or fp32.
        backend: None takes "cute" for CUDA tensors and "reference" for all others. "reference" is torch on any device,
            in fp32 (fp64 for fp64 inputs), and differentiable.
        fla_kwargs: what fla takes besides: disable_recompute, cu_seqlens_cpu and chunk_size change nothing here,
            transpose_state_layout is state_v_first, return_intermediate_states and cp_context are not served.

    Returns:
        o [B, T, HV, V] in the dtype of q, and the final state or None.

    With KDA_CUTE_CHECK=1 in the environment at import the values of cu_seqlens, and those of g under safe_gate, are
    checked too, which waits for the GPU.
    """
    if fla_kwargs:
        state_v_first = contract.check_fla_kwargs(fla_kwargs, state_v_first)
    B, T, H, HV, K, V, N = contract.check_call(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        safe_gate,
        lower_bound,
        state_v_first,
        cu_seqlens,
        A_log,
        dt_bias,
        out,
        final_state,
    )
    scale = contract.check_scale(scale, K)
    wants_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or g.requires_grad
        or beta.requires_grad
        or (initial_state is not None and initial_state.requires_grad)
        or (A_log is not None and A_log.requires_grad)
        or (dt_bias is not None and dt_bias.requires_grad)
    )
    reference = _takes_reference(q, backend)

    if reference:
        if wants_grad and (out is not None or final_state is not None):
            contract.refuse_grad(
                "out and final_state must be None, autograd cannot follow a write into them",
                q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias,
            )  # fmt: skip
    else:
        contract.check_served(H, HV, K, V, q, g, beta, use_gate_in_kernel, safe_gate, lower_bound)
        if wants_grad:
            contract.refuse_grad(
                'must not on the GPU outside torch.no_grad(), there is no backward yet; backend="reference" has one',
                q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias,
            )  # fmt: skip

    checked = contract.CHECK_VALUES and (reference or not torch.cuda.is_current_stream_capturing())
    if reference or checked:
        tokens = T if cu_seqlens is None else contract.check_cu_seqlens(cu_seqlens, T)
        if checked and safe_gate and not use_gate_in_kernel:
            contract.check_log_decay(g, tokens)

    if reference:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        o, state = chunked(
            q, k, v, g, beta, scale, initial_state, output_final_state or final_state is not None,
            use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, safe_gate,
            lower_bound, state_v_first, cu_seqlens, A_log=A_log, dt_bias=dt_bias, dtype=dtype,
        )  # fmt: skip
        if out is None:
            out = o.to(q.dtype)
        else:
            out[:, :tokens].copy_(o[:, :tokens])
        return out, state if final_state is None or state is None else final_state.copy_(state)

    if final_state is None and output_final_state:
        final_state = torch.empty(
            (N, HV, V, K) if state_v_first else (N, HV, K, V), dtype=torch.float32, device=q.device
        )
    o = torch.empty((B, T, HV, V), dtype=q.dtype, device=q.device) if out is None else out
    if T == 0 or N == 0:
        if final_state is not None:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return o, final_state

    final_kernel = final_state
    if final_state is not None and final_state.data_ptr() % 16:
        final_kernel = _copied("final_state", final_state)
    o_kernel = o if out is None or _tma_can_address(o, 8) else _copied("out", o)
    _sm90().forward(
        q if _tma_can_address(q, 8) else _copied("q", q),
        k if _tma_can_address(k, 8) else _copied("k", k),
        v if _tma_can_address(v, 8) else _copied("v", v),
        g if _tma_can_address(g, 16 // g.element_size()) else _copied("g", g),
        beta if beta.is_contiguous() else _copied("beta", beta),
        scale=scale,
        o=o_kernel,
        initial_state=initial_state
        if initial_state is None or (initial_state.is_contiguous() and not initial_state.data_ptr() % 16)
        else _copied("initial_state", initial_state),
        final_state=final_kernel,
        A_log=A_log if A_log is None else _parameter(A_log),
        dt_bias=dt_bias if dt_bias is None else _parameter(dt_bias),
        lower_bound=None if lower_bound is None else float(lower_bound),
        use_qk_l2norm_in_kernel=bool(use_qk_l2norm_in_kernel),
        use_gate_in_kernel=bool(use_gate_in_kernel),
        use_beta_sigmoid_in_kernel=bool(use_beta_sigmoid_in_kernel),
        allow_neg_eigval=bool(allow_neg_eigval),
        state_v_first=bool(state_v_first),
        cu_seqlens=cu_seqlens
        if cu_seqlens is None or cu_seqlens.is_contiguous()
        else _copied("cu_seqlens", cu_seqlens),
    )
    if o_kernel is not o:
        o.copy_(o_kernel)
    if final_state is not None and final_kernel is not None and final_kernel is not final_state:
        final_state.copy_(final_kernel)
    return o, final_state


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
    if capability != (9, 0):
        major, minor = capability
        raise RuntimeError(
            f"q is on {q.device}, a {name} (compute capability {major}.{minor}): the kernel needs a Hopper GPU such as "
            f'the H100 or H200 (9.0); backend="reference" works here, slowly'
        )
    return False


@functools.cache
def _gpu(index: int) -> tuple[tuple[int, int], str]:
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)


@functools.cache
def _sm90() -> Any:
    from . import sm90  # here, because it imports what a CPU user need not have

    return sm90


def _tma_can_address(x: torch.Tensor, quantum: int) -> bool:
    """Whether a TMA descriptor can describe x [B, T, HV, D]; quantum: the elements in 16 bytes.

    The unit the hardware demands for strides and the address. An expanded dimension (stride 0) goes the slow way too.
    """
    s0, s1, s2, s3 = x.stride()
    if s3 != 1 or s0 % quantum or s1 % quantum or s2 % quantum or x.data_ptr() % 16:
        return False
    return s0 > 0 and s1 > 0 and s2 > 0


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
    """A_log and dt_bias as the kernel takes them: fp32, contiguous, one dimension, at a multiple of 16 bytes."""
    if x.dtype is not torch.float32:
        x = x.float()
    if x.dim() != 1 or not x.is_contiguous():
        x = x.reshape(-1)
    return x.clone() if x.data_ptr() % 16 else x
