"""vLLM's KDA layers on this package's kernels: Kimi K3, Kimi-Linear, GLM and Ling, prefill and decode.

vLLM calls `register` in each of its processes. The functions below take the place of vLLM's of the same name when the
module that has them is imported, if their parameters are the same. What our functions refuse goes on to vLLM's.
`KDA_CUTE_VLLM=0` in the environment switches it off.

In vLLM index 0 of a pool is null, a pool is [slots, H, V, K], and a state as K, V and the pool's dtype say.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

import kda_cute

from ..environment import switch
from . import Once, harmless, when_imported

KNOWN = "0.33."

log = logging.getLogger("vllm.kda_cute")  # vLLM shows INFO of its own loggers only
once = Once(log)
Made = Callable[[Callable[..., Any]], Callable[..., Any]]  # of vLLM's function, the one in its place


def register() -> None:
    """The entry point."""
    with harmless(log, "vLLM's plugin"):
        from vllm.version import __version__ as version

        if not switch("KDA_CUTE_VLLM", True):
            log.info("kda_cute: vLLM keeps its kernels, KDA_CUTE_VLLM is 0")
        elif not version.startswith(KNOWN):
            log.warning("kda_cute: vLLM keeps its kernels: known is %sx, this is %s", KNOWN, version)
        else:
            for name, groups in CHANGES.items():
                when_imported(name, functools.partial(_change, groups=groups), log)


def _change(module: ModuleType, groups: tuple[dict[str, Made], ...]) -> None:
    """Replaces each group of functions, or none of a group."""
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda() and current_platform.is_device_capability(90)):
        log.warning("kda_cute: %s is left alone: needs a Hopper GPU (9.0)", module.__name__)
        return
    if getattr(module, "__kda_cute__", False):
        return
    module.__kda_cute__ = True  # type: ignore[attr-defined]
    replaced, left = [], []
    for group in groups:
        found = [_find(module, path, make) for path, make in group.items()]
        why_not = [x for x in found if isinstance(x, str)]
        if why_not:
            left.append(f"{', '.join(group)}: {', '.join(why_not)}")
            continue
        for x in found:
            if not isinstance(x, str):
                setattr(x.owner, x.name, x.ours)
                replaced.append(x.name)
    line = f"kda_cute {kda_cute.__version__}: in {module.__name__} replaced {', '.join(replaced) or 'nothing'}"
    log.log(logging.WARNING if left else logging.INFO, "%s", "; left ".join((line, *left)))


class _Found(NamedTuple):
    owner: Any
    name: str
    ours: Callable[..., Any]


def _find(module: ModuleType, path: str, make: Made) -> _Found | str:
    """What to set where, or why vLLM's function stays."""
    *classes, name = path.split(".")
    owner: Any = module
    for x in classes:
        owner = getattr(owner, x, None)
    theirs = getattr(owner, name, None)
    if theirs is None:
        return f"there is no {path}"
    ours = make(theirs)
    if _signature(ours) != _signature(theirs):
        return f"parameters of {path} are {inspect.signature(theirs)}"
    return _Found(owner, name, functools.update_wrapper(ours, theirs, updated=()))


def _signature(function: Any) -> list[tuple[Any, ...]]:
    return [(x.name, x.kind, x.default) for x in inspect.signature(function).parameters.values()]


def _first(ours: Callable[..., Any]) -> Made:
    """In place of vLLM's function: ours, and vLLM's for arguments that ours refuses."""

    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def either(*args: Any, **kwargs: Any) -> Any:
            def left() -> Any:
                return theirs(*map(_dense, args), **{name: _dense(x) for name, x in kwargs.items()})

            return once.served(ours.__name__, lambda: ours(*args, **kwargs), left)

        either.__signature__ = inspect.signature(ours)  # type: ignore[attr-defined]
        return either

    return make


# ---- states


class _Rows(NamedTuple):
    """States of a pool that have not been gathered: our kernels read and write them where they are."""

    pool: torch.Tensor
    indices: torch.Tensor
    has_initial_state: torch.Tensor
    gather: Callable[..., torch.Tensor]  # vLLM's


def _dense(x: Any) -> Any:
    return x.gather(x.pool, x.indices, x.has_initial_state) if isinstance(x, _Rows) else x


def _gather_initial_states(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def gather_initial_states(state: torch.Tensor, indices: torch.Tensor, has_initial_state: torch.Tensor) -> _Rows:
        return _Rows(state, indices, has_initial_state, theirs)

    return gather_initial_states


def _scatter_states(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def scatter_states(state: torch.Tensor, src: torch.Tensor, indices: torch.Tensor) -> Any:
        return None if src is state else theirs(state, src, indices)

    return scatter_states


def _states(initial_state: Any, final_state: torch.Tensor | None = None) -> tuple[dict[str, Any], Any]:
    """Arguments of chunk_kda, and the last states that it leaves."""
    if isinstance(initial_state, _Rows):
        pool, indices, has_initial_state, _ = initial_state
        rows = {"state_indices": indices, "has_initial_state": has_initial_state, "null_index": 0}
        return {"initial_state": pool, **rows}, pool
    if initial_state is None:
        raise NotImplementedError("initial_state is None")
    last = torch.empty_like(initial_state) if final_state is None else final_state
    return {"initial_state": initial_state, "final_state": last}, last


def _gate(lower_bound: float | None) -> dict[str, Any]:
    """Raw inputs."""
    return {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "lower_bound": lower_bound}


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    if arguments:
        raise NotImplementedError(f"{', '.join(arguments)} given")


# ---- Kimi K3 and Kimi-Linear


@_first
def _flashkda_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, A_log: torch.Tensor,
    dt_bias: torch.Tensor, lower_bound: float, initial_state: torch.Tensor, cu_seqlens: torch.Tensor,
    out: torch.Tensor, final_state: torch.Tensor, workspace: torch.Tensor,
    checkpoint_state: torch.Tensor | None = None, checkpoint_offsets: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    kept: dict[str, Any] = {}
    if checkpoint_offsets is not None:
        kept = {"checkpoint_state": checkpoint_state, "checkpoint_offsets": checkpoint_offsets}
    kda_cute.chunk_kda(
        q, k, v, g, beta, initial_state=initial_state, final_state=final_state, use_qk_l2norm_in_kernel=True,
        state_v_first=True, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias, out=out, **_gate(lower_bound),
        **kept,
    )  # fmt: skip
    return out, final_state


@_first
def _chunk_kda_with_fused_gate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, raw_g: torch.Tensor, raw_beta: torch.Tensor,
    A_log: torch.Tensor, g_bias: torch.Tensor | None, scale: float | None = None,
    initial_state: torch.Tensor | None = None, output_final_state: bool = False, lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: torch.Tensor | None = None, out: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    _refuse_unknown(kwargs)
    states, last = _states(initial_state)
    o, _ = kda_cute.chunk_kda(
        q, k, v, raw_g, raw_beta, scale, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, state_v_first=True,
        cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=g_bias, out=out, **_gate(lower_bound), **states,
    )  # fmt: skip
    return o, last if output_final_state else None


@_first
def _fused_recurrent_kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, raw_g: torch.Tensor, raw_beta: torch.Tensor,
    A_log: torch.Tensor, dt_bias: torch.Tensor | None, lower_bound: float | None, initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor, ssm_state_indices: torch.Tensor, num_accepted_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None, fuse_gate: bool | None = None,
) -> Any:  # fmt: skip
    o, _ = kda_cute.fused_recurrent_kda(
        q, k, v, raw_g, raw_beta, A_log, dt_bias, None, initial_state, use_qk_l2norm_in_kernel=True, out=out,
        **_gate(lower_bound), **_in_pool(cu_seqlens, ssm_state_indices, num_accepted_tokens),
    )  # fmt: skip
    return o, initial_state


@_first
def _fused_recurrent_kda_packed_decode(
    mixed_qkv: torch.Tensor, raw_g: torch.Tensor, raw_beta: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor,
    lower_bound: float | None, initial_state: torch.Tensor, state_indices: torch.Tensor, scale: float | None = None,
    out: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    _, H, V, K = initial_state.shape
    q, k, v = mixed_qkv.unsqueeze(1).split((H * K, H * K, H * V), dim=-1)
    o, _ = kda_cute.fused_recurrent_kda(
        q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (H, V)), raw_g.transpose(0, 1),
        raw_beta.transpose(0, 1), A_log, dt_bias, scale, initial_state, use_qk_l2norm_in_kernel=True,
        state_v_first=True, state_indices=state_indices, null_index=0, out=None if out is None else out.transpose(0, 1),
        **_gate(lower_bound),
    )  # fmt: skip
    return o.transpose(0, 1) if out is None else out, initial_state


def _in_pool(
    cu_seqlens: torch.Tensor | None, indices: torch.Tensor | None, accepted: torch.Tensor | None
) -> dict[str, Any]:
    """Decoding's arguments; tables may have more rows than there are sequences."""
    if cu_seqlens is None or indices is None:
        raise NotImplementedError("no cu_seqlens or no ssm_state_indices")
    N = cu_seqlens.shape[0] - 1
    arguments = {"cu_seqlens": cu_seqlens, "state_indices": indices[:N], "null_index": 0, "state_v_first": True}
    return arguments if accepted is None else {**arguments, "num_accepted_tokens": accepted[:N]}


# ---- GLM: its layer gathers and scatters by functions, so the pool is read and written in place


def _glm_flashkda_prefill(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def _flashkda_prefill(
        self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
        initial_state: Any, cu_seqlens: torch.Tensor, out: torch.Tensor | None, checkpoint: Any = None,
        raw_qkv: torch.Tensor | None = None, conv_state: torch.Tensor | None = None,
        recurrent_state: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        kept: dict[str, Any] = {}

        def ours() -> Any:
            states, last = _states(initial_state)
            if checkpoint is not None:
                pool = states["initial_state"]
                kept["checkpoint_offsets"] = checkpoint.checkpoint_offsets
                kept["checkpoint_state"] = pool.new_empty(cu_seqlens.shape[0] - 1, *pool.shape[1:])
            o, _ = kda_cute.chunk_kda(
                q, k, v, g, beta, use_qk_l2norm_in_kernel=True, state_v_first=True, cu_seqlens=cu_seqlens,
                A_log=self.A_log, dt_bias=self.dt_bias, out=out, **_gate(self.kda_lower_bound), **states, **kept,
            )  # fmt: skip
            return o, last

        def left() -> Any:
            kept.clear()
            return theirs(
                self, q, k, v, g, beta, _dense(initial_state), cu_seqlens, out, checkpoint=checkpoint, raw_qkv=raw_qkv,
                conv_state=conv_state, recurrent_state=recurrent_state,
            )  # fmt: skip

        o, last = once.served("Glm5NextLinearAttention._flashkda_prefill", ours, left)
        if kept:
            self._checkpoint_exporter.export(
                checkpoint, raw_qkv=raw_qkv, conv_state=conv_state, recurrent_checkpoint=kept["checkpoint_state"],
                recurrent_state=recurrent_state, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        return o, last

    return _flashkda_prefill


@_first
def _glm_chunk_kda_with_fused_gate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, raw_g: torch.Tensor, beta: torch.Tensor, A_log: torch.Tensor,
    g_bias: torch.Tensor | None, scale: float | None = None, initial_state: Any = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: torch.Tensor | None = None,
    safe_gate: bool = False, lower_bound: float = -5.0, **kwargs: Any,
) -> Any:  # fmt: skip
    _refuse_unknown(kwargs)
    states, last = _states(initial_state)
    o, _ = kda_cute.chunk_kda(
        q, k, v, raw_g, beta, scale, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=True,
        lower_bound=lower_bound if safe_gate else None, state_v_first=True, cu_seqlens=cu_seqlens, A_log=A_log,
        dt_bias=g_bias, **states,
    )  # fmt: skip
    return o, last if output_final_state else None


@_first
def _glm_fused_recurrent_kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor | None = None,
    scale: float | None = None, initial_state: torch.Tensor | None = None, inplace_final_state: bool = True,
    use_qk_l2norm_in_kernel: bool = True, cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None, num_accepted_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None, sigmoid_beta: bool = False, a_log: torch.Tensor | None = None,
    g_bias: torch.Tensor | None = None, compute_gate: bool = False, lower_bound: float | None = -5.0, **kwargs: Any,
) -> Any:  # fmt: skip
    _refuse_unknown(kwargs)
    if not inplace_final_state or beta is None:
        raise NotImplementedError("states are not in place, or there is no beta")
    gate: dict[str, Any] = {}
    if compute_gate:
        gate = {"A_log": a_log, "dt_bias": g_bias, "lower_bound": lower_bound, "use_gate_in_kernel": True}
    o, _ = kda_cute.fused_recurrent_kda(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=sigmoid_beta, out=out, **gate,
        **_in_pool(cu_seqlens, ssm_state_indices, num_accepted_tokens),
    )  # fmt: skip
    return o, initial_state


# ---- Ling: its gate and beta have been computed


@_first
def _ling_chunk_kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    scale: float | None = None, initial_state: torch.Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: torch.Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    safe = _gate_is_safe(kwargs)
    states, last = _states(initial_state)
    o, _ = kda_cute.chunk_kda(
        q, k, v, g, beta, scale, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, safe_gate=safe, state_v_first=True,
        cu_seqlens=cu_seqlens, **states,
    )  # fmt: skip
    return o, last if output_final_state else None


@_first
def _ling_fused_recurrent_kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor | None = None,
    scale: float | None = None, initial_state: torch.Tensor | None = None, inplace_final_state: bool = True,
    use_qk_l2norm_in_kernel: bool = True, cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    _gate_is_safe(kwargs)
    return _ling_decode(
        q, k, v, g, beta, scale, initial_state, inplace_final_state, use_qk_l2norm_in_kernel,
        _in_pool(cu_seqlens, ssm_state_indices, None),
    )  # fmt: skip


@_first
def _ling_fused_recurrent_kda_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, scale: float,
    initial_state: torch.Tensor, inplace_final_state: bool = True, cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None, num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Any:  # fmt: skip
    return _ling_decode(
        q, k, v, g, beta, scale, initial_state, inplace_final_state, use_qk_l2norm_in_kernel,
        _in_pool(cu_seqlens, ssm_state_indices, num_accepted_tokens),
    )  # fmt: skip


def _ling_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor | None, scale: float | None,
    initial_state: torch.Tensor | None, in_place: bool, use_qk_l2norm_in_kernel: bool, in_pool: dict[str, Any],
) -> Any:  # fmt: skip
    if not in_place or beta is None or beta.dim() != 3:
        raise NotImplementedError("states are not in place, or there is no beta of a head")
    o, _ = kda_cute.fused_recurrent_kda(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        **in_pool,
    )  # fmt: skip
    return o, initial_state


def _gate_is_safe(kwargs: dict[str, Any]) -> bool:
    """Whether all of g is in [-5, 0]."""
    safe_gate, lower_bound = kwargs.pop("safe_gate", False), kwargs.pop("lower_bound", None)
    _refuse_unknown(kwargs)
    return bool(safe_gate) and lower_bound is not None and lower_bound >= -5


# In each module groups of functions, which only work together.
CHANGES: dict[str, tuple[dict[str, Made], ...]] = {
    "vllm.models.kimi_k3.nvidia.kda": ({"_flashkda_prefill": _flashkda_prefill},),
    "vllm.models.kimi_k3.nvidia.ops.third_party.kda": (  # Kimi-Linear's too
        {"chunk_kda_with_fused_gate": _chunk_kda_with_fused_gate},
        {"fused_recurrent_kda": _fused_recurrent_kda},
        {"fused_recurrent_kda_packed_decode": _fused_recurrent_kda_packed_decode},
    ),
    "vllm.models.glm5next.common.kda": (
        {
            "gather_initial_states": _gather_initial_states,
            "scatter_states": _scatter_states,
            "Glm5NextLinearAttention._flashkda_prefill": _glm_flashkda_prefill,
            "chunk_kda_with_fused_gate": _glm_chunk_kda_with_fused_gate,
        },
        {"fused_recurrent_kda": _glm_fused_recurrent_kda},
    ),
    "vllm.model_executor.models.bailing_moe_v3": (
        {"chunk_kda": _ling_chunk_kda},
        {"fused_recurrent_kda": _ling_fused_recurrent_kda},
        {"fused_recurrent_kda_fwd": _ling_fused_recurrent_kda_fwd},
    ),
}
