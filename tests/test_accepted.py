"""What the checks accept, every function takes: all shapes and dtypes of the parameters. And torch's default dtypes and
devices, and tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kda_cute import chunk_kda, chunk_kda_summary, fused_recurrent_kda, fwd
from kda_cute.call import DIFFERENTIABLE
from tests.strategies import DTYPES, Case, make
from tests.test_library import nothing_compiled_before, operator_arguments  # noqa: F401

SAFE = Case(1, (40, 40), H=1, group=3, K=8, V=4, dtype="fp32", g_dtype="fp32", beta_dtype="fp32", initial_state="fp32",
            final_state="new")  # fmt: skip
PACKED = replace(SAFE, lengths=(33, 7), cu_seqlens="int32", tail=2, state_v_first=True)
SOFTPLUS = replace(PACKED, gate="softplus", cu_seqlens="int64")
cases = pytest.mark.parametrize("case", [SAFE, PACKED, SOFTPLUS], ids=["safe", "packed", "softplus"])


def _summary(**kwargs: Any) -> Any:
    return chunk_kda_summary(**_without(kwargs, "q", "scale", "initial_state", "output_final_state"))


def _fwd(**x: Any) -> Any:
    """With states from and into tensors of its own."""
    out, state = torch.zeros_like(x["v"]), x["initial_state"].transpose(-1, -2).contiguous()
    state = state if not x["state_v_first"] else x["initial_state"].clone()
    fwd(*(x[name] for name in ("q", "k", "v", "g", "beta")), 0.5, out, x["A_log"], x["dt_bias"], -4.0, state, state,
        x.get("cu_seqlens"))  # fmt: skip
    return out, state


def _out(**kwargs: Any) -> Any:
    out, state = torch.zeros_like(kwargs["v"]), torch.zeros_like(kwargs["initial_state"])
    torch.ops.kda_cute.chunk_kda_out(*operator_arguments(kwargs), out, state, None, None, None)
    return out, state


def _recurrent_out(**kwargs: Any) -> Any:
    out, state = torch.zeros_like(kwargs["v"]), torch.zeros_like(kwargs["initial_state"])
    torch.ops.kda_cute.fused_recurrent_kda_out(
        *operator_arguments({**kwargs, "safe_gate": False}), out, state, None, None, None, None
    )
    return out, state


def _pool(**x: Any) -> Any:
    """Sequences in a pool of states, of which one has none."""
    pool = torch.cat((x["initial_state"], x["initial_state"][:1]))
    indices = torch.tensor([2, -1], dtype=torch.int32, device=pool.device)
    return chunk_kda(**{**x, "initial_state": pool, "state_indices": indices})


def _without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in kwargs.items() if name not in names}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "chunk_kda": chunk_kda,
    "checkpoints": lambda **x: chunk_kda(**x, checkpoint_interval=32),
    "pool": _pool,
    "intermediate states": lambda **x: chunk_kda(**x, return_intermediate_states=True, chunk_size=32),
    "fused_recurrent_kda": lambda **x: fused_recurrent_kda(**_without(x, "safe_gate")),
    "token states": lambda **x: fused_recurrent_kda(**_without(x, "safe_gate"), output_token_states=True),
    "summary": _summary,
    "fwd": _fwd,
    "operator": lambda **x: torch.ops.kda_cute.chunk_kda(*operator_arguments(x)),
    "operator that writes": _out,
    "operator, recurrent": _recurrent_out,
}
functions = pytest.mark.parametrize("function", list(FUNCTIONS.values()), ids=list(FUNCTIONS))
FUNCTIONS["compiled"] = lambda **x: torch.compile(chunk_kda, backend="aot_eager", fullgraph=True)(**x)

A_LOG: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "[HV]": lambda x: x,
    "[1, 1, HV, 1]": lambda x: x.view(1, 1, -1, 1),
    "strided": lambda x: torch.stack((x, x), -1)[:, 0],
    "None": lambda x: None,
}
DT_BIAS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "[HV * K]": lambda x: x.flatten(),
    "[HV, K]": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "None": lambda x: None,
}


def parameters(case: Case, A_log: str, dt_bias: str, dtype: torch.dtype) -> dict[str, Any]:
    kwargs = make(case).kwargs
    for name, shaped in (("A_log", A_LOG[A_log]), ("dt_bias", DT_BIAS[dt_bias])):
        x = kwargs[name].view(case.HV, -1).squeeze(-1)
        kwargs[name] = shaped(x.bfloat16().to(dtype))  # numbers that each dtype has
    return kwargs


def tensors(results: Any) -> list[torch.Tensor]:
    return [x for x in results if isinstance(x, torch.Tensor)]


@functions
@cases
def test_shapes_of_the_parameters(function: Callable[..., Any], case: Case) -> None:
    for A_log in A_LOG:
        if A_log == "None" and (case is SOFTPLUS or function is _fwd):
            continue  # this gate needs one
        for dt_bias in DT_BIAS:
            plain = ["None" if x == "None" else y for x, y in ((A_log, "[HV]"), (dt_bias, "[HV, K]"))]
            want = tensors(function(**parameters(case, *plain, torch.float32)))
            got = tensors(function(**parameters(case, A_log, dt_bias, torch.float32)))
            assert len(got) == len(want) > 1
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x[:, :40], y[:, :40])


@functions
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_of_the_parameters(function: Callable[..., Any], dtype: torch.dtype) -> None:
    want = tensors(function(**parameters(SAFE, "[HV]", "[HV, K]", torch.float32)))
    got = tensors(function(**parameters(SAFE, "[1, 1, HV, 1]", "[HV * K]", dtype)))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@cases
@pytest.mark.parametrize("by", ["chunk_kda", "operator", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_of_the_parameters(case: Case, by: str, dtype: torch.dtype) -> None:
    """They have the shape and dtype of the parameter."""
    combined = [(x, y) for x in A_LOG for y in DT_BIAS if "None" not in (x, y)]
    if by == "compiled" or dtype != torch.float32:
        combined = [("[1, 1, HV, 1]", "[HV * K]")]
    want = gradients(by, parameters(case, "[HV]", "[HV, K]", torch.float64))
    for shapes in combined:
        for x, y in zip(gradients(by, parameters(case, *shapes, dtype)), want, strict=True):
            x, y = x.double().flatten(), y.flatten()
            assert (x - y).norm() <= (1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5) * y.norm()


def gradients(by: str, kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    inputs = [kwargs[name].requires_grad_() for name in ("A_log", "dt_bias")]
    o, S = FUNCTIONS[by](**kwargs)
    made = torch.autograd.grad(o[:, :40].square().sum() + S.square().sum(), inputs)
    for x, y in zip(made, inputs, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
    return made


# ---- defaults of torch that are not float32 and the CPU


@contextmanager
def default(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS: dict[str, dict[str, Any]] = {
    "float64": dict(dtype=torch.float64),
    "float16": dict(dtype=torch.float16),
    "bfloat16": dict(dtype=torch.bfloat16),
    "meta": dict(device="meta"),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("case", [PACKED, SOFTPLUS], ids=["packed", "softplus"])
@pytest.mark.parametrize("defaults", DEFAULTS.values(), ids=DEFAULTS)
def test_defaults_of_torch(function: Callable[..., Any], case: Case, defaults: dict[str, Any]) -> None:
    kwargs = make(case).kwargs
    want = tensors(function(**kwargs))
    with default(**defaults):
        got = tensors(function(**kwargs))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype and x.device == y.device
        torch.testing.assert_close(x[:, :40], y[:, :40])


@pytest.mark.parametrize("defaults", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("by", ["chunk_kda", "operator"])
def test_gradients_under_defaults_of_torch(by: str, defaults: dict[str, Any]) -> None:
    made = []
    for given in ({}, defaults):
        kwargs = make(PACKED).kwargs
        leaves = [kwargs[name].requires_grad_() for name in DIFFERENTIABLE]
        with default(**given):
            o, S = FUNCTIONS[by](**kwargs)
            made.append(torch.autograd.grad(o[:, :40].sum() + S.sum(), leaves))
    for x, y in zip(*made, strict=True):
        assert x.dtype == y.dtype and x.device == y.device
        torch.testing.assert_close(x, y)


# ---- tensors without memory


@pytest.mark.parametrize("case", [SAFE, PACKED, SOFTPLUS, replace(SAFE, dtype="fp64", g_dtype="fp64")],
                         ids=["safe", "packed", "softplus", "fp64"])  # fmt: skip
@pytest.mark.parametrize("name", ["chunk_kda", "checkpoints", "pool", "fused_recurrent_kda", "token states", "summary"])
def test_meta(case: Case, name: str) -> None:
    """The reference's results, as far as there is something to know."""
    kwargs = make(case).kwargs
    want = tensors(FUNCTIONS[name](**kwargs))
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    got = tensors(FUNCTIONS[name](**on_meta, backend="reference"))
    for x, y in zip(got, want, strict=True):
        assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")


def test_meta_with_gradients_and_under_a_default_device() -> None:
    with default(device="meta"):
        q, k, v, g = (torch.empty(2, 20, 3, 8, requires_grad=True) for _ in range(4))
        beta = torch.empty(2, 20, 3)
        o, S = chunk_kda(q, k, v, g, beta, output_final_state=True, backend="reference")
        assert o.shape == v.shape and S.shape == (2, 3, 8, 8) and o.is_meta
        made = torch.autograd.grad(o.sum(), [q, k, v, g])
        assert all(x.is_meta and x.shape == q.shape for x in made)


def test_meta_cannot_say_how_many_states_there_are() -> None:
    kwargs = make(PACKED).kwargs
    kwargs = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    with pytest.raises(NotImplementedError, match="cu_seqlens is on meta: .* cu_seqlens_cpu may have"):
        chunk_kda(**kwargs, backend="reference", return_intermediate_states=True)
    states = chunk_kda(
        **kwargs, backend="reference", return_intermediate_states=True, chunk_size=32,
        cu_seqlens_cpu=torch.tensor([0, 33, 40]),
    )[2]  # fmt: skip
    assert states.shape == (1, 3, 3, 4, 8)
