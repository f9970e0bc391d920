"""The call path to the Hopper kernel: picks the binary, packs run-time flags, launches on torch's stream."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
    v_split,
    workspace_bytes,
)


@functools.cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    final_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
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

    launch(q, k, v, g, beta, o, initial_state, final_state, A_log, dt_bias, cu_seqlens) writes o and final_state. It
    returns False and launches nothing if an address is not a multiple of 16 bytes.
    """
    device = q.get_device()
    sms = _sm_count(device)
    B, T, H, _ = g.shape
    n = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    split = v_split(B * T, n, H, sms)
    room = workspace_bytes(B * T if cu_seqlens is not None else T, n, H, cu_seqlens is not None, split, sms)
    kernel = jit.load(
        KdaFwdConfig(
            "bf16" if g.dtype is torch.bfloat16 else "fp32",
            "safe" if use_gate_in_kernel else "log",
            split,
            allow_neg_eigval,
        )
    )
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
    numbers = (n, scale, lower_bound or 0.0, flags, sms)

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
    ) -> bool:
        initial = 0 if initial_state is None else initial_state.data_ptr()
        final = 0 if final_state is None else final_state.data_ptr()
        a_log = 0 if A_log is None else A_log.data_ptr()
        bias = 0 if dt_bias is None else dt_bias.data_ptr()
        cuts = 0 if cu_seqlens is None else cu_seqlens.data_ptr()
        by_tma = q.data_ptr() | k.data_ptr() | v.data_ptr() | g.data_ptr() | o.data_ptr()
        if (by_tma | initial | final | a_log | bias) % 16:
            return False
        workspace = _workspace(device, room) if room else None
        handed = 0 if workspace is None else workspace.data_ptr()
        arguments = (q, k, v, g, o, beta.data_ptr(), a_log, bias, initial, final, cuts, handed, *numbers)
        if device == torch.cuda.current_device():
            kernel(*arguments)
        else:
            with torch.cuda.device(device):
                kernel(*arguments)
        return True

    return launch
