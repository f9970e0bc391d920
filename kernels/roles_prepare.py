"""The roles that make of a chunk what the state needs: `gates`, `prepare` and `invert`.

They walk through pieces and chunks and wait for one another. The math is in `gate`, `chunk` and `inverse`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from . import barriers, chunk, fragments, gate, inverse, pipeline, ptx, scalars
from .layout import ANCHORS, NORM, PAIR_BAR, SQUARES, SYSTEM, SYSTEMS, TABLES, C, phase_of, slot_of
from .pipeline import Shared
from .schedule import Work


@cute.jit
def gates(pipe: cutlass.Constexpr, half: Int32, shared: Shared, inputs: gate.Inputs, work: Work):
    """Two warps, 64 channels each: g -> the gate's positive factor in fp16, where g was; anchors of each channel.

    The log2 decay is lam times the factor, whose relative error in fp16 is 2^-11 at most: 2^G errs by 2^-11 / e.
    """
    ring, sTables, bars = shared.ring.toint(), shared.tables, shared.bars
    lane = cute.arch.lane_idx()
    bias_at = shared.bias + half * 256
    stage, phase = Int32(0), Int32(0)
    for nth in cutlass.range(work.count(), unroll=1):
        piece = work.piece(nth)
        tokens, h = piece.tokens, piece.h
        slope = gate.parameters(pipe.form, inputs, h, half, bias_at, lane)
        for c in cutlass.range(cute.ceil_div(tokens, C), unroll=1):
            sStage = ring + stage * pipe.tiles.size
            barriers.wait(bars.raw_full + stage, phase, lane)
            gate.of_chunk(
                pipe.form, slope, bias_at, half, sStage, sTables + stage * TABLES, inputs, tokens - c * C,
                lane,
            )  # fmt: skip
            cute.arch.mbarrier_arrive(bars.gated + stage)
            stage, phase = pipeline.next_stage(pipe, stage, phase)


@cute.jit
def prepare(pipe: cutlass.Constexpr, warp: Int32, shared: Shared, inputs: gate.Inputs, work: Work):
    """Pairs of warps, each every `pairs`-th chunk: q, k -> Qd, Kd in place; Kr where g was; M; A for `invert`.

    Warp h of a pair has channels 64 h .. of all 32 tokens, and so half sums of A and M, which the two exchange at
    the chunk's end.
    """
    ring, sTables, bars = shared.ring.toint(), shared.tables, shared.bars
    pairs, blocks, rank = pipe.pairs, pipe.blocks, pipe.rank()
    pair, half, bias_at = warp // 2, warp % 2, shared.bias + warp * 256
    lane = cute.arch.lane_idx()
    row = lane // 4
    lam = gate.log2_of_factor(pipe.form, inputs)
    triangle_at = shared.triangle + (Int32(lane % 4 * 2 <= row) + Int32(lane % 4 * 2 < row)) * 16
    tile = fragments.tile_at(Int32(0), lane)

    n = Int32(0)  # chunks of the pieces before
    for nth in cutlass.range(work.count(), unroll=1):
        piece = work.piece(nth)
        tokens, h = piece.tokens, piece.h
        first, end = pipeline.first_own(n, blocks * pair + rank, blocks * pairs), n + cute.ceil_div(tokens, C)
        slope = Float32(0.0)
        if const_expr(pipe.gate_warps == 0):
            if first < end:
                slope = gate.parameters(pipe.form, inputs, h, half, bias_at, lane)
        tokens += n * C  # from the block's first chunk on, as c
        for c in cutlass.range(first, end, blocks * pairs, unroll=1):
            own = c // blocks
            stage, slot = pipeline.own_stage(pipe, own), slot_of(own, SYSTEMS)
            left = tokens - c * C
            sStage = ring + stage * pipe.tiles.size
            system = shared.systems + slot * SYSTEM
            barriers.wait(bars.raw_full + stage, pipeline.own_phase(pipe, own), lane)
            if left < C:
                chunk.clear_tail(pipe, lane, half, left, sStage)
            if const_expr(pipe.gate_warps == 0):
                gate.of_chunk(pipe.form, slope, bias_at, half, sStage, sTables + stage * TABLES, inputs, left, lane)
            else:
                barriers.wait(bars.gated + stage, pipeline.own_phase(pipe, own), lane)
            cute.arch.sync_warp()
            tile_kq = sStage + half * pipe.tiles.k_half + tile
            tile_kr = sStage + pipe.tiles.at_g + half * pipe.tiles.kr_half + tile
            table = sStage + pipe.tiles.at_t + half * ANCHORS + lane % 4 * 16
            # of Kd Ki^T and Qd Ki^T the blocks on and below the diagonal, and |q|^2: sums over the warp's channels
            acc = cute.make_rmem_tensor((chunk.SUMS + 4,), Float32)
            for i in cutlass.range_constexpr(chunk.SUMS + 4):
                acc[i] = Float32(0.0)
            triangle = ptx.lds_u32x4(triangle_at)
            for kk in cutlass.range(4, unroll=1):
                chunk.decay(pipe, acc, tile_kq ^ (kk * 32), tile_kr ^ (kk * 32), table + kk * 128, triangle, lam)
            A, M, q2 = chunk.accumulators(pipe, acc)

            # `invert` takes A and the squares from one of its buffers
            if const_expr(pairs > SYSTEMS):
                # other pairs use it too: a phase says whose turn it is only to who is not late
                if own >= pairs:
                    last = pipeline.own_stage(pipe, own - pairs)
                    barriers.wait(bars.solved + last, pipeline.own_phase(pipe, own - pairs), lane)
            barriers.wait(bars.a_empty + slot, phase_of(own, SYSTEMS) ^ 1, lane)
            for i in cutlass.range_constexpr(4 if pipe.queries else 0):
                q_sum = fragments.quad_sum(q2[i])
                if lane % 4 == 0:
                    ptx.sts_f32(system + SQUARES + ((1 + half) * C + 8 * i + row) * 4, q_sum)
            # Of the half sums, the second warp leaves A's to the first in the system's place, the first M's to the
            # second in that of T and M, when both need the anchors there no more.
            cute.arch.barrier(barrier_id=PAIR_BAR + pair, number_of_threads=64)
            a_at, m_at = system + lane * 16, sStage + pipe.tiles.at_t + lane * 16
            chunk.give(pipe, a_at, m_at, A, M, half)
            cute.arch.barrier(barrier_id=PAIR_BAR + pair, number_of_threads=64)
            if half == 0:
                chunk.store_a(chunk.take(a_at, A), system, lane)
            else:
                if const_expr(pipe.queries):
                    chunk.store_m(chunk.take(m_at, M), sStage + pipe.tiles.at_m, lane)
            cute.arch.fence_view_async_shared()
            cute.arch.mbarrier_arrive(bars.a_full + slot)
            cute.arch.mbarrier_arrive(bars.ready + stage)
        n = end


@cute.jit
def invert(pipe: cutlass.Constexpr, shared: Shared, beta: scalars.Beta, scale: Float32, flags: Int32, work: Work):
    """One warp: T of each own chunk, and what else rows and columns of the chunk are multiplied with."""
    ring, sTables, bars = shared.ring.toint(), shared.tables, shared.bars
    lane = cute.arch.lane_idx()
    n = Int32(0)
    for nth in cutlass.range(work.count(), unroll=1):
        piece = work.piece(nth)
        tokens = piece.tokens
        first, end = pipeline.first_own(n, pipe.rank(), pipe.blocks), n + cute.ceil_div(tokens, C)
        beta_at = beta.at(piece.b, piece.start - n * C, piece.h)
        tokens += n * C  # from the block's first chunk on, as c
        next_beta = scalars.load_beta(beta, beta_at, first * C + lane, tokens, flags)
        for c in cutlass.range(first, end, pipe.blocks, unroll=1):
            own = c // pipe.blocks
            stage, slot = pipeline.own_stage(pipe, own), slot_of(own, SYSTEMS)
            system = shared.systems + slot * SYSTEM
            norm_at = sTables + stage * TABLES + NORM
            raw_beta = next_beta
            next_beta = scalars.load_beta(beta, beta_at, (c + pipe.blocks) * C + lane, tokens, flags)
            # what makes the stage's tables ours: `state` has left them, the loads have come
            cute.arch.mbarrier_wait(bars.raw_full + stage, pipeline.own_phase(pipe, own))
            cute.arch.mbarrier_wait(bars.a_full + slot, phase_of(own, SYSTEMS))
            exists = c * C + lane < tokens
            b_i = inverse.scalars_of(pipe, system, norm_at, raw_beta, exists, scale, flags, lane)
            cute.arch.sync_warp()
            inverse.of_chunk(pipe, system, norm_at, ring, stage, b_i, lane)
            cute.arch.fence_view_async_shared()
            cute.arch.mbarrier_arrive(bars.a_empty + slot)
            cute.arch.mbarrier_arrive(bars.solved + stage)
        n = end
