"""The roles between the two blocks of a cluster, which prepare every other chunk each, for both."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu.warpgroup import SmemLayoutAtomKind

from . import chunk, pipeline, ptx
from .layout import BOX, TABLES, C
from .pipeline import Shared
from .schedule import Work


@cute.jit
def send(pipe: cutlass.Constexpr, shared: Shared, work: Work):
    """One warp: each chunk that this block has prepared, all but v, to the other block."""
    ring, sTables, bars = shared.ring.toint(), shared.tables, shared.bars
    theirs, other, n = pipe.own_stages, pipe.rank() ^ 1, Int32(0)
    for nth in cutlass.range(work.count(), unroll=1):
        end = n + cute.ceil_div(work.piece(nth).tokens, C)
        for c in cutlass.range(pipeline.first_own(n, pipe.rank(), 2), end, 2, unroll=1):
            own = c // 2
            stage = pipeline.own_stage(pipe, own)
            cute.arch.mbarrier_wait(bars.ready + stage, pipeline.own_phase(pipe, own))
            cute.arch.mbarrier_wait(bars.solved + stage, pipeline.own_phase(pipe, own))
            cute.arch.mbarrier_wait(bars.left, own & 1 ^ 1)
            bar = (bars.raw_full + theirs).toint()
            with cute.arch.elect_one():
                for base, step, size in (
                    (ring, pipe.tiles.size, pipe.tiles.sent),
                    (sTables, TABLES, TABLES),
                ):
                    ptx.send(base + theirs * step, base + stage * step, size, bar, other)
        n = end


@cute.jit
def fetch(pipe: cutlass.Constexpr, v_tma, mV, shared: Shared, work: Work):
    """One warp: v for the chunks that the other block prepares. `gated` says that rows behind the end are zero."""
    ring, bars = shared.ring, shared.bars
    bV = pipeline.staged(pipe, ring + pipe.tiles.at_v, pipe.dtype, SmemLayoutAtomKind.K_SW128, (C, 64, 1), (0, 1, 2))
    lane, rank, stage, n = cute.arch.lane_idx(), pipe.rank(), pipe.own_stages, Int32(0)
    for nth in cutlass.range(work.count(), unroll=1):
        piece = work.piece(nth)
        tokens = piece.tokens
        sV_, gV = pipeline.boxes_of(v_tma, mV[None, None, piece.h, piece.b], piece.start, 64, bV)
        end = n + cute.ceil_div(tokens, C)
        for c in cutlass.range(pipeline.first_own(n, rank ^ 1, 2), end, 2, unroll=1):
            phase = c // 2 & 1
            cute.arch.mbarrier_wait(bars.empty + stage, phase ^ 1)
            bar = bars.raw_full + stage
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(bar, BOX + pipe.tiles.sent + TABLES)
            cute.copy(v_tma, gV[None, c - n, rank], sV_[None, 0, stage], tma_bar_ptr=bar)
            valid = tokens - (c - n) * C
            if valid < C:
                cute.arch.mbarrier_wait(bar, phase)
                chunk.clear_rows((ring + pipe.tiles.at_v).toint() + stage * pipe.tiles.size, valid, lane)
            cute.arch.mbarrier_arrive(bars.gated + stage)
        n = end
