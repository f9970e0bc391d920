"""What a chunk does to the state: the math that `state` and the maps of segments share, a warpgroup for 64 rows of it.

With S [V, K] the state before the chunk, as accumulators in registers, and Kd, Kr, T of the chunk in shared memory,

    R = V - diag(1/|k|) Kd S^T     U = T R     S <- S diag(2^G_C) + U^T Kr

Products are transposed, value rows by tokens. norm_at, decay_at: a lane's place in the stage's tables of norms and of
2^G_C.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.nvgpu import warpgroup

from . import fragments, ptx
from .layout import C


def begin_product(mma: cute.TiledMma, acc: cute.Tensor, acc_s: cute.Tensor, fS: cute.Tensor, b: cute.Tensor) -> None:
    """Asks for (b S^T)^T in acc, b: Kd, or Kd above Qd. fS: S, bf16."""
    fragments.to_operand(acc_s, fS)
    warpgroup.fence()
    fragments.gemm(mma, acc, fS, b, True)
    warpgroup.commit_group()


def residual(pipe: cutlass.Constexpr, acc: cute.Tensor, v_at: Int32, norm_at: Int32, mask: Uint32 | None = None):
    """R^T [64, 32], fp32, times beta if T is bare. acc: (Kd S^T)^T in the first columns. v_at: a lane's address for
    ldmatrix, of v. mask: of the bits of v."""
    v = ptx.ldmatrix_x4(v_at, trans=True) + ptx.ldmatrix_x4(v_at + 2048, trans=True)
    r = cute.make_rmem_tensor((C // 2,), Float32)
    for n8 in range(C // 8):
        rk = ptx.lds_f32x2(norm_at + n8 * 32)
        for half in range(2):
            word = v[2 * n8 + half] if mask is None else v[2 * n8 + half] & mask
            w, e = fragments.pair(word, pipe.config.dtype), 4 * n8 + 2 * half
            r[e] = ptx.fma(-acc[e], rk[0], w[0])
            r[e + 1] = ptx.fma(-acc[e + 1], rk[1], w[1])
    if pipe.config.neg_eigval:
        fragments.scale_columns(r, norm_at + 2 * C * 4)
    return r


def updates(
    pipe: cutlass.Constexpr, mma: cute.TiledMma, acc_u: cute.Tensor, fU: cute.Tensor, bT: cute.Tensor,
    acc_s: cute.Tensor, norm_at: Int32, decay_at: Int32,
) -> None:  # fmt: skip
    """fU: R^T, then U^T [64, 32], bf16. S is decayed meanwhile."""
    warpgroup.fence()
    fragments.gemm(mma, acc_u, fU, bT, True)
    warpgroup.commit_group()
    fragments.scale_columns(acc_s, decay_at)
    warpgroup.wait_group(0)
    if pipe.config.neg_eigval:
        fragments.scale_columns(acc_u, norm_at)
    fragments.to_operand(acc_u, fU)
