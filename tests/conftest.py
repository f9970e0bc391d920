"""Hypothesis profiles, and the skip of GPU tests where there is no Hopper GPU.

`--hypothesis-profile=NAME` picks a profile; without it CI in the environment means ci, anything else dev. The GPU tests
take the profile gpu, `python -m tests.fuzz` takes fuzz.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.profiles import load_default

load_default()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are as many as the cores


def _no_hopper() -> str | None:
    """Why the GPU tests cannot run, or None."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU, torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"needs a Hopper GPU (9.0), this is a {torch.cuda.get_device_name()} ({major}.{minor})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _no_hopper()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
