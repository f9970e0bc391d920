"""The states that segments begin with, from the maps of those before: S <- S M + C, in fp32.

A block has ROWS rows of S, from segment to segment.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from . import ptx, segments, state_io
from .config import INITIAL, STATE_BYTES, STATE_V_FIRST
from .layout import D

ROWS = 16  # of the state, in a block
# Above, products and sums of the chunks in between may overflow where those with a map of all of them do not, and what
# is NaN without maps would be a number. Such states are waited for, as those that are not finite.
MODERATE = 2.0**40


@cute.jit
def states_of(
    config: cutlass.Constexpr, initial: state_io.State, workspace: Int64, workers: Int32, first: Int32, last: Int32,
    part: Int32, thread: Int32, sS: Int32, sSums: Int32, sExtreme: Int32, flags: Int32,
):  # fmt: skip
    """Those that the segments of workers `first` + 1 to `last` begin with, where C of the segment before was.

    A thread has columns 2 p and 2 p + 1 of rows r, r + 8, r + 1, r + 9, as the accumulators of `maps` do; and of a
    product the sums over a quarter of the columns of S, for all rows. The next M is loaded meanwhile."""
    p, quarter = thread % 64, thread // 64
    vs, row = part // 4, part % 4 * 16 + quarter * 2
    column = Int64(p // 4 * 2048 + p % 4 * 16)
    m_at = column + Int64(quarter // 2 * STATE_BYTES + quarter % 2 * 1024)
    acc = cute.make_rmem_tensor((8,), Float32)
    m = cute.make_rmem_tensor((64,), Float32)
    first_state(acc, config, initial, vs * 64 + row, p, flags)
    load_m(m, segments.map_at(workspace, workers, first, 2) + m_at)
    for i in cutlass.range(first + 1, last + 1, unroll=1):
        word = segments.map_word(workspace, workers, i)
        given, then = ptx.ldg_i32(word), Int32(0)
        if i < last:
            then = ptx.ldg_i32(word + 4)
        c_at = segments.map_at(workspace, workers, i - 1, vs) + column + Int64((row // 16 * 32 + row % 8 * 4) * 16)
        if (given | then) != 0:
            if (ptx.uniform(Int32(1) - Int32(moderate(acc))) != 0) & (thread % 32 == 0):
                ptx.sts_i32(sExtreme + thread // 32 * 4, Int32(1))
            at = sS + quarter * (2 * D * 4) + p * 8  # [row][column]
            for j in cutlass.range_constexpr(4):
                ptx.sts_f32x2(at + (j // 2 + j % 2 * 8) * (D * 4), acc[2 * j], acc[2 * j + 1])
            for half in cutlass.range_constexpr(2):
                for j, x in enumerate(ptx.ldg_f32x4(c_at + half * 64)):
                    acc[4 * half + j] = x
            cute.arch.sync_threads()
            extreme = any_of(sExtreme) | any_of(sExtreme + 16)  # this state or one before it
            product_of(m, sS + quarter * (32 * 4), sSums + quarter * (ROWS * D * 4) + p * 8)
            if i < last:
                load_m(m, segments.map_at(workspace, workers, i, 2) + m_at)
            cute.arch.sync_threads()
            if given != 0:
                for j in cutlass.range_constexpr(4):
                    for q in cutlass.range_constexpr(4):
                        at = sSums + (q * ROWS + quarter * 2 + j // 2 + j % 2 * 8) * (D * 4) + p * 8
                        x = ptx.lds_f32x2(at)
                        acc[2 * j] = acc[2 * j] + x[0]
                        acc[2 * j + 1] = acc[2 * j + 1] + x[1]
                for half in cutlass.range_constexpr(2):
                    ptx.stg_f32x4(c_at + half * 64, tuple(acc[4 * half + j] for j in range(4)))
                if (extreme != 0) | (not moderate(acc)):
                    ptx.stg_i32(word, Int32(2))
        else:
            if i < last:
                load_m(m, segments.map_at(workspace, workers, i, 2) + m_at)


def moderate(acc: cute.Tensor) -> Boolean:
    all_are = Boolean(True)
    for i in range(8):
        all_are = all_are & (ptx.absolute(acc[i]) < MODERATE)
    return all_are


def load_m(m: cute.Tensor, at: Int64) -> None:
    """32 rows of M, two columns: of rows 16 b + r and 16 b + r + 8, [b, r]."""
    for i in range(16):
        for j, x in enumerate(ptx.ldg_f32x4(at + i // 8 * 512 + i % 8 * 64)):
            m[4 * i + j] = x


def product_of(m: cute.Tensor, s_at: Int32, sums_at: Int32) -> None:
    """Rows of S, 32 of its columns, times these rows of M."""
    for row in range(ROWS):
        x = [Float32(0.0), Float32(0.0)]
        for j in range(0, 32, 4):
            s = ptx.lds_f32x4(s_at + row * (D * 4) + j * 4)
            for i in range(4):
                at = 4 * (j // 16 * 8 + (j + i) % 8) + j // 8 % 2 * 2
                x = [ptx.fma(s[i], m[at + e], x[e]) for e in range(2)]
        ptx.sts_f32x2(sums_at + row * (D * 4), *x)


@cute.jit
def first_state(acc: cute.Tensor, config: cutlass.Constexpr, initial: state_io.State, v: Int32, p: Int32, flags: Int32):
    for i in cutlass.range_constexpr(8):
        acc[i] = Float32(0.0)
    if (initial.address != 0) & (initial.slot >= 0):
        read_state(acc, state_io.address_of(config, initial, flags, INITIAL), v, p, flags)


@cute.jit
def read_state(acc: cute.Tensor, address: Int64, v: Int32, p: Int32, flags: Int32):
    sv, sk = Int32(1), Int32(D)
    if (flags & STATE_V_FIRST) != 0:
        sv, sk = Int32(D), Int32(1)
    for i in cutlass.range_constexpr(8):
        # rows v, v + 8, v + 1, v + 9, of each two columns
        at = Int64((v + i // 2 % 2 * 8 + i // 4) * sv + (2 * p + i % 2) * sk)
        state_io.in_dtype(lambda dtype, i=i, at=at: state_io.read(acc, i, address, at, dtype), flags, INITIAL)


def any_of(at: Int32) -> Int32:
    """What one of four warps has found."""
    x = ptx.lds_i32x4(at)
    return x[0] | x[1] | x[2] | x[3]
