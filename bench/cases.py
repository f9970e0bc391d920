"""Shapes and inputs. The gate parameters are those of FlashKDA's benchmark ("prod") where nothing else is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

D = 128
LOWER_BOUND = -5.0
RAGGED = (1300, 547, 2048, 963, 271, 3063)
LONG_AND_SHORT = (60_000, *(20 + 61 * i % 381 for i in range(50)))


@dataclass(frozen=True)
class Case:
    """lengths: tokens of each sequence; one sequence runs without cu_seqlens. recurrent: by fused_recurrent_kda.
    state_v_first: states are [N, H, V, K], else [N, H, K, V]."""

    lengths: tuple[int, ...]
    H: int
    gate: str = "prod"
    recurrent: bool = False
    state_v_first: bool = True

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def N(self) -> int:
        return len(self.lengths)

    @property
    def name(self) -> str:
        n, first = self.N, self.lengths[0]
        if n == 1:
            shape = f"{first}"
        elif len(set(self.lengths)) == 1:
            shape = f"{n} x {first}"
        else:
            shape = "+".join(map(str, self.lengths[:6])) + "+..." * (n > 6)
        how = ", recurrent" * self.recurrent + ", K first" * (not self.state_v_first)
        return f"{shape}, H = {self.H}, {self.gate}{how}"

    @property
    def floor_bytes(self) -> int:
        """q, k, v, g, beta read and o written once in bf16, both states in fp32."""
        return self.T * self.H * (5 * 2 * D + 2) + 2 * self.N * self.H * D * D * 4


SUITES = {
    "headline": [Case(lengths, H) for lengths in ((8192,), RAGGED, (1024,) * 8) for H in (96, 64)],  # FlashKDA's
    "few-heads": [*(Case((8192,), H) for H in (8, 16, 32)), Case((2048,), 12)],
    "long-context": [*(Case((65536,), H) for H in (8, 16)), Case((262144,), 4)],
    "short": [Case((T,) * N, 32) for T, N in ((128, 64), (32, 256), (8, 1024), (16, 64), (4, 64))],
    "decode": [
        *(Case((T,) * N, 32, recurrent=True) for T, N in (*((1, 4**i) for i in range(6)), (4, 64), (16, 64))),
        *(Case((1,) * 4**i, 32, recurrent=True, state_v_first=False) for i in range(6)),
    ],
    "tokens": [Case((T,), 16) for T in (1024, 4096, 16384)],  # with 8192 and 65536 above, time against T
    "gates": [
        Case((T,), H, gate) for T, H in ((8192, 96), (8192, 16), (65536, 16)) for gate in ("prod", "weak", "mixed")
    ],
    "unbounded": [Case((8192,), H, gate) for H in (96, 64, 16) for gate in ("prod", "softplus")],
    "length": [Case((16384 << i,), 8) for i in range(7)],  # is time linear in T?
    "ragged": [Case(LONG_AND_SHORT, 8), Case((sum(LONG_AND_SHORT) // len(LONG_AND_SHORT),) * len(LONG_AND_SHORT), 8)],
}


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor  # raw
    beta: torch.Tensor  # logits
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    state: torch.Tensor  # [N, H, V, K] or [N, H, K, V]
    cu_seqlens: torch.Tensor | None
    lower_bound: float | None = LOWER_BOUND  # None: the softplus gate
    recurrent: bool = False
    state_v_first: bool = True


def make_inputs(case: Case, seed: int = 0, device: str = "cuda") -> Inputs:
    # A generator of its own: a capture that fails leaves the default one unusable.
    on: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(seed)}
    T, H = case.T, case.H
    q, k = (torch.nn.functional.normalize(torch.randn(1, T, H, D, **on), dim=-1).bfloat16() for _ in range(2))
    v, g = (torch.randn(1, T, H, D, **on).bfloat16() for _ in range(2))
    beta = torch.randn(1, T, H, **on).bfloat16()
    A_log, dt_bias = torch.rand(H, **on), torch.rand(H, D, **on)
    if case.gate == "weak":  # a token keeps 99.8 %
        A_log, dt_bias = torch.zeros_like(A_log), torch.full_like(dt_bias, -8)
    elif case.gate == "mixed":  # some channels forget in a token, some remember thousands
        A_log, dt_bias = torch.zeros_like(A_log), dt_bias * 12 - 10
    elif case.gate == "softplus":  # what fla's layer begins with: exp(A_log) from 1 to 16, softplus(dt_bias) to 0.1
        A_log, dt_bias = (1 + 15 * A_log).log(), (1e-3 * 100**dt_bias).expm1().log()
    state = torch.randn(case.N, H, D, D, **on)
    cu = torch.tensor((0, *case.lengths), device=device).cumsum(0) if case.N > 1 else None
    lower_bound = None if case.gate == "softplus" else LOWER_BOUND
    return Inputs(q, k, v, g, beta, A_log, dt_bias, state, cu, lower_bound, case.recurrent, case.state_v_first)
