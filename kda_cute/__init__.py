"""Kimi Delta Attention (KDA) on Hopper GPUs.

Importing this is cheap beside torch, whose operators `kda_cute::...` it registers: the names below are looked up when
first used, and cutlass is imported when a kernel has to be compiled.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "chunk_kda",
    "chunk_kda_summary",
    "fused_decode_kda",
    "fused_recurrent_kda",
    "fwd",
    "replay_shape",
    "warmup",
]

if TYPE_CHECKING:
    from .contract import replay_shape
    from .fused_decode import fused_decode_kda
    from .jit import warmup
    from .ops import chunk_kda, chunk_kda_summary, fused_recurrent_kda, fwd

# In a checkout that is on the path but not installed, kernels/ and reference/ lie one folder up.
if not (Path(__file__).parent / "kernels").exists() and (Path(__file__).parents[1] / "kernels" / "config.py").exists():
    __path__.append(str(Path(__file__).parents[1]))

_HOME = {
    "chunk_kda": "ops",
    "chunk_kda_summary": "ops",
    "fused_decode_kda": "fused_decode",
    "fused_recurrent_kda": "ops",
    "fwd": "ops",
    "replay_shape": "contract",
    "warmup": "jit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# For programs that torch.export has saved. Where torch is missing, broken or too old, the names above say so when used,
# and `kda-cute doctor` works all the same.
with suppress(Exception):
    from . import torch_ops as _torch_ops  # noqa: F401
