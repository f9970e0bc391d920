"""The mbarriers between the roles, and the table of them in docs/kernel/pipeline.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from kda_cute.kernels import barriers, build_sm90, fwd_sm90
from kda_cute.kernels.config import Config, KdaBuildConfig, KdaFwdConfig, all_configs
from kda_cute.kernels.pipeline import Pipeline

DOCS = Path(__file__).parents[1] / "docs" / "kernel" / "pipeline.md"


def pipeline_of(config: Config) -> Pipeline:
    return (build_sm90 if isinstance(config, KdaBuildConfig) else fwd_sm90).pipeline_of(config)


def arrivals(edge: barriers.Edge, pipe: Pipeline) -> str:
    """Without repetitions, by stage, system or piece."""
    if edge not in barriers.edges_of(pipe):
        return ""
    counts = (edge.arrivals(pipe, i) for i in range(barriers.places(pipe, edge.per)))
    return ", ".join(str(n) for n in dict.fromkeys(counts))


def test_docs_have_the_edges() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (stage|system|piece|block) \|(.*)\|$", DOCS.read_text(), re.M)
    found = [(name, per, *(cell.strip() for cell in rest.split("|")[:5])) for name, per, rest in rows]
    pipes = [pipeline_of(config) for config in (KdaFwdConfig(), KdaFwdConfig(v_split=2), KdaBuildConfig())]
    assert found == [
        (edge.name, edge.per, edge.by, edge.waits, *(arrivals(edge, pipe) for pipe in pipes)) for edge in barriers.EDGES
    ]


def test_each_edge_has_a_place() -> None:
    assert {edge.name for edge in barriers.EDGES} == {x.name for x in dataclasses.fields(barriers.Barriers)}


@pytest.mark.parametrize(
    "config", [c for c in all_configs() if not c.name.startswith("kda_decode")], ids=lambda c: c.name
)
def test_counts_are_those_of_threads(config: Config) -> None:
    """No more threads arrive than a block, or the two of a cluster, have; and for each barrier some do."""
    pipe = pipeline_of(config)
    for edge in barriers.edges_of(pipe):
        for i in range(barriers.places(pipe, edge.per)):
            assert 1 <= edge.arrivals(pipe, i) <= pipe.threads, edge.name
