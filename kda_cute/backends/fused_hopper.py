"""The fused decode kernel: picks the binary, packs its numbers, launches on torch's stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import jit, memory
from ..fused_decode import WIDTH, FusedCall, FusedSizes
from ..kernels.config import (
    BETA_BF16,
    BETA_FP16,
    BETA_SIGMOID,
    CONV_FP32,
    INDEX_INT64,
    INITIAL,
    L2NORM,
    NORM_FP32,
    PDL,
    STATE_DTYPES,
    SWISH,
    KdaFusedDecodeConfig,
)
from ..transforms import is_of_functorch
from .hopper import current_device

_DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Calls that were right, with what their kernel is given: the same shapes, strides, addresses and numbers are right
# again. About 2 KB each.
KNOWN_MAX = 2048
known: dict[tuple[Any, ...], tuple[Callable[..., Any], int, tuple[int, ...], tuple[Any, ...]]] = {}


def why_not(call: FusedCall, sizes: FusedSizes) -> str | None:
    """Why the kernel cannot serve a valid call, or None."""
    if sizes.K != 128:
        return f"g has K = {sizes.K}: must be 128"
    if sizes.V != 128:
        return f"initial_state has V = {sizes.V}: must be 128"
    if call.mixed_qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"mixed_qkv is {call.mixed_qkv.dtype}: must be bfloat16 or float16"
    for name, x in (("g", call.g), ("beta", call.beta)):
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}: must be bfloat16, float16 or float32"
    if call.g.dtype not in (call.mixed_qkv.dtype, torch.float32):
        return f"g is {call.g.dtype}: must be like mixed_qkv, or float32"
    return None


def run_known(call: FusedCall, num_heads: int | None) -> Tensor | None:
    """o of a call like an earlier one, or None."""
    found = known.get(key) if (key := _key(call, num_heads)) is not None else None
    return None if found is None else _launch(call, *found)


def run(given: FusedCall, call: FusedCall, sizes: FusedSizes, num_heads: int | None) -> Tensor:
    """given: the call as it came, of which `call` is what is right."""
    if (reason := why_not(call, sizes)) is not None:
        raise NotImplementedError(f'{reason} on the GPU; backend="reference" serves it, slowly')
    shape = (sizes.N, sizes.HV, sizes.V)
    if sizes.N == 0:
        return call.mixed_qkv.new_empty(shape) if call.out is None else call.out
    taken = call._replace(A_log=_parameter(call.A_log), dt_bias=_parameter(call.dt_bias))
    dtype, g_dtype = _DTYPES[call.mixed_qkv.dtype], _DTYPES[call.g.dtype]
    gate: Literal["safe", "softplus"] = "softplus" if call.lower_bound is None else "safe"
    conv, norm = call.conv_weight is not None, call.norm_weight is not None
    kernel = jit.load(KdaFusedDecodeConfig(g_dtype, gate, conv, norm, dtype))
    prepared = kernel, call.mixed_qkv.get_device(), shape, numbers(taken, sizes)
    if taken.A_log is call.A_log and taken.dt_bias is call.dt_bias and (key := _key(given, num_heads)) is not None:
        if len(known) >= KNOWN_MAX:
            known.clear()
        known[key] = prepared
    return _launch(taken, *prepared)


def numbers(call: FusedCall, sizes: FusedSizes) -> tuple[Any, ...]:
    """The kernel's Numbers, in their order."""
    state, kept, P = call.initial_state, call.conv_state, call.initial_state.shape[0]
    strides, slots = [0, 0, 0], 0
    if kept is not None:
        order = (0, 1, 2) if kept.shape[2] == WIDTH - 1 else (0, 2, 1)
        strides, slots = [kept.stride(i) * kept.itemsize for i in order], kept.shape[0]
    flags = (
        L2NORM * bool(call.use_qk_l2norm_in_kernel)
        | BETA_SIGMOID
        | BETA_BF16 * (call.beta.dtype is torch.bfloat16)
        | BETA_FP16 * (call.beta.dtype is torch.float16)
        | STATE_DTYPES.index(_DTYPES[state.dtype]) << INITIAL
        | CONV_FP32 * (call.conv_weight is not None and call.conv_weight.dtype is torch.float32)
        | NORM_FP32 * (call.norm_weight is not None and call.norm_weight.dtype is torch.float32)
        | INDEX_INT64 * (call.state_indices is not None and call.state_indices.dtype is torch.int64)
        | SWISH * (call.norm_activation != "sigmoid")
        | PDL * bool(call.use_pdl)
    )
    return (
        call.beta.data_ptr(), call.beta.stride(0), _address(call.A_log), _address(call.dt_bias), state.data_ptr(),
        state.stride(0) * state.itemsize, P, _address(call.state_indices), call.null_index, _address(call.conv_weight),
        _address(call.conv_bias), _address(kept), *strides, slots, _address(call.conv_indices),
        _address(call.norm_weight), float(call.norm_eps), sizes.HV // sizes.H, call.scale,
        float(call.lower_bound or 0.0), flags,
    )  # fmt: skip


def _launch(
    call: FusedCall, kernel: Callable[..., Any], device: int, shape: tuple[int, ...], given: tuple[Any, ...]
) -> Tensor:
    if current_device() != device:
        with torch.cuda.device(device):
            return _launch(call, kernel, device, shape, given)
    out, written = call.out, [call.initial_state]
    if out is None:
        out = torch.empty(shape, dtype=call.mixed_qkv.dtype, device=call.mixed_qkv.device)
    else:
        written.append(out)
    if call.conv_state is not None:
        written.append(call.conv_state)
    memory.increment_version(written)
    kernel(call.mixed_qkv, call.g, out if call.output_gate is None else call.output_gate, out, *given)
    return out


def _key(call: FusedCall, num_heads: int | None) -> tuple[Any, ...] | None:
    """All that decides about a call; None where more has to be looked at."""
    key: list[Any] = [num_heads]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    for x in call:
        if not isinstance(x, Tensor):
            key.append(x)
        elif type(x) not in (Tensor, torch.nn.Parameter) or grad & x.requires_grad or x.is_inference() > inference:
            return None
        elif x.is_neg() or is_of_functorch(x):  # has other numbers than its memory, or none
            return None
        else:
            key += (x.data_ptr(), x.shape, x.stride(), x.dtype)
    try:
        hash(found := tuple(key))
    except TypeError:  # a wrong argument
        return None
    return found


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _parameter(x: Tensor | None) -> Tensor | None:
    """A_log and dt_bias as the kernel takes them: fp32, contiguous."""
    return x if x is None or (x.dtype is torch.float32 and x.is_contiguous()) else x.float().contiguous()
