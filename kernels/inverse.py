"""The inverse of a chunk's linear system: the math of `invert`, one warp.

With A = strict_lower(diag(beta) Kd Ki^T) [32, 32], keys normalized,

    T = diag(1/|k|) (I + A)^-1 diag(beta)

The diagonal blocks by forward substitution in fp32, a column a lane, used column by column of A, so that one
multiply-add, not a sum, lies between x_j and x_j+1. Then T10 = -T11 (diag(1/|k|) Kd Ki^T)10 T00 on the tensor cores, in
bf16 high and low parts.

Rounding T's diagonal to bf16 is an error of every update. With beta up to 2, whose updates hardly forget, it shows:
there T is (I + A)^-1, bare, with ones on its diagonal, and `state` multiplies by the rest in fp32.

pipe: the kernel's Pipeline. system: the chunk's in shared memory, as `prepare` leaves it. norm_at: the stage's table of
norms there.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from . import fragments, ptx, scalars
from .layout import A_ROW, SQUARES, SUB, C


@cute.jit
def scalars_of(
    pipe: cutlass.Constexpr, system: Int32, norm_at: Int32, raw_beta: Uint32, exists: Boolean, scale: Float32,
    flags: Int32, lane: Int32,
):  # fmt: skip
    """beta of the lane's token. Its 1/|k|, scale/|q| and, where T is bare, beta go to the table of norms; -beta/|k|
    takes the place of |k|^2 in the system."""
    squares = system + SQUARES + lane * 4
    k2 = ptx.lds_f32(squares)
    rk, q2 = scalars.inverse_norm(k2, flags), Float32(0.0)
    if const_expr(pipe.queries):
        q2 = ptx.lds_f32(squares + C * 4) + ptx.lds_f32(squares + 2 * C * 4)
        ptx.sts_f32(norm_at + (C + lane) * 4, scalars.inverse_norm(q2, flags) * scale)
    b_i = scalars.beta_of(raw_beta, exists, flags)
    # NaN, for `state` to find, where products might overflow
    b_i = ptx.fma((k2 + q2) * float(2.0**128 / scalars.USUAL), Float32(0.0), b_i)
    ptx.sts_f32(norm_at + lane * 4, rk)
    ptx.sts_f32(squares, -rk * b_i)
    if const_expr(pipe.config.neg_eigval):
        ptx.sts_f32(norm_at + (2 * C + lane) * 4, b_i)
    return b_i


@cute.jit
def of_chunk(
    pipe: cutlass.Constexpr, system: Int32, norm_at: Int32, ring: Int32, stage: Int32, b_i: Float32, lane: Int32
):
    """T [32, 32] to its place in the ring's stage in shared memory, bf16 (64-byte swizzle). b_i: beta of the lane's
    token."""
    # lanes 0-15: T00, lanes 16-31: T11
    block = lane // SUB * SUB
    x = substitute(pipe, system, norm_at, block, lane - block, b_i)
    cute.arch.sync_warp()
    sT = ring + stage * pipe.tiles.size + pipe.tiles.at_t
    for j in cutlass.range_constexpr(SUB):
        ptx.sts_f32(system + (block + j) * A_ROW + lane * 4, x[j])  # over A's diagonal blocks
    cute.arch.sync_warp()
    row, col = lane // 4, lane % 4 * 2
    t11, t00, a10 = [], [], []
    for e in cutlass.range_constexpr(4):  # operand registers: rows or columns 8 (e % 2), then 8 (e // 2)
        r, c8 = row + e % 2 * 8, col + e // 2 * 8
        t11.append(fragments.high_low(ptx.lds_f32x2(system + (SUB + r) * A_ROW + (SUB + c8) * 4)))
        a_ij = ptx.lds_f32x2(system + r * A_ROW + (SUB + c8) * 4)
        rk_i = ptx.lds_f32x2(norm_at + (SUB + c8) * 4)
        a_ij = a_ij[0] * rk_i[0], a_ij[1] * rk_i[1]
        if const_expr(pipe.config.neg_eigval):
            beta_i, rk_j = ptx.lds_f32x2(norm_at + (2 * C + SUB + c8) * 4), ptx.lds_f32(norm_at + r * 4)
            a_ij = a_ij[0] * beta_i[0] * rk_j, a_ij[1] * beta_i[1] * rk_j
        a10.append(fragments.high_low(a_ij))
        t_jc = system + c8 * A_ROW + r * 4
        t00.append(fragments.high_low((ptx.lds_f32(t_jc), ptx.lds_f32(t_jc + A_ROW))))
    p = fragments.product(t11, a10)
    p = [fragments.high_low((p[e // 2][e % 2 * 2], p[e // 2][e % 2 * 2 + 1])) for e in range(4)]
    t10 = fragments.product(p, t00)
    words = [[], [], [], []]
    for e in cutlass.range_constexpr(4):
        r, c8 = row + e % 2 * 8, col + e // 2 * 8
        t = system + r * A_ROW + c8 * 4
        words[0].append(ptx.pack_bf16(*ptx.lds_f32x2(t)))
        words[1].append(Uint32(0))
        words[2].append(ptx.pack_bf16(-t10[e // 2][e % 2 * 2], -t10[e // 2][e % 2 * 2 + 1]))
        words[3].append(t11[e][0])
    for i in cutlass.range_constexpr(4):
        fragments.store_tile(sT, i // 2, i % 2, words[i], lane)


def substitute(pipe: cutlass.Constexpr, system: Int32, norm_at: Int32, block: Int32, unit: Int32, beta: Float32):
    """Column `unit` of T's diagonal block [16, 16] at token `block`, in registers: x_j = delta - beta_j |k_j|^-1
    sum_i<j A_ji |k_i|^-1 x_i, times beta |k_j|^-1 unless T is bare. Loads are a step ahead."""

    def operands(j):
        at = system + (block + j) * A_ROW + block * 4
        column = [x for i in range((j + 1) // 4 * 4, SUB, 4) for x in ptx.lds_f32x4(at + i * 4)]
        return (
            ptx.lds_f32(system + SQUARES + (block + j) * 4), ptx.lds_f32(norm_at + (block + j) * 4),
            column[(j + 1) % 4 :],
        )  # fmt: skip

    x = [Float32(0.0)] * SUB
    ahead = operands(0)
    for j in range(SUB):
        factor, rk, column = ahead
        if j + 1 < SUB:
            ahead = operands(j + 1)
        x_j = ptx.fma(x[j], factor, fragments.delta(unit, j))
        y = x_j * rk
        for i in range(j + 1, SUB):
            x[i] = ptx.fma(column[i - j - 1], y, x[i])
        x[j] = x_j if pipe.config.neg_eigval else y * beta
    return x
