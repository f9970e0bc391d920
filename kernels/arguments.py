"""What a kernel is given: types, tensors of any shape, TMA descriptors and tiled products."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandSource, SmemLayoutAtomKind

from .layout import C

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}


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
