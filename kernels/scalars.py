"""A token's scalars: beta, and the norms of q and k, which never touch the tiles."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32

from . import ptx
from .config import BETA_BF16, BETA_FP16, BETA_SIGMOID, L2NORM, NEG_EIGVAL
from .gate import LOG2_E

EPS = 1e-6  # of the l2 norm, as in fla
# Squares of q and k above which products might overflow, even with one of 2^-x up to 2^97 in it.
USUAL = 2.0**60
SMALLER = 2.0**-80  # what numbers are multiplied with whose squares overflow


class Beta(NamedTuple):
    """Where beta is in memory."""

    address: Int64
    batch: Int64  # elements from one batch entry to the next
    row: Int32  # and from one token to the next

    def at(self, b: Int32, t: Int32, h: Int32) -> Int64:
        """The place of a token's beta, in elements."""
        return Int64(b) * self.batch + Int64(t) * self.row + h


@cute.jit
def load_beta(beta: Beta, start: Int64, token: Int32, tokens: Int32, flags: Int32) -> Uint32:
    """The bits of beta of the token-th token from a place on, from global memory; 0 from token `tokens` on. Touched as
    late as can be."""
    x = Uint32(0)
    if token < tokens:
        index = start + Int64(token) * beta.row
        if (flags & (BETA_BF16 | BETA_FP16)) != 0:
            x = ptx.ldg_u16(beta.address + index * 2)
        else:
            x = ptx.ldg_u32(beta.address + index * 4)
    return x


@cute.jit
def beta_of(raw: Uint32, exists: Boolean, flags: Int32) -> Float32:
    """beta, sigmoid(beta) or 2 sigmoid(beta); 0 behind the sequence's end."""
    if (flags & BETA_BF16) != 0:
        raw = raw << 16
    x = ptx.as_f32(raw)
    if (flags & BETA_FP16) != 0:
        x = ptx.f16_lo(raw)
    if (flags & BETA_SIGMOID) != 0:
        x = ptx.rcp(1.0 + ptx.ex2(x * -LOG2_E))
        if (flags & NEG_EIGVAL) != 0:
            x = x * 2.0
    if not exists:
        x = Float32(0.0)
    return x


@cute.jit
def inverse_norm(x2: Float32, flags: Int32) -> Float32:
    """1 / |x| of |x|^2; 1 if there is no norm."""
    r = Float32(1.0)
    if (flags & L2NORM) != 0:
        r = ptx.rsqrt(x2 + EPS)
    return r


@cute.jit
def norm_of(x2: Float32, x2_small: Float32, flags: Int32):
    """Two factors of 1 / |x|, from each lane's part of |x|^2 and of |SMALLER x|^2; 1 and 1 if there is no norm."""
    for i in cutlass.range_constexpr(5):
        x2 = x2 + cute.arch.shuffle_sync_bfly(x2, 1 << i)
        x2_small = x2_small + cute.arch.shuffle_sync_bfly(x2_small, 1 << i)
    smaller, norm = Float32(1.0), inverse_norm(x2, flags)
    if ((flags & L2NORM) != 0) & (not (x2 < 2.0**100)):
        smaller, norm = Float32(SMALLER), ptx.rsqrt(x2_small)
    return smaller, norm
