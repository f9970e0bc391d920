"""Hypothesis strategies over the contract of chunk_kda, for the CPU and the GPU tests.

A `Case` is a call without its numbers: small, printable, shrinkable. `make` draws the numbers from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Around the chunk sizes that kernels use, 16, 32 and 64.
EDGE_LENGTHS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129)
MARGIN = 1024  # elements around each guarded tensor: more than a TMA box reaches past its tile


@dataclass(frozen=True)
class Layout:
    """Strides of a [B, T, H, D] tensor. head_first: stored as [B, H, T, D]. gaps: elements left between two rows of D,
    of the next dimension out, and of the last. offset: elements between 16-byte alignment and the first one."""

    head_first: bool = False
    gaps: tuple[int, int, int] = (0, 0, 0)
    offset: int = 0

    def strides(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        B, T, H, D = shape
        inner = D + self.gaps[0]
        outer = inner * (T if self.head_first else H) + self.gaps[1]
        batch = outer * (H if self.head_first else T) + self.gaps[2]
        return (batch, inner, outer, 1) if self.head_first else (batch, outer, inner, 1)


@dataclass(frozen=True)
class Case:
    seed: int
    lengths: tuple[int, ...]  # tokens of each sequence; all the same without cu_seqlens
    cu_seqlens: str | None = None  # None, "int32" or "int64"
    tail: int = 0  # tokens past the last sequence, with cu_seqlens
    H: int = 1
    group: int = 1  # HV = H * group
    K: int = 128
    V: int = 128
    dtype: str = "bf16"
    g_dtype: str = "bf16"
    beta_dtype: str = "bf16"
    gate: str = "safe"  # "safe", "softplus": in the kernel; "log": g is the log decay
    decay: str = "mixed"  # "strong", "weak", "mixed", "extreme"
    lower_bound: float = -5.0
    A_log: bool = True
    dt_bias: str | None = "flat"  # None, "flat" [HV * K], "heads" [HV, K]
    l2norm: bool = True
    beta_sigmoid: bool = True
    neg_eigval: bool = False
    scale: float | None = None
    initial_state: str | None = None
    final_state: str | None = None  # dtype of a preallocated one, "new" for output_final_state, or None
    state_v_first: bool = False
    out: bool = False  # o goes into a preallocated buffer
    zeros: bool = False  # some rows of q, k and v are zero
    qkv_layout: tuple[Layout, Layout, Layout] = (Layout(), Layout(), Layout())
    g_layout: Layout = Layout()
    out_layout: Layout = Layout()
    beta_strided: bool = False
    pool: int | None = None  # so many states more than sequences, which state_indices point into; every third is null
    null_index: int = -1
    index_dtype: str = "int32"  # of state_indices and offsets
    gap: int = 0  # bytes, a multiple of 16, between two states, and as many more between others
    has_initial: bool = False  # whether some sequences begin with zero
    checkpoint_interval: int | None = None
    offsets: int | None = None  # so many checkpoint_offsets a sequence; 0: one, in tensors without that dimension
    batch_invariant: bool = False
    state_offset: int = 0  # elements between 16-byte alignment and the states, A_log and dt_bias

    @property
    def HV(self) -> int:
        return self.H * self.group

    @property
    def N(self) -> int:
        return len(self.lengths)

    @property
    def B(self) -> int:
        return self.N if self.cu_seqlens is None else 1

    @property
    def T(self) -> int:
        if self.cu_seqlens is None:
            return self.lengths[0] if self.lengths else 0
        return sum(self.lengths) + self.tail

    @property
    def cuts(self) -> list[int]:
        cuts = [0]
        for length in self.lengths:
            cuts.append(cuts[-1] + length)
        return cuts

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.HV, self.V, self.K) if self.state_v_first else (self.N, self.HV, self.K, self.V)


@dataclass
class Guarded:
    """A tensor inside a larger buffer that is filled all around it."""

    tensor: torch.Tensor
    buffer: torch.Tensor

    @staticmethod
    def allocate(
        shape: tuple[int, ...], dtype: torch.dtype, device: Any, fill: float, strides: Any = None, offset: int = 0
    ) -> Guarded:
        """Nothing but `fill`, margins, the gaps between strides, and the tensor itself."""
        if strides is None:
            strides = torch.empty(shape, device="meta").stride()
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        buffer = torch.full((extent + offset + 2 * MARGIN,), fill, dtype=dtype, device=device)
        return Guarded(buffer.as_strided(shape, strides, MARGIN + offset), buffer)

    @staticmethod
    def holding(x: torch.Tensor, fill: float, layout: Layout | None = None, offset: int = 0) -> Guarded:
        strides = layout.strides(tuple(x.shape)) if layout else None  # type: ignore[arg-type]
        offset = layout.offset if layout else offset
        guarded = Guarded.allocate(tuple(x.shape), x.dtype, x.device, fill, strides, offset)
        guarded.tensor.copy_(x)
        return guarded

    def snapshot(self) -> torch.Tensor:
        return self.buffer.clone()

    def untouched_outside(self, before: torch.Tensor, view: torch.Tensor | None = None) -> torch.Tensor:
        """Whether the buffer is bit for bit what it was, but for `view` of it (default: the tensor). A 0-dim bool."""
        view = self.tensor if view is None else view
        expected = before.clone()
        expected.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.buffer.element_size()]
        return (expected.view(bits) == self.buffer.view(bits)).all()


@dataclass
class Call:
    """Arguments of chunk_kda. Every tensor lies in a Guarded: inputs between NaN, so that reading too far shows."""

    inputs: dict[str, Guarded]
    flags: dict[str, Any]
    case: Case

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: guarded.tensor for name, guarded in self.inputs.items()}

    @property
    def null(self) -> torch.Tensor:
        """[N]: which sequences are null."""
        indices = self.tensors.get("state_indices")
        if indices is None:
            return torch.zeros(self.case.N, dtype=torch.bool, device=self.tensors["q"].device)
        return indices <= self.case.null_index

    @property
    def kwargs(self) -> dict[str, Any]:
        """For chunk_kda, chunked and recurrence alike."""
        return {**self.tensors, **self.flags}

    @property
    def oracle_kwargs(self) -> dict[str, Any]:
        """The same with cu_seqlens on the CPU, where the references want its values anyway, and a state a sequence."""
        kwargs = self.kwargs
        if "cu_seqlens" in kwargs:
            kwargs["cu_seqlens"] = torch.tensor(self.case.cuts)
        if "state_indices" in kwargs:
            indices = kwargs.pop("state_indices")
            states, kept = kwargs["initial_state"].new_zeros(self.case.state_shape), ~self.null
            states[kept] = kwargs["initial_state"][indices[kept]]
            kwargs["initial_state"] = states
        if "has_initial_state" in kwargs:
            has = kwargs.pop("has_initial_state")
            kwargs["initial_state"] = torch.where(has.view(-1, 1, 1, 1), kwargs["initial_state"], 0)
        for name in ("null_index", "batch_invariant", *CHECKPOINTS):
            kwargs.pop(name, None)
        return {**kwargs, "output_final_state": True}


CHECKPOINTS = ("checkpoint_offsets", "checkpoint_state", "checkpoint_indices")
POISON = -7.25  # where a state may be written


def make(case: Case, device: Any = "cpu") -> Call:
    B, T, H, HV, K, V = case.B, case.T, case.H, case.HV, case.K, case.V
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype, g_dtype = DTYPES[case.dtype], DTYPES[case.g_dtype]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    q, k, v = randn(B, T, H, K), randn(B, T, H, K), randn(B, T, HV, V)
    if case.l2norm:
        q = q * 4 ** rand(B, T, H, 1)
    else:
        # |k| <= 1, or the recurrence is unstable and nothing can be compared.
        q = q * K**-0.5
        k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-6) * (1 - 0.5 * rand(B, T, H, 1))
    if case.zeros:
        q, k, v = (torch.where(rand(*x.shape[:3], 1) < 0.2, 0, x) for x in (q, k, v))
    beta = 2 * randn(B, T, HV) if case.beta_sigmoid else rand(B, T, HV)
    g, A_log, dt_bias = _gate(case, randn, rand)

    arrays: dict[str, Guarded] = {}
    nan = float("nan")
    for name, x, layout in zip("qkv", (q, k, v), case.qkv_layout, strict=True):
        arrays[name] = Guarded.holding(x.to(dtype), nan, layout)
    arrays["g"] = Guarded.holding(g.to(g_dtype), nan, case.g_layout)
    beta = beta.to(DTYPES[case.beta_dtype])
    if case.beta_strided:
        arrays["beta"] = Guarded.allocate((B, T, HV), beta.dtype, device, nan, (T * (HV + 1) + 3, HV + 1, 1))
        arrays["beta"].tensor.copy_(beta)
    else:
        arrays["beta"] = Guarded.holding(beta, nan)
    if A_log is not None:
        arrays["A_log"] = Guarded.holding(A_log, nan, offset=case.state_offset)
    if dt_bias is not None:
        dt_bias = dt_bias.flatten() if case.dt_bias == "flat" else dt_bias
        arrays["dt_bias"] = Guarded.holding(dt_bias, nan, offset=case.state_offset)
    if case.initial_state is not None:
        states = case.N
        if case.pool is not None:
            states += case.pool
            order = torch.randperm(states, generator=generator, device=device)[: case.N]
            order[case.seed % 3 :: 3] = -1
            arrays["state_indices"] = Guarded.holding(order.to(getattr(torch, case.index_dtype)), 0)
        state = randn(states, *case.state_shape[1:]).to(DTYPES[case.initial_state])
        if case.pool is not None and case.null_index == 0:
            state[:1] = nan  # which nobody may read
        if case.has_initial:
            has = rand(case.N) < 0.5
            arrays["has_initial_state"] = Guarded.holding(has, True)
            if case.pool is None:
                state[~has] = nan
            else:
                state[order[~has & (order >= 0)]] = nan
        arrays["initial_state"] = guarded_states(state, case, nan)
    if case.cu_seqlens is not None:
        cuts = torch.tensor(case.cuts, dtype=getattr(torch, case.cu_seqlens), device=device)
        arrays["cu_seqlens"] = Guarded.holding(cuts, 1 << 30)
    flags = dict(
        scale=case.scale,
        output_final_state=case.final_state == "new",
        use_qk_l2norm_in_kernel=case.l2norm,
        use_gate_in_kernel=case.gate != "log",
        use_beta_sigmoid_in_kernel=case.beta_sigmoid,
        allow_neg_eigval=case.neg_eigval,
        safe_gate=case.gate == "safe" or (case.gate == "log" and case.decay != "extreme"),
        lower_bound=case.lower_bound if case.gate == "safe" else None,
        state_v_first=case.state_v_first,
    )
    if case.pool is not None:
        flags["null_index"] = case.null_index
    if case.batch_invariant:
        flags["batch_invariant"] = True
    if case.offsets is not None:
        arrays.update(_checkpoints(case, generator, device))
    return Call(arrays, flags, case)


def guarded_states(state: torch.Tensor, case: Case, fill: float) -> Guarded:
    """States, with gaps between them."""
    size = state[:1].numel() or 1
    strides = (size + case.gap // state.element_size(), *state.stride()[1:])
    guarded = Guarded.allocate(tuple(state.shape), state.dtype, state.device, fill, strides, case.state_offset)
    guarded.tensor.copy_(state)
    return guarded


def _checkpoints(case: Case, generator: torch.Generator, device: Any) -> dict[str, Guarded]:
    """Offsets at both ends of a sequence, at its chunks' ends, in chunks and past the end, and room for states."""
    N, per = case.N, max(case.offsets or 0, 1)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    lengths = torch.tensor(case.lengths, device=device).view(N, 1).expand(N, per)
    at = (random(N, per) * (lengths + 1)).long()
    kinds = torch.stack([0 * at, at, at // 16 * 16, at // 32 * 32, lengths, lengths + 1 + at])
    choice = (random(N, per) * len(kinds)).long()
    offsets = kinds.gather(0, choice[None])[0].to(getattr(torch, case.index_dtype))
    dtype = torch.bfloat16 if case.seed % 2 else torch.float32
    arrays: dict[str, Guarded] = {}
    if case.seed // 2 % 2:
        rows = N * per + 2
        indices = torch.randperm(rows, generator=generator, device=device)[: N * per].view(N, per)
        indices = torch.where(random(N, per) < 0.2, -1, indices)
        if case.pool is not None and case.null_index == 0:
            indices = torch.where(indices == 0, -1, indices)
        states = torch.full((rows, *case.state_shape[1:]), POISON, dtype=dtype, device=device)
        arrays["checkpoint_state"] = guarded_states(states, replace(case, state_offset=0), POISON)
    else:
        shape = (N, *case.state_shape[1:]) if case.offsets == 0 else (N, per, *case.state_shape[1:])
        states = torch.full(shape, POISON, dtype=dtype, device=device)
        arrays["checkpoint_state"] = Guarded.holding(states, POISON)
        indices = None
    for name, x in (("checkpoint_offsets", offsets), ("checkpoint_indices", indices)):
        if x is not None:
            arrays[name] = Guarded.holding(x[:, 0] if case.offsets == 0 else x, 0)
    return arrays


def _gate(case: Case, randn: Any, rand: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    B, T, HV, K = case.B, case.T, case.HV, case.K
    if case.gate == "log":
        if case.decay == "extreme":  # log uniform from -1e-6 to -1000, token by token
            return -(10 ** (9 * rand(B, T, HV, K) - 6)), None, None
        low, high = {"strong": (0.0, 0.0), "weak": (-6.0, -4.0), "mixed": (-6.0, 0.0)}[case.decay]
        g = -5 * 10 ** (low + (high - low) * rand(B, T, HV, K))
        if case.decay == "strong":
            g = g * rand(B, T, HV, K).sqrt()
        # Both ends of the range are allowed, and so are met.
        pick = rand(B, T, HV, K)
        return torch.where(pick < 0.02, -5, torch.where(pick > 0.98, 0, g)), None, None
    # The gates of FlashKDA's benchmark (strong), a token that keeps 99.8 % (weak), everything between (mixed).
    bias = {"strong": rand(HV, K), "weak": rand(HV, K) - 8, "mixed": 12 * rand(HV, K) - 10}
    bias["extreme"] = 200 * rand(HV, K) - 100 if case.gate == "softplus" else 12 * rand(HV, K) - 6
    A_log = rand(HV) * (0 if case.decay == "weak" else 1)
    if case.decay == "extreme":
        A_log = 2.3 * rand(HV)  # exp(A_log) to 10: 1000 nats a token with the bias of 100
    dt_bias = bias[case.decay]
    g = randn(B, T, HV, K)
    if case.dt_bias is None:
        g = g + dt_bias
    return g, A_log if case.A_log or case.gate == "softplus" else None, dt_bias if case.dt_bias else None


def _layouts(aligned_to: int) -> st.SearchStrategy[Layout]:
    """Mostly contiguous; then what TMA can address as it is; then what has to be copied first."""
    n = aligned_to
    gap = st.sampled_from((0, 0, n, 3 * n, 128))
    return st.one_of(
        st.just(Layout()),
        st.builds(Layout, st.booleans(), st.tuples(gap, gap, gap)),
        st.sampled_from((Layout(gaps=(1, 0, 0)), Layout(offset=1), Layout(True, (0, n // 2, 1)))),
    )


def lengths(max_tokens: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Any number of sequences, none too, that together have at most `max_tokens` tokens."""

    def fit(drawn: list[int]) -> tuple[int, ...]:
        kept, total = [], 0
        for n in drawn:
            n = min(n, max_tokens - total)
            kept.append(n)
            total += n
        return tuple(kept)

    one = st.one_of(st.sampled_from(EDGE_LENGTHS), st.integers(0, max_tokens))
    return st.lists(one, max_size=8).map(fit)


@st.composite
def cases(draw: st.DrawFn, *, served: bool, max_tokens: int, max_heads: int = 4) -> Case:
    """served: what the GPU kernel takes. Otherwise the whole contract, small."""
    varlen = draw(st.sampled_from((None, "int32", "int64")))
    if varlen:
        seq = draw(lengths(max_tokens))
    else:
        n = draw(st.sampled_from((1, 1, 2, 3, 0)))
        longest = max_tokens // max(n, 1)
        edge = [x for x in EDGE_LENGTHS if x <= longest]
        seq = (draw(st.one_of(st.sampled_from(edge), st.integers(0, longest))),) * n
    gate = draw(st.sampled_from(("safe", "log", "softplus")))
    beta_sigmoid = draw(st.booleans())
    neg_eigval = beta_sigmoid and draw(st.booleans())
    states = (None, "bf16", "fp32")
    pool = draw(st.sampled_from((None, None, 0, 3))) if served else None
    dtype = draw(st.sampled_from(("bf16", "bf16", "fp16") if served else ("bf16", "fp16", "fp32", "fp64")))
    # the dtypes that kernels have: g like q, or in fp32
    g_dtype = draw(st.sampled_from((dtype, "fp32") if served else ("bf16", "fp32", "fp64")))
    dim = st.sampled_from((1, 3, 8, 16, 20))
    if served:  # 64 only with the commonest of the rest, or each example would wait for a compilation
        common = dtype == g_dtype == "bf16" and not neg_eigval
        dim = st.sampled_from((128, 128, 64)) if common else st.just(128)
    K, V = draw(dim), draw(dim)
    keeps = served and common and K == V == 128
    interval = draw(st.sampled_from((None, 32, 64, 96) if keeps and pool is None else (None,)))
    offsets = draw(st.sampled_from((None, None, 0, 1, 3) if keeps and interval is None else (None,)))
    initial_state = draw(st.sampled_from(states if pool is None else states[1:]))
    quantum = 4 if g_dtype == "fp32" else 8
    return Case(
        seed=draw(st.integers(0, 2**31 - 1)),
        lengths=seq,
        cu_seqlens=varlen,
        tail=draw(st.sampled_from((0, 0, 0, 1, 20))) if varlen else 0,
        H=draw(st.integers(1, max_heads)),
        group=draw(st.sampled_from((1, 1, 2, 3) if served else (1, 2, 3))),
        K=K,
        V=V,
        dtype=dtype,
        g_dtype=g_dtype,
        beta_dtype=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        gate=gate,
        decay=draw(st.sampled_from(("strong", "weak", "mixed", "extreme"))),
        lower_bound=draw(st.sampled_from((-5.0, -5.0, -1.0, -0.25, -2.5))),
        A_log=draw(st.booleans()),
        dt_bias=draw(st.sampled_from((None, "flat", "heads"))),
        l2norm=draw(st.booleans()),
        beta_sigmoid=beta_sigmoid,
        neg_eigval=neg_eigval,
        scale=draw(st.sampled_from((None, None, 1.0, 0.5))),
        initial_state=initial_state,
        final_state=draw(st.sampled_from((*states, "new"))) if pool is None else None,
        pool=pool,
        state_v_first=draw(st.booleans()),
        out=draw(st.booleans()),
        zeros=draw(st.sampled_from((False, False, True))),
        qkv_layout=draw(st.tuples(*[_layouts(8)] * 3)),
        g_layout=draw(_layouts(quantum)),
        out_layout=draw(_layouts(8)),
        beta_strided=draw(st.sampled_from((False, False, True))),
        checkpoint_interval=interval,
        offsets=offsets,
        state_offset=draw(st.sampled_from((0, 0, 1))) if pool is None else 0,  # a pool is not copied
        null_index=draw(st.sampled_from((-1, 0))) if pool is not None else -1,
        index_dtype=draw(st.sampled_from(("int32", "int64"))),
        gap=draw(st.sampled_from((0, 16, 4096))) if served else 0,
        has_initial=served and initial_state is not None and draw(st.booleans()),
        batch_invariant=served and draw(st.sampled_from((False, False, True))),
    )
