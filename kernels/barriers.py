"""The mbarriers between the roles of a pipeline: one table, from which their arrival counts are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from .layout import SYSTEMS
from .schedule import PIECES


class Edge(NamedTuple):
    """A kind of mbarrier."""

    name: str
    per: str  # what there is one of them for: "stage", "system", "piece" or "block"
    by: str  # who arrives
    waits: str  # who waits for that
    arrivals: Callable[[Any, int], int]  # how often, from the Pipeline and which of its stages, systems or pieces it is
    listed: bool = False  # only where pieces are listed


def gated(pipe, stage: int) -> int:
    return 32 * pipe.gate_warps if pipe.gate_warps and stage < pipe.own_stages else 32


def empty(pipe, stage: int) -> int:
    """The other block, which is sent what this one prepares, has left it with a lane of each warp."""
    sent = pipe.blocks == 2 and stage < pipe.own_stages
    return (128 + 4 * sent) * pipe.state_wgs


def taken(pipe, _: int) -> int:
    """All but `load`, which lists the pieces, and idle pairs."""
    return pipe.threads - 32 - 64 * (2 * pipe.prepare_wgs - pipe.pairs)


# In the order in which they lie in shared memory. "sent": of the stage for what the other block sends.
EDGES = (
    Edge(
        "raw_full", "stage", "load, TMA; sent: fetch, TMA", "gates, prepare, invert; sent: state, fetch", lambda *_: 1
    ),
    Edge("gated", "stage", "gates; sent: fetch", "prepare; sent: state", gated),
    Edge("ready", "stage", "a pair of prepare", "state, send", lambda *_: 64),
    Edge("solved", "stage", "invert", "state, send, prepare", lambda *_: 32),
    Edge("empty", "stage", "state, of both blocks", "load; sent: fetch", empty),
    Edge("a_full", "system", "a pair of prepare", "invert", lambda *_: 64),
    Edge("a_empty", "system", "invert", "prepare", lambda *_: 32),
    Edge("listed", "piece", "load", "all others", lambda *_: 1, True),
    Edge("taken", "piece", "all others", "load", taken, True),
    Edge("left", "block", "state, of the other block", "send", lambda pipe, _: 4 * pipe.state_wgs),
    Edge("settled", "block", "state", "load", lambda pipe, _: 4 * pipe.state_wgs, True),
    Edge("given", "block", "state", "load", lambda pipe, _: 128 * pipe.state_wgs, True),
)


def edges_of(pipe) -> list[Edge]:
    return [edge for edge in EDGES if pipe.lists or not edge.listed]


def places(pipe, per: str) -> int:
    return {"stage": pipe.stages, "system": SYSTEMS, "piece": PIECES, "block": 1}[per]


def total(pipe) -> int:
    return sum(places(pipe, edge.per) for edge in edges_of(pipe))


@dataclass(frozen=True)
class Barriers:
    """The first mbarrier of each edge, in shared memory; None where a kernel has none."""

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
    def at(pipe, first: cute.Pointer) -> Barriers:
        found, n = {}, 0
        for edge in edges_of(pipe):
            found[edge.name] = first + n
            n += places(pipe, edge.per)
        return Barriers(**found)

    def init(self, pipe) -> None:
        """By one thread."""
        for per in ("stage", "block", "system", "piece"):
            for i in range(places(pipe, per)):
                for edge in edges_of(pipe):
                    if edge.per == per:
                        cute.arch.mbarrier_init(getattr(self, edge.name) + i, edge.arrivals(pipe, i))


@cute.jit
def wait(barrier, phase: Int32, lane: Int32):
    """mbarrier_wait before a named barrier. The test always holds, which ptxas cannot see: it makes the lanes of a
    warp leave the spinning together. They do on the machine, but not under compute-sanitizer, and a warp that comes
    to a named barrier in parts counts as several: racecheck then reports hazards that are none."""
    if lane + cute.arch.grid_dim()[0] != 0:
        cute.arch.mbarrier_wait(barrier, phase)
