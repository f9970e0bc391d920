"""The gate: g, A_log and dt_bias -> the log2 decay of each token and channel, and the anchors of a chunk.

`factor` and `slope_of` are its formulas; reference/transforms.py has the same ones, `safe_gate` and `softplus_gate`.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from . import fragments, ptx
from .layout import ANCHORS, BOX, DECAY, OFFSETS, SHIFTS, TO_END, C, Stage

LOG2_E = 1.4426950408889634
# fp16 holds gates as multiples of these
SIGMOID_BITS = 15
SIGMOID_SCALE = float(1 << SIGMOID_BITS)
G_SCALE = 2048.0
G_MOST = 24 * G_SCALE
A_MOST = {"safe": 44.0, "softplus": 20.0, "log": 0.0}  # of A_log: see `slope_of`
# log2(1 + t) / t for t in [0, 1], to 2^-14, highest power first
LOG2_1P = (0.05965054, -0.22711755, 0.44189775, -0.71698725, 1.44261324)
ROUND = 1.5 * 2**23  # x + ROUND has the integer nearest to x in its low bits


class Form(NamedTuple):
    """How a kernel has its gate: what the functions here are given first."""

    kind: str  # "safe", "softplus" or "log"
    g_dtype: str
    K: int
    tiles: Stage | None  # None where g lies elsewhere
    rolled: bool  # whether columns are gone through in a loop

    @property
    def g_boxes(self) -> int:
        return 4 if self.g_dtype == "fp32" else 2

    @property
    def k_boxes(self) -> int:
        return self.K // 64

    @property
    def frames(self) -> int:
        """Of a chunk, with an anchor each: of 16 tokens, which lose 2^-115 at most, or 8."""
        return 2 if self.kind == "safe" else 4

    @property
    def step(self) -> int:
        """What anchors are multiples of."""
        return 1 if self.kind == "safe" else 2


class Inputs(NamedTuple):
    """What a gate is made from besides g. The gate's functions take it whole, so that more can be added here."""

    A_log: Int64  # address: [H] fp32, or 0
    dt_bias: Int64  # address: [H, K] fp32, or 0
    lower_bound: Float32
    flags: Int32

    @staticmethod
    def of(numbers) -> Inputs:
        """Of what a kernel is given."""
        return Inputs(numbers.A_log, numbers.dt_bias, numbers.lower_bound, numbers.flags)


@cute.jit
def parameters(form: cutlass.Constexpr, inputs: Inputs, h: Int32, half: Int32, bias_at: Int32, lane: Int32):
    """slope; and bias of the warp's channels, left in shared memory: see `factor`."""
    slope, shift = slope_of_head(form, inputs, h)
    if const_expr(form.kind != "log"):
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(2):
            x = Float32(0.0)
            if (inputs.dt_bias != 0) & (half < form.k_boxes):
                x = fragments.global_f32(inputs.dt_bias, Int64(h * form.K + 64 * half + 32 * i + lane))
            ptx.sts_f32(bias_at + (32 * i + lane) * 4, bias(form, slope, shift, x))
        cute.arch.sync_warp()
    return slope


def bias(form: cutlass.Constexpr, slope: Float32, shift: Float32, dt_bias: Float32) -> Float32:
    """Finite unless dt_bias is NaN: -inf in g must stay no decay (see `clear`)."""
    x = ptx.fma(slope if form.kind == "safe" else Float32(LOG2_E), dt_bias, shift)
    return -ptx.minimum(-ptx.minimum(x, Float32(1e38)), Float32(1e38))


@cute.jit
def slope_of_head(form: cutlass.Constexpr, inputs: Inputs, h: Int32):
    """(slope, shift) for `factor`, of a head."""
    a = Float32(0.0)
    if const_expr(form.kind != "log"):
        if inputs.A_log != 0:
            a = fragments.global_f32(inputs.A_log, Int64(h))
    return slope_of(form, a)


def slope_of(form: cutlass.Constexpr, A_log: Float32):
    """Finite for every A_log but NaN. Beyond A_MOST sigmoid is a step anyway. Of softplus no less than 24 log2 of
    decay is lost there unless it is 2^x to the last bit: then exp(A_log) 2^x is exp(A_MOST) 2^(x + shift)."""
    a_most = A_MOST[form.kind]
    if form.kind == "log":
        return Float32(-LOG2_E * G_SCALE), Float32(0.0)
    e = ptx.ex2(ptx.minimum(A_log, Float32(a_most)) * LOG2_E)
    if form.kind == "safe":
        return ptx.minimum(-LOG2_E * e, Float32(-1e-37)), Float32(-SIGMOID_BITS)  # not 0, for g of -inf
    over = ptx.minimum(ptx.maximum(A_log - a_most, Float32(0.0)), Float32(1e30))
    return G_SCALE * e, over * LOG2_E


@cute.jit
def of_chunk(
    form: cutlass.Constexpr, slope: Float32, bias_at: Int32, half: Int32, sStage: Int32, tables: Int32,
    inputs: Inputs, tokens: Int32, lane: Int32,
):  # fmt: skip
    """64 channels of a chunk."""
    sG = sStage + form.tiles.at_g + half * form.tiles.kr_half
    if tokens < C:
        clear(form, lane, tokens, sG)
        cute.arch.sync_warp()
    # register j of a tile: channels 8 (j % 2), tokens 8 (j // 2), as an operand A has them
    tile = sG + (lane % 8 + lane // 16 * 8) * 128 + ((lane // 8 % 2) ^ (lane % 8)) * 16
    bias_at += lane // 4 * 4
    sums = [(Float32(0.0),) * 4] * 2
    if const_expr(form.rolled):
        acc = cute.make_rmem_tensor((8,), Float32)
        for i in cutlass.range_constexpr(8):
            acc[i] = Float32(0.0)
        for kk in cutlass.range(4, unroll=1):
            words = factors(form, raw_of(form, sG, tile, kk, lane), slope, bias_at, kk)
            sums = add_column(words, kk, lane, [tuple(acc[4 * s + i] for i in range(4)) for s in range(2)])
            for i in cutlass.range_constexpr(8):
                acc[i] = sums[i // 4][i % 4]
            cute.arch.sync_warp()
            store_column(words, kk, tile)
        sums = [tuple(acc[4 * s + i] for i in range(4)) for s in range(2)]
    else:
        # 16 bits: the next column is loaded before this one is stored. fp32 has no registers for it.
        ahead = form.g_dtype != "fp32"
        raw = list(raw_of(form, sG, tile, 0, lane)) if ahead else None
        for kk in cutlass.range_constexpr(4):
            if const_expr(not ahead):
                raw = raw_of(form, sG, tile, kk, lane)
            words = factors(form, raw, slope, bias_at, kk)
            if const_expr(ahead and kk < 3):
                raw = list(raw_of(form, sG, tile, kk + 1, lane))
            sums = add_column(words, kk, lane, sums)
            cute.arch.sync_warp()
            store_column(words, kk, tile)
    lam = log2_of_factor(form, inputs)
    for i in cutlass.range_constexpr(2):
        channel = lane % 4 * 16 + 8 * i + lane // 4
        at = sStage + form.tiles.at_t + half * ANCHORS + channel // 2 * 16 + channel % 2 * 4
        mid, total = [sums[s][2 * i] for s in range(2)], [sums[s][2 * i + 1] for s in range(2)]
        anchors(form, mid, total, at, channel % 2 * 2, tables + DECAY + (64 * half + channel) * 4, lam)


def add_column(words, kk, lane: Int32, sums):
    """Of 16-channel column kk, the sum over the first 8 tokens in accumulator column 2 kk, over all 16 in 2 kk + 1:
    operand B has ones in these columns."""
    first, whole = fragments.ones_if(lane // 8 == kk), fragments.ones_if(lane // 4 == 2 * kk + 1)
    return [ptx.mma_f16(words[s], first, whole, sums[s]) for s in range(2)]


def store_column(words, kk, tile: Int32) -> None:
    for s in range(2):
        ptx.stmatrix_x4((tile ^ (kk * 32)) + s * 2048, words[s], trans=True)


@cute.jit
def clear(form: cutlass.Constexpr, lane: Int32, valid: Int32, sG: Int32):
    """g behind the sequence's end becomes what makes no decay: 0, or -inf before sigmoid or softplus."""
    no_decay = Uint32(0)
    if const_expr(form.kind != "log"):
        no_decay = Uint32({"bf16": 0xFF80FF80, "fp16": 0xFC00FC00, "fp32": 0xFF800000}[form.g_dtype])
    for j in cutlass.range_constexpr(C * 8 // 32):  # 8 pieces of 16 bytes in a row of a box
        if lane + 32 * j >= valid * 8:
            for box in cutlass.range_constexpr(form.g_boxes // 2):
                ptx.sts_16(sG + box * BOX + (lane + 32 * j) * 16, no_decay)


def raw_of(form: cutlass.Constexpr, sG: Int32, tile: Int32, kk: int, lane: Int32):
    """g of a 16-channel column, block of tokens by block: by register and token. In fp32 a row is as long as two of
    the fp16 that take its place, column after column, always behind what is read."""
    for s in range(2):
        if form.g_dtype != "fp32":
            yield ptx.ldmatrix_x4((tile ^ (kk * 32)) + s * 2048, trans=True)
            continue
        raw = []
        for j in range(4):
            word = (16 * kk + 8 * (j % 2)) % 32 + lane // 4
            box = sG + kk // 2 * BOX
            token = 16 * s + 8 * (j // 2) + lane % 4 * 2
            raw.append([
                ptx.lds_f32(box + t * 128 + (word % 4) * 4 + (((word // 4) ^ (t % 8)) * 16))
                for t in (token, token + 1)
            ])  # fmt: skip
        yield raw


def factors(form: cutlass.Constexpr, raw, slope: Float32, bias_at: Int32, kk: int):
    """As operands B, fp16."""
    bias = [Float32(0.0)] * 2
    if form.kind != "log":
        bias = [ptx.lds_f32(bias_at + (16 * kk + 8 * nt) * 4) for nt in range(2)]
    out = []
    for r in raw:
        pairs = r if form.g_dtype == "fp32" else [fragments.pair(x, form.g_dtype) for x in r]
        out.append(tuple(ptx.pack_f16(*(factor(form, x, slope, bias[j % 2]) for x in pairs[j])) for j in range(4)))
    return out


def factor(form: cutlass.Constexpr, g: Float32, slope: Float32, bias: Float32) -> Float32:
    """What the log2 decay is a negative multiple of. safe: 2^15 sigmoid(exp(A_log) (g + dt_bias)) = 1 / (2^-15 +
    2^(slope g + bias)). softplus: 2^11 exp(A_log) log2(1 + 2^(log2(e) (g + dt_bias))), log: -2^11 log2(e) g, both
    24 * 2^11 at most."""
    if form.kind == "safe":
        return ptx.rcp(1.0 / SIGMOID_SCALE + ptx.ex2(ptx.fma(g, slope, bias)))
    if form.kind == "softplus":
        x = ptx.fma(g, Float32(LOG2_E), bias)
        t = ptx.ex2(-ptx.absolute(x))
        p = Float32(LOG2_1P[0])
        for c in LOG2_1P[1:]:
            p = ptx.fma(p, t, Float32(c))
        g = ptx.fma(t, p, ptx.maximum(x, Float32(0.0)))
    return ptx.minimum(g * slope, Float32(G_MOST))


def decay_of(form: cutlass.Constexpr, g: Float32, slope, bias: Float32, inputs: Inputs) -> Float32:
    """exp of the log decay that the gate makes of g, in fp32, for decoding; slope: what `slope_of` returns."""
    slope, shift = slope
    if form.kind == "safe":
        x = ptx.rcp(1.0 + ptx.ex2((g + bias) * slope))
        return ptx.ex2(x * inputs.lower_bound * LOG2_E)
    if form.kind == "softplus":
        x = ptx.fma(g + bias, Float32(LOG2_E), shift)
        t = ptx.ex2(-ptx.absolute(x))
        p = Float32(LOG2_1P[0])
        for c in LOG2_1P[1:]:
            p = ptx.fma(p, t, Float32(c))
        return ptx.ex2(slope * (-1.0 / G_SCALE) * ptx.fma(t, p, ptx.maximum(x, Float32(0.0))))
    return ptx.ex2(g * LOG2_E)


def log2_of_factor(form: cutlass.Constexpr, inputs: Inputs) -> Float32:
    """lam: the log2 decay is lam times the gate's factor."""
    if form.kind == "safe":
        return inputs.lower_bound * (LOG2_E / SIGMOID_SCALE)
    return Float32(-1.0 / G_SCALE)


def anchors(form: cutlass.Constexpr, mid, total, at: Int32, half: Int32, decay: Int32, lam: Float32) -> None:
    """The integer anchors p_i of a channel's frames, half way between G before and behind their tokens, and what
    depends on them. G counts from the chunk's start.

    To the tables at `at`, for both channels of a pair. OFFSETS: what makes G - p_0 and G - p_1 of a sum from the start
    of a block of 16 tokens; the same for p_2 and p_3. TO_END: 2^(G_C - p) of the last p. SHIFTS: 2^p_0, 2^(p_1 - p_0),
    2^(p_2 - p_1), 2^(p_3 - p_2), or the roots of the last three, where they may be less than the least that there is.
    2^G_C, the decay of the chunk, goes to `decay`.
    """
    middle, n = lam * total[0], form.step
    end = ptx.fma(lam, total[1], middle)
    G = [Float32(0.0), middle, end]
    if form.frames == 4:
        G[1:2] = lam * mid[0], middle, ptx.fma(lam, mid[1], middle)
    p = []  # a multiple of the anchor
    for i in range(form.frames):
        p.append(ptx.fma(G[i] + G[i + 1], Float32(0.5 / n), Float32(ROUND)) - ROUND)
        start = G[i * 2 // form.frames * form.frames // 2]
        ptx.sts_f32(at + OFFSETS[i // 2] + i % 2 * 8, ptx.fma(p[i], Float32(-n), start))
        shift = (n * p[0] if i == 0 else p[i] - p[i - 1]) + ROUND  # in the low bits
        shift = ptx.pow2(ptx.maximum(shift, Float32(ROUND - 127)))
        ptx.sts_high(at - half + SHIFTS[i // 2] + i % 2 * 4, shift)
    ptx.sts_f32(at + TO_END, ptx.ex2(ptx.fma(p[-1], Float32(-n), end)))
    ptx.sts_f32(decay, ptx.ex2(end))
