"""Tensors that are not what they seem: in wrappers, without their memory, with memory of others, not to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kda_cute import chunk_kda, fused_recurrent_kda, known_calls, memory, replay_shape
from kda_cute.backends import hopper
from tests.strategies import Case, make
from tests.test_contract import arguments, bf16, fp32, on_gpu, zeros
from tests.test_known_calls import FIXED, PACKED, address, full, launches, make_known  # noqa: F401
from tests.wrapped import ARGUMENTS, KINDS, Logging, Replicate, arriving, check, distributed, processes

B, T, H, D = 1, 20, 2, 128


@pytest.fixture(scope="module", autouse=True)
def two_processes() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower, for tensors of this size
    yield from processes()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_every_argument_in_every_wrapper(name: str, argument: str, kind: str) -> None:
    check(name, argument, kind, "cpu")


# ---- the same with a kernel that takes addresses


GIVEN = ["k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "final_state", "cu_seqlens", "out"]


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GIVEN)
def test_addresses(name: str, kind: str, known: bool, launches: list[Any]) -> None:  # noqa: F811
    """The kernel gets that of the memory inside, never a null or a bad one, also where it was called like that."""
    kwargs = full(PACKED)
    if known:
        make_known(kwargs, launches)
    wrap, error, message = KINDS[kind]
    if kind == "negated" and name in memory.WRITTEN:
        error, message = TypeError, "^{} is a view with another sign"
    wrapped = {**kwargs, name: wrap(kwargs[name])}
    if error is not None:
        for _ in range(3):
            with pytest.raises(error, match=message.format(name)):
                chunk_kda(**wrapped)
        assert not launches
        return
    o, S = chunk_kda(**wrapped)
    assert len(launches) == 1
    assert type(o) in (torch.Tensor, Logging, torch.nn.Parameter) and o.data_ptr() == kwargs["out"].data_ptr()
    assert S.data_ptr() == kwargs["final_state"].data_ptr()
    if kind == "negated":
        assert address(launches[0], name) not in (0, kwargs[name].data_ptr())
    else:
        assert address(launches[0], name) == kwargs[name].data_ptr()


@pytest.mark.parametrize("of", ["Parameter", "Logging"])
def test_classes_that_are_memory_stay_known(of: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    kwargs = {**full(FIXED), "out": None}
    for name in ("v", "A_log", "initial_state"):
        x = kwargs[name]
        kwargs[name] = torch.nn.Parameter(x, requires_grad=False) if of == "Parameter" else x.as_subclass(Logging)
    make_known(kwargs, launches)
    monkeypatch.setattr(memory, "plain", lambda call: pytest.fail("the call is not known"))
    for _ in range(3):
        o, _ = chunk_kda(**kwargs)
        assert type(o) is torch.Tensor
    assert len(launches) == 3


def test_addresses_that_are_remembered_are_bounded(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(hopper, "RIGHT_MAX", 3)
    monkeypatch.setattr(hopper, "right", set())
    kwargs = full(FIXED)
    make_known(kwargs, launches)
    others = [zeros(B, T, H, D) for _ in range(10)]
    for out in others:
        chunk_kda(**{**kwargs, "out": out})
        assert 1 <= len(hopper.right) <= 3
    assert len(launches) == 10


def test_pool_of_no_states(launches: list[Any]) -> None:  # noqa: F811
    """Has no address, and no sequence a state in it."""
    kwargs = full(PACKED, state_indices=torch.full((2,), -1, dtype=torch.int32))
    kwargs["initial_state"] = kwargs["final_state"] = zeros(0, H, D, D, dtype=fp32)
    for _ in range(4):
        chunk_kda(**kwargs)
    assert len(launches) == 4 and all(address(x, "initial_state") == address(x, "final_state") == 0 for x in launches)


# ---- gradients come through


@pytest.mark.parametrize("wrap", [lambda x: distributed(x, Replicate()), arriving], ids=["DTensor", "arriving"])
@pytest.mark.parametrize("name", ["v", "A_log"])
def test_gradient_of_what_is_inside(name: str, wrap: Callable[[torch.Tensor], torch.Tensor]) -> None:
    call = make(Case(1, (T,), H=H)).kwargs
    x = call[name].clone().requires_grad_()
    (want,) = torch.autograd.grad(chunk_kda(**{**call, name: x})[0].float().square().sum(), x)
    y = wrap(call[name]).requires_grad_()
    o, _ = chunk_kda(**{**call, name: y})
    assert type(o) is torch.Tensor
    (got,) = torch.autograd.grad(o.float().square().sum(), y)
    assert torch.equal(got.to_local() if hasattr(got, "to_local") else got, want)


def test_transform_of_the_reference() -> None:
    call = make(Case(1, (T,), H=H)).kwargs
    v = torch.stack([call["v"], -call["v"]])
    got = torch.func.vmap(lambda v: chunk_kda(**{**call, "v": v})[0])(v)
    assert torch.equal(got[0], chunk_kda(**call)[0])


# ---- what is written


def writing(
    device: str, states: torch.dtype = fp32, name: str = "", **changes: Any
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A call that writes all that a call can, `name` among it, to the reference or to a kernel, and its function."""
    kwargs = full(PACKED) if device == "kernel" else arguments(PACKED, out=zeros(B, T, H, D))
    kwargs["final_state"] = zeros(2, H, D, D, dtype=states)
    if name == "checkpoint_state":
        kwargs.update(checkpoint_state=zeros(2, H, D, D, dtype=states), checkpoint_offsets=torch.tensor([3, 2]))
        return {**kwargs, **changes}, chunk_kda
    kwargs.pop("safe_gate")
    kwargs["token_states"] = zeros(B, T, H, D, D, dtype=states)
    kwargs["replay"] = zeros(*replay_shape(2, T, H, D, D), dtype=fp32)
    return {**kwargs, **changes}, fused_recurrent_kda


both = pytest.mark.parametrize("device", ["reference", "kernel"])


@both
@pytest.mark.parametrize("states", [fp32, bf16])
@pytest.mark.parametrize("names", [("out",), ("final_state",), ("token_states",), memory.WRITTEN[:4]], ids=" ".join)
def test_versions_move(names: tuple[str, ...], states: torch.dtype, device: str, launches: list[Any]) -> None:  # noqa: F811
    """As autograd has it: what is written has another version after it, in each call, and nothing else has."""
    kwargs, function = writing(device, states)
    kwargs = {name: x for name, x in kwargs.items() if name not in memory.WRITTEN or name in names}
    for _ in range(4):
        before = {name: x._version for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
        function(**kwargs)
        for name, version in before.items():
            assert (kwargs[name]._version > version) == (name in names), name


@both
def test_version_of_a_pool_moves(device: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs, function = writing(device, state_indices=torch.tensor([4, 0], dtype=torch.int32))
    del kwargs["replay"]
    del kwargs["final_state"]
    kwargs["initial_state"] = pool = zeros(5, H, D, D, dtype=fp32)
    for _ in range(4):
        before = pool._version
        function(**kwargs)
        assert pool._version > before


@both
def test_version_of_a_wrapper_moves(device: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs, function = writing(device)
    kwargs["out"] = out = distributed(kwargs["out"], Replicate())
    for _ in range(4):
        before = out._version, out.to_local()._version
        with torch.no_grad():
            function(**kwargs)
            assert out._version > before[0] and out.to_local()._version > before[1]


@both
def test_gradient_of_a_buffer_that_is_used_again(device: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs, function = writing(device)
    for _ in range(4):
        function(**kwargs)
        weight = torch.ones(D, requires_grad=True)
        y = (kwargs["out"] * weight).sum()
        function(**kwargs)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@both
@pytest.mark.parametrize("name", memory.WRITTEN)
def test_inference_tensor(name: str, device: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs, function = writing(device, name=name)
    with torch.inference_mode():
        made_there = {**kwargs, name: kwargs[name].clone()}
        for _ in range(4):
            function(**made_there)
            function(**kwargs)
    launches.clear()
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(RuntimeError, match=f"^{name} is an inference tensor: must not be written"):
            function(**made_there)
    assert not launches
    for _ in range(4):
        function(**kwargs)
        with pytest.raises(RuntimeError, match=f"^{name} is an inference tensor: must not be written"):
            function(**made_there)


@both
@pytest.mark.parametrize("name", memory.WRITTEN)
def test_written_tensor_that_requires_grad(name: str, device: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs, function = writing(device, name=name)
    leaf = kwargs[name].requires_grad_()
    for x, error in ((leaf, f"{name} is a leaf that requires grad"), (leaf.clone(), f"{name} requires grad, and")):
        with torch.no_grad():
            for _ in range(3):
                function(**{**kwargs, name: x})
        launches.clear()
        before = x.detach().clone()
        with pytest.raises(RuntimeError, match=f"^{error}.*torch.no_grad"):
            function(**{**kwargs, name: x})
        assert not launches and torch.equal(x, before)


# ---- memory of two


def over(*tensors: torch.Tensor, shift: int = 0) -> list[torch.Tensor]:
    """Copies that all begin at one address, each `shift` bytes, or a multiple, after the one before."""
    flat = torch.zeros(max(x.nbytes for x in tensors) + shift * len(tensors), dtype=torch.uint8)
    return [flat[i * shift :][: x.nbytes].view(x.dtype).view(x.shape) for i, x in enumerate(tensors)]


def both_of(kwargs: dict[str, Any], *names: str, shift: int = 0) -> dict[str, Any]:
    return dict(zip(names, over(*(kwargs[name] for name in names), shift=shift), strict=True))


READ = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias")
SHARED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    **{
        f"{name} with {other}": (lambda a, x=name, y=other: both_of(a, y, x), f"^{name} shares memory with {other}:")
        for name in memory.WRITTEN for other in READ if not {name, other} <= {*memory.STATES}
    },
    "out is v": (lambda a: dict(out=a["v"]), "^out shares memory with v"),
    "out with the last row of k": (
        lambda a: both_of(a, "k", "out", shift=a["k"].nbytes - 2 * D), "^out shares memory with k"
    ),
    "out with final_state": (lambda a: both_of(a, "out", "final_state"), "^out shares memory with final_state"),
    "states one further": (
        lambda a: both_of(a, "initial_state", "final_state", shift=4 * H * D * D),
        "^final_state shares memory with initial_state",
    ),
    "states of another type": (
        lambda a: both_of({**a, "final_state": a["final_state"].bfloat16()}, "initial_state", "final_state"),
        "^final_state shares memory with initial_state",
    ),
    "out of one token": (lambda a: dict(out=zeros(1, 1, H, D).expand(1, T, H, D)), "^out has strides .*an address for"),
    "out with rows that meet": (
        lambda a: dict(out=zeros(T * H * D).as_strided((1, T, H, D), (T * H * D // 2, H * D // 2, D // 2, 1))),
        "^out has strides .*an address for",
    ),
}  # fmt: skip


@both
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("change, message", SHARED.values(), ids=SHARED)
def test_shared_memory(change: Any, message: str, known: bool, device: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs, function = writing(device, name="checkpoint_state" * ("checkpoint_state" in message))
    changed = change(kwargs)
    if "q" in changed and device == "kernel":
        changed = on_gpu(changed)
    if known:
        apart = {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for name, x in changed.items()}
        for name, x in changed.items():  # the same call, had it not been for the addresses
            apart[name] = x if "address for" in message else apart[name].copy_(x).as_subclass(type(x))
        if "address for" not in message:
            for _ in range(3):
                function(**{**kwargs, **apart})
            assert device == "reference" or any(known_calls.known.values())
    launches.clear()
    for _ in range(3):
        with pytest.raises(ValueError, match=message):
            function(**{**kwargs, **changed})
    assert not launches


def packed(parts: int, dim: int) -> list[torch.Tensor]:
    return list(torch.randn(B, T, H, D).repeat_interleave(parts, dim).to(bf16).chunk(parts, dim))


APART: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "heads of a projection": lambda a: dict(zip(("q", "k", "v", "out"), packed(4, 2), strict=True)),
    "channels of a projection": lambda a: dict(zip(("q", "k", "v", "out"), packed(4, 3), strict=True)),
    "tokens of a buffer": lambda a: dict(zip(("q", "k", "v", "out"), packed(4, 1), strict=True)),
    "every other head": lambda a: dict(zip(("v", "out"), zeros(B, T, H, 2, D).unbind(3), strict=True)),
    "inputs are one": lambda a: dict(q=a["k"], v=a["k"]),
    "states are one": lambda a: dict(final_state=a["initial_state"]),
    "states are two views of one": lambda a: dict(final_state=a["initial_state"][:]),
    "next to each other": lambda a: both_of(a, "v", "out", shift=a["v"].nbytes),
}


@both
@pytest.mark.parametrize("change", APART.values(), ids=APART)
def test_memory_apart(change: Any, device: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Not refused, and the same numbers as with copies; by a kernel in a known call too."""
    kwargs, function = writing(device)
    changed = change(kwargs)
    if device == "kernel":
        if "q" in changed:
            changed = on_gpu(changed)
        for _ in range(4):
            function(**{**kwargs, **changed})
        assert len(launches) == 4
        return
    copies = {name: x.clone() for name, x in {**kwargs, **changed}.items() if isinstance(x, torch.Tensor)}
    want = function(**{**kwargs, **copies})
    for x, y in zip(function(**{**kwargs, **changed}), want, strict=True):
        assert torch.equal(x, y)


@given(data=st.data())
def test_woven_tensors(data: st.DataObject) -> None:
    """Against a list of the bytes of each."""
    flat = torch.zeros(4096, dtype=torch.uint8)

    def some() -> tuple[torch.Tensor, list[int]]:
        dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.int32]))
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        strides = data.draw(st.lists(st.integers(0, 24), min_size=len(shape), max_size=len(shape)))
        offset = data.draw(st.integers(0, 40))
        x = flat.view(dtype).as_strided(shape, strides, offset)
        first = [offset + sum(i * s for i, s in zip(at, strides, strict=True)) for at in np.ndindex(*shape)]
        return x, [x.itemsize * i + byte for i in first for byte in range(x.itemsize)]

    (x, of_x), (y, of_y) = some(), some()
    assert memory._meet(x, y) == bool(set(of_x) & set(of_y))
    if len(set(of_x)) < len(of_x):
        assert memory._overlaps_itself(x)


def test_strides_that_give_each_element_its_address() -> None:
    for x in (zeros(2, 3, 4, 5), zeros(2, 3, 4, 5).permute(2, 0, 3, 1), zeros(2, 3, 4, 10)[..., ::2], zeros(1, 3).T):
        assert not memory._overlaps_itself(x)
