"""fused_decode_kda on a Hopper GPU against its parts in fp64 on the same GPU. Needs one; `pytest -m gpu`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from kda_cute import fused_decode_kda
from kda_cute.backends import fused_hopper
from tests.fused_cases import FusedCase, cases, check, make
from tests.gpu.oracle import relative_error
from tests.gpu.test_kda_gpu import DEVICE

pytestmark = pytest.mark.gpu
# Arithmetic is fp32; o is rounded to bf16, a state perhaps too: 1.7e-3 both, of a single head by chance a little more.
AT_MOST = 3e-3


@settings(settings.get_profile(os.environ.get("KDA_CUTE_GPU_PROFILE", "gpu")))
@given(case=cases())
def test_call(case: FusedCase) -> None:
    check(make(case, DEVICE), fused_decode_kda)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate", ["safe", "softplus"])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_every_kernel(conv: bool, norm: bool, gate: str, group: int) -> None:
    """More blocks than are on the GPU at a time."""
    case = FusedCase(11, N=150, H=4, group=group, conv=conv, norm=norm, gate=gate, nulls=True)
    check(make(case, DEVICE), fused_decode_kda)


@pytest.mark.parametrize("g_dtype, dtype", [("fp32", "bf16"), ("fp16", "fp16"), ("fp32", "fp16")])
def test_other_dtypes(g_dtype: str, dtype: str) -> None:
    case = FusedCase(12, N=5, H=2, dtype=dtype, g_dtype=g_dtype, weight_dtype=dtype, indices="int64", separate=True)
    check(make(case, DEVICE), fused_decode_kda)


def test_pool_past_2_31_elements() -> None:
    case = FusedCase(13, N=3, H=32, pitch=64)
    inputs = make(case, DEVICE)
    kwargs, slot = inputs.kwargs, 32 * 128 * 128 + 16
    P = (1 << 31) // slot + 4
    memory = torch.zeros(P * slot, device=DEVICE)
    pool = memory.as_strided((P, 32, 128, 128), (slot, 128 * 128, 128, 1))
    indices = kwargs["state_indices"]
    pool[P - 6 :] = kwargs["initial_state"]
    big = {**kwargs, "initial_state": pool, "state_indices": indices + P - 6, "conv_state_indices": indices,
           "conv_state": kwargs["conv_state"].clone()}  # fmt: skip
    o, _ = fused_decode_kda(**big)
    want, S = fused_decode_kda(**kwargs)
    assert torch.equal(o, want) and torch.equal(pool[P - 6 :], S)
    assert not pool[: P - 6].any()


def test_past_2_16_sequences() -> None:
    """More than a column of the grid has. They share what they read, and have a state each, as small as it gets."""
    N, kwargs = 65537, make(FusedCase(14, N=2, conv=False), DEVICE).kwargs
    few = {name: x for name, x in kwargs.items() if name not in ("state_indices", "initial_state")}
    rows = ("mixed_qkv", "g", "beta", "output_gate")
    many = {name: x[:1].expand(N, *x.shape[1:]) if name in rows else x for name, x in few.items()}
    pool = kwargs["initial_state"][:1].to(torch.bfloat16).repeat(N, 1, 1, 1)
    o, _ = fused_decode_kda(**many, initial_state=pool)
    assert (o == o[0]).all() and (pool == pool[0]).all()
    one = {name: x[:1] if name in rows else x for name, x in few.items()}
    state = kwargs["initial_state"][:1].to(torch.bfloat16).contiguous()
    want, _ = fused_decode_kda(**one, initial_state=state)
    assert torch.equal(o[:1], want) and torch.equal(pool[:1], state)


def test_a_block_in_another_blocks_data_does_not_matter() -> None:
    """The same bits, whatever else is in the batch."""
    kwargs = make(FusedCase(15, N=64, H=3, group=2), DEVICE).kwargs
    state, kept = kwargs["initial_state"].clone(), kwargs["conv_state"].clone()
    o, _ = fused_decode_kda(**kwargs)
    rows = ("mixed_qkv", "g", "beta", "output_gate", "state_indices")
    for n in (0, 17, 63):
        one = {name: x[n : n + 1] if name in rows else x for name, x in kwargs.items()}
        one.update(initial_state=state.clone(), conv_state=kept.clone())
        alone, _ = fused_decode_kda(**one)
        slot = int(kwargs["state_indices"][n])
        assert torch.equal(alone[0], o[n])
        assert torch.equal(one["initial_state"][slot], kwargs["initial_state"][slot])
        assert torch.equal(one["conv_state"][slot], kwargs["conv_state"][slot])


def test_tokens_one_after_the_other() -> None:
    """200 of them: a race between blocks of a cluster would show in some."""
    inputs = make(FusedCase(16, N=33, H=6), DEVICE)
    kwargs = inputs.kwargs
    on_reference = {**kwargs, **{name: kwargs[name].clone() for name in ("initial_state", "conv_state")}}
    for t in range(200):
        kwargs["mixed_qkv"].normal_(generator=torch.Generator(DEVICE).manual_seed(t))
        o, S = fused_decode_kda(**kwargs)
        want, S_want = fused_decode_kda(**on_reference, backend="reference")
        assert torch.equal(kwargs["conv_state"], on_reference["conv_state"])
        assert relative_error(o, want) <= AT_MOST and relative_error(S, S_want) <= AT_MOST, t


@pytest.mark.parametrize("pdl", [False, True])
def test_graph_replays_with_other_inputs(pdl: bool) -> None:
    """Two launches behind one another, the second one with what the first one wrote."""
    case = FusedCase(17, N=8, H=4, pdl=pdl)
    call, other = make(case, DEVICE), make(replace(case, seed=18), DEVICE)
    kwargs = call.kwargs

    def both(kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return [fused_decode_kda(**kwargs)[0] for _ in range(2)]

    both(kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = both(kwargs)
    for name, guard in other.guards.items():
        call.guards[name].tensor.copy_(guard.tensor)
    graph.replay()
    want = both({**other.kwargs, "use_pdl": False})
    assert all(torch.equal(x, y) for x, y in zip(o, want, strict=True))
    for name in ("initial_state", "conv_state"):
        assert torch.equal(kwargs[name], other.kwargs[name])


def test_host_remembers_a_call() -> None:
    kwargs = make(FusedCase(19, N=4, H=2), DEVICE).kwargs
    fused_hopper.known.clear()
    first, _ = fused_decode_kda(**kwargs)
    assert len(fused_hopper.known) == 1
    for _ in range(3):
        fused_decode_kda(**kwargs)
    assert len(fused_hopper.known) == 1
    with pytest.raises(ValueError, match="num_heads is 3"):
        fused_decode_kda(**{**kwargs, "num_heads": 3})


def test_what_the_kernel_does_not_have() -> None:
    for name, case in (("g has K = 64", FusedCase(20, K=64)), ("initial_state has V = 64", FusedCase(20, V=64))):
        with pytest.raises(NotImplementedError, match=name):
            fused_decode_kda(**make(case, DEVICE).kwargs)
