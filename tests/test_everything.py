"""What `make gpu-all` says of its parts. Needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import no_hopper
from tests.gpu import everything
from tests.gpu.everything import Part

PROGRAMS = {
    "passes": ("print('3 passed')", "ok     a part: 3 passed", True),
    "fails": ("print('FAILED tests/x.py::y'); print('1 failed'); raise SystemExit(1)", "FAILED tests/x.py::y", False),
    "crashes": ("import os; os.kill(os.getpid(), 9)", "FAILED a part:  (-9)", False),
    "is too slow": ("import time; time.sleep(60)", "FAILED a part:  (not done after 1 s)", False),
}


@pytest.mark.parametrize("program, line, passes", PROGRAMS.values(), ids=PROGRAMS)
def test_a_part(program: str, line: str, passes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = 1 if "sleep" in program else 60
    assert Part("a part", (sys.executable, "-c", program), tmp_path).wait(seconds) == passes
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.skipif(no_hopper() is None, reason="has a Hopper GPU: it would start")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["everything"])
    assert everything.main() == 1
    assert "needs a Hopper GPU" in capsys.readouterr().err
