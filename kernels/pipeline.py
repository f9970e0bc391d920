"""A pipeline of chunks: what the functions of its roles are given of the kernel that they run in."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32

from . import gate, schedule
from .arguments import TYPES
from .config import KdaBuildConfig, KdaFwdConfig
from .layout import Stage
from .segments import Team


@dataclass(frozen=True)
class Pipeline:
    """Frozen: so the DSL does not carry it through loops."""

    config: KdaFwdConfig | KdaBuildConfig
    tiles: Stage  # what a stage of the ring holds
    threads: int  # of a block
    pairs: int  # of warps of `prepare`
    gate_warps: int  # 0: `prepare` does it
    state_wgs: int  # warpgroups that have 64 rows of a state each
    queries: bool  # whether there is q, and with it Qd, M and o
    gates_rolled: bool  # see gate.Form

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


def g_boxes(config) -> int:
    return 4 if config.g_dtype == "fp32" else 2


def v_boxes(config) -> int:
    return config.V // 64 // config.v_split
