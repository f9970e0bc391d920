"""What a kernel is given: types, tensors of any shape, TMA descriptors and tiled products."""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource, SmemLayoutAtomKind

from .layout import C

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}


class Numbers(NamedTuple):
    """What the forward kernel and its roles are given besides tensors, in the order of a launch. An address is 0 where
    there is nothing."""

    beta: Int64  # [B, T, H] bf16, fp16 or fp32; H is that of values
    beta_batch: Int64  # elements from one batch entry to the next
    beta_row: Int32  # and from one token to the next
    A_log: Int64  # [H] fp32
    dt_bias: Int64  # [H, K] fp32
    initial_state: Int64  # [N, H, V, K] or [N, H, K, V], bf16 or fp32
    initial_pitch: Int64  # bytes from one state of all heads to the next
    final_state: Int64
    final_pitch: Int64
    state_indices: Int64  # [N] int32 or int64: states are those of a pool, [P, H, ...]
    P: Int32
    has_initial_state: Int64  # [N] bool
    cu_seqlens: Int64  # [N + 1] int32 or int64
    workspace: Int64  # workspace_bytes of memory, without which no item is cut
    items: Int32  # sequences times H
    workers: Int32  # as many blocks, or clusters, as there are at most
    scale: Float32
    lower_bound: Float32
    flags: Int32


class Kept(NamedTuple):
    """What a kernel that keeps states on the way is given besides: either `every` and `first`, or `offsets`."""

    states: Int64  # [rows, H, ...], bf16 or fp32
    pitch: Int64  # bytes from a row to the next
    rows: Int32
    every: Int32  # chunks
    first: Int64  # [N] int32: the row of a sequence's first
    offsets: Int64  # [N, per] int32 or int64: tokens after which a state is kept; 0: none
    per: Int32
    indices: Int64  # [N, per] int32 or int64: their rows
    scratch: Int64  # room for a state of each state warpgroup of each block


def zeros(taker: Any) -> list[Int64 | Int32 | Float32]:
    """A number for each field, or parameter, that is one: to compile for all."""
    return [kind(0) for kind in get_type_hints(taker).values() if kind in (Int64, Int32, Float32)]


def fake_tensors(config, names: str):
    """Some of q, k [B, T, H, K], g [B, T, HV, K], v, o [B, T, HV, V], with any strides that TMA takes."""
    B, T, H, HV = (cute.sym_int() for _ in range(4))
    K, V = config.K, config.V
    return [
        fake_tensor(
            TYPES[config.g_dtype if x == "g" else config.dtype],
            (B, T, H if x in "qk" else HV, V if x in "vo" else K),
        )
        for x in names
    ]


def fake_tensor(dtype, shape):
    stride = (*(cute.sym_int64(divisibility=128 // dtype.width) for _ in range(3)), 1)  # 16 bytes
    return cute.runtime.make_fake_tensor(dtype, shape, stride, assumed_align=16)


def by_token(tensors):
    """[B, T, H, D] -> (T, D, H, B)"""
    return [cute.make_tensor(m.iterator, cute.select(m.layout, mode=[1, 3, 2, 0])) for m in tensors]


def tma(op: cpasync.CopyBulkTensorTileG2SOp | cpasync.CopyBulkTensorTileS2GOp, m: cute.Tensor, dtype, cols: int):
    """(atom, tensor) for boxes of C tokens, by 128 bytes, in the 128-byte swizzle."""
    atom = warpgroup.make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, dtype)
    return cpasync.make_tiled_tma_atom(op, m, cute.tile_to_shape(atom, (C, cols), (0, 1)), (C, cols))


def tiled_mma(n: int, b_major: OperandMajorMode) -> cute.TiledMma:
    """A warpgroup's 64 rows, operand A from registers, by n columns."""
    op = warpgroup.MmaF16BF16Op(BFloat16, Float32, (64, n, 16), OperandSource.RMEM, OperandMajorMode.K, b_major)
    return cute.make_tiled_mma(op)
