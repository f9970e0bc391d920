"""What an argument must be before a kernel gets its address: plain memory that is there, and that may be written.

A kernel takes an address of 0 for an argument that is not given, and torch sees nothing of what it writes. So what
torch would notice about a tensor is noticed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .call import STATES, WRITTEN

SEARCH_MAX = 10_000  # steps, until two tensors that are woven into each other count as sharing memory

Ranges = dict[str, tuple[int, int]]  # addresses of an argument's first byte, and of the first one past it


def _increment_version(tensors: Iterable[torch.Tensor]) -> None:
    for x in tensors:
        torch._C._increment_version(x)


increment_version = torch._C._increment_version
try:
    increment_version(())
except Exception:  # torch 2.4 takes one tensor
    increment_version = _increment_version


def plain(call: Mapping[str, Any], written: Iterable[str] = WRITTEN) -> tuple[Mapping[str, Any] | None, Ranges]:
    """A call's arguments, by name, with what is inside of a wrapper in its place where that is right; and where their
    memory is. Refuses tensors that are not plain memory otherwise, and those that have lost it. None instead of the
    arguments if they are plain as they are, and no class of theirs changes what torch's functions do."""
    changed: dict[str, Any] = {}
    ranges: Ranges = {}
    for name, x in call.items():
        if not isinstance(x, torch.Tensor):
            continue
        kind = type(x)
        if kind is not torch.Tensor:
            if kind.__torch_function__ is not _no_torch_function and torch._C._is_torch_function_enabled():
                with torch._C.DisableTorchFunctionSubclass():
                    taken, ranges = plain(call, written)
                return taken or call, ranges
            while type(x).__torch_dispatch__ is not _no_torch_dispatch:
                x = _unwrapped(name, x)
        if x.is_nested:
            raise TypeError(f"{name} is a nested tensor: must be a tensor of one shape, cu_seqlens says what is inside")
        if x.is_neg():  # its memory has the other sign
            if name in written:
                raise TypeError(f"{name} is a view with another sign than its memory: must be plain memory")
            x = x.resolve_neg()
        try:
            ranges[name] = _range(name, x)
        except Exception:
            _refuse_but_for_torch(name, x)
        if x is not call[name]:
            changed[name] = x
            if name in written:
                increment_version((call[name],))  # a wrapper has a counter of its own
    if not changed:
        return None, ranges
    for name in STATES[1:]:
        for first in STATES[: STATES.index(name)]:
            if name in changed and call[name] is call.get(first):
                changed[name] = changed[first]
    return {**call, **changed}, ranges


def empty_like_for(v: Any) -> Any:
    """torch.empty_like for tensors such as v, if it makes plain tensors, else one that does."""
    kind = type(v)
    return torch.empty_like if kind is torch.Tensor or kind.__torch_function__ is _no_torch_function else _empty_like


def check_written(call: Mapping[str, Any], ranges: Ranges, written: Iterable[str] = WRITTEN) -> None:
    """That torch lets what is written be written, and that it shares no memory with another argument."""
    for name in written:
        x = call.get(name)
        if x is None:
            continue
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} is an inference tensor: must not be written outside of inference mode, its clone() may be"
            )
        if x.requires_grad and torch.is_grad_enabled():
            must = "must not be written while autograd records, torch.no_grad() allows it"
            if x.is_leaf:
                raise RuntimeError(f"{name} is a leaf that requires grad: {must}")
            raise NotImplementedError(f"{name} requires grad, and autograd cannot follow what is written: {must}")
        if name not in ranges:  # inside a transform
            continue
        if _overlaps_itself(x):
            raise ValueError(f"{name} has strides {x.stride()}: must have an address for each element")
        begin, end = ranges[name]
        for other, (other_begin, other_end) in ranges.items():
            if other_begin < end and begin < other_end and other != name and _share(name, x, other, call[other]):
                raise ValueError(f"{name} shares memory with {other}: must not, for it is written")


def check_memory(call: Mapping[str, torch.Tensor | None]) -> None:
    """`check_written` of plain tensors, and that all have their memory."""
    check_written(call, {name: _range(name, x) for name, x in call.items() if x is not None})


# ---- the pieces


_no_torch_dispatch = torch._C._disabled_torch_dispatch_impl
_no_torch_function = torch._C._disabled_torch_function_impl


def _empty_like(v: torch.Tensor, *, memory_format: torch.memory_format) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_like(v, memory_format=memory_format)


def _refuse_but_for_torch(name: str, x: torch.Tensor) -> None:
    """Called where an error about the memory of x is handled, which goes on if there is nothing better to say."""
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}: must be torch.strided") from None
    if torch._is_functional_tensor(x):
        raise TypeError(f"{name} is a functional tensor: must be a tensor with memory of its own") from None
    if not torch._C._functorch.is_functorch_wrapped_tensor(x):  # those `dispatch.run` looks at itself
        raise


def _unwrapped(name: str, x: Any) -> torch.Tensor:
    """What is inside a DTensor or a collective's result. Their classes by name: importing them takes a second."""
    kinds = [kind.__name__ for kind in type(x).__mro__ if kind.__module__.startswith("torch.distributed.")]
    if "DTensor" in kinds:
        if all(
            size == 1 or placement.is_replicate()
            for size, placement in zip(x.device_mesh.shape, x.placements, strict=True)
        ):
            return x.to_local()
        raise TypeError(
            f"{name} is a DTensor with placements {tuple(x.placements)}: must be replicated, or a plain tensor such as "
            f"its to_local() or full_tensor()"
        )
    if "AsyncCollectiveTensor" in kinds:  # clone() waits as well, and autograd knows it
        return x.clone() if x.requires_grad and torch.is_grad_enabled() else x.trigger_wait()
    raise TypeError(f"{name} is a {type(x).__name__}: must be a tensor with memory of its own")


def _range(name: str, x: torch.Tensor) -> tuple[int, int]:
    """From the first to the last byte of x, all of which its storage has; (0, 0) if there are none."""
    span = x.nbytes
    if not span:
        return 0, 0
    if not x.is_contiguous():
        span = x.itemsize * (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)))
    storage, begin = x.untyped_storage(), x.data_ptr()
    start, size = storage.data_ptr(), storage.nbytes()
    if start and begin + span <= start + size:
        return begin, begin + span
    if x.is_meta:
        return 0, 0
    need, size = x.storage_offset() * x.itemsize + span, size if start else 0
    raise ValueError(
        f"{name} has a storage of {size} bytes: must be {need} at least; FSDP frees that of a parameter whose module "
        f"is not running"
    )


def _share(name: str, x: torch.Tensor, other: str, y: torch.Tensor) -> bool:
    """Of two tensors whose ranges of addresses meet: whether they share what one of them must have for itself."""
    if name in STATES and other in STATES and x.data_ptr() == y.data_ptr():
        return not (x.dtype == y.dtype and x.stride() == y.stride())  # else it is one pool
    return _meet(x, y)


def _overlaps_itself(x: torch.Tensor) -> bool:
    if x.is_contiguous():
        return False
    span = 1
    for step, n in sorted((step, n) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1):
        if step < span:
            return True
        span += step * (n - 1)
    return False


def _meet(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a byte belongs to both. From the first byte of x to the last one of y it is then so many strides of x,
    and, with the indices of y counted from their ends, so many of y: a sum to be found."""
    most = {1: x.itemsize + y.itemsize - 2}
    for z in (x, y):
        for n, step in zip(z.shape, z.stride(), strict=True):
            if n > 1 and step:
                most[step * z.itemsize] = most.get(step * z.itemsize, 0) + n - 1
    left = SEARCH_MAX

    def reaches(way: int, steps: list[tuple[int, int]]) -> bool:
        nonlocal left
        if not steps:
            return way == 0
        (step, times), rest = steps[0], steps[1:]
        room = sum(a * b for a, b in rest)
        for n in range(max(0, -((room - way) // step)), min(times, way // step) + 1):
            left -= 1
            if left < 0 or reaches(way - n * step, rest):
                return True
        return False

    end = y.data_ptr() + y.itemsize * (1 + sum((n - 1) * step for n, step in zip(y.shape, y.stride(), strict=True)))
    return reaches(end - 1 - x.data_ptr(), sorted(most.items(), reverse=True))
