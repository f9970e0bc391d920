"""A piece token by token, by the definition: for what the chunks cannot do, since something is not finite in them."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from . import checkpoints, fragments, gate, ptx, scalars
from .arguments import Numbers
from .layout import STATE_BAR, D


def is_finite(acc: cute.Tensor) -> Boolean:
    """Whether a lane's numbers are neither infinite nor NaN: 0 times them is 0."""
    zeros = [Float32(0.0)] * 4
    for i in range(64):
        zeros[i % 4] = ptx.fma(acc[i], Float32(0.0), zeros[i % 4])
    return (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]) == 0.0


@cute.jit
def token_by_token(
    pipe: cutlass.Constexpr, acc: cute.Tensor, inputs, numbers: Numbers, mO: cute.Tensor, begin: Int32, start: Int32,
    end: Int32, h: Int32, b: Int32, wg: Int32, scratch: Int32, keeping,
):  # fmt: skip
    """Tokens `begin` to `end` - 1 by the definition, in fp32, from what is in global memory: some twenty times slower.
    o, and states that are kept, from `start`, where the piece begins that `keeping` is of.

        S <- S diag(exp g_t)     u_t = beta_t (v_t - S k_t)     S <- S + u_t k_t^T     o_t = scale S q_t

    acc: a warpgroup's 64 rows of S, as in `state`. keeping: None, or a checkpoints.Keeping. scratch: 1.5 KiB of
    shared memory.
    A lane has two rows of S, every fourth pair of channels. What a token does to a channel is made by a thread for
    all rows, in shared memory. Where squares overflow, those of smaller numbers are taken.
    """
    mQ, mK, mG, mV = inputs
    dt_bias, scale, flags = numbers.dt_bias, numbers.scale, numbers.flags
    beta = scalars.Beta(numbers.beta, numbers.beta_batch, numbers.beta_row)
    gate_inputs = gate.Inputs.of(numbers)
    K, h, b, thread = pipe.config.K, ptx.here(h), ptx.here(b), ptx.thread() % 128
    h_qk, lane = h // (cute.size(mV.shape[2]) // cute.size(mK.shape[2])), thread % 32
    row, col = (pipe.rank() + wg) * 64 + thread // 32 * 16 + lane // 4, lane % 4 * 2
    slope, shift = gate.slope_of_head(pipe.form, gate_inputs, h)
    bias = Float32(0.0)
    if (dt_bias != 0) & (thread < K):
        bias = fragments.global_f32(dt_bias, Int64(h * K + thread))
    bias = gate.bias(pipe.form, slope, shift, bias)
    next_kept = Int32(checkpoints.NEVER)
    if const_expr(keeping is not None):
        next_kept = checkpoints.next_at(pipe.config, keeping, keeping.before)
    for t in cutlass.range(begin, end, unroll=1):
        if const_expr(keeping is not None):
            if t - start + keeping.before == next_kept:
                checkpoints.keep(acc, pipe.config, keeping, next_kept)
                next_kept = checkpoints.next_at(pipe.config, keeping, next_kept + 1)
        k2, q2, k2_small, q2_small = (Float32(0.0) for _ in range(4))
        for i in cutlass.range(lane, K, 32, unroll=1):
            k, q = Float32(mK[t, i, h_qk, b]), Float32(mQ[t, i, h_qk, b])
            k2, q2 = ptx.fma(k, k, k2), ptx.fma(q, q, q2)
            k, q = k * scalars.SMALLER, q * scalars.SMALLER
            k2_small, q2_small = ptx.fma(k, k, k2_small), ptx.fma(q, q, q2_small)
        k_norm, q_norm = scalars.norm_of(k2, k2_small, flags), scalars.norm_of(q2, q2_small, flags)
        cute.arch.barrier(barrier_id=STATE_BAR + wg, number_of_threads=128)
        if thread < K:
            k, q = Float32(mK[t, thread, h_qk, b]), Float32(mQ[t, thread, h_qk, b])
            a = gate.factor(pipe.form, Float32(mG[t, thread, h, b]), slope, bias)
            a = a * gate.log2_of_factor(pipe.form, gate_inputs)
            ptx.sts_f32(scratch + thread * 4, ptx.ex2(a))
            ptx.sts_f32(scratch + (D + thread) * 4, k * k_norm[0] * k_norm[1])
            ptx.sts_f32(scratch + (2 * D + thread) * 4, q * q_norm[0] * q_norm[1] * scale)
        raw = scalars.load_beta(beta, beta.at(b, t, h), Int32(0), Int32(1), flags)
        beta_t = scalars.beta_of(raw, True, flags)
        v = [Float32(mV[t, row + 8 * r, h, b]) for r in range(2)]
        cute.arch.barrier(barrier_id=STATE_BAR + wg, number_of_threads=128)
        sums = [Float32(0.0)] * 5  # S k and S q of both rows, k q
        for i in cutlass.range_constexpr(K // 8):
            a, k, q = (ptx.lds_f32x2(scratch + (x * D + 8 * i + col) * 4) for x in range(3))
            for j in cutlass.range_constexpr(4):
                acc[4 * i + j] = acc[4 * i + j] * a[j % 2]
                sums[j // 2] = ptx.fma(acc[4 * i + j], k[j % 2], sums[j // 2])
                sums[2 + j // 2] = ptx.fma(acc[4 * i + j], q[j % 2], sums[2 + j // 2])
            sums[4] = ptx.fma(k[1], q[1], ptx.fma(k[0], q[0], sums[4]))
        *sums, kq = [fragments.quad_sum(x) for x in sums]
        u = [beta_t * (v[r] - sums[r]) for r in range(2)]
        for i in cutlass.range_constexpr(K // 8):
            k = ptx.lds_f32x2(scratch + (D + 8 * i + col) * 4)
            for j in cutlass.range_constexpr(4):
                acc[4 * i + j] = ptx.fma(u[j // 2], k[j % 2], acc[4 * i + j])
        if (lane % 4 == 0) & (t >= start):
            for r in cutlass.range_constexpr(2):
                mO[t, row + 8 * r, h, b] = ptx.fma(u[r], kq, sums[2 + r]).to(pipe.dtype)
