"""Calls of fused_decode_kda that the kernel serves, and what they come to by plain torch in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from kda_cute.reference import recurrence
from tests.strategies import DTYPES, Guarded

NAN = float("nan")
BEYOND = 1 << 40  # an index that no pool has


@dataclass(frozen=True)
class FusedCase:
    seed: int
    N: int = 2
    H: int = 1
    group: int = 1
    K: int = 128
    V: int = 128
    dtype: str = "bf16"
    g_dtype: str = "bf16"
    beta_dtype: str = "bf16"
    weight_dtype: str = "bf16"  # of the convolution and of the norm: like dtype, or fp32
    gate: str = "safe"
    A_log: bool = True
    dt_bias: str | None = "flat"
    l2norm: bool = True
    scale: float | None = None
    state: str = "fp32"
    pitch: int = 0  # bytes between states, a multiple of 16
    indices: str | None = "int32"
    null_index: int = -1
    nulls: bool = False  # some sequences have none
    beyond: bool = False  # some indices are too large
    conv: bool = True
    bias: bool = True
    conv_layout: str = "channels"  # [slots, C, 3]; "taps": [slots, 3, C]; "view": the first, a view of the second
    separate: bool = False  # indices of conv_state
    norm: bool = True
    activation: str = "sigmoid"
    gaps: bool = False  # between the rows of all that is by row
    out: bool = False
    large: bool = False  # squares of q and k overflow
    pdl: bool = False

    @property
    def HV(self) -> int:
        return self.H * self.group

    @property
    def C(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V


@dataclass
class Inputs:
    guards: dict[str, Guarded]
    flags: dict[str, Any]
    case: FusedCase

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**{name: x.tensor for name, x in self.guards.items()}, **self.flags}


def make(case: FusedCase, device: Any = "cpu") -> Inputs:
    N, HV, K, V, C = case.N, case.HV, case.K, case.V, case.C
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype, weight_dtype, gap = DTYPES[case.dtype], DTYPES[case.weight_dtype], 3 * case.gaps
    guards: dict[str, Guarded] = {}

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def add(name: str, x: torch.Tensor, dtype: torch.dtype, strides: Any = None, fill: float = NAN) -> None:
        guards[name] = Guarded.allocate(tuple(x.shape), dtype, device, fill, strides)
        guards[name].tensor.copy_(x)

    def rows(heads: int, n: int) -> tuple[int, int, int]:
        return heads * (n + gap) + gap, n + gap, 1

    x = randn(N, C)
    if case.large:
        x[:, : 2 * case.H * K] *= 1e25
    elif not case.l2norm and not case.conv:
        x[:, : 2 * case.H * K] *= K**-0.5 / 2  # or the recurrence is unstable
    add("mixed_qkv", x, dtype, (C + gap, 1))
    add("g", randn(N, HV, K), DTYPES[case.g_dtype], rows(HV, K))
    add("beta", 2 * randn(N, HV), DTYPES[case.beta_dtype], (HV + gap, 1))
    if case.A_log or case.gate == "softplus":
        add("A_log", torch.rand((HV,), generator=generator, device=device), torch.float32)
    if case.dt_bias is not None:
        bias = 12 * torch.rand((HV, K), generator=generator, device=device) - 10
        add("dt_bias", bias.flatten() if case.dt_bias == "flat" else bias, torch.float32)
    slots = N if case.indices is None else N + 3
    state, size = DTYPES[case.state], HV * V * K
    pitch = size + case.pitch // state.itemsize
    add("initial_state", randn(slots, HV, V, K), state, (pitch, V * K, K, 1))
    if case.indices is not None:
        for name in ("state_indices", "conv_state_indices")[: 1 + (case.separate and case.conv)]:
            order = torch.randperm(slots - 1, generator=generator, device=device)[:N] + 1
            if case.nulls:
                order[case.seed % 2 :: 3] = case.null_index if case.seed % 3 else -1
            if case.beyond:
                order[(case.seed + 1) % 2 :: 4] = slots if case.indices == "int32" or case.seed % 3 else BEYOND
            add(name, order, getattr(torch, case.indices), fill=0)
    if case.conv:
        weight = randn(C, 4) / 2
        if not case.l2norm:
            weight[: 2 * case.H * K] /= 20
        add("conv_weight", weight, weight_dtype)
        if case.bias:
            add("conv_bias", randn(C) / 4, weight_dtype)
        kept = randn(slots, C, 3)
        if case.conv_layout == "channels":
            add("conv_state", kept, dtype, (C * (3 + gap) + gap, 3 + gap, 1))
        else:
            add("conv_state", kept.transpose(1, 2), dtype, (3 * (C + gap) + gap, C + gap, 1))
            if case.conv_layout == "view":
                guard = guards["conv_state"]
                guards["conv_state"] = Guarded(guard.tensor.transpose(1, 2), guard.buffer)
    if case.norm:
        add("output_gate", randn(N, HV, V), dtype, rows(HV, V))
        add("norm_weight", 1 + randn(V) / 4, weight_dtype)
    if case.out:
        add("out", torch.full((N, HV, V), NAN, device=device), dtype, rows(HV, V))
    flags = dict(
        null_index=case.null_index, num_heads=case.H, scale=case.scale,
        lower_bound=-5.0 if case.gate == "safe" else None, norm_eps=1e-5, norm_activation=case.activation,
        use_qk_l2norm_in_kernel=case.l2norm, use_pdl=case.pdl,
    )  # fmt: skip
    return Inputs(guards, flags, case)


@dataclass
class Truth:
    o: torch.Tensor  # [N, HV, V]
    states: torch.Tensor  # the pool after the call
    conv_state: torch.Tensor | None


def slots_of(inputs: Inputs) -> list[tuple[int, int, int]]:
    """(sequence, slot, slot of conv_state) of each sequence that has both."""
    case, kw = inputs.case, inputs.kwargs
    if case.indices is None:
        return [(n, n, n) for n in range(case.N)]
    slots = kw["state_indices"].tolist()
    conv_slots = kw.get("conv_state_indices", kw["state_indices"]).tolist()
    P = len(kw["initial_state"])
    found = zip(range(case.N), slots, conv_slots, strict=True)
    return [(n, i, j) for n, i, j in found if case.null_index < i < P and case.null_index < j < P]


def composition(inputs: Inputs) -> Truth:
    """One part after the other: torch's convolution, the recurrence, the norm; fp64."""
    case, kw = inputs.case, inputs.kwargs
    H, HV, K, V, C = case.H, case.HV, case.K, case.V, case.C
    states = kw["initial_state"].double()
    conv_state = kw["conv_state"].double() if case.conv else None
    o = torch.zeros(case.N, HV, V, dtype=torch.float64, device=states.device)
    kept = slots_of(inputs)
    if not kept:
        return Truth(o, states, conv_state)
    rows, slots, conv_slots = (list(x) for x in zip(*kept, strict=True))
    x = kw["mixed_qkv"][rows].double()
    if conv_state is not None:
        past = conv_state if case.conv_layout != "taps" else conv_state.transpose(1, 2)
        window = torch.cat([past[conv_slots], x[..., None]], -1)
        bias = kw["conv_bias"].double() if case.bias else None
        x = torch.nn.functional.conv1d(window, kw["conv_weight"].double().view(C, 1, 4), bias, groups=C)[..., 0]
        x = torch.nn.functional.silu(x)
        past[conv_slots] = window[..., 1:]
    q, k, v = x.split([H * K, H * K, HV * V], -1)
    n = len(rows)
    y, S = recurrence(
        q.reshape(n, 1, H, K), k.reshape(n, 1, H, K), v.reshape(n, 1, HV, V), kw["g"][rows][:, None].double(),
        kw["beta"][rows][:, None].double(), kw["scale"], states[slots], True, case.l2norm, True, True,
        lower_bound=kw["lower_bound"], state_v_first=True, A_log=kw.get("A_log"), dt_bias=kw.get("dt_bias"),
    )  # fmt: skip
    assert S is not None
    states[slots], y = S, y[:, 0]
    if case.norm:
        z = kw["output_gate"][rows].double()
        act = z.sigmoid() * (1 if case.activation == "sigmoid" else z)
        y = y / (y.square().mean(-1, keepdim=True) + kw["norm_eps"]).sqrt() * kw["norm_weight"].double() * act
    o[rows] = y
    return Truth(o, states, conv_state)


def check(inputs: Inputs, run: Any) -> None:
    """run(**kwargs) -> (o, pool) against the composition; nothing is written beside what may be."""
    case, truth = inputs.case, composition(inputs)
    before = {name: guard.snapshot() for name, guard in inputs.guards.items()}
    kw = inputs.kwargs
    pool, kept = kw["initial_state"].clone(), kw["conv_state"].clone() if case.conv else None
    o, S = run(**kw)
    assert S is kw["initial_state"] and ("out" not in kw or o is kw["out"]) and o.dtype == DTYPES[case.dtype]
    for name, guard in inputs.guards.items():
        written = name in ("out", "initial_state", "conv_state")
        assert guard.untouched_outside(before[name], None if written else guard.tensor[:0]), name
    close(o, truth.o)
    close(S, truth.states)
    changed = (truth.states != pool.double()).flatten(1).any(1)
    assert torch.equal(S[~changed], pool[~changed])
    if kept is not None and truth.conv_state is not None:
        assert torch.equal(kw["conv_state"].double(), truth.conv_state)
    assert (o[(truth.o == 0).flatten(1).all(1)] == 0).all()


# Numbers of one head may all be rounded to bf16 as badly as can be; of many they are not.
OF_A_HEAD, OF_ALL = 2.0**-8 + 1e-4, 2.2e-3
MANY = 10_000


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    """Per slot or sequence, and head; and all together."""
    error, size = (x.double() - y).flatten(2).norm(dim=-1), y.flatten(2).norm(dim=-1)
    assert (error <= OF_A_HEAD * size).all(), (error / size).max()
    if y.numel() >= MANY:
        assert error.norm() <= OF_ALL * size.norm(), error.norm() / size.norm()


@st.composite
def cases(draw: st.DrawFn, max_sequences: int = 20, max_heads: int = 4) -> FusedCase:
    dtype = draw(st.sampled_from(("bf16", "bf16", "bf16", "fp16")))
    conv, l2norm = draw(st.booleans()), draw(st.sampled_from((True, True, False)))
    indices = draw(st.sampled_from(("int32", "int64", None)))
    return FusedCase(
        seed=draw(st.integers(0, 2**31 - 1)),
        N=draw(st.integers(0, max_sequences)),
        H=draw(st.integers(1, max_heads)),
        group=draw(st.sampled_from((1, 1, 2, 3))),
        dtype=dtype,
        g_dtype=dtype,
        beta_dtype=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        weight_dtype=draw(st.sampled_from((dtype, "fp32"))),
        gate=draw(st.sampled_from(("safe", "softplus"))),
        A_log=draw(st.booleans()),
        dt_bias=draw(st.sampled_from((None, "flat", "heads"))),
        l2norm=l2norm,
        scale=draw(st.sampled_from((None, 0.5))),
        state=draw(st.sampled_from(("fp32", "bf16"))),
        pitch=draw(st.sampled_from((0, 16, 4096))),
        indices=indices,
        null_index=draw(st.sampled_from((-1, 0))),
        nulls=indices is not None and draw(st.booleans()),
        beyond=indices is not None and draw(st.sampled_from((False, False, True))),
        conv=conv,
        bias=draw(st.booleans()),
        conv_layout=draw(st.sampled_from(("channels", "taps", "view"))),
        separate=draw(st.booleans()),
        norm=draw(st.booleans()),
        activation=draw(st.sampled_from(("sigmoid", "swish"))),
        gaps=draw(st.booleans()),
        out=draw(st.booleans()),
        large=dtype == "bf16" and l2norm and draw(st.sampled_from((False, False, False, True))),
        pdl=draw(st.booleans()),
    )
