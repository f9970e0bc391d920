"""One token a sequence with what stands around KDA in a layer, in one launch: a causal convolution of width 4 and SiLU
make q, k and v of packed columns, then the step of `decode_sm90`, then o is normed and gated. Both may be left out.

    x_t = silu(sum_i w_i x_(t - 3 + i) + bias)      per channel; the last three inputs are kept, in conv_state
    S, o_t as in decode_sm90
    o_t <- o_t / sqrt(mean(o_t^2) + eps) * weight * act(z_t)      per head

A block of four warps has 32 rows of one head's state, as there. Reading and writing the state is all that takes time:
small blocks keep much of it in flight, and a few heads reach more SMs. A head's rows of a block are one piece of
memory, which one bulk copy brings to shared memory while all threads make a channel each of q, k and the decay. Four
rows at a time are then in a warp's registers, of which 64 a thread suffice, for eight blocks on an SM. (Asked for by
plain loads, the state shared a scoreboard with what q and k are made of, which then waited for it.)

The norm needs the 128 rows of a head, so its four blocks are a cluster. The other way, a block of 128 rows, has 64 KiB
that are read, then all wait, then are written: three of them on an SM, and a quarter of the SMs at N = 1.

The four blocks tell one another a number each, the sum of their squares, into shared memory with an mbarrier that
counts its bytes. It also says that a block has read what the convolution keeps of q and k. Each block needs all of
that, which is little beside the state, and a quarter of it is overwritten by each, once all four have told. Heads of v
that share q and k (GVA) are gone through by the same cluster, one after the other, for the same reason: the last one
overwrites. Without a convolution they are apart, and without a norm too there are no clusters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.memory import SmemAllocator

from . import barriers, fragments, gate, ptx, scalars, state_io
from .arguments import TYPES, zeros
from .config import (
    CONV_FP32,
    INDEX_INT64,
    INITIAL,
    L2NORM,
    NORM_FP32,
    PDL,
    SWISH,
    KdaFusedDecodeConfig,
)
from .decode_sm90 import NUMBERS, ROWS, WARP_ROWS, KdaDecodeSm90

TAPS = 3  # inputs that the convolution keeps
Z_WARP, LOAD_WARP, V_WARP = 0, 1, 3  # which norms, asks for the state, makes the block's rows of v
AT_ONCE = 4  # rows of a warp, as `four_rows` takes
BLOCKS = 8  # on an SM: 64 registers a thread
LARGE = 2.0**50  # of q and k, beyond which they are made smaller, as in decode_sm90


class Numbers(NamedTuple):
    """What the kernel is given besides tensors, in the order of a launch. An address is 0 where there is nothing."""

    beta: Int64  # [N, HV] logits, bf16, fp16 or fp32
    beta_row: Int64  # elements from a row to the next
    A_log: Int64  # [HV] fp32
    dt_bias: Int64  # [HV, K] fp32
    state: Int64  # [P, HV, V, K] bf16 or fp32: each dense
    state_pitch: Int64  # bytes from one to the next
    P: Int32
    state_indices: Int64  # [N] int32 or int64; sequence n has state n without
    null_index: Int32  # up to it an index is none
    conv_weight: Int64  # [C, 4] bf16 (or fp16), or fp32; C: the columns of x
    conv_bias: Int64  # [C] like conv_weight
    conv_state: Int64  # [slots, C, 3] like x
    conv_slot: Int64  # bytes from a slot, channel and input to the next
    conv_channel: Int32
    conv_tap: Int32
    conv_slots: Int32
    conv_indices: Int64  # as state_indices, in the same dtype, of slots
    norm_weight: Int64  # [V] bf16 (or fp16), or fp32
    norm_eps: Float32
    group: Int32  # HV / H
    scale: Float32
    lower_bound: Float32
    flags: Int32


class Asked(NamedTuple):
    """Of a channel, from memory, as bits: its input, and for a convolution weights, bias and the last three inputs, the
    oldest one first."""

    x: Uint32
    weights: tuple
    bias: Uint32
    kept: tuple


class KdaFusedDecodeSm90(KdaDecodeSm90):
    def __init__(self, config: KdaFusedDecodeConfig):
        super().__init__(config)
        self.parts = config.V // ROWS
        self.cluster = [self.parts, 1, 1] if config.conv or config.norm else None

    # ------------------------------------------------------------------ host side

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # [N, 2 H K + HV V]
        mG: cute.Tensor,  # [N, HV, K]
        mZ: cute.Tensor,  # [N, HV, V]; not looked at without a norm
        mO: cute.Tensor,  # [N, HV, V]
        *rest: Any,  # Numbers, one by one, and the stream
    ):
        numbers, stream = Numbers(*rest[:-1]), rest[-1]
        N, HV, group = cute.size(mG.shape[0]), cute.size(mG.shape[1]), numbers.group
        heads = group if const_expr(self.config.conv) else 1  # of a block, one after the other
        sequences = cutlass.min(N, 65535)  # in a column of the grid
        self.kernel(mX, mG, mZ, mO, numbers, (Int64(1 << 31) + group - 1) // group).launch(
            grid=[HV // heads * self.parts, sequences, cute.ceil_div(N, sequences)], block=[128, 1, 1],
            cluster=self.cluster, stream=stream, min_blocks_per_mp=BLOCKS, preferred_smem_carveout=75,
            use_pdl=(numbers.flags & PDL) != 0,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor, mG: cute.Tensor, mZ: cute.Tensor, mO: cute.Tensor,
        numbers: Numbers, of_group: Int64,
    ):  # fmt: skip
        K, V, conv, norm = self.config.K, self.config.V, self.config.conv, self.config.norm
        N, HV, flags = cute.size(mG.shape[0]), cute.size(mG.shape[1]), numbers.flags
        smem = SmemAllocator()

        def table(size):
            return smem.allocate_tensor(Uint8, cute.make_layout(size), byte_alignment=128).iterator.toint()

        sS, sQ, sK, sA = (table(n * K * 4) for n in (ROWS, 1, 1, 1))
        sV, sO, sNumbers, sTold, sKept = (table(n) for n in (ROWS * 4, ROWS * 4, 4 * NUMBERS, 32, 2 * ROWS * 16))
        bars = smem.allocate_tensor(Int64, cute.make_layout(3), byte_alignment=8).iterator
        arrived, told = bars, bars + 1
        thread, (block, y, z) = cute.arch.thread_idx()[0], cute.arch.block_idx()
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        tables = sQ, sK, sA, sV, sNumbers + warp * NUMBERS
        heads = numbers.group if const_expr(conv) else 1
        part, first_head, n = block % self.parts, block // self.parts * heads, z * cute.arch.grid_dim()[1] + y
        exists, n = n < N, cutlass.min(n, N - 1)

        if warp == LOAD_WARP:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(3):
                    cute.arch.mbarrier_init(bars + i, 1)
                cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster is not None):
            cute.arch.cluster_arrive_relaxed()
        cute.arch.griddepcontrol_wait()  # nothing is read before, as the last kernel may have written any of it
        cute.arch.griddepcontrol_launch_dependents()
        index = self.ask_index(numbers, n, lane)
        if const_expr(self.cluster is not None):  # the barriers are there, long before an index is
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        slot = self.slot_of(index, numbers, lane)
        conv_slot, slot = (cute.arch.shuffle_sync(slot, 1 if const_expr(conv) else 0), cute.arch.shuffle_sync(slot, 0))
        state_at, kept_at = numbers.state + slot * numbers.state_pitch, Int64(0)
        if const_expr(conv):
            kept_at = numbers.conv_state + conv_slot * numbers.conv_slot
        S = cute.make_rmem_tensor((AT_ONCE * self.keys,), Float32)
        gate_inputs = gate.Inputs.of(numbers)
        row = part * ROWS + lane  # of V, in warps that have one a lane
        if exists & (slot >= 0) & (conv_slot >= 0):
            at = state_at + self.bytes_of(first_head * V + part * ROWS, flags)
            self.ask_state(at, sS, bars, Int32(0), warp, flags)
            for e in cutlass.range(heads, unroll=1):
                h = first_head + e
                state = state_at + self.bytes_of(h * V + part * ROWS, flags)
                h_k, H = Int32(Int64(h) * of_group >> 31), Int32(Int64(HV) * of_group >> 31)
                channels = h_k * K + thread, (H + h_k) * K + thread, 2 * H * K + h * V + row
                # All warps ask for a third channel, q's if it is not theirs: behind a branch ptxas asks too late.
                third = cutlass.select_(warp == V_WARP, channels[2], channels[0])
                q, k, v = (self.ask(mX, numbers, n, channel, kept_at) for channel in (*channels[:2], third))
                g = self.load(mG, (n, h, thread))
                a_log, bias = self.gate_of(gate_inputs, h, thread)
                beta = scalars.Beta(numbers.beta, Int64(0), Int32(0))
                raw_beta = scalars.load_beta(beta, n * numbers.beta_row + h, Int32(0), Int32(1), flags)
                z, weight = Uint32(0), Uint32(0)
                if const_expr(norm):
                    if warp == Z_WARP:
                        z = self.load(mZ, (n, h, row))
                        weight = self.load_weight(numbers.norm_weight, row, NORM_FP32, flags)

                slope = gate.slope_of(self.form, ptx.as_f32(a_log))
                g_t = self.number(g, self.config.g_dtype)
                ptx.sts_f32(sA + thread * 4, gate.decay_of(self.form, g_t, slope, ptx.as_f32(bias), gate_inputs))
                q_t, k_t = self.input_of(q, flags), self.input_of(k, flags)
                ptx.sts_f32(sQ + thread * 4, q_t)
                ptx.sts_f32(sK + thread * 4, k_t)
                if warp == V_WARP:
                    ptx.sts_f32(sV + lane * 4, self.input_of(v, flags))
                if const_expr(conv):  # registers are few
                    if warp == part:
                        self.put_aside(sKept + lane * 16, q, k)
                    if warp == V_WARP:
                        self.put_aside(sKept + (ROWS + lane) * 16, v, v)
                down_q, down_k = self.fit(q_t, k_t, sQ + thread * 4, sK + thread * 4)
                if const_expr(conv and not norm):  # the block has what the convolution keeps
                    if warp == Z_WARP:
                        self.tell(Float32(0.0), sTold, told, e, part, lane)
                self.put_numbers(tables, down_q, down_k, scalars.beta_of(raw_beta, True, flags), numbers, lane)

                barriers.wait(arrived, e % 2, lane)
                first_row, factors = warp * WARP_ROWS, ptx.lds_f32x4(tables[4])
                vectors = tuple(self.vectors(tables, Int32(0), lane * self.keys))
                for first in cutlass.range_constexpr(0, WARP_ROWS, AT_ONCE):
                    self.take_rows(S, sS, first_row + first, lane, flags)
                    if const_expr(norm):
                        self.four_rows(S, 0, vectors, factors, sV, Int32(0), sO, Int32(0), first_row + first, lane)
                    else:
                        out = mO, n, h
                        self.four_rows(S, 0, vectors, factors, sV, Int32(0), out, part * ROWS, first_row + first, lane)
                    self.put_rows(S, state, first_row + first, lane, flags)
                if const_expr(norm or conv):
                    cute.arch.sync_threads()  # the state and all tables are read
                if const_expr(conv):
                    if e + 1 < heads:
                        self.ask_state(state + self.bytes_of(Int32(V), flags), sS, bars, e + 1, warp, flags)
                if const_expr(norm):
                    if warp == Z_WARP:
                        o = ptx.lds_f32(sO + lane * 4)
                        self.tell(o * o, sTold, told, e, part, lane)
                if const_expr(self.cluster is not None):
                    barriers.wait(told + e % 2, e // 2 % 2, lane)
                if const_expr(norm):
                    if warp == Z_WARP:
                        squares, z_t = ptx.lds_f32x4(sTold + e % 2 * 16), self.number(z, self.config.dtype)
                        w = self.weight_of(weight, NORM_FP32, flags)
                        o = self.normed(ptx.lds_f32(sO + lane * 4), squares, w, z_t, numbers.norm_eps, flags)
                        self.put(mO, (n, h, row), o)
                if const_expr(conv):
                    if (warp == part) & (e == heads - 1):
                        words = ptx.lds_u32x4(sKept + lane * 16)
                        self.store_kept(kept_at, channels[0], words[:2], numbers)
                        self.store_kept(kept_at, channels[1], words[2:], numbers)
                    if warp == V_WARP:
                        words = ptx.lds_u32x4(sKept + (ROWS + lane) * 16)
                        self.store_kept(kept_at, channels[2], words[:2], numbers)
        else:
            if exists & (warp == Z_WARP):
                for e in cutlass.range(heads, unroll=1):
                    self.put(mO, (n, first_head + e, row), Float32(0.0))

    # ------------------------------------------------------------------ which state

    @cute.jit
    def ask_index(self, numbers: Numbers, n: Int32, lane: Int32):
        """The two words of sequence n's index, of conv_state in lane 1, else of the state; the second one says
        something if there are two. Asked for here."""
        low, high, indices = n, Int32(0), self.of_lane(numbers.conv_indices, numbers.state_indices, lane)
        if numbers.state_indices != 0:
            if (numbers.flags & INDEX_INT64) != 0:
                low = ptx.ldg_i32(indices + Int64(n) * 8)
                high = ptx.ldg_i32(indices + Int64(n) * 8 + 4)
            else:
                low = ptx.ldg_i32(indices + Int64(n) * 4)
        return low, high

    def of_lane(self, conv, state, lane: Int32):
        return cutlass.select_(lane == 1, conv, state) if self.config.conv else state

    @cute.jit
    def slot_of(self, index, numbers: Numbers, lane: Int32) -> Int32:
        """Which slot that is; -1 if none. Wrong indices are none."""
        slot, slots = Int64(index[0]), self.of_lane(numbers.conv_slots, numbers.P, lane)
        if (numbers.flags & INDEX_INT64) != 0:
            slot = ptx.pair(index[0], index[1])
        none = (slot >= slots) | ((numbers.state_indices != 0) & (slot <= numbers.null_index))
        return Int32(cutlass.select_(none, Int64(-1), slot))

    # ------------------------------------------------------------------ what is asked for

    @cute.jit
    def ask_state(self, at: Int64, to: Int32, bars: cute.Pointer, e: Int32, warp: Int32, flags: Int32):
        """The block's rows of its e-th head; and says how much the others will tell of it."""
        if warp == LOAD_WARP:
            size = Int32(self.bytes_of(Int32(ROWS), flags))
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(bars, size)
                ptx.load_bulk(to, at, size, bars.toint())
                if const_expr(self.cluster is not None):
                    cute.arch.mbarrier_arrive_and_expect_tx(bars + 1 + e % 2, self.parts * 4)

    def load(self, m: cute.Tensor, at) -> Uint32:
        """The bits of an element."""
        address = (m.iterator + cute.crd2idx(at, m.layout)).toint()
        return ptx.ldg_u32(address) if m.element_type is Float32 else ptx.ldg_u16(address)

    @cute.jit
    def ask(self, mX: cute.Tensor, numbers: Numbers, n: Int32, channel: Int32, kept_at: Int64) -> Asked:
        """A channel. Without branches on what weights are: of 16 bits, the first two words are there twice."""
        x, bias, weights, kept = self.load(mX, (n, channel)), Uint32(0), (Uint32(0),) * 4, (Uint32(0),) * TAPS
        if const_expr(self.config.conv):
            fp32 = Int32((numbers.flags & CONV_FP32) != 0)
            at = numbers.conv_weight + Int64(channel * (8 + 8 * fp32))
            weights = (*ptx.ldg_u32x2(at), *ptx.ldg_u32x2(at + 8 * fp32))
            if numbers.conv_bias != 0:
                bias = self.load_weight(numbers.conv_bias, channel, CONV_FP32, numbers.flags)
            at = kept_at + Int64(channel * numbers.conv_channel)
            kept = tuple(ptx.ldg_u16(at + Int64(i * numbers.conv_tap)) for i in range(TAPS))
        return Asked(x, weights, bias, kept)

    @cute.jit
    def load_weight(self, address: Int64, i: Int32, fp32: cutlass.Constexpr, flags: Int32) -> Uint32:
        """The bits of a weight, fp32 if a flag says so."""
        x = Uint32(0)
        if (flags & fp32) != 0:
            x = ptx.ldg_u32(address + Int64(i) * 4)
        else:
            x = ptx.ldg_u16(address + Int64(i) * 2)
        return x

    def put_aside(self, at: Int32, a: Asked, b: Asked) -> None:
        """What becomes the last three inputs of two channels: two words each, the oldest one in a low half."""
        ptx.sts_u32x4(at, tuple(word for c in (a, b) for word in (c.kept[1] | (c.kept[2] << 16), c.x)))

    def store_kept(self, kept_at: Int64, channel: Int32, words, numbers: Numbers) -> None:
        at = kept_at + Int64(channel * numbers.conv_channel)
        for i, x in enumerate((words[0], words[0] >> 16, words[1])):
            ptx.stg_u16(at + Int64(i * numbers.conv_tap), x)

    @cute.jit
    def bytes_of(self, rows: Int32, flags: Int32) -> Int64:
        """Of a state."""
        size = Int64(rows) * (self.config.K * 2)
        if (flags & (1 << INITIAL)) == 0:  # fp32
            size = size * 2
        return size

    # ------------------------------------------------------------------ before the step

    def number(self, bits: Uint32, dtype: str) -> Float32:
        return ptx.as_f32(bits) if dtype == "fp32" else fragments.pair(bits, dtype)[0]

    @cute.jit
    def weight_of(self, bits: Uint32, fp32: cutlass.Constexpr, flags: Int32) -> Float32:
        return cutlass.select_((flags & fp32) != 0, ptx.as_f32(bits), self.number(bits, self.config.dtype))

    @cute.jit
    def input_of(self, asked: Asked, flags: Int32) -> Float32:
        """A channel of q, k or v."""
        x = self.number(asked.x, self.config.dtype)
        if const_expr(self.config.conv):
            x = self.convolved(asked, x, flags)
        return x

    def convolved(self, asked: Asked, x: Float32, flags: Int32) -> Float32:
        dtype, fp32 = self.config.dtype, (flags & CONV_FP32) != 0
        half = (*fragments.pair(asked.weights[0], dtype), *fragments.pair(asked.weights[1], dtype))
        y = self.weight_of(asked.bias, CONV_FP32, flags)
        for i, x_i in enumerate((*(self.number(bits, dtype) for bits in asked.kept), x)):
            y = ptx.fma(cutlass.select_(fp32, ptx.as_f32(asked.weights[i]), half[i]), x_i, y)
        return y * self.sigmoid(y)

    def sigmoid(self, x: Float32) -> Float32:
        return ptx.rcp(1.0 + ptx.ex2(x * -gate.LOG2_E))

    @cute.jit
    def fit(self, q: Float32, k: Float32, q_at: Int32, k_at: Int32):
        """What q and k in shared memory are multiples of, from here on there for all: 1, or 2^-80 if their squares may
        overflow."""
        down_q, down_k = Float32(1.0), Float32(1.0)
        fits_q, fits_k = (ptx.maximum(ptx.absolute(x), Float32(0.0)) <= LARGE for x in (q, k))  # as NaN does
        if not ptx.all_of(fits_q & fits_k, Int32(1)):
            if not ptx.all_of(fits_q, Int32(1)):
                down_q = Float32(scalars.SMALLER)
            if not ptx.all_of(fits_k, Int32(1)):
                down_k = Float32(scalars.SMALLER)
            ptx.sts_f32(q_at, q * down_q)
            ptx.sts_f32(k_at, k * down_k)
            cute.arch.sync_threads()
        return down_q, down_k

    @cute.jit
    def put_numbers(
        self, tables, down_q: Float32, down_k: Float32, beta: Float32, numbers: Numbers, lane: Int32
    ):  # fmt: skip
        """What q and k are multiplied with, q k and beta, for a warp."""
        x = self.factor(self.products(tables, lane), down_q, down_k, beta, numbers.scale, numbers.flags, lane)
        self.put_number(tables[4], x, lane)
        cute.arch.sync_warp()

    @cute.jit
    def put_number(self, to: Int32, x: Float32, lane: Int32):
        if lane < 4:
            ptx.sts_f32(to + lane * 4, x)

    def products(self, tables, lane: Int32):
        """q q, k k or q k, whichever lane % 4 is."""
        sums = [Float32(0.0)] * 4
        q, k = (fragments.vector(table + lane * (self.keys * 4), self.keys) for table in tables[:2])
        for e in range(self.keys):
            sums = [ptx.fma(q[e], q[e], sums[0]), ptx.fma(k[e], k[e], sums[1]), ptx.fma(q[e], k[e], sums[2]), sums[3]]
        return fragments.sum_to_lanes(sums, lane, (2, 1), (4, 8, 16))[0]

    def factor(
        self, x: Float32, down_q: Float32, down_k: Float32, beta: Float32, scale: Float32, flags: Int32, lane: Int32
    ) -> Float32:
        """Of lane % 4 = 0 and 1 what q and k are multiplied with, of 2 q k, of 3 beta."""
        i = lane % 4
        down = cutlass.select_(i == 0, down_q, down_k)
        norm = cutlass.select_(
            (flags & L2NORM) != 0, ptx.rsqrt(ptx.fma(down * down, Float32(scalars.EPS), x)), ptx.rcp(down)
        )
        norm = norm * cutlass.select_(i == 0, scale, Float32(1.0))
        return cutlass.select_(i < 2, norm, cutlass.select_(i == 3, beta, x))

    # ------------------------------------------------------------------ rows of the state

    def take_rows(self, S: cute.Tensor, sS: Int32, row: Int32, lane: Int32, flags: Int32) -> None:
        """A lane's elements of rows from shared memory."""

        def take(dtype):
            for i in range(AT_ONCE):
                at = sS + ((row + i) * self.config.K + lane * self.keys) * (dtype.width // 8)
                x = ptx.lds_f32x4(at) if dtype is Float32 else self.pairs(ptx.lds_u32x2(at))
                for e in range(self.keys):
                    S[i * self.keys + e] = x[e]

        state_io.in_dtype(take, flags, INITIAL)

    def pairs(self, words):
        return [x for word in words for x in fragments.pair(word, "bf16")]

    def put_rows(self, S: cute.Tensor, state: Int64, row: Int32, lane: Int32, flags: Int32) -> None:
        """The same to the block's part of the state in global memory."""

        def put(dtype):
            at = state + Int64((row * self.config.K + lane * self.keys) * (dtype.width // 8))
            for i in range(AT_ONCE):
                x = [S[i * self.keys + e] for e in range(self.keys)]
                ptx.stg_state(at + i * (self.config.K * dtype.width // 8), x, dtype)

        state_io.in_dtype(put, flags, INITIAL)

    # ------------------------------------------------------------------ after the step

    @cute.jit
    def store(self, out, row: Int32, o, mine: Boolean):
        """o of rows, to shared memory if it is normed there."""
        if mine:
            for i in cutlass.range_constexpr(len(o)):
                if const_expr(self.config.norm):
                    ptx.sts_f32(out + (row + i) * 4, o[i])
                else:
                    self.put(out[0], (*out[1:], row + i), o[i])

    def put(self, m: cute.Tensor, at, x: Float32) -> None:
        m[at] = x.to(self.dtype)

    @cute.jit
    def tell(self, x: Float32, told: Int32, bars: cute.Pointer, e: Int32, part: Int32, lane: Int32):
        """The sum over a warp to all blocks of the cluster. Two places and mbarriers in turn: a block that has heard of
        all goes on to its next head, while another one may still wait for the last one's number."""
        if const_expr(self.config.norm):
            for i in cutlass.range_constexpr(5):
                x = x + cute.arch.shuffle_sync_bfly(x, 1 << i)
        self.send(told + e % 2 * 16 + part * 4, x, (bars + e % 2).toint(), lane)

    @cute.jit
    def send(self, to: Int32, x: Float32, bar: Int32, lane: Int32):
        if lane < self.parts:
            ptx.send_word(to, x, bar, lane)

    def normed(self, o: Float32, squares, weight: Float32, z: Float32, eps: Float32, flags: Int32) -> Float32:
        total = (squares[0] + squares[1]) + (squares[2] + squares[3])
        r, s = ptx.rsqrt(ptx.fma(total, Float32(1.0 / self.config.V), eps)), self.sigmoid(z)
        return o * r * weight * cutlass.select_((flags & SWISH) != 0, z * s, s)


def compile(config: KdaFusedDecodeConfig, arch: str = "sm_90a"):  # noqa: A001
    """Compiles a configuration for all shapes; needs no GPU. The result takes torch tensors, on torch's stream."""
    N, C, HV = (cute.sym_int() for _ in range(3))
    dtype = TYPES[config.dtype]

    def fake(dtype, *shape):
        stride = (*(cute.sym_int64() for _ in shape[1:]), 1)
        return cute.runtime.make_fake_tensor(dtype, shape, stride, assumed_align=dtype.width // 8)

    tensors = (
        fake(dtype, N, C),
        fake(TYPES[config.g_dtype], N, HV, config.K),
        *(fake(dtype, N, HV, config.V) for _ in range(2)),
    )
    return cute.compile(
        KdaFusedDecodeSm90(config), *tensors, *zeros(Numbers),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
