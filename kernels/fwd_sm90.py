"""KDA forward for Hopper: one fused, persistent, warp-specialised kernel.

A thread block takes a (sequence, head) at a time and walks it in chunks of C = 32 tokens through a ring of stages in
shared memory:

    load      one warp         TMA: q, k, v, g of a chunk -> stage
    prepare   one warpgroup    in place: q, k, g -> Qd, Kd, Kr; M; A -> `invert`
    invert    two warps        T = (I + A)^-1, every other chunk each
    state     two warpgroups   S in registers, 64 value rows each: WGMMA; o -> TMA store

With S [V, K] the state before the chunk and G_i the log2 decay summed over tokens 0..i of it, the chunk is

    Kd_i = k_i 2^G_i     Qd_i = q_i 2^G_i     Kr_j = k_j 2^(G_C - G_j)     Ki_j = k_j 2^-G_j
    A = strict_lower(diag(beta) Kd Ki^T)      M = lower(Qd Ki^T)
    U = (I + A)^-1 diag(beta) (V - Kd S^T)    O = Qd S^T + M U             S <- S diag(2^G_C) + U^T Kr

2^-G_j would overflow over 32 tokens of a gate that may lose 5 nats a token, so exponents are taken relative to an
integer anchor p in the middle of each 16-token block (at most 58 either way), and moving from one anchor to another is
an exact multiplication by a power of two. The state carries the fraction that an integer anchor leaves at a chunk's
end: it is kept as S 2^-f, |f| <= 1/2.

The norms of q and k never touch the tiles: 1 / |k_i| multiplies rows of A and T and the product Kd S^T, scale / |q_i|
multiplies o_i.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource, SmemLayoutAtomKind
from cutlass.memory import SmemAllocator

from . import ptx
from .config import (
    BETA_BF16,
    BETA_SIGMOID,
    CU_INT64,
    FINAL_BF16,
    INITIAL_BF16,
    L2NORM,
    NEG_EIGVAL,
    STATE_V_FIRST,
    KdaFwdConfig,
)

LOG2_E = 1.4426950408889634
EPS = 1e-6  # of the l2 norm, as in fla

C = 32  # tokens in a chunk
SUB = 16  # tokens with one anchor: 16 * 5 nats stay inside fp32's and bf16's exponent range
D = 128  # K = V
BOX = 4096  # bytes of a TMA box: 32 tokens of 128 bytes
# Named barriers: where `prepare` meets, one for each state warpgroup.
HEAD_BAR, ANCHORS_BAR, TILES_BAR, OFF_DIAGONAL_BAR, STATE_BAR = 1, 2, 3, 4, 5

AT_KQ, AT_G = 0, 4 * BOX  # in a stage of the ring; what follows g depends on its dtype
# Tables of a stage, in bytes from its start.
DECAY = 0  # fp32 [2, 128]: 2^a, 2^f
NORM = 2 * D * 4  # fp32 [2, 32]: 1 / |k_i|, scale / |q_i|
TABLES = NORM + 2 * C * 4
# The linear systems on their way from `prepare` to `invert`.
SYSTEMS = 2  # one for each warp of `invert`
A_ROW = (C + 4) * 4  # fp32 [32, 32 + 4], A transposed: a row is a column of A; 4 words against bank conflicts
SQUARES = C * A_ROW  # fp32 [2, 2, 32]: half sums of |k_i|^2, |q_i|^2
SYSTEM = SQUARES + 4 * C * 4
# Scratch of `prepare`.
KE = 0  # bf16 [2, 16, 64], swizzled: Ki of block 0 at its anchor
EXCHANGE = 4096  # fp32 [2, 2, 256]: half sums of the diagonal blocks of A and M
TOTAL = EXCHANGE + 4096  # fp32 [2, 128]: log2 decay of each block
OFFSET = TOTAL + 2 * D * 4  # fp32 [2, 128]: G of each block's start against its anchor
SHIFT = OFFSET + 2 * D * 4  # bf16 [5, 128]: 2^p0, 2^p1, 2^(a - p0), 2^(a - p1), 2^(p1 - p0)
BIAS = SHIFT + 5 * D * 2  # fp32 [128]
REST = BIAS + D * 4  # fp32 [128]: f, left by the integer anchor of the last chunk's end; registers are scarcer
SCRATCH = REST + D * 4


class KdaFwdSm90:
    def __init__(self, config: KdaFwdConfig):
        self.config = config
        self.stages = config.stages
        self.g_type = BFloat16 if config.g_dtype == "bf16" else Float32
        self.g_boxes = 2 if config.g_dtype == "bf16" else 4
        # a stage of the ring: k and q (later Kd and Qd), g (later Kr), v, T, M
        self.kr_half = self.g_boxes // 2 * BOX  # channels 64-127 of Kr
        self.at_v = AT_G + 2 * self.kr_half
        self.at_t = self.at_v + 2 * BOX
        self.at_m = self.at_t + C * C * 2
        self.stage_bytes = self.at_m + C * C * 2
        # load and invert, prepare, 2 x state; 56 + 136 + 2 x 160 = 512 registers a lane is what an SM has
        self.threads = 512
        self.regs_load, self.regs_prepare, self.regs_state = 56, 136, 160

    # ------------------------------------------------------------------ host side

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [B, T, H, K]
        mK: cute.Tensor,
        mV: cute.Tensor,
        mG: cute.Tensor,
        mO: cute.Tensor,
        beta: Int64,  # addresses: [B, T, H] bf16 or fp32
        A_log: Int64,  # [H] fp32 or 0
        dt_bias: Int64,  # [H, K] fp32 or 0
        initial_state: Int64,  # [N, H, V, K] or [N, H, K, V], bf16 or fp32, or 0
        final_state: Int64,
        cu_seqlens: Int64,  # [N + 1] int32 or int64, or 0
        N: Int32,
        scale: Float32,
        lower_bound: Float32,
        flags: Int32,
        max_blocks: Int32,
        stream: cuda.CUstream,
    ):
        box = cute.tile_to_shape(warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, BFloat16), (C, 64), (0, 1))
        g_atom = warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, self.g_type)
        g_box = cute.tile_to_shape(g_atom, (C, D // self.g_boxes), (0, 1))
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        by_token = [1, 3, 2, 0]  # [B, T, H, D] -> (T, D, H, B)
        mQ, mK, mV, mG, mO = [
            cute.make_tensor(m.iterator, cute.select(m.layout, mode=by_token)) for m in (mQ, mK, mV, mG, mO)
        ]
        q_tma, k_tma, v_tma = [cpasync.make_tiled_tma_atom(load, m, box, (C, 64)) for m in (mQ, mK, mV)]
        g_tma = cpasync.make_tiled_tma_atom(load, mG, g_box, (C, D // self.g_boxes))
        o_tma = cpasync.make_tiled_tma_atom(store, mO, box, (C, 64))

        def mma(n, b_major):
            op = warpgroup.MmaF16BF16Op(
                BFloat16, Float32, (64, n, 16), OperandSource.RMEM, OperandMajorMode.K, b_major
            )  # fmt: skip
            return cute.make_tiled_mma(op)

        items = N * cute.size(mO.shape[2])
        grid = cutlass.min(items, max_blocks)
        self.kernel(
            q_tma[0], q_tma[1], k_tma[0], k_tma[1], v_tma[0], v_tma[1], g_tma[0], g_tma[1], o_tma[0], o_tma[1],
            mO, beta, A_log, dt_bias, initial_state, final_state, cu_seqlens, items, scale, lower_bound, flags,
            mma(2 * C, OperandMajorMode.K), mma(C, OperandMajorMode.K), mma(D, OperandMajorMode.MN),
        ).launch(grid=[grid, 1, 1], block=[self.threads, 1, 1], stream=stream, min_blocks_per_mp=1)  # fmt: skip

    # ------------------------------------------------------------------ device side

    @cute.kernel
    def kernel(
        self,
        q_tma: cute.CopyAtom, mQ: cute.Tensor,
        k_tma: cute.CopyAtom, mK: cute.Tensor,
        v_tma: cute.CopyAtom, mV: cute.Tensor,
        g_tma: cute.CopyAtom, mG: cute.Tensor,
        o_tma: cute.CopyAtom, tO: cute.Tensor,
        mO: cute.Tensor,
        beta: Int64, A_log: Int64, dt_bias: Int64, initial_state: Int64, final_state: Int64, cu_seqlens: Int64,
        items: Int32, scale: Float32, lower_bound: Float32, flags: Int32,
        mma_ks: cute.TiledMma, mma_tm: cute.TiledMma, mma_s: cute.TiledMma,
    ):  # fmt: skip
        S = self.stages
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()

        def table(size, align=128):
            return smem.allocate_tensor(Uint8, cute.make_layout(size), byte_alignment=align).iterator

        ring = table(self.stage_bytes * S, 1024)
        out = table(4 * BOX, 1024)  # o on its way out: [state warpgroup, buffer]
        scratch = table(SCRATCH, 1024).toint()
        sTables = table(TABLES * S).toint()
        sSystems = table(SYSTEM * SYSTEMS).toint()
        bars = smem.allocate_tensor(Int64, cute.make_layout(3 * S + 2 * SYSTEMS + 1), byte_alignment=8).iterator
        raw_full, ready, empty, a_full = bars, bars + S, bars + 2 * S, bars + 3 * S
        a_empty, met = a_full + SYSTEMS, a_full + 2 * SYSTEMS

        if warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(S):
                    cute.arch.mbarrier_init(raw_full + s, 1)
                    cute.arch.mbarrier_init(ready + s, 128 + 32)  # `prepare`, a warp of `invert`
                    cute.arch.mbarrier_init(empty + s, 256)
                for i in cutlass.range_constexpr(SYSTEMS):
                    cute.arch.mbarrier_init(a_full + i, 128)
                    cute.arch.mbarrier_init(a_empty + i, 32)
                cute.arch.mbarrier_init(met, 128)
            cute.arch.mbarrier_init_fence()
            for atom in (q_tma, k_tma, v_tma, g_tma, o_tma):
                cpasync.prefetch_descriptor(atom)
        cute.arch.sync_threads()

        H = cute.size(mO.shape[2])
        T = cute.size(mO.shape[0])
        if warp < 4:
            cute.arch.setmaxregister_decrease(self.regs_load)
            if warp == 0:
                self.load(
                    q_tma, mQ, k_tma, mK, v_tma, mV, g_tma, mG, ring, raw_full, empty, cu_seqlens, flags, items, H, T
                )
            elif warp <= SYSTEMS:
                self.invert(
                    warp - 1, ring.toint(), sTables, sSystems, raw_full, ready, a_full, a_empty,
                    beta, cu_seqlens, scale, flags, items, H, T,
                )  # fmt: skip
        elif warp < 8:
            cute.arch.setmaxregister_increase(self.regs_prepare)
            self.prepare(
                warp - 4, ring.toint(), sTables, sSystems, scratch, raw_full, ready, a_full, a_empty, met,
                A_log, dt_bias, cu_seqlens, lower_bound, flags, items, H, T,
            )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.regs_state)
            self.state(
                (warp - 8) // 4, ring, out, sTables, ready, empty,
                mma_ks, mma_tm, mma_s, o_tma, tO, mO, initial_state, final_state, cu_seqlens, flags, items, H, T,
            )  # fmt: skip

    @cute.jit
    def sequence(self, n: Int32, cu_seqlens: Int64, flags: Int32, T: Int32):
        """(first token, tokens, batch) of sequence n. Wrong cu_seqlens give shorter sequences, no wrong address."""
        start, end, b = Int32(0), T, n
        if cu_seqlens != 0:
            if (flags & CU_INT64) != 0:
                cu64 = cute.make_tensor(cute.make_ptr(Int64, cu_seqlens, cute.AddressSpace.gmem), cute.make_layout(2))
                start = self.clamp(cu64[n], T)
                end = self.clamp(cu64[n + 1], T)
            else:
                cu32 = cute.make_tensor(cute.make_ptr(Int32, cu_seqlens, cute.AddressSpace.gmem), cute.make_layout(2))
                start = self.clamp(Int64(cu32[n]), T)
                end = self.clamp(Int64(cu32[n + 1]), T)
            end = cutlass.max(start, end)
            b = Int32(0)
        return start, end - start, b

    def clamp(self, x: Int64, T: Int32) -> Int32:
        return Int32(cutlass.min(cutlass.max(x, Int64(0)), Int64(T)))

    @cute.jit
    def wait(self, barrier, phase: Int32, lane: Int32, items: Int32):
        """mbarrier_wait before a named barrier. The test always holds, which ptxas cannot see: it makes the lanes of a
        warp leave the spinning together. They do on the machine, but not under compute-sanitizer, and a warp that comes
        to a named barrier in parts counts as several: racecheck then reports hazards that are none."""
        if lane + items != 0:
            cute.arch.mbarrier_wait(barrier, phase)

    def staged(self, base, dtype, kind, shape, order, stride=None):
        """Swizzled tiles at `base` in shared memory, one a stage of the ring (or every `stride` bytes)."""
        layout = cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, dtype), shape, order)
        stages = cute.make_layout(self.stages, stride=(stride or self.stage_bytes) * 8 // dtype.width)
        return cute.make_tensor(cute.recast_ptr(base, layout.inner, dtype), cute.append(layout.outer, stages))

    def boxes_of(self, tma, m, start: Int32, cols: int, s_boxes):
        """TMA views of a head [T, D] from token `start` on: shared boxes, and [box, chunk, column box] of the head."""
        g = cute.local_tile(cute.domain_offset((start, 0), m), (C, cols), (None, None))
        return cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(s_boxes, 0, 2), cute.group_modes(g, 0, 2)
        )

    # ------------------------------------------------------------------ load

    @cute.jit
    def load(
        self, q_tma, mQ, k_tma, mK, v_tma, mV, g_tma, mG, ring, raw_full, empty,
        cu_seqlens: Int64, flags: Int32, items: Int32, H: Int32, T: Int32,
    ):  # fmt: skip
        """One warp: TMA of q, k, v, g for each chunk. Boxes past the last token of the tensor arrive as zeros."""
        S = self.stages

        def boxes(offset, dtype, cols, count):  # TMA boxes of a stage, one behind the other
            return self.staged(ring + offset, dtype, SmemLayoutAtomKind.K_SW128, (C, cols, count), (0, 1, 2))

        bKQ = boxes(AT_KQ, BFloat16, 64, 4)  # k, q of channels 0-63, k, q of channels 64-127
        bG = boxes(AT_G, self.g_type, D // self.g_boxes, self.g_boxes)
        bV = boxes(self.at_v, BFloat16, 64, 2)
        stage, phase = Int32(0), Int32(1)
        for item in cutlass.range(cute.arch.block_idx()[0], items, cute.arch.grid_dim()[0], unroll=1):
            start, tokens, b = self.sequence(item // H, cu_seqlens, flags, T)
            h = item % H
            sK_, gK = self.boxes_of(k_tma, mK[None, None, h, b], start, 64, bKQ)
            sQ_, gQ = self.boxes_of(q_tma, mQ[None, None, h, b], start, 64, bKQ)
            sV_, gV = self.boxes_of(v_tma, mV[None, None, h, b], start, 64, bV)
            sG_, gG = self.boxes_of(g_tma, mG[None, None, h, b], start, D // self.g_boxes, bG)
            for c in cutlass.range(cute.ceil_div(tokens, C), unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                bar = raw_full + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(bar, (6 + self.g_boxes) * BOX)
                for i in cutlass.range_constexpr(self.g_boxes):
                    cute.copy(g_tma, gG[None, c, i], sG_[None, i, stage], tma_bar_ptr=bar)
                for i in cutlass.range_constexpr(2):
                    cute.copy(k_tma, gK[None, c, i], sK_[None, 2 * i, stage], tma_bar_ptr=bar)
                    cute.copy(q_tma, gQ[None, c, i], sQ_[None, 2 * i + 1, stage], tma_bar_ptr=bar)
                    cute.copy(v_tma, gV[None, c, i], sV_[None, i, stage], tma_bar_ptr=bar)
                stage += 1
                if stage == S:
                    stage = Int32(0)
                    phase ^= 1

    # ------------------------------------------------------------------ prepare

    @cute.jit
    def prepare(
        self, warp: Int32, ring: Int32, sTables: Int32, sSystems: Int32, scratch: Int32,
        raw_full, ready, a_full, a_empty, met,
        A_log: Int64, dt_bias: Int64, cu_seqlens: Int64, lower_bound: Float32, flags: Int32,
        items: Int32, H: Int32, T: Int32,
    ):  # fmt: skip
        """A warpgroup: q, k, g of a chunk -> Qd, Kd, Kr in place; M; A for `invert`.

        Warp w owns tokens 16 (w % 2) .. and channels 64 (w // 2) ..: two warps hold half sums of each block of A and M.
        """
        S = self.stages
        sub, half = warp % 2, warp // 2
        thread = cute.arch.thread_idx()[0] % 128
        lane = cute.arch.lane_idx()
        row, col = lane // 4, lane % 4 * 2
        # the lower triangle of ones as an operand A: sums over tokens run on the tensor cores
        ones = Uint32(0x3F803F80)
        zero = Uint32(0)
        diagonal = Uint32(0)
        if col <= row:
            diagonal = Uint32(0x3F80)
        if col + 1 <= row:
            diagonal = ones
        lower = (diagonal, ones, zero, diagonal)
        # a 16 x 16 tile of ldmatrix and stmatrix: lane l serves row l % 16, 16-byte column l // 16 (128-byte swizzle)
        tile_row = (16 * sub + lane % 16) * 128
        tile_col = ((lane // 16) ^ (lane % 8)) * 16

        stage, phase = Int32(0), Int32(0)
        slot, slot_phase, met_phase = Int32(0), Int32(1), Int32(0)
        for item in cutlass.range(cute.arch.block_idx()[0], items, cute.arch.grid_dim()[0], unroll=1):
            _, tokens, _ = self.sequence(item // H, cu_seqlens, flags, T)
            h = item % H
            # the gate is lam / (1 + 2^(slope g + bias)): fold A_log, dt_bias and the base of the logarithm once a head
            slope, lam = Float32(0.0), Float32(LOG2_E)
            if const_expr(self.config.gate == "safe"):
                slope, lam = Float32(-LOG2_E), lower_bound * LOG2_E
                if A_log != 0:
                    slope = -LOG2_E * cute.math.exp(self.global_f32(A_log, Int64(h)), fastmath=True)
                bias = Float32(0.0)
                if dt_bias != 0:
                    bias = slope * self.global_f32(dt_bias, Int64(h * D + thread))
                ptx.sts_f32(scratch + BIAS + thread * 4, bias)
                self.prepare_sync(HEAD_BAR)
            ptx.sts_f32(scratch + REST + thread * 4, Float32(0.0))

            for c in cutlass.range(cute.ceil_div(tokens, C), unroll=1):
                valid = cutlass.min(tokens - c * C, C)
                sStage = ring + stage * self.stage_bytes
                system = sSystems + slot * SYSTEM
                cute.arch.mbarrier_wait(raw_full + stage, phase)
                if valid < C:
                    self.clear_tail(thread, valid, sStage)
                    self.meet(met, met_phase, lane, items)
                    met_phase ^= 1
                # log2 decay summed from the block's first token
                G = self.log_decay(
                    sStage, scratch, slope, self.masked(lam, 16 * sub + col, valid), lower, sub, half, lane
                )
                channel = 64 * half + col
                if row == 7:
                    for kk in cutlass.range_constexpr(4):
                        for nt in cutlass.range_constexpr(2):
                            at = scratch + TOTAL + (sub * D + channel + 16 * kk + 8 * nt) * 4
                            ptx.sts_f32x2(at, G[kk][nt][2], G[kk][nt][3])
                self.meet(met, met_phase, lane, items)
                met_phase ^= 1
                self.anchors(thread, scratch, sTables + stage * TABLES)
                self.prepare_sync(ANCHORS_BAR)

                tile_kq = sStage + half * (2 * BOX) + tile_row
                tile_kr = sStage + AT_G + half * self.kr_half + tile_row
                tile_ke = scratch + KE + half * (SUB * 128) + lane % 16 * 128
                A = [(Float32(0.0),) * 4] * 2
                M = [(Float32(0.0),) * 4] * 2
                k2, q2 = [Float32(0.0)] * 2, [Float32(0.0)] * 2  # |k|^2, |q|^2 of rows row, row + 8
                left_k, left_q = [None] * 4, [None] * 4
                for kk in cutlass.range_constexpr(4):
                    tc = (kk * 32) ^ tile_col
                    kd_at = tile_kq + tc
                    lk, lq, ki, k2, q2 = self.decayed(
                        ptx.ldmatrix_x4(kd_at), ptx.ldmatrix_x4(kd_at + BOX), G[kk],
                        scratch + OFFSET + (sub * D + channel + 16 * kk) * 4, k2, q2,
                    )  # fmt: skip
                    for nt in cutlass.range_constexpr(2):
                        A[nt] = ptx.mma_bf16(lk, ki[nt], ki[nt + 2], A[nt])
                        M[nt] = ptx.mma_bf16(lq, ki[nt], ki[nt + 2], M[nt])
                    shift = scratch + SHIFT + (channel + 16 * kk) * 2
                    ptx.stmatrix_x4(kd_at, self.shifted(lk, shift + sub * 2 * D))
                    ptx.stmatrix_x4(kd_at + BOX, self.shifted(lq, shift + sub * 2 * D))
                    ptx.stmatrix_x4(tile_kr + tc, self.shifted(ki, shift + (2 + sub) * 2 * D))
                    if sub == 0:
                        ptx.stmatrix_x4(tile_ke + tc, ki)
                    left_k[kk], left_q[kk] = self.shifted(lk, shift + 4 * 2 * D), self.shifted(lq, shift + 4 * 2 * D)

                # `invert` takes |k|^2, |q|^2 (half sums) and A from one of two buffers
                self.wait(a_empty + slot, slot_phase, lane, items)
                for i in cutlass.range_constexpr(2):
                    k_sum, q_sum = self.quad_sum(k2[i]), self.quad_sum(q2[i])
                    if lane % 4 == 0:
                        at = system + SQUARES + (half * 2 * C + 16 * sub + row + 8 * i) * 4
                        ptx.sts_f32(at, k_sum)
                        ptx.sts_f32(at + C * 4, q_sum)
                # the first half's warp completes A, the second's M
                exchange = scratch + EXCHANGE + sub * 2048 + lane * 16
                self.give(exchange, 1024, A, M, half)
                self.prepare_sync(TILES_BAR)

                m_stage = sStage + self.at_m
                if sub == 0:
                    if half == 0:
                        self.store_a(self.take(exchange, 1024, A, half), 0, 0, system, lane)
                    else:
                        self.store_m(self.take(exchange, 1024, M, half), 0, 0, m_stage, lane)
                        self.store_m([(Float32(0.0),) * 4] * 2, 0, 1, m_stage, lane)
                else:
                    A10 = [(Float32(0.0),) * 4] * 2
                    M10 = [(Float32(0.0),) * 4] * 2
                    for kk in cutlass.range_constexpr(4):
                        ki = ptx.ldmatrix_x4(tile_ke + ((kk * 32) ^ tile_col))
                        for nt in cutlass.range_constexpr(2):
                            A10[nt] = ptx.mma_bf16(left_k[kk], ki[nt], ki[nt + 2], A10[nt])
                            M10[nt] = ptx.mma_bf16(left_q[kk], ki[nt], ki[nt + 2], M10[nt])
                    exchange10 = scratch + KE + lane * 16  # each warp's own half of Ki, which only it has read
                    cute.arch.sync_warp()
                    self.give(exchange10, 2048, A10, M10, half)
                    cute.arch.barrier(barrier_id=OFF_DIAGONAL_BAR, number_of_threads=64)
                    if half == 0:
                        self.store_a(self.take(exchange, 1024, A, half), 1, 1, system, lane)
                        self.store_a(self.take(exchange10, 2048, A10, half), 1, 0, system, lane)
                    else:
                        self.store_m(self.take(exchange, 1024, M, half), 1, 1, m_stage, lane)
                        self.store_m(self.take(exchange10, 2048, M10, half), 1, 0, m_stage, lane)
                cute.arch.fence_view_async_shared()
                cute.arch.mbarrier_arrive(a_full + slot)
                cute.arch.mbarrier_arrive(ready + stage)
                slot += 1
                if slot == SYSTEMS:
                    slot = Int32(0)
                    slot_phase ^= 1
                stage += 1
                if stage == S:
                    stage = Int32(0)
                    phase ^= 1

    @cute.jit
    def meet(self, met, phase: Int32, lane: Int32, items: Int32):
        """As prepare_sync, where only some lanes of a warp have written: there racecheck reported hazards at named
        barriers, before waits kept warps together (see wait)."""
        cute.arch.mbarrier_arrive(met)
        self.wait(met, phase, lane, items)

    def prepare_sync(self, barrier: int) -> None:
        cute.arch.barrier(barrier_id=barrier, number_of_threads=128)

    @cute.jit
    def global_f32(self, address: Int64, index: Int64) -> Float32:
        return cute.make_tensor(
            cute.make_ptr(Float32, address + index * 4, cute.AddressSpace.gmem), cute.make_layout(1)
        )[0]

    @cute.jit
    def global_bf16(self, address: Int64, index: Int64) -> Float32:
        ptr = cute.make_ptr(BFloat16, address + index * 2, cute.AddressSpace.gmem)
        return Float32(cute.make_tensor(ptr, cute.make_layout(1))[0])

    @cute.jit
    def beta(self, address: Int64, index: Int64, flags: Int32) -> Float32:
        """beta, sigmoid(beta) or 2 sigmoid(beta)."""
        x = Float32(0.0)
        if (flags & BETA_BF16) != 0:
            x = self.global_bf16(address, index)
        else:
            x = self.global_f32(address, index)
        if (flags & BETA_SIGMOID) != 0:
            x = ptx.rcp(1.0 + ptx.ex2(x * -LOG2_E))
            if (flags & NEG_EIGVAL) != 0:
                x = x * 2.0
        return x

    @cute.jit
    def masked(self, lam: Float32, token: Int32, valid: Int32):
        """lam for the four tokens of a lane that exist, 0 for those behind the sequence's end: their decay is 1."""
        out = []
        for t in cutlass.range_constexpr(4):
            out.append(lam if token + (t % 2 + t // 2 * 8) < valid else Float32(0.0))
        return out

    @cute.jit
    def clear_tail(self, thread: Int32, valid: Int32, sStage: Int32):
        """Rows behind the sequence's end hold the next one's tokens: zero them, so that not even a NaN gets in."""
        for j in cutlass.range_constexpr(C * 8 // 128):  # 8 pieces of 16 bytes in a row of a box
            piece = thread + 128 * j
            if piece >= valid * 8:
                for box in cutlass.range_constexpr(self.at_t // BOX):  # k, q, g and v are boxes, one behind the other
                    ptx.sts_zero16(sStage + box * BOX + piece * 16)

    def gate(self, g: Float32, slope: Float32, bias: Float32, lam: Float32) -> Float32:
        """log2 of the decay. safe: lower_bound * sigmoid(exp(A_log) (g + dt_bias)); log: g itself."""
        if self.config.gate == "safe":
            return lam * ptx.rcp(1.0 + ptx.ex2(ptx.fma(g, slope, bias)))
        return lam * g

    def log_decay(self, sStage: Int32, scratch: Int32, slope, lam, lower, sub: Int32, half: Int32, lane: Int32):
        """G[kk][nt]: log2 decay summed over the tokens of the block: accumulator tiles, 16 tokens x 8 channels each.

        The sum is a product with a triangle of ones; the decay goes in as bf16 high and low parts, 16 bits together.
        """
        row, col = lane // 4, lane % 4 * 2
        sG = sStage + AT_G + half * (self.g_boxes // 2 * BOX)
        G = []
        for kk in range(4):
            if self.g_type is BFloat16:
                at = sG + (16 * sub + lane % 16) * 128 + ((kk * 32) ^ (((lane // 16) ^ (lane % 8)) * 16))
                r = ptx.ldmatrix_x4(at, trans=True)
                raw = [[f(r[2 * nt + i]) for i in range(2) for f in (ptx.bf16_lo, ptx.bf16_hi)] for nt in range(2)]
            else:
                raw = []
                for nt in range(2):
                    word = (16 * kk + 8 * nt) % 32 + row
                    box = sG + (16 * kk + 8 * nt) // 32 * BOX + (word % 4) * 4
                    raw.append([
                        ptx.lds_f32(box + (16 * sub + col + t) * 128 + (((word // 4) ^ ((col + t) % 8)) * 16))
                        for t in (0, 1, 8, 9)
                    ])  # fmt: skip
            tiles = []
            for nt in range(2):
                bias = Float32(0.0)
                if self.config.gate == "safe":
                    bias = ptx.lds_f32(scratch + BIAS + (64 * half + 16 * kk + 8 * nt + row) * 4)
                x = [self.gate(raw[nt][t], slope, bias, lam[t]) for t in range(4)]
                (high0, low0), (high1, low1) = self.high_low(x[:2]), self.high_low(x[2:])
                acc = ptx.mma_bf16(lower, high0, high1, (Float32(0.0),) * 4)
                tiles.append(ptx.mma_bf16(lower, low0, low1, acc))
            G.append(tiles)
        return G

    def anchors(self, channel: Int32, scratch: Int32, tables: Int32) -> None:
        """Anchors p0, p1 of the blocks and a of the chunk's end, one channel a thread."""
        f = ptx.lds_f32(scratch + REST + channel * 4)
        t0, t1 = ptx.lds_f32(scratch + TOTAL + channel * 4), ptx.lds_f32(scratch + TOTAL + (D + channel) * 4)
        p0 = ptx.round_even(ptx.fma(t0, Float32(0.5), f))
        g1 = f + t0
        p1 = ptx.round_even(ptx.fma(t1, Float32(0.5), g1))
        end = g1 + t1
        a = ptx.round_even(end)
        ptx.sts_f32(scratch + OFFSET + channel * 4, f - p0)
        ptx.sts_f32(scratch + OFFSET + (D + channel) * 4, g1 - p1)
        for i, e in enumerate((p0, p1, a - p0, a - p1, p1 - p0)):
            x = ptx.ex2(e)
            ptx.sts_bf16(scratch + SHIFT + (i * D + channel) * 2, ptx.pack_bf16(x, x))
        ptx.sts_f32(tables + DECAY + channel * 4, ptx.ex2(a))
        ptx.sts_f32(tables + DECAY + (D + channel) * 4, ptx.ex2(end - a))
        ptx.sts_f32(scratch + REST + channel * 4, end - a)

    def decayed(self, k, q, G, sOffset: Int32, k2, q2):
        """k 2^(G - p), q 2^(G - p), k 2^(p - G) of 16 tokens x 16 channels, and the running |k|^2, |q|^2."""
        lk, lq, ki = [None] * 4, [None] * 4, [None] * 4
        k2, q2 = list(k2), list(q2)
        offset = [ptx.lds_f32x2(sOffset), ptx.lds_f32x2(sOffset + 32)]
        for j in range(4):  # register j: rows (j % 2), channels 8 (j // 2)
            x = [G[j // 2][2 * (j % 2) + i] + offset[j // 2][i] for i in range(2)]
            up, down = [ptx.ex2(x[i]) for i in range(2)], [ptx.ex2(-x[i]) for i in range(2)]
            kf, qf = (ptx.bf16_lo(k[j]), ptx.bf16_hi(k[j])), (ptx.bf16_lo(q[j]), ptx.bf16_hi(q[j]))
            for i in range(2):
                k2[j % 2] = ptx.fma(kf[i], kf[i], k2[j % 2])
                q2[j % 2] = ptx.fma(qf[i], qf[i], q2[j % 2])
            lk[j] = ptx.pack_bf16(kf[0] * up[0], kf[1] * up[1])
            lq[j] = ptx.pack_bf16(qf[0] * up[0], qf[1] * up[1])
            ki[j] = ptx.pack_bf16(kf[0] * down[0], kf[1] * down[1])
        return tuple(lk), tuple(lq), tuple(ki), k2, q2

    def shifted(self, x, sShift: Int32):
        """x times a power of two for each channel: exact."""
        s = (ptx.lds_u32(sShift), ptx.lds_u32(sShift + 16))
        return tuple(ptx.mul_bf16x2(x[j], s[j // 2]) for j in range(4))

    def quad_sum(self, x: Float32) -> Float32:
        x = x + cute.arch.shuffle_sync_bfly(x, 1)
        return x + cute.arch.shuffle_sync_bfly(x, 2)

    @cute.jit
    def give(self, at: Int32, stride: cutlass.Constexpr[int], A, M, half: Int32):
        """Leave the half sum that the other warp completes: 1 KiB, 16 bytes a lane at a time."""
        if half == 0:
            ptx.sts_f32x4(at, M[0])
            ptx.sts_f32x4(at + 512, M[1])
        else:
            ptx.sts_f32x4(at + stride, A[0])
            ptx.sts_f32x4(at + stride + 512, A[1])

    def take(self, at: Int32, stride: int, X, half: Int32):
        """The sum of X and of what the other warp gave."""
        at = at + (1 - half) * stride
        return [[x + y for x, y in zip(X[nt], ptx.lds_f32x4(at + nt * 512), strict=True)] for nt in range(2)]

    @cute.jit
    def store_a(self, A, i: cutlass.Constexpr[int], j: cutlass.Constexpr[int], system: Int32, lane: Int32):
        """Block (i, j) of Kd Ki^T, transposed, fp32, strictly lower."""
        row, col = lane // 4, lane % 4 * 2
        for nt in cutlass.range_constexpr(2):
            for half in cutlass.range_constexpr(2):
                r = row + 8 * half
                at = system + (16 * j + 8 * nt + col) * A_ROW + (16 * i + r) * 4
                for e in cutlass.range_constexpr(2):
                    a = A[nt][2 * half + e]
                    if const_expr(i == j):
                        a = a if 8 * nt + col + e < r else Float32(0.0)
                    ptx.sts_f32(at + e * A_ROW, a)

    @cute.jit
    def store_m(self, M, i: cutlass.Constexpr[int], j: cutlass.Constexpr[int], sM: Int32, lane: Int32):
        """Block (i, j) of M = lower(Qd Ki^T), bf16 (64-byte swizzle)."""
        row, col = lane // 4, lane % 4 * 2
        words = []
        for nt in cutlass.range_constexpr(2):
            for half in cutlass.range_constexpr(2):
                r = row + 8 * half
                m0, m1 = M[nt][2 * half], M[nt][2 * half + 1]
                if const_expr(i == j):
                    m0 = m0 if 8 * nt + col <= r else Float32(0.0)
                    m1 = m1 if 8 * nt + col + 1 <= r else Float32(0.0)
                words.append(ptx.pack_bf16(m0, m1))
        self.store_tile(sM, i, j, words, lane)

    # ------------------------------------------------------------------ invert

    @cute.jit
    def invert(
        self, which: Int32, ring: Int32, sTables: Int32, sSystems: Int32, raw_full, ready, a_full, a_empty,
        beta: Int64, cu_seqlens: Int64, scale: Float32, flags: Int32, items: Int32, H: Int32, T: Int32,
    ):  # fmt: skip
        """Two warps, every other chunk each: T = diag(1/|k|) (I + A)^-1 diag(beta).

        The diagonal blocks by forward substitution in fp32, a column a lane, used column by column of A, so that one
        multiply-add, not a sum, lies between x_j and x_j+1. Then T10 = -T11 (diag(1/|k|) Kd Ki^T)10 T00 on the tensor
        cores, in bf16 high and low parts.
        """
        lane = cute.arch.lane_idx()
        system = sSystems + which * SYSTEM
        n = Int32(0)
        for item in cutlass.range(cute.arch.block_idx()[0], items, cute.arch.grid_dim()[0], unroll=1):
            start, tokens, b = self.sequence(item // H, cu_seqlens, flags, T)
            chunks = cute.ceil_div(tokens, C)
            beta_at = (Int64(b) * T + start) * H + item % H
            for c in cutlass.range((which + n) % SYSTEMS, chunks, SYSTEMS, unroll=1):
                stage = (n + c) % self.stages
                norm_at = sTables + stage * TABLES + NORM
                b_i = Float32(0.0)
                if c * C + lane < tokens:
                    b_i = self.beta(beta, beta_at + Int64(c * C + lane) * H, flags)
                # what makes the stage's tables ours: `state` has left them, the loads have come
                cute.arch.mbarrier_wait(raw_full + stage, ((n + c) // self.stages) & 1)
                cute.arch.mbarrier_wait(a_full + which, ((n + c) // SYSTEMS) & 1)
                at = system + SQUARES + lane * 4
                rk = self.inverse_norm(ptx.lds_f32(at) + ptx.lds_f32(at + 2 * C * 4), flags)
                rq = self.inverse_norm(ptx.lds_f32(at + C * 4) + ptx.lds_f32(at + 3 * C * 4), flags)
                ptx.sts_f32(norm_at + lane * 4, rk)
                ptx.sts_f32(norm_at + (C + lane) * 4, rq * scale)
                ptx.sts_f32(at, -rk * b_i)
                cute.arch.sync_warp()
                # lanes 0-15: T00, lanes 16-31: T11
                block = lane // SUB * SUB
                x = [Float32(0.0)] * SUB
                for j in cutlass.range_constexpr(SUB):
                    # x_j = delta - beta_j |k_j|^-1 sum_i<j A_ji |k_i|^-1 x_i
                    delta = Float32(1.0) if lane - block == j else Float32(0.0)
                    x_j = ptx.fma(x[j], ptx.lds_f32(system + SQUARES + (block + j) * 4), delta)
                    y_j = x_j * ptx.lds_f32(norm_at + (block + j) * 4)
                    for i4 in cutlass.range_constexpr((j + 1) // 4 * 4, SUB, 4):
                        a = ptx.lds_f32x4(system + (block + j) * A_ROW + (block + i4) * 4)
                        for i in cutlass.range_constexpr(max(i4, j + 1), i4 + 4):
                            x[i] = ptx.fma(a[i - i4], y_j, x[i])
                    x[j] = y_j * b_i
                cute.arch.sync_warp()
                sT = ring + stage * self.stage_bytes + self.at_t
                for j in cutlass.range_constexpr(SUB):
                    ptx.sts_f32(system + (block + j) * A_ROW + lane * 4, x[j])  # over A's diagonal blocks
                cute.arch.sync_warp()
                row, col = lane // 4, lane % 4 * 2
                t11, t00, a10 = [], [], []
                for e in cutlass.range_constexpr(4):  # operand registers: rows or columns 8 (e % 2), then 8 (e // 2)
                    r, c8 = row + e % 2 * 8, col + e // 2 * 8
                    t11.append(self.high_low(ptx.lds_f32x2(system + (SUB + r) * A_ROW + (SUB + c8) * 4)))
                    a_ij = ptx.lds_f32x2(system + r * A_ROW + (SUB + c8) * 4)
                    rk_i = ptx.lds_f32x2(norm_at + (SUB + c8) * 4)
                    a10.append(self.high_low((a_ij[0] * rk_i[0], a_ij[1] * rk_i[1])))
                    t_jc = system + c8 * A_ROW + r * 4
                    t00.append(self.high_low((ptx.lds_f32(t_jc), ptx.lds_f32(t_jc + A_ROW))))
                p = self.product(t11, a10)
                p = [self.high_low((p[e // 2][e % 2 * 2], p[e // 2][e % 2 * 2 + 1])) for e in range(4)]
                t10 = self.product(p, t00)
                words = [[], [], [], []]
                for e in cutlass.range_constexpr(4):
                    r, c8 = row + e % 2 * 8, col + e // 2 * 8
                    t = system + r * A_ROW + c8 * 4
                    words[0].append(ptx.pack_bf16(*ptx.lds_f32x2(t)))
                    words[1].append(Uint32(0))
                    words[2].append(ptx.pack_bf16(-t10[e // 2][e % 2 * 2], -t10[e // 2][e % 2 * 2 + 1]))
                    words[3].append(t11[e][0])
                for i in cutlass.range_constexpr(4):
                    self.store_tile(sT, i // 2, i % 2, words[i], lane)
                cute.arch.fence_view_async_shared()
                cute.arch.mbarrier_arrive(a_empty + which)
                cute.arch.mbarrier_arrive(ready + stage)
            n += chunks

    def high_low(self, x):
        """Two fp32 numbers as bf16 pairs (high, low) with x = high + low to 16 bits."""
        high = ptx.pack_bf16(*x)
        return high, ptx.pack_bf16(x[0] - ptx.bf16_lo(high), x[1] - ptx.bf16_hi(high))

    def product(self, a, b):
        """16 x 16 by 16 x 16, of operands in high and low parts."""
        out = []
        for nt in range(2):
            acc = (Float32(0.0),) * 4
            for i, j in ((1, 0), (0, 1), (0, 0)):
                acc = ptx.mma_bf16(tuple(r[i] for r in a), b[nt][j], b[nt + 2][j], acc)
            out.append(acc)
        return out

    def store_tile(self, base: Int32, i: int, j: int, words, lane: Int32) -> None:
        """Block (i, j) of a [32, 32] bf16 operand (64-byte swizzle)."""
        r = SUB * i + lane % 16
        chunk = (2 * j + lane // 16) ^ ((r // 2) % 4)
        ptx.stmatrix_x4(base + r * 64 + chunk * 16, tuple(words))

    @cute.jit
    def inverse_norm(self, x2: Float32, flags: Int32) -> Float32:
        r = Float32(1.0)
        if (flags & L2NORM) != 0:
            r = ptx.rsqrt(x2 + EPS)
        return r

    # ------------------------------------------------------------------ state

    @cute.jit
    def state(
        self, wg: Int32, ring, out, sTables: Int32, ready, empty,
        mma_ks: cute.TiledMma, mma_tm: cute.TiledMma, mma_s: cute.TiledMma,
        o_tma, tO, mO, initial_state: Int64, final_state: Int64, cu_seqlens: Int64, flags: Int32,
        items: Int32, H: Int32, T: Int32,
    ):  # fmt: skip
        """A warpgroup holds 64 value rows of S as accumulators; products are transposed, value rows by tokens."""
        S = self.stages
        thread = cute.arch.thread_idx()[0] % 128
        warp, lane = thread // 32, cute.arch.lane_idx()
        row, col = lane // 4, lane % 4 * 2
        v0 = wg * 64 + warp * 16 + row

        def operand_a(mma, k):
            return mma.get_slice(thread).make_fragment_A(mma.get_slice(thread).partition_shape_A((64, k)))

        def operand_b(mma, t):
            return mma.get_slice(thread).make_fragment_B(mma.get_slice(thread).partition_B(t))

        def fragment(mma, n):
            return mma.get_slice(thread).make_fragment_C(mma.get_slice(thread).partition_shape_C((64, n)))

        kind = SmemLayoutAtomKind
        bKQ = operand_b(mma_ks, self.staged(ring + AT_KQ, BFloat16, kind.K_SW128, (2 * C, D), (0, 1)))
        sKr = self.staged(ring + AT_G, BFloat16, kind.MN_SW128, (D, self.g_boxes // 2 * C), (1, 0))
        bKr = operand_b(mma_s, cute.local_tile(sKr, (D, C, self.stages), (0, 0, 0)))
        bT = operand_b(mma_tm, self.staged(ring + self.at_t, BFloat16, kind.K_SW64, (C, C), (0, 1)))
        bM = operand_b(mma_tm, self.staged(ring + self.at_m, BFloat16, kind.K_SW64, (C, C), (0, 1)))
        acc_s = fragment(mma_s, D)
        acc_ro = fragment(mma_ks, 2 * C)  # tokens 0-31: Kd S^T, 32-63: Qd S^T
        acc_u, acc_o = fragment(mma_tm, C), fragment(mma_tm, C)
        fS, fU = operand_a(mma_ks, D), operand_a(mma_tm, C)

        sO = self.staged(out, BFloat16, kind.K_SW128, (C, 64), (0, 1), stride=BOX)  # [state warpgroup, buffer]
        o_row = out.toint() + wg * (2 * BOX)
        # ldmatrix / stmatrix with a transposition: lane l serves token l % 8 + 8 (l // 16), 16-byte column of v
        t_row = (lane % 8 + lane // 16 * 8) * 128
        t_col = ((2 * warp + lane // 8 % 2) ^ (lane % 8)) * 16
        stage, phase, buf = Int32(0), Int32(0), Int32(0)

        for item in cutlass.range(cute.arch.block_idx()[0], items, cute.arch.grid_dim()[0], unroll=1):
            start, tokens, b = self.sequence(item // H, cu_seqlens, flags, T)
            h = item % H
            chunks = cute.ceil_div(tokens, C)
            self.load_state(acc_s, initial_state, item, v0, col, flags)
            sO_, gO_ = self.boxes_of(o_tma, tO[None, None, h, b], start, 64, sO)
            for c in cutlass.range(chunks, unroll=1):
                cute.arch.mbarrier_wait(ready + stage, phase)
                self.to_operand(acc_s, fS)
                # [Kd S^T | Qd S^T]^T
                warpgroup.fence()
                self.gemm(mma_ks, acc_ro, fS, bKQ[None, None, None, stage], True)
                warpgroup.commit_group()
                v_at = ring.toint() + self.at_v + stage * self.stage_bytes + wg * BOX + t_row + t_col
                v = ptx.ldmatrix_x4(v_at, trans=True) + ptx.ldmatrix_x4(v_at + 2048, trans=True)
                norm_at = sTables + stage * TABLES + NORM + col * 4
                decay_at = sTables + stage * TABLES + DECAY + col * 4
                warpgroup.wait_group(0)
                self.scale_channels(acc_s, decay_at)
                # R = V - diag(1/|k|) Kd S^T
                r = []
                for n8 in cutlass.range_constexpr(C // 8):
                    rk = ptx.lds_f32x2(norm_at + n8 * 32)
                    for half in cutlass.range_constexpr(2):
                        w = v[2 * n8 + half]
                        r0 = ptx.fma(-acc_ro[4 * n8 + 2 * half], rk[0], ptx.bf16_lo(w))
                        r1 = ptx.fma(-acc_ro[4 * n8 + 2 * half + 1], rk[1], ptx.bf16_hi(w))
                        r.append(ptx.pack_bf16(r0, r1))
                # registers of their own: ptxas serializes every WGMMA when accumulators of two shapes overlap (C7511)
                for i in cutlass.range_constexpr(C // 2):
                    acc_o[i] = acc_ro[C // 2 + i]
                self.fill(fU, r)
                # U = T R
                warpgroup.fence()
                self.gemm(mma_tm, acc_u, fU, bT[None, None, None, stage], True)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                self.to_operand(acc_u, fU)
                # O += M U, then S += U^T Kr behind it
                warpgroup.fence()
                self.gemm(mma_tm, acc_o, fU, bM[None, None, None, stage], False)
                warpgroup.commit_group()
                self.gemm(mma_s, acc_s, fU, bKr[None, None, None, stage], False)
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                o = []
                for n8 in cutlass.range_constexpr(C // 8):
                    rq = ptx.lds_f32x2(norm_at + (C + n8 * 8) * 4)
                    for half in cutlass.range_constexpr(2):
                        o.append(ptx.pack_bf16(acc_o[4 * n8 + 2 * half] * rq[0], acc_o[4 * n8 + 2 * half + 1] * rq[1]))
                o_at = o_row + buf * BOX + t_row + t_col
                ptx.stmatrix_x4(o_at, tuple(o[:4]), trans=True)
                ptx.stmatrix_x4(o_at + 2048, tuple(o[4:]), trans=True)
                cute.arch.fence_view_async_shared()
                if warp == 0:
                    cute.arch.cp_async_bulk_wait_group(
                        0, read=True
                    )  # the store before last is done with the other buffer
                cute.arch.barrier(barrier_id=STATE_BAR + wg, number_of_threads=128)
                if tokens - c * C >= C:
                    if warp == 0:
                        cute.copy(o_tma, sO_[None, wg * 2 + buf], gO_[None, c, wg])
                        cute.arch.cp_async_bulk_commit_group()
                else:
                    self.store_tail(o_row + buf * BOX, mO, start + c * C, tokens - c * C, h, b, wg, thread)
                buf ^= 1
                warpgroup.wait_group(0)
                if c == chunks - 1:
                    self.scale_channels(acc_s, decay_at + D * 4)  # S 2^-f -> S
                cute.arch.mbarrier_arrive(empty + stage)
                stage += 1
                if stage == S:
                    stage = Int32(0)
                    phase ^= 1
            self.store_state(acc_s, final_state, item, v0, col, flags)
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    def gemm(self, mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, clear: bool) -> None:
        for k in range(cute.size(a, mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, Boolean(not clear or k > 0))
            cute.gemm(mma, acc, a[None, None, k], b[None, None, k], acc)

    def fill(self, frag: cute.Tensor, regs) -> None:
        words = cute.recast_tensor(frag, Uint32)
        for i, r in enumerate(regs):
            words[i] = r

    def to_operand(self, acc: cute.Tensor, frag: cute.Tensor) -> None:
        """fp32 accumulators -> bf16 operand A of the next product: the same lanes hold the same elements."""
        self.fill(frag, [ptx.pack_bf16(acc[2 * i], acc[2 * i + 1]) for i in range(cute.size(acc) // 2)])

    def scale_channels(self, acc: cute.Tensor, at: Int32) -> None:
        for n8 in range(D // 8):
            s = ptx.lds_f32x2(at + n8 * 32)
            for i in range(4):
                acc[4 * n8 + i] = acc[4 * n8 + i] * s[i % 2]

    @cute.jit
    def load_state(self, acc: cute.Tensor, address: Int64, item: Int32, v0: Int32, col: Int32, flags: Int32):
        for i in cutlass.range_constexpr(64):
            acc[i] = Float32(0.0)
        if address != 0:
            if (flags & INITIAL_BF16) != 0:
                if (flags & STATE_V_FIRST) != 0:
                    self.copy_state(acc, self.state_tile(BFloat16, address, item, v0, col, True), True)
                else:
                    self.copy_state(acc, self.state_tile(BFloat16, address, item, v0, col, False), True)
            else:
                if (flags & STATE_V_FIRST) != 0:
                    self.copy_state(acc, self.state_tile(Float32, address, item, v0, col, True), True)
                else:
                    self.copy_state(acc, self.state_tile(Float32, address, item, v0, col, False), True)

    @cute.jit
    def store_state(self, acc: cute.Tensor, address: Int64, item: Int32, v0: Int32, col: Int32, flags: Int32):
        if address != 0:
            if (flags & FINAL_BF16) != 0:
                if (flags & STATE_V_FIRST) != 0:
                    self.copy_state(acc, self.state_tile(BFloat16, address, item, v0, col, True), False)
                else:
                    self.copy_state(acc, self.state_tile(BFloat16, address, item, v0, col, False), False)
            else:
                if (flags & STATE_V_FIRST) != 0:
                    self.copy_state(acc, self.state_tile(Float32, address, item, v0, col, True), False)
                else:
                    self.copy_state(acc, self.state_tile(Float32, address, item, v0, col, False), False)

    def state_tile(self, dtype, address: Int64, item: Int32, v0: Int32, col: Int32, v_first: bool) -> cute.Tensor:
        """A lane's elements of one state in global memory, in the accumulators' order. Constant strides: one register
        holds all 64 addresses."""
        sv, sk = (D, 1) if v_first else (1, D)
        offset = Int64(item) * (D * D) + Int64(v0 * sv + col * sk)
        ptr = cute.make_ptr(dtype, address + offset * (dtype.width // 8), cute.AddressSpace.gmem)
        return cute.make_tensor(ptr, cute.make_layout((2, 2, D // 8), stride=(sk, 8 * sv, 8 * sk)))

    def copy_state(self, acc: cute.Tensor, tile: cute.Tensor, load: bool) -> None:
        for i in range(64):
            if load:
                acc[i] = Float32(tile[i])
            else:
                tile[i] = acc[i].to(tile.element_type)

    @cute.jit
    def store_tail(
        self, sO: Int32, mO: cute.Tensor, token: Int32, valid: Int32, h: Int32, b: Int32, wg: Int32, thread: Int32
    ):
        """The last, partial chunk: a TMA box would overwrite the next sequence."""
        for i in cutlass.range_constexpr(2):
            r, piece = thread // 8 + 16 * i, thread % 8
            if r < valid:
                words = ptx.lds_u32x4(sO + r * 128 + ((piece ^ (r % 8)) * 16))
                row = mO[token + r, None, h, b]
                out = cute.make_tensor(
                    cute.recast_ptr(row.iterator + (wg * 64 + piece * 8), dtype=Uint32), cute.make_layout(4)
                )
                for w in cutlass.range_constexpr(4):
                    out[w] = words[w]


def compile(config: KdaFwdConfig, arch: str = "sm_90a"):  # noqa: A001
    """Compiles a configuration for all shapes; needs no GPU. The result takes torch tensors, on torch's stream."""
    sym = cute.sym_int
    B, T, H = sym(), sym(), sym()

    def tensor(dtype):
        unit = 128 // dtype.width  # 16 bytes
        stride = (*(cute.sym_int64(divisibility=unit) for _ in range(3)), 1)
        return cute.runtime.make_fake_tensor(dtype, (B, T, H, D), stride, assumed_align=16)

    kernel = KdaFwdSm90(config)
    return cute.compile(
        kernel, tensor(BFloat16), tensor(BFloat16), tensor(BFloat16), tensor(kernel.g_type), tensor(BFloat16),
        *([Int64(0)] * 6), Int32(0), Float32(0.0), Float32(0.0), Int32(0), Int32(0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
