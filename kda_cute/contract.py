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
        if not isinstance(state_indices, Tensor):
            _not_tensor(state_indices=state_indices)
        if state_indices.dtype is not torch.int32:
            _bad_dtype("state_indices", state_indices.dtype, (torch.int32,))
        if state_indices.shape != (N,):
            _bad_shape("state_indices", state_indices.shape, f"[{N}], [N]")
        if state_indices.device != device:
            _bad_device(device, state_indices=state_indices)
        if initial_state is None:
            raise ValueError("initial_state is None: must be the pool of states that state_indices are of")
        if isinstance(initial_state, Tensor) and initial_state.dim():
            states = initial_state.shape[0]
    if initial_state is not None:
        _check_state("initial_state", initial_state, dtype, device, states, HV, K, V, state_v_first)
    if final_state is not None:
        _check_state("final_state", final_state, dtype, device, states, HV, K, V, state_v_first)
        if not final_state.is_contiguous():
            name = "initial_state, updated in place," if final_state is initial_state else "final_state"
            raise ValueError(f"{name} has strides {final_state.stride()}: must be contiguous")
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


def check_token_states(x: torch.Tensor, q: torch.Tensor, sizes: Sizes, state_v_first: bool) -> None:
    B, T, _, HV, K, V, _ = sizes
    if not isinstance(x, torch.Tensor):
        _not_tensor(token_states=x)
    if x.dtype not in _STATE and not (x.dtype is q.dtype is torch.float64):
        _bad_dtype("token_states", x.dtype, _STATE, "or float64 with float64 inputs")
    wanted = [B, T, *state_shape(B, HV, K, V, state_v_first)[1:]]
    if list(x.shape) != wanted:
        _bad_shape("token_states", x.shape, f"{wanted}, {'[B, T, HV, V, K]' if state_v_first else '[B, T, HV, K, V]'}")
    if x.device != q.device:
        _bad_device(q.device, token_states=x)
    if not x.is_contiguous() or (x.is_cuda and x.data_ptr() % 16):
        raise ValueError(
            f"token_states has strides {x.stride()}: must be contiguous, on an address that is a multiple of 16"
        )


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
    """Those of cu_seqlens and state_indices, and with KDA_CUTE_CHECK those of g under safe_gate."""
    tokens = sizes.T if call.cu_seqlens is None else check_cu_seqlens(call.cu_seqlens, sizes.T)
    if CHECK_VALUES and call.safe_gate and not call.use_gate_in_kernel:
        check_log_decay(call.g, tokens)
    if call.state_indices is not None and call.initial_state is not None:
        check_state_indices(call.state_indices, call.initial_state.shape[0])


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


def check_state_indices(state_indices: torch.Tensor, P: int) -> None:
    """Values: below the number of states in the pool, negative for none, no state twice."""
    if state_indices.is_meta:
        return
    seen: dict[int, int] = {}
    for n, i in enumerate(state_indices.tolist()):
        if i >= P:
            raise ValueError(f"state_indices[{n}] is {i}: must be below P = {P}, or negative for no state")
        if i >= 0 and i in seen:
            raise ValueError(f"state_indices[{n}] is {i}: must not be that of state_indices[{seen[i]}] too")
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
