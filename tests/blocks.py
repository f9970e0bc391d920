"""Runs a cluster of `fused_decode_sm90` on the CPU, a thread for each warp: with the addresses of tensors, barriers and
shared memory of each block. What `lanes` says of a warp holds here too; and what a barrier is missing for may show.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.lanes import LANES, Warp, bf16, bf16_pair, copy_of, f32, on_the_cpu, u32

NAME = "kda_cute.kernels.fused_decode_sm90"
WAIT_S = 60.0
here = threading.local()  # .warp: the one that this thread is


class F32(np.float32):
    width = 32


BF16 = SimpleNamespace(width=16)


def modules() -> tuple[Any, Any]:
    """Copies of the kernel's module and of the one that it takes a class from, with the same rooms."""
    rooms: dict[str, Any] = {}
    base = copy_of("kda_cute.kernels.decode_sm90", rooms)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "kda_cute.kernels.decode_sm90", base)
        return copy_of(NAME, rooms), base


class Mbarrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase, self.pending, self.bytes = 0, 1, 0

    def count(self, arrivals: int, missing: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += missing
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, 1
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != parity, WAIT_S), "a wait for ever"


class Pointer(int):
    """Of shared memory, to numbers of 8 bytes."""

    def __add__(self, n: Any) -> Pointer:
        return Pointer(int(self) + 8 * int(n))

    def toint(self) -> int:
        return int(self)


class Global:
    """A tensor's memory, as a kernel has it."""

    def __init__(self, x: torch.Tensor, element_type: Any):
        self.shape, self.element_type, self.size = tuple(x.shape), element_type, x.element_size()
        self.layout = x.stride()
        self.base = x.data_ptr()

    def address(self, at: Any) -> Any:
        return self.base + sum(np.int64(i) * s for i, s in zip(at, self.layout, strict=True)) * self.size


class Block:
    def __init__(self, cluster: Cluster, part: int):
        self.cluster, self.part = cluster, part
        self.memory = np.zeros(1 << 16, np.uint8)
        self.bars: dict[int, Mbarrier] = {}
        self.meet = threading.Barrier(4)
        self.conditions: dict[int, bool] = {}


class Cluster:
    def __init__(self, first: tuple[int, int], parts: int, rows: int):
        self.first, self.parts, self.rows = first, parts, rows
        self.blocks = [Block(self, part) for part in range(parts)]
        self.meet = threading.Barrier(4 * parts)


class BlockWarp(Warp):
    """One of the four of a block; its lanes' addresses of global memory are real ones."""

    def __init__(self, block: Block, warp: int):
        super().__init__()
        self.block, self.warp, self.memory, self.allocated = block, warp, block.memory, 0

    def one(self) -> BlockWarp:
        """For a lane by itself."""
        found = BlockWarp(self.block, self.warp)
        found.lanes = LANES[:1]
        return found

    # ---- global memory

    def _gather(self, at: Any, size: int) -> np.ndarray:
        at = np.broadcast_to(np.asarray(at, np.int64), self.lanes.shape)
        assert (at % size == 0).all() and (at > 1 << 16).all()
        return np.array([np.frombuffer(ctypes.string_at(int(x), size), np.uint8) for x in at])

    def _read(self, at: Any, words: int) -> Any:
        found = self._gather(at, 4 * words).view(u32)
        return found[:, 0] if words == 1 else tuple(found[:, i] for i in range(words))

    def ldg_u16(self, at):
        return self._gather(at, 2).view(np.uint16)[:, 0].astype(u32)

    def ldg_u32(self, at):
        return self._read(at, 1)

    def ldg_u32x2(self, at):
        return self._read(at, 2)

    def ldg_u32x4(self, at):
        return self._read(at, 4)

    def ldg_i32(self, at):
        return self._read(at, 1).view(np.int32)

    def _scatter(self, at: Any, values: np.ndarray) -> None:
        at = np.broadcast_to(np.asarray(at, np.int64), self.lanes.shape)
        for x, value in zip(at, np.broadcast_to(values, (len(at), values.shape[-1])), strict=True):
            ctypes.memmove(int(x), np.ascontiguousarray(value).tobytes(), values.shape[-1] * values.itemsize)

    def stg_u16(self, at, x):
        self._scatter(at, (np.broadcast_to(x, self.lanes.shape) & 0xFFFF).astype(np.uint16)[:, None])

    def stg_state(self, at, x, dtype):
        assert (np.asarray(at) % (len(x) * dtype.width // 8) == 0).all()
        values = np.stack([np.broadcast_to(y, self.lanes.shape) for y in x], -1)
        self._scatter(at, values.astype(f32) if dtype.width == 32 else bf16(values).astype(np.uint16))

    def load_bulk(self, to, at, size, bar):
        assert to % 16 == at % 16 == size % 16 == 0
        self.memory[to : to + size] = np.frombuffer(ctypes.string_at(int(at), int(size)), np.uint8)
        self.block.bars[bar].count(0, -size)

    # ---- other warps and blocks

    def send_word(self, to, x, bar, rank):
        other = self.block.cluster.blocks[int(rank)]
        other.memory[to : to + 4] = np.asarray(x, f32).reshape(-1)[:1].view(np.uint8)
        other.bars[int(bar)].count(0, -4)

    def all_of(self, condition, barrier):
        self.block.conditions[self.warp] = bool(np.all(condition))
        self.block.meet.wait(WAIT_S)
        found = all(self.block.conditions.values())
        self.block.meet.wait(WAIT_S)
        return found

    # ---- numbers

    def as_f32(self, x):
        return np.ascontiguousarray(np.broadcast_to(np.asarray(x, u32), self.lanes.shape)).view(f32)

    def rsqrt(self, x):
        with np.errstate(all="ignore"):
            return (1 / np.sqrt(np.asarray(x, np.float64))).astype(f32)

    def pair(self, low, high):
        return np.asarray(low, np.int64) & 0xFFFFFFFF | np.asarray(high, np.int64) << 32


class Here:
    """`ptx` of whichever warp asks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(here.warp, name)


def arch() -> SimpleNamespace:
    def meet() -> None:
        here.warp.block.meet.wait(WAIT_S)

    def shuffle(x, mask):
        return np.broadcast_to(x, (32,))[LANES ^ mask]

    def bar(pointer: Any) -> Mbarrier:
        return here.warp.block.bars[int(pointer)]

    def init(pointer: Any, arrivals: int) -> None:
        assert arrivals == 1
        here.warp.block.bars[int(pointer)] = Mbarrier()

    def block_idx() -> tuple[int, int, int]:
        block = here.warp.block
        head, n = block.cluster.first
        return head * 4 + block.part, n % block.cluster.rows, n // block.cluster.rows

    def nothing(*_: Any) -> None: ...

    return SimpleNamespace(
        sync_threads=meet, sync_warp=nothing, shuffle_sync_bfly=shuffle,
        shuffle_sync=lambda x, lane: np.broadcast_to(x, (32,))[lane],
        thread_idx=lambda: (here.warp.warp * 32 + LANES, 0, 0), make_warp_uniform=lambda x: int(x[0]),
        block_idx=block_idx, grid_dim=lambda: (0, here.warp.block.cluster.rows, 0),
        mbarrier_init=init, mbarrier_init_fence=nothing, mbarrier_wait=lambda pointer, phase: bar(pointer).wait(phase),
        mbarrier_arrive_and_expect_tx=lambda pointer, size: bar(pointer).count(1, size),
        elect_one=contextlib.nullcontext, cluster_arrive_relaxed=nothing,
        cluster_wait=lambda: here.warp.block.cluster.meet.wait(WAIT_S),
        griddepcontrol_wait=nothing, griddepcontrol_launch_dependents=nothing,
    )  # fmt: skip


class Allocator:
    """Where tables are in shared memory: each warp counts for itself, and they agree."""

    def allocate_tensor(self, dtype: Any, size: int, byte_alignment: int) -> Any:
        warp = here.warp
        warp.allocated = -(-warp.allocated // byte_alignment) * byte_alignment
        at = warp.allocated
        warp.allocated += size * (1 if dtype is np.uint8 else 8)
        return SimpleNamespace(iterator=Pointer(at))


@contextlib.contextmanager
def running(fused: Any, base: Any) -> Iterator[None]:
    ptx: Any = Here()

    def crd2idx(at, layout):
        return sum(np.int64(i) * s for i, s in zip(at, layout, strict=True))

    def in_dtype(do, flags, kind):
        do(BF16 if flags & (1 << kind) else F32)

    with pytest.MonkeyPatch.context() as m, on_the_cpu(base, ptx), on_the_cpu(fused, ptx):
        cute = SimpleNamespace(
            arch=arch(), make_layout=lambda n: n, size=lambda x: x, crd2idx=crd2idx,
            make_rmem_tensor=lambda shape, dtype: [np.zeros(32, f32)] * shape[0],
        )  # fmt: skip
        cutlass = SimpleNamespace(
            range_constexpr=range, range=lambda n, unroll: range(n), min=min, select_=np.where, const_expr=bool
        )
        for place in (fused, base, fused.scalars, fused.fragments, fused.gate):
            m.setattr(place, "cute", cute)
            m.setattr(place, "cutlass", cutlass)
            m.setattr(place, "Int32", np.int64, raising=False)
            m.setattr(place, "Int64", np.int64, raising=False)
            m.setattr(place, "const_expr", bool, raising=False)
        m.setattr(fused, "Float32", F32)
        m.setattr(fused, "Uint8", np.uint8)
        m.setattr(fused, "SmemAllocator", Allocator)
        m.setattr(fused, "state_io", SimpleNamespace(in_dtype=in_dtype))
        wait = cute.arch.mbarrier_wait
        m.setattr(fused, "barriers", SimpleNamespace(wait=lambda bar, phase, lane: wait(bar, phase)))
        yield


def run(fused: Any, base: Any, config: Any, tensors: tuple[torch.Tensor, ...], numbers: tuple[Any, ...], rows: int):
    """What a launch does: tensors and numbers as the kernel is given them, on the CPU; rows: of the grid."""
    x, g, z, o = tensors
    N, HV = g.shape[:2]
    kernel = fused.KdaFusedDecodeSm90(config)
    for cls in reversed(type(kernel).__mro__):
        for name, method in vars(cls).items():
            if callable(method) and hasattr(method, "__wrapped__"):
                setattr(kernel, name, MethodType(method.__wrapped__, kernel))

    def by_lane(method: Any) -> Any:
        """Of one with a branch on lanes, whose array arguments have an element for each."""

        def run(*args: Any) -> None:
            warp = here.warp
            here.warp = warp.one()

            def of(value, lane):
                if isinstance(value, (list, tuple)):
                    return type(value)(of(y, lane) for y in value)
                return value[lane] if isinstance(value, np.ndarray) and value.shape == (32,) else value

            try:
                for lane in range(32):
                    method(*(of(value, lane) for value in args))
            finally:
                here.warp = warp

        return run

    for name in ("put_number", "store", "send"):
        setattr(kernel, name, by_lane(getattr(kernel, name)))

    def put(m, at, value):
        here.warp._scatter(
            m.address(at), bf16(np.broadcast_to(value, here.warp.lanes.shape)).astype(np.uint16)[:, None]
        )

    def load(m, at):
        address = m.address(at)
        return here.warp.ldg_u32(address) if m.element_type is F32 else here.warp.ldg_u16(address)

    kernel.put, kernel.load = put, load
    given = fused.Numbers(*numbers)
    heads = given.group if config.conv else 1
    of_group = ((1 << 31) + given.group - 1) // given.group
    m = [Global(y, F32 if y.dtype == torch.float32 else BF16) for y in (x, g, z, o)]
    errors: list[BaseException] = []

    def work(warp: BlockWarp) -> None:
        here.warp = warp
        try:
            with np.errstate(all="ignore"):
                kernel.kernel(*m, given, np.int64(of_group))
        except BaseException as e:  # noqa: BLE001 - told to the caller below
            errors.append(e)
            warp.block.meet.abort()
            warp.block.cluster.meet.abort()

    with running(fused, base):
        for n in range(-(-N // rows) * rows):
            for head in range(HV // heads):
                cluster = Cluster((head, n), 4, rows)
                warps = [
                    threading.Thread(target=work, args=(BlockWarp(b, w),)) for b in cluster.blocks for w in range(4)
                ]
                for thread in warps:
                    thread.start()
                for thread in warps:
                    thread.join()
                for e in errors:
                    if not isinstance(e, threading.BrokenBarrierError):
                        raise e
                assert not errors


__all__ = ["modules", "run", "bf16_pair"]
