"""The Hopper kernels: picks the binary, packs run-time flags, launches on torch's stream."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from .. import contract, jit, memory
from ..call import Call
from ..contract import Sizes
from ..kernels.config import (
    BETA_BF16,
    BETA_FP16,
    BETA_SIGMOID,
    CHECKPOINTS,
    CU_INT64,
    FINAL,
    INITIAL,
    L2NORM,
    MAPS_BUILT,
    NEG_EIGVAL,
    STATE_DTYPES,
    STATE_V_FIRST,
    TOKEN_STATES,
    KdaBuildConfig,
    KdaDecodeConfig,
    KdaFwdConfig,
    builds_maps,
    maps_bytes,
    v_split,
    workspace_bytes,
)

OF_TORCH = False

_log = logging.getLogger("kda_cute")

# Addresses of calls that were right, after the number of their launch: as shapes and strides are the same, the same
# addresses are right again. Some 500 bytes each.
RIGHT_MAX = 8192
right: set[tuple[int, ...]] = set()
_launches = itertools.count()

# Not torch.cuda's, which first sees to it that CUDA is there, as q's is.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # torch.cuda's makes an object

_DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@functools.cache
def sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Where blocks hand states on: by device and size, those that calls on the default stream keep, as kernels clear the
# flags that they set. While one call has it no other finds it, because host threads may interleave their launches;
# whoever takes it next launches behind them all. On other streams memory may come from the pool of a CUDA graph, which
# must not outlive the call.
kept_workspaces: dict[tuple[int, int], list[Tensor]] = {}


def why_not(call: Call, sizes: Sizes) -> str | None:
    return contract.not_served(sizes.K, sizes.V, call.q, call.g, call.beta)


def run(call: Call, sizes: Sizes) -> tuple[Tensor, Tensor | None, Any]:
    B, T, _, HV, K, V, N = sizes
    given, initial_state, final_state = call, call.initial_state, call.final_state
    if final_state is None and call.output_final_state:
        shape = contract.state_shape(N, HV, K, V, call.state_v_first)
        final_state = torch.empty(shape, dtype=torch.float32, device=call.q.device)
    o = torch.empty((B, T, HV, V), dtype=call.q.dtype, device=call.q.device) if call.out is None else call.out
    if T == 0 or N == 0:
        in_place = call.final_state is initial_state
        o.zero_()
        if call.state_indices is None and final_state is not None:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        if N == 0 or call.state_indices is None or in_place:
            return o, final_state, None
        # that kernel takes no tokens too, and carries states from pool to pool
        call = call._replace(recurrent=True, token_states=None, checkpoints=None)

    launch = prepare(call._replace(final_state=final_state), sizes)
    memory.increment_version([x for x in (given.out, given.final_state, given.token_states) if x is not None])
    taken = call._replace(
        q=_by_tma("q", call.q), k=_by_tma("k", call.k), v=_by_tma("v", call.v), g=_by_tma("g", call.g),
        beta=_contiguous("beta", call.beta), A_log=_parameter(call.A_log), dt_bias=_parameter(call.dt_bias),
        initial_state=_aligned("initial_state", _contiguous("initial_state", initial_state)),
        cu_seqlens=_contiguous("cu_seqlens", call.cu_seqlens),
        state_indices=_contiguous("state_indices", call.state_indices),
    )  # fmt: skip
    o_taken, final_taken = _by_tma("out", o), _aligned("final_state", final_state)
    if not launch(taken, o_taken, final_taken, checked=True):
        raise AssertionError("the kernel refuses what was copied for it")
    copied = any(x is not y for x, y in zip(call, taken, strict=True))
    if o_taken is not o:
        copied = True
        o.copy_(o_taken)
    if final_state is not None and final_taken is not None and final_taken is not final_state:
        copied = True
        final_state.copy_(final_taken)
    return o, final_state, None if copied or call is not given else launch


def prepare(call: Call, sizes: Sizes) -> Any:
    """The launch for all calls with the shapes, dtypes, device and flags of this one, which is validated and not empty.

    launch(call, o, final_state) writes o, final_state, token_states and checkpoints; call: the fields of a Call. It
    returns False and launches nothing if an address is not a multiple of 16 bytes, and raises an error if a tensor has
    no memory, or what it writes shares some with another tensor.
    """
    B, T, _, H, K, V, n = sizes
    device = call.q.get_device()
    sms, recurrent, packed = sm_count(device), call.recurrent, call.cu_seqlens is not None
    dtype, g_dtype = _DTYPES[call.q.dtype], _DTYPES[call.g.dtype]
    gate: Literal["safe", "softplus", "log"] = "log"
    if call.use_gate_in_kernel:
        gate = "softplus" if call.lower_bound is None else "safe"
    build, room, every = None, 0, 0
    flags = (
        L2NORM * bool(call.use_qk_l2norm_in_kernel)
        | BETA_SIGMOID * bool(call.use_beta_sigmoid_in_kernel)
        | NEG_EIGVAL * bool(call.allow_neg_eigval)
        | BETA_BF16 * _is(call.beta, torch.bfloat16)
        | BETA_FP16 * _is(call.beta, torch.float16)
        | STATE_V_FIRST * bool(call.state_v_first)
        | _dtype_of(call.initial_state) << INITIAL
        | _dtype_of(call.final_state) << FINAL
        | CU_INT64 * _is(call.cu_seqlens, torch.int64)
    )
    if recurrent:
        kernel = jit.load(KdaDecodeConfig(g_dtype, gate, bool(call.state_v_first), dtype, K, V))
        flags |= _dtype_of(call.token_states) << TOKEN_STATES
    else:
        split = v_split(B * T, n, H, sms) if V == 128 else 1
        longest, neg_eigval = B * T if packed else T, bool(call.allow_neg_eigval)
        room = workspace_bytes(longest, n, H, packed, split, sms)
        if room and K == V == 128 and builds_maps(longest, H, n, packed, split, sms):
            build = jit.load(KdaBuildConfig(g_dtype, gate, neg_eigval, dtype))
            room += maps_bytes(sms)
            flags |= MAPS_BUILT
        kernel = jit.load(KdaFwdConfig(g_dtype, gate, split, neg_eigval, dtype, K, V, call.checkpoints is not None))
        if call.checkpoints is not None:
            flags |= _dtype_of(call.checkpoints.states) << CHECKPOINTS
            every = call.checkpoints.every
    kept, place = kept_workspaces.setdefault((device, room), []) if room else [], torch.device("cuda", device)
    items, workers = n * H, sms if recurrent else sms // split
    pool = n if call.initial_state is None else call.initial_state.shape[0]
    scale, bound = call.scale, float(call.lower_bound or 0.0)
    number = next(_launches)

    def launch(call: tuple[Any, ...], o: Tensor, final_state: Tensor | None, checked: bool = False) -> bool:
        if current_device() != device:
            with torch.cuda.device(device):
                return launch(call, o, final_state, checked)
        (
            q, k, v, g, beta, _, initial_state, _, _, _, _, _, _, _, _, cu_seqlens, A_log, dt_bias, state_indices, _, _,
            _, token_states, checkpoints, _,
        ) = call  # fmt: skip
        initial = 0 if initial_state is None else initial_state.data_ptr()
        final = 0 if final_state is None else final_state.data_ptr()
        a_log = 0 if A_log is None else A_log.data_ptr()
        bias = 0 if dt_bias is None else dt_bias.data_ptr()
        cuts = 0 if cu_seqlens is None else cu_seqlens.data_ptr()
        indices = 0 if state_indices is None else state_indices.data_ptr()
        states = 0 if token_states is None else token_states.data_ptr()
        betas = beta.data_ptr()
        addresses = (
            number, q.data_ptr(), k.data_ptr(), v.data_ptr(), g.data_ptr(), o.data_ptr(), betas, a_log, bias, initial,
            final, cuts, indices, states,
        )  # fmt: skip
        if addresses not in right:
            by_vector = q.data_ptr() | k.data_ptr() | v.data_ptr() | g.data_ptr() | o.data_ptr()
            if (by_vector | a_log | bias | initial | final) % 16:
                return False
            if not checked:
                memory.check_memory({
                    "q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state, "A_log": A_log,
                    "dt_bias": dt_bias, "cu_seqlens": cu_seqlens, "state_indices": state_indices, "out": o,
                    "final_state": final_state, "token_states": token_states,
                })  # fmt: skip
            if len(right) >= RIGHT_MAX:
                right.clear()
            right.add(addresses)
        if recurrent:
            kernel(
                q, k, v, g, o, betas, a_log, bias, initial, final, indices, pool, states, cuts, n, scale, bound, flags
            )  # fmt: skip
            return True
        first = 0
        if checkpoints is not None:
            states, first = checkpoints.states.data_ptr(), checkpoints.first.data_ptr()
        handed, workspace = 0, None
        if room:
            on_default = current_stream(device) == 0  # never while capturing
            try:
                workspace = kept.pop() if on_default else torch.empty(room, dtype=torch.uint8, device=place)
            except IndexError:
                workspace = torch.zeros(room, dtype=torch.uint8, device=place)
            handed = workspace.data_ptr()
        if build is not None:
            build(k, v, g, betas, a_log, bias, initial, indices, cuts, handed, pool, items, sms, bound, flags)
        kernel(
            q, k, v, g, o, betas, a_log, bias, initial, final, indices, pool, states, first, every, cuts, handed, items,
            workers, scale, bound, flags,
        )  # fmt: skip
        if workspace is not None and on_default:
            kept.append(workspace)
        return True

    return launch


def _dtype_of(states: Tensor | None) -> int:
    """What the kernels call it: its place among STATE_DTYPES."""
    return 0 if states is None else STATE_DTYPES.index(_DTYPES[states.dtype])


def _is(x: Tensor | None, dtype: torch.dtype) -> bool:
    return x is not None and x.dtype is dtype


# ---- what the kernels can address


def _by_tma(name: str, x: Tensor) -> Tensor:
    """x [B, T, HV, D], or a copy that a TMA descriptor can describe.

    16 bytes are the unit the hardware demands for strides and the address. An expanded dimension (stride 0) goes the
    slow way too.
    """
    s0, s1, s2, s3 = x.stride()
    quantum = 16 // x.element_size()
    if s3 == 1 and s0 > 0 and s1 > 0 and s2 > 0 and not (s0 | s1 | s2) % quantum and not x.data_ptr() % 16:
        return x
    return _copied(name, x)


def _contiguous(name: str, x: Any) -> Any:
    return x if x is None or x.is_contiguous() else _copied(name, x)


def _aligned(name: str, x: Any) -> Any:
    return x if x is None or not x.data_ptr() % 16 else _copied(name, x)


def _parameter(x: Tensor | None) -> Tensor | None:
    """A_log and dt_bias as the kernel takes them, by address: fp32, contiguous, at a multiple of 16 bytes."""
    if x is None:
        return None
    x = x.float().contiguous()
    return x.clone() if x.data_ptr() % 16 else x


copies_logged: set[str] = set()


def _copied(name: str, x: Tensor) -> Tensor:
    if name not in copies_logged:
        copies_logged.add(name)
        _log.warning(
            "%s with strides %s is copied in every such call (said once): without a copy its last dimension must be "
            "contiguous, its other strides and its address multiples of 16 bytes",
            name,
            x.stride(),
        )
    # Not x.contiguous(): that returns x itself if only its address, or the stride of a dimension of 1, is at fault.
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
