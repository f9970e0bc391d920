"""Every tensor argument of every public function, in everything that torch has around a tensor; for any device.

What a wrapper must come to is in KINDS: the same numbers as without it, or an error that names the argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from kda_cute import chunk_kda, chunk_kda_summary, fused_recurrent_kda, fwd, replay_shape
from kda_cute.memory import WRITTEN
from tests.strategies import Case, make

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor, Partial, Replicate, Shard  # type: ignore[no-redef]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "chunk_kda": chunk_kda,
    "chunk_kda with checkpoints": lambda **kwargs: chunk_kda(**kwargs, checkpoint_interval=32),
    "fused_recurrent_kda": fused_recurrent_kda,
    "chunk_kda_summary": chunk_kda_summary,
    "fwd": fwd,
}
PUBLIC = {name: FUNCTIONS[name.removesuffix(" with checkpoints")] for name in FUNCTIONS}


def tensor_arguments(name: str) -> list[str]:
    parameters = inspect.signature(PUBLIC[name]).parameters.items()
    found = [argument for argument, x in parameters if "torch.Tensor" in str(x.annotation)]
    if name == "chunk_kda with checkpoints":  # one kind of them
        found = [argument for argument in found if not argument.startswith("checkpoint_")]
    return found


ARGUMENTS = [(name, argument) for name in FUNCTIONS for argument in tensor_arguments(name)]


def arguments(name: str, device: str) -> dict[str, Any]:
    """A call with every tensor argument that the function has."""
    pool = None if name == "fwd" else 3
    case = Case(1, (3, 2), "int64", tail=1, H=2, initial_state="fp32", state_v_first=True, pool=pool)
    call = make(case, device).kwargs
    call["final_state"] = torch.zeros_like(call["initial_state"])
    call["out"] = torch.zeros_like(call["v"])
    (_, T, HV, V), K, N = call["v"].shape, call["q"].shape[-1], case.N
    call["token_states"] = torch.zeros(N, T, HV, V, K, device=device)
    call["token_state_indices"] = torch.tensor([1, 0], device=device)
    call["replay"] = torch.full(replay_shape(N, T, HV, K, V), 0.1, device=device)
    call["num_accepted_tokens"] = torch.tensor([1, 2], device=device)
    call["has_initial_state"] = torch.tensor([False, True], device=device)
    call["checkpoint_offsets"] = torch.tensor([3, 1], device=device)
    call["checkpoint_state"] = torch.zeros(4, HV, V, K, device=device)
    call["checkpoint_indices"] = torch.tensor([2, 0], device=device)
    call["scale"] = 0.1
    parameters = inspect.signature(PUBLIC[name]).parameters
    if name == "chunk_kda with checkpoints":
        parameters = {x: None for x in parameters if not x.startswith("checkpoint_")}  # type: ignore[assignment]
    call = {argument: x for argument, x in call.items() if argument in parameters}
    assert set(tensor_arguments(name)) <= call.keys()
    return call


@functools.cache
def expected(name: str, device: str) -> list[torch.Tensor]:
    return results(name, arguments(name, device))


def results(name: str, call: dict[str, Any]) -> list[torch.Tensor]:
    """Copies of what comes back and of what was written to."""
    written = [call[x] for x in WRITTEN if x in call]
    with torch.no_grad():
        returned = [x for x in FUNCTIONS[name](**call) or () if x is not None]
    assert all(type(x) is torch.Tensor or any(x is y for y in written) for x in returned)
    return [numbers(x) for x in (*returned, *written)]


def numbers(x: Any) -> torch.Tensor:
    """A copy of what is inside of any wrapper."""
    if isinstance(x, DTensor):
        x = x.to_local()
    return x.clone().as_subclass(torch.Tensor)


def check(name: str, argument: str, kind: str, device: str) -> None:
    """That a call with this argument in a wrapper of that kind comes to what it must."""
    wrap, error, message = KINDS[kind]
    if kind == "negated" and argument in WRITTEN:
        error, message = TypeError, "^{} is a view with another sign"
    call = arguments(name, device)
    call[argument] = wrap(call[argument])
    if error is None:
        for got, want in zip(results(name, call), expected(name, device), strict=True):
            assert torch.equal(got, want)
        return
    with pytest.raises(error, match=message.format(argument)):
        results(name, call)


# ---- what torch has around a tensor


class Logging(torch.Tensor):
    """Goes through Python for each of torch's functions, and makes their results its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


class Elsewhere(torch.Tensor):
    """Has its numbers in another tensor, and no memory."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Elsewhere:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype, device=inside.device
        )
        self.inside = inside
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [x.inside if isinstance(x, Elsewhere) else x for x in args]
        return function(*args, **(kwargs or {}))


def processes() -> Iterator[None]:
    """Two processes of which one is there, and communicates with nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def distributed(x: torch.Tensor, *placements: Any) -> torch.Tensor:
    mesh = init_device_mesh(x.device.type, (2, 1)[: len(placements)])
    return DTensor.from_local(x, mesh, placements, run_check=False)


def arriving(x: torch.Tensor) -> torch.Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(x)


def freed(x: torch.Tensor, offset: int = 0) -> torch.Tensor:
    flat = torch.zeros(offset + x.numel(), dtype=x.dtype, device=x.device)
    view = flat[offset:].view(x.shape)
    flat.untyped_storage().resize_(0)
    return view


def cut_off(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


RIGHT = None
# by name: what makes it, and the error or RIGHT; {} is the name of the argument
KINDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], type[Exception] | None, str]] = {
    "a replicated DTensor": (lambda x: distributed(x, Replicate()), RIGHT, ""),
    "a DTensor sharded over one": (lambda x: distributed(x, Replicate(), Shard(0)), RIGHT, ""),
    "a replicated DTensor that arrives": (lambda x: distributed(arriving(x), Replicate()), RIGHT, ""),
    "an AsyncCollectiveTensor": (arriving, RIGHT, ""),
    "a class with __torch_function__": (lambda x: x.as_subclass(Logging), RIGHT, ""),
    "a Parameter": (lambda x: torch.nn.Parameter(x, requires_grad=False), RIGHT, ""),
    "a sharded DTensor": (lambda x: distributed(x, Shard(0)), TypeError, r"^{} is a DTensor with placements \(Shard"),
    "a partial DTensor": (lambda x: distributed(x, Partial()), TypeError, r"^{} is a DTensor with .* \(Partial"),
    "freed": (freed, ValueError, "^{} has a storage of 0 bytes: must be "),
    "freed, at an offset": (lambda x: freed(x, 64), ValueError, "^{} has a storage of 0 bytes: must be "),
    "cut off": (cut_off, ValueError, "^{} has a storage of .* bytes: must be "),
    "a FakeTensor": (FakeTensorMode().from_tensor, TypeError, "^{} is a FakeTensor: must be"),
    "a class with memory elsewhere": (Elsewhere, TypeError, "^{} is a Elsewhere: must be"),
    "meta": (lambda x: x.to("meta"), ValueError, "^{} is on meta: must be|must be on meta like q$"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "^{} has layout torch.sparse_coo: must be|^beta is sparse"),
    # true and false have no sign
    "negated": (lambda x: x if x.dtype is torch.bool else torch._neg_view(x.neg()), RIGHT, ""),
    "functional": (torch._to_functional_tensor, TypeError, "^{} is a functional tensor: must be"),
}  # fmt: skip
