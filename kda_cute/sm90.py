"""The call path to the Hopper kernel: picks the binary, packs run-time flags, launches on torch's stream."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch

from . import jit, memory
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

# Addresses of calls that were right, after the number of their launch: as shapes and strides are the same, the same
# addresses are right again. Some 500 bytes each.
RIGHT_MAX = 8192
_right: set[tuple[int, ...]] = set()
_launches = itertools.count()

_DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@functools.cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_workspaces: dict[tuple[int, int], list[torch.Tensor]] = {}


def _workspace(device: int, size: int) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Where blocks hand states on, and the list that it goes back to behind the last launch, if any.

    Calls on the default stream keep theirs: kernels clear the flags that they set. While one call has it no other
    finds it, because host threads may interleave their launches; whoever takes it next launches behind them all. On
    other streams memory may come from the pool of a CUDA graph, which must not outlive the call.
    """
    if torch._C._cuda_getCurrentRawStream(device) != 0:  # current_stream makes an object; never 0 while capturing
        return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device)), None
    key = device, size
    kept = _workspaces.get(key)
    if kept is None:
        kept = _workspaces.setdefault(key, [])
    try:
        return kept.pop(), kept
    except IndexError:
        return torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device)), kept


def prepare(
    q: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    final_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    kept: Any,
    recurrent: bool,
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
    final_state and what is kept (see `ops.run`). It returns False and launches nothing if an address is not a multiple
    of 16 bytes, and raises an error if a tensor has no memory, or what it writes shares some with another tensor.
    """
    device, sms = q.get_device(), _sm_count(q.get_device())
    B, T, H, K = g.shape
    V, n = v.shape[-1], B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype, g_dtype = _DTYPES[q.dtype], _DTYPES[g.dtype]
    gate: Literal["safe", "softplus", "log"] = "log"
    if use_gate_in_kernel:
        gate = "softplus" if lower_bound is None else "safe"
    build, room, every = None, 0, 0
    flags = (
        L2NORM * use_qk_l2norm_in_kernel
        | BETA_SIGMOID * use_beta_sigmoid_in_kernel
        | NEG_EIGVAL * allow_neg_eigval
        | BETA_BF16 * (beta.dtype is torch.bfloat16)
        | BETA_FP16 * (beta.dtype is torch.float16)
        | STATE_V_FIRST * state_v_first
        | INITIAL_BF16 * (initial_state is not None and initial_state.dtype is torch.bfloat16)
        | FINAL_BF16 * (final_state is not None and final_state.dtype is torch.bfloat16)
        | CU_INT64 * (cu_seqlens is not None and cu_seqlens.dtype is torch.int64)
    )
    if recurrent:
        kernel = jit.load(KdaDecodeConfig(g_dtype, gate, state_v_first, dtype, K, V))
        flags |= TOKEN_STATES_BF16 * (kept is not None and kept.dtype is torch.bfloat16)
    else:
        split = v_split(B * T, n, H, sms) if V == 128 else 1
        packed = cu_seqlens is not None
        longest = B * T if packed else T
        room = workspace_bytes(longest, n, H, packed, split, sms)
        if room and K == V == 128 and builds_maps(longest, H, n, packed, split, sms):
            build = jit.load(KdaBuildConfig(g_dtype, gate, allow_neg_eigval, dtype))
            room += maps_bytes(sms)
            flags |= MAPS_BUILT
        kernel = jit.load(KdaFwdConfig(g_dtype, gate, split, allow_neg_eigval, dtype, K, V, kept is not None))
        if kept is not None:
            flags |= CHECKPOINTS_BF16 * (kept[0].dtype is torch.bfloat16)
            every = kept[2]
    pool = n if initial_state is None else initial_state.shape[0]
    bound = lower_bound or 0.0
    number = next(_launches)

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
        kept: Any,
        checked: bool = False,
    ) -> bool:
        if torch._C._cuda_getDevice() != device:  # current_device would first see to it that CUDA is there, as q's is
            with torch.cuda.device(device):
                return launch(
                    q, k, v, g, beta, o, initial_state, final_state, A_log, dt_bias, cu_seqlens, state_indices, kept,
                    checked=checked,
                )  # fmt: skip
        initial = 0 if initial_state is None else initial_state.data_ptr()
        final = 0 if final_state is None else final_state.data_ptr()
        a_log = 0 if A_log is None else A_log.data_ptr()
        bias = 0 if dt_bias is None else dt_bias.data_ptr()
        cuts = 0 if cu_seqlens is None else cu_seqlens.data_ptr()
        indices = 0 if state_indices is None else state_indices.data_ptr()
        states = first = 0
        if kept is not None:
            states, first = (kept.data_ptr(), 0) if recurrent else (kept[0].data_ptr(), kept[1].data_ptr())
        betas = beta.data_ptr()
        addresses = (
            number, q.data_ptr(), k.data_ptr(), v.data_ptr(), g.data_ptr(), o.data_ptr(), betas, a_log, bias, initial,
            final, cuts, indices, states,
        )  # fmt: skip
        if addresses not in _right:
            by_vector = q.data_ptr() | k.data_ptr() | v.data_ptr() | g.data_ptr() | o.data_ptr()
            if (by_vector | a_log | bias | initial | final) % 16:
                return False
            if not checked:
                memory.check_memory({
                    "q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state, "A_log": A_log,
                    "dt_bias": dt_bias, "cu_seqlens": cu_seqlens, "state_indices": state_indices, "out": o,
                    "final_state": final_state, "token_states": kept if recurrent else None,
                })  # fmt: skip
            if len(_right) >= RIGHT_MAX:
                _right.clear()
            _right.add(addresses)
        if recurrent:
            kernel(
                q, k, v, g, o, betas, a_log, bias, initial, final, indices, states, cuts, n, pool, scale, bound, flags
            )  # fmt: skip
            return True
        workspace, workspaces = _workspace(device, room) if room else (None, None)
        handed = 0 if workspace is None else workspace.data_ptr()
        if build is not None:
            build(k, v, g, betas, a_log, bias, initial, indices, cuts, handed, n, pool, bound, flags, sms)
        kernel(
            q, k, v, g, o, betas, a_log, bias, initial, final, indices, states, first, cuts, handed, n, pool, every,
            scale, bound, flags, sms,
        )  # fmt: skip
        if workspaces is not None and workspace is not None:
            workspaces.append(workspace)
        return True

    return launch
