"""Gradients of `chunk_kda`. There are no backward kernels yet.

By fla's Triton kernels, which run the same forward again, where fla is installed and has them; else by the chunked
backward of the reference in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import contract
from .backends import reference
from .call import ARGUMENTS, DIFFERENTIABLE

_NOT_FLAS = ("state_indices", "null_index", "has_initial_state", "batch_invariant", "backend")
_log = logging.getLogger("kda_cute")


def make(call: dict[str, Any], do: Tensor, dht: Tensor | None, wanted: list[str]) -> dict[str, Tensor]:
    """The gradients of the arguments whose names are `wanted`, from that of o and that of the final state, if any."""
    q = call["q"]
    fla_chunk_kda = fla() if call["backend"] != "reference" and q.is_cuda and q.shape[-1] <= 256 else None
    with _autograd():
        if fla_chunk_kda is None:
            made = reference.backward(call, do, dht)
            return {name: made[name] for name in wanted}
        leaves = {name: call[name].detach().requires_grad_() for name in wanted}
        state, has = leaves.get("initial_state", call["initial_state"]), call["has_initial_state"]
        if state is not None and has is not None:
            state = torch.where(has.view(-1, 1, 1, 1), state, 0)
        given = {**call, **leaves, "initial_state": state, "output_final_state": dht is not None}
        o, S = _forward_of_fla(fla_chunk_kda, given)
        outputs, of_outputs = [o], [do]
        if S is not None and dht is not None:
            outputs, of_outputs = [o, S], [do, dht]
        found = torch.autograd.grad(outputs, list(leaves.values()), of_outputs, allow_unused=True)
    return {name: _gradient(call, name, x) for name, x in zip(wanted, found, strict=True)}


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


def _forward_of_fla(fla_chunk_kda: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    if call["cu_seqlens"] is not None and not _captures():  # fla's kernels write where its values say
        contract.check_cu_seqlens(call["cu_seqlens"], call["q"].shape[1])
    others = (name for name in ARGUMENTS if name not in (*DIFFERENTIABLE, *_NOT_FLAS))
    state, A_log, dt_bias = (x if x is None else x.float() for x in map(call.get, DIFFERENTIABLE[5:]))
    return fla_chunk_kda(
        *(call[name] for name in DIFFERENTIABLE[:5]), initial_state=state,
        A_log=A_log if A_log is None else A_log.flatten(),
        dt_bias=dt_bias if dt_bias is None else dt_bias.flatten(), **{name: call[name] for name in others},
    )  # fmt: skip


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def fla() -> Any:
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
    """As the operator's fake function says it is; zero for tokens that no sequence has, which fla leaves as they
    were."""
    x, cu_seqlens = call[name], call["cu_seqlens"]
    if gradient is None:
        return x.new_zeros(x.shape)
    if cu_seqlens is not None and name in DIFFERENTIABLE[:5]:
        token = torch.arange(x.shape[1], device=x.device).view(-1, *[1] * (x.dim() - 2))
        gradient = torch.where(token < cu_seqlens[-1], gradient, 0)
    return gradient.contiguous()
