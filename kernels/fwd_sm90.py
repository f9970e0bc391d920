"""KDA forward for Hopper: one fused, persistent, warp-specialised kernel.

A thread block takes a (sequence, head) at a time and walks it in chunks of C = 32 tokens through a ring of shared-memory stages:

    load      one warp        TMA: q, k, v, g of a chunk -> stage
    prepare   two warp pairs  in place: q, k, g -> Qd, Kd, Kr; and T = (I + A)^-1, M
    state     2 warpgroups    S in registers, 64 value rows each; WGMMA; o -> TMA store

With S [V, K] the state before the chunk and G_i the log2 decay summed over tokens 0..i of it, the chunk is

    Kd_i = k_i 2^G_i      Qd_i = q_i 2^G_i      Kr_j = k_j 2^(G_C - G_j)
    A = strict_lower(diag(beta) Kd Ki^T)        M = lower(Qd Ki^T)           Ki_j = k_j 2^-G_j
    U = (I + A)^-1 diag(beta) (V - Kd S^T)      O = Qd S^T + M U             S <- S diag(2^G_C) + U^T Kr

2^-G_j would overflow over 32 tokens of a gate that may lose 5 nats a token, so exponents are taken relative to an integer anchor p in
the middle of each 16-token block (at most 58 either way), and moving from one anchor to another is an exact multiplication by a
power of two. The state carries the fraction that an integer anchor leaves at a chunk's end: it is kept as S 2^-f, |f| <= 1/2.

The norms of q and k never touch the tiles: 1 / |k_i| multiplies rows of A and T and the product Kd S^T, scale / |q_i| multiplies o_i.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandMajorMode, OperandSource, SmemLayoutAtomKind

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
PAIR_BAR, STATE_BAR = 1, 8  # named barriers: one for each pair of preparing warps, one for each state warpgroup

# Scratch of a pair of preparing warps, in bytes from its start.
KE = 0  # bf16 [16, 128], swizzled: Ki of block 0 at its anchor
A_ROW = (C + 4) * 4  # fp32 [32, 32 + 4]: 4 words of padding against bank conflicts
A_BLOCK = (4096, 4096 - SUB * A_ROW)  # rows 0-15 behind Ki; rows 16-31 in its place, written by the warp that has read it
TOTAL = A_BLOCK[0] + SUB * A_ROW  # fp32 [2, 128]: log2 decay of each block
OFFSET = TOTAL + 2 * D * 4  # fp32 [2, 128]: G of each block's start against its anchor
SHIFT = OFFSET + 2 * D * 4  # bf16 [5, 128]: 2^p0, 2^p1, 2^(a - p0), 2^(a - p1), 2^(p1 - p0)
BIAS = SHIFT + 5 * D * 2  # fp32 [128]
BETA = BIAS + D * 4  # fp32 [32]
SCRATCH = -(-(BETA + C * 4) // 1024) * 1024
# Tables of a stage.
DECAY = 0  # fp32 [2, 128]: 2^a, 2^f
NORM = 2 * D * 4  # fp32 [2, 32]: 1 / |k_i|, scale / |q_i|
TABLES = NORM + 2 * C * 4


class KdaFwdSm90:
    def __init__(self, config: KdaFwdConfig):
        self.config = config
        self.stages = config.stages
        self.pairs = 2
        self.g_type = BFloat16 if config.g_dtype == "bf16" else Float32
        self.g_boxes = 2 if config.g_dtype == "bf16" else 4
        # load + prepare + 2 x state; 24 + 152 + 2 x 168 = 512 registers a lane is what an SM has
        self.threads = 128 + 64 * self.pairs + 256
        self.regs_load, self.regs_prepare, self.regs_state = 24, 152, 168

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
        smem = cutlass.utils.SmemAllocator()

        def tile(dtype, kind, shape, order):
            atom = warpgroup.make_smem_layout_atom(kind, dtype)
            layout = cute.tile_to_shape(atom, shape, order)
            return smem.allocate_tensor(dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)

        def table(size):
            return smem.allocate_tensor(Uint8, cute.make_layout(size), byte_alignment=1024).iterator.toint()

        # the ring: a stage holds k and q (rows 0-31 and 32-63, later Kd and Qd), g (later Kr), v, T, M
        kind = SmemLayoutAtomKind
        sKQ = tile(BFloat16, kind.K_SW128, (2 * C, D, S), (0, 1, 2))
        sKr = tile(BFloat16, kind.MN_SW128, (D, C * self.g_boxes // 2, S), (1, 0, 2))
        sV = tile(BFloat16, kind.K_SW128, (C, D, S), (0, 1, 2))
        sT = tile(BFloat16, kind.K_SW64, (C, C, S), (0, 1, 2))
        sM = tile(BFloat16, kind.K_SW64, (C, C, S), (0, 1, 2))
        sO = tile(BFloat16, kind.K_SW128, (C, 64, 4), (0, 1, 2))  # [state warpgroup, buffer]
        sTables = table(TABLES * S)
        sScratch = table(SCRATCH * self.pairs)
        sF = table(2 * D * 4)  # fp32 [2, 128]: f, handed from the pair of one chunk to the pair of the next
        bars = smem.allocate_tensor(Int64, cute.make_layout(3 * S + 2), byte_alignment=8).iterator
        raw_full, ready, empty, f_full = bars, bars + S, bars + 2 * S, bars + 3 * S

        if warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(S):
                    cute.arch.mbarrier_init(raw_full + s, 1)
                    cute.arch.mbarrier_init(ready + s, 2)
                    cute.arch.mbarrier_init(empty + s, 8)
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(f_full + i, 2)
            cute.arch.mbarrier_init_fence()
            for atom in (q_tma, k_tma, v_tma, g_tma, o_tma):
                cpasync.prefetch_descriptor(atom)
        cute.arch.sync_threads()

        H = cute.size(mO.shape[2])
        T = cute.size(mO.shape[0])
        if warp < 4:
            cute.arch.setmaxregister_decrease(self.regs_load)
            if warp == 0:
                self.load(q_tma, mQ, k_tma, mK, v_tma, mV, g_tma, mG, sKQ, sKr, sV, raw_full, empty, cu_seqlens, flags, items, H, T)
        elif warp < 4 + 2 * self.pairs:
            cute.arch.setmaxregister_increase(self.regs_prepare)
            pair = (warp - 4) // 2
            at = lambda t: t.iterator.toint()  # noqa: E731
            self.prepare(
                pair, warp & 1, at(sKQ), at(sKr), at(sV), at(sT), at(sM), sTables, sScratch + pair * SCRATCH, sF,
                raw_full, ready, f_full, beta, A_log, dt_bias, cu_seqlens, scale, lower_bound, flags, items, H, T,
            )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.regs_state)
            self.state(
                (warp - 4 - 2 * self.pairs) // 4, sKQ, sKr, sV, sT, sM, sO, sTables, ready, empty,
                mma_ks, mma_tm, mma_s, o_tma, tO, mO, initial_state, final_state, cu_seqlens, flags, items, H, T,
            )  # fmt: skip

    @cute.jit
    def sequence(self, n: Int32, cu_seqlens: Int64, flags: Int32, T: Int32):
        """(first token, tokens, batch) of sequence n. Wrong cu_seqlens values give shorter sequences, never an address out of bounds."""
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

    # ------------------------------------------------------------------ load

    @cute.jit
    def load(
        self, q_tma, mQ, k_tma, mK, v_tma, mV, g_tma, mG, sKQ, sKr, sV, raw_full, empty,
        cu_seqlens: Int64, flags: Int32, items: Int32, H: Int32, T: Int32,
    ):  # fmt: skip
        """One warp: TMA of q, k, v, g for each chunk. Boxes past the last token of the tensor arrive as zeros."""
        S = self.stages

        def boxes(t, dtype, cols, count):  # a stage seen as TMA boxes, one behind the other
            atom = warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, dtype)
            layout = cute.tile_to_shape(atom, (C, cols, count, S), (0, 1, 2, 3))
            ptr = cute.recast_ptr(t.iterator, layout.inner, dtype)
            return cute.make_tensor(ptr, layout.outer)

        bKQ = boxes(sKQ, BFloat16, 64, 4)  # k, q of channels 0-63, k, q of channels 64-127
        bV = boxes(sV, BFloat16, 64, 2)
        bG = boxes(sKr, self.g_type, D // self.g_boxes, self.g_boxes)
        stage, phase = Int32(0), Int32(1)
        for item in cutlass.range(cute.arch.block_idx()[0], items, cute.arch.grid_dim()[0], unroll=1):
            start, tokens, b = self.sequence(item // H, cu_seqlens, flags, T)
            h = item % H

            def parts(tma, m, cols, s_boxes):
                m = cute.domain_offset((start, 0), m[None, None, h, b])
                g = cute.local_tile(m, (C, cols), (None, None))
                return cpasync.tma_partition(
                    tma, 0, cute.make_layout(1), cute.group_modes(s_boxes, 0, 2), cute.group_modes(g, 0, 2)
                )

            sK_, gK = parts(k_tma, mK, 64, bKQ)
            sQ_, gQ = parts(q_tma, mQ, 64, bKQ)
            sV_, gV = parts(v_tma, mV, 64, bV)
            sG_, gG = parts(g_tma, mG, D // self.g_boxes, bG)
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
        self, pair: Int32, sub: Int32, sKQ: Int32, sKr: Int32, sV: Int32, sT: Int32, sM: Int32, sTables: Int32,
        scratch: Int32, sF: Int32, raw_full, ready, f_full,
        beta: Int64, A_log: Int64, dt_bias: Int64, cu_seqlens: Int64, scale: Float32, lower_bound: Float32, flags: Int32,
        items: Int32, H: Int32, T: Int32,
    ):  # fmt: skip
        """A pair of warps prepares every other chunk; warp `sub` of the pair owns tokens 16 sub .. 16 sub + 15."""
        S, pairs = self.stages, self.pairs
        lane = cute.arch.lane_idx()
        row, col = lane // 4, lane % 4 * 2
        g_stage = BOX * self.g_boxes
        kr_half = g_stage // 2
        # address of a 16 x 16 tile for ldmatrix and stmatrix: lane l serves row l % 16, 16-byte column l // 16 (128-byte swizzle)
        tile_row = (16 * sub + lane % 16) * 128
        tile_col = ((lane // 16) ^ (lane % 8)) * 16
        # the lower triangle of ones as an operand A: sums over tokens run on the tensor cores
        ones = Uint32(0x3F803F80)
        zero = Uint32(0)
        diagonal = Uint32(0)
        if col <= row:
            diagonal = Uint32(0x3F80)
        if col + 1 <= row:
            diagonal = ones
        lower = (diagonal, ones, zero, diagonal)

        it = Int32(0)  # chunks of this block so far
        for item in cutlass.range(cute.arch.block_idx()[0], items, cute.arch.grid_dim()[0], unroll=1):
            start, tokens, b = self.sequence(item // H, cu_seqlens, flags, T)
            h = item % H
            chunks = cute.ceil_div(tokens, C)
            # the gate is lam / (1 + 2^(slope g + bias)): fold A_log, dt_bias and the base of the logarithm once a head
            slope, lam = Float32(0.0), Float32(LOG2_E)
            if const_expr(self.config.gate == "safe"):
                slope, lam = Float32(-LOG2_E), lower_bound * LOG2_E
                if A_log != 0:
                    slope = -LOG2_E * cute.math.exp(self.global_f32(A_log, Int64(h)), fastmath=True)
                for i in cutlass.range_constexpr(2):
                    ch = (2 * i + sub) * 32 + lane
                    bias = Float32(0.0)
                    if dt_bias != 0:
                        bias = slope * self.global_f32(dt_bias, Int64(h * D + ch))
                    ptx.sts_f32(scratch + BIAS + ch * 4, bias)
            self.pair_sync(pair)

            for c in cutlass.range((pair + pairs - it % pairs) % pairs, chunks, pairs, unroll=1):
                n = it + c  # number of the chunk in this block
                stage, phase = n % S, (n // S) & 1
                valid = cutlass.min(tokens - c * C, C)
                tables = sTables + stage * TABLES
                cute.arch.mbarrier_wait(raw_full + stage, phase)
                if valid < C:
                    self.clear_tail(pair, sub * 32 + lane, valid, sKQ + stage * 4 * BOX, sKr + stage * g_stage, sV + stage * 2 * BOX)
                b_i = Float32(0.0)  # beta of token 16 sub + lane % 16
                if 16 * sub + lane % 16 < valid:
                    b_i = self.beta(beta, (Int64(b) * T + start + c * C + 16 * sub + lane % 16) * H + h, flags)

                # G: log2 decay summed from the block's first token
                lam4 = self.masked(lam, 16 * sub + col, valid)
                G = self.log_decay(sKr + stage * g_stage, scratch + BIAS, slope, lam4, lower, sub, lane)
                if row == 7:
                    for kk in cutlass.range_constexpr(8):
                        for nt in cutlass.range_constexpr(2):
                            ch = 16 * kk + 8 * nt
                            ptx.sts_f32x2(scratch + TOTAL + (sub * D + ch + col) * 4, G[kk][nt][2], G[kk][nt][3])
                self.pair_sync(pair)
                self.anchors(sub * 32 + lane, n, c, scratch, tables, sF, f_full)
                self.pair_sync(pair)

                kq = sKQ + stage * 4 * BOX + tile_row
                kr = sKr + stage * g_stage + tile_row
                ke = scratch + KE + lane % 16 * 128
                A = [[Float32(0.0)] * 4 for _ in range(2)]
                M = [[Float32(0.0)] * 4 for _ in range(2)]
                k2, q2 = [Float32(0.0)] * 2, [Float32(0.0)] * 2  # |k|^2, |q|^2 of rows row, row + 8
                left_k, left_q = [None] * 8, [None] * 8
                for kk in cutlass.range_constexpr(8):
                    half, tc = kk // 4, (kk % 4 * 32) ^ tile_col
                    kd_at = kq + half * 2 * BOX + tc
                    kr_at = kr + half * kr_half + tc
                    lk, lq, ki, k2, q2 = self.decayed(
                        ptx.ldmatrix_x4(kd_at), ptx.ldmatrix_x4(kd_at + BOX), G[kk], scratch + OFFSET + (sub * D + 16 * kk + col) * 4, k2, q2
                    )
                    for nt in cutlass.range_constexpr(2):
                        A[nt] = ptx.mma_bf16(lk, ki[nt], ki[nt + 2], A[nt])
                        M[nt] = ptx.mma_bf16(lq, ki[nt], ki[nt + 2], M[nt])
                    sh = scratch + SHIFT + (16 * kk + col) * 2
                    ptx.stmatrix_x4(kd_at, self.shifted(lk, sh + sub * 2 * D))
                    ptx.stmatrix_x4(kd_at + BOX, self.shifted(lq, sh + sub * 2 * D))
                    ptx.stmatrix_x4(kr_at, self.shifted(ki, sh + (2 + sub) * 2 * D))
                    if sub == 0:
                        ptx.stmatrix_x4(ke + half * (SUB * 128) + tc, ki)
                    left_k[kk], left_q[kk] = self.shifted(lk, sh + 4 * 2 * D), self.shifted(lq, sh + 4 * 2 * D)

                # 1 / |k_i|, scale / |q_i|
                norm_at = tables + NORM
                rk, rq = [None] * 2, [None] * 2
                for i in cutlass.range_constexpr(2):
                    rk[i] = self.inverse_norm(k2[i], flags)
                    rq[i] = self.inverse_norm(q2[i], flags) * scale
                    if lane % 4 == 0:
                        ptx.sts_f32(norm_at + (16 * sub + row + 8 * i) * 4, rk[i])
                        ptx.sts_f32(norm_at + (C + 16 * sub + row + 8 * i) * 4, rq[i])
                if lane < 16:
                    ptx.sts_f32(scratch + BETA + (16 * sub + lane) * 4, b_i)
                self.pair_sync(pair)

                brk = [ptx.lds_f32(scratch + BETA + (16 * sub + row + 8 * i) * 4) * rk[i] for i in range(2)]
                m_stage = sM + stage * (C * C * 2)
                if sub == 1:
                    A10 = [[Float32(0.0)] * 4 for _ in range(2)]
                    M10 = [[Float32(0.0)] * 4 for _ in range(2)]
                    for kk in cutlass.range_constexpr(8):
                        half, tc = kk // 4, (kk % 4 * 32) ^ tile_col
                        ki = ptx.ldmatrix_x4(ke + half * (SUB * 128) + tc)
                        for nt in cutlass.range_constexpr(2):
                            A10[nt] = ptx.mma_bf16(left_k[kk], ki[nt], ki[nt + 2], A10[nt])
                            M10[nt] = ptx.mma_bf16(left_q[kk], ki[nt], ki[nt + 2], M10[nt])
                    self.store_block(A10, M10, 1, 0, brk, norm_at, scratch, m_stage, lane)
                    self.store_block(A, M, 1, 1, brk, norm_at, scratch, m_stage, lane)
                else:
                    self.store_block(A, M, 0, 0, brk, norm_at, scratch, m_stage, lane)
                    r = lane % 16
                    chunk = (2 + lane // 16) ^ ((r // 2) % 4)
                    ptx.stmatrix_x4(m_stage + r * 64 + chunk * 16, (zero, zero, zero, zero))
                self.pair_sync(pair)
                if sub == 0:
                    self.invert(scratch, norm_at, sT + stage * (C * C * 2), lane)
                cute.arch.fence_view_async_shared()
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(ready + stage)
            it += chunks

    def pair_sync(self, pair: Int32) -> None:
        cute.arch.barrier(barrier_id=PAIR_BAR + pair, number_of_threads=64)

    @cute.jit
    def global_f32(self, address: Int64, index: Int64) -> Float32:
        return cute.make_tensor(cute.make_ptr(Float32, address + index * 4, cute.AddressSpace.gmem), cute.make_layout(1))[0]

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
    def clear_tail(self, pair: Int32, thread: Int32, valid: Int32, sKQ: Int32, sG: Int32, sV: Int32):
        """Rows behind the sequence's end hold the next sequence: zero them, so that not even its NaN can reach this one."""
        for i in cutlass.range(valid * 8 + thread, C * 8, 64, unroll=1):
            for half in cutlass.range_constexpr(4):
                ptx.sts_zero16(sKQ + half * BOX + i * 16)
            for half in cutlass.range_constexpr(2):
                ptx.sts_zero16(sV + half * BOX + i * 16)
            for half in cutlass.range_constexpr(self.g_boxes):
                ptx.sts_zero16(sG + half * BOX + i * 16)
        self.pair_sync(pair)

    def gate(self, g: Float32, slope: Float32, bias: Float32, lam: Float32) -> Float32:
        """log2 of the decay. safe: lower_bound * sigmoid(exp(A_log) (g + dt_bias)); log: g itself."""
        if self.config.gate == "safe":
            return lam * ptx.rcp(1.0 + ptx.ex2(ptx.fma(g, slope, bias)))
        return lam * g

    def log_decay(self, sG: Int32, sBias: Int32, slope, lam, lower, sub: Int32, lane: Int32):
        """G[kk][nt]: log2 decay summed over tokens of the block, as accumulator tiles of 16 tokens x 8 channels 16 kk + 8 nt.

        The sum is a product with a triangle of ones; g goes in as bf16 high + low parts (16 bits: 2^-17 of a token's decay).
        """
        row, col = lane // 4, lane % 4 * 2
        G = []
        for kk in range(8):
            if self.g_type is BFloat16:
                at = sG + kk // 4 * BOX + (16 * sub + lane % 16) * 128 + ((kk % 4 * 32) ^ (((lane // 16) ^ (lane % 8)) * 16))
                r = ptx.ldmatrix_x4(at, trans=True)
                raw = [[ptx.bf16_lo(r[2 * nt]), ptx.bf16_hi(r[2 * nt]), ptx.bf16_lo(r[2 * nt + 1]), ptx.bf16_hi(r[2 * nt + 1])] for nt in range(2)]
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
                    bias = ptx.lds_f32(sBias + (16 * kk + 8 * nt + row) * 4)
                x = [self.gate(raw[nt][t], slope, bias, lam[t]) for t in range(4)]
                hi = [ptx.pack_bf16(x[0], x[1]), ptx.pack_bf16(x[2], x[3])]
                lo = [
                    ptx.pack_bf16(x[2 * i] - ptx.bf16_lo(hi[i]), x[2 * i + 1] - ptx.bf16_hi(hi[i])) for i in range(2)
                ]
                acc = ptx.mma_bf16(lower, hi[0], hi[1], (Float32(0.0),) * 4)
                tiles.append(ptx.mma_bf16(lower, lo[0], lo[1], acc))
            G.append(tiles)
        return G

    @cute.jit
    def anchors(self, thread: Int32, n: Int32, c: Int32, scratch: Int32, tables: Int32, sF: Int32, f_full):
        """Anchors p of the two blocks and a of the chunk's end, two channels a thread; hands f to the next chunk's pair."""
        if n > 0:
            cute.arch.mbarrier_wait(f_full + n % 2, ((n - 1) // 2) & 1)
        ch = 2 * thread
        f = ptx.lds_f32x2(sF + (n % 2 * D + ch) * 4)
        if c == 0:
            f = (Float32(0.0), Float32(0.0))
        t0, t1 = ptx.lds_f32x2(scratch + TOTAL + ch * 4), ptx.lds_f32x2(scratch + TOTAL + (D + ch) * 4)
        p0 = [ptx.round_even(ptx.fma(t0[i], Float32(0.5), f[i])) for i in range(2)]
        g1 = [f[i] + t0[i] for i in range(2)]
        p1 = [ptx.round_even(ptx.fma(t1[i], Float32(0.5), g1[i])) for i in range(2)]
        end = [g1[i] + t1[i] for i in range(2)]
        a = [ptx.round_even(end[i]) for i in range(2)]
        rest = [end[i] - a[i] for i in range(2)]
        ptx.sts_f32x2(sF + ((n + 1) % 2 * D + ch) * 4, rest[0], rest[1])
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(f_full + (n + 1) % 2)
        ptx.sts_f32x2(scratch + OFFSET + ch * 4, f[0] - p0[0], f[1] - p0[1])
        ptx.sts_f32x2(scratch + OFFSET + (D + ch) * 4, g1[0] - p1[0], g1[1] - p1[1])
        exps = (p0, p1, [a[i] - p0[i] for i in range(2)], [a[i] - p1[i] for i in range(2)], [p1[i] - p0[i] for i in range(2)])
        for i, e in enumerate(exps):
            ptx.sts_u32(scratch + SHIFT + (i * D + ch) * 2, ptx.pack_bf16(ptx.ex2(e[0]), ptx.ex2(e[1])))
        ptx.sts_f32x2(tables + DECAY + ch * 4, ptx.ex2(a[0]), ptx.ex2(a[1]))
        ptx.sts_f32x2(tables + DECAY + (D + ch) * 4, ptx.ex2(rest[0]), ptx.ex2(rest[1]))

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

    @cute.jit
    def inverse_norm(self, x2: Float32, flags: Int32) -> Float32:
        x2 = x2 + cute.arch.shuffle_sync_bfly(x2, 1)
        x2 = x2 + cute.arch.shuffle_sync_bfly(x2, 2)
        r = Float32(1.0)
        if (flags & L2NORM) != 0:
            r = ptx.rsqrt(x2 + EPS)
        return r

    @cute.jit
    def store_block(
        self, A, M, i: cutlass.Constexpr[int], j: cutlass.Constexpr[int], brk, norm_at: Int32, scratch: Int32, sM: Int32, lane: Int32,
    ):  # fmt: skip
        """Block (i, j) of A, with beta and the norms, in fp32; of M in bf16; both cut to the lower triangle on the diagonal."""
        row, col = lane // 4, lane % 4 * 2
        m = []
        for nt in cutlass.range_constexpr(2):
            rk_j = ptx.lds_f32x2(norm_at + (16 * j + 8 * nt + col) * 4)
            for half in cutlass.range_constexpr(2):
                r = row + 8 * half
                a0 = A[nt][2 * half] * (brk[half] * rk_j[0])
                a1 = A[nt][2 * half + 1] * (brk[half] * rk_j[1])
                m0, m1 = M[nt][2 * half], M[nt][2 * half + 1]
                if const_expr(i == j):
                    cc = 8 * nt + col
                    a0 = a0 if cc < r else Float32(0.0)
                    a1 = a1 if cc + 1 < r else Float32(0.0)
                    m0 = m0 if cc <= r else Float32(0.0)
                    m1 = m1 if cc + 1 <= r else Float32(0.0)
                ptx.sts_f32x2(scratch + A_BLOCK[i] + r * A_ROW + (16 * j + 8 * nt + col) * 4, a0, a1)
                m.append(ptx.pack_bf16(m0, m1))
        r = 16 * i + lane % 16
        chunk = (2 * j + lane // 16) ^ ((r // 2) % 4)  # 64-byte swizzle
        ptx.stmatrix_x4(sM + r * 64 + chunk * 16, tuple(m))

    @cute.jit
    def invert(self, scratch: Int32, norm_at: Int32, sT: Int32, lane: Int32):
        """diag(1/|k|) (I + A)^-1 diag(beta): forward substitution in fp32, one column a lane."""
        b = ptx.lds_f32(scratch + BETA + lane * 4)
        x = []
        for i in cutlass.range_constexpr(C):
            xi = Float32(1.0) if lane == i else Float32(0.0)
            for j4 in cutlass.range_constexpr(0, i, 4):
                a = ptx.lds_f32x4(scratch + A_BLOCK[i // SUB] + i % SUB * A_ROW + j4 * 4)
                for j in cutlass.range_constexpr(4):
                    if const_expr(j4 + j < i):
                        xi = ptx.fma(-a[j], x[j4 + j], xi)
            x.append(xi)
            t = xi * ptx.lds_f32(norm_at + i * 4) * b
            at = sT + i * 64 + ((lane // 8) ^ (i // 2 % 4)) * 16 + lane % 8 * 2
            ptx.sts_bf16(at, ptx.pack_bf16(t, t))

    # ------------------------------------------------------------------ state

    @cute.jit
    def state(
        self, wg: Int32, sKQ, sKr, sV, sT, sM, sO, sTables: Int32, ready, empty,
        mma_ks: cute.TiledMma, mma_tm: cute.TiledMma, mma_s: cute.TiledMma,
        o_tma, tO, mO, initial_state: Int64, final_state: Int64, cu_seqlens: Int64, flags: Int32,
        items: Int32, H: Int32, T: Int32,
    ):  # fmt: skip
        """A warpgroup holds 64 value rows of S as accumulators: lane row v, channel pairs; everything is transposed, tokens along N."""
        S = self.stages
        thread = cute.arch.thread_idx()[0] % 128
        warp, lane = thread // 32, cute.arch.lane_idx()
        row, col = lane // 4, lane % 4 * 2
        v0 = wg * 64 + warp * 16 + row

        def operand_b(mma, t):
            return mma.get_slice(thread).make_fragment_B(mma.get_slice(thread).partition_B(t))

        def fragment(mma, n):
            return mma.get_slice(thread).make_fragment_C(mma.get_slice(thread).partition_shape_C((64, n)))

        bKQ, bT, bM = operand_b(mma_ks, sKQ), operand_b(mma_tm, sT), operand_b(mma_tm, sM)
        bKr = operand_b(mma_s, cute.local_tile(sKr, (D, C, S), (0, 0, 0)))
        acc_s = fragment(mma_s, D)
        acc_ro = fragment(mma_ks, 2 * C)  # tokens 0-31: Kd S^T, 32-63: Qd S^T
        acc_u, acc_o = fragment(mma_tm, C), fragment(mma_tm, C)
        frag = lambda mma, k: mma.get_slice(thread).make_fragment_A(mma.get_slice(thread).partition_shape_A((64, k)))  # noqa: E731
        fS, fU = frag(mma_ks, D), frag(mma_tm, C)

        bO = cute.make_tensor(sO.iterator, sO.layout)
        o_row = sO.iterator.toint() + wg * (2 * BOX)
        # ldmatrix / stmatrix with a transposition: lane l serves token l % 8 + 8 (l // 16), 16-byte column of v
        t_row = (lane % 8 + lane // 16 * 8) * 128
        t_col = ((2 * warp + lane // 8 % 2) ^ (lane % 8)) * 16
        stage, phase, buf = Int32(0), Int32(0), Int32(0)

        for item in cutlass.range(cute.arch.block_idx()[0], items, cute.arch.grid_dim()[0], unroll=1):
            start, tokens, b = self.sequence(item // H, cu_seqlens, flags, T)
            h = item % H
            chunks = cute.ceil_div(tokens, C)
            self.load_state(acc_s, initial_state, item, v0, col, flags)
            gO = cute.local_tile(cute.domain_offset((start, 0), tO[None, None, h, b]), (C, 64), (None, None))
            sO_, gO_ = cpasync.tma_partition(
                o_tma, 0, cute.make_layout(1), cute.group_modes(bO, 0, 2), cute.group_modes(gO, 0, 2)
            )
            for c in cutlass.range(chunks, unroll=1):
                cute.arch.mbarrier_wait(ready + stage, phase)
                self.to_operand(acc_s, fS)
                # [Kd S^T | Qd S^T]^T
                warpgroup.fence()
                self.gemm(mma_ks, acc_ro, fS, bKQ[None, None, None, stage], True)
                warpgroup.commit_group()
                v_at = sV.iterator.toint() + stage * (2 * BOX) + wg * BOX + t_row + t_col
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
                    cute.arch.cp_async_bulk_wait_group(0, read=True)  # the store before last is done with the other buffer
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
                cute.arch.sync_warp()
                with cute.arch.elect_one():
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
        """A lane's elements of one state in global memory, in the accumulators' order. The strides are constants, so that 64
        addresses are one register."""
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
    def store_tail(self, sO: Int32, mO: cute.Tensor, token: Int32, valid: Int32, h: Int32, b: Int32, wg: Int32, thread: Int32):
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
    """Compiles one configuration for any shape; needs no GPU. The result takes torch tensors and torch's current stream."""
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
