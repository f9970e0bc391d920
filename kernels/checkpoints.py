"""States that are kept on the way, between chunks or in one.

Either every so many chunks, or after `offsets` tokens of a sequence. An offset in the middle of a chunk is reached
token by token, from a copy of the state before that chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from . import ptx, state_io
from .arguments import Kept
from .config import KEPT_INT64, OFFSET_INT64, STATE_BYTES
from .layout import C
from .schedule import Entry

NEVER = 1 << 30  # no offset


class Keeping(NamedTuple):
    """What a piece keeps."""

    kept: Kept
    n: Int32  # the sequence
    before: Int32  # its tokens before the piece
    first: Int32  # the row of its first state, with `every`
    h: Int32
    vs: Int32
    flags: Int32


@cute.jit
def of_piece(config: cutlass.Constexpr, kept: Kept, piece: Entry, vs: Int32, flags: Int32) -> Keeping:
    first = Int32(0)
    if const_expr(config.checkpoints == "every"):
        first = ptx.uniform(ptx.ldg_i32(kept.first + Int64(piece.n) * 4))
    return Keeping(kept, piece.n, piece.skipped * C, first, piece.h, vs, flags)


@cute.jit
def next_at(config: cutlass.Constexpr, keeping: Keeping, t: Int32) -> Int32:
    """The next token, from the t-th of the sequence on, before which a state is kept; NEVER if there is none."""
    kept, found = keeping.kept, Int32(NEVER)
    if const_expr(config.checkpoints == "every"):
        period = kept.every * C
        found = (t + period - 1) // period * period
    else:
        for m in cutlass.range(kept.per, unroll=1):
            x = offset_at(keeping, m)
            if (x >= cutlass.max(t, 1)) & (x < found):
                found = x
    return found


@cute.jit
def offset_at(keeping: Keeping, m: Int32) -> Int32:
    i = keeping.n * keeping.kept.per + m
    x = state_io.index_at(keeping.kept.offsets, i, keeping.flags, OFFSET_INT64)
    return ptx.uniform(Int32(cutlass.min(cutlass.max(x, Int64(0)), Int64(NEVER))))


@cute.jit
def keep(acc: cute.Tensor, config: cutlass.Constexpr, keeping: Keeping, t: Int32):
    """Stores the state before token t, which is one to be kept, wherever it is asked for."""
    kept, flags = keeping.kept, keeping.flags
    if const_expr(config.checkpoints == "every"):
        store(acc, config, keeping, keeping.first + t // (kept.every * C))
    else:
        for m in cutlass.range(kept.per, unroll=1):
            row = Int32(-1)
            if offset_at(keeping, m) == t:
                row = ptx.uniform(
                    state_io.slot_of(keeping.n * kept.per + m, kept.indices, kept.rows, flags, KEPT_INT64)
                )
            if row >= 0:
                store(acc, config, keeping, row)


def store(acc: cute.Tensor, config, keeping: Keeping, row: Int32) -> None:
    state = state_io.State(keeping.kept.states, keeping.kept.pitch, row, keeping.h)
    state_io.store_checkpoint(acc, config, state, keeping.vs, keeping.flags)


def scratch_at(kept: Kept, slice: Int32) -> Int64:  # noqa: A002
    """Where a thread of a state warpgroup has room for its part of a state."""
    return kept.scratch + Int64(slice) * STATE_BYTES + Int64(ptx.thread() % 128 * 16)


@cute.jit
def save(acc: cute.Tensor, at: Int64):
    for i in cutlass.range_constexpr(16):
        ptx.stg_f32x4(at + i * 2048, tuple(acc[4 * i + j] for j in range(4)))


@cute.jit
def restore(acc: cute.Tensor, at: Int64):
    for i in cutlass.range_constexpr(16):
        for j, x in enumerate(ptx.ldg_f32x4(at + i * 2048)):
            acc[4 * i + j] = x
