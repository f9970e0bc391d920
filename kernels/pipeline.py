"""A pipeline of chunks: what the functions of its roles are given of the kernel that they run in, and the ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from . import gate, ptx, schedule
from .arguments import TYPES
from .barriers import Barriers
from .config import KdaBuildConfig, KdaFwdConfig
from .layout import C, Stage, phase_of, slot_of
from .segments import Team


class Registers(NamedTuple):
    """A lane's, by role."""

    load: int  # and the others of its warpgroup
    prepare: int
    state: int
    gates: int = 0  # where they are not of that warpgroup


@dataclass(frozen=True)
class Pipeline:
    """A block's warps, and what passes through them. Frozen, so that the DSL does not carry it through loops."""

    config: KdaFwdConfig | KdaBuildConfig
    tiles: Stage  # what a stage of the ring holds
    threads: int  # of a block
    prepare_wgs: int  # warpgroups of `prepare`
    pairs: int  # of warps, of which each has a chunk; with fewer than there are some are idle
    gate_warps: int  # 0: `prepare` does it
    state_wgs: int  # warpgroups that have 64 rows of a state each
    queries: bool  # whether there is q, and with it Qd, M and o
    gates_rolled: bool  # see gate.Form
    whole: bool  # whether all chunks are whole
    registers: Registers | None  # None: without setmaxnreg all have enough
    lists: bool  # whether `load` lists pieces of work for the others, see schedule.Listed

    @property
    def stages(self) -> int:
        return self.config.stages

    @property
    def blocks(self) -> int:
        """Of a cluster: each prepares every other chunk for both."""
        return self.config.v_split

    @property
    def own_stages(self) -> int:
        """In a cluster the last stage is for what the other block sends; another own one is worth more than a
        second."""
        return self.stages - (self.blocks - 1)

    @property
    def dtype(self):
        return TYPES[self.config.dtype]

    @property
    def g_type(self):
        return TYPES[self.config.g_dtype]

    @property
    def g_boxes(self) -> int:
        """TMA boxes of a chunk's g; k_boxes: of its k and of its q; v_boxes: of the block's slice of its v."""
        return g_boxes(self.config)

    @property
    def k_boxes(self) -> int:
        return self.config.K // 64

    @property
    def v_boxes(self) -> int:
        return v_boxes(self.config)

    @property
    def form(self) -> gate.Form:
        return gate.Form(self.config.gate, self.config.g_dtype, self.config.K, self.tiles, self.gates_rolled)

    @property
    def team(self) -> Team:
        return Team(self.blocks, self.state_wgs)

    def worker(self) -> tuple[Int32, Int32]:
        """(which, of how many)"""
        return schedule.worker(self.blocks)

    def rank(self) -> Int32:
        return schedule.rank(self.blocks)


@dataclass(frozen=True)
class Shared:
    """What lies in shared memory beside the work, and where: see `layout`."""

    ring: cute.Pointer
    tables: Int32
    systems: Int32
    bias: Int32  # of each warp that makes gates, 256 bytes
    triangle: Int32  # see chunk.lower_triangle
    bars: Barriers


def g_boxes(config) -> int:
    return 4 if config.g_dtype == "fp32" else 2


def v_boxes(config) -> int:
    return config.V // 64 // config.v_split


def first_own(n: Int32, phase: Int32, period: int):
    """Of the chunks from the n-th on the first that is the phase-th of its period."""
    return n + (phase - n % period + period) % period


def own_stage(pipe: cutlass.Constexpr, own: Int32) -> Int32:
    """Of the own-th of the chunks that the block prepares."""
    return slot_of(own, pipe.own_stages)


def own_phase(pipe: cutlass.Constexpr, own: Int32) -> Int32:
    """Of that stage's mbarriers. To be called where it is waited for: made before, it gives other machine code."""
    return phase_of(own, pipe.own_stages)


@cute.jit
def next_stage(pipe: cutlass.Constexpr, stage: Int32, phase: Int32):
    """(stage, phase) of the next chunk that the block prepares, from those of the one before."""
    stage += 1
    if stage == pipe.own_stages:
        stage = Int32(0)
        phase ^= 1
    return stage, phase


@cute.jit
def stage_of(pipe: cutlass.Constexpr, n: Int32):
    """(stage, phase, whether this block prepares it) of the n-th chunk."""
    m = n // pipe.blocks
    stage, phase, is_own = own_stage(pipe, m), own_phase(pipe, m), Boolean(True)
    if const_expr(pipe.blocks == 2):
        is_own = n % 2 == pipe.rank()
        if not is_own:
            stage, phase = Int32(pipe.own_stages), m & 1
    return stage, phase, is_own


@cute.jit
def made(pipe: cutlass.Constexpr, bars: Barriers, n: Int32):
    """Of the n-th chunk: (stage, phase, whether this block prepares it, the mbarrier that says that Kd, Qd, Kr and M
    are there, and that of T and the norms)."""
    stage, phase, is_own = stage_of(pipe, n)
    prepared, inverted = bars.ready + stage, bars.solved + stage
    if const_expr(pipe.blocks == 2):
        if not is_own:
            prepared, inverted = bars.raw_full + stage, bars.gated + stage
    return stage, phase, is_own, prepared, inverted


@cute.jit
def leave(pipe: cutlass.Constexpr, bars: Barriers, n: Int32, stage: Int32, is_own: Boolean, lane: Int32):
    """The states leave the n-th chunk's stage, and that of the block which has sent it."""
    cute.arch.mbarrier_arrive(bars.empty + stage)
    if const_expr(pipe.blocks == 2):
        cute.arch.sync_warp()
        for bar in (bars.empty + n // 2 % pipe.own_stages, bars.left):
            ptx.remote_arrive(bar.toint(), pipe.rank() ^ 1, (lane == 0) & (not is_own))


def staged(pipe: cutlass.Constexpr, base, dtype, kind, shape, order, stride=None):
    """Swizzled tiles at `base` in shared memory, one a stage of the ring (or every `stride` bytes)."""
    layout = cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, dtype), shape, order)
    stages = cute.make_layout(pipe.stages, stride=(stride or pipe.tiles.size) * 8 // dtype.width)
    return cute.make_tensor(cute.recast_ptr(base, layout.inner, dtype), cute.append(layout.outer, stages))


def boxes_of(tma, m, start: Int32, cols: int, s_boxes):
    """TMA views of a head [T, D] from token `start` on: shared boxes, and [box, chunk, column box] of the head."""
    g = cute.local_tile(cute.domain_offset((start, 0), m), (C, cols), (None, None))
    return cpasync.tma_partition(
        tma, 0, cute.make_layout(1), cute.group_modes(s_boxes, 0, 2), cute.group_modes(g, 0, 2)
    )
