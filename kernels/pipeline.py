"""A pipeline of chunks: what the functions of its roles are given of the kernel that they run in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from . import gate, schedule
from .arguments import TYPES
from .config import KdaBuildConfig, KdaFwdConfig
from .layout import SYSTEMS, C, Stage
from .schedule import PIECES
from .segments import Team


@dataclass(frozen=True)
class Pipeline:
    """Frozen: so the DSL does not carry it through loops."""

    config: KdaFwdConfig | KdaBuildConfig
    tiles: Stage  # what a stage of the ring holds
    threads: int  # of a block
    prepare_wgs: int
    pairs: int  # of warps of `prepare`
    gate_warps: int  # 0: `prepare` does it
    state_wgs: int  # warpgroups that have 64 rows of a state each
    queries: bool  # whether there is q, and with it Qd, M and o
    gates_rolled: bool  # see gate.Form
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

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Those that there are: pieces that are not listed have none."""
        if self.lists:
            return EDGES
        return tuple(edge for edge in EDGES if edge.name not in ("listed", "taken", "settled", "given"))

    def places(self, per: str) -> int:
        return {"stage": self.stages, "system": SYSTEMS, "piece": PIECES, "block": 1}[per]

    @property
    def barriers(self) -> int:
        return sum(self.places(edge.per) for edge in self.edges)

    def gate_threads(self, stage: int) -> int:
        """That say that a stage is gated: of `gates`, or of `fetch`."""
        return 32 * self.gate_warps if self.gate_warps and stage < self.own_stages else 32

    def state_threads(self, stage: int) -> int:
        """That say that the states have left a stage: a warp of the other block has one."""
        sent = self.blocks == 2 and stage < self.own_stages
        return (128 + 4 * sent) * self.state_wgs

    @property
    def readers(self) -> int:
        """Threads that read the list of pieces: all but `load`, which writes it, and idle pairs."""
        return self.threads - 32 - 64 * (2 * self.prepare_wgs - self.pairs)

    def worker(self) -> tuple[Int32, Int32]:
        """(which, of how many)"""
        return schedule.worker(self.blocks)

    def rank(self) -> Int32:
        return schedule.rank(self.blocks)


class Edge(NamedTuple):
    """A kind of mbarrier: what one role waits for until others arrive."""

    name: str
    per: str  # what there is one of them for: "stage", "system", "piece" or "block"
    arrivals: Callable[[Pipeline, int], int]  # of threads, and of what arrives for TMA; by the number of the stage
    by: str
    waits: str


EDGES = (  # in the order in which they lie in shared memory
    Edge("raw_full", "stage", lambda pipe, _: 1, "load, TMA", "gates, prepare, invert"),
    Edge("gated", "stage", lambda pipe, s: pipe.gate_threads(s), "gates; for what is sent fetch", "prepare; state"),
    Edge("ready", "stage", lambda pipe, _: 64, "a pair of prepare", "state, send"),
    Edge("solved", "stage", lambda pipe, _: 32, "invert", "state, send, prepare"),
    Edge("empty", "stage", lambda pipe, s: pipe.state_threads(s), "state, of both blocks", "load, fetch"),
    Edge("a_full", "system", lambda pipe, _: 64, "a pair of prepare", "invert"),
    Edge("a_empty", "system", lambda pipe, _: 32, "invert", "prepare"),
    Edge("listed", "piece", lambda pipe, _: 1, "load", "all other roles"),
    Edge("taken", "piece", lambda pipe, _: pipe.readers, "all other roles", "load"),
    Edge("left", "block", lambda pipe, _: 4 * pipe.state_wgs, "state, of the other block", "send"),
    Edge("settled", "block", lambda pipe, _: 4 * pipe.state_wgs, "state", "load"),
    Edge("given", "block", lambda pipe, _: 128 * pipe.state_wgs, "state", "load"),
)


@dataclass(frozen=True)
class Barriers:
    """The first mbarrier of each edge, in shared memory. None where a kernel has none of the kind."""

    raw_full: cute.Pointer
    gated: cute.Pointer
    ready: cute.Pointer
    solved: cute.Pointer
    empty: cute.Pointer
    a_full: cute.Pointer
    a_empty: cute.Pointer
    left: cute.Pointer
    listed: cute.Pointer | None = None
    taken: cute.Pointer | None = None
    settled: cute.Pointer | None = None
    given: cute.Pointer | None = None

    @staticmethod
    def at(pipe: Pipeline, first: cute.Pointer) -> Barriers:
        found, n = {}, 0
        for edge in pipe.edges:
            found[edge.name] = first + n
            n += pipe.places(edge.per)
        return Barriers(**found)

    def init(self, pipe: Pipeline) -> None:
        """By one thread."""
        for per in ("stage", "block", "system", "piece"):
            for i in range(pipe.places(per)):
                for edge in pipe.edges:
                    if edge.per == per:
                        cute.arch.mbarrier_init(getattr(self, edge.name) + i, edge.arrivals(pipe, i))


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


@cute.jit
def stage_of(pipe: cutlass.Constexpr, n: Int32):
    """(stage, phase, whether this block prepares it) of the n-th chunk."""
    S, m = pipe.own_stages, n // pipe.blocks
    stage, phase, is_own = m % S, m // S & 1, Boolean(True)
    if const_expr(pipe.blocks == 2):
        is_own = n % 2 == pipe.rank()
        if not is_own:
            stage, phase = Int32(S), m & 1
    return stage, phase, is_own


@cute.jit
def wait(barrier, phase: Int32, lane: Int32):
    """mbarrier_wait before a named barrier. The test always holds, which ptxas cannot see: it makes the lanes of a
    warp leave the spinning together. They do on the machine, but not under compute-sanitizer, and a warp that comes
    to a named barrier in parts counts as several: racecheck then reports hazards that are none."""
    if lane + cute.arch.grid_dim()[0] != 0:
        cute.arch.mbarrier_wait(barrier, phase)


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
