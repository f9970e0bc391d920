"""chunk_kda as operators of torch: for torch.compile and export, which cannot look inside, and for autograd.

`kda_cute::chunk_kda` returns new tensors and is differentiable, `kda_cute::chunk_kda_out` writes into given ones,
`kda_cute::chunk_kda_backward` makes the gradients. What they do is what `dispatch.run` does. A call that is neither
traced nor differentiated does not come here: the way through torch's dispatcher takes longer than the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import contract, dispatch, gradients, known_calls, transforms
from .call import ARGUMENTS, DIFFERENTIABLE, NUMBERS, SCHEMA, Call
from .contract import Sizes
from .dispatch import Results

# What the operators that write into given tensors take besides ARGUMENTS, in their order.
_CHUNKED = ("out", "final_state", "checkpoint_state", "checkpoint_offsets", "checkpoint_indices")
_RECURRENT = ("out", "final_state", "token_states", "replay", "token_state_indices", "num_accepted_tokens")

# Schemas are strings, because torch 2.4 makes none of annotations that are.


@torch.library.custom_op("kda_cute::chunk_kda", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
def chunk_kda(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(o, final state), which is empty if it is not asked for."""
    o, S = _run(arguments)
    return o, o.new_empty(0, dtype=torch.float32) if S is None else S


@chunk_kda.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    transforms.refuse_forward_mode()
    call = dict(zip(ARGUMENTS, arguments, strict=True))
    v, shape = call["v"], _state_shape(call)
    o = v.new_empty(v.shape)
    if not call["output_final_state"]:
        return o, v.new_empty(0, dtype=torch.float32)
    return o, v.new_empty(shape, dtype=contract.state_dtype(v))


@torch.library.custom_op(
    "kda_cute::chunk_kda_out",
    mutates_args=("out", "final_state", "checkpoint_state"),
    schema=f"({SCHEMA}, Tensor(a!) out, Tensor(b!)? final_state, Tensor(c!)? checkpoint_state, "
    "Tensor? checkpoint_offsets, Tensor? checkpoint_indices) -> ()",
)
def chunk_kda_out(*arguments: Any) -> None:
    _run(arguments[: len(ARGUMENTS)], dict(zip(_CHUNKED, arguments[len(ARGUMENTS) :], strict=True)))


@chunk_kda_out.register_fake
def _(*arguments: Any) -> None:
    transforms.refuse_forward_mode()
    contract.check_named(dict(zip((*ARGUMENTS, *_CHUNKED), arguments, strict=True)))


@torch.library.custom_op(
    "kda_cute::fused_recurrent_kda_out",
    mutates_args=("out", "final_state", "token_states", "replay"),
    schema=f"({SCHEMA}, Tensor(a!) out, Tensor(b!)? final_state, Tensor(c!)? token_states, Tensor(d!)? replay, "
    "Tensor? token_state_indices, Tensor? num_accepted_tokens) -> ()",
)
def fused_recurrent_kda_out(*arguments: Any) -> None:
    rest = dict(zip(_RECURRENT, arguments[len(ARGUMENTS) :], strict=True))
    _run(arguments[: len(ARGUMENTS)], {**rest, "recurrent": True})


@fused_recurrent_kda_out.register_fake
def _(*arguments: Any) -> None:
    transforms.refuse_forward_mode()
    contract.check_named({**dict(zip((*ARGUMENTS, *_RECURRENT), arguments, strict=True)), "recurrent": True})


@torch.library.custom_op(
    "kda_cute::chunk_kda_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor? dht, {SCHEMA}, bool[] wanted) -> Tensor[]",
)
def chunk_kda_backward(do: Tensor, dht: Tensor | None, *arguments: Any) -> list[Tensor]:
    """Gradients of what is `wanted` of DIFFERENTIABLE, in that order; an empty tensor for the others."""
    transforms.refuse_forward_mode()
    *arguments, wanted = arguments  # type: ignore[assignment]
    call = dict(zip(ARGUMENTS, arguments, strict=True))
    made = gradients.make(call, do, dht, [name for name, x in zip(DIFFERENTIABLE, wanted, strict=True) if x])
    return [made[name] if name in made else do.new_empty(0) for name in DIFFERENTIABLE]


@chunk_kda_backward.register_fake
def _(do: Tensor, dht: Tensor | None, *arguments: Any) -> list[Tensor]:
    transforms.refuse_forward_mode()
    *arguments, wanted = arguments  # type: ignore[assignment]
    call = dict(zip(ARGUMENTS, arguments, strict=True))
    return [
        call[name].new_empty(call[name].shape) if is_wanted else do.new_empty(0)
        for name, is_wanted in zip(DIFFERENTIABLE, wanted, strict=True)
    ]


_KEPT = ("cu_seqlens", "has_initial_state")  # for the gradients, besides DIFFERENTIABLE


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.save_for_backward(*(call.pop(name) for name in (*DIFFERENTIABLE, *_KEPT)))
    ctx.flags = call


def _backward(ctx: Any, do: Tensor, dht: Tensor) -> tuple[Tensor | None, ...]:
    call = {**ctx.flags, **dict(zip((*DIFFERENTIABLE, *_KEPT), ctx.saved_tensors, strict=True))}
    wanted = [ctx.needs_input_grad[ARGUMENTS.index(name)] for name in DIFFERENTIABLE]
    arguments = [call[name] for name in ARGUMENTS]
    made = chunk_kda_backward(do, dht if call["output_final_state"] else None, *arguments, wanted)
    found = {name: x for name, x, is_wanted in zip(DIFFERENTIABLE, made, wanted, strict=True) if is_wanted}
    return tuple(found.get(name) for name in ARGUMENTS)


chunk_kda.register_autograd(_backward, setup_context=_setup_context)


def _backward_of_backward(ctx: Any, *unused: Any) -> NoReturn:
    raise NotImplementedError(transforms.NO_SECOND)


chunk_kda_backward.register_autograd(_backward_of_backward)


# ---- calls that become operators


def traced(given: tuple[Any, ...]) -> Results:
    """A call, the fields of a Call, as one operator."""
    call = dict(zip(Call._fields, given, strict=True))
    for name in NUMBERS:  # operators know nothing of numpy's
        if call[name] is not None and not isinstance(call[name], torch.SymFloat):
            contract.check_number(name, call[name])
            call[name] = float(call[name])
    call["q"], call["k"], call["v"] = dispatch.autocast(call["q"], call["k"], call["v"])
    transforms.refuse(call)
    arguments = [call[name] for name in ARGUMENTS]
    v, out, final_state, recurrent = call["v"], call["out"], call["final_state"], call["recurrent"]
    if out is None and final_state is None and call["checkpoint_state"] is None and not recurrent:
        o, S = torch.ops.kda_cute.chunk_kda(*arguments)
        return o, S if call["output_final_state"] else None
    if transforms.wants_grad(call):
        if recurrent:
            transforms.refuse_grad(call, transforms.NO_GRADIENT)
        transforms.refuse_outputs(call)
    if out is None:
        out = v.new_empty(v.shape)
    if final_state is None and call["output_final_state"]:
        final_state = v.new_empty(_state_shape(call), dtype=contract.state_dtype(v))
    if recurrent:
        torch.ops.kda_cute.fused_recurrent_kda_out(
            *arguments, out, final_state, *(call[name] for name in _RECURRENT[2:])
        )
    else:
        torch.ops.kda_cute.chunk_kda_out(*arguments, out, final_state, *(call[name] for name in _CHUNKED[2:]))
    return out, final_state


def check(call: dict[str, Any]) -> Sizes:
    """`contract.check_named`, also of what torch.jit.trace records, where sizes are tensors, and of what is compiled,
    where a number may have no value yet: that of lower_bound is looked at when the operator runs."""
    if torch.compiler.is_compiling() and call["lower_bound"] is not None:
        call = {**call, "lower_bound": contract.LOWER_BOUND_MIN}
    if torch._C._get_tracing_state() is None:
        return contract.check_named(call)
    with _unrecorded():
        return contract.check_named(call)


# ---- the pieces


_NOTHING: dict[str, Any] = {**dict.fromkeys(Call._fields), "recurrent": False}


def _run(arguments: Any, rest: dict[str, Any] | None = None) -> Results:
    """A call in an operator. rest: fields besides ARGUMENTS."""
    transforms.refuse_forward_mode()
    call = Call(**{**_NOTHING, **dict(zip(ARGUMENTS, arguments, strict=True)), **(rest or {})})
    if torch._C._get_tracing_state() is None:
        return known_calls.run(call) or dispatch.run(call)
    with _unrecorded():
        return known_calls.run(call) or dispatch.run(call)


@contextlib.contextmanager
def _unrecorded() -> Iterator[None]:
    """For what torch.jit.trace is not to record."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _state_shape(call: dict[str, Any]) -> tuple[int, ...]:
    """Checks a call, all but values."""
    _, _, _, HV, K, V, N = check(call)
    return contract.state_shape(N, HV, K, V, call["state_v_first"])
