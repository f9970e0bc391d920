"""flash-linear-attention's `chunk_kda` and `fused_recurrent_kda` on this package's kernels. One line switches them on:

    import kda_cute.fla

fla (0.6 or newer) then asks this backend first, before FlashKDA and Triton, at every call of `fla.ops.kda.chunk_kda`
and `fla.ops.kda.fused_recurrent_kda`, those of its layers and models too. What the kernels do not have goes on as
before, and fla's logger says why, once: set it to INFO to see. `FLA_KDA_CUTE=0` in the environment switches it off.

Raises ImportError if fla is not installed or older than 0.6.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Set
from typing import Any

import torch

from . import contract, devices, ops, transforms

try:
    from fla.backends import BaseBackend, register
    from fla.ops.kda import chunk_kda as fla_chunk_kda  # FlashKDA's backend registers itself with it
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd as fla_decode
except ImportError as error:
    raise ImportError(f"kda_cute.fla needs fla-core >= 0.6: {error}") from error

NAMES = tuple(inspect.signature(inspect.unwrap(fla_chunk_kda)).parameters)  # fla's order is not ours
DECODE_NAMES = tuple(inspect.signature(inspect.unwrap(fla_decode)).parameters)
OURS = inspect.signature(ops.chunk_kda).parameters.keys() - {"out", "final_state", "backend", "fla_kwargs"}


class _Backend(BaseBackend):
    backend_type = "kda_cute"
    package_name = "kda_cute"
    env_var = "FLA_KDA_CUTE"
    priority = 1  # FlashKDA's is 3; the lowest is asked first

    @classmethod
    @functools.cache
    def is_available(cls) -> bool:
        return any(devices.is_hopper(i) for i in range(torch.cuda.device_count()))


@register(fla_chunk_kda)
class KdaCuteBackend(_Backend):
    """One fused kernel, for inference. Calls that need gradients stay with fla, whose backward pass takes what its own
    forward pass keeps."""

    def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        """(whether the kernel serves a call of fla's chunk_kda, if not why)."""
        call = _call(args, kwargs)
        why_not = _why_not(call)
        return why_not is None, why_not

    def chunk_kda(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ops.chunk_kda(**_call(args, kwargs))


@register("kda")
class KdaCuteDecodeBackend(_Backend):
    """Token by token. fla's function has no gradient either, so none is kept."""

    def fused_recurrent_kda_fwd_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        """(whether the kernel serves a call of fla's fused_recurrent_kda_fwd, if not why)."""
        with torch.no_grad():
            call, why_not = _decode_call(args, kwargs)
            why_not = why_not or _why_not(call, OURS | {"out", "final_state", "num_accepted_tokens"}, True)
        return why_not is None, why_not

    def fused_recurrent_kda_fwd(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            return ops.fused_recurrent_kda(**_decode_call(args, kwargs)[0])


def _decode_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """(the call, what it asks for that is not served)."""
    call, why_not = {**dict(zip(DECODE_NAMES, args, strict=False)), **kwargs}, None
    q, beta, indices = call["q"], call["beta"], call.pop("ssm_state_indices", None)
    if beta.dim() == 4:
        why_not = "kda_cute: beta has a value for each channel: must be [B, T, HV]"
    in_place = call.pop("inplace_final_state", True)
    if in_place:
        call["final_state"] = call.get("initial_state")
    if indices is not None:  # fla keeps the state after each token then: with one token that is the last one
        cuts = call.get("cu_seqlens")
        tokens = q.shape[0] * q.shape[1] if cuts is None else q.shape[1]
        if not in_place or (indices.dim() == 1 and tokens != indices.shape[0]):
            why_not = (
                "kda_cute: ssm_state_indices are given: must be [N, S], or one a sequence of one token, and states in "
                "place"
            )
        call["state_indices"] = indices
    return _call((), call), why_not


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    call = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    if not call.get("use_gate_in_kernel"):  # fla then has no use for them
        call.pop("A_log", None)
        call.pop("dt_bias", None)
    return call


def _why_not(call: dict[str, Any], ours: Set[str] = OURS, recurrent: bool = False) -> str | None:
    unknown = call.keys() - ours - contract.FLA_KWARGS
    if unknown:
        return f"kda_cute does not know the argument {min(unknown)}"
    if transforms.wants_grad(call):
        return "kda_cute has no backward kernels, and fla's need what fla's forward keeps"
    try:
        others = {name: call[name] for name in call.keys() - ours}
        v_first = contract.check_fla_kwargs(others, bool(call.get("state_v_first")))
        *_, K, V, _ = contract.check_named({**call, "state_v_first": v_first, "recurrent": recurrent})
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"kda_cute: {error}"  # if fla does not take it either, fla says so
    q = call["q"]
    if not (q.is_cuda and devices.is_hopper(q.get_device())):
        return f"kda_cute needs a Hopper GPU: q is on {q.device}"
    why_not = contract.not_served(K, V, q, call["g"], call["beta"])
    return why_not and f"kda_cute: {why_not}"
