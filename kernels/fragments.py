"""What warps do with tiles and fragments, whatever is in them. Fragments are tuples of registers, as in `ptx`."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import warpgroup

from . import ptx
from .layout import SUB


def pair(x: Uint32, dtype: str):
    """Two 16-bit numbers in fp32."""
    return (ptx.bf16_lo(x), ptx.bf16_hi(x)) if dtype == "bf16" else (ptx.f16_lo(x), ptx.f16_hi(x))


@cute.jit
def global_f32(address: Int64, index: Int64) -> Float32:
    return cute.make_tensor(cute.make_ptr(Float32, address + index * 4, cute.AddressSpace.gmem), cute.make_layout(1))[0]


@cute.jit
def ones_if(condition: Boolean) -> Uint32:
    e = Uint32(0)
    if condition:
        e = Uint32(0x3C003C00)
    return e


def quad_sum(x: Float32) -> Float32:
    x = x + cute.arch.shuffle_sync_bfly(x, 1)
    return x + cute.arch.shuffle_sync_bfly(x, 2)


def sum_to_lanes(x, lane: Int32, split, whole):
    """Sums over a warp's lanes of 2^n numbers: a lane has those of x[i], the first bits of i being its own in
    `split`. Lanes that differ in `whole` have the same."""
    for mask in split:
        half, high = len(x) // 2, (lane & mask) != 0
        x = [
            cutlass.select_(high, b, a) + cute.arch.shuffle_sync_bfly(cutlass.select_(high, a, b), mask)
            for a, b in zip(x[:half], x[half:], strict=True)
        ]
    for mask in whole:
        x = [y + cute.arch.shuffle_sync_bfly(y, mask) for y in x]
    return x


def vector(at: Int32, n: int):
    """n neighbouring fp32 numbers from shared memory."""
    if n == 2:
        return ptx.lds_f32x2(at)
    return [x for i in range(n // 4) for x in ptx.lds_f32x4(at + i * 16)]


def put_vector(at: Int32, x) -> None:
    """Two or four neighbouring fp32 numbers to shared memory."""
    if len(x) == 4:
        ptx.sts_f32x4(at, tuple(x))
    else:
        ptx.sts_f32x2(at, *x)


def times(x, factors):
    """bf16 pairs times powers of two: exact, or zero."""
    return tuple(ptx.mul_bf16x2(a, b) for a, b in zip(x, factors, strict=True))


def tile_at(base: Int32, lane: Int32) -> Int32:
    """A lane's address for a 16 x 16 tile of ldmatrix and stmatrix: row lane % 16, 16-byte column lane // 16, in
    the 128-byte swizzle."""
    return base + lane % 16 * 128 + ((lane // 16) ^ (lane % 8)) * 16


def high_low(x):
    """Two fp32 numbers as bf16 pairs (high, low) with x = high + low to 16 bits."""
    high = ptx.pack_bf16(*x)
    return high, ptx.pack_bf16(x[0] - ptx.bf16_lo(high), x[1] - ptx.bf16_hi(high))


def product(a, b):
    """16 x 16 by 16 x 16, of operands in high and low parts."""
    out = []
    for nt in range(2):
        acc = (Float32(0.0),) * 4
        for i, j in ((1, 0), (0, 1), (0, 0)):
            acc = ptx.mma_bf16(tuple(r[i] for r in a), b[nt][j], b[nt + 2][j], acc)
        out.append(acc)
    return out


def store_tile(base: Int32, i: int, j: int, words, lane: Int32) -> None:
    """Block (i, j) of a [32, 32] bf16 operand (64-byte swizzle)."""
    r = SUB * i + lane % 16
    chunk = (2 * j + lane // 16) ^ ((r // 2) % 4)
    ptx.stmatrix_x4(base + r * 64 + chunk * 16, tuple(words))


@cute.jit
def delta(i: Int32, j: cutlass.Constexpr[int]) -> Float32:
    return Float32(1.0) if i == j else Float32(0.0)


def operand_a(mma: cute.TiledMma, thread: Int32, k: int) -> cute.Tensor:
    """A warpgroup's operand A [64, k], in registers."""
    return mma.get_slice(thread).make_fragment_A(mma.get_slice(thread).partition_shape_A((64, k)))


def operand_b(mma: cute.TiledMma, thread: Int32, tile: cute.Tensor) -> cute.Tensor:
    """What describes an operand B in shared memory."""
    return mma.get_slice(thread).make_fragment_B(mma.get_slice(thread).partition_B(tile))


def accumulators(mma: cute.TiledMma, thread: Int32, n: int) -> cute.Tensor:
    """A warpgroup's accumulators [64, n]."""
    return mma.get_slice(thread).make_fragment_C(mma.get_slice(thread).partition_shape_C((64, n)))


def gemm(mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, clear: bool) -> None:
    """acc += a b, or a b if `clear`: WGMMA with operand A in registers, B in shared memory."""
    for k in range(cute.size(a, mode=[2])):
        mma.set(warpgroup.Field.ACCUMULATE, Boolean(not clear or k > 0))
        cute.gemm(mma, acc, a[None, None, k], b[None, None, k], acc)


def fill(frag: cute.Tensor, regs) -> None:
    """Registers -> a fragment."""
    words = cute.recast_tensor(frag, Uint32)
    for i, r in enumerate(regs):
        words[i] = r


def to_operand(acc: cute.Tensor, frag: cute.Tensor) -> None:
    """fp32 accumulators -> bf16 operand A of the next product: the same lanes hold the same elements."""
    fill(frag, [ptx.pack_bf16(acc[2 * i], acc[2 * i + 1]) for i in range(cute.size(acc) // 2)])


def scale_columns(acc: cute.Tensor, at: Int32) -> None:
    """Each column of accumulators, a token or a channel, times its number in the table at `at`."""
    for n8 in range(cute.size(acc) // 4):
        s = ptx.lds_f32x2(at + n8 * 32)
        for i in range(4):
            acc[4 * n8 + i] = acc[4 * n8 + i] * s[i % 2]
