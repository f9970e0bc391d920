"""`make sass-diff`: what it reads off caches, and what it calls a difference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kda_cute import jit
from kda_cute.kernels.config import KdaDecodeConfig
from tests.sass_diff import Code, differences, read

CODE = Code(b"\x00\x01", 96, 0, 2)


@pytest.mark.parametrize(
    "base, new, found",
    [
        ({"a": [CODE]}, {"a": [CODE]}, []),
        ({"a": [CODE]}, {"a": [replace(CODE, text=b"\x00\x02")]}, ["a, kernel 0: "]),
        ({"a": [CODE, CODE]}, {"a": [CODE, replace(CODE, stack=8)]}, ["a, kernel 1: "]),
        ({"a": [CODE]}, {"a": [CODE, CODE]}, ["a: 1 kernels, then 2"]),
        ({"a": [CODE], "b": [CODE]}, {"b": [CODE], "c": [CODE]}, ["a: only in BASE", "c: only in the working tree"]),
    ],
)
def test_differences(base: dict[str, list[Code]], new: dict[str, list[Code]], found: list[str]) -> None:
    lines = differences(base, new)
    assert len(lines) == len(found) and all(map(str.startswith, lines, found))


def test_reads_what_was_compiled(tmp_path, monkeypatch) -> None:
    config = KdaDecodeConfig()
    monkeypatch.delenv("KDA_CUTE_CACHE", raising=False)
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(tmp_path))
    jit.artifact(config)
    (code,) = read(tmp_path)[config.name]
    assert len(code.text) >= 16 * code.instructions > 0 and code.registers <= 102
