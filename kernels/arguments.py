"""What a kernel is compiled for: types, and tensors of any shape."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32

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
