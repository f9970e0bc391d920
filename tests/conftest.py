"""What all tests share: Hypothesis profiles, the skip of GPU tests where there is no Hopper GPU, and the line that says
how many ran.

`--hypothesis-profile=NAME` picks a profile; without it CI in the environment means ci, anything else dev. The GPU tests
take the profile gpu, `python -m tests.fuzz` takes fuzz.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest
import torch

from tests.profiles import load_default

MAX_WORKERS = 16  # each imports torch and has a context on the GPU: a gigabyte of the memory of either

load_default()
os.environ.pop("KDA_CUTE_CHECK", None)  # tests say themselves when values are to be checked
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are as many as the cores


def no_hopper() -> str | None:
    """Why the GPU tests cannot run, or None."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU, torch finds no CUDA device"
    if torch.version.hip:  # AMD's GPUs have capabilities too, some of them 9.0
        return f"needs a Hopper GPU, this is a {torch.cuda.get_device_name()} under ROCm"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"needs a Hopper GPU (9.0), this is a {torch.cuda.get_device_name()} ({major}.{minor})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = no_hopper() if marked else None
    for item in marked:
        item.user_properties.append(("gpu", reason))  # goes along with the reports, also from xdist's workers
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """`-n auto` is as many as there are cores, which may be hundreds."""
    return min((yield), MAX_WORKERS)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None, None, None]:
    """One line for all GPU tests in place of those that `-rs` prints for skipped ones."""
    reasons: dict[str, str | None] = {}  # of all GPU tests
    ran: set[str] = set()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            for name, reason in report.user_properties if isinstance(report, pytest.TestReport) else ():
                if name == "gpu":
                    reasons[report.nodeid] = reason
                    if outcome in ("passed", "failed", "xfailed", "xpassed"):
                        ran.add(report.nodeid)
    skipped = terminalreporter.stats.get("skipped", [])
    others = [report for report in skipped if not reasons.get(report.nodeid)]
    if skipped:
        terminalreporter.stats["skipped"] = others
    try:
        return (yield)
    finally:
        if skipped:
            terminalreporter.stats["skipped"] = skipped
        if reasons:
            why = "".join(f": {reason}" for reason in dict.fromkeys(reasons.values()) if reason)
            terminalreporter.write_line(f"GPU tests: {len(ran)} of {len(reasons)} ran{why}")
