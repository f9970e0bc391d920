"""The implementations. Each takes the inputs and returns a call without arguments -> (o, final state).

What an implementation is given is made here, before the clock starts; what the call itself allocates is its own time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import serving
from .cases import Case, D, Inputs, Serving
from .serving import Call, Results


def kda_cute(x: Inputs) -> Call:
    from kda_cute import chunk_kda, fused_recurrent_kda

    o, final_state = torch.empty_like(x.v), torch.empty_like(x.state)
    if x.recurrent:
        arguments = _recurrent(x)
        return lambda: fused_recurrent_kda(out=o, final_state=final_state, **arguments)
    return lambda: chunk_kda(out=o, final_state=final_state, **_arguments(x))


def reference(x: Inputs) -> Call:
    from kda_cute import chunk_kda

    def call() -> Results:
        with torch.no_grad():
            return chunk_kda(output_final_state=True, backend="reference", **_arguments(x))

    return call


def fla(x: Inputs) -> Call:
    os.environ["FLA_FLASH_KDA"] = "0"  # its own Triton kernels, not FlashKDA where that is installed
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    function, arguments = (fused_recurrent_kda, _recurrent(x)) if x.recurrent else (chunk_kda, _arguments(x))

    def call() -> Results:
        with torch.inference_mode():
            return function(output_final_state=True, **arguments)

    return call


def fla_gdn(x: Inputs) -> Call:
    """Gated DeltaNet: one decay a head and token. It gets the mean of KDA's, so that it forgets as fast."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    g = _log_decay(x).mean(-1)

    def call() -> Results:
        with torch.inference_mode():
            return chunk_gated_delta_rule(
                x.q, x.k, x.v, g, x.beta, initial_state=x.state, output_final_state=True,
                state_v_first=x.state_v_first, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                cu_seqlens=x.cu_seqlens,
            )  # fmt: skip

    return call


def kda_hopper_cuda(x: Inputs) -> Call:
    """cuDNN's fused CUDA kernel. bf16 g and beta, or int64 cu_seqlens, would be converted inside the call."""
    return _cudnn(
        "kda_hopper_cuda", x, x.q, x.k, x.g.float(), x.beta.float(), use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, safe_gate=True, gate_lower_bound=_needs_a_lower_bound(x), a_log=x.A_log,
        dt_bias=x.dt_bias,
    )  # fmt: skip


def kda_hopper(x: Inputs) -> Call:
    """cuDNN's CuTe DSL kernel refuses the gate, the norm and the sigmoid: it gets what they make."""
    from kda_cute.reference.transforms import l2norm

    q, k = (l2norm(y.float()).bfloat16() for y in (x.q, x.k))
    return _cudnn("kda_hopper", x, q, k, _log_decay(x), x.beta.float().sigmoid())


def _cudnn(
    plan: str, x: Inputs, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **flags: Any
) -> Call:
    from cudnn.linear_attention.ops import kimi_delta_attention

    _needs_v_first(x)
    cu = torch.tensor([0, x.q.shape[1]], device=x.q.device) if x.cu_seqlens is None else x.cu_seqlens
    tensors = (q[0], k[0], x.v[0], g[0], beta[0], cu.int())

    def call() -> Results:
        with torch.no_grad():
            return kimi_delta_attention(
                *tensors, scale=D**-0.5, initial_state=x.state, output_final_state=True, plan_name=plan, **flags
            )

    return call


def flash_kda(x: Inputs) -> Call:
    from flash_kda import fwd

    _needs_v_first(x)
    o, final_state, lower_bound = torch.empty_like(x.v), torch.empty_like(x.state), _needs_a_lower_bound(x)

    def call() -> Results:
        fwd(
            x.q, x.k, x.v, x.g, x.beta, D**-0.5, o, x.A_log, x.dt_bias, lower_bound, x.state, final_state, x.cu_seqlens
        )  # fmt: skip
        return o, final_state

    return call


def _arguments(x: Inputs) -> dict[str, Any]:
    return dict(
        q=x.q, k=x.k, v=x.v, g=x.g, beta=x.beta, A_log=x.A_log, dt_bias=x.dt_bias, initial_state=x.state,
        cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, safe_gate=x.lower_bound is not None, lower_bound=x.lower_bound,
        state_v_first=x.state_v_first,
    )  # fmt: skip


def _recurrent(x: Inputs) -> dict[str, Any]:
    return {name: y for name, y in _arguments(x).items() if name != "safe_gate"}


def _log_decay(x: Inputs) -> torch.Tensor:
    from kda_cute.reference.transforms import safe_gate, softplus_gate

    if x.lower_bound is None:
        return softplus_gate(x.g.float(), x.A_log, x.dt_bias)
    return safe_gate(x.g.float(), x.A_log, x.dt_bias, x.lower_bound)


def only_serving(x: Inputs) -> Call:
    raise NotImplementedError("is measured in the suite serving only")


def _needs_v_first(x: Inputs) -> None:
    if not x.state_v_first:
        raise NotImplementedError("has states with V first only")


def _needs_a_lower_bound(x: Inputs) -> float:
    if x.lower_bound is None:
        raise NotImplementedError("has no gate without a lower bound")
    return x.lower_bound


@dataclass(frozen=True)
class Impl:
    make: Callable[[Inputs], Call]
    label: str
    module: str  # what has to be importable
    distribution: str  # whose version is reported
    peer: bool = True  # the same operation, made by others: may be the best peer
    checked: bool = True  # the same operation: its o is compared with fp64
    given: str = ""  # where not the tensors that the others get
    no_graph: str = ""  # why a CUDA graph cannot hold it

    def is_for(self, case: Case) -> bool:
        """Servers' kernels are measured as servers call them."""
        return bool(case.serving) or self.make is not only_serving


CUDNN = "nvidia-cudnn-frontend"
IMPLS = {
    "kda-cute": Impl(kda_cute, "kda-cute", "kda_cute", "kda-cute", peer=False),
    "fla": Impl(fla, "fla (Triton)", "fla", "fla-core"),
    "kda_hopper_cuda": Impl(
        kda_hopper_cuda, "cuDNN kda_hopper_cuda", "cudnn", CUDNN, given="g and beta in fp32, its native form"
    ),
    "kda_hopper": Impl(
        kda_hopper, "cuDNN kda_hopper", "cudnn", CUDNN,
        given="normalised q and k, log decay and step size in fp32: it fuses neither gate, norm nor sigmoid",
    ),
    "flash_kda": Impl(flash_kda, "FlashKDA", "flash_kda", "flash_kda"),
    "sglang": Impl(only_serving, "SGLang (Triton)", "sglang", "sglang"),
    "vllm": Impl(only_serving, "vLLM (Triton)", "vllm", "vllm"),
    "fla-gdn": Impl(
        fla_gdn, "fla GDN (scalar gate)", "fla", "fla-core", peer=False, checked=False,
        given="one log decay a head and token: another, smaller operation",
    ),
    "reference": Impl(
        reference, "reference (torch)", "kda_cute", "kda-cute", peer=False, no_graph="it plans its chunks on the host"
    ),
}  # fmt: skip


def make(name: str, x: Inputs) -> Call:
    if not isinstance(x, Serving):
        return IMPLS[name].make(x)
    if name not in serving.CALLS:
        raise NotImplementedError("has no call with a pool of states")
    return serving.CALLS[name](x)


def given(name: str, case: Case) -> str:
    return serving.GIVEN.get(name, "") if case.serving else IMPLS[name].given


def installed() -> list[str]:
    return [name for name, impl in IMPLS.items() if importlib.util.find_spec(impl.module)]


def version(impl: Impl) -> str:
    try:
        return importlib.metadata.version(impl.distribution)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        pass
    try:
        return getattr(importlib.import_module(impl.module), "__version__", "unknown")
    except ImportError:
        return "not installed"
