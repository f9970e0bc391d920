"""What blocks tell one another: states that are handed on, and whether a segment guessed right.

A worker has a place in the workspace for each slice, of 64 value rows, of the state that it hands on, and a word
that says whether it is there; each block has three words for each other one, about its segment. A word is written
by one block and cleared by the one other that reads it, so that whoever has this memory next finds none. A block
waits for none but its cluster and those with a lower index, which need not wait for it to be scheduled.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint32, const_expr

from . import ptx, schedule
from .config import STATE_BYTES, maps_at, words_bytes
from .layout import STATE_BAR
from .schedule import AT_GUESSED, AT_HASHES, SPAN, Fate

# Words in the workspace; what lies there before hardly looks like them.
HANDED, NOT_NEEDED, GUESSED, EXACT, GIVEN = (0x6B64615F68616E64 + i for i in range(5))
# What the chunks before a segment multiply a state by at most, channel by channel, if it is to begin without it. Only a
# guess, but a wrong one costs a run: what is in one channel moves to others, up to 2^20 times as much was seen.
FORGOTTEN = 2.0**-48


class Team(NamedTuple):
    """What works on a head at the same time."""

    blocks: int  # of the cluster
    state_wgs: int  # state warpgroups of a block


def slice_of(team: cutlass.Constexpr, wg) -> Int32:
    return schedule.worker(team.blocks)[0] * 2 + schedule.rank(team.blocks) + wg


def place_of(team: cutlass.Constexpr, slice: Int32, place):
    """Addresses: (its word, a lane's part of its state)"""
    workspace, most_workers, _, thread = place
    states = workspace + Int64(words_bytes(most_workers, team.blocks))
    return workspace + Int64(slice) * 8, states + (Int64(slice) * STATE_BYTES + Int64(thread * 16))


def map_at(workspace: Int64, workers: Int32, worker: Int32, slice):
    """C (slices 0, 1) and M (2, 3) of a worker's piece; later the state behind it (0, 1)."""
    return workspace + Int64(maps_at(workers, 1)) + Int64(worker * 4 + slice) * STATE_BYTES


def map_word(workspace: Int64, workers: Int32, worker: Int32):
    """0: a segment may guess; 1: it begins with a state from the maps; 2: it waits for the true one."""
    return workspace + Int64(maps_at(workers, 1)) + Int64(workers) * 4 * STATE_BYTES + Int64(worker) * 4


@cute.jit
def hand_on(team: cutlass.Constexpr, acc: cute.Tensor, place, fate: Int32, guessed: Boolean, settled):
    """To the next worker. After a guess `load` says so, once it is known to be the right state."""
    workspace, _, wg, thread = place
    word, at = place_of(team, slice_of(team, wg), place)
    for i in cutlass.range_constexpr(16):
        ptx.stg_f32x4(at + i * 2048, tuple(acc[4 * i + j] for j in range(4)))
    if (fate & (Fate.COMPARED | Fate.AGAIN)) == Fate.COMPARED:
        cute.arch.mbarrier_arrive(settled)
    if not guessed:
        cute.arch.barrier(barrier_id=STATE_BAR + wg, number_of_threads=128)
        if thread == 0:
            if (fate & Fate.COMPARED) == 0:
                ptx.stg_release(word, Int64(HANDED))
            else:
                settle(workspace, slice_of(team, wg), Int64(HANDED), Int64(NOT_NEEDED))


@cute.jit
def take(team: cutlass.Constexpr, acc: cute.Tensor, place, source: Int32):
    """From the worker before, once it is there; or what the maps give."""
    _, _, wg, thread = place
    word, _ = place_of(team, slice_of(team, wg) - 2, place)
    if source != Fate.BUILT:
        while ptx.ldg_acquire(word) != HANDED:
            pass
    cute.arch.sync_warp()
    cute.arch.barrier(barrier_id=STATE_BAR + wg, number_of_threads=128)
    read(team, acc, place, source)
    if (thread == 0) & (source != Fate.BUILT):
        ptx.stg_relaxed(word, Int64(0))


@cute.jit
def read(team: cutlass.Constexpr, acc: cute.Tensor, place, source: Int32):
    workspace, most_workers, wg, thread = place
    _, at = place_of(team, slice_of(team, wg) - 2, place)
    if const_expr(team.blocks == 1):
        if source == Fate.BUILT:
            at = map_at(workspace, most_workers, schedule.worker(team.blocks)[0] - 1, wg) + Int64(thread * 16)
    for i in cutlass.range_constexpr(16):
        for j, x in enumerate(ptx.ldg_f32x4(at + i * 2048)):
            acc[4 * i + j] = x


@cute.jit
def settle(workspace: Int64, slice: Int32, mine: Int64, theirs: Int64):
    """Who has a state to hand on says HANDED, who might have taken it says NOT_NEEDED, and who comes second clears
    the word."""
    word = workspace + Int64(slice) * 8
    if ptx.exchange(word, mine) == theirs:
        ptx.stg_relaxed(word, Int64(0))


@cute.jit
def note(acc: cute.Tensor, sPlan: Int32, which: int, warp: Int32, lane: Int32):
    """A hash of the state that a piece ends with (0) or a segment begins with (1), for `load`."""
    hashed = ptx.hash_of([acc[i] for i in range(64)])
    if lane == 0:
        for i in cutlass.range_constexpr(2):
            ptx.sts_i32(sPlan + AT_HASHES + (which * 8 + warp) * 8 + i * 4, hashed[i])


@cute.jit
def noted(team: cutlass.Constexpr, sPlan: Int32, which: int) -> Int64:
    lo, hi = Int32(0), Int32(0)
    if cute.arch.lane_idx() < 4 * team.state_wgs:
        at = sPlan + AT_HASHES + (which * 8 + cute.arch.lane_idx()) * 8
        lo, hi = ptx.lds_i32(at), ptx.lds_i32(at + 4)
    return ptx.pair(ptx.sum(lo), ptx.sum(hi))


def told(team: cutlass.Constexpr, workspace: Int64, most_workers: Int32, reader: Int32, writer: Int32) -> Int64:
    """Address of what a block tells another: the hash of the state that its piece ends with, of that which it began
    with, and, sealed with both, whether it was GUESSED or is EXACT."""
    nth = reader * (most_workers * team.blocks) + writer
    return workspace + (Int64(most_workers) * 2 + Int64(nth) * 3) * 8


def seal(ends: Int64, begins: Int64) -> Int64:
    """The three words arrive in any order, each by itself: what of both hashes, also if they are equal, as those of
    a state that stays zero are, is no other with one or both still 0."""
    return ends + begins * 3


@cute.jit
def tell(
    team: cutlass.Constexpr, workspace: Int64, most_workers: Int32, what: Int64, hashes: tuple[Int64, Int64],
    first: Int32, end: Int32,
):  # fmt: skip
    """The blocks of workers first to end - 1, but not this one."""
    own, (ends, begins) = cute.arch.block_idx()[0], hashes
    for other in cutlass.range(team.blocks * first + cute.arch.lane_idx(), team.blocks * end, 32, unroll=1):
        if other != own:
            at = told(team, workspace, most_workers, other, own)
            for i, x in enumerate((ends, begins, seal(ends, begins) ^ what)):
                ptx.stg_relaxed(at + 8 * i, x)
    cute.arch.sync_warp()


@cute.jit
def judge(
    team: cutlass.Constexpr, workspace: Int64, most_workers: Int32, sPlan: Int32, settled, span: Int32, fate: Int32
):
    """Tells the blocks behind about this one's segment and finds out about those before: (whether it has to run
    again, because it or one before began with another state than its predecessor came to; whether the state handed
    on is not needed)."""
    lane, own, worker = cute.arch.lane_idx(), cute.arch.block_idx()[0], schedule.worker(team.blocks)[0]
    cute.arch.mbarrier_wait(settled, 0)
    guessed = ptx.lds_i32(sPlan + AT_GUESSED)
    what = Int64(EXACT)
    if guessed != 0:
        what = Int64(GUESSED)
    if const_expr(team.blocks == 1):
        if (fate & Fate.BUILT) != 0:
            what = Int64(GIVEN)
    hashes = noted(team, sPlan, 0), noted(team, sPlan, 1)
    tell(team, workspace, most_workers, what, hashes, worker, span // SPAN + 1)
    end, wrong, before = team.blocks * (worker + 1), Int32(0), Int64(0)
    for nth in cutlass.range(team.blocks * (span % SPAN), end, 32, unroll=1):
        other = nth + lane
        ends, begins, kind = Int64(0), noted(team, sPlan, 1), what
        if (other < end) & (other != own):
            at = told(team, workspace, most_workers, own, other)
            kind = Int64(0)
            while (kind != GUESSED) & (kind != EXACT) & (kind != GIVEN):
                ends, begins = ptx.ldg_relaxed(at), ptx.ldg_relaxed(at + 8)
                kind = seal(ends, begins) ^ ptx.ldg_relaxed(at + 16)
            for i in cutlass.range_constexpr(3):
                ptx.stg_relaxed(at + 8 * i, Int64(0))
        cute.arch.sync_warp()
        # of the worker before this lane's: in the lane, or in the 32 before
        rotated = ptx.shuffle(ends, (lane + 32 - team.blocks) % 32)
        came_to = rotated
        if lane < team.blocks:
            came_to = before
        before = rotated
        exact = cute.arch.vote_ballot_sync((other < end) & (kind == EXACT))
        bad = cute.arch.vote_ballot_sync((other < end) & (kind == GUESSED) & (begins != came_to))
        if (exact | bad) != 0:
            wrong = Int32(Uint32(bad) > Uint32(exact))  # of these the last one is not exact
    return wrong & guessed, guessed & (wrong ^ 1)
