"""The implementations. Each takes the inputs and returns a call without arguments -> (o, final state)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch

from .cases import LOWER_BOUND, Inputs

Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def kda_cute(x: Inputs) -> Call:
    from kda_cute import chunk_kda

    o, final_state = torch.empty_like(x.v), torch.empty_like(x.state)
    return lambda: chunk_kda(out=o, final_state=final_state, state_v_first=True, **_arguments(x))


def fla(x: Inputs) -> Call:
    """flash-linear-attention's Triton kernels: its backends are switched off by the environment (see __main__)."""
    from fla.ops.kda import chunk_kda

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return chunk_kda(output_final_state=True, state_v_first=True, **_arguments(x))

    return call


def flash_kda(x: Inputs) -> Call:
    from flash_kda import fwd

    o, final_state = torch.empty_like(x.v), torch.empty_like(x.state)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        fwd(
            x.q,
            x.k,
            x.v,
            x.g,
            x.beta,
            x.q.shape[-1] ** -0.5,
            o,
            x.A_log,
            x.dt_bias,
            LOWER_BOUND,
            x.state,
            final_state,
            x.cu_seqlens,
        )
        return o, final_state

    return call


def _arguments(x: Inputs) -> dict:
    return dict(
        q=x.q, k=x.k, v=x.v, g=x.g, beta=x.beta, A_log=x.A_log, dt_bias=x.dt_bias, initial_state=x.state,
        cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, safe_gate=True, lower_bound=LOWER_BOUND,
    )  # fmt: skip


# name -> (the function, the distribution whose version is reported)
IMPLS = {
    "kda-cute": (kda_cute, "kda-cute"),
    "fla": (fla, "flash-linear-attention"),
    "flash_kda": (flash_kda, "flash_kda"),
}


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
