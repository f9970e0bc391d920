"""What importing kda_cute brings along, and what it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kda_cute

ROOT = Path(__file__).parents[1]


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import kda_cute",
        "from kda_cute import chunk_kda, fwd, warmup",
        "from kda_cute.kernels.config import all_configs; all_configs()",
        "import torch, kda_cute; x = torch.ones(1, 4, 1, 8); kda_cute.chunk_kda(x, x, x, -x, x[..., 0])",
    ],
    ids=["package", "names", "configs", "call on the CPU"],
)
def test_no_cutlass(code):
    assert not modules_after(code) & {"cutlass", "tvm_ffi", "triton"}


def test_public_names():
    assert set(kda_cute.__all__) <= set(dir(kda_cute))
    for name in kda_cute.__all__:
        assert getattr(kda_cute, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        kda_cute.no_such_name  # noqa: B018


def test_kernels_and_reference_are_importable_by_their_public_names():
    import kda_cute.kernels.config
    import kda_cute.reference

    assert Path(kda_cute.kernels.config.__file__).name == "config.py"
    assert callable(kda_cute.reference.recurrence)
