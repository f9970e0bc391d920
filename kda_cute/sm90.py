"""The call path to the Hopper kernel: picks the binary, packs run-time flags, launches on torch's stream."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from . import jit
from .kernels.config import (
    BETA_BF16,
    BETA_FP16,
    BETA_SIGMOID,
    CHECKPOINTS_BF16,
    CU_INT64,
    FINAL_BF16,
    INITIAL_BF16,
    L2NORM,
    MAPS_BUILT,
    NEG_EIGVAL,
    STATE_V_FIRST,
    TOKEN_STATES_BF16,
    KdaBuildConfig,
    KdaDecodeConfig,
    KdaFwdConfig,
    builds_maps,
    maps_bytes,
    v_split,
    workspace_bytes,
)

_DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@functools.cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_nothing = contextlib.nullcontext()


def _on(device: int) -> contextlib.AbstractContextManager:
    """current_device would first see to it that CUDA is there, which a tensor on it has."""
    return _nothing if device == torch._C._cuda_getDevice() else torch.cuda.device(device)


_workspaces: dict[tuple[int, int], torch.Tensor] = {}


def _workspace(device: int, size: int) -> torch.Tensor:
    """Where blocks hand states on. The default stream, whose kernels run one after the other and clear the flags that
    they set, keeps one. On another, memory may come from the pool of a CUDA graph, which must not outlive the call."""
    if torch._C._cuda_getCurrentRawStream(device) != 0:  # current_stream makes an object; never 0 while capturing
        return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))
    key = device, size
    if key not in _workspaces:
        _workspaces[key] = torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))
    return _workspaces[key]


def prepare(
    q: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    final_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    kept: tuple[torch.Tensor, torch.Tensor, int] | None,
    *,
    scale: float,
    lower_bound: float | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
) -> Callable[..., bool]:
    """The launch for all calls with the shapes, dtypes, device and flags of this one, which is validated and not empty.

    launch(q, k, v, g, beta, o, initial_state, final_state, A_log, dt_bias, cu_seqlens, state_indices, kept) writes o,
    final_state and what is kept. It returns False and launches nothing if an address is not a multiple of 16 bytes.
    """
    device = q.get_device()
    sms = _sm_count(device)
    B, T, H, K = g.shape
    V, whole = v.shape[-1], (K, v.shape[-1]) == (128, 128)
    n = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    split = v_split(B * T, n, H, sms) if V == 128 else 1
    packed = cu_seqlens is not None
    longest = B * T if packed else T
    room = workspace_bytes(longest, n, H, packed, split, sms)
    dtype, g_dtype = _DTYPES[q.dtype], _DTYPES[g.dtype]
    gate = _gate(use_gate_in_kernel, lower_bound)
    build = None
    if room and whole and builds_maps(longest, H, n, packed, split, sms):
        build = jit.load(KdaBuildConfig(g_dtype, gate, allow_neg_eigval, dtype))
        room += maps_bytes(sms)
    kernel = jit.load(KdaFwdConfig(g_dtype, gate, split, allow_neg_eigval, dtype, K, V, kept is not None))
    flags = MAPS_BUILT * (build is not None) | _flags(
        beta, initial_state, final_state, cu_seqlens, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, state_v_first,
    )  # fmt: skip
    flags |= CHECKPOINTS_BF16 * (kept is not None and kept[0].dtype is torch.bfloat16)
    pool = n if initial_state is None else initial_state.shape[0]
    every = 0 if kept is None else kept[2]
    numbers = (n, pool, every, scale, lower_bound or 0.0, flags, sms)

    def launch(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        o: torch.Tensor,
        initial_state: torch.Tensor | None,
        final_state: torch.Tensor | None,
        A_log: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        state_indices: torch.Tensor | None,
        kept: tuple[torch.Tensor, torch.Tensor, int] | None,
    ) -> bool:
        initial = 0 if initial_state is None else initial_state.data_ptr()
        final = 0 if final_state is None else final_state.data_ptr()
        a_log = 0 if A_log is None else A_log.data_ptr()
        bias = 0 if dt_bias is None else dt_bias.data_ptr()
        cuts = 0 if cu_seqlens is None else cu_seqlens.data_ptr()
        indices = 0 if state_indices is None else state_indices.data_ptr()
        states, first = (0, 0) if kept is None else (kept[0].data_ptr(), kept[1].data_ptr())
        by_tma = q.data_ptr() | k.data_ptr() | v.data_ptr() | g.data_ptr() | o.data_ptr()
        if (by_tma | initial | final | a_log | bias) % 16:
            return False
        workspace = _workspace(device, room) if room else None
        handed = 0 if workspace is None else workspace.data_ptr()
        arguments = (
            q,
            k,
            v,
            g,
            o,
            beta.data_ptr(),
            a_log,
            bias,
            initial,
            final,
            indices,
            states,
            first,
            cuts,
            handed,
            *numbers,
        )
        with _on(device):
            if build is not None:
                build(k, v, g, *arguments[5:9], indices, cuts, handed, n, pool, lower_bound or 0.0, flags, sms)
            kernel(*arguments)
        return True

    return launch


def prepare_recurrent(
    q: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    final_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    kept: torch.Tensor | None,
    *,
    scale: float,
    lower_bound: float | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
) -> Callable[..., bool]:
    """As `prepare`, for fused_recurrent_kda. kept: the states after each token."""
    device, n = q.get_device(), q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gate = _gate(use_gate_in_kernel, lower_bound)
    kernel = jit.load(
        KdaDecodeConfig(_DTYPES[g.dtype], gate, state_v_first, _DTYPES[q.dtype], q.shape[-1], v.shape[-1])
    )
    flags = TOKEN_STATES_BF16 * (kept is not None and kept.dtype is torch.bfloat16) | _flags(
        beta, initial_state, final_state, cu_seqlens, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, state_v_first,
    )  # fmt: skip
    numbers = (n, n if initial_state is None else initial_state.shape[0], scale, lower_bound or 0.0, flags)

    def launch(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        o: torch.Tensor,
        initial_state: torch.Tensor | None,
        final_state: torch.Tensor | None,
        A_log: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        state_indices: torch.Tensor | None,
        kept: torch.Tensor | None,
    ) -> bool:
        a_log = 0 if A_log is None else A_log.data_ptr()
        bias = 0 if dt_bias is None else dt_bias.data_ptr()
        initial = 0 if initial_state is None else initial_state.data_ptr()
        final = 0 if final_state is None else final_state.data_ptr()
        indices = 0 if state_indices is None else state_indices.data_ptr()
        states = 0 if kept is None else kept.data_ptr()
        cuts = 0 if cu_seqlens is None else cu_seqlens.data_ptr()
        by_vector = q.data_ptr() | k.data_ptr() | v.data_ptr() | g.data_ptr() | o.data_ptr()
        if (by_vector | initial | final) % 16:
            return False
        with _on(device):
            kernel(q, k, v, g, o, beta.data_ptr(), a_log, bias, initial, final, indices, states, cuts, *numbers)
        return True

    return launch


def _gate(use_gate_in_kernel: bool, lower_bound: float | None) -> Literal["safe", "softplus", "log"]:
    if not use_gate_in_kernel:
        return "log"
    return "softplus" if lower_bound is None else "safe"


def _flags(
    beta: torch.Tensor, initial_state: torch.Tensor | None, final_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, l2norm: bool, beta_sigmoid: bool, neg_eigval: bool, state_v_first: bool,
) -> int:  # fmt: skip
    return (
        L2NORM * l2norm
        | BETA_SIGMOID * beta_sigmoid
        | NEG_EIGVAL * neg_eigval
        | BETA_BF16 * (beta.dtype is torch.bfloat16)
        | BETA_FP16 * (beta.dtype is torch.float16)
        | STATE_V_FIRST * state_v_first
        | INITIAL_BF16 * (initial_state is not None and initial_state.dtype is torch.bfloat16)
        | FINAL_BF16 * (final_state is not None and final_state.dtype is torch.bfloat16)
        | CU_INT64 * (cu_seqlens is not None and cu_seqlens.dtype is torch.int64)
    )
