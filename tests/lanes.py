"""Runs what one warp of a kernel does on the CPU: `ptx` and shared memory for 32 lanes at once, in numpy.

A register is an array of 32 elements, a lane each; a number that is the same in all lanes may be a plain one. Only code
without branches on lanes runs so, which is most of `gate` and `prepare`; code with them runs lane by lane, if its lanes
do not talk. It shows that fragments, tables and swizzles fit together and what rounding does, not what is a race.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

f32, u32 = np.float32, np.uint32
LANES = np.arange(32)


def f32_bits(x: Any) -> np.ndarray:
    return np.asarray(x, f32).view(u32)


def bf16(x: Any) -> np.ndarray:
    """The bits of x rounded to bf16, in the low half."""
    bits = f32_bits(x).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(u32)
    return np.where(np.isnan(np.asarray(x, f32)), u32(0x7FFF), rounded)


def f16_pair(words: np.ndarray) -> np.ndarray:
    """[32] words -> [32, 2] numbers."""
    return np.ascontiguousarray(words, u32).view(np.float16).reshape(-1, 2).astype(f32)


def bf16_pair(words: np.ndarray) -> np.ndarray:
    words = np.asarray(words, u32)
    return np.stack([words << 16, words & 0xFFFF0000], -1).astype(u32).view(f32)


class Warp:
    """`ptx` for a warp with shared memory of its own, or for one lane of another: for code with branches on lanes."""

    def __init__(self, of: Warp | None = None):
        self.memory = np.zeros(1 << 16, np.uint8) if of is None else of.memory
        self.lanes = LANES if of is None else LANES[:1]

    # ---- shared memory

    def _words(self, at: Any, n: int) -> np.ndarray:
        at = np.broadcast_to(at, self.lanes.shape)
        assert (at % (4 * n) == 0).all() and (at >= 0).all()
        return at[:, None] + 4 * np.arange(n)

    def load(self, at: Any, n: int, dtype: Any) -> Any:
        words = np.stack([self.memory[self._words(at, n) + i] for i in range(4)], -1)
        found = np.ascontiguousarray(words).view(dtype)[..., 0]
        return tuple(found[:, i] for i in range(n)) if n > 1 else found[:, 0]

    def store(self, at: Any, *values: Any) -> None:
        n = len(values)
        values = [np.broadcast_to(np.asarray(v), self.lanes.shape) for v in values]
        words = np.stack([np.ascontiguousarray(v).view(u32) for v in values], -1)
        data = np.ascontiguousarray(words).view(np.uint8).reshape(len(self.lanes), n, 4)
        for i in range(4):
            self.memory[self._words(at, n) + i] = data[..., i]

    def lds_f32(self, at):
        return self.load(at, 1, f32)

    def lds_f32x2(self, at):
        return self.load(at, 2, f32)

    def lds_f32x4(self, at):
        return self.load(at, 4, f32)

    def lds_u32(self, at):
        return self.load(at, 1, u32)

    def lds_u32x2(self, at):
        return self.load(at, 2, u32)

    def lds_u32x4(self, at):
        return self.load(at, 4, u32)

    def sts_f32(self, at, x):
        self.store(at, np.asarray(x, f32))

    def sts_f32x2(self, at, *x):
        self.store(at, *(np.asarray(y, f32) for y in x))

    def sts_f32x4(self, at, x):
        self.store(at, *(np.asarray(y, f32) for y in x))

    def sts_u32x4(self, at, x):
        self.store(at, *(np.asarray(y, u32) for y in x))

    def sts_16(self, at, x):
        self.store(at, x, x, x, x)

    def sts_high(self, at, x):
        """The high half of a word."""
        at = np.broadcast_to(at, self.lanes.shape)
        bits = np.broadcast_to(f32_bits(x), self.lanes.shape) >> 16
        self.memory[at], self.memory[at + 1] = bits & 255, bits >> 8

    # ---- fragments

    def ldmatrix_x4(self, at, *, trans=False):
        rows = np.broadcast_to(at, (32,)).reshape(4, 8)
        halves = self.memory[rows[..., None] + np.arange(16)].view(np.uint16).reshape(4, 8, 8)
        if trans:
            halves = halves.transpose(0, 2, 1)
        pairs = np.ascontiguousarray(halves).view(u32)  # [matrix, row, column pair]
        return tuple(pairs[m].reshape(32) for m in range(4))

    def stmatrix_x4(self, at, r, *, trans=False):
        rows = np.broadcast_to(at, (32,)).reshape(4, 8)
        for m in range(4):
            word = np.broadcast_to(np.asarray(r[m], u32), (32,))
            halves = np.ascontiguousarray(word).view(np.uint16).reshape(8, 8)
            halves = np.ascontiguousarray(halves.T if trans else halves)
            self.memory[rows[m][:, None] + np.arange(16)] = halves.view(np.uint8).reshape(8, 16)

    def _mma(self, pair, a, b0, b1, c):
        a = [pair(np.broadcast_to(np.asarray(x, u32), (32,))).reshape(8, 4, 2) for x in a]
        b = [pair(np.broadcast_to(np.asarray(x, u32), (32,))).reshape(8, 4, 2) for x in (b0, b1)]
        A = np.concatenate(
            [np.concatenate([a[0], a[2]], 1).reshape(8, 16), np.concatenate([a[1], a[3]], 1).reshape(8, 16)]
        ).astype(np.float64)
        B = np.concatenate([b[0], b[1]], 1).reshape(8, 16).astype(np.float64)  # [n, k]
        with np.errstate(all="ignore"):
            out = A @ B.T
            c = [np.broadcast_to(np.asarray(x, f32), (32,)).reshape(8, 4) for x in c]
            top, low = out[:8].reshape(8, 4, 2), out[8:].reshape(8, 4, 2)
            made = top[..., 0], top[..., 1], low[..., 0], low[..., 1]
            return tuple((x + y).astype(f32).reshape(32) for x, y in zip(c, made, strict=True))

    def mma_f16(self, a, b0, b1, c):
        return self._mma(f16_pair, a, b0, b1, c)

    def mma_bf16(self, a, b0, b1, c):
        return self._mma(bf16_pair, a, b0, b1, c)

    # ---- numbers

    def pack_f16(self, lo, hi):
        with np.errstate(over="ignore"):
            pair = np.stack([np.broadcast_to(np.asarray(x, f32), (32,)) for x in (lo, hi)], -1).astype(np.float16)
        return np.ascontiguousarray(pair).view(u32)[:, 0]

    def pack_bf16(self, lo, hi):
        return (bf16(lo) | bf16(hi) << 16).astype(u32)

    def bf16_lo(self, x):
        return bf16_pair(x)[..., 0]

    def bf16_hi(self, x):
        return bf16_pair(x)[..., 1]

    def f16_lo(self, x):
        return f16_pair(x)[:, 0]

    def f16_hi(self, x):
        return f16_pair(x)[:, 1]

    def mul_bf16x2(self, a, b):
        with np.errstate(all="ignore"):
            x = bf16_pair(a) * bf16_pair(b)
        return self.pack_bf16(x[..., 0], x[..., 1])

    def fma(self, a, b, c):
        with np.errstate(all="ignore"):
            return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(f32)

    def ex2(self, x):
        with np.errstate(all="ignore"):
            y = np.exp2(np.asarray(x, np.float64)).astype(f32)
        return np.where(np.abs(y) < 2.0**-126, f32(0), y)

    def rcp(self, x):
        with np.errstate(all="ignore"):
            return (1 / np.asarray(x, np.float64)).astype(f32)

    def maximum(self, x, y):
        return np.fmax(np.asarray(x, f32), np.asarray(y, f32))

    def minimum(self, x, y):
        return np.minimum(np.asarray(x, f32), np.asarray(y, f32))  # NaN stays

    def absolute(self, x):
        return np.abs(np.asarray(x, f32))

    def pow2(self, r):
        return ((f32_bits(r).astype(np.int64) << 23) + 0x3F800000 & 0xFFFFFFFF).astype(u32).view(f32)

    def pow2_difference(self, r, s):
        d = f32_bits(r).astype(np.int64) - f32_bits(s).astype(np.int64)
        return ((d << 23) + 0x3F800000 & 0xFFFFFFFF).astype(u32).view(f32)


ROOMS = (
    "fragments",
    "gate",
    "chunk",
    "scalars",
    "inverse",
)  # modules of the kernels' math, which the kernels call into


def copy_of(name: str, rooms: dict[str, ModuleType] | None = None) -> ModuleType:
    """A module of its own with the same source, and with copies of ROOMS: compiling a kernel rewrites the functions of
    the imported one."""
    rooms = {} if rooms is None else rooms
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_on_the_cpu", spec.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for room in ROOMS:
        if hasattr(module, room):
            if room not in rooms:
                rooms[room] = copy_of(f"kda_cute.kernels.{room}", rooms)
            setattr(module, room, rooms[room])
    return module


def lane_by_lane(module: Any, warp: Warp, method: Any) -> Any:
    """A method with branches on the lane, which is an argument of it."""

    def run(*args: Any) -> None:
        for lane in range(32):
            with on_the_cpu(module, Warp(warp)):
                method(*(np.int64(lane) if x is LANES else x for x in args))

    return run


@contextmanager
def on_the_cpu(module: Any, warp: Warp) -> Iterator[None]:
    """The kernel's module with `warp` for its instructions; what stands in `cute.jit` runs as it is written."""

    def shuffle(x, mask):
        return np.broadcast_to(x, (32,))[LANES ^ mask]

    def shuffle_from(x, lane):
        return np.broadcast_to(x, (32,))[lane]

    def registers(shape, dtype):
        return [np.zeros(32, dtype)] * shape[0]

    arch = SimpleNamespace(sync_warp=lambda: None, shuffle_sync_bfly=shuffle, shuffle_sync=shuffle_from)
    cutlass = SimpleNamespace(range_constexpr=range, range=lambda n, unroll: range(n), min=min, select_=np.where)
    rooms = [getattr(module, room) for room in ROOMS if hasattr(module, room)]
    rooms += [room.fragments for room in rooms if hasattr(room, "fragments")]
    with pytest.MonkeyPatch.context() as m, np.errstate(all="ignore"):
        for place in (module, *rooms):
            m.setattr(place, "ptx", warp)
            m.setattr(place, "cute", SimpleNamespace(arch=arch, make_rmem_tensor=registers), raising=False)
            m.setattr(place, "cutlass", cutlass, raising=False)
            m.setattr(place, "const_expr", bool, raising=False)
            m.setattr(place, "Float32", f32)
            m.setattr(place, "Uint32", lambda x: u32(x), raising=False)
        for room in rooms:
            for name, function in list(vars(room).items()):
                if callable(function) and hasattr(function, "__wrapped__"):
                    m.setattr(room, name, function.__wrapped__)
        yield
