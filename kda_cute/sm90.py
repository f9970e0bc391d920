"""The call path to the Hopper kernel: picks the binary, packs run-time flags, launches on torch's stream."""

from __future__ import annotations

import functools

import torch

from . import jit
from .kernels.config import (
    BETA_BF16,
    BETA_SIGMOID,
    CU_INT64,
    FINAL_BF16,
    INITIAL_BF16,
    L2NORM,
    NEG_EIGVAL,
    STATE_V_FIRST,
    KdaFwdConfig,
)

_CONFIGS = {
    (g_dtype, in_kernel): KdaFwdConfig("bf16" if g_dtype is torch.bfloat16 else "fp32", "safe" if in_kernel else "log")
    for g_dtype in (torch.bfloat16, torch.float32)
    for in_kernel in (False, True)
}


@functools.cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    o: torch.Tensor,
    initial_state: torch.Tensor | None,
    final_state: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """One launch; writes o and final_state. Everything is validated, on one Hopper GPU, and not empty (ops.py)."""
    kernel = jit.load(_CONFIGS[g.dtype, use_gate_in_kernel])
    flags = (
        L2NORM * use_qk_l2norm_in_kernel
        | BETA_SIGMOID * use_beta_sigmoid_in_kernel
        | NEG_EIGVAL * allow_neg_eigval
        | BETA_BF16 * (beta.dtype is torch.bfloat16)
        | STATE_V_FIRST * state_v_first
        | INITIAL_BF16 * (initial_state is not None and initial_state.dtype is torch.bfloat16)
        | FINAL_BF16 * (final_state is not None and final_state.dtype is torch.bfloat16)
        | CU_INT64 * (cu_seqlens is not None and cu_seqlens.dtype is torch.int64)
    )
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    device = q.get_device()
    arguments = (
        q, k, v, g, o, beta.data_ptr(), _address(A_log), _address(dt_bias), _address(initial_state),
        _address(final_state), _address(cu_seqlens), n, scale, lower_bound or 0.0, flags, _sm_count(device),
    )  # fmt: skip
    if device == torch.cuda.current_device():
        kernel(*arguments)
    else:
        with torch.cuda.device(device):
            kernel(*arguments)
