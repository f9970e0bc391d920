"""`fused_decode_kda`: one token a sequence, from what a layer's projections give to what its output projection takes.

The public function, its contract and what it computes in torch; `backends/fused_hopper.py` launches the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import contract, devices, memory
from .ops import fused_recurrent_kda

ACTIVATIONS = ("sigmoid", "swish", "silu")
WRITTEN = ("out", "initial_state", "conv_state")
WIDTH = 4  # of the convolution

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class FusedCall(NamedTuple):
    mixed_qkv: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor
    state_indices: Tensor | None
    null_index: int
    scale: float
    lower_bound: float | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    conv_state: Tensor | None
    conv_state_indices: Tensor | None
    output_gate: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    norm_activation: str
    use_qk_l2norm_in_kernel: bool
    use_pdl: bool
    out: Tensor | None

    @property
    def conv_indices(self) -> Tensor | None:
        return self.state_indices if self.conv_state_indices is None else self.conv_state_indices


class FusedSizes(NamedTuple):
    N: int
    H: int
    HV: int
    K: int
    V: int
    C: int  # columns of mixed_qkv


def fused_decode_kda(
    mixed_qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor,
    state_indices: Tensor | None = None,
    null_index: int = -1,
    num_heads: int | None = None,
    scale: float | None = None,
    lower_bound: float | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_state: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    output_gate: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_activation: str = "sigmoid",
    use_qk_l2norm_in_kernel: bool = True,
    use_pdl: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of each of N sequences, in one launch: a causal convolution and SiLU, KDA as in `fused_recurrent_kda`
    with gate and sigmoid of beta, and a gated RMSNorm. The first is left out without conv_weight, the last without
    norm_weight. States are updated in place.

    Args:
        mixed_qkv: [N, 2 H K + HV V], row-strided: q of all heads, then k, then v. HV, K and V are those of g and
            initial_state, H is what is left.
        g: [N, HV, K], what the gate makes the log decay from: safe with lower_bound, else softplus.
        beta: [N, HV], logits. g and beta may have any strides but in their last dimension.
        A_log, dt_bias, scale, lower_bound, use_qk_l2norm_in_kernel: as in `chunk_kda`.
        initial_state: a pool of states [P, HV, V, K], bf16 or fp32, each dense, with any stride(0) that is a multiple
            of 16 bytes.
        state_indices: [N], int32 or int64: the state of each sequence; sequence n has state n without. No two sequences
            may have the same one. An index up to null_index is none: the sequence's o is zero, and nothing of it is
            read or written. So is an index beyond the pool on a GPU; the reference raises ValueError.
        null_index: -1 or 0.
        num_heads: H, if it is to be checked.
        conv_weight: [2 H K + HV V, 4] or [.., 1, 4], the last column for the present token. In the dtype of mixed_qkv
            or fp32, as conv_bias [2 H K + HV V] is.
        conv_state: the last three inputs of each column, [slots, 2 H K + HV V, 3] or [slots, 3, 2 H K + HV V], with any
            strides, the oldest one first.
        conv_state_indices: as state_indices, in the same dtype; state_indices unless given.
        output_gate: [N, HV, V]: o becomes o / sqrt(mean(o^2) + norm_eps) * norm_weight * act(output_gate).
        norm_weight: [V], in the dtype of mixed_qkv or fp32.
        norm_activation: act: "sigmoid", or "swish" (or "silu").
        use_pdl: launch the kernel when the one before it on the stream lets it (programmatic dependent launch). It then
            waits for that one before it reads anything.
        out: [N, HV, V] in the dtype of mixed_qkv, dense in its last dimension.
        backend: as in `chunk_kda`. The kernel has K = V = 128, bf16 and fp16.

    Returns:
        o [N, HV, V] in the dtype of mixed_qkv, and initial_state.

    Has no gradient and is not served under torch.compile: both raise NotImplementedError.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "fused_decode_kda is not served under torch.compile: must be called outside of it, "
            "torch.compiler.disable does so for the layer around it"
        )
    call = FusedCall(
        mixed_qkv, g, beta, A_log, dt_bias, initial_state, state_indices, null_index, scale, lower_bound,  # type: ignore[arg-type]
        conv_weight, conv_bias, conv_state, conv_state_indices, output_gate, norm_weight, norm_eps, norm_activation,
        use_qk_l2norm_in_kernel, use_pdl, out,
    )  # fmt: skip
    if backend is None and not contract.CHECK_VALUES and isinstance(mixed_qkv, Tensor) and mixed_qkv.is_cuda:
        from .backends import fused_hopper

        if (o := fused_hopper.run_known(call, num_heads)) is not None:
            return o, initial_state
    given = call
    taken, ranges = memory.plain(call._asdict(), WRITTEN)
    if taken is not None:
        call = FusedCall(**taken)
    sizes = check(call, num_heads)
    call = call._replace(scale=contract.check_scale(scale, sizes.K))
    _refuse_grad(call)
    module = devices.backend_of(call.mixed_qkv, backend, "mixed_qkv")
    memory.check_written(call._asdict(), ranges, WRITTEN)
    if not module.OF_TORCH:
        from .backends import fused_hopper

        if contract.CHECK_VALUES and not torch.cuda.is_current_stream_capturing():
            check_values(call)
        return fused_hopper.run(given, call, sizes, num_heads), initial_state
    if not call.mixed_qkv.is_meta:
        check_values(call)
    return reference(call, sizes), initial_state


# ---- what a call may be


def check(call: FusedCall, num_heads: int | None = None) -> FusedSizes:
    """All but values."""
    x, g, state = call.mixed_qkv, call.g, call.initial_state
    _tensor("mixed_qkv", x, None, _FLOATS)
    _tensor("g", g, x, _FLOATS)
    _tensor("initial_state", state, x, (torch.bfloat16, torch.float32), torch.float64)
    if x.dim() != 2:
        _bad_shape("mixed_qkv", x, "[N, 2 H K + HV V]")
    N, C = x.shape
    if g.dim() != 3 or g.shape[0] != N or 0 in g.shape[1:]:
        _bad_shape("g", g, f"[N, HV, K] with N = {N} like mixed_qkv and HV and K of at least 1")
    HV, K = g.shape[1:]
    if state.dim() != 4 or state.shape[1] != HV or state.shape[3] != K or state.shape[2] < 1:
        _bad_shape("initial_state", state, f"[P, HV, V, K] with HV = {HV} and K = {K} like g and V of at least 1")
    V = state.shape[2]
    H, rest = divmod(C - HV * V, 2 * K)
    if rest or H < 1 or HV % H:
        _bad_shape("mixed_qkv", x, f"[N, 2 H K + HV V] with K = {K}, HV = {HV}, V = {V} and HV a multiple of H")
    if num_heads is not None and num_heads != H:
        raise ValueError(f"num_heads is {num_heads}: must be {H}, what the {C} columns of mixed_qkv leave for q and k")
    _tensor("beta", call.beta, x, _FLOATS, shapes=[(N, HV)], form="[N, HV]")
    for name, y in (("mixed_qkv", x), ("g", g), ("beta", call.beta)):
        _dense_rows(name, y)
    if call.lower_bound is not None:
        contract.check_number("lower_bound", call.lower_bound)
        if not contract.LOWER_BOUND_MIN <= call.lower_bound < 0:
            raise ValueError(f"lower_bound is {call.lower_bound}: must be in [-5, 0), or None")
    elif call.A_log is None:
        raise ValueError("A_log is None: must be a tensor of shape [HV] without lower_bound")
    if call.A_log is not None:
        _tensor("A_log", call.A_log, x, _FLOATS, shapes=[(HV,), (1, 1, HV, 1)], form="[HV]")
    if call.dt_bias is not None:
        _tensor("dt_bias", call.dt_bias, x, _FLOATS, shapes=[(HV * K,), (HV, K)], form="[HV * K] or [HV, K]")
    _check_state(state)
    if isinstance(call.null_index, bool) or call.null_index not in (-1, 0):
        raise ValueError(f"null_index is {call.null_index!r}: must be -1 or 0")
    _check_indices(call, N)
    _check_conv(call, C, N)
    _check_norm(call, N, HV, V)
    if call.out is not None:
        _tensor("out", call.out, x, (x.dtype,), shapes=[(N, HV, V)], form="[N, HV, V]")
        _dense_rows("out", call.out)
    return FusedSizes(N, H, HV, K, V, C)


def _check_state(state: Tensor) -> None:
    dense = state.shape[0] == 0 or state[0].is_contiguous()
    pitch = state.stride(0) * state.itemsize
    if not dense or (state.shape[0] > 1 and (pitch % 16 or pitch < state[0].nbytes)) or state.data_ptr() % 16:
        raise ValueError(
            f"initial_state has strides {state.stride()} at address {state.data_ptr():#x}: must have dense states, a "
            f"multiple of 16 bytes from one to the next, at an address that is a multiple of 16"
        )


def _check_indices(call: FusedCall, N: int) -> None:
    x, indices, P = call.mixed_qkv, call.state_indices, call.initial_state.shape[0]
    allowed = (torch.int32, torch.int64)
    if indices is not None:
        _tensor("state_indices", indices, x, allowed, shapes=[(N,)], form="[N]")
        _dense_rows("state_indices", indices)
    elif P < N:
        _bad_shape("initial_state", call.initial_state, f"[P, HV, V, K] with P of at least N = {N} without indices")
    if call.conv_state_indices is not None:
        if indices is None or call.conv_state is None:
            raise ValueError("conv_state_indices is given: must be None without state_indices and conv_state")
        _tensor("conv_state_indices", call.conv_state_indices, x, (indices.dtype,), shapes=[(N,)], form="[N]")
        _dense_rows("conv_state_indices", call.conv_state_indices)


def _check_conv(call: FusedCall, C: int, N: int) -> None:
    x, weight, bias, state = call.mixed_qkv, call.conv_weight, call.conv_bias, call.conv_state
    if weight is None:
        for name, y in (("conv_bias", bias), ("conv_state", state)):
            if y is not None:
                raise ValueError(f"{name} is given: must be None without conv_weight")
        return
    shapes = [(C, WIDTH), (C, 1, WIDTH)]
    _tensor("conv_weight", weight, x, (x.dtype, torch.float32), shapes=shapes, form="[2 H K + HV V, 4]")
    _aligned("conv_weight", weight, WIDTH * weight.itemsize)
    if bias is not None:
        _tensor("conv_bias", bias, x, (weight.dtype,), shapes=[(C,)], form="[2 H K + HV V]")
        _dense_rows("conv_bias", bias)
    if state is None:
        raise ValueError("conv_state is None: must be a tensor of shape [slots, 2 H K + HV V, 3] with conv_weight")
    _tensor("conv_state", state, x, (x.dtype,))
    if state.dim() != 3 or state.shape[1:] not in ((C, WIDTH - 1), (WIDTH - 1, C)):
        _bad_shape("conv_state", state, f"[slots, {C}, 3] or [slots, 3, {C}]")
    if sum((n - 1) * step for n, step in zip(state.shape[1:], state.stride()[1:], strict=True)) >= 1 << 29:
        raise ValueError(f"conv_state has strides {state.stride()}: must have slots that span less than 2^29 elements")
    if call.state_indices is None and state.shape[0] < N:
        _bad_shape("conv_state", state, f"[slots, {C}, 3] with at least N = {N} slots without indices")


def _check_norm(call: FusedCall, N: int, HV: int, V: int) -> None:
    x, weight, gate = call.mixed_qkv, call.norm_weight, call.output_gate
    if (weight is None) != (gate is None):
        name, other = ("norm_weight", "output_gate") if weight is None else ("output_gate", "norm_weight")
        raise ValueError(f"{name} is None: must be a tensor, as {other} is one, or both None")
    if call.norm_activation not in ACTIVATIONS:
        raise ValueError(f"norm_activation is {call.norm_activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    contract.check_number("norm_eps", call.norm_eps)
    if not 0 <= call.norm_eps < float("inf"):
        raise ValueError(f"norm_eps is {call.norm_eps}: must be finite and not negative")
    if weight is not None and gate is not None:
        _tensor("norm_weight", weight, x, (x.dtype, torch.float32), shapes=[(V,)], form="[V]")
        _dense_rows("norm_weight", weight)
        _tensor("output_gate", gate, x, (x.dtype,), shapes=[(N, HV, V)], form="[N, HV, V]")
        _dense_rows("output_gate", gate)


def check_values(call: FusedCall) -> None:
    """Of indices: below the number of slots, none twice."""
    for name, indices, slots in (
        ("state_indices", call.state_indices, call.initial_state),
        ("conv_state_indices", call.conv_indices, call.conv_state),
    ):
        if indices is None or slots is None:
            continue
        seen: dict[int, int] = {}
        for n, i in enumerate(indices.tolist()):
            if i <= call.null_index:
                continue
            if i >= len(slots):
                must = f"must be below {len(slots)}, or at most {call.null_index} for none"
                raise ValueError(f"{name}[{n}] is {i}: {must}")
            if i in seen:
                raise ValueError(f"{name}[{n}] is {i}: must not be that of {name}[{seen[i]}] too")
            seen[i] = n


def _tensor(
    name: str, x: Any, like: Tensor | None, dtypes: tuple[torch.dtype, ...], with_itself: torch.dtype | None = None,
    shapes: list[tuple[int, ...]] | None = None, form: str = "",
) -> None:  # fmt: skip
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: must be a torch.Tensor")
    if x.dtype not in dtypes and not (like is not None and x.dtype is like.dtype is with_itself):
        must = " or ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
        raise TypeError(f"{name} is {str(x.dtype).removeprefix('torch.')}: must be {must}")
    if shapes is not None and tuple(x.shape) not in shapes:
        _bad_shape(name, x, f"{list(shapes[0])}, {form}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}: must be on {like.device} like mixed_qkv")


def _dense_rows(name: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {x.stride()}: must be contiguous in its last dimension")


def _aligned(name: str, x: Tensor, size: int) -> None:
    if not x.is_contiguous() or x.data_ptr() % size:
        raise ValueError(
            f"{name} has strides {x.stride()} at address {x.data_ptr():#x}: must be contiguous, at a multiple of {size}"
        )


def _bad_shape(name: str, x: Tensor, must: str) -> NoReturn:
    raise ValueError(f"{name} has shape {list(x.shape)}: must be {must}")


def _refuse_grad(call: FusedCall) -> None:
    if torch.is_grad_enabled():
        tensors = {name: x for name, x in call._asdict().items() if isinstance(x, Tensor) and name != "out"}
        if any(x.requires_grad for x in tensors.values()):
            why = "fused_decode_kda has no backward; chunk_kda has one, torch.no_grad() says that none is needed"
            contract.refuse_grad(why, **tensors)


# ---- what it computes


def reference(call: FusedCall, sizes: FusedSizes) -> Tensor:
    """In fp32, or in fp64 for fp64 inputs, on any device."""
    N, H, HV, K, V, C = sizes
    x, pool = call.mixed_qkv, call.initial_state
    out = x.new_empty(N, HV, V) if call.out is None else call.out
    memory.increment_version([y for y in (out, pool, call.conv_state) if y is not None])
    if x.is_meta:
        return out
    dtype = contract.state_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        every = torch.arange(N, device=x.device)
        slots = every if call.state_indices is None else call.state_indices
        conv_slots = slots if call.conv_state is None or call.conv_indices is None else call.conv_indices
        kept = every >= 0
        if call.state_indices is not None:
            kept = (slots > call.null_index) & (conv_slots > call.null_index)
        slots, conv_slots = slots[kept].long(), conv_slots[kept].long()
        y = x[kept].to(dtype)
        if call.conv_weight is not None:
            y = _convolved(call, y, conv_slots)
        q, k, v = y.split([H * K, H * K, HV * V], -1)
        n = len(slots)
        o, S = fused_recurrent_kda(
            q.reshape(n, 1, H, K), k.reshape(n, 1, H, K), v.reshape(n, 1, HV, V), call.g[kept][:, None],
            call.beta[kept][:, None], call.A_log, call.dt_bias, call.scale, pool[slots], True,
            call.use_qk_l2norm_in_kernel, True, True, lower_bound=call.lower_bound, state_v_first=True,
            backend="reference",
        )  # fmt: skip
        pool[slots] = S.to(pool.dtype)
        o = o[:, 0].to(dtype)
        if call.norm_weight is not None and call.output_gate is not None:
            o = _normed(o, call.norm_weight.to(dtype), call.output_gate[kept].to(dtype), call)
        out.zero_()
        out[kept] = o.to(out.dtype)
    return out


def _convolved(call: FusedCall, x: Tensor, slots: Tensor) -> Tensor:
    """x of the kept sequences, and the inputs kept for them; conv_state goes on by a token."""
    assert call.conv_weight is not None and call.conv_state is not None
    state = call.conv_state if call.conv_state.shape[2] == WIDTH - 1 else call.conv_state.transpose(1, 2)
    inputs = torch.cat([state[slots].to(x.dtype), x[..., None]], -1)
    state[slots] = inputs[..., 1:].to(state.dtype)
    y = (inputs * call.conv_weight.view(-1, WIDTH).to(x.dtype)).sum(-1)
    if call.conv_bias is not None:
        y = y + call.conv_bias.to(x.dtype)
    return torch.nn.functional.silu(y)


def _normed(o: Tensor, weight: Tensor, gate: Tensor, call: FusedCall) -> Tensor:
    act = torch.sigmoid(gate) if call.norm_activation == "sigmoid" else torch.nn.functional.silu(gate)
    return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + call.norm_eps) * weight * act
