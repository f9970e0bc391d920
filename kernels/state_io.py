"""States in global memory: a state warpgroup's 64 value rows, from there into accumulators and back.

config: a KdaFwdConfig, for K and V. nh: the number of the state. vs: which 64 value rows of it.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64

from . import ptx
from .config import CHECKPOINTS, FINAL, INITIAL, STATE_V_FIRST


@cute.jit
def in_dtype(do: cutlass.Constexpr, flags: Int32, kind: cutlass.Constexpr):
    """do(dtype) with what states of a kind (INITIAL, ...) are in memory: the one place that knows what there is."""
    if (flags & (1 << kind)) != 0:
        do(BFloat16)
    else:
        do(Float32)


@cute.jit
def pooled(nh: Int32, H: Int32, state_indices: Int64, P: Int32):
    """The number of a state in memory; -1 if it is not kept. Wrong indices give none."""
    if state_indices != 0:
        n = nh // H
        i = ptx.ldg_i32(state_indices + Int64(n) * 4)
        nh += (i - n) * H
        if (i < 0) | (i >= P):
            nh = Int32(-1)
    return nh


@cute.jit
def load(acc: cute.Tensor, config: cutlass.Constexpr, address: Int64, nh: Int32, vs: Int32, flags: Int32):
    """From address, or zeros if there is none."""
    for i in cutlass.range_constexpr(64):
        acc[i] = Float32(0.0)
    if address != 0:
        move(acc, config, address, nh, vs, INITIAL, flags, True)


@cute.jit
def store(acc: cute.Tensor, config: cutlass.Constexpr, address: Int64, nh: Int32, vs: Int32, flags: Int32):
    if address != 0:
        move(acc, config, address, nh, vs, FINAL, flags, False)


def store_checkpoint(acc: cute.Tensor, config, address: Int64, number: Int32, vs: Int32, flags: Int32) -> None:
    move(acc, config, address, number, vs, CHECKPOINTS, flags, False)


def move(acc, config, address: Int64, nh: Int32, vs: Int32, kind: int, flags: Int32, from_memory: bool) -> None:
    in_dtype(lambda dtype: in_order(acc, config, address, nh, vs, dtype, flags, from_memory), flags, kind)


@cute.jit
def in_order(
    acc: cute.Tensor, config: cutlass.Constexpr, address: Int64, nh: Int32, vs: Int32, dtype: cutlass.Constexpr,
    flags: Int32, from_memory: cutlass.Constexpr,
):  # fmt: skip
    if (flags & STATE_V_FIRST) != 0:
        copy(acc, config, address, nh, vs, dtype, True, from_memory)
    else:
        copy(acc, config, address, nh, vs, dtype, False, from_memory)


def copy(acc, config, address: Int64, nh: Int32, vs: Int32, dtype, v_first: bool, load: bool) -> None:
    """A lane's elements of one state in global memory, in the accumulators' order: pairs of channels, which are
    neighbours in memory if V comes first. Constant offsets from one address, made here of what nothing else shares:
    hoisted out of the loops, the addresses of all cases were spilled."""
    K, V = config.K, config.V
    sv, sk = (K, 1) if v_first else (1, V)
    size = dtype.width // 8
    thread = ptx.thread()
    v, k = vs * 64 + thread // 32 % 4 * 16 + thread % 32 // 4, thread % 4 * 2
    base = ptx.address(address, nh, K * V * size) + Int64((v * sv + k * sk) * size)
    for i in range(0, K // 2, 2):
        at = base + (i // 2 % 2 * 8 * sv + i // 4 * 8 * sk) * size
        if load:
            acc[i], acc[i + 1] = ptx.ldg_pair(at, sk * size, dtype)
        else:
            ptx.stg_pair(at, acc[i], acc[i + 1], sk * size, dtype)


def read(acc, i: int, address: Int64, at: Int64, dtype) -> None:
    """acc[i] becomes the at-th element from address."""
    if dtype is Float32:
        acc[i] = ptx.as_f32(ptx.ldg_u32(address + at * 4))
    else:
        acc[i] = ptx.bf16_lo(ptx.ldg_u16(address + at * 2))


@cute.jit
def prefetch(config: cutlass.Constexpr, address: Int64, nh: Int32, vs: Int32, flags: Int32):
    """A warpgroup's half of an initial state, if there is any, into L2. Without a branch: with one, ptxas takes
    vector registers for all that is uniform in the whole kernel, and spills."""
    size = Int32(64 * config.K * 4)
    if (flags & (1 << INITIAL)) != 0:  # 16 bits
        size = Int32(64 * config.K * 2)
    for i in cutlass.range_constexpr(2):
        offset = ptx.thread() % 128 * 128 + i * 128 * 128
        exists = (address != 0) & (nh >= 0) & (offset < size)
        ptx.prefetch_l2(address + Int64(config.V // 64 * nh + vs) * size + Int64(offset), exists)
