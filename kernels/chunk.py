"""A chunk's q, k and gate -> Kd, Qd, Kr, Kd Ki^T and M: the math of `prepare`.

With G_i the log2 decay summed over the chunk's tokens 0..i, and G_C of all of them,

    Kd_i = k_i 2^G_i     Qd_i = q_i 2^G_i     Kr_j = k_j 2^(G_C - G_j)     Ki_j = k_j 2^-G_j     M = lower(Qd Ki^T)

Two warps share a chunk [32, 128]: each has 64 channels of all its tokens, and so half of the sums over channels. A
function computes what one warp does. x is G - p, with p the anchor of the token's frame, see `gate.anchors`.

pipe: the kernel's Pipeline. acc: a lane's SUMS + 4 sums over the warp's channels, fp32: blocks of Kd Ki^T and Qd Ki^T
on and below the diagonal, then |q_i|^2 of four tokens.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from . import fragments, ptx
from .layout import A_ROW, BOX, OFFSETS, QUAD, SHIFTS, SQUARES, TO_END, C

SUMS = 48  # of products over channels, that a lane has: of 12 of 16 x 8 with frames of 16 tokens, of 10 with 8
QUADS = tuple((i, j) for i in range(C // QUAD) for j in range(i + 1))  # 8 x 8 blocks of A and M


@cute.jit
def lower_triangle(table: Int32, warp: Int32, lane: Int32) -> Int32:
    """The lower triangle of ones [16, 16] as an operand A, to sum over tokens, fp16: what a lane has whose two elements
    on the diagonal are 0, 0 or 1, 0 or 1, 1, 16 bytes each. In shared memory, at the address returned, since ptxas
    makes constants anew at each use."""
    if (warp == 1) & (lane < 3):
        diagonal = Uint32(0x3C00) * Uint32(lane > 0) | Uint32(0x3C000000) * Uint32(lane > 1)
        ptx.sts_u32x4(table + lane * 16, (diagonal, Uint32(0x3C003C00), Uint32(0), diagonal))
    return table


@cute.jit
def clear_tail(pipe: cutlass.Constexpr, lane: Int32, half: Int32, valid: Int32, sStage: Int32):
    """Rows behind the sequence's end hold the next one's tokens: zero them, so that not even a NaN gets in."""
    clear_rows(sStage + half * pipe.tiles.k_half, valid, lane)
    if const_expr(pipe.queries):
        clear_rows(sStage + half * pipe.tiles.k_half + BOX, valid, lane)
    if half < pipe.v_boxes:
        clear_rows(sStage + pipe.tiles.at_v + half * BOX, valid, lane)


@cute.jit
def clear_rows(box: Int32, valid: Int32, lane: Int32):
    """Rows from `valid` on of a TMA box [32, 64] of 16 bits, or of what is as large, in shared memory."""
    for j in cutlass.range_constexpr(C * 8 // 32):  # 8 pieces of 16 bytes in a row of a box
        if lane + 32 * j >= valid * 8:
            ptx.sts_16(box + (lane + 32 * j) * 16, Uint32(0))


def decay(
    pipe: cutlass.Constexpr, acc: cute.Tensor, tile_kq: Int32, tile_kr: Int32, table: Int32, triangle, lam: Float32
) -> None:
    """16 channels of the 32 tokens. In shared memory k and q become Kd and Qd, bf16, and the gate Kr; Kd Ki^T, Qd Ki^T
    and |q|^2 of these channels are added to acc.

    tile_kq, tile_kr: the lane's addresses (`fragments.tile_at`) in k, with q behind it, and in the gate's factors.
    table: that of `gate.anchors`. triangle: the lane's operand of `lower_triangle`. lam: see `gate.log2_of_factor`. G
    is the product of the triangle and the gate's factors, times lam.
    """
    F = pipe.form.frames
    at = [table + nt * 64 for nt in range(2)]  # by half of the channels
    g = [ptx.ldmatrix_x4(tile_kr + s * 2048, trans=True) for s in range(2)]
    offset = [ptx.lds_f32x4(a + OFFSETS[0]) + (ptx.lds_f32x4(a + OFFSETS[1]) if F == 4 else ()) for a in at]
    ahead = 2 if pipe.queries else 1  # without q there are fewer registers
    tiles = [tile_of(pipe, tile_kq, s) for s in range(ahead)]
    shifts = [ptx.lds_u32x2(a + SHIFTS[0]) + (ptx.lds_u32x2(a + SHIFTS[1]) if F == 4 else ()) for a in at]
    w = [ptx.lds_f32x2(a + TO_END) for a in at]
    roots = shifts = list(zip(*shifts, strict=True))  # by frame
    if pipe.form.step == 2:
        shifts = [shifts[0], *(fragments.times(x, x) for x in shifts[1:])]
    to_start, to_end = [shifts[0]], [None, shifts[-1]]  # from each frame's anchor; from the last frame's backwards
    for i in range(1, F):
        to_start.append(fragments.times(to_start[-1], shifts[i]))
    for i in range(F - 2, 0, -1):
        to_end.append(fragments.times(to_end[-1], shifts[i]))
    before = []  # k 2^-x of 8 tokens each, as operands B, relative to the present frame's anchor
    for s in range(2):
        k, q = tiles[s] if s < ahead else tile_of(pipe, tile_kq, s)
        frame = [(2 * s + r) * F // 4 for r in range(2)]
        x = []
        for nt in range(2):
            G = ptx.mma_f16(triangle, g[s][2 * nt], g[s][2 * nt + 1], (Float32(0.0),) * 4)
            x.append([ptx.fma(G[i], lam, offset[nt][2 * frame[i // 2] + i % 2]) for i in range(4)])
        lk, lq, ki, kr = decayed(pipe, k, q, x, w, acc, s)
        for r in range(2):
            i = 2 * s + r
            if i % (4 // F) == 0 and i > 0:
                *older, last = before
                if pipe.form.step == 2:
                    last = fragments.times(last, roots[frame[r]])
                before = [fragments.times(b, shifts[frame[r]]) for b in older] + [
                    fragments.times(last, roots[frame[r]])
                ]
            before.append((ki[r], ki[r + 2]))
            if F == 4:  # 8 rows of k, the same of q
                for j in range(i + 1):
                    a = (lk[r], lq[r], lk[r + 2], lq[r + 2])
                    product_into(acc, QUADS.index((i, j)), a, before[j], 4 if pipe.queries else 2)
        if F == 2:
            for j, b in enumerate(before):
                for i, a in enumerate((lk, lq) if pipe.queries else (lk,)):
                    product_into(acc, SUMS // 8 * i + 2 * s + j, a, b, 4)
        rows = [to_start[frame[j % 2]][j // 2] for j in range(4)]
        ptx.stmatrix_x4(tile_kq + s * 2048, fragments.times(lk, rows))
        if pipe.queries:
            ptx.stmatrix_x4(tile_kq + s * 2048 + BOX, fragments.times(lq, rows))
        for j in range(4):
            if frame[j % 2] < F - 1:
                kr[j] = ptx.mul_bf16x2(kr[j], to_end[F - 1 - frame[j % 2]][j // 2])
        ptx.stmatrix_x4(tile_kr + s * 2048, tuple(kr))


def tile_of(pipe: cutlass.Constexpr, tile_kq: Int32, s: int):
    """k and q of 16 tokens by 16 channels, from shared memory, as operands A."""
    k = ptx.ldmatrix_x4(tile_kq + s * 2048)
    return k, ptx.ldmatrix_x4(tile_kq + s * 2048 + BOX) if pipe.queries else k


def decayed(pipe: cutlass.Constexpr, k, q, x, w, acc: cute.Tensor, s: int):
    """Kd = k 2^x, Qd = q 2^x, Ki = k 2^-x and Kr = k 2^-x w of 16 tokens by 16 channels, relative to their anchors, as
    operands in bf16; x = G - p and w = 2^(G_C - p) of the last p. Adds |q|^2 to acc."""
    lk, lq, ki, kr = [], [], [], []
    for j in range(4):  # register j: rows (j % 2), channels 8 (j // 2)
        e = x[j // 2][2 * (j % 2) : 2 * (j % 2) + 2]
        up, down = [ptx.ex2(y) for y in e], [ptx.ex2(-y) for y in e]
        kf, qf = fragments.pair(k[j], pipe.config.dtype), fragments.pair(q[j], pipe.config.dtype)
        if pipe.queries:
            at = SUMS + 2 * s + j % 2
            acc[at] = ptx.fma(qf[1], qf[1], ptx.fma(qf[0], qf[0], acc[at]))
        kd = [kf[i] * down[i] for i in range(2)]
        lk.append(ptx.pack_bf16(kf[0] * up[0], kf[1] * up[1]))
        lq.append(ptx.pack_bf16(qf[0] * up[0], qf[1] * up[1]) if pipe.queries else Uint32(0))
        ki.append(ptx.pack_bf16(*kd))
        kr.append(ptx.pack_bf16(kd[0] * w[j // 2][0], kd[1] * w[j // 2][1]))
    return lk, lq, ki, kr


def product_into(acc: cute.Tensor, block: int, a, b, used: int) -> None:
    """acc's block += a b^T: 16 rows of Kd or Qd times 8 of Ki, of 16 channels. used: 2 if there are only 8 rows."""
    out = ptx.mma_bf16(a, *b, tuple(acc[4 * block + i] if i < used else Float32(0.0) for i in range(4)))
    for i in range(used):
        acc[4 * block + i] = out[i]


def accumulators(pipe: cutlass.Constexpr, acc: cute.Tensor):
    """(Kd Ki^T, Qd Ki^T, |q|^2) of acc: the lane's two elements of each 8 x 8 block of QUADS, and its four squares."""
    if pipe.form.frames == 2:
        rows = [4 * (i // 2 * 2 + j) + i % 2 * 2 for i, j in QUADS]
        A, M = [[(acc[at + x], acc[at + x + 1]) for x in rows] for at in (0, SUMS // 2)]
    else:
        A, M = [[(acc[4 * b + at], acc[4 * b + at + 1]) for b in range(len(QUADS))] for at in (0, 2)]
    return A, M, [acc[SUMS + i] for i in range(4)]


@cute.jit
def give(pipe: cutlass.Constexpr, a_at: Int32, m_at: Int32, A, M, half: Int32):
    """Leaves the half sums that the other warp completes in shared memory: 2.5 KiB, 16 bytes a lane at a time."""
    for i in cutlass.range_constexpr(len(QUADS) // 2):
        if half == 0:
            if const_expr(pipe.queries):
                ptx.sts_f32x4(m_at + i * 512, M[2 * i] + M[2 * i + 1])
        else:
            ptx.sts_f32x4(a_at + i * 512, A[2 * i] + A[2 * i + 1])


def take(at: Int32, X):
    """X, blocks as in `accumulators`, and what the other warp gave of them: sums over all channels."""
    other = [x for i in range(len(QUADS) // 2) for x in ptx.lds_f32x4(at + i * 512)]
    cute.arch.sync_warp()
    return [(x[0] + other[2 * b], x[1] + other[2 * b + 1]) for b, x in enumerate(X)]


@cute.jit
def store_a(A, system: Int32, lane: Int32):
    """strict_lower(Kd Ki^T) [32, 32], transposed, fp32, to a system in shared memory; and its diagonal, which is |k|^2,
    to the system's squares. A = diag(beta) times it, with the norms of k, is `invert`'s."""
    r, col = lane // 4, lane % 4 * 2
    for b in cutlass.range_constexpr(len(QUADS)):
        i, j = QUADS[b]
        for e in cutlass.range_constexpr(2):
            c, a = col + e, A[b][e]
            if const_expr(i == j):
                if r == c:
                    ptx.sts_f32(system + SQUARES + (QUAD * i + r) * 4, a)
                a = a if c < r else Float32(0.0)
            ptx.sts_f32(system + (QUAD * j + c) * A_ROW + (QUAD * i + r) * 4, a)


@cute.jit
def store_m(M, sM: Int32, lane: Int32):
    """M = lower(Qd Ki^T) [32, 32] to shared memory, bf16 (64-byte swizzle)."""
    row, col = lane // 4, lane % 4 * 2
    for i in cutlass.range_constexpr(2):
        for j in cutlass.range_constexpr(2):
            words = []
            for q in cutlass.range_constexpr(4):
                at = 2 * i + q % 2, 2 * j + q // 2
                word = Uint32(0)
                if const_expr(at in QUADS):
                    m0, m1 = M[QUADS.index(at)]
                    if const_expr(at[0] == at[1]):
                        m0 = m0 if col <= row else Float32(0.0)
                        m1 = m1 if col + 1 <= row else Float32(0.0)
                    word = ptx.pack_bf16(m0, m1)
                words.append(word)
            fragments.store_tile(sM, i, j, words, lane)
