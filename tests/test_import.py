"""What importing kda_cute brings along, and what it does not."""

from __future__ import annotations

import os
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


def test_importing_registers_the_operators_and_little_else():
    """torch is the most of it: what comes beside it is a handful of this package's own modules."""
    torch_alone = modules_after("import torch")
    more = modules_after("import torch, kda_cute; torch.ops.kda_cute.chunk_kda.default") - torch_alone
    assert {name.split(".")[0] for name in more} <= {"kda_cute"} | set(sys.stdlib_module_names)
    assert "kda_cute.torch_ops" in more and not any(name.startswith("kda_cute.kernels") for name in more)


BROKEN = {
    "missing": "raise ModuleNotFoundError('No module named torch')",
    "broken": "raise OSError('libtorch_cpu.so: cannot open shared object file')",
    "too old": "__version__ = '2.1.0'",
}


@pytest.mark.parametrize("torch_module", BROKEN.values(), ids=BROKEN)
def test_without_a_torch_that_works(torch_module, tmp_path):
    """The package and its doctor can be had, the operations say what is wrong."""
    (tmp_path / "torch.py").write_text(torch_module)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "KDA_CUTE_CACHE_DIR": str(tmp_path)}

    def run(*argv):
        return subprocess.run([sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run("-c", "import kda_cute; print(kda_cute.__version__)").returncode == 0
    table = run("-m", "kda_cute", "doctor").stdout
    assert "verdict" in table and "torch" in table
    done = run("-c", "from kda_cute import chunk_kda")
    assert done.returncode != 0 and "torch" in done.stderr.splitlines()[-1]


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
