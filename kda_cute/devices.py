"""Which backend a call runs on: by the caller's word, else by where q is and what that GPU can run."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

HOPPER = (9, 0)


@functools.cache
def gpu(index: int) -> tuple[tuple[int, int], str]:
    """(compute capability, name)"""
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)


def is_hopper(index: int) -> bool:
    return torch.version.hip is None and gpu(index)[0] == HOPPER


def backend_of(q: torch.Tensor, backend: str | None, name: str = "q") -> Any:
    """The module of `backends` that serves a call. Raises ValueError for a name or device that none has, RuntimeError
    for a GPU that no kernel runs on. name: of the argument q."""
    if backend == "reference" or (backend is None and q.is_cpu):
        return _load("reference")
    if backend is not None and backend != "cute":
        raise ValueError(f'backend is {backend!r}: must be None, "cute" or "reference"')
    if not q.is_cuda:
        raise ValueError(
            f'{name} is on {q.device}: must be on a CUDA device for backend={backend!r}; backend="reference" works here'
        )
    capability, model = gpu(q.get_device())
    if torch.version.hip is not None:
        raise RuntimeError(
            f"{name} is on {q.device}, a {model} under ROCm: the kernel needs an NVIDIA Hopper GPU such as the H100 or "
            'H200; backend="reference" works here, slowly'
        )
    if capability != HOPPER:
        major, minor = capability
        raise RuntimeError(
            f"{name} is on {q.device}, a {model} (compute capability {major}.{minor}): the kernel needs a Hopper GPU "
            f'such as the H100 or H200 (9.0); backend="reference" works here, slowly'
        )
    return _load("hopper")


@functools.cache
def _load(name: str) -> Any:
    return importlib.import_module(f".backends.{name}", __package__)  # one that is not used may need what is not there
