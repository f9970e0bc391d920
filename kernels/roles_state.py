"""The role that ends: from chunk to chunk with the state in registers, and o on its way out."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.warpgroup import SmemLayoutAtomKind

from . import checkpoints, fragments, pipeline, ptx, recurrence, segments, state_io, update
from .arguments import Kept, Numbers
from .barriers import Barriers
from .layout import BOX, DECAY, NORM, STATE_BAR, TABLES, C, D
from .pipeline import Shared
from .schedule import AT_GUESSED, AT_WARM_UP, Entry, Fate, Listed


@cute.jit
def state(
    pipe: cutlass.Constexpr, wg: Int32, shared: Shared, out, mmas, o_tma, tO, mO, numbers: Numbers, kept: Kept,
    work: Listed, inputs,
):  # fmt: skip
    """A warpgroup holds 64 value rows of S as accumulators; products are transposed, value rows by tokens.

    In a product 0 times NaN is NaN, so a token that is not finite spoils those before it in its chunk. It leaves a
    state that is not finite, and so do numbers whose squares might overflow, see `invert`: then the piece goes
    token by token, once more.

    A segment does not wait for the state before it. It warms up on the chunks before its own, from a zero state,
    and goes on with what comes out if these chunks' decays say that the true state is forgotten by then; else it
    waits for that. Its state's hash at both ends is for `load`, which finds out whether the guess was right (see
    `judge`). If not, the segment runs again from the state handed on: what comes out are the bits of one segment
    after the other, for any input.
    """
    ring, sTables, bars = shared.ring, shared.tables, shared.bars
    flags = numbers.flags
    mma_ks, mma_tm, mma_s = mmas
    thread = cute.arch.thread_idx()[0] % 128
    warp, lane = thread // 32, cute.arch.lane_idx()
    col = lane % 4 * 2

    kind = SmemLayoutAtomKind
    bKQ = fragments.operand_b(mma_ks, thread, pipeline.staged(pipe, ring, BFloat16, kind.K_SW128, (2 * C, D), (0, 1)))
    sKr = pipeline.staged(pipe, ring + pipe.tiles.at_g, BFloat16, kind.MN_SW128, (D, pipe.g_boxes // 2 * C), (1, 0))
    bKr = fragments.operand_b(mma_s, thread, cute.local_tile(sKr, (D, C, pipe.stages), (0, 0, 0)))
    bT = fragments.operand_b(
        mma_tm, thread, pipeline.staged(pipe, ring + pipe.tiles.at_t, BFloat16, kind.K_SW64, (C, C), (0, 1))
    )
    bM = fragments.operand_b(
        mma_tm, thread, pipeline.staged(pipe, ring + pipe.tiles.at_m, BFloat16, kind.K_SW64, (C, C), (0, 1))
    )
    acc_s = fragments.accumulators(mma_s, thread, D)
    acc_ro = fragments.accumulators(mma_ks, thread, 2 * C)  # tokens 0-31: Kd S^T, 32-63: Qd S^T
    acc_u, acc_o = fragments.accumulators(mma_tm, thread, C), fragments.accumulators(mma_tm, thread, C)
    fS, fU = fragments.operand_a(mma_ks, thread, D), fragments.operand_a(mma_tm, thread, C)

    sO = pipeline.staged(pipe, out, pipe.dtype, kind.K_SW128, (C, 64), (0, 1), stride=BOX)  # [state warpgroup, buffer]
    o_row = out.toint() + wg * (2 * BOX)
    # ldmatrix / stmatrix with a transposition: lane l serves token l % 8 + 8 (l // 16), 16-byte column of v
    t_row = (lane % 8 + lane // 16 * 8) * 128
    t_col = ((2 * warp + lane // 8 % 2) ^ (lane % 8)) * 16
    n, buf, forget = Int32(0), Int32(0), Float32(1.0)

    vs = pipe.rank() + wg  # of 64 value rows
    for nth in cutlass.range(work.count(), unroll=1):
        piece = work.piece(nth)
        start, tokens, h, b, fate = piece.start, piece.tokens, piece.h, piece.b, piece.fate
        chunks = cute.ceil_div(tokens, C)
        place = numbers.workspace, numbers.workers, wg, thread
        guessed, source = begin(pipe, acc_s, forget, piece, place, numbers, work, wg, warp, lane, vs)
        state_io.prefetch(pipe.config, ptx.pair(piece.next_lo, piece.next_hi), vs, flags)
        if (fate & Fate.NULL) != 0:
            clear_rows(mO, start, piece.slot, h, b, vs, thread)
        keeping, next_kept = None, Int32(checkpoints.NEVER)
        if const_expr(pipe.config.checkpoints):
            keeping = checkpoints.of_piece(pipe.config, kept, piece, vs, flags)
            if (fate & (Fate.WARM_UP | Fate.NULL | Fate.KEPT)) == 0:
                next_kept = checkpoints.next_at(pipe.config, keeping, keeping.before)
        forget = Float32(1.0)  # the decay of all chunks of the piece, of channel `thread`
        written = tokens  # of o
        if (fate & Fate.WARM_UP) != 0:
            written = Int32(0)
        sO_, gO_ = pipeline.boxes_of(o_tma, tO[None, None, h, b], start, 64, sO)
        for c in cutlass.range(chunks, unroll=1):
            if const_expr(pipe.config.checkpoints):
                before = keeping.before + c * C
                if const_expr(pipe.config.checkpoints == "every"):
                    if next_kept == before:
                        checkpoints.keep(acc_s, pipe.config, keeping, before)
                        next_kept = checkpoints.next_at(pipe.config, keeping, before + 1)
                else:
                    while next_kept < cutlass.min(before + C, keeping.before + tokens):
                        keep_in_chunk(
                            pipe, acc_s, piece, before, next_kept, numbers, inputs, mO, wg, warp, o_row, keeping
                        )
                        next_kept = checkpoints.next_at(pipe.config, keeping, next_kept + 1)
            stage, phase, is_own, prepared, inverted = pipeline.made(pipe, bars, n)
            cute.arch.mbarrier_wait(prepared, phase)
            update.begin_product(mma_ks, acc_ro, acc_s, fS, bKQ[None, None, None, stage])  # [Kd S^T | Qd S^T]^T
            norm_at = sTables + stage * TABLES + NORM + col * 4
            decay_at = sTables + stage * TABLES + DECAY + col * 4
            if (fate & Fate.WARM_UP) != 0:
                forget = forget * ptx.lds_f32(sTables + stage * TABLES + DECAY + thread * 4)
            cute.arch.mbarrier_wait(inverted, phase)
            warpgroup.wait_group(0)
            v_at = ring.toint() + pipe.tiles.at_v + stage * pipe.tiles.size + wg * BOX + t_row + t_col
            r = update.residual(pipe, acc_ro, v_at, norm_at)
            # registers of their own: ptxas serializes every WGMMA when accumulators of two shapes overlap (C7511)
            for e in cutlass.range_constexpr(C // 2):
                acc_o[e] = acc_ro[C // 2 + e]
            fragments.to_operand(r, fU)
            update.updates(pipe, mma_tm, acc_u, fU, bT[None, None, None, stage], acc_s, norm_at, decay_at)
            # O += M U, then S += U^T Kr behind it
            warpgroup.fence()
            fragments.gemm(mma_tm, acc_o, fU, bM[None, None, None, stage], False)
            warpgroup.commit_group()
            fragments.gemm(mma_s, acc_s, fU, bKr[None, None, None, stage], False)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            o, pack = [], ptx.pack_bf16 if pipe.dtype is BFloat16 else ptx.pack_f16
            for n8 in cutlass.range_constexpr(C // 8):
                rq = ptx.lds_f32x2(norm_at + (C + n8 * 8) * 4)
                for half in cutlass.range_constexpr(2):
                    o.append(pack(acc_o[4 * n8 + 2 * half] * rq[0], acc_o[4 * n8 + 2 * half + 1] * rq[1]))
            o_at = o_row + buf * BOX + t_row + t_col
            ptx.stmatrix_x4(o_at, tuple(o[:4]), trans=True)
            ptx.stmatrix_x4(o_at + 2048, tuple(o[4:]), trans=True)
            warpgroup.wait_group(0)
            pipeline.leave(pipe, bars, n, stage, is_own, lane)  # as early as can be: the ring is what limits
            cute.arch.fence_view_async_shared()
            if warp == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)  # the store before has left the other buffer
            cute.arch.barrier(barrier_id=STATE_BAR + wg, number_of_threads=128)
            if written - c * C >= C:
                if warp == 0:
                    cute.copy(o_tma, sO_[None, wg * 2 + buf], gO_[None, c, vs])
                    cute.arch.cp_async_bulk_commit_group()
            else:
                store_tail(o_row + buf * BOX, mO, start + c * C, written - c * C, h, b, vs, thread)
            buf ^= 1
            n += 1
        if (fate & Fate.WARM_UP) != 0:
            ptx.sts_i32(work.plan + AT_WARM_UP, start)
        elif not ptx.all_of(recurrence.is_finite(acc_s), STATE_BAR + wg):
            if (fate & Fate.KEPT) == 0:
                run_again(pipe, acc_s, piece, place, source, numbers, work, inputs, mO, wg, warp, vs, o_row, keeping)
        if const_expr(pipe.config.checkpoints == "offsets"):
            if next_kept == keeping.before + tokens:  # the state that the piece ends with
                checkpoints.keep(acc_s, pipe.config, keeping, next_kept)
        end(pipe, acc_s, piece, place, guessed, numbers, work, bars, wg, warp, lane, vs)
    cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def begin(
    pipe: cutlass.Constexpr, acc_s: cute.Tensor, forget: Float32, piece: Entry, place, numbers: Numbers, work: Listed,
    wg: Int32, warp: Int32, lane: Int32, vs: Int32,
):  # fmt: skip
    """Makes acc_s the state before a piece: (whether it is a guess; where it comes from, if neither from that nor from
    the initial states). A segment finds in acc_s what the chunks before come to, in `forget` their decay."""
    fate = piece.fate
    guessed, source = Boolean(False), fate & (Fate.TAKEN_OVER | Fate.AGAIN)
    if (fate & Fate.SEGMENT) != 0:
        guessed = ptx.all_of(forget < segments.FORGOTTEN, STATE_BAR + wg)
        source = Int32(Fate.TAKEN_OVER)
        if guessed:
            source = Int32(0)
            segments.note(acc_s, work.plan, 1, wg * 4 + warp, lane)
        if const_expr(pipe.blocks == 1):
            if (fate & Fate.BUILT) != 0:
                guessed, source = Boolean(True), Int32(Fate.BUILT)
    if source != 0:
        if (warp == 0) & ((fate & Fate.AGAIN) != 0):
            cute.arch.cp_async_bulk_wait_group(0)  # o of the first time has been written
        segments.take(pipe.team, acc_s, place, source)
    elif (fate & (Fate.SEGMENT | Fate.KEPT)) == 0:
        state_io.load(acc_s, pipe.config, initial_of(numbers, piece), vs, numbers.flags)
    return guessed, source


@cute.jit
def initial_of(numbers: Numbers, piece: Entry) -> state_io.State:
    """What a piece begins with that is its sequence's first."""
    address = numbers.initial_state
    if (piece.fate & (Fate.WARM_UP | Fate.FROM_ZERO | Fate.NULL)) != 0:
        address = Int64(0)
    return state_io.State(address, numbers.initial_pitch, piece.slot, piece.h)


@cute.jit
def run_again(
    pipe: cutlass.Constexpr, acc_s: cute.Tensor, piece: Entry, place, source: Int32, numbers: Numbers, work: Listed,
    inputs, mO: cute.Tensor, wg: Int32, warp: Int32, vs: Int32, o_row: Int32, keeping,
):  # fmt: skip
    """A piece token by token, from what it began with."""
    start, h, fate, flags = piece.start, piece.h, piece.fate, numbers.flags
    if warp == 0:
        cute.arch.cp_async_bulk_wait_group(0)  # o of the first time has been written
    first = start
    if source != 0:
        segments.read(pipe.team, acc_s, place, source)
    elif (fate & Fate.SEGMENT) != 0:  # which has guessed
        first = ptx.lds_i32(work.plan + AT_WARM_UP)
        for i in cutlass.range_constexpr(64):
            acc_s[i] = Float32(0.0)
    else:
        state_io.load(acc_s, pipe.config, initial_of(numbers, piece), vs, flags)
    recurrence.token_by_token(
        pipe, acc_s, inputs, numbers, mO, first, start, start + piece.tokens, h, piece.b, wg, o_row, keeping
    )


@cute.jit
def keep_in_chunk(
    pipe: cutlass.Constexpr, acc_s: cute.Tensor, piece: Entry, before: Int32, at: Int32, numbers: Numbers, inputs,
    mO: cute.Tensor, wg: Int32, warp: Int32, o_row: Int32, keeping: checkpoints.Keeping,
):  # fmt: skip
    """Keeps the state before token `at` of the sequence; acc_s is that before `before`, in the same chunk."""
    scratch = checkpoints.scratch_at(keeping.kept, ptx.block()[0] * pipe.state_wgs + wg)
    if at != before:
        checkpoints.save(acc_s, scratch)
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # o has left what is scratch now
        first = piece.start + before - keeping.before
        recurrence.token_by_token(
            pipe, acc_s, inputs, numbers, mO, first, Int32(checkpoints.NEVER), first + at - before, piece.h, piece.b,
            wg, o_row, None,
        )  # fmt: skip
    checkpoints.keep(acc_s, pipe.config, keeping, at)
    if at != before:
        checkpoints.restore(acc_s, scratch)


@cute.jit
def end(
    pipe: cutlass.Constexpr, acc_s: cute.Tensor, piece: Entry, place, guessed: Boolean, numbers: Numbers, work: Listed,
    bars: Barriers, wg: Int32, warp: Int32, lane: Int32, vs: Int32,
):  # fmt: skip
    """What becomes of S behind a piece."""
    fate = piece.fate
    if (fate & (Fate.COMPARED | Fate.AGAIN)) == Fate.COMPARED:
        segments.note(acc_s, work.plan, 0, wg * 4 + warp, lane)
    if (fate & Fate.SEGMENT) != 0:
        if lane == 0:
            if (wg == 0) & (warp == 0):
                ptx.sts_i32(work.plan + AT_GUESSED, Int32(guessed))
            cute.arch.mbarrier_arrive(bars.settled)
    if (fate & Fate.HANDED_ON) != 0:
        segments.hand_on(pipe.team, acc_s, place, fate, guessed, bars.given)
    if (fate & Fate.FINAL) != 0:
        final = state_io.State(numbers.final_state, numbers.final_pitch, piece.slot, piece.h)
        state_io.store(acc_s, pipe.config, final, vs, numbers.flags)


@cute.jit
def clear_rows(mO: cute.Tensor, start: Int32, tokens: Int32, h: Int32, b: Int32, vs: Int32, thread: Int32):
    """o of a null sequence becomes zero."""
    for t in cutlass.range(thread // 8, tokens, 16, unroll=1):
        row = mO[start + t, None, h, b]
        ptx.stg_u32x4((row.iterator + (vs * 64 + thread % 8 * 8)).toint(), (Uint32(0),) * 4)


@cute.jit
def store_tail(sO: Int32, mO: cute.Tensor, token: Int32, valid: Int32, h: Int32, b: Int32, vs: Int32, thread: Int32):
    """The last, partial chunk: a TMA box would overwrite the next sequence."""
    for i in cutlass.range_constexpr(2):
        r, piece = thread // 8 + 16 * i, thread % 8
        if r < valid:
            words = ptx.lds_u32x4(sO + r * 128 + ((piece ^ (r % 8)) * 16))
            row = mO[token + r, None, h, b]
            ptx.stg_u32x4((row.iterator + (vs * 64 + piece * 8)).toint(), words)
