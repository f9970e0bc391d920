"""Tensors that are not what they seem, on a Hopper GPU, see test_tensors.py: no bad address reaches the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kda_cute import chunk_kda, fused_recurrent_kda, known_calls, memory
from tests.strategies import Case, make
from tests.wrapped import ARGUMENTS, KINDS, Replicate, arguments, check, distributed, freed, processes

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASE = Case(1, (70, 130), "int64", H=2, initial_state="fp32", state_v_first=True)


@pytest.fixture(scope="module", autouse=True)
def two_processes() -> Iterator[None]:
    yield from processes()


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_every_argument_in_every_wrapper(name: str, argument: str) -> None:
    """The same bits as without it, or an error that names the argument; the context lives after each."""
    for kind in KINDS:
        check(name, argument, kind, DEVICE)
        torch.cuda.synchronize()


def writing() -> dict[str, Any]:
    kwargs = make(CASE, DEVICE).kwargs
    kwargs["final_state"] = torch.zeros_like(kwargs["initial_state"])
    kwargs["out"] = torch.zeros_like(kwargs["v"])
    return kwargs


@pytest.mark.parametrize("name", ["A_log", "dt_bias", "initial_state", "final_state", "v", "out", "cu_seqlens"])
@pytest.mark.parametrize("offset", [0, 64])
def test_freed_after_good_calls(offset: int, name: str) -> None:
    kwargs = writing()
    for _ in range(3):
        chunk_kda(**kwargs)
    assert any(known_calls.known.values())
    with pytest.raises(ValueError, match=f"^{name} has a storage of 0 bytes"):
        chunk_kda(**{**kwargs, name: freed(kwargs[name], offset)})
    torch.cuda.synchronize()
    chunk_kda(**kwargs)


def test_freed_and_there_again() -> None:
    """As FSDP does it: the storage of a parameter comes and goes."""
    kwargs = writing()
    values = kwargs["A_log"].clone()
    want = chunk_kda(**kwargs)[0].clone()
    kwargs["A_log"] = A_log = values.clone()
    for _ in range(4):
        A_log.untyped_storage().resize_(values.nbytes)
        A_log.copy_(values)
        assert torch.equal(chunk_kda(**kwargs)[0], want)
        A_log.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="^A_log has a storage of 0 bytes"):
            chunk_kda(**kwargs)


@pytest.mark.parametrize("name", ["v", "A_log", "initial_state"])
def test_gradient_through_a_wrapper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kda_cute.gradients.fla", lambda: None)
    kwargs = make(CASE, DEVICE).kwargs

    def gradient(x: torch.Tensor) -> torch.Tensor:
        o, S = chunk_kda(**{**kwargs, name: x}, output_final_state=True)
        (found,) = torch.autograd.grad(o.float().square().sum() + S.square().sum(), x)
        return found

    kwargs.pop("output_final_state")
    want = gradient(kwargs[name].clone().requires_grad_())
    got = gradient(distributed(kwargs[name].clone(), Replicate()).requires_grad_())
    torch.testing.assert_close(got.to_local(), want)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", memory.WRITTEN)
def test_what_is_written(name: str) -> None:
    """Its version moves in each call, autograd notices that a buffer is used again, and what torch protects is kept."""
    function = chunk_kda if name == "checkpoint_state" else fused_recurrent_kda
    kwargs = arguments(function.__name__, DEVICE)
    for _ in range(4):
        before = kwargs[name]._version
        function(**kwargs)
        assert kwargs[name]._version > before
    weight = torch.ones(1, device=DEVICE, requires_grad=True)
    y = (kwargs[name] * weight).sum()
    function(**kwargs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()

    with torch.inference_mode():
        x = kwargs[name].clone()
        for _ in range(4):
            function(**{**kwargs, name: x})
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^{name} is an inference tensor"):
        function(**{**kwargs, name: x})
    leaf = kwargs[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"^{name} is a leaf that requires grad"):
        function(**{**kwargs, name: leaf})
    with torch.no_grad():
        function(**{**kwargs, name: leaf})


def test_memory_of_two() -> None:
    kwargs = writing()
    want = [x.clone() for x in chunk_kda(**kwargs)]
    for _ in range(2):
        chunk_kda(**kwargs)
    flat = torch.zeros(2 * kwargs["v"].numel(), dtype=kwargs["v"].dtype, device=DEVICE)
    v, out = flat[: kwargs["v"].numel()].view_as(kwargs["v"]), flat[-kwargs["v"].numel() :].view_as(kwargs["v"])
    v.copy_(kwargs["v"])
    for _ in range(3):
        assert all(map(torch.equal, chunk_kda(**{**kwargs, "v": v, "out": out}), want))
        with pytest.raises(ValueError, match="^out shares memory with v"):
            chunk_kda(**{**kwargs, "v": v, "out": flat[8 : 8 + v.numel()].view_as(v)})
    assert torch.equal(v, kwargs["v"])

    B, T, H, D = v.shape
    parts = torch.zeros(B, T, 4, H, D, dtype=v.dtype, device=DEVICE).unbind(2)
    for part, name in zip(parts, ("q", "k", "v"), strict=False):
        part.copy_(kwargs[name])
    woven = dict(zip(("q", "k", "v", "out"), parts, strict=True))
    for _ in range(4):
        assert all(map(torch.equal, chunk_kda(**{**kwargs, **woven}), want))

    states = torch.cat([kwargs["initial_state"], kwargs["initial_state"][:1]])
    with pytest.raises(ValueError, match="^final_state shares memory with initial_state"):
        chunk_kda(**{**kwargs, "initial_state": states[:-1], "final_state": states[1:]})
    for _ in range(3):
        same = kwargs["initial_state"].clone()
        got = chunk_kda(**{**kwargs, "initial_state": same, "final_state": same[:]})
        assert all(map(torch.equal, got, want))
