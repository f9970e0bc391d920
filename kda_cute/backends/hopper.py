"""The Hopper kernels: picks the binary, packs run-time flags, launches on torch's stream."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from .. import contract, jit, memory
from ..call import WRITTEN, Call
from ..contract import Sizes
from ..kernels.config import (
    BETA_BF16,
    BETA_FP16,
    BETA_SIGMOID,
    CHECKPOINTS,
    CU_INT64,
    FINAL,
    INDEX_INT64,
    INITIAL,
    KEPT_INT64,
    L2NORM,
    MAPS_BUILT,
    NEG_EIGVAL,
    NULL_ZERO,
    OFFSET_INT64,
    STATE_BYTES,
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
    if call.state_indices is not None:
        for name, pool in (("initial_state", initial_state), ("final_state", final_state)):
            if pool is not None and pool.data_ptr() % 16:
                raise ValueError(f"{name} is at address {pool.data_ptr():#x}: must be at a multiple of 16, as a pool")
    if final_state is None and call.output_final_state:
        shape = contract.state_shape(N, HV, K, V, call.state_v_first)
        final_state = torch.empty(shape, dtype=torch.float32, device=call.q.device)
    o = torch.empty((B, T, HV, V), dtype=call.q.dtype, device=call.q.device) if call.out is None else call.out
    if T == 0 or N == 0:
        o.zero_()
        if N == 0 or final_state is None:
            return o, final_state, None
        if call.state_indices is None and call.has_initial_state is None:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
            return o, final_state, None
        # that kernel takes no tokens too, and carries states from pool to pool
        call = call._replace(
            recurrent=True, token_states=None, checkpoints=None, checkpoint_state=None, checkpoint_offsets=None,
            checkpoint_indices=None,
        )  # fmt: skip

    taken = call._replace(
        q=_by_tma("q", call.q), k=_by_tma("k", call.k), v=_by_tma("v", call.v), g=_by_tma("g", call.g),
        beta=_by_row("beta", call.beta), A_log=_parameter(call.A_log), dt_bias=_parameter(call.dt_bias),
        initial_state=_aligned("initial_state", _dense("initial_state", initial_state)),
        **{name: _contiguous(name, getattr(call, name)) for name in LISTS},
    )  # fmt: skip
    o_taken, final_taken = _by_tma("out", o), _aligned("final_state", final_state)
    strided = dict(beta=taken.beta, initial_state=taken.initial_state, final_state=final_taken)
    launch = prepare(call._replace(**strided), sizes)
    memory.increment_version([x for x in map(given._asdict().get, WRITTEN) if x is not None])
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


# What few calls have, see `launch`.
MORE = (
    "token_states", "replay", "token_state_indices", "num_accepted_tokens", "checkpoint_state", "checkpoint_offsets",
    "checkpoint_indices",
)  # fmt: skip
# Tensors that a sequence, or each of its states, has a number in.
LISTS = (
    "cu_seqlens", "state_indices", "has_initial_state", "num_accepted_tokens", "token_state_indices",
    "checkpoint_offsets", "checkpoint_indices",
)  # fmt: skip


def prepare(call: Call, sizes: Sizes) -> Any:
    """The launch for all calls with the shapes, dtypes, device and flags of this one, which is validated and not empty.

    launch(call, o, final_state) writes these and what else of the call is written; call: the fields of a Call. It
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
        | INDEX_INT64 * _is(call.state_indices, torch.int64)
        | NULL_ZERO * (call.null_index == 0)
        | OFFSET_INT64 * _is(call.num_accepted_tokens if recurrent else call.checkpoint_offsets, torch.int64)
        | KEPT_INT64 * _is(call.token_state_indices if recurrent else call.checkpoint_indices, torch.int64)
    )
    per = 0
    if recurrent:
        indices, rows = call.state_indices, call.token_states if call.replay is None else call.replay
        per = indices.shape[1] if indices is not None and indices.dim() == 2 else 0
        by_token = per > 0 or call.token_state_indices is not None or call.replay is not None
        kernel = jit.load(KdaDecodeConfig(g_dtype, gate, bool(call.state_v_first), dtype, K, V, by_token))
        flags |= _dtype_of(call.token_states) << TOKEN_STATES
        row_count, row_tokens = (0, per) if rows is None else rows.shape[:2]
        row_pitch = _pitch(call.token_states)
    else:
        split = v_split(B * T, n, H, sms) if V == 128 and not call.batch_invariant else 1
        longest, neg_eigval = B * T if packed else T, bool(call.allow_neg_eigval)
        room = workspace_bytes(longest, n, H, packed, split, sms)
        maps = K == V == 128 and not call.batch_invariant
        if room and maps and builds_maps(longest, H, n, packed, split, sms):
            build = jit.load(KdaBuildConfig(g_dtype, gate, neg_eigval, dtype))
            room += maps_bytes(sms)
            flags |= MAPS_BUILT
        keeps: Literal["", "every", "offsets"] = "" if call.checkpoints is None else "every"
        kept_states = None if call.checkpoints is None else call.checkpoints.states
        if call.checkpoint_offsets is not None:
            keeps, kept_states = "offsets", call.checkpoint_state
            per = call.checkpoint_offsets.shape[1] if call.checkpoint_offsets.dim() == 2 else 1
        kernel = jit.load(KdaFwdConfig(g_dtype, gate, split, neg_eigval, dtype, K, V, keeps))
        if kept_states is not None:
            flags |= _dtype_of(kept_states) << CHECKPOINTS
            every = 0 if call.checkpoints is None else call.checkpoints.every
            kept_pitch, kept_rows = _pitch(kept_states), kept_states.shape[0]
            if kept_states.dim() == 5:
                kept_pitch, kept_rows = kept_pitch // per, kept_rows * per
            # A sequence has one offset in the middle of a chunk at a time, which takes a state of each block.
            scratch_bytes = sms * 2 * STATE_BYTES
    kept, place = kept_workspaces.setdefault((device, room), []) if room else [], torch.device("cuda", device)
    items, workers = n * H, sms if recurrent else sms // split
    pool = n if call.initial_state is None else call.initial_state.shape[0]
    beta_batch, beta_row = call.beta.stride()[:2]
    pitch, final_pitch = _pitch(call.initial_state), _pitch(call.final_state)
    scale, bound = call.scale, float(call.lower_bound or 0.0)
    plain = call.checkpoints is None and all(getattr(call, name) is None for name in MORE)
    number = next(_launches)

    def launch(call: tuple[Any, ...], o: Tensor, final_state: Tensor | None, checked: bool = False) -> bool:
        if current_device() != device:
            with torch.cuda.device(device):
                return launch(call, o, final_state, checked)
        (
            q, k, v, g, beta, _, initial_state, _, _, _, _, _, _, _, _, cu_seqlens, A_log, dt_bias, state_indices, _,
            has_initial_state, _, _, _, _, token_states, replay, token_state_indices, num_accepted_tokens,
            checkpoint_state, checkpoint_offsets, checkpoint_indices, checkpoints, _,
        ) = call  # fmt: skip
        initial = 0 if initial_state is None else initial_state.data_ptr()
        final = 0 if final_state is None else final_state.data_ptr()
        a_log = 0 if A_log is None else A_log.data_ptr()
        bias = 0 if dt_bias is None else dt_bias.data_ptr()
        cuts = 0 if cu_seqlens is None else cu_seqlens.data_ptr()
        indices = 0 if state_indices is None else state_indices.data_ptr()
        has = 0 if has_initial_state is None else has_initial_state.data_ptr()
        betas = beta.data_ptr()
        more: tuple[int, ...] = ()
        if not plain:
            given = (
                token_states, replay, token_state_indices, num_accepted_tokens, checkpoint_state, checkpoint_offsets,
                checkpoint_indices,
            )  # fmt: skip
            more = tuple([0 if x is None else x.data_ptr() for x in given])
        addresses = (
            number, q.data_ptr(), k.data_ptr(), v.data_ptr(), g.data_ptr(), o.data_ptr(), betas, a_log, bias, initial,
            final, cuts, indices, has, *more,
        )  # fmt: skip
        if addresses not in right:
            by_vector = q.data_ptr() | k.data_ptr() | v.data_ptr() | g.data_ptr() | o.data_ptr()
            if (by_vector | a_log | bias | initial | final) % 16 or any(x % 16 for x in more[:2] + more[4:5]):
                return False
            if not checked:
                memory.check_memory({
                    "q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state, "A_log": A_log,
                    "dt_bias": dt_bias, "cu_seqlens": cu_seqlens, "state_indices": state_indices, "out": o,
                    "has_initial_state": has_initial_state, "final_state": final_state, "token_states": token_states,
                    "replay": replay, "token_state_indices": token_state_indices,
                    "num_accepted_tokens": num_accepted_tokens, "checkpoint_state": checkpoint_state,
                    "checkpoint_offsets": checkpoint_offsets, "checkpoint_indices": checkpoint_indices,
                })  # fmt: skip
            if len(right) >= RIGHT_MAX:
                right.clear()
            right.add(addresses)
        if recurrent:
            states = more[0] if more else 0
            if by_token:
                states, records, token_indices, accepted = more[:4] if more else (0, 0, 0, 0)
                more = per, accepted, token_indices, row_count, row_tokens, row_pitch, records
            else:
                more = ()
            kernel(
                q, k, v, g, o, betas, beta_batch, beta_row, a_log, bias, initial, pitch, final, final_pitch, indices,
                pool, has, states, cuts, n, scale, bound, flags, *more,
            )  # fmt: skip
            return True
        if more:
            states, offsets, kept_indices, first, scratch = *more[4:], 0, None
            if checkpoints is None:
                scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=place)
            else:
                states, first = checkpoints.states.data_ptr(), checkpoints.first.data_ptr()
            more = (
                states, kept_pitch, kept_rows, every, first, offsets, per, kept_indices,
                0 if scratch is None else scratch.data_ptr(),
            )  # fmt: skip
        handed, workspace = 0, None
        if room:
            on_default = current_stream(device) == 0  # never while capturing
            try:
                workspace = kept.pop() if on_default else torch.empty(room, dtype=torch.uint8, device=place)
            except IndexError:
                workspace = torch.zeros(room, dtype=torch.uint8, device=place)
            handed = workspace.data_ptr()
        if build is not None:
            build(
                k, v, g, betas, beta_batch, beta_row, a_log, bias, initial, pitch, indices, pool, has, cuts, handed,
                items, sms, bound, flags,
            )  # fmt: skip
        kernel(
            q, k, v, g, o, betas, beta_batch, beta_row, a_log, bias, initial, pitch, final, final_pitch, indices, pool,
            has, cuts, handed, items, workers, scale, bound, flags, *more,
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


def _pitch(states: Tensor | None) -> int:
    """Bytes from one state of all heads to the next."""
    return 0 if states is None else states.stride(0) * states.element_size()


def _dense(name: str, x: Any) -> Any:
    """States, each of them contiguous, on multiples of 16 bytes."""
    if x is None or x.is_contiguous():
        return x
    if contract.is_dense(x) and (x.shape[0] == 1 or not _pitch(x) % 16):
        return x
    return _copied(name, x)


def _by_row(name: str, x: Tensor) -> Tensor:
    """beta [B, T, HV] with a dense last dimension."""
    return x if x.is_contiguous() or (x.stride(2) == 1 and 0 <= x.stride(1) < 1 << 31) else _copied(name, x)


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
