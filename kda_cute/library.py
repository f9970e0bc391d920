"""chunk_kda as operators of torch: for torch.compile and export, which cannot look inside, and for autograd.

`kda_cute::chunk_kda` returns new tensors and is differentiable, `kda_cute::chunk_kda_out` writes into given ones,
`kda_cute::chunk_kda_backward` makes the gradients. What they do is what `ops.run` does. A call that is neither traced
nor differentiated does not come here: the way through torch's dispatcher takes longer than the call.

There are no backward kernels yet. Gradients are those of the same forward, run again by fla's Triton kernels where fla
is installed and has them, else by the chunked reference in fp32 (fp64 for fp64 inputs), which keeps all of its
intermediate results: about 30 KiB a token and head.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import contract
from .reference.chunked import chunked
from .reference.recurrence import recurrence

_log = logging.getLogger("kda_cute")

NO_GRADIENT = "fused_recurrent_kda has no backward; chunk_kda has one, torch.no_grad() says that none is needed"
NO_FORWARD_MODE = (
    "kda_cute's kernels and operators have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): "
    'backend="reference" outside of torch.compile has one, torch.autograd.grad makes the gradients of chunk_kda'
)
NO_FUNC_GRAD = (
    "kda_cute's kernels and operators have no gradient under torch.func (grad, vjp, jacrev): "
    'backend="reference" outside of torch.compile has one, torch.autograd.grad makes the gradients of chunk_kda'
)
NO_SECOND = (
    "the gradients of kda_cute's operators have no gradient themselves: "
    'those of backend="reference" outside of torch.compile have'
)
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")

# Written out, because torch 2.4 makes no schema of annotations that are strings. Scalar: a float would have to be known
# when a call is compiled, which that of .item() is not.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Scalar? scale, Tensor? initial_state, "
    "bool output_final_state, bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel, bool use_beta_sigmoid_in_kernel, "
    "bool allow_neg_eigval, bool safe_gate, Scalar? lower_bound, bool state_v_first, Tensor? cu_seqlens, "
    "Tensor? A_log, Tensor? dt_bias, Tensor? state_indices, str? backend"
)
ARGUMENTS = tuple(argument.split()[1] for argument in _ARGUMENTS.split(", "))


@torch.library.custom_op("kda_cute::chunk_kda", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def chunk_kda(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(o, final state), which is empty if it is not asked for."""
    o, S = _run(arguments)
    return o, o.new_empty(0, dtype=torch.float32) if S is None else S


@chunk_kda.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    refuse_forward_mode()
    call = dict(zip(ARGUMENTS, arguments, strict=True))
    v, shape = call["v"], _state_shape(call)
    o = v.new_empty(v.shape)
    if not call["output_final_state"]:
        return o, v.new_empty(0, dtype=torch.float32)
    return o, v.new_empty(shape, dtype=state_dtype(v))


@torch.library.custom_op(
    "kda_cute::chunk_kda_out",
    mutates_args=("out", "final_state"),
    schema=f"({_ARGUMENTS}, Tensor(a!) out, Tensor(b!)? final_state) -> ()",
)
def chunk_kda_out(*arguments: Any) -> None:
    *arguments, out, final_state = arguments  # type: ignore[assignment]
    _run(arguments, out, final_state)


@chunk_kda_out.register_fake
def _(*arguments: Any) -> None:
    refuse_forward_mode()
    contract.check_named(dict(zip((*ARGUMENTS, "out", "final_state"), arguments, strict=True)))


@torch.library.custom_op(
    "kda_cute::fused_recurrent_kda_out",
    mutates_args=("out", "final_state", "token_states"),
    schema=f"({_ARGUMENTS}, Tensor(a!) out, Tensor(b!)? final_state, Tensor(c!)? token_states) -> ()",
)
def fused_recurrent_kda_out(*arguments: Any) -> None:
    *arguments, out, final_state, token_states = arguments  # type: ignore[assignment]
    _run(arguments, out, final_state, token_states, True)


@fused_recurrent_kda_out.register_fake
def _(*arguments: Any) -> None:
    refuse_forward_mode()
    contract.check_named(dict(zip((*ARGUMENTS, "out", "final_state"), arguments[:-1], strict=True)))


@torch.library.custom_op(
    "kda_cute::chunk_kda_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor? dht, {_ARGUMENTS}, bool[] wanted) -> Tensor[]",
)
def chunk_kda_backward(do: Tensor, dht: Tensor | None, *arguments: Any) -> list[Tensor]:
    """Gradients of what is `wanted` of DIFFERENTIABLE, in that order; an empty tensor for the others."""
    refuse_forward_mode()
    *arguments, wanted = arguments  # type: ignore[assignment]
    call = dict(zip(ARGUMENTS, arguments, strict=True))
    call["output_final_state"] = dht is not None
    leaves = {}
    with _autograd():
        for name, is_wanted in zip(DIFFERENTIABLE, wanted, strict=True):
            if is_wanted:
                leaves[name] = call[name] = call[name].detach().requires_grad_()
        o, S = _again(call)
        outputs, gradients = [o], [do]
        if S is not None and dht is not None:
            outputs, gradients = [o, S], [do, dht]
        made = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
    found = dict(zip(leaves, made, strict=True))
    return [_gradient(call, name, found.get(name)) if name in leaves else do.new_empty(0) for name in DIFFERENTIABLE]


@chunk_kda_backward.register_fake
def _(do: Tensor, dht: Tensor | None, *arguments: Any) -> list[Tensor]:
    refuse_forward_mode()
    *arguments, wanted = arguments  # type: ignore[assignment]
    call = dict(zip(ARGUMENTS, arguments, strict=True))
    return [
        call[name].new_empty(call[name].shape) if is_wanted else do.new_empty(0)
        for name, is_wanted in zip(DIFFERENTIABLE, wanted, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.save_for_backward(*(call.pop(name) for name in (*DIFFERENTIABLE, "cu_seqlens")))
    ctx.flags = call


def _backward(ctx: Any, do: Tensor, dht: Tensor) -> tuple[Tensor | None, ...]:
    call = {**ctx.flags, **dict(zip((*DIFFERENTIABLE, "cu_seqlens"), ctx.saved_tensors, strict=True))}
    wanted = [ctx.needs_input_grad[ARGUMENTS.index(name)] for name in DIFFERENTIABLE]
    arguments = [call[name] for name in ARGUMENTS]
    made = chunk_kda_backward(do, dht if call["output_final_state"] else None, *arguments, wanted)
    gradients = {name: x for name, x, is_wanted in zip(DIFFERENTIABLE, made, wanted, strict=True) if is_wanted}
    return tuple(gradients.get(name) for name in ARGUMENTS)


chunk_kda.register_autograd(_backward, setup_context=_setup_context)


def _backward_of_backward(ctx: Any, *gradients: Any) -> NoReturn:
    raise NotImplementedError(NO_SECOND)


chunk_kda_backward.register_autograd(_backward_of_backward)


def traced(arguments: tuple[Any, ...], out: Tensor | None, final_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A call of `ops.run` as one operator."""
    call = _by_name(arguments)
    if out is None and final_state is None:
        o, S = torch.ops.kda_cute.chunk_kda(*call.values())
        return o, S if call["output_final_state"] else None
    if wants_grad(call):
        refuse_outputs(call)
    v = call["v"]
    if out is None:
        out = v.new_empty(v.shape)
    if final_state is None and call["output_final_state"]:
        final_state = v.new_empty(_state_shape(call), dtype=state_dtype(v))
    torch.ops.kda_cute.chunk_kda_out(*call.values(), out, final_state)
    return out, final_state


def traced_recurrent(
    arguments: tuple[Any, ...], out: Tensor | None, final_state: Tensor | None, token_states: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A call of `ops.run`, token by token, as one operator."""
    call = _by_name(arguments)
    v = call["v"]
    if wants_grad(call):
        refuse(call, NO_GRADIENT)
    if out is None:
        out = v.new_empty(v.shape)
    if final_state is None and call["output_final_state"]:
        final_state = v.new_empty(_state_shape(call), dtype=state_dtype(v))
    torch.ops.kda_cute.fused_recurrent_kda_out(*call.values(), out, final_state, token_states)
    return out, final_state


def _by_name(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """As the operators take them, which know nothing of numpy's numbers."""
    call = dict(zip(ARGUMENTS, arguments, strict=True))
    for name in ("scale", "lower_bound"):
        if call[name] is not None and not isinstance(call[name], torch.SymFloat):
            contract.check_number(name, call[name])
            call[name] = float(call[name])
    call["q"], call["k"], call["v"] = autocast(call["q"], call["k"], call["v"])
    refuse_transforms(call)
    return call


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast fp32 queries, keys and values are taken in its dtype, as those of attention are."""
    if isinstance(q, Tensor) and (q.is_cuda or q.is_cpu) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in (q, k, v))
    return q, k, v


def by_reference(call: dict[str, Any], recurrent: bool = False) -> tuple[Tensor, Tensor | None]:
    """o and the final state in fp32, or in fp64 for fp64 inputs, also under autocast."""
    options = {name: x for name, x in call.items() if name not in ("state_indices", "backend")}
    device = call["q"].device.type
    as_it_is = contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with as_it_is:
        return (recurrence if recurrent else chunked)(**options, dtype=state_dtype(call["v"]))


def refuse_forward_mode() -> None:
    """In an operator, which does not see whether its tensors have derivatives."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(NO_FORWARD_MODE)


def refuse_transforms(call: dict[str, Any]) -> None:
    """Of torch.func and forward_ad, those that the kernels and operators do not have."""
    if forward_ad._current_level >= 0:
        tensors = {name: x for name, x in call.items() if isinstance(x, Tensor)}
        if torch.compiler.is_compiling() or any(map(_has_tangent, tensors.values())):
            raise NotImplementedError(NO_FORWARD_MODE)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active() and wants_grad(call):
        raise NotImplementedError(NO_FUNC_GRAD)


def is_of_functorch(x: Any) -> bool:
    """Whether x is a tensor that torch.func has wrapped, which has no memory of its own."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def wants_grad(call: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in map(call.get, DIFFERENTIABLE))


def refuse(call: dict[str, Any], why: str) -> NoReturn:
    contract.refuse_grad(why, **{name: call[name] for name in DIFFERENTIABLE})


def refuse_outputs(call: dict[str, Any]) -> NoReturn:
    refuse(call, "out, final_state and state_indices must be None, autograd cannot follow a write into what is there")


# ---- the pieces


def _ops() -> Any:
    from . import ops  # which imports this

    return ops


def _run(*call: Any) -> tuple[Tensor, Tensor | None]:
    """`ops.run` in an operator."""
    refuse_forward_mode()
    if torch._C._get_tracing_state() is None:
        return _ops().run(*call)
    with _unrecorded():
        return _ops().run(*call)


@contextlib.contextmanager
def _unrecorded() -> Iterator[None]:
    """For what torch.jit.trace is not to record."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def state_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def check(call: dict[str, Any]) -> tuple[int, int, int, int, int, int, int]:
    """`contract.check_named`, also of what torch.jit.trace records, where sizes are tensors, and of what is compiled,
    where a number may have no value yet: that of lower_bound is looked at when the operator runs."""
    if torch.compiler.is_compiling() and call["lower_bound"] is not None:
        call = {**call, "lower_bound": contract.LOWER_BOUND_MIN}
    if torch._C._get_tracing_state() is None:
        return contract.check_named(call)
    with _unrecorded():
        return contract.check_named(call)


def _state_shape(call: dict[str, Any]) -> tuple[int, ...]:
    """Checks a call, all but values."""
    _, _, _, HV, K, V, N = check(call)
    return contract.state_shape(N, HV, K, V, call["state_v_first"])


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, which torch runs with it switched off."""
    key = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(key.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(key.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def _again(call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The forward pass, by something that autograd can follow."""
    q = call["q"]
    if call["backend"] != "reference" and q.is_cuda:
        fla_chunk_kda = _fla()
        if fla_chunk_kda is not None and q.shape[-1] <= 256:
            if call["cu_seqlens"] is not None and not _captures():  # fla's kernels write where its values say
                contract.check_cu_seqlens(call["cu_seqlens"], q.shape[1])
            options = {name: x for name, x in call.items() if name not in (*DIFFERENTIABLE, "state_indices", "backend")}
            state, A_log, dt_bias = (x if x is None else x.float() for x in map(call.get, DIFFERENTIABLE[5:]))
            return fla_chunk_kda(
                *(call[name] for name in DIFFERENTIABLE[:5]), initial_state=state,
                A_log=A_log if A_log is None else A_log.flatten(),
                dt_bias=dt_bias if dt_bias is None else dt_bias.flatten(), **options,
            )  # fmt: skip
    o, S = by_reference(call)
    return o.to(q.dtype), S


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _fla() -> Any:
    """fla's chunk_kda, or None. Older versions than 0.6 take arguments that they then ignore."""
    try:
        version = importlib.metadata.version("fla-core")
        if tuple(map(int, version.split(".")[:2])) < (0, 6):
            raise ImportError(f"fla-core {version} is older than 0.6")
        from fla.ops.kda import chunk_kda
    except (ImportError, ValueError) as error:
        _log.warning(
            "gradients are made by the chunked reference, slowly; fla-core >= 0.6 makes them faster: %s", error
        )
        return None
    return chunk_kda


def _gradient(call: dict[str, Any], name: str, gradient: Tensor | None) -> Tensor:
    """As the fake function says it is; zero for tokens that no sequence has, which fla leaves as they were."""
    x, cu_seqlens = call[name], call["cu_seqlens"]
    if gradient is None:
        return x.new_zeros(x.shape)
    if cu_seqlens is not None and name in DIFFERENTIABLE[:5]:
        token = torch.arange(x.shape[1], device=x.device).view(-1, *[1] * (x.dim() - 2))
        gradient = torch.where(token < cu_seqlens[-1], gradient, 0)
    return gradient.contiguous()
