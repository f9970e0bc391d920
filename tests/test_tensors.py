"""Tensors that are not what they seem: in wrappers, without their memory, with memory of others, not to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kda_cute import chunk_kda, memory, ops, sm90
from tests.strategies import Case, make
from tests.test_contract import fp32, zeros
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
    monkeypatch.setattr(sm90, "RIGHT_MAX", 3)
    kwargs = full(FIXED)
    make_known(kwargs, launches)
    (_, _, launch, _, _) = next(iter(ops._known.values()))  # type: ignore[misc]
    (right,) = [x.cell_contents for x in launch.__closure__ if isinstance(x.cell_contents, set)]  # type: ignore
    keep = []
    for _ in range(10):
        keep.append(zeros(B, T, H, D))
        chunk_kda(**{**kwargs, "out": keep[-1]})
        assert 1 <= len(right) <= 3
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


def test_transforms_of_the_reference() -> None:
    call = make(Case(1, (T,), H=H)).kwargs
    v = torch.stack([call["v"], -call["v"]])
    got = torch.func.vmap(lambda v: chunk_kda(**{**call, "v": v})[0])(v)
    assert torch.equal(got[0], chunk_kda(**call)[0])
    x = call["v"].clone().requires_grad_()
    (want,) = torch.autograd.grad(chunk_kda(**{**call, "v": x})[0].float().sum(), x)
    assert torch.equal(torch.func.grad(lambda v: chunk_kda(**{**call, "v": v})[0].float().sum())(call["v"]), want)


def test_transforms_of_the_kernel(launches: list[Any]) -> None:  # noqa: F811
    kwargs = {**full(FIXED), "out": None}
    make_known(kwargs, launches)
    with pytest.raises(TypeError, match="^v is a tensor inside a transform of torch.func"):
        torch.func.vmap(lambda v: chunk_kda(**{**kwargs, "v": v})[0])(kwargs["v"][None])
    assert not launches
