"""torch's transforms (autograd, torch.func, forward_ad): what a call asks of them, and errors where it is not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import contract
from .call import DIFFERENTIABLE, TENSORS

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


def wants_grad(call: Mapping[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in map(call.get, DIFFERENTIABLE))


def refuse_grad(call: Mapping[str, Any], why: str) -> NoReturn:
    contract.refuse_grad(why, **{name: call[name] for name in DIFFERENTIABLE})


def refuse_outputs(call: Mapping[str, Any]) -> NoReturn:
    refuse_grad(
        call, "out, final_state and state_indices must be None, autograd cannot follow a write into what is there"
    )


def refuse(call: Mapping[str, Any]) -> None:
    """Of torch.func and forward_ad, what kernels and operators do not have."""
    if forward_ad._current_level >= 0:
        tensors = [x for x in map(call.get, TENSORS) if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise NotImplementedError(NO_FORWARD_MODE)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active() and wants_grad(call):
        raise NotImplementedError(NO_FUNC_GRAD)


def refuse_forward_mode() -> None:
    """In an operator, which does not see whether its tensors have derivatives."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(NO_FORWARD_MODE)


def is_of_functorch(x: Any) -> bool:
    """Whether x is a tensor that torch.func has wrapped, which has no memory of its own."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)
