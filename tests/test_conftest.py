"""The end of `make test`: one line for all GPU tests, other skips with their reasons; with and without workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(3))
def test_gpu(i):
    pass

@pytest.mark.gpu
def test_gpu_and_more():
    pytest.skip("needs more than a GPU")

@pytest.mark.gpu
def test_gpu_fails():
    assert False

def test_cpu():
    from kda_cute import contract
    assert not contract.CHECK_VALUES

def test_skipped():
    pytest.skip("for a reason of its own")
"""
PLUGIN = """
import tests.conftest
tests.conftest.no_hopper = lambda: {reason!r}
"""
REASON = "needs a Hopper GPU, torch finds no CUDA device"


def end_of(tmp_path: Path, reason: str | None, *options: str) -> list[str]:
    """What pytest prints behind its dots, on a machine that misses a Hopper GPU for that reason or has one."""
    (tmp_path / "test_made_up.py").write_text(TESTS)
    (tmp_path / "made_up.py").write_text(PLUGIN.format(reason=reason))
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "made_up", "-p", "no:cacheprovider", "-c",
               ROOT / "pyproject.toml", "--rootdir", tmp_path, *options, tmp_path / "test_made_up.py"]  # fmt: skip
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environment["KDA_CUTE_CHECK"] = "1"  # somebody's shell has it
    path = (str(tmp_path), str(ROOT), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert any("short test summary" in line for line in lines), done.stdout + done.stderr
    return lines[[i for i, line in enumerate(lines) if "short test summary" in line][0] + 1 :]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_without_a_gpu(workers: str, tmp_path: Path) -> None:
    skip, gpu, counts = end_of(tmp_path, REASON, "-n", workers)
    assert skip.startswith("SKIPPED [1]") and skip.endswith("for a reason of its own")
    assert gpu == f"GPU tests: 0 of 5 ran: {REASON}"
    assert "1 passed, 6 skipped" in counts


@pytest.mark.parametrize("workers", ["0", "2"])
def test_with_a_gpu(workers: str, tmp_path: Path) -> None:
    *skips, gpu, counts = end_of(tmp_path, None, "-n", workers)
    assert sorted(skip.rsplit(": ", 1)[1] for skip in skips) == ["for a reason of its own", "needs more than a GPU"]
    assert gpu == "GPU tests: 4 of 5 ran"
    assert "1 failed, 4 passed, 2 skipped" in counts


def test_workers_are_not_as_many_as_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((3, 3), (200, 16)):
        monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", str(cores))
        assert request.config.hook.pytest_xdist_auto_num_workers(config=request.config) == workers


def test_nothing_about_gpus_if_none_is_asked_for(tmp_path: Path) -> None:
    skip, counts = end_of(tmp_path, REASON, "-n", "0", "-m", "not gpu")
    assert skip.endswith("for a reason of its own") and "1 passed, 1 skipped, 5 deselected" in counts
