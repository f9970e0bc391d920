"""SGLang's KDA on this package's kernels: the linear-attention backend "kda_cute".

    sglang serve --linear-attn-prefill-backend kda_cute --linear-attn-decode-backend kda_cute ...

SGLang calls `register` in each of its processes. `KDA_CUTE_SGLANG=0` in the environment switches it off.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch

import kda_cute

from ..environment import switch
from . import Once, harmless, parameters, when_imported

NAME = "kda_cute"
KNOWN = ("0.5.23",)
CHUNK = 64  # tokens that SGLang's track_chunk_idx counts in
PHASES = ("decode", "prefill", "verify")  # in the order of KDAKernelDispatcher's parameters

log = logging.getLogger(__name__)
once = Once(log)


def register() -> None:
    """The entry point."""
    with harmless(log, "SGLang's plugin"):
        from sglang.version import __version__ as version

        if not switch("KDA_CUTE_SGLANG", True):
            log.info("kda_cute: no backend for SGLang, KDA_CUTE_SGLANG is 0")
        elif version.split("+")[0].split(".post")[0] not in KNOWN:
            log.warning("kda_cute: no backend for SGLang %s, known are %s", version, ", ".join(KNOWN))
        else:
            from sglang.srt.arg_groups.choices import add_linear_attn_kernel_backend_choices as add

            add([NAME])
            # Later, since it imports half of SGLang: this process may be the tokenizer's or the detokenizer's.
            when_imported("sglang.srt.layers.attention.linear.kda_backend", _change, log)
            log.info("kda_cute: --linear-attn-{prefill,decode,verify}-backend %s can be chosen", NAME)


def _change(module: ModuleType) -> None:
    """Makes KDAKernelDispatcher know the backend."""
    from sglang.srt.layers.attention.linear.kernels.kernel_backend import LinearAttnKernelBase
    from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend
    from sglang.srt.runtime_context import get_exec

    dispatcher = module.KDAKernelDispatcher
    own = dispatcher.__init__
    if getattr(module, "__kda_cute__", False):
        return
    module.__kda_cute__ = True  # type: ignore[attr-defined]
    found = parameters(own)
    if found != ("self", *(f"{phase}_backend" for phase in PHASES)):
        log.warning("kda_cute: no backend for SGLang, its KDAKernelDispatcher takes %s", found)
        return
    kernel_class = type("KdaCuteKernel", (Kernel, LinearAttnKernelBase), {})

    @functools.wraps(own)
    def __init__(self: Any, decode_backend: Any, prefill_backend: Any, verify_backend: Any) -> None:
        backends = dict(zip(PHASES, (decode_backend, prefill_backend, verify_backend), strict=True))
        names = get_exec().mamba
        chosen = {phase: getattr(names, f"linear_attn_{phase}_backend") for phase in PHASES}
        for phase in ("decode", "prefill"):
            chosen[phase] = chosen[phase] or names.linear_attn_backend
        # SGLang takes each name that it does not know for "custom"
        ours = [phase for phase in PHASES if chosen[phase] == NAME and backends[phase].is_custom()]
        own(self, *(LinearAttnKernelBackend("triton") if x in ours else backends[x] for x in PHASES))
        if not ours:
            return
        why_not = _no_hopper()
        if why_not:
            log.warning("kda_cute: Triton stays for SGLang's KDA %s: %s", ", ".join(ours), why_not)
            return
        kernel = kernel_class(self.triton_kernel)
        if "decode" in ours:
            self.decode_kernel = kernel
            self.supports_packed_decode = self.supports_packed_decode_safe_gate = True
        if "prefill" in ours:
            self.extend_kernel, self.prefill_backend = kernel, prefill_backend
        if "verify" in ours:
            self.verify_kernel, self.verify_backend = kernel, verify_backend
        log.info("kda_cute %s: SGLang's KDA %s on KdaCuteKernel", kda_cute.__version__, ", ".join(ours))

    dispatcher.__init__ = __init__


def _no_hopper() -> str | None:
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs a Hopper GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"needs a Hopper GPU (9.0), this is a {major}.{minor}"


class Kernel:
    """The methods of a LinearAttnKernelBase. K is the width of keys, V of values; a pool is [slots, HV, V, K]."""

    supports_packed_decode = True
    supports_packed_decode_safe_gate = True
    supports_safe_gate = True
    supports_safe_gate_verify = True
    supports_track_state_snapshot = True

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs  # SGLang's own kernel

    def packed_decode(
        self, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, A_log: torch.Tensor, dt_bias: torch.Tensor,
        scale: float, ssm_states: torch.Tensor, cache_indices: torch.Tensor, num_v_heads: int, head_v_dim: int,
        lower_bound: float | None = None, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        """One token a sequence, mixed_qkv [B, 2 * H * K + HV * V]. Returns [1, B, HV, V]."""

        def theirs() -> Any:
            return self.theirs.packed_decode(
                mixed_qkv, a, b, A_log=A_log, dt_bias=dt_bias, scale=scale, ssm_states=ssm_states,
                cache_indices=cache_indices, num_v_heads=num_v_heads, head_v_dim=head_v_dim, lower_bound=lower_bound,
                **others,
            )  # fmt: skip

        def ours() -> torch.Tensor:
            N, HV, K = mixed_qkv.shape[0], num_v_heads, ssm_states.shape[-1]
            of_v = HV * head_v_dim
            of_k = (mixed_qkv.shape[1] - of_v) // 2
            q, k, v = mixed_qkv.unsqueeze(1).split((of_k, of_k, of_v), dim=-1)
            o, _ = kda_cute.fused_recurrent_kda(
                q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (HV, head_v_dim)),
                a.reshape(N, 1, HV, K), b.reshape(N, 1, HV), A_log, dt_bias, scale, ssm_states,
                state_indices=cache_indices, lower_bound=lower_bound, **IN_KERNEL,
            )  # fmt: skip
            return o.transpose(0, 1)

        if others.get("replayssm_d") is not None:
            return once.left("packed_decode", "a replay ring is given", theirs)
        return once.served("packed_decode", ours, theirs)

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *,
        A_log: torch.Tensor, dt_bias: torch.Tensor, ssm_states: torch.Tensor, cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor, lower_bound: float | None = None, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        """[1, T, H, K] and so on. Returns [1, T, HV, V]."""

        def theirs() -> Any:
            return self.theirs.decode(
                q, k, v, a, b, A_log=A_log, dt_bias=dt_bias, ssm_states=ssm_states, cache_indices=cache_indices,
                query_start_loc=query_start_loc, lower_bound=lower_bound, **others,
            )  # fmt: skip

        def ours() -> torch.Tensor:
            o, _ = kda_cute.fused_recurrent_kda(
                q, k, v, *_gate_and_beta(a, b, v, ssm_states), A_log, dt_bias, None, ssm_states,
                cu_seqlens=query_start_loc, state_indices=_of_batch(cache_indices, query_start_loc),
                lower_bound=lower_bound, **IN_KERNEL,
            )  # fmt: skip
            return o

        return once.served("decode", ours, theirs)

    def target_verify(
        self, A_log: torch.Tensor, dt_bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        a: torch.Tensor, b: torch.Tensor, *, ssm_states: torch.Tensor, cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor, intermediate_states_buffer: torch.Tensor | None = None,
        intermediate_state_indices: torch.Tensor | None = None, retrieve_parent_token: torch.Tensor | None = None,
        lower_bound: float | None = None, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        """The pool is only read; the state after token t of sequence n goes to
        intermediate_states_buffer[intermediate_state_indices[n], t]."""

        def theirs() -> Any:
            return self.theirs.target_verify(
                A_log, dt_bias, q, k, v, a, b, ssm_states=ssm_states, cache_indices=cache_indices,
                query_start_loc=query_start_loc, intermediate_states_buffer=intermediate_states_buffer,
                intermediate_state_indices=intermediate_state_indices, retrieve_parent_token=retrieve_parent_token,
                lower_bound=lower_bound, **others,
            )  # fmt: skip

        def ours() -> torch.Tensor:
            o, *_ = kda_cute.fused_recurrent_kda(
                q, k, v, *_gate_and_beta(a, b, v, ssm_states), A_log, dt_bias, None, ssm_states,
                cu_seqlens=query_start_loc, state_indices=_of_batch(cache_indices, query_start_loc),
                lower_bound=lower_bound, update_state=False, token_states=intermediate_states_buffer,
                token_state_indices=_of_batch(intermediate_state_indices, query_start_loc), **IN_KERNEL,
            )  # fmt: skip
            return o

        if retrieve_parent_token is not None:
            return once.left("target_verify", "the tokens are a tree", theirs)
        if others.get("cache_ring") or intermediate_states_buffer is None or intermediate_state_indices is None:
            return once.left("target_verify", "a replay ring in place of states is asked for", theirs)
        if others.get("fused_accept_state_indices") is not None:
            return once.left("target_verify", "states are to be accepted in the kernel", theirs)
        return once.served("target_verify", ours, theirs)

    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
        ssm_states: torch.Tensor, cache_indices: torch.Tensor, query_start_loc: torch.Tensor,
        A_log: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None, lower_bound: float | None = None,
        beta_is_raw: bool = False, is_spec_decode: bool = False, return_intermediate_states: bool = False,
        track_state: torch.Tensor | None = None, track_chunk_idx: torch.Tensor | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        """Prefill. Returns o [1, T, HV, V]; (o, None) with return_intermediate_states: what SGLang would take of the
        states of all chunks is in track_state."""

        def theirs() -> Any:
            return self.theirs.extend(
                q, k, v, g, beta, ssm_states=ssm_states, cache_indices=cache_indices, query_start_loc=query_start_loc,
                A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, beta_is_raw=beta_is_raw,
                is_spec_decode=is_spec_decode, return_intermediate_states=return_intermediate_states,
                track_state=track_state, track_chunk_idx=track_chunk_idx, **others,
            )  # fmt: skip

        def ours() -> Any:
            indices = _of_batch(cache_indices, query_start_loc)
            tracked: dict[str, Any] = {}
            if track_state is not None and track_chunk_idx is not None:
                rows = _of_batch(track_state, query_start_loc)
                offsets = _of_batch(track_chunk_idx, query_start_loc).clamp(min=0) * CHUNK
                tracked = {"checkpoint_state": rows, "checkpoint_offsets": offsets}
                # The state before chunk 0 is the one that the call begins with, and no checkpoint. Which rows want it
                # only the GPU knows, so all rows get it; then the kernel writes those of later chunks.
                rows.copy_(ssm_states.index_select(0, indices.clamp(min=0)))
            o, _ = kda_cute.chunk_kda(
                q, k, v, *_gate_and_beta(g, beta, v, ssm_states), initial_state=ssm_states,
                use_qk_l2norm_in_kernel=True, use_gate_in_kernel=A_log is not None,
                use_beta_sigmoid_in_kernel=beta_is_raw, lower_bound=lower_bound, state_v_first=True,
                cu_seqlens=query_start_loc, A_log=A_log, dt_bias=dt_bias, state_indices=indices, null_index=-1,
                **tracked,
            )  # fmt: skip
            return (o, None) if return_intermediate_states else o

        if is_spec_decode:
            return once.left("extend", "a draft's states are not to be committed", theirs)
        h_source = others.get("track_ssm_h_src")
        if return_intermediate_states and track_state is None and (h_source is None or h_source.numel()):
            return once.left("extend", "the states of all chunks are asked for", theirs)
        return once.served("extend", ours, theirs)


IN_KERNEL: dict[str, Any] = {  # raw inputs, and SGLang's layout of a pool
    "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
    "state_v_first": True, "null_index": -1,
}  # fmt: skip


def _of_batch(table: Any, query_start_loc: torch.Tensor) -> Any:
    """Its rows of sequences: it may be longer."""
    return table[: query_start_loc.shape[0] - 1]


def _gate_and_beta(
    a: torch.Tensor, b: torch.Tensor, v: torch.Tensor, pool: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T, HV, K] and [1, T, HV] of the T tokens of v: they come in several shapes, and may have more rows."""
    T, HV = v.shape[1:3]
    return a.reshape(1, -1, HV, pool.shape[-1])[:, :T], b.reshape(1, -1, HV)[:, :T]
