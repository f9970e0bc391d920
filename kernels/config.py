"""Compile-time choices of the KDA forward kernel. Plain Python: importing this costs nothing and needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_SMEM_BYTES = 232_448  # what one thread block can have on sm_90


# Flags that cost nothing at run time, so that they cost no binary: bits of the kernel's argument `flags`.
L2NORM, BETA_SIGMOID, NEG_EIGVAL, BETA_BF16, STATE_V_FIRST, INITIAL_BF16, FINAL_BF16, CU_INT64 = (
    1 << i for i in range(8)
)


@dataclass(frozen=True)
class KdaFwdConfig:
    """One compiled binary. All else (shapes, strides, cu_seqlens, l2norm, sigmoid, states, their dtypes) is run time.

    g_dtype: how the gate arrives in memory; it fixes the TMA descriptor and the shared-memory tile.
    gate: "safe" computes lower_bound * sigmoid(exp(A_log) * (g + dt_bias)) in the kernel, "log" takes g as log decay in
        [-5, 0].
    """

    g_dtype: Literal["bf16", "fp32"] = "bf16"
    gate: Literal["safe", "log"] = "safe"

    @property
    def name(self) -> str:
        return f"kda_fwd_g{self.g_dtype}_{self.gate}"

    @property
    def stages(self) -> int:
        """Chunks in flight between the loads and the state: 36 KiB each with a bf16 gate, 44 KiB with an fp32 one."""
        return 5 if self.g_dtype == "bf16" else 4


def all_configs() -> list[KdaFwdConfig]:
    return [KdaFwdConfig(g_dtype, gate) for gate in ("safe", "log") for g_dtype in ("bf16", "fp32")]
