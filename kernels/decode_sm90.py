"""KDA token by token: what decoding needs, a few tokens a sequence from a state and back into one.

A block of four warps has 32 rows of one head's state in registers, fp32, from its load to its store. With V first a
warp has 8 of them, all by itself, else a quarter of the channels: so it touches whole lines of memory. 8 tokens are
asked for at once, into shared memory, where every thread makes what a channel needs of each, for all warps; then the
warps go through them,

    S <- S diag(a_t);   u_t = beta_t (v_t - S k_t);   S <- S + u_t k_t^T;   o_t = scale S q_t

in one pass: S k_t and S q_t are summed side by side before the update, and o_t = scale (S q_t + (k_t q_t) u_t). The
norms of q and k multiply these sums. Reading and writing the state is all that takes time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.memory import SmemAllocator

from . import fragments, gate, ptx, scalars, schedule, state_io
from .arguments import TYPES, fake_tensors, zeros
from .config import (
    FINAL,
    INDEX_INT64,
    INITIAL,
    KEPT_INT64,
    L2NORM,
    NULL_ZERO,
    OFFSET_INT64,
    TOKEN_STATES,
    KdaDecodeConfig,
)

ROWS = 32  # of values, in a block
WARP_ROWS = 8
TOKENS = 8  # at a time
AT_ONCE = 2  # tokens whose decays do not wait for one another
SUMS = 1024  # bytes: S k and S q of the rows, from each warp's channels
NUMBERS = 16  # bytes: of a token what q and k are multiplied with, q k, beta


class Numbers(NamedTuple):
    """What the kernel is given besides tensors, in the order of a launch. An address is 0 where there is nothing."""

    beta: Int64  # [B, T, HV] bf16, fp16 or fp32
    beta_batch: Int64  # elements from one batch entry to the next
    beta_row: Int32  # and from one token to the next
    A_log: Int64  # [HV] fp32
    dt_bias: Int64  # [HV, K] fp32
    initial_state: Int64  # [N or P, HV, V, K] or [.., K, V], bf16 or fp32
    initial_pitch: Int64  # bytes from one state of all heads to the next
    final_state: Int64
    final_pitch: Int64
    state_indices: Int64  # [N] int32 or int64
    P: Int32
    has_initial_state: Int64  # [N] bool
    token_states: Int64  # [B, T, HV, ...] bf16 or fp32: the state after each token
    cu_seqlens: Int64  # [N + 1] int32 or int64
    N: Int32
    scale: Float32
    lower_bound: Float32
    flags: Int32


class ByToken(NamedTuple):
    """What it is given besides if the configuration is by_token."""

    per: Int32  # state_indices of a sequence, one for the state after each token; 0: one, for the last
    accepted: Int64  # [N] int32 or int64: tokens of the call before that count
    rows_of: Int64  # [N] int32 or int64: a sequence's row of token_states and of replay; 0: see Numbers
    rows: Int32
    tokens: Int32  # of a row
    row_pitch: Int64  # bytes from a row of token_states to the next
    replay: Int64  # [rows, tokens, HV, V / ROWS, 2 K + ROWS] fp32: decay, k and u of each token


class KdaDecodeSm90:
    def __init__(self, config: KdaDecodeConfig):
        self.config = config
        self.dtype, self.g_type = TYPES[config.dtype], TYPES[config.g_dtype]
        self.form = gate.Form(config.gate, config.g_dtype, config.K, tiles=None, rolled=False)
        self.keys = config.K // (32 if config.state_v_first else 16)  # channels of a lane

    # ------------------------------------------------------------------ host side

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [B, T, H, K]
        mK: cute.Tensor,
        mV: cute.Tensor,  # [B, T, HV, V]
        mG: cute.Tensor,
        mO: cute.Tensor,
        *rest: Any,  # Numbers, and ByToken if it is by_token, one by one, and the stream
    ):
        count, stream = len(Numbers._fields), rest[-1]
        numbers, more = Numbers(*rest[:count]), ByToken(*rest[count:-1]) if self.config.by_token else None
        H = cute.size(mV.shape[2])
        group = H // cute.size(mQ.shape[2])
        sequences = cutlass.min(numbers.N, 65535)  # in a column of the grid
        self.kernel(mQ, mK, mV, mG, mO, numbers, more, (Int64(1 << 31) + group - 1) // group).launch(
            grid=[H * (self.config.V // ROWS), sequences, cute.ceil_div(numbers.N, sequences)], block=[128, 1, 1],
            stream=stream, min_blocks_per_mp=5, preferred_smem_carveout=75,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mG: cute.Tensor, mO: cute.Tensor,
        numbers: Numbers, more: ByToken | None, of_group: Int64,
    ):  # fmt: skip
        K, V = self.config.K, self.config.V
        N, cu_seqlens, token_states, flags = numbers.N, numbers.cu_seqlens, numbers.token_states, numbers.flags
        smem = SmemAllocator()

        def table(size):
            return smem.allocate_tensor(Uint8, cute.make_layout(size), byte_alignment=16).iterator.toint()

        raw = tuple(
            smem.allocate_tensor(dtype, cute.make_layout((TOKENS, n), stride=(n, 1)), byte_alignment=16)
            for dtype, n in ((self.dtype, K), (self.dtype, K), (self.g_type, K), (self.dtype, ROWS))
        )
        tables = *(table(TOKENS * n * 4) for n in (K, K, K, ROWS)), table(TOKENS * NUMBERS)
        tables = (*tables, None if self.config.state_v_first else table(2 * SUMS))
        tables = (*tables, table(TOKENS * ROWS * 4) if self.config.by_token else None)
        cuts = table(4 * schedule.CUTS)
        thread, (block, y, z) = cute.arch.thread_idx()[0], cute.arch.block_idx()
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        part, h, n = block % (V // ROWS), block // (V // ROWS), z * cute.arch.grid_dim()[1] + y
        T, H, h_k = cute.size(mV.shape[1]), cute.size(mV.shape[2]), Int32(Int64(h) * of_group >> 31)
        seq = cutlass.min(n, N - 1)
        start, tokens, b = schedule.sequence(seq, cu_seqlens, flags, T)
        accepted, index = Int32(0), seq
        if const_expr(more is not None):
            accepted, index = self.accepted_of(more, seq, flags)
        slot = state_io.slot_of(index, numbers.state_indices, numbers.P, flags, INDEX_INT64)
        if n >= N:
            tokens, slot = Int32(0), Int32(-1)
        cuts = cuts + warp * schedule.CUTS
        if (cu_seqlens != 0) & (n < N):
            schedule.ask_cuts(cuts, n, N, cu_seqlens, flags)

        inputs, left = (mQ, mK, mG, mV), cutlass.min(tokens, TOKENS)
        self.ask(inputs, raw, b, start, h_k, h, part, left, warp, lane)
        beta = scalars.Beta(numbers.beta, numbers.beta_batch, numbers.beta_row)
        raw_beta = scalars.load_beta(beta, beta.at(b, start, h), lane * 4 + warp, left, flags)
        gate_inputs = gate.Inputs.of(numbers)
        a_log, bias = self.gate_of(gate_inputs, h, thread % K)
        S = cute.make_rmem_tensor((WARP_ROWS * K // 32,), Float32)
        for i in cutlass.range_constexpr(WARP_ROWS * K // 32):
            S[i] = Float32(0.0)
        from_zero = state_io.begins_with_zero(seq, numbers.has_initial_state)
        if (numbers.initial_state != 0) & (slot >= 0) & (not from_zero):
            initial = state_io.State(numbers.initial_state, numbers.initial_pitch, slot, h)
            self.move(S, initial.start(), Int64(h), part, warp, lane, INITIAL, flags, True)
        final, ends = state_io.State(numbers.final_state, numbers.final_pitch, slot, h), slot >= 0
        row, token_slots = Int32(-1), Int32(-1)
        if const_expr(more is not None):
            ends = ends & (more.per == 0) & (more.replay == 0)
            row = state_io.slot_of(seq, more.rows_of, more.rows, flags & ~NULL_ZERO, KEPT_INT64)
            if (more.replay != 0) & (slot >= 0):
                if row < 0:
                    accepted = Int32(0)
                for t in cutlass.range(0, accepted, unroll=1):
                    self.replay(S, self.record_at(more, row, t, h, H, part), warp, lane)
                if (numbers.final_state != 0) & ((accepted > 0) | from_zero):
                    self.move(S, final.start(), Int64(h), part, warp, lane, FINAL, flags, False)
        zeros = Int32(0)  # tokens of a null sequence
        if slot < 0:
            zeros, tokens = tokens, Int32(0)

        for t in cutlass.range(0, tokens, unroll=1):
            if t % TOKENS == 0:
                left = cutlass.min(tokens - t, TOKENS)
                # A shuffle stays where it is: what has been asked for is not waited for until here.
                slope = gate.slope_of(self.form, ptx.as_f32(cute.arch.shuffle_sync(a_log, 0)))
                beta_t = scalars.beta_of(cute.arch.shuffle_sync(raw_beta, lane), True, flags)
                cute.arch.cp_async_wait_group(0)
                cute.arch.sync_threads()
                self.put(raw, tables, left, slope, ptx.as_f32(bias), gate_inputs, thread)
                self.put_queries(raw, tables, left, numbers.scale, beta_t, flags, warp, lane)
                cute.arch.sync_threads()
                if left < tokens - t:
                    left = cutlass.min(tokens - t - TOKENS, TOKENS)
                    self.ask(inputs, raw, b, start + t + TOKENS, h_k, h, part, left, warp, lane)
                    raw_beta = scalars.load_beta(beta, beta.at(b, start + t + TOKENS, h), lane * 4 + warp, left, flags)
            j, o = t % TOKENS, mO[b, start + t, h, None]
            if const_expr(self.config.state_v_first):
                self.step(S, tables, j, o, part * ROWS, warp * WARP_ROWS, lane)
            else:
                self.send_sums(S, tables, j, warp, lane)
                cute.arch.sync_threads()
                self.take_sums(S, tables, j, o, part * ROWS, warp, lane)
            if const_expr(more is None):
                if token_states != 0:
                    after = (Int64(b) * T + start + t) * H + h
                    self.move(S, token_states, after, part, warp, lane, TOKEN_STATES, flags, False)
            else:
                if t % 32 == 0:
                    token_slots = self.token_slots(numbers, more, seq, t, lane)
                after = final._replace(slot=cute.arch.shuffle_sync(token_slots, t % 32))
                if (numbers.final_state != 0) & (after.slot >= 0):
                    self.move(S, after.start(), Int64(h), part, warp, lane, FINAL, flags, False)
                self.keep_token(S, tables, numbers, more, row, b, start, t, tokens, h, part, thread, T, H)
        if (numbers.final_state != 0) & ends:
            self.move(S, final.start(), Int64(h), part, warp, lane, FINAL, flags, False)
        me, of = n, Int32(0)  # who looks after which tokens of no sequence, if there may be some
        if (cu_seqlens != 0) & (n < N):
            rest, decreasing = schedule.rest_of(cuts, T, flags)
            if rest > 0:
                of = N
            if decreasing:
                me, of = Int32(0), Int32(1)
        if (of > 0) | (zeros > 0):
            cute.arch.cp_async_wait_group(0)
            for i in cutlass.range_constexpr(WARP_ROWS * K // 32):
                S[i] = Float32(0.0)
            if const_expr(more is not None):
                if more.rows_of != 0:
                    token_states = Int64(0)
            target = S, mO, token_states, b, h, H, part, warp, lane, flags
            schedule.clear_tokens(self.clear, target, start, zeros, cu_seqlens, N, T, flags, me, of)

    @cute.jit
    def clear(self, target, t: Int32):
        """o of a token and the state after it become zero, as far as they are this block's. S is zero."""
        S, mO, token_states, b, h, H, part, warp, lane, flags = target
        if warp == 0:
            mO[b, t, h, part * ROWS + lane] = Float32(0.0).to(self.dtype)
        if token_states != 0:
            after = (Int64(b) * cute.size(mO.shape[1]) + t) * H + h
            self.move(S, token_states, after, part, warp, lane, TOKEN_STATES, flags, False)

    # ------------------------------------------------------------------ before the tokens

    @cute.jit
    def ask(
        self, inputs, raw, b: Int32, t: Int32, h_k: Int32, h: Int32, part: Int32, tokens: Int32, warp: Int32,
        lane: Int32,
    ):  # fmt: skip
        """Copies tokens, a warp one of q, k, g and v each."""
        for w in cutlass.range_constexpr(4):
            if warp == w:
                head, channel = h_k if const_expr(w < 2) else h, part * ROWS if const_expr(w == 3) else 0
                self.copy(inputs[w], raw[w], (b, t, head, channel), tokens, lane)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def copy(self, x: cute.Tensor, to: cute.Tensor, at, tokens: Int32, lane: Int32):
        """Rows of x from `at` on, 16 bytes a lane."""
        b, t, h, channel = at
        n = 128 // x.element_type.width  # elements
        lanes = cute.size(to.shape[1]) // n
        for i in cutlass.range(0, tokens, 32 // lanes, unroll=1):
            j, c = i + lane // lanes, lane % lanes * n
            if j < tokens:
                source = x.iterator + cute.crd2idx((b, t + j, h, channel + c), x.layout)
                ptx.copy_async((to.iterator + cute.crd2idx((j, c), to.layout)).toint(), source.toint())

    @cute.jit
    def gate_of(self, inputs: gate.Inputs, h: Int32, channel: Int32):
        """A_log of the head and dt_bias of the channel, asked for here."""
        a_log, bias = Uint32(0), Uint32(0)
        if const_expr(self.config.gate != "log"):
            if inputs.A_log != 0:
                a_log = ptx.ldg_u32(inputs.A_log + Int64(h) * 4)
            if inputs.dt_bias != 0:
                bias = ptx.ldg_u32(inputs.dt_bias + Int64(h * self.config.K + channel) * 4)
        return a_log, bias

    @cute.jit
    def put(self, raw, tables, left: Int32, slope, bias: Float32, inputs: gate.Inputs, thread: Int32):
        """A channel of the decay, and a row of v, of each token."""
        for j in cutlass.range(thread // ROWS, left, 128 // ROWS, unroll=1):
            ptx.sts_f32(tables[3] + (j * ROWS + thread % ROWS) * 4, raw[3][j, thread % ROWS].to(Float32))
        if thread < self.config.K:
            for j in cutlass.range(0, left, AT_ONCE, unroll=1):  # maybe of tokens behind the last one too
                g = [raw[2][j + i, thread].to(Float32) for i in range(AT_ONCE)]
                for i in cutlass.range_constexpr(AT_ONCE):
                    decay = gate.decay_of(self.form, g[i], slope, bias, inputs)
                    ptx.sts_f32(tables[2] + ((j + i) * self.config.K + thread) * 4, decay)

    @cute.jit
    def put_queries(
        self, raw, tables, left: Int32, scale: Float32, beta: Float32, flags: Int32, warp: Int32, lane: Int32
    ):  # fmt: skip
        """q and k of two tokens, half a warp each, and from its lanes 0 to 3 what they are multiplied with, q k and
        beta. Where squares may overflow, q and k are made smaller by a power of two first."""
        j, part = warp + lane // 16 * 4, lane % 16
        qk = cute.make_rmem_tensor((self.config.K // 8,), Float32)  # q, then k
        if warp < left:
            n = self.config.K // 16
            at = j * self.config.K + part * 4  # four neighbouring channels of each 64
            for i in cutlass.range_constexpr(2):
                for e in cutlass.range_constexpr(0, n, 4):
                    words = ptx.lds_u32x2(raw[i].iterator.toint() + (at + e * 16) * 2)
                    for f, x in enumerate(x for word in words for x in fragments.pair(word, self.config.dtype)):
                        qk[i * n + e + f] = x
            x = self.products(qk, lane)
            down = Float32(1.0)
            if cute.arch.vote_ballot_sync((part < 2) & (j < left) & (not (x < scalars.USUAL))) != 0:
                down_q, down_k = self.power_below(qk, 0), self.power_below(qk, n)
                for e in cutlass.range_constexpr(n):
                    qk[e] = qk[e] * down_q
                    qk[n + e] = qk[n + e] * down_k
                x = self.products(qk, lane)
                down = cutlass.select_(part == 0, down_q, down_k)
            for i in cutlass.range_constexpr(2):
                for e in cutlass.range_constexpr(0, n, 4):
                    fragments.put_vector(tables[i] + (at + e * 16) * 4, [qk[i * n + e + f] for f in range(4)])
            norm = ptx.rcp(down)
            if (flags & L2NORM) != 0:
                norm = ptx.rsqrt(ptx.fma(down * down, Float32(scalars.EPS), x))
            b = cute.arch.shuffle_sync(beta, lane // 16)
            if part < 4:
                x = cutlass.select_(part < 2, norm * cutlass.select_(part == 0, scale, Float32(1.0)), x)
                ptx.sts_f32(tables[4] + j * NUMBERS + part * 4, cutlass.select_(part == 3, b, x))

    def products(self, qk: cute.Tensor, lane: Int32):
        """q q, k k or q k of half a warp's token, whichever lane % 4 is."""
        n = self.config.K // 16
        sums = [Float32(0.0)] * 4
        for e in range(n):
            q, k = qk[e], qk[n + e]
            sums = [ptx.fma(q, q, sums[0]), ptx.fma(k, k, sums[1]), ptx.fma(q, k, sums[2]), sums[3]]
        return fragments.sum_to_lanes(sums, lane, (2, 1), (4, 8))[0]

    @cute.jit
    def power_below(self, qk: cute.Tensor, first: cutlass.Constexpr):
        """1, or 2^-80 if any of a token's numbers is beyond 2^50."""
        largest = Float32(0.0)
        for i in cutlass.range_constexpr(self.config.K // 16):
            largest = ptx.maximum(largest, ptx.absolute(qk[first + i]))
        for i in cutlass.range_constexpr(4):
            largest = ptx.maximum(largest, cute.arch.shuffle_sync_bfly(largest, 1 << i))
        return cutlass.select_(largest > 2.0**50, Float32(2.0**-80), Float32(1.0))

    # ------------------------------------------------------------------ a token

    def sums(self, S: cute.Tensor, first: int, sQ: Int32, sK: Int32, sA: Int32):
        """Of four rows S <- S diag(a), and S k and S q, over a lane's channels."""
        Sk, Sq, few = [Float32(0.0)] * 4, [Float32(0.0)] * 4, min(self.keys, 4)
        for c in range(0, self.keys, few):  # a few channels at a time: for want of registers
            q, k, a = (fragments.vector(s + c * 4, few) for s in (sQ, sK, sA))
            for i in range(4):
                for e in range(few):
                    at = self.at(first + i, c + e)
                    S[at] = S[at] * a[e]
                    Sk[i], Sq[i] = ptx.fma(S[at], k[e], Sk[i]), ptx.fma(S[at], q[e], Sq[i])
        return Sk + Sq

    def add(self, S: cute.Tensor, first: int, uk, sK: Int32) -> None:
        """S <- S + u k^T, of four rows."""
        few = min(self.keys, 4)
        for c in range(0, self.keys, few):
            k = fragments.vector(sK + c * 4, few)
            for i in range(4):
                for e in range(few):
                    at = self.at(first + i, c + e)
                    S[at] = ptx.fma(uk[i], k[e], S[at])

    def at(self, row: int, channel: int) -> int:
        return row * self.keys + channel if self.config.state_v_first else channel * 4 + row

    def vectors(self, tables, j: Int32, channel):
        return (x + (j * self.config.K + channel) * 4 for x in tables[:3])

    def step(self, S: cute.Tensor, tables, j: Int32, o: cute.Tensor, block_row: Int32, row: Int32, lane: Int32):
        """Token j, V first: S goes on, o of a warp's 8 rows is stored. A lane has neighbouring channels of them all."""
        vectors = tuple(self.vectors(tables, j, lane * self.keys))
        numbers = ptx.lds_f32x4(tables[4] + j * NUMBERS)
        for first in range(0, WARP_ROWS, 4):
            at, u = self.four_rows(S, first, vectors, numbers, tables[3], j, o, block_row, row + first, lane)
            if self.config.by_token:
                self.note(tables, j, at, [u], (lane < 16) & (lane % 4 == 0))

    def four_rows(
        self, S: cute.Tensor, first: int, vectors, numbers, sV: Int32, j: Int32, o: cute.Tensor, block_row: Int32,
        row: Int32, lane: Int32,
    ):  # fmt: skip
        """Of `step`, from row `first` on of S, which is `row` of the block. Returns a row, the lane's, and its u."""
        rq, rk, qk, beta = numbers
        (x,) = fragments.sum_to_lanes(self.sums(S, first, *vectors), lane, (16, 8, 4), (2, 1))
        y = cute.arch.shuffle_sync_bfly(x, 16)
        at = row + lane // 4 % 4  # whose sums this lane has
        u = beta * ptx.fma(-rk, cutlass.select_(lane < 16, x, y), ptx.lds_f32(sV + (j * ROWS + at) * 4))
        self.store(
            o, block_row + at, [rq * ptx.fma(u * rk, qk, cutlass.select_(lane < 16, y, x))],
            (lane < 16) & (lane % 4 == 0),
        )  # fmt: skip
        self.add(S, first, [cute.arch.shuffle_sync(u * rk, i * 4) for i in range(4)], vectors[1])
        return at, u

    def send_sums(self, S: cute.Tensor, tables, j: Int32, warp: Int32, lane: Int32) -> None:
        """Token j, K first: a lane has 4 rows of some channels; the sums of the warp's go to shared memory."""
        sQ, sK, sA = self.vectors(tables, j, (warp * 4 + lane // 8) * self.keys)
        x = fragments.sum_to_lanes(self.sums(S, 0, sQ, sK, sA), lane, (16, 8), ())
        kind, row = lane // 16, lane % 8 * 4 + lane // 8 % 2 * 2
        ptx.sts_f32x2(tables[5] + j % 2 * SUMS + (kind * 4 + warp) * (ROWS * 4) + row * 4, *x)

    def take_sums(
        self, S: cute.Tensor, tables, j: Int32, o: cute.Tensor, block_row: Int32, warp: Int32, lane: Int32
    ) -> None:
        """What comes after, with all sums there: S goes on, warp 0 stores o."""
        rq, rk, qk, beta = ptx.lds_f32x4(tables[4] + j * NUMBERS)
        row = lane % 8 * 4
        v = ptx.lds_f32x4(tables[3] + (j * ROWS + row) * 4)
        Sk, Sq = (
            [ptx.lds_f32x4(tables[5] + j % 2 * SUMS + (kind * 4 + w) * (ROWS * 4) + row * 4) for w in range(4)]
            for kind in range(2)
        )
        Sk, Sq = ([(x[0][i] + x[1][i]) + (x[2][i] + x[3][i]) for i in range(4)] for x in (Sk, Sq))
        u = [beta * ptx.fma(-rk, Sk[i], v[i]) for i in range(4)]
        uk = [x * rk for x in u]
        out = [rq * ptx.fma(uk[i], qk, Sq[i]) for i in range(4)]
        self.store(o, block_row + row, out, (warp == 0) & (lane < 8))
        _, sK, _ = self.vectors(tables, j, (warp * 4 + lane // 8) * self.keys)
        self.add(S, 0, uk, sK)
        if self.config.by_token:
            self.note(tables, j, row, u, (warp == 0) & (lane < 8))

    @cute.jit
    def note(self, tables, j: Int32, row: Int32, u, mine):
        """u of rows and token j, for `record`."""
        if mine:
            for i in cutlass.range_constexpr(len(u)):
                ptx.sts_f32(tables[6] + (j * ROWS + row + i) * 4, u[i])

    @cute.jit
    def store(self, out: cute.Tensor, row: Int32, o, mine):
        if mine:
            for i in cutlass.range_constexpr(len(o)):
                out[row + i] = o[i].to(self.dtype)

    # ------------------------------------------------------------------ states

    def move(
        self, S: cute.Tensor, address: Int64, nth: Int64, part: Int32, warp: Int32, lane: Int32, kind: int,
        flags: Int32, load: bool,
    ) -> None:  # fmt: skip
        """A lane's elements of a head's state, the nth from an address, to or from global memory."""
        state_io.in_dtype(lambda dtype: self.move_as(S, address, nth, part, warp, lane, dtype, load), flags, kind)

    def move_as(self, S: cute.Tensor, address: Int64, nth: Int64, part: Int32, warp: Int32, lane: Int32, dtype, load):
        K, V, size = self.config.K, self.config.V, dtype.width // 8
        if self.config.state_v_first:  # a row is K elements
            n, step = self.keys, K
            first = (part * ROWS + warp * WARP_ROWS) * K + lane * n
        else:  # a channel is V elements
            n, step = 4, V
            first = (warp * 4 + lane // 8) * self.keys * V + part * ROWS + lane % 8 * 4
        at = address + (nth * (K * V) + first) * size
        for i in range(WARP_ROWS * K // 32 // n):
            if load:
                for j, x in enumerate(ptx.ldg_state(at + i * step * size, n, dtype)):
                    S[i * n + j] = x
            else:
                ptx.stg_state(at + i * step * size, [S[i * n + j] for j in range(n)], dtype)

    # ------------------------------------------------------------------ by_token

    @cute.jit
    def accepted_of(self, more: ByToken, n: Int32, flags: Int32):
        """(tokens of the call before that count, the place of the index of the state to begin with)"""
        count, per = Int64(0), cutlass.max(more.per, 1)
        if more.accepted != 0:
            count = state_io.index_at(more.accepted, n, flags, OFFSET_INT64)
        accepted = Int32(cutlass.min(cutlass.max(count, Int64(0)), Int64(more.tokens)))
        last = Int32(cutlass.min(cutlass.max(count - 1, Int64(0)), Int64(per - 1)))
        return accepted, n * per + last

    @cute.jit
    def token_slots(self, numbers: Numbers, more: ByToken, n: Int32, t: Int32, lane: Int32) -> Int32:
        """A lane's slot for the state after token t + lane; -1 if there is none."""
        slot = Int32(-1)
        if t + lane < more.per:
            slot = state_io.slot_of(
                n * more.per + t + lane, numbers.state_indices, numbers.P, numbers.flags, INDEX_INT64
            )
        return slot

    @cute.jit
    def keep_token(
        self, S: cute.Tensor, tables, numbers: Numbers, more: ByToken, row: Int32, b: Int32, start: Int32, t: Int32,
        tokens: Int32, h: Int32, part: Int32, thread: Int32, T: Int32, H: Int32,
    ):  # fmt: skip
        """Stores the state after token t, and what it takes to replay it, with those of the tokens before."""
        flags, warp, lane = numbers.flags, cute.arch.make_warp_uniform(thread // 32), thread % 32
        if numbers.token_states != 0:
            states, after, keeps = numbers.token_states, (Int64(b) * T + start + t) * H + h, Boolean(True)
            if more.rows_of != 0:
                states, after = states + Int64(row) * more.row_pitch, Int64(t) * H + h
                keeps = (row >= 0) & (t < more.tokens)
            if keeps:
                self.move(S, states, after, part, warp, lane, TOKEN_STATES, flags, False)
        if (more.replay != 0) & ((t % TOKENS == TOKENS - 1) | (t == tokens - 1)):
            cute.arch.sync_threads()
            if row >= 0:
                first = t - t % TOKENS
                for i in cutlass.range(first, cutlass.min(t + 1, more.tokens), unroll=1):
                    self.record(self.record_at(more, row, i, h, H, part), tables, i - first, thread)

    def record_at(self, more: ByToken, row: Int32, t: Int32, h: Int32, H: Int32, part: Int32) -> Int64:
        nth = ((Int64(row) * more.tokens + t) * H + h) * (self.config.V // ROWS) + part
        return more.replay + nth * ((2 * self.config.K + ROWS) * 4)

    @cute.jit
    def record(self, at: Int64, tables, j: Int32, thread: Int32):
        """Decay, k and, of this block's rows, u of token j."""
        K = self.config.K
        if thread < K:
            a, k = (ptx.lds_f32(tables[x] + (j * K + thread) * 4) for x in (2, 1))
            _, rk, _, _ = ptx.lds_f32x4(tables[4] + j * NUMBERS)
            ptx.stg_f32(at + Int64(thread * 4), a)
            ptx.stg_f32(at + Int64((K + thread) * 4), k * rk)
        if thread < ROWS:
            x = ptx.lds_f32(tables[6] + (j * ROWS + thread) * 4)
            ptx.stg_f32(at + Int64((2 * K + thread) * 4), x)

    @cute.jit
    def replay(self, S: cute.Tensor, at: Int64, warp: Int32, lane: Int32):
        """S <- S diag(a) + u k^T, of a token on record."""
        K, few = self.config.K, min(self.keys, 4)
        channel, row, rows = lane * self.keys, warp * WARP_ROWS, WARP_ROWS
        if const_expr(not self.config.state_v_first):
            channel, row, rows = (warp * 4 + lane // 8) * self.keys, lane % 8 * 4, 4
        u = [x for i in range(0, rows, 4) for x in ptx.ldg_f32x4(at + Int64((2 * K + row + i) * 4))]
        for c in cutlass.range_constexpr(0, self.keys, few):
            a, k = (self.channels(at + Int64((i * K + channel + c) * 4), few) for i in range(2))
            for i in cutlass.range_constexpr(rows):
                for e in cutlass.range_constexpr(few):
                    place = self.at(i, c + e)
                    S[place] = ptx.fma(u[i], k[e], S[place] * a[e])

    def channels(self, at: Int64, few: int):
        if few == 4:
            return ptx.ldg_f32x4(at)
        return [ptx.as_f32(ptx.ldg_u32(at + 4 * i)) for i in range(few)]


def compile(config: KdaDecodeConfig, arch: str = "sm_90a"):  # noqa: A001
    """Compiles a configuration for all shapes; needs no GPU. The result takes torch tensors, on torch's stream."""
    kernel = KdaDecodeSm90(config)
    return cute.compile(
        kernel, *fake_tensors(config, "qkvgo"), *zeros(Numbers), *(zeros(ByToken) if config.by_token else ()),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
