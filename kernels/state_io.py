"""States in global memory: a state warpgroup's 64 value rows, from there into accumulators and back.

config: a KdaFwdConfig, for K and V. vs: which 64 value rows of a state.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64

from . import ptx
from .config import CHECKPOINTS, FINAL, INITIAL, NULL_ZERO, STATE_V_FIRST


class State(NamedTuple):
    """A head's state in memory. All heads of a slot lie one behind the other."""

    address: Int64  # of slot 0; 0: there are no states
    pitch: Int64  # bytes from a slot to the next
    slot: Int32
    h: Int32

    def start(self) -> Int64:
        """Address of the slot's first head."""
        return self.address + Int64(self.slot) * self.pitch


@cute.jit
def in_dtype(do: cutlass.Constexpr, flags: Int32, kind: cutlass.Constexpr):
    """do(dtype) with what states of a kind (INITIAL, ...) are in memory: the one place that knows what there is."""
    if (flags & (1 << kind)) != 0:
        do(BFloat16)
    else:
        do(Float32)


@cute.jit
def index_at(address: Int64, i: Int32, flags: Int32, wide: cutlass.Constexpr) -> Int64:
    """The i-th of int32 or, if `flags` have `wide`, int64 numbers."""
    x = Int64(0)
    if (flags & wide) != 0:
        x = ptx.ldg_i64(address + Int64(i) * 8)
    else:
        x = Int64(ptx.ldg_i32(address + Int64(i) * 4))
    return x


@cute.jit
def slot_of(i: Int32, indices: Int64, slots: Int32, flags: Int32, wide: cutlass.Constexpr) -> Int32:
    """The i-th index, or i without indices; -1 if it is null. Wrong indices are null."""
    slot = i
    if indices != 0:
        x = index_at(indices, i, flags, wide)
        slot = Int32(x)
        if (x < Int64((flags & NULL_ZERO) != 0)) | (x >= Int64(slots)):
            slot = Int32(-1)
    return slot


@cute.jit
def begins_with_zero(n: Int32, has_initial_state: Int64) -> Boolean:
    """Whether sequence n has no initial state."""
    has = Int32(1)
    if has_initial_state != 0:
        has = Int32(ptx.ldg_u8(has_initial_state + Int64(n)))
    return has == 0


def state_bytes(config: cutlass.Constexpr, flags: Int32, kind: cutlass.Constexpr) -> Int32:
    """Of a head."""
    is_16 = Int32((flags & (1 << kind)) != 0)
    return Int32(config.K * config.V * 4) >> is_16


def address_of(config, state: State, flags: Int32, kind: int) -> Int64:
    """Of a head's state."""
    return state.start() + Int64(state.h) * Int64(state_bytes(config, flags, kind))


@cute.jit
def load(acc: cute.Tensor, config: cutlass.Constexpr, state: State, vs: Int32, flags: Int32):
    """A state, or zeros if there are none."""
    for i in cutlass.range_constexpr(64):
        acc[i] = Float32(0.0)
    if state.address != 0:
        move(acc, config, state, vs, INITIAL, flags, True)


@cute.jit
def store(acc: cute.Tensor, config: cutlass.Constexpr, state: State, vs: Int32, flags: Int32):
    if state.address != 0:
        move(acc, config, state, vs, FINAL, flags, False)


def store_checkpoint(acc: cute.Tensor, config, state: State, vs: Int32, flags: Int32) -> None:
    move(acc, config, state, vs, CHECKPOINTS, flags, False)


def move(acc, config, state: State, vs: Int32, kind: int, flags: Int32, from_memory: bool) -> None:
    in_dtype(lambda dtype: in_order(acc, config, state, vs, dtype, flags, from_memory), flags, kind)


@cute.jit
def in_order(
    acc: cute.Tensor, config: cutlass.Constexpr, state: State, vs: Int32, dtype: cutlass.Constexpr, flags: Int32,
    from_memory: cutlass.Constexpr,
):  # fmt: skip
    if (flags & STATE_V_FIRST) != 0:
        copy(acc, config, state, vs, dtype, True, from_memory)
    else:
        copy(acc, config, state, vs, dtype, False, from_memory)


def copy(acc, config, state: State, vs: Int32, dtype, v_first: bool, load: bool) -> None:
    """A lane's elements of one state in global memory, in the accumulators' order: pairs of channels, which are
    neighbours in memory if V comes first. Constant offsets from one address, made here of what nothing else shares:
    hoisted out of the loops, the addresses of all cases were spilled."""
    K, V = config.K, config.V
    sv, sk = (K, 1) if v_first else (1, V)
    size = dtype.width // 8
    thread = ptx.thread()
    v, k = vs * 64 + thread // 32 % 4 * 16 + thread % 32 // 4, thread % 4 * 2
    base = ptx.address(ptx.at_slot(state.address, state.slot, state.pitch), state.h, K * V * size)
    base = base + Int64((v * sv + k * sk) * size)
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
def prefetch(config: cutlass.Constexpr, address: Int64, vs: Int32, flags: Int32):
    """A warpgroup's half of the initial state at an address, 0 for none, into L2. Without a branch: with one, ptxas
    takes vector registers for all that is uniform in the whole kernel, and spills."""
    size = Int32(64 * config.K * 4)
    if (flags & (1 << INITIAL)) != 0:  # 16 bits
        size = Int32(64 * config.K * 2)
    for i in cutlass.range_constexpr(2):
        offset = ptx.thread() % 128 * 128 + i * 128 * 128
        exists = (address != 0) & (offset < size)
        ptx.prefetch_l2(address + Int64(vs) * size + Int64(offset), exists)
