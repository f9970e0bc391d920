"""The role that begins: lists the pieces of work and loads their chunks."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu.warpgroup import SmemLayoutAtomKind

from . import pipeline, ptx, schedule, segments, state_io
from .arguments import Numbers
from .barriers import Barriers
from .config import INDEX_INT64, INITIAL, MAPS_BUILT
from .layout import BOX, C, D
from .pipeline import Shared
from .schedule import AT_END, AT_SEGMENT, SPAN, Entry, Fate, Listed, Piece, Work
from .segments import EXACT, HANDED, NOT_NEEDED


@cute.jit
def load(pipe: cutlass.Constexpr, sources, shared: Shared, work: Listed, numbers: Numbers, H: Int32, T: Int32):
    """One warp: lists the pieces of work; TMA of q, k, v, g for each own chunk. Boxes past the last token of
    the tensor arrive as zeros."""
    bars, boxes = shared.bars, boxes_of(pipe, shared.ring)
    workspace, most_workers, flags = numbers.workspace, numbers.workers, numbers.flags
    stage, phase, n = Int32(0), Int32(1), Int32(0)
    sPlan = work.plan
    segment, built = ptx.lds_i32(sPlan + AT_SEGMENT), Int32(0)
    if const_expr(pipe.blocks == 1):
        if (segment != 0) & ((flags & MAPS_BUILT) != 0):
            built = ptx.uniform(ptx.ldg_i32(segments.map_word(workspace, most_workers, pipe.worker()[0])))
    count = work.count() - segment
    piece, slot = Piece.none(ptx.lds_i32(sPlan + AT_END)), Int32(0)  # there is none before the first
    readers_end = Int32(0)  # of what there is to tell about the first piece of an item
    for nth in cutlass.range(count + 1, unroll=1):
        # finds a piece; lists the one before, with what `state` can prefetch for this one, and loads it
        found, next_slot, address = Piece.none(piece.next_at), Int32(0), Int64(0)
        if nth < count:
            last = segment - (count - 1 - nth)  # 1 for a segment, 0 for its warm-up
            found = schedule.find_piece(
                piece.next_at, sPlan, numbers.items, H, T, numbers.cu_seqlens, workspace, flags, last, *pipe.worker()
            )
            if const_expr(pipe.blocks == 1):
                found = with_map(found, built)
            found, next_slot = of_state(found, numbers)
            initial = state_io.State(numbers.initial_state, numbers.initial_pitch, next_slot, found.h)
            if (found.fate & ~(Fate.FINAL | Fate.HANDED_ON | Fate.COMPARED)) == 0:
                address = initial_address(pipe.config, initial, flags)
        if nth > 0:
            if (piece.fate & (Fate.COMPARED | Fate.SEGMENT)) == Fate.COMPARED:
                readers_end = piece.span // SPAN + 1
            work.put(nth - 1, entry_of(piece, slot, address))
        stage, phase, n = load_piece(pipe, sources, boxes, bars, piece, stage, phase, n)
        piece, slot = found, next_slot
    finish(pipe, count, segment, readers_end, sources, boxes, bars, stage, phase, n, work, workspace, most_workers)


@cute.jit
def of_state(found: Piece, numbers: Numbers):
    """(the piece, the slot of its state). Nothing is done for a piece of a null sequence: it is without tokens, whose
    number takes the slot's place."""
    tokens, fate = found.tokens, found.fate
    slot = state_io.slot_of(found.n, numbers.state_indices, numbers.P, numbers.flags, INDEX_INT64)
    if state_io.begins_with_zero(found.n, numbers.has_initial_state):
        fate |= Fate.FROM_ZERO
    if slot < 0:
        slot = tokens
        if (fate & Fate.WARM_UP) != 0:
            slot = Int32(0)
        tokens, fate = Int32(0), Int32(Fate.NULL)
    return found._replace(tokens=tokens, fate=fate), slot


@cute.jit
def initial_address(config: cutlass.Constexpr, state: state_io.State, flags: Int32) -> Int64:
    address = Int64(0)
    if state.address != 0:
        address = state_io.address_of(config, state, flags, INITIAL)
    return address


def entry_of(piece: Piece, slot: Int32, next_state: Int64) -> Entry:
    """next_state: address of the initial state that comes next."""
    return Entry(
        piece.start, piece.tokens, piece.h, piece.b, slot, piece.fate, Int32(next_state), Int32(next_state >> 32),
        piece.span, piece.skipped, piece.n,
    )  # fmt: skip


@cute.jit
def load_all(pipe: cutlass.Constexpr, sources, shared: Shared, work: Work):
    """`load` for pieces that are known, of whole chunks."""
    bars, boxes = shared.bars, boxes_of(pipe, shared.ring)
    stage, phase, n = Int32(0), Int32(1), Int32(0)
    for nth in cutlass.range(work.count(), unroll=1):
        piece = work.piece(nth)
        stage, phase, n = load_piece(pipe, sources, boxes, bars, piece, stage, phase, n)


def boxes_of(pipe: cutlass.Constexpr, ring: cute.Pointer):
    """The TMA boxes of the ring's stages, one behind the other: of k and q, v, g."""

    def boxes(offset, dtype, cols, count):
        return pipeline.staged(pipe, ring + offset, dtype, SmemLayoutAtomKind.K_SW128, (C, cols, count), (0, 1, 2))

    bKQ = boxes(0, pipe.dtype, 64, 2 + 2 * pipe.queries)  # k, q of channels 0-63, k, q of channels 64-127
    bG = boxes(pipe.tiles.at_g, pipe.g_type, D // pipe.g_boxes, pipe.g_boxes)
    bV = boxes(pipe.tiles.at_v, pipe.dtype, 64, pipe.v_boxes)
    return bKQ, bV, bG


@cute.jit
def with_map(found: Piece, built: Int32) -> Piece:
    """A segment that begins with the state that its item's maps give does not warm up."""
    tokens, fate = found.tokens, found.fate
    if built == 1:
        if (fate & Fate.WARM_UP) != 0:
            tokens = Int32(0)
        if (fate & Fate.SEGMENT) != 0:
            fate |= Fate.BUILT
    return found._replace(tokens=tokens, fate=fate)


@cute.jit
def load_piece(pipe: cutlass.Constexpr, sources, boxes, bars: Barriers, piece, stage: Int32, phase: Int32, n: Int32):
    """Loads the block's own ones of a piece's chunks, from stage and phase on; n: chunks before. Returns these three
    for what comes next."""
    start, h, b = piece.start, piece.h, piece.b
    (q, (k_tma, mK), (v_tma, mV), (g_tma, mG)), (bKQ, bV, bG) = sources, boxes
    each = 1 + pipe.queries  # boxes of k and of q lie in turn
    vs, h_qk = pipe.rank(), h // (cute.size(mV.shape[2]) // cute.size(mK.shape[2]))
    sK_, gK = pipeline.boxes_of(k_tma, mK[None, None, h_qk, b], start, 64, bKQ)
    if const_expr(pipe.queries):
        q_tma, mQ = q
        sQ_, gQ = pipeline.boxes_of(q_tma, mQ[None, None, h_qk, b], start, 64, bKQ)
    sV_, gV = pipeline.boxes_of(v_tma, mV[None, None, h, b], start, 64, bV)
    sG_, gG = pipeline.boxes_of(g_tma, mG[None, None, h, b], start, D // pipe.g_boxes, bG)
    chunks = piece.tokens // C if pipe.whole else cute.ceil_div(piece.tokens, C)
    for c in cutlass.range(pipeline.first_own(n, vs, pipe.blocks) - n, chunks, pipe.blocks, unroll=1):
        cute.arch.mbarrier_wait(bars.empty + stage, phase)
        bar, g_boxes = bars.raw_full + stage, pipe.g_boxes * pipe.k_boxes // 2
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, (each * pipe.k_boxes + pipe.v_boxes + g_boxes) * BOX)
        for i in cutlass.range_constexpr(g_boxes):
            cute.copy(g_tma, gG[None, c, i], sG_[None, i, stage], tma_bar_ptr=bar)
        for i in cutlass.range_constexpr(pipe.k_boxes):
            cute.copy(k_tma, gK[None, c, i], sK_[None, each * i, stage], tma_bar_ptr=bar)
            if const_expr(pipe.queries):
                cute.copy(q_tma, gQ[None, c, i], sQ_[None, each * i + 1, stage], tma_bar_ptr=bar)
        for i in cutlass.range_constexpr(pipe.v_boxes):
            cute.copy(v_tma, gV[None, c, vs + i], sV_[None, i, stage], tma_bar_ptr=bar)
        stage, phase = pipeline.next_stage(pipe, stage, phase)
    return stage, phase, n + chunks


@cute.jit
def finish(
    pipe: cutlass.Constexpr, count: Int32, segment: Int32, readers_end: Int32, sources, boxes, bars: Barriers,
    stage: Int32, phase: Int32, n: Int32, work: Listed, workspace: Int64, most_workers: Int32,
):  # fmt: skip
    """What blocks tell one another, and the last piece if there is a segment: it again, or nothing but to store its
    state. Not in the loop over pieces, where lanes that part ways would cost ptxas its uniform registers."""
    sPlan, lane = work.plan, cute.arch.lane_idx()
    if readers_end > 0:
        cute.arch.mbarrier_wait(bars.given, 0)
        hashes = (segments.noted(pipe.team, sPlan, 0),) * 2  # nobody asks what it began with
        segments.tell(pipe.team, workspace, most_workers, Int64(EXACT), hashes, pipe.worker()[0] + 1, readers_end)
    if segment > 0:
        cute.arch.sync_warp()
        entry = work.entry(count - 1)
        tokens, fate = entry.tokens, entry.fate
        again, not_needed, slot = Int32(0), Int32(0), entry.slot
        handed_on = (fate & Fate.HANDED_ON) != 0
        if (fate & Fate.NULL) != 0:
            slot = Int32(0)
        else:
            again, not_needed = segments.judge(
                pipe.team, workspace, most_workers, sPlan, bars.settled, entry.span, fate
            )
            fate = fate & (Fate.HANDED_ON | Fate.COMPARED)
            if not handed_on:
                fate = Int32(Fate.FINAL)
            if again != 0:
                fate |= Fate.AGAIN
            else:
                fate, tokens = Fate.KEPT | (fate & Fate.FINAL), Int32(0)
        entry = entry._replace(tokens=tokens, slot=slot, fate=fate)
        work.put(count, entry)
        load_piece(pipe, sources, boxes, bars, entry, stage, phase, n)
        if not_needed != 0:
            if handed_on:
                cute.arch.mbarrier_wait(bars.given, 0)
            # a lane for each state handed on, which is the right one now, and for each of the worker before
            slice, mine, theirs = segments.slice_of(pipe.team, lane), Int64(HANDED), Int64(NOT_NEEDED)
            if lane >= pipe.state_wgs:
                slice, mine, theirs = slice - pipe.state_wgs - 2, theirs, mine
            if (lane < 2 * pipe.state_wgs) & (handed_on | (lane >= pipe.state_wgs)):
                segments.settle(workspace, slice, mine, theirs)
