"""The smallest kernel that goes through all of kda_cute.jit: y += x. Stands in for kernels/ in the tests of the cache.

No `from __future__ import annotations` here: the DSL looks annotations up among the module's globals.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TinyConfig:
    variant: int = 0

    @property
    def name(self) -> str:
        return f"tiny{self.variant}"


def compile(config, arch):
    import cutlass
    import cutlass.cute as cute

    @cute.kernel
    def kernel(x: cute.Tensor, y: cute.Tensor, n: cutlass.Int32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        i = block * 128 + thread
        if i < n:
            y[i] = x[i] + y[i]

    @cute.jit
    def add(x: cute.Tensor, y: cute.Tensor, stream):
        n = cute.size(x)
        kernel(x, y, n).launch(grid=[(n + 127) // 128, 1, 1], block=[128, 1, 1], stream=stream)

    n = cute.sym_int()
    x, y = (cute.runtime.make_fake_compact_tensor(cutlass.Float32, (n,), assumed_align=4) for _ in range(2))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(add, x, y, stream, options="--enable-tvm-ffi")
