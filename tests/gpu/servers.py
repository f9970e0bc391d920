"""Triton kernels of the servers without the servers: `python -m tests.gpu.servers DIR WHEELS`.

Takes the few files that hold them out of the wheels of SGLang and vLLM in the folder WHEELS (`pip download --no-deps
sglang==0.5.23 vllm==0.33.0`), and writes stubs of what they import besides. With DIR on PYTHONPATH they can be imported
wherever there are torch and Triton. DIR belongs to the servers' projects, with their licences: it is no part of this.
"""

from __future__ import annotations

import argparse
import importlib
import zipfile
from pathlib import Path

FLA = "sglang/kernels/ops/attention/fla"
VLLM_FLA = "vllm/third_party/flash_linear_attention/ops"
K3 = "vllm/models/kimi_k3/nvidia/ops/third_party/kda"
GLM = "vllm/models/glm5next/nvidia/ops/third_party/kda"
FILES = {
    "sglang-0.5.23": (
        *(f"{FLA}/{name}.py" for name in (
            "chunk_delta_h", "chunk_intra", "chunk_intra_token_parallel", "cumsum", "fused_norm_gate",
            "fused_recurrent", "index", "kda", "l2norm", "op", "utils",
        )),
        "sglang/kernels/ops/attention/linear/fused_recurrent_linear_replayssm.py",
        "sglang/kernels/ops/attention/linear/fused_sigmoid_gating_recurrent.py",
        "sglang/kernels/ops/mamba/causal_conv1d_triton.py",
        "sglang/srt/layers/attention/linear/kernels/kda_triton.py",
        "sglang/srt/layers/attention/linear/kernels/kernel_backend.py",
    ),
    "vllm-0.33.0": (
        *(f"{K3}/{name}.py" for name in (
            "__init__", "chunk", "chunk_intra", "chunk_intra_token_parallel", "fused_recurrent",
        )),
        *(f"{GLM}/{name}.py" for name in ("__init__", "fused_recurrent", "kernels")),
        *(f"{VLLM_FLA}/{name}.py" for name in (
            "chunk_delta_h", "cumsum", "fused_norm_gate", "fused_recurrent", "index", "kda", "l2norm", "op",
            "solve_tril", "utils",
        )),
        "vllm/model_executor/layers/mamba/ops/causal_conv1d.py",
        "vllm/model_executor/layers/mamba/ops/gather_initial_states.py",
        "vllm/utils/math_utils.py",
    ),
}  # fmt: skip

STUBS = {
    "sglang/__init__.py": '__version__ = "0.5.23"\n',
    "vllm/__init__.py": '__version__ = "0.33.0"\n',
    "sglang/version.py": '__version__ = "0.5.23"\n',
    "sglang/kernels/jit/utils.py": """\
from types import SimpleNamespace
import torch
def is_arch_support_pdl(): return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
def get_jit_cuda_arch():
    major, minor = torch.cuda.get_device_capability()
    return SimpleNamespace(major=major, minor=minor)
""",
    # The CUDA kernel that packed decoding of 8 sequences and more takes needs nvcc: Triton's stays.
    "sglang/kernels/ops/attention/kda_packed_decode.py": "def covered(*_): return False\n",
    "sglang/srt/utils/__init__.py": """\
import torch
def is_cuda(): return torch.cuda.is_available()
def is_cpu(): return False
is_hip = is_npu = is_xpu = is_gfx95_supported = cpu_has_amx_support = is_cpu
def get_device_sm():
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
def is_sm90_supported(*_): return is_cuda() and torch.cuda.get_device_capability()[0] == 9
def cdiv(a, b): return -(a // -b)
def next_power_of_2(n): return 1 << (n - 1).bit_length() if n > 0 else 1
""",
    "sglang/srt/utils/common.py": """\
import torch
torch_release = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
""",
    "vllm/version.py": '__version__ = "0.33.0"\n',
    "vllm/platforms/__init__.py": """\
import torch
class _Platform:
    def is_cuda(self): return torch.cuda.is_available()
    is_cuda_alike = is_cuda
    def is_cpu(self): return False
    is_rocm = is_xpu = is_cpu
    def _capability(self): return torch.cuda.get_device_capability() if self.is_cuda() else (0, 0)
    def is_arch_support_pdl(self): return self._capability()[0] >= 9
    def has_device_capability(self, x, device_id=0): return 10 * self._capability()[0] + self._capability()[1] >= x
    def is_device_capability(self, x, device_id=0): return 10 * self._capability()[0] + self._capability()[1] == x
    def is_device_capability_family(self, x, device_id=0): return self._capability()[0] == x // 10
current_platform = _Platform()
""",
    "vllm/triton_utils/__init__.py": """\
import triton
import triton.language as tl
import triton.language.extra.libdevice as tldevice
""",
    "vllm/utils/gpu_sync_debug.py": """\
import contextlib
def gpu_sync_allowed(first_only=False): return contextlib.nullcontext()
""",
    "vllm/utils/torch_utils.py": """\
def async_tensor_h2d(data, device=None, dtype=None): return data.to(device=device, dtype=dtype, non_blocking=True)
""",
    "vllm/model_executor/custom_op.py": """\
import torch
class CustomOp(torch.nn.Module):
    @classmethod
    def register(cls, name): return lambda x: x
    def forward(self, *args, **kwargs): return self.forward_cuda(*args, **kwargs)
""",
    "vllm/v1/attention/backends/utils.py": "NULL_BLOCK_ID, PAD_SLOT_ID = 0, -1\n",
}

MODULES = {  # what the tests and the benchmark import
    "sglang": (
        "sglang.srt.layers.attention.linear.kernels.kda_triton",
        "sglang.kernels.ops.attention.fla.fused_norm_gate",
        "sglang.kernels.ops.mamba.causal_conv1d_triton",
    ),
    "vllm": (
        "vllm.models.kimi_k3.nvidia.ops.third_party.kda",
        "vllm.models.glm5next.nvidia.ops.third_party.kda",
        "vllm.third_party.flash_linear_attention.ops.kda",
        "vllm.model_executor.layers.mamba.ops.gather_initial_states",
        "vllm.model_executor.layers.mamba.ops.causal_conv1d",
    ),
}


def extract(to: Path, wheels: Path) -> int:
    """Bytes written."""
    written = {}
    for wheel, names in FILES.items():
        found = sorted(wheels.glob(f"{wheel}-*.whl"))
        if not found:
            raise SystemExit(f"no {wheel}-*.whl in {wheels}: pip download --no-deps {wheel.replace('-', '==')}")
        with zipfile.ZipFile(found[0]) as archive:
            written |= {name: archive.read(name) for name in names}
    written |= {name: text.encode() for name, text in STUBS.items()}
    for name in list(written):
        for parent in list(Path(name).parents)[:-1]:
            written.setdefault(f"{parent}/__init__.py", b"")
    for name, content in written.items():
        file = to / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return sum(map(len, written.values()))


def missing(server: str) -> str | None:
    """Why its kernels cannot be imported here, or None."""
    for name in MODULES[server]:
        try:
            importlib.import_module(name)
        except Exception as error:  # a server that is installed whole may fail in its own ways
            return (
                f"no Triton kernels of {server} ({type(error).__name__}: {error}): "
                f"`python -m tests.gpu.servers DIR WHEELS`, then DIR on PYTHONPATH"
            )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.servers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path)
    parser.add_argument("wheels", type=Path)
    options = parser.parse_args()
    size = extract(options.dir, options.wheels)
    print(f"{size / 1e3:.0f} kB in {options.dir}")


if __name__ == "__main__":
    main()
