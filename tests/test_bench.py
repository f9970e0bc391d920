"""The benchmark's bookkeeping, and what it says without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench.cases import SUITES, Case


def test_floor_counts_every_tensor_once():
    case = Case((5, 3), H=2)
    T, N, H, D = 8, 2, 2, 128
    tensors = 5 * T * H * D * 2 + T * H * 2  # q, k, v, g, o and beta in bf16
    states = 2 * N * H * D * D * 4
    assert case.floor_bytes == tensors + states


def test_case_names_are_unique_in_a_suite():
    for suite, cases in SUITES.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), suite


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs():
    done = subprocess.run([sys.executable, "-m", "bench"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Hopper GPU" in done.stderr
