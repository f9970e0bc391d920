"""Shapes and inputs. The gate parameters are those of FlashKDA's benchmark ("prod") where nothing else is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

D = 128
WIDTH = 4  # of the convolution
LOWER_BOUND = -5.0
RAGGED = (1300, 547, 2048, 963, 271, 3063)
LONG_AND_SHORT = (60_000, *(20 + 61 * i % 381 for i in range(50)))


@dataclass(frozen=True)
class Case:
    """lengths: tokens of each sequence; one sequence runs without cu_seqlens. recurrent: by fused_recurrent_kda.
    state_v_first: states are [N, H, V, K], else [N, H, K, V]. serving: a server's call on a pool of states, one of
    SERVING."""

    lengths: tuple[int, ...]
    H: int
    gate: str = "prod"
    recurrent: bool = False
    state_v_first: bool = True
    serving: str = ""

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def N(self) -> int:
        return len(self.lengths)

    @property
    def name(self) -> str:
        n, first = self.N, self.lengths[0]
        if self.serving == "mix":
            prefill = [x for x in self.lengths if x > 1]
            shape = "+".join(map(str, prefill)) + f" and {n - len(prefill)} x 1"
        elif n == 1:
            shape = f"{first}"
        elif len(set(self.lengths)) == 1:
            shape = f"{n} x {first}"
        else:
            shape = "+".join(map(str, self.lengths[:6])) + "+..." * (n > 6)
        how = ", recurrent" * self.recurrent + ", K first" * (not self.state_v_first)
        return f"{f'{self.serving} ' * bool(self.serving)}{shape}, H = {self.H}, {self.gate}{how}"

    @property
    def floor_bytes(self) -> int:
        """q, k, v, g, beta read and o written once in bf16, both states in fp32. When verifying, each token's state is
        written; fused, the convolution's weights and inputs and the norm's gate count too."""
        H = self.H
        states = self.N + (self.T if self.serving == "verify" else self.N)
        fused = 3 * H * D * 2 * (WIDTH + 2 * (WIDTH - 1) * self.N) + self.N * H * D * 2
        return self.T * H * (5 * 2 * D + 2) + states * H * D * D * 4 + fused * (self.serving == "fused")


SERVING = {
    "mix": "a packed batch of prefill and decoding sequences",
    "decode": "a token a sequence",
    "fused": "the same, with the convolution before and the gated norm after",
    "verify": "a few tokens a sequence, with the state after each, the pool as it is",
}
PREFILL = (3181, 1467, 2520, 1024)  # 8192 tokens


def mix(prefill: tuple[int, ...], decoding: int, H: int) -> Case:
    return Case((*prefill, *(1,) * decoding), H, serving="mix")


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
    "serving": [
        *(mix(PREFILL, 64, H) for H in (12, 32, 3, 4, 6, 8, 16)),
        *(
            mix(prefill, decoding, H)
            for H in (12, 32)
            for prefill, decoding in (((2048,), 0), ((1531, 517), 256), ((6000, 900, 5084, 4400), 16))
        ),
        *(
            Case((1,) * N, H, recurrent=True, serving=serving)
            for serving in ("decode", "fused")
            for H in (12, 32)
            for N in (1, 4, 16, 64, 256, 512)
        ),
        *(Case((S,) * 32, H, recurrent=True, serving="verify") for H in (12, 32) for S in (2, 4, 8)),
    ],
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
    lower_bound: float | None  # None: the softplus gate
    recurrent: bool
    state_v_first: bool

    def reset(self) -> None:
        """What calls have written is again what it was."""


@dataclass
class Serving(Inputs):
    """What a server's layer has: q, k and v are views of `mixed`, states are slots of a pool. For "fused", `mixed` is
    what the convolution gets."""

    case: Case
    mixed: torch.Tensor  # [T, 3 * H * D]
    pool: torch.Tensor  # [P, H, V, K] with a pitch
    indices: torch.Tensor  # [N, S]: slots of a sequence; it begins with the first one
    conv_weight: torch.Tensor  # [3 * H * D, 4]
    conv_state: torch.Tensor  # [P, 3, 3 * H * D]
    output_gate: torch.Tensor  # [N, H, D]
    norm_weight: torch.Tensor  # [D]
    written: list[tuple[torch.Tensor, torch.Tensor]]  # tensors, and what they were

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of x that an implementation may write."""
        self.written.append((y := x.clone(), x))
        return y

    def reset(self) -> None:
        for x, before in self.written:
            x.copy_(before)


def make_inputs(case: Case, seed: int = 0, device: str = "cuda") -> Inputs:
    # A generator of its own: a capture that fails leaves the default one unusable.
    on: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(seed)}
    if case.serving:
        return _serving(case, on)
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


def _serving(case: Case, on: dict[str, Any]) -> Serving:
    T, N, H = case.T, case.N, case.H
    device, C = on["device"], 3 * H * D

    def bf16(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, **on).bfloat16()

    mixed = bf16(T, C)
    q, k, v = (x.unflatten(-1, (H, D))[None] for x in mixed.split(H * D, dim=-1))
    S = T // N if case.serving == "verify" else 1
    P = N * S + 8
    indices = (1 + torch.randperm(P - 1, **on)[: N * S]).view(N, S)
    pool = torch.randn(P, H * D * D + 1024, **on)[:, : H * D * D].unflatten(-1, (H, D, D))
    conv_state = bf16(P, WIDTH - 1, C)
    cu = torch.tensor((0, *case.lengths), device=device).cumsum(0).int()
    return Serving(
        q, k, v, bf16(1, T, H, D), bf16(1, T, H), torch.rand(H, **on), torch.rand(H, D, **on),
        pool[indices[:, 0]], cu, LOWER_BOUND, case.recurrent, True, case, mixed, pool, indices.int(),
        0.5 * bf16(C, WIDTH), conv_state, bf16(N, H, D), torch.rand(D, **on),
        [(x, x.clone()) for x in (pool, conv_state)],
    )  # fmt: skip
