"""What a call may be: every argument is checked here, once, before anything is allocated or launched.

Every error names the argument, says what it was and what it must be. The checks look at attributes alone and never at
values, which on a GPU would need a synchronisation, except where `check_cu_seqlens` and `check_log_decay` are asked to.

TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape, device or combination. NotImplementedError: a
valid call that is not served.
"""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch

from .call import Call
from .environment import switch

LOWER_BOUND_MIN = -5.0  # 16 tokens of -5 nats stay inside fp32's and bf16's exponent range, see kernels/
HEAD_DIMS = (64, 128)  # K and V that the GPU kernel has

_FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
_STATE = frozenset((torch.bfloat16, torch.float32))
_INDEX = frozenset((torch.int32, torch.int64))


# KDA_CUTE_CHECK=1: pay for a synchronisation a call and have values checked too. Read once: a look-up costs 0.7 us.
CHECK_VALUES = switch("KDA_CUTE_CHECK", False)


class Sizes(NamedTuple):
    B: int
    T: int
    H: int  # of q and k
    HV: int  # of v, g and beta
    K: int
    V: int
    N: int  # sequences, B without cu_seqlens


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    safe_gate: bool,
    lower_bound: float | None,
    state_v_first: bool,
    cu_seqlens: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    out: torch.Tensor | None,
    final_state: torch.Tensor | None,
    state_indices: torch.Tensor | None = None,
    null_index: int | None = None,
    has_initial_state: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    recurrent: bool | None = None,
) -> Sizes:
    """The contract of `chunk_kda` on every backend."""
    Tensor = torch.Tensor
    if not (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and isinstance(g, Tensor)
        and isinstance(beta, Tensor)
    ):
        _not_tensor(q=q, k=k, v=v, g=g, beta=beta)

    dtype = q.dtype
    if dtype not in _FLOATS:
        _bad_dtype("q", dtype, _FLOATS)
    if k.dtype is not dtype:
        _bad_dtype("k", k.dtype, (dtype,), "like q")
    if v.dtype is not dtype:
        _bad_dtype("v", v.dtype, (dtype,), "like q")
    if g.dtype is not dtype and g.dtype not in _FLOATS:
        _bad_dtype("g", g.dtype, _FLOATS)
    if beta.dtype is not dtype and beta.dtype not in _FLOATS:
        _bad_dtype("beta", beta.dtype, _FLOATS)

    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 4:
        _bad_shape("q", q_shape, "[B, T, H, K]")
    if len(v_shape) != 4:
        _bad_shape("v", v_shape, "[B, T, HV, V]")
    B, T, H, K = q_shape
    B_v, T_v, HV, V = v_shape
    if H < 1 or K < 1:
        _bad_shape("q", q_shape, "[B, T, H, K] with H and K of at least 1")
    if k.shape != q_shape:
        _bad_shape("k", k.shape, f"{[B, T, H, K]}, [B, T, H, K] like q")
    if B_v != B or T_v != T or V < 1:
        _bad_shape("v", v_shape, f"[B, T, HV, V] with B = {B} and T = {T} like q and V of at least 1")
    if HV % H or HV < 1:
        _bad_shape("v", v_shape, f"[B, T, HV, V] with HV a multiple of q's H = {H}")
    if g.shape != (B, T, HV, K):
        _bad_shape("g", g.shape, f"{[B, T, HV, K]}, [B, T, HV, K]")
    if beta.shape != (B, T, HV):
        _bad_shape("beta", beta.shape, f"{[B, T, HV]}, [B, T, HV]")

    device = q.device
    if k.device != device or v.device != device or g.device != device or beta.device != device:
        _bad_device(device, k=k, v=v, g=g, beta=beta)

    if lower_bound is not None:
        check_number("lower_bound", lower_bound)
        # While a call is compiled a number may be one of a graph, which has no value yet.
        if not isinstance(lower_bound, torch.SymFloat) and not LOWER_BOUND_MIN <= lower_bound < 0:
            raise ValueError(f"lower_bound is {lower_bound}: must be in [-5, 0), or None")
    if use_gate_in_kernel:
        if lower_bound is None:
            if safe_gate:
                raise ValueError(
                    "lower_bound is None: must be in [-5, 0) when safe_gate=True and use_gate_in_kernel=True"
                )
            if A_log is None:
                raise ValueError(
                    "A_log is None: must be a tensor of shape [HV] when use_gate_in_kernel=True without lower_bound"
                )
        if A_log is not None:
            _check_parameter("A_log", A_log, device, ((HV,), (1, 1, HV, 1)), "[HV]")
        if dt_bias is not None:
            _check_parameter("dt_bias", dt_bias, device, ((HV * K,), (HV, K)), "[HV * K] or [HV, K]")
    elif A_log is not None or dt_bias is not None:
        name = "dt_bias" if A_log is None else "A_log"
        raise ValueError(f"{name} is given: must be None unless use_gate_in_kernel=True, because g is the log decay")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval is True: must be False unless use_beta_sigmoid_in_kernel=True")

    N = B
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor):
            _not_tensor(cu_seqlens=cu_seqlens)
        if cu_seqlens.dtype not in _INDEX:
            _bad_dtype("cu_seqlens", cu_seqlens.dtype, _INDEX)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            _bad_shape("cu_seqlens", cu_seqlens.shape, "[N + 1]")
        if cu_seqlens.device != device:
            _bad_device(device, cu_seqlens=cu_seqlens)
        if B != 1:
            raise ValueError(f"q has B = {B}: must be 1 with cu_seqlens, all sequences packed along T")
        N = cu_seqlens.numel() - 1

    states = N
    if state_indices is not None:
        allowed: tuple[tuple[int, ...], ...] = ((N,),)
        form = f"[{N}], [N]"
        if recurrent and isinstance(state_indices, Tensor) and state_indices.dim() == 2 and state_indices.shape[1] > 0:
            allowed, form = ((N, state_indices.shape[1]),), f"[{N}], [N], or [{N}, S], [N, S]"
        _check_indices("state_indices", state_indices, device, allowed, form)
        if initial_state is None:
            raise ValueError("initial_state is None: must be the pool of states that state_indices are of")
        if isinstance(initial_state, Tensor) and initial_state.dim():
            states = initial_state.shape[0]
    if null_index is not None and not (type(null_index) is int and -1 <= null_index <= 0):
        raise ValueError(f"null_index is {null_index!r}: must be -1 or 0, the largest index that is null")
    if initial_state is not None:
        _check_state("initial_state", initial_state, dtype, device, states, HV, K, V, state_v_first)
        if state_indices is not None and final_state is not initial_state:
            _check_slots("initial_state", initial_state)
    if final_state is not None:
        _check_state("final_state", final_state, dtype, device, states, HV, K, V, state_v_first)
        in_place = final_state is initial_state
        _check_slots("initial_state, updated in place," if in_place else "final_state", final_state)
    if has_initial_state is not None:
        if initial_state is None:
            raise ValueError("initial_state is None: must be given with has_initial_state")
        if not isinstance(has_initial_state, Tensor):
            _not_tensor(has_initial_state=has_initial_state)
        if has_initial_state.dtype is not torch.bool:
            _bad_dtype("has_initial_state", has_initial_state.dtype, (torch.bool,))
        if has_initial_state.shape != (N,):
            _bad_shape("has_initial_state", has_initial_state.shape, f"[{N}], [N]")
        if has_initial_state.device != device:
            _bad_device(device, has_initial_state=has_initial_state)
    if num_accepted_tokens is not None:
        _check_indices("num_accepted_tokens", num_accepted_tokens, device, ((N,),), f"[{N}], [N]")
    if out is not None:
        if not isinstance(out, Tensor):
            _not_tensor(out=out)
        if out.dtype != dtype:
            _bad_dtype("out", out.dtype, (dtype,), "like q")
        if out.shape != v_shape:
            _bad_shape("out", out.shape, f"{list(v_shape)}, [B, T, HV, V] like v")
        if out.device != device:
            _bad_device(device, out=out)
    return Sizes(B, T, H, HV, K, V, N)


def check_named(call: Mapping[str, Any]) -> Sizes:
    """`check_call` of arguments by their names; what is missing is None, or False."""
    arguments: list[Any] = [call.get(name) for name in _CHECKED]
    return check_call(*arguments)


_CHECKED = tuple(inspect.signature(check_call).parameters)


def state_shape(N: int, HV: int, K: int, V: int, state_v_first: bool) -> tuple[int, int, int, int]:
    return (N, HV, V, K) if state_v_first else (N, HV, K, V)


def state_dtype(v: torch.Tensor) -> torch.dtype:
    """Of states that are made."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


VALUE_ROWS = 32  # of a record of `replay`, which the kernel's blocks have


def replay_shape(rows: int, tokens: int, HV: int, K: int, V: int) -> tuple[int, int, int, int, int]:
    """The shape of `fused_recurrent_kda`'s replay, for so many sequences and tokens of each: [R, S, HV, V / 32,
    2 K + 32]. With K = V = 128 it is 4.5 KiB a token and head, a state is 64."""
    return rows, tokens, HV, V // VALUE_ROWS, 2 * K + VALUE_ROWS


def check_by_token(call: Call, sizes: Sizes) -> None:
    """token_states, token_state_indices, num_accepted_tokens and replay of `fused_recurrent_kda`."""
    B, T, _, HV, K, V, N = sizes
    q, states, replay, rows = call.q, call.token_states, call.replay, call.token_state_indices
    per_token = call.state_indices is not None and call.state_indices.dim() == 2
    if call.num_accepted_tokens is not None and not per_token and replay is None:
        raise ValueError("num_accepted_tokens is given: must be None without state_indices [N, S] or replay")
    if rows is not None:
        _check_indices("token_state_indices", rows, q.device, ((N,),), f"[{N}], [N]")
        if states is None and replay is None:
            raise ValueError("token_state_indices is given: must be None without token_states or replay")
    if states is not None:
        if not isinstance(states, torch.Tensor):
            _not_tensor(token_states=states)
        if states.dtype not in _STATE and not (states.dtype is q.dtype is torch.float64):
            _bad_dtype("token_states", states.dtype, _STATE, "or float64 with float64 inputs")
        state = state_shape(B, HV, K, V, call.state_v_first)[1:]
        form = "HV, V, K]" if call.state_v_first else "HV, K, V]"
        if rows is None and states.shape != (B, T, *state):
            _bad_shape("token_states", states.shape, f"{[B, T, *state]}, [B, T, {form}")
        if rows is not None and (states.dim() != 5 or states.shape[2:] != state):
            _bad_shape("token_states", states.shape, f"[R, S, {', '.join(map(str, state))}], [R, S, {form}")
        if states.device != q.device:
            _bad_device(q.device, token_states=states)
        dense = states.is_contiguous() if rows is None else is_dense(states)
        if not dense or not _on_16_bytes(states):
            raise ValueError(
                f"token_states has strides {states.stride()}: must be contiguous, on an address that is a multiple of "
                "16"
            )
    if replay is not None:
        if not isinstance(replay, torch.Tensor):
            _not_tensor(replay=replay)
        if replay.dtype is not torch.float32:
            _bad_dtype("replay", replay.dtype, (torch.float32,))
        shape = replay_shape(N, T, HV, K, V)
        if replay.dim() != 5 or replay.shape[2:] != shape[2:] or (rows is None and replay.shape[0] < N):
            _bad_shape("replay", replay.shape, f"[R, S, {', '.join(map(str, shape[2:]))}] with R of at least {N}")
        if replay.device != q.device:
            _bad_device(q.device, replay=replay)
        if not replay.is_contiguous() or not _on_16_bytes(replay):
            raise ValueError(
                f"replay has strides {replay.stride()}: must be contiguous, on an address that is a multiple of 16"
            )
        if per_token:
            raise ValueError(f"state_indices has shape {list(call.state_indices.shape)}: must be [N] with replay")  # type: ignore[union-attr]
        if call.initial_state is None:
            raise ValueError("initial_state is None: must be given with replay")
        if V % VALUE_ROWS:
            raise ValueError(f"v has V = {V}: must be a multiple of {VALUE_ROWS} with replay")
        if states is not None and rows is not None and states.shape[1] != replay.shape[1]:
            raise ValueError(
                f"replay has room for {replay.shape[1]} tokens: must be {states.shape[1]} as token_states has"
            )


def check_checkpoints(call: Call, sizes: Sizes) -> None:
    """checkpoint_state, checkpoint_offsets and checkpoint_indices of `chunk_kda`."""
    _, _, _, HV, K, V, N = sizes
    states, offsets, indices = call.checkpoint_state, call.checkpoint_offsets, call.checkpoint_indices
    if offsets is None:
        name = "checkpoint_state" if indices is None else "checkpoint_indices"
        raise ValueError(f"{name} is given: must be None without checkpoint_offsets")
    if states is None:
        raise ValueError("checkpoint_state is None: must be a tensor with checkpoint_offsets")
    many = isinstance(offsets, torch.Tensor) and offsets.dim() == 2
    shape = (N, offsets.shape[1]) if many else (N,)
    _check_indices("checkpoint_offsets", offsets, call.q.device, (shape,), f"[{N}], [N], or [{N}, M], [N, M]")
    rows = shape
    if indices is not None:
        _check_indices("checkpoint_indices", indices, call.q.device, (shape,), f"{list(shape)} as offsets are")
        rows = (states.shape[0] if isinstance(states, torch.Tensor) and states.dim() else 0,)
    if not isinstance(states, torch.Tensor):
        _not_tensor(checkpoint_state=states)
    if states.dtype not in _STATE and not (states.dtype is call.q.dtype is torch.float64):
        _bad_dtype("checkpoint_state", states.dtype, _STATE, "or float64 with float64 inputs")
    wanted = (*rows, *state_shape(N, HV, K, V, call.state_v_first)[1:])
    if states.shape != wanted:
        _bad_shape("checkpoint_state", states.shape, str(list(wanted)))
    if states.device != call.q.device:
        _bad_device(call.q.device, checkpoint_state=states)
    if states.dim() == 4:
        _check_slots("checkpoint_state", states)
    elif not states.is_contiguous():
        raise ValueError(f"checkpoint_state has strides {states.stride()}: must be contiguous")
    if not _on_16_bytes(states):
        raise ValueError(f"checkpoint_state is at address {states.data_ptr():#x}: must be at a multiple of 16")


def check_scale(scale: float | None, K: int) -> float:
    if scale is None:
        return K**-0.5
    check_number("scale", scale)
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: must be finite")
    return scale


def check_interval(interval: Any) -> int:
    """checkpoint_interval, any kind of integer."""
    if isinstance(interval, bool) or not hasattr(interval, "__index__") or isinstance(interval, torch.Tensor):
        raise TypeError(
            f"checkpoint_interval is a {type(interval).__name__}: must be an int, a multiple of 32, or None"
        )
    interval = operator.index(interval)
    if interval < 32 or interval % 32:
        raise ValueError(f"checkpoint_interval is {interval}: must be a multiple of 32 tokens")
    return interval


def not_served(
    K: int,
    V: int,
    q: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
) -> str | None:
    """Why the GPU kernels cannot serve a valid call, or None."""
    if K not in HEAD_DIMS:
        return f"q has K = {K}: must be 64 or 128"
    if V not in HEAD_DIMS:
        return f"v has V = {V}: must be 64 or 128"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q, k and v are {_name(q.dtype)}: must be bfloat16 or float16"
    if g.dtype == torch.float64:
        return "g is float64: must be bfloat16, float16 or float32"
    if beta.dtype == torch.float64:
        return "beta is float64: must be bfloat16, float16 or float32"
    return None


def refuse_grad(why: str, **tensors: torch.Tensor | None) -> NoReturn:
    names = [name for name, x in tensors.items() if x is not None and x.requires_grad]
    raise NotImplementedError(f"{', '.join(names)} requires grad: {why}")


def check_values(call: Call, sizes: Sizes) -> None:
    """Those of cu_seqlens and of indices, and with KDA_CUTE_CHECK those of g under safe_gate."""
    tokens = sizes.T if call.cu_seqlens is None else check_cu_seqlens(call.cu_seqlens, sizes.T)
    if CHECK_VALUES and call.safe_gate and not call.use_gate_in_kernel:
        check_log_decay(call.g, tokens)
    pool, least = call.initial_state, call.null_index + 1
    if call.state_indices is not None and pool is not None:
        once = call.final_state is not None
        check_indices("state_indices", call.state_indices, pool.shape[0], least, once)
    if call.token_state_indices is not None:
        rows = call.token_states if call.replay is None else call.replay
        assert rows is not None
        check_indices("token_state_indices", call.token_state_indices, rows.shape[0])
    if call.checkpoint_indices is not None and call.checkpoint_state is not None:
        check_indices("checkpoint_indices", call.checkpoint_indices, call.checkpoint_state.shape[0], least)


def check_cu_seqlens(cu_seqlens: torch.Tensor, T: int) -> int:
    """Values: from 0, never decreasing, to at most T. Tokens past the last belong to no sequence. Returns that last."""
    if cu_seqlens.is_meta:
        return T
    cuts = cu_seqlens.tolist()
    if cuts[0] != 0:
        raise ValueError(f"cu_seqlens[0] is {cuts[0]}: must be 0")
    for n, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        if end < begin:
            raise ValueError(f"cu_seqlens[{n + 1}] is {end}: must be at least cu_seqlens[{n}] = {begin}")
    if cuts[-1] > T:
        raise ValueError(f"cu_seqlens[{len(cuts) - 1}] is {cuts[-1]}: must be at most T = {T}")
    return cuts[-1]


def check_indices(name: str, indices: torch.Tensor, P: int, least: int = 0, once: bool = True) -> None:
    """Values: below the number of slots, below `least` for none, and if `once` no slot in two sequences."""
    if indices.is_meta:
        return
    seen: dict[int, int] = {}
    rows = indices.tolist()
    for n, row in enumerate(rows if indices.dim() == 2 else [[i] for i in rows]):
        for i in row:
            if i >= P:
                raise ValueError(f"{name}[{n}] is {i}: must be below P = {P}, the number of slots, or null")
            if once and i >= least and seen.get(i, n) != n:
                raise ValueError(f"{name}[{n}] is {i}: must not be that of {name}[{seen[i]}] too")
            seen[i] = n


def check_log_decay(g: torch.Tensor, tokens: int) -> None:
    """Values: the promise of safe_gate=True about a precomputed g, for the tokens that some sequence has."""
    g = g[:, :tokens]
    if g.is_meta:
        return
    outside = ~((g >= LOWER_BOUND_MIN) & (g <= 0))  # NaN is outside
    if g.numel() and bool(outside.any()):
        at = outside.nonzero()[0].tolist()
        raise ValueError(f"g{at} is {g[tuple(at)].item()}: must be in [-5, 0], which safe_gate=True promises")


# fla's arguments that are not in our signature: what a caller who changes the import may pass. Of no effect here: a
# trade of memory in the backward, a host copy of cu_seqlens, padding of cu_seqlens by empty sequences.
FLA_KWARGS = frozenset((
    "disable_recompute", "cu_seqlens_cpu", "use_graph", "max_num_seqs",
    "chunk_size", "return_intermediate_states", "cp_context", "transpose_state_layout",
))  # fmt: skip


def check_fla_kwargs(kwargs: dict[str, Any], state_v_first: bool, function: str = "chunk_kda") -> bool:
    """Refuse what would change the result, accept what cannot. Returns state_v_first, perhaps under its old name."""
    for name, value in kwargs.items():
        if name not in FLA_KWARGS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if name == "return_intermediate_states" and value and function != "chunk_kda":
            raise NotImplementedError(
                f"return_intermediate_states is {value}: must be False for {function}, which has output_token_states"
            )
        if name == "chunk_size" and value not in (32, 64):
            raise ValueError(f"chunk_size is {value}: must be 32 or 64 as in fla (and changes nothing here)")
        if name == "cp_context" and value is not None:
            raise NotImplementedError("cp_context is given: must be None, there is no context parallelism")
        if name == "transpose_state_layout":
            if state_v_first:
                raise ValueError("transpose_state_layout is given: must not be, together with state_v_first")
            if not torch.compiler.is_compiling():  # torch.compile can trace no warning
                warnings.warn(
                    "transpose_state_layout is deprecated, its name is state_v_first", DeprecationWarning, stacklevel=3
                )
            state_v_first = bool(value)
    return state_v_first


def check_number(name: str, x: Any) -> None:
    # A tensor has __float__ too, at the price of a synchronisation that nobody asked for.
    if type(x) is float or isinstance(x, torch.SymFloat):
        return
    convertible = torch.compiler.is_compiling() or hasattr(x, "__float__")  # which torch.compile cannot ask a number
    if isinstance(x, (torch.Tensor, str)) or not convertible:
        raise TypeError(f"{name} is a {type(x).__name__}: must be a float or None")


def _check_parameter(
    name: str, x: torch.Tensor, device: torch.device, shapes: tuple[tuple[int, ...], ...], form: str
) -> None:
    if not isinstance(x, torch.Tensor):
        _not_tensor(**{name: x})
    if x.dtype not in _FLOATS:
        _bad_dtype(name, x.dtype, _FLOATS)
    if x.shape not in shapes:
        _bad_shape(name, x.shape, f"{list(shapes[0])}, {form}")
    if x.device != device:
        _bad_device(device, **{name: x})


def _check_state(
    name: str,
    x: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    N: int,
    HV: int,
    K: int,
    V: int,
    state_v_first: bool,
) -> None:
    if not isinstance(x, torch.Tensor):
        _not_tensor(**{name: x})
    if x.dtype not in _STATE and not (x.dtype is dtype is torch.float64):
        _bad_dtype(name, x.dtype, _STATE, "or float64 with float64 inputs")
    if x.shape != state_shape(N, HV, K, V, state_v_first):
        shape, form = ([N, HV, V, K], "[N, HV, V, K]") if state_v_first else ([N, HV, K, V], "[N, HV, K, V]")
        _bad_shape(name, x.shape, f"{shape}, {form} because state_v_first={state_v_first}")
    if x.device != device:
        _bad_device(device, **{name: x})


def _check_indices(name: str, x: Any, device: torch.device, shapes: tuple[tuple[int, ...], ...], form: str) -> None:
    if not isinstance(x, torch.Tensor):
        _not_tensor(**{name: x})
    if x.dtype not in _INDEX:
        _bad_dtype(name, x.dtype, _INDEX)
    if x.shape not in shapes:
        _bad_shape(name, x.shape, form)
    if x.device != device:
        _bad_device(device, **{name: x})


def is_dense(x: torch.Tensor) -> bool:
    """Whether each x[i] is contiguous and has its own memory."""
    if x.is_contiguous():
        return True
    size = 1
    for n, step in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if n != 1 and step != size:
            return False
        size *= n
    return x.shape[0] <= 1 or x.stride(0) >= size


def _on_16_bytes(x: torch.Tensor) -> bool:
    """Whether each x[i] is on an address that is a multiple of 16 bytes, as far as that matters."""
    if not x.is_cuda or not x.numel():
        return True
    return not (x.data_ptr() % 16 or (x.shape[0] > 1 and x.stride(0) * x.element_size() % 16))


def _check_slots(name: str, x: torch.Tensor) -> None:
    """That kernels can read and write states where they are."""
    if not is_dense(x):
        raise ValueError(f"{name} has strides {x.stride()}: must be contiguous, state by state")
    if x.is_cuda and x.shape[0] > 1 and x.stride(0) * x.element_size() % 16:
        raise ValueError(f"{name} has strides {x.stride()}: must have states whose addresses are multiples of 16 bytes")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_tensor(**arguments: Any) -> NoReturn:
    for name, x in arguments.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: must be a torch.Tensor")
    raise AssertionError(arguments)


def _bad_dtype(name: str, dtype: torch.dtype, allowed: Any, why: str = "") -> NoReturn:
    must = " or ".join(sorted(map(_name, allowed)))
    raise TypeError(f"{name} is {_name(dtype)}: must be {must}{' ' if why else ''}{why}")


def _bad_shape(name: str, shape: torch.Size, must: str) -> NoReturn:
    raise ValueError(f"{name} has shape {list(shape)}: must be {must}")


def _bad_device(device: torch.device, **tensors: torch.Tensor) -> NoReturn:
    for name, x in tensors.items():
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}: must be on {device} like q")
    raise AssertionError(tensors)
