"""The suite "serving": calls as the servers make them. States are in a pool: in place where an implementation can, else
gathered and scattered around the call, as its server does it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .cases import D, Serving

Results = tuple[torch.Tensor, torch.Tensor | None]
Call = Callable[[], Results]
FLA_HEADS = (12, 32)
DENSE = "q, k and v of a mix each dense, as separate convolutions leave them"
TUNED = "its tuned kernels tuned at the first H of the suite only"
GIVEN = {"fla": f"{DENSE}; {TUNED}", "flash_kda": DENSE, "sglang": TUNED, "vllm": f"{DENSE}; {TUNED}"}
EPS = 1e-5


def kda_cute(x: Serving) -> Call:
    from kda_cute import chunk_kda, fused_decode_kda, fused_recurrent_kda

    N, first = x.case.N, _first(x)
    gate: dict[str, Any] = {"A_log": x.A_log, "dt_bias": x.dt_bias, "lower_bound": x.lower_bound}
    raw: dict[str, Any] = {
        "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
        "state_v_first": True, "initial_state": x.pool, "state_indices": first, **gate,
    }  # fmt: skip
    o = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)

    def packed_mix() -> Results:
        return chunk_kda(x.q, x.k, x.v, x.g, x.beta, cu_seqlens=x.cu_seqlens, out=o, **raw)

    by_sequence = [y.transpose(0, 1) for y in (x.q, x.k, x.v, x.g, x.beta, o)]

    def decode() -> Results:
        fused_recurrent_kda(*by_sequence[:5], out=by_sequence[5], **raw)
        return o, x.pool

    def fused() -> Results:
        return fused_decode_kda(
            x.mixed, x.g[0], x.beta[0], initial_state=x.pool, state_indices=first, conv_weight=x.conv_weight,
            conv_state=x.conv_state, output_gate=x.output_gate, norm_weight=x.norm_weight, norm_eps=EPS, out=o[0],
            **gate,
        )  # fmt: skip

    rows = torch.arange(N, dtype=torch.int32, device=x.v.device)
    states = _token_states(x)

    def verify() -> Results:
        fused_recurrent_kda(
            x.q, x.k, x.v, x.g, x.beta, cu_seqlens=x.cu_seqlens, update_state=False, token_states=states,
            token_state_indices=rows, out=o, **raw,
        )  # fmt: skip
        return o, states

    return {"mix": packed_mix, "decode": decode, "fused": fused, "verify": verify}[x.case.serving]


def sglang(x: Serving) -> Call:
    """Its class of Triton kernels. Its convolution writes where it reads."""
    tune_quickly()
    from sglang.kernels.ops.attention.fla.fused_norm_gate import rms_norm_gated
    from sglang.kernels.ops.mamba.causal_conv1d_triton import causal_conv1d_update
    from sglang.srt.layers.attention.linear.kernels.kda_triton import TritonKDAKernel

    kernel, N, H, first = TritonKDAKernel(), x.case.N, x.case.H, _first(x)
    gate: dict[str, Any] = {"A_log": x.A_log.view(1, 1, H, 1), "dt_bias": x.dt_bias.flatten()}
    gate["lower_bound"] = x.lower_bound
    pool: dict[str, Any] = {"ssm_states": x.pool, "cache_indices": first}

    def packed_mix() -> Results:
        o = kernel.extend(
            x.q, x.k, x.v, x.g, x.beta, beta_is_raw=True, query_start_loc=x.cu_seqlens, **pool, **gate
        )  # fmt: skip
        return o, x.pool

    a, b = x.g.view(x.case.T, -1), x.beta[0]

    def decode(mixed: torch.Tensor = x.mixed) -> Results:
        o = kernel.packed_decode(mixed, a, b, scale=D**-0.5, num_v_heads=H, head_v_dim=D, **pool, **gate)
        return o, x.pool

    conv_state = x.conv_state.transpose(1, 2)
    mixed = x.own(x.mixed) if x.case.serving == "fused" else x.mixed

    def fused() -> Results:
        y = causal_conv1d_update(mixed, conv_state, x.conv_weight, None, "silu", conv_state_indices=first)
        o, S = decode(y)
        return rms_norm_gated(o, x.output_gate[None], x.norm_weight, None, "sigmoid", eps=EPS), S

    rows = torch.arange(N, dtype=torch.int32, device=x.v.device)
    states = _token_states(x)

    def verify() -> Results:
        o = kernel.target_verify(
            q=x.q, k=x.k, v=x.v, a=x.g, b=x.beta, query_start_loc=x.cu_seqlens, intermediate_states_buffer=states,
            intermediate_state_indices=rows, cache_steps=x.case.T // N, retrieve_parent_token=None, **pool, **gate,
        )  # fmt: skip
        return o, states

    return _inference({"mix": packed_mix, "decode": decode, "fused": fused, "verify": verify}[x.case.serving])


def vllm(x: Serving) -> Call:
    """Its Triton kernels of Kimi K3. When verifying, a token's state goes to a slot of its own."""
    tune_quickly()
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
    from vllm.model_executor.layers.mamba.ops.gather_initial_states import gather_initial_states
    from vllm.models.kimi_k3.nvidia.ops.third_party.kda import (
        chunk_kda_with_fused_gate,
        fused_recurrent_kda,
        fused_recurrent_kda_packed_decode,
    )
    from vllm.third_party.flash_linear_attention.ops.kda import rms_norm_gated

    N, first = x.case.N, _first(x)
    gate: dict[str, Any] = {"A_log": x.A_log, "lower_bound": x.lower_bound}
    raw: dict[str, Any] = {"raw_g": x.g, "raw_beta": x.beta, **gate}
    bias = x.dt_bias.flatten()
    o = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    q, k, v = _dense(x)
    every = torch.ones(N, dtype=torch.bool, device=x.v.device)

    def packed_mix() -> Results:
        _, last = chunk_kda_with_fused_gate(
            q=q, k=k, v=v, g_bias=bias, initial_state=gather_initial_states(x.pool, first, every),
            output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=x.cu_seqlens, out=o, **raw,
        )  # fmt: skip
        x.pool[first] = last
        return o, x.pool

    def decode(mixed: torch.Tensor = x.mixed) -> Results:
        fused_recurrent_kda_packed_decode(
            mixed_qkv=mixed, dt_bias=bias, initial_state=x.pool, state_indices=first, out=o, **raw
        )
        return o, x.pool

    conv_state, convolved = x.conv_state.transpose(1, 2), torch.empty_like(x.mixed)

    def fused() -> Results:
        y = causal_conv1d_update(
            x.mixed, conv_state, x.conv_weight, None, "silu", conv_state_indices=first, validate_data=True,
            out=convolved,
        )  # fmt: skip
        decode(y)
        return rms_norm_gated(o, x.output_gate[None], x.norm_weight, None, "sigmoid", eps=EPS), x.pool

    accepted = torch.ones(N, dtype=torch.int32, device=x.v.device)

    def verify() -> Results:
        fused_recurrent_kda(
            q=x.q, k=x.k, v=x.v, dt_bias=bias, initial_state=x.pool, cu_seqlens=x.cu_seqlens,
            ssm_state_indices=x.indices, num_accepted_tokens=accepted, out=o, **raw,
        )  # fmt: skip
        return o, x.pool

    return _inference({"mix": packed_mix, "decode": decode, "fused": fused, "verify": verify}[x.case.serving])


def fla(x: Serving) -> Call:
    """States gathered and scattered around the call."""
    if x.case.serving in ("fused", "verify"):
        raise NotImplementedError(f"has no call for {x.case.serving}")
    if x.case.H not in FLA_HEADS:
        raise NotImplementedError(f"compiles for minutes for each H: measured at {', '.join(map(str, FLA_HEADS))} only")
    tune_quickly()
    os.environ["FLA_FLASH_KDA"] = "0"  # its own Triton kernels, not FlashKDA where that is installed
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    first = _first(x)
    tensors = _dense(x) + (x.g, x.beta)
    raw: dict[str, Any] = {
        "A_log": x.A_log, "dt_bias": x.dt_bias, "lower_bound": x.lower_bound, "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "state_v_first": True,
        "output_final_state": True,
    }  # fmt: skip
    if x.case.serving == "mix":
        function = functools.partial(chunk_kda, cu_seqlens=x.cu_seqlens, safe_gate=True, **raw)
    else:
        tensors = tuple(y.transpose(0, 1) for y in tensors)
        function = functools.partial(fused_recurrent_kda, **raw)

    def call() -> Results:
        o, last = function(*tensors, initial_state=x.pool[first])
        x.pool[first] = last
        return o, x.pool

    return _inference(call)


def flash_kda(x: Serving) -> Call:
    """As vLLM calls it: states gathered and scattered around the call."""
    if x.case.serving != "mix":
        raise NotImplementedError(f"has no call for {x.case.serving}")
    from flash_kda import fwd

    assert x.lower_bound is not None
    lower_bound, first, (q, k, v) = x.lower_bound, _first(x), _dense(x)
    o, last = torch.empty_like(v), torch.empty_like(x.state)
    cu = None if x.cu_seqlens is None else x.cu_seqlens.long()

    def call() -> Results:
        fwd(q, k, v, x.g, x.beta, D**-0.5, o, x.A_log, x.dt_bias, lower_bound, x.pool[first], last, cu)
        x.pool[first] = last
        return o, x.pool

    return call


CALLS: dict[str, Callable[[Serving], Call]] = {
    "kda-cute": kda_cute, "fla": fla, "flash_kda": flash_kda, "sglang": sglang, "vllm": vllm,
}  # fmt: skip


def expected(x: Serving, n: int) -> torch.Tensor:
    """o of the one token of sequence n in fp64, convolution and norm included: [1, 1, H, D]."""
    from kda_cute import fused_decode_kda

    row = slice(n, n + 1)
    slot = int(x.indices[n, 0])
    conv_state = next(before for y, before in x.written if y is x.conv_state)
    o, _ = fused_decode_kda(
        x.mixed[row].double(), x.g[0, row].double(), x.beta[0, row].double(), x.A_log, x.dt_bias,
        initial_state=x.state[row].double(), lower_bound=x.lower_bound, conv_weight=x.conv_weight.double(),
        conv_state=conv_state[slot : slot + 1].double(), output_gate=x.output_gate[row].double(),
        norm_weight=x.norm_weight.double(), norm_eps=EPS, backend="reference",
    )  # fmt: skip
    return o[None]


def _first(x: Serving) -> torch.Tensor:
    """[N]: the slots that the sequences begin with."""
    return x.indices[:, 0].contiguous()


def _dense(x: Serving) -> tuple[torch.Tensor, ...]:
    return tuple(y.contiguous() for y in (x.q, x.k, x.v))


def _token_states(x: Serving) -> torch.Tensor:
    """[N, S, H, V, K], empty where no tokens are verified."""
    N, S = x.indices.shape
    return x.pool.new_empty(N if x.case.serving == "verify" else 0, S, *x.pool.shape[1:])


def _inference(call: Call) -> Call:
    def whole() -> Results:
        with torch.inference_mode():
            return call()

    return whole


@functools.cache
def tune_quickly() -> None:
    """Triton tries the configurations of a kernel for each H, one after the other, which takes minutes. Here they are
    compiled side by side and timed for milliseconds, and the best one at the first H is taken at all."""
    from triton import testing
    from triton.runtime import autotuner
    from triton.runtime._async_compile import AsyncCompileMode

    class Kept(dict[Any, Any]):
        """Knows a key by all of it but heads."""

        def __init__(self, names: list[str]) -> None:
            super().__init__()
            self.left_out = [i for i, name in enumerate(names) if name in ("H", "HV", "NT_BUCKET")]

        def _of(self, key: Any) -> Any:
            return tuple(y for i, y in enumerate(key) if i not in self.left_out)

        def __contains__(self, key: object) -> bool:
            return super().__contains__(self._of(key))

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(self._of(key))

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(self._of(key), value)

    cls: Any = autotuner.Autotuner
    run, prune = cls.run, cls.prune_configs

    def run_with_kept(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.cache, Kept):
            self.cache = Kept(self.keys)
        return run(self, *args, **kwargs)

    def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> Any:
        configs = prune(self, kwargs)
        others = {name: y for name, y in kwargs.items() if name != "warmup"}
        with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **others, **config.all_kwargs())
        return configs

    cls.run, cls.prune_configs = run_with_kept, prune_and_compile
    cls.do_bench = property(lambda self: functools.partial(testing.do_bench, warmup=5, rep=20))
