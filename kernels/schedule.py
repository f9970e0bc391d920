"""Who does what: the line of all work, a worker's part of it, and the pieces that it walks through.

docs/kernel/scheduling.md says why. What the host has to know of it is in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from . import ptx
from .config import CU_INT64, ITEM_COST, LISTED, part
from .layout import C, phase_of, slot_of

# The plan: of each listed sequence its place on the line of `share`, first token and tokens; sums of warps; of the part
# of this worker the end, the begin, the number of pieces, its last and first sequence; the pieces that come next.
PIECES = 8  # so many: more than there are stages, for sequences of a chunk or less
AT_STARTS, AT_TOKENS, AT_WARPS = 4 * LISTED, 8 * LISTED, 12 * LISTED
AT_END = AT_WARPS + 8 * LISTED // 32
AT_BEGIN, AT_COUNT, AT_LAST, AT_FIRST, AT_LENGTH, AT_WARM, AT_SEGMENT, AT_GUESSED = (
    AT_END + 4 * i for i in range(1, 9)
)
AT_WARM_UP = AT_END + 36  # the first token of the warm-up
AT_HASHES = AT_END + 48  # of the states that a piece ends and a segment begins with, of each of 8 warps
AT_PIECES = AT_HASHES + 2 * 8 * 8
PIECE = 48  # bytes of an Entry
PLAN = AT_PIECES + PIECE * PIECES
CUTS = 32  # bytes: entries of cu_seqlens, for `rest_of`
SPAN = 1 << 16  # first worker and SPAN times the last one


class Fate:
    """Flags: what becomes of a piece's state, where it comes from if not from `initial_state`, and what there is to do
    for it. Plain numbers: ~ of an IntFlag has no higher bits."""

    FINAL = 1 << 0  # it is the sequence's last
    HANDED_ON = 1 << 1  # the next worker goes on with it
    TAKEN_OVER = 1 << 2  # it begins with that of the worker before
    WARM_UP = 1 << 3  # chunks before a segment, for it to guess the state that it begins with; nothing is stored
    SEGMENT = 1 << 4  # it begins with a guess, if that is good, else with the state of the worker before
    AGAIN = 1 << 5  # a segment that began with a wrong guess
    KEPT = 1 << 6  # a segment that is done: there is no more to do than to store its state
    COMPARED = 1 << 7  # what it comes to is compared with what the next segment began with
    BUILT = 1 << 8  # a segment that begins with the state that maps give
    FROM_ZERO = 1 << 9  # the sequence has no initial state
    NULL = 1 << 10  # nor anything else: o is zero, and there is no state


class Piece(NamedTuple):
    """A piece of work, or the warm-up for one."""

    next_at: Int32  # where on the line the next one ends
    start: Int32  # first token
    tokens: Int32
    h: Int32
    b: Int32
    n: Int32  # the sequence
    fate: Int32
    span: Int32  # workers that have pieces of the item
    skipped: Int32  # chunks of the sequence before it

    @staticmethod
    def none(next_at: Int32) -> Piece:
        return Piece(next_at, *(Int32(0) for _ in range(8)))


class Entry(NamedTuple):
    """A piece as `load` lists it for all roles."""

    start: Int32
    tokens: Int32
    h: Int32
    b: Int32
    slot: Int32  # of the state; of a null sequence the tokens whose o becomes zero, while `tokens` is 0
    fate: Int32
    next_lo: Int32  # address of the initial state that comes next; 0 for none
    next_hi: Int32
    span: Int32 | None = None  # for `load`
    skipped: Int32 | None = None  # with checkpoints, as is the next one
    n: Int32 | None = None


class Work(Protocol):
    """What the roles of a pipeline walk through: `count` pieces, of which they ask for the first tokens, tokens, heads
    and batches, one after the other. Frozen dataclasses, so that the DSL does not carry them through loops."""

    def count(self) -> Int32: ...

    def piece(self, nth: Int32): ...


@dataclass(frozen=True)
class Listed:
    """A worker's pieces, as `load` lists them, PIECES at a time: in shared memory, with mbarriers."""

    checkpoints: bool
    plan: Int32
    listed: cute.Pointer
    taken: cute.Pointer

    def count(self) -> Int32:
        return ptx.uniform(ptx.lds_i32(self.plan + AT_COUNT))

    @cute.jit
    def piece(self, nth: Int32) -> Entry:
        at = self.plan + AT_PIECES + slot_of(nth, PIECES) * PIECE
        cute.arch.mbarrier_wait(self.listed + slot_of(nth, PIECES), phase_of(nth, PIECES))
        numbers = (*ptx.lds_i32x4(at), *ptx.lds_i32x4(at + 16))
        if const_expr(self.checkpoints):
            numbers += ptx.lds_i32x4(at + 32)[:3]
        cute.arch.mbarrier_arrive(self.taken + slot_of(nth, PIECES))
        return Entry(*(ptx.uniform(x) for x in numbers))

    def entry(self, nth: Int32) -> Entry:
        """A piece that this warp has put there, not long ago."""
        at = self.plan + AT_PIECES + slot_of(nth, PIECES) * PIECE
        return Entry(*(x for i in range(3) for x in ptx.lds_i32x4(at + 16 * i)[: 3 if i == 2 else 4]))

    @cute.jit
    def put(self, nth: Int32, entry: Entry):
        """Lists a piece; by one warp."""
        slot = slot_of(nth, PIECES)
        cute.arch.mbarrier_wait(self.taken + slot, phase_of(nth, PIECES) ^ 1)
        with cute.arch.elect_one():
            to = self.plan + AT_PIECES + slot * PIECE
            ptx.sts_i32x4(to, entry[:4])
            ptx.sts_i32x4(to + 16, entry[4:8])
            ptx.sts_i32x4(to + 32, (*entry[8:], Int32(0)))
            cute.arch.mbarrier_arrive(self.listed + slot)


def worker(blocks: int) -> tuple[Int32, Int32]:
    """(which, of how many); blocks: that share a head."""
    return cute.arch.block_idx()[0] // blocks, cute.arch.grid_dim()[0] // blocks


def rank(blocks: int) -> Int32:
    """Of the block in its cluster: the chunks it prepares, if these are counted over all pieces of work, and the slice
    of V that it has."""
    return cute.arch.block_idx()[0] % blocks


@cute.jit
def share(sPlan: Int32, items: Int32, H: Int32, T: Int32, cu_seqlens: Int64, workspace: Int64, flags: Int32,
    worker: Int32, workers: Int32,
):  # fmt: skip
    """A worker's part of a line on which all items, the (sequence, head)s, lie one behind the other, each as long
    as its chunks and ITEM_COST: left in shared memory, with the number of pieces in it. A worker is a block, or
    the blocks that share a head.

    An item that lies across a border is cut there, if there is a workspace to hand its state on by; all workers
    then take equally long (McNaughton's wrap-around rule). They walk their parts from the end to the beginning. So
    the first piece of an item is what its worker begins with, the second what the next worker ends with, which
    hardly waits, and for none but a block with a lower index.

    Are parts shorter than an item, then the pieces of it that do not begin it are segments. A worker has one at
    most, its last piece; it is listed three times: to warm up, to run, and to run again if need be.

    Without a workspace, places on the line are items, which are dealt out in turn.
    """
    n, lane, warp = cute.arch.thread_idx()[0], cute.arch.lane_idx(), cute.arch.warp_idx()
    end, begin = cute.ceil_div(items - worker, workers), Int32(0)
    count, length, warm, first_chunk = end, Int32(0), Int32(0), Int32(0)
    if workspace != 0:
        unit = cute.ceil_div(T, C) + ITEM_COST
        total = items * unit
        if cu_seqlens != 0:
            start, tokens, mine = Int32(0), Int32(0), Int32(0)
            unit = Int32(0)
            if n < items // H:
                start, tokens, _ = sequence(n, cu_seqlens, flags, T)
                unit = cute.ceil_div(tokens, C) + ITEM_COST
                mine = unit * H
            upto = mine
            for i in cutlass.range_constexpr(5):
                before = cute.arch.shuffle_sync_up(upto, 1 << i, mask_and_clamp=0)
                if lane >= 1 << i:
                    upto += before
                unit = cutlass.max(unit, cute.arch.shuffle_sync_bfly(unit, 1 << i))
            if (lane == 31) & (warp < LISTED // 32):
                ptx.sts_i32(sPlan + AT_WARPS + warp * 8, upto)
                ptx.sts_i32(sPlan + AT_WARPS + warp * 8 + 4, unit)
            cute.arch.sync_threads()
            total = Int32(0)
            before = Int32(0)
            for i in cutlass.range_constexpr(LISTED // 32):
                if warp == i:
                    before = total
                total += ptx.lds_i32(sPlan + AT_WARPS + i * 8)
                unit = cutlass.max(unit, ptx.lds_i32(sPlan + AT_WARPS + i * 8 + 4))
            upto += before
            end, begin, length, warm = part_of(total, unit, worker, workers)
            if n < items // H:
                ptx.sts_i32(sPlan + n * 4, upto - mine)
                ptx.sts_i32(sPlan + AT_STARTS + n * 4, start)
                ptx.sts_i32(sPlan + AT_TOKENS + n * 4, tokens)
                for x, at in ((end - 1, AT_LAST), (begin, AT_FIRST)):
                    if (upto - mine <= x) & (x < upto):
                        ptx.sts_i32(sPlan + at, n)
            cute.arch.sync_threads()
            count = Int32(0)
            if begin < end:
                first, last = ptx.lds_i32(sPlan + AT_FIRST), ptx.lds_i32(sPlan + AT_LAST)
                count = (last - first) * H + 1
                count += head_at(end - 1, last, sPlan) - head_at(begin, first, sPlan)
                unit = cute.ceil_div(ptx.lds_i32(sPlan + AT_TOKENS + first * 4), C) + ITEM_COST
                first_chunk = ptx.lds_i32(sPlan + first * 4) + ITEM_COST
                first_chunk += head_at(begin, first, sPlan) * unit
        else:
            end, begin, length, warm = part_of(total, unit, worker, workers)
            count = cutlass.max((end - 1) // unit - begin // unit + 1, 0)
            first_chunk = begin // unit * unit + ITEM_COST
    if n == 0:
        ptx.sts_i32(sPlan + AT_END, end)
        ptx.sts_i32(sPlan + AT_BEGIN, begin)
        ptx.sts_i32(sPlan + AT_LENGTH, length)
        ptx.sts_i32(sPlan + AT_WARM, warm)
        segment = Int32((warm > 0) & (begin > first_chunk) & (begin < end))
        ptx.sts_i32(sPlan + AT_SEGMENT, segment)
        count += 2 * segment
        ptx.sts_i32(sPlan + AT_COUNT, count)


def part_of(total: Int32, longest: Int32, worker: Int32, workers: Int32):
    """A worker's part of the line: (end, begin, length, chunks by which segments begin early)."""

    def choose(condition, a, b):
        return b + (a - b) * Int32(condition)

    length, warm = part(total, longest, workers, cutlass.max, choose)
    return cutlass.min((worker + 1) * length, total), worker * length, length, warm


def head_at(at: Int32, seq: Int32, sPlan: Int32):
    """Whose head of a listed sequence is at a place of the line."""
    chunks = cute.ceil_div(ptx.lds_i32(sPlan + AT_TOKENS + seq * 4), C)
    return (at - ptx.lds_i32(sPlan + seq * 4)) // (chunks + ITEM_COST)


@cute.jit
def find_piece(at: Int32, sPlan: Int32, items: Int32, H: Int32, T: Int32, cu_seqlens: Int64, workspace: Int64,
    flags: Int32, warmed_up: Int32, worker: Int32, workers: Int32,
) -> Piece:  # fmt: skip
    """The piece that ends at place `at` of the line. If it is a segment, its warm-up comes first."""
    at -= 1
    next_at, skipped, upto, fate, span = at, Int32(0), Int32(1 << 25), Int32(Fate.FINAL), Int32(0)
    item = at * workers + worker
    seq = item // H
    h = item - seq * H
    start, tokens, b = Int32(0), T, seq
    base, unit = Int32(0), cute.ceil_div(T, C) + ITEM_COST
    if workspace == 0:
        start, tokens, b = sequence(seq, cu_seqlens, flags, T)
    else:
        if cu_seqlens == 0:
            item = at // unit
            seq = item // H
            h = item - seq * H
            b = seq
            base = item * unit
        else:
            seq = ptx.lds_i32(sPlan + AT_LAST)
            while ptx.lds_i32(sPlan + seq * 4) > at:
                seq -= 1
            h = head_at(at, seq, sPlan)
            start, b = ptx.lds_i32(sPlan + AT_STARTS + seq * 4), Int32(0)
            tokens = ptx.lds_i32(sPlan + AT_TOKENS + seq * 4)
            unit = cute.ceil_div(tokens, C) + ITEM_COST
            base = ptx.lds_i32(sPlan + seq * 4) + h * unit
        next_at = cutlass.max(base, ptx.lds_i32(sPlan + AT_BEGIN))
        skipped = cutlass.max(next_at - base - ITEM_COST, 0)  # chunks of the item before the piece
        if at + 1 < base + unit:
            upto = cutlass.max(at + 1 - base - ITEM_COST, 0)
            fate = Int32(0)
            if upto > 0:
                fate = Int32(Fate.HANDED_ON)
                if ptx.lds_i32(sPlan + AT_WARM) > 0:
                    fate = Int32(Fate.HANDED_ON | Fate.COMPARED)
                    span = workers_of(base, unit, sPlan)
    tokens = cutlass.min(tokens, upto * C)
    if skipped > 0:
        warm = cutlass.min(ptx.lds_i32(sPlan + AT_WARM), skipped)
        if warm == 0:
            fate += Fate.TAKEN_OVER
        else:
            span = workers_of(base, unit, sPlan)
            next_at = at + 1
            if warmed_up == 0:
                fate = Int32(Fate.WARM_UP)
                tokens = skipped * C
                skipped -= warm
            else:
                fate = (fate & ~Fate.FINAL) | Fate.SEGMENT
    return Piece(next_at, start + skipped * C, tokens - skipped * C, h, b, seq, fate, span, skipped)


def workers_of(base: Int32, unit: Int32, sPlan: Int32) -> Int32:
    """The workers that have pieces of an item: the first and SPAN times the last."""
    length = ptx.lds_i32(sPlan + AT_LENGTH)
    return (base + ITEM_COST) // length + (base + unit - 1) // length * SPAN


@cute.jit
def sequence(n: Int32, cu_seqlens: Int64, flags: Int32, T: Int32):
    """(first token, tokens, batch) of sequence n. Wrong cu_seqlens give shorter sequences, no wrong address."""
    start, end, b = Int32(0), T, n
    if cu_seqlens != 0:
        if (flags & CU_INT64) != 0:
            cu64 = cute.make_tensor(cute.make_ptr(Int64, cu_seqlens, cute.AddressSpace.gmem), cute.make_layout(2))
            start = clamp(cu64[n], T)
            end = clamp(cu64[n + 1], T)
        else:
            cu32 = cute.make_tensor(cute.make_ptr(Int32, cu_seqlens, cute.AddressSpace.gmem), cute.make_layout(2))
            start = clamp(Int64(cu32[n]), T)
            end = clamp(Int64(cu32[n + 1]), T)
        end = cutlass.max(start, end)
        b = Int32(0)
    return start, end - start, b


def clamp(x: Int64, T: Int32) -> Int32:
    return Int32(cutlass.min(cutlass.max(x, Int64(0)), Int64(T)))


@cute.jit
def cut(n: Int32, cu_seqlens: Int64, flags: Int32, T: Int32) -> Int32:
    """cu_seqlens[n], moved into 0 .. T."""
    x = Int32(0)
    if (flags & CU_INT64) != 0:
        x = clamp(ptx.ldg_i64(cu_seqlens + Int64(n) * 8), T)
    else:
        x = clamp(Int64(ptx.ldg_i32(cu_seqlens + Int64(n) * 4)), T)
    return x


@cute.jit
def ask_cuts(to: Int32, n: Int32, N: Int32, cu_seqlens: Int64, flags: Int32):
    """Copies cu_seqlens 0, N, n and n + 1 into a warp's CUTS bytes of shared memory, for `rest_of`."""
    lane, i = cute.arch.lane_idx(), n
    if lane < 2:
        i = lane * N
    if lane == 3:
        i = n + 1
    if lane < 4:
        if (flags & CU_INT64) != 0:
            ptx.copy_async(to + lane * 8, cu_seqlens + Int64(i) * 8, 8)
        else:
            ptx.copy_async(to + lane * 8, cu_seqlens + Int64(i) * 4, 4)
    cute.arch.cp_async_commit_group()


@cute.jit
def rest_of(cuts: Int32, T: Int32, flags: Int32):
    """(tokens before the first sequence and behind the last one, whether a sequence ends before it begins)"""
    cute.arch.cp_async_wait_group(0)
    x = Int64(0)
    if cute.arch.lane_idx() < 4:
        x = Int64(ptx.lds_i32(cuts + cute.arch.lane_idx() * 8))
        if (flags & CU_INT64) != 0:
            x = ptx.pair(Int32(x), ptx.lds_i32(cuts + cute.arch.lane_idx() * 8 + 4))
    first, last, begin, end = (cute.arch.shuffle_sync(clamp(x, T), i) for i in range(4))
    return first + T - last, begin > end


@cute.jit
def clear_rest(
    clear: cutlass.Constexpr, target, cu_seqlens: Int64, N: Int32, T: Int32, flags: Int32, me: Int32, of: Int32
):
    """A warp's share, `me` of `of`, of the tokens t that no sequence has: clear(target, t).

    They lie before the first cut or behind the last one. If cuts decrease any may be one, which is looked up.
    """
    first, last, ordered = edges(cu_seqlens, N, T, flags)
    for t in cutlass.range(me, T, of, unroll=1):
        if (t < first) | (t >= last) | (ordered == 0):
            if covered(t, cu_seqlens, N, T, flags) == 0:
                clear(target, t)


@cute.jit
def clear_tokens(
    clear: cutlass.Constexpr, target, start: Int32, tokens: Int32, cu_seqlens: Int64, N: Int32, T: Int32, flags: Int32,
    me: Int32, of: Int32,
):  # fmt: skip
    """The same, behind all `tokens` tokens from `start` on; nothing else if `of` is 0. One loop: clear is long."""
    first, last, ordered, rest = Int32(0), Int32(0), Int32(1), Int32(0)
    if of > 0:
        first, last, ordered = edges(cu_seqlens, N, T, flags)
        rest = cute.ceil_div(T - me, of)
    for i in cutlass.range(tokens + rest, unroll=1):
        t, wanted = start + i, Int32(1)
        if i >= tokens:
            t, wanted = me + (i - tokens) * of, Int32(0)
            if (t < first) | (t >= last) | (ordered == 0):
                wanted = Int32(covered(t, cu_seqlens, N, T, flags) == 0)
        if wanted != 0:
            clear(target, t)


@cute.jit
def edges(cu_seqlens: Int64, N: Int32, T: Int32, flags: Int32):
    """(the first cut, the last one, whether none decreases)"""
    lane, last = cute.arch.lane_idx(), cut(N, cu_seqlens, flags, T)
    first, ordered = cut(Int32(0), cu_seqlens, flags, T), Int32(1)
    for n in cutlass.range(lane, N, 32, unroll=1):
        if cut(n, cu_seqlens, flags, T) > cut(n + 1, cu_seqlens, flags, T):
            ordered = Int32(0)
    return first, last, ptx.least(ordered)


@cute.jit
def covered(t: Int32, cu_seqlens: Int64, N: Int32, T: Int32, flags: Int32) -> Int32:
    """How many sequences have a token; a warp looks."""
    count = Int32(0)
    for n in cutlass.range(cute.arch.lane_idx(), N, 32, unroll=1):
        begin, end = cut(n, cu_seqlens, flags, T), cut(n + 1, cu_seqlens, flags, T)
        count += Int32((begin <= t) & (t < end))
    return ptx.sum(count)
