"""flash-linear-attention's `chunk_kda` on this package's kernel. One line switches it on:

    import kda_cute.fla

fla (0.6 or newer) then asks this backend first, before FlashKDA and Triton, at every call of `fla.ops.kda.chunk_kda`,
that of its layers and models too. What the kernel does not have goes on as before, and fla's logger says why, once:
set it to INFO to see. `FLA_KDA_CUTE=0` in the environment switches the backend off.

Raises ImportError if fla is not installed or older than 0.6.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from . import contract, library, ops

try:
    from fla.backends import BaseBackend, register
    from fla.ops.kda import chunk_kda as fla_chunk_kda  # FlashKDA's backend registers itself with it
except ImportError as error:
    raise ImportError(f"kda_cute.fla needs fla-core >= 0.6: {error}") from error

NAMES = tuple(inspect.signature(inspect.unwrap(fla_chunk_kda)).parameters)  # fla's order is not ours
OURS = inspect.signature(ops.chunk_kda).parameters.keys() - {"out", "final_state", "backend", "fla_kwargs"}


def _is_hopper(index: int) -> bool:
    return ops._gpu(index)[0] == (9, 0)


@register(fla_chunk_kda)
class KdaCuteBackend(BaseBackend):
    """One fused kernel, for inference. Calls that need gradients stay with fla, whose backward pass takes what its own
    forward pass keeps."""

    backend_type = "kda_cute"
    package_name = "kda_cute"
    env_var = "FLA_KDA_CUTE"
    priority = 1  # FlashKDA's is 3; the lowest is asked first

    @classmethod
    @functools.cache
    def is_available(cls) -> bool:
        return any(_is_hopper(i) for i in range(torch.cuda.device_count()))

    def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        """(whether the kernel serves a call of fla's chunk_kda, if not why)."""
        call = _call(args, kwargs)
        why_not = _why_not(call)
        return why_not is None, why_not

    def chunk_kda(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ops.chunk_kda(**_call(args, kwargs))


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    call = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    if not call.get("use_gate_in_kernel"):  # fla then has no use for them
        call.pop("A_log", None)
        call.pop("dt_bias", None)
    return call


def _why_not(call: dict[str, Any]) -> str | None:
    unknown = call.keys() - OURS - contract.FLA_KWARGS
    if unknown:
        return f"kda_cute does not know the argument {min(unknown)}"
    if library.wants_grad(call):
        return "kda_cute has no backward kernels, and fla's need what fla's forward keeps"
    try:
        others = {name: call[name] for name in call.keys() - OURS}
        v_first = contract.check_fla_kwargs(others, bool(call.get("state_v_first")))
        *_, K, V, _ = contract.check_named({**call, "state_v_first": v_first})
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"kda_cute: {error}"  # if fla does not take it either, fla says so
    q = call["q"]
    if not (q.is_cuda and _is_hopper(q.get_device())):
        return f"kda_cute needs a Hopper GPU: q is on {q.device}"
    why_not = contract.not_served(K, V, q, call["g"], call["beta"])
    return why_not and f"kda_cute: {why_not}"
