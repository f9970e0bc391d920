"""chunk_kda as an operator of torch: compiled, exported, differentiated, under modes. On the CPU, by the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from kda_cute import chunk_kda, chunk_kda_summary, fused_recurrent_kda, fwd
from kda_cute.call import ARGUMENTS, DIFFERENTIABLE
from kda_cute.reference import recurrence
from tests.strategies import Case, make

FIXED = Case(1, (9, 9), H=2, K=8, V=16, dtype="fp32", initial_state="fp32", final_state="new")
PACKED = Case(2, (7, 13), "int64", tail=3, H=1, group=2, K=16, V=8, dtype="fp32", gate="softplus", state_v_first=True)
LOG = Case(3, (20,), H=2, K=16, V=16, gate="log", decay="strong", beta_sigmoid=False, final_state="new")
NEG = replace(PACKED, gate="safe", neg_eigval=True, initial_state="bf16", final_state="new", dt_bias="heads")
CASES = {"fixed": FIXED, "packed": PACKED, "log": LOG, "neg_eigval": NEG}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


def operator_arguments(kwargs: dict[str, Any]) -> list[Any]:
    return [kwargs.get(name, -1 if name == "null_index" else None) for name in ARGUMENTS]


def with_leaves(kwargs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """All that can be differentiated as leaves of their own, in the dtype of each if none is given."""
    leaves = {
        name: kwargs[name].to(dtype or kwargs[name].dtype, copy=True).requires_grad_()
        for name in DIFFERENTIABLE
        if kwargs.get(name) is not None
    }
    return {**kwargs, **leaves}


def gradients(run: Any, kwargs: dict[str, Any], tokens: int) -> dict[str, torch.Tensor]:
    """Of a sum over all results, weighted so that no two of their elements count the same."""
    o, S = run(**kwargs)
    loss = torch.zeros((), dtype=torch.float64, device=o.device)
    for x, first in ((o[:, :tokens], -1), (S, 1)):
        if x is not None:
            weights = torch.linspace(first, -first, x.numel(), dtype=torch.float64, device=x.device)
            loss = loss + (x.double() * weights.view(x.shape)).sum()
    loss.backward()
    return {name: kwargs[name].grad for name in DIFFERENTIABLE if kwargs.get(name) is not None}


def operator(**kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    o, S = torch.ops.kda_cute.chunk_kda(*operator_arguments(kwargs))
    return o, S if kwargs["output_final_state"] else None


@cases
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_opcheck(case: Case, differentiated: bool) -> None:
    kwargs = make(case).kwargs
    torch.library.opcheck(
        torch.ops.kda_cute.chunk_kda.default, operator_arguments(with_leaves(kwargs) if differentiated else kwargs)
    )


@cases
def test_opcheck_of_the_others(case: Case) -> None:
    kwargs = make(case).kwargs
    arguments = operator_arguments(kwargs)
    out, state = torch.zeros_like(kwargs["v"]), torch.zeros(case.state_shape)
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda_out.default, [*arguments, out, state, None, None, None])
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda_out.default, [*arguments, out, None, None, None, None])
    wanted = [kwargs.get(name) is not None for name in DIFFERENTIABLE]
    for dht in (state, None):
        torch.library.opcheck(
            torch.ops.kda_cute.chunk_kda_backward.default, [torch.ones_like(out), dht, *arguments, wanted]
        )


@cases
def test_gradients_are_those_of_the_recurrence(case: Case) -> None:
    kwargs = make(case).kwargs
    exact = {**make(case).oracle_kwargs, "output_final_state": case.final_state == "new"}
    want = gradients(recurrence, with_leaves(exact, torch.float64), case.cuts[-1])
    got = gradients(operator, with_leaves(kwargs), case.cuts[-1])
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.dtype == kwargs[name].dtype and x.shape == kwargs[name].shape
        # the result is rounded to the dtype of the inputs and back; a gradient sums thousands of such roundings
        bound = 2e-2 if torch.bfloat16 in (x.dtype, kwargs["q"].dtype) else 2e-5
        assert (x - want[name]).norm() <= bound * want[name].norm(), name


def test_gradcheck() -> None:
    case = Case(
        4, (3, 2), "int32", H=1, K=3, V=2, dtype="fp64", g_dtype="fp64", initial_state="fp32", final_state="new"
    )
    kwargs = with_leaves(make(case).kwargs, torch.float64)
    names = [name for name in DIFFERENTIABLE if kwargs.get(name) is not None]

    def run(*leaves: torch.Tensor) -> Any:
        return operator(**{**kwargs, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(run, [kwargs[name] for name in names])


def test_gradients_only_of_what_needs_them() -> None:
    kwargs = make(FIXED).kwargs
    kwargs["v"] = kwargs["v"].clone().requires_grad_()
    o, _ = operator(**kwargs)
    (dv,) = torch.autograd.grad(o.sum(), kwargs["v"])
    assert dv.abs().sum() > 0
    with torch.no_grad():
        assert not operator(**kwargs)[0].requires_grad


@cases
def test_compiles_whole(case: Case) -> None:
    """One graph, no break, the results and gradients of the call as it is."""
    compiled = torch.compile(chunk_kda, backend="aot_eager", fullgraph=True)
    kwargs, covered = make(case).kwargs, case.cuts[-1]
    for x, want in zip(compiled(**kwargs), chunk_kda(**kwargs), strict=True):
        if want is None:
            assert x is None
        else:
            assert x.dtype == want.dtype and x.is_contiguous()
    torch.testing.assert_close(compiled(**kwargs)[0][:, :covered], chunk_kda(**kwargs)[0][:, :covered], rtol=0, atol=0)
    got = gradients(compiled, with_leaves(kwargs), covered)
    for name, want in gradients(chunk_kda, with_leaves(kwargs), covered).items():
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-5)


def test_one_compilation_for_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chunk_kda, backend=counter, fullgraph=True, dynamic=True)
    compiled(**make(NEG).kwargs)
    compilations = counter.frame_count
    assert compilations > 0
    for lengths in ((7, 13), (64, 1), (5, 100)):
        kwargs = make(replace(NEG, lengths=lengths, tail=0)).kwargs
        torch.testing.assert_close(compiled(**kwargs), chunk_kda(**kwargs))
    assert counter.frame_count == compilations


def test_the_other_functions_compile() -> None:
    case = Case(1, (7, 13), "int64", H=2, K=16, V=16, initial_state="fp32", state_v_first=True)
    x = make(case).kwargs
    names = ("k", "v", "g", "beta")
    flags = {name: x[name] for name in ("use_gate_in_kernel", "lower_bound", "A_log", "dt_bias", "cu_seqlens")}
    summary = torch.compile(chunk_kda_summary, backend="aot_eager", fullgraph=True)
    got = summary(*[x[name] for name in names], **flags)
    torch.testing.assert_close(got, chunk_kda_summary(*[x[name] for name in names], **flags))

    def flash(out: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        fwd(x["q"], x["k"], x["v"], x["g"], x["beta"], 0.25, out, x["A_log"], x["dt_bias"], -5.0, state, state,
            x["cu_seqlens"])  # fmt: skip
        return out + 1

    wrote = [torch.zeros_like(x["v"]), x["initial_state"].clone()]
    compiled_wrote = [y.clone() for y in wrote]
    compiled = torch.compile(flash, backend="aot_eager", fullgraph=True)(*compiled_wrote)
    torch.testing.assert_close(compiled, flash(*wrote), rtol=0, atol=0)
    torch.testing.assert_close(compiled_wrote, wrote, rtol=0, atol=0)
    assert not torch.equal(wrote[1], x["initial_state"])


def test_compiled_writes_what_it_is_given_and_no_more() -> None:
    """Tokens that no sequence has stay as they were; a state may be updated in place."""
    kwargs = make(PACKED).kwargs
    state = torch.randn(PACKED.state_shape)

    def call(out: torch.Tensor, state: torch.Tensor) -> Any:
        return chunk_kda(**kwargs, out=out, initial_state=state, final_state=state)

    wrote = [torch.full_like(kwargs["v"], 7), state.clone()]
    compiled_wrote = [x.clone() for x in wrote]
    call(*wrote)
    o, S = torch.compile(call, backend="aot_eager", fullgraph=True)(*compiled_wrote)
    assert o.data_ptr() == compiled_wrote[0].data_ptr() and S.data_ptr() == compiled_wrote[1].data_ptr()
    torch.testing.assert_close(compiled_wrote, wrote, rtol=0, atol=0)
    assert (wrote[0][:, PACKED.cuts[-1] :] == 0).all() and not torch.equal(wrote[1], state)


NUMBERS = {
    "item": lambda x: torch.tensor(x).item(),
    "numpy 32": np.float32,
    "numpy 64": np.float64,
    "int": lambda x: round(4 * x),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_compiled_numbers(number: Any) -> None:
    """scale and lower_bound of every kind that a call as it is takes."""
    kwargs = make(FIXED).kwargs

    def call(scale: Any, lower_bound: Any) -> Any:
        return chunk_kda(**{**kwargs, "scale": scale, "lower_bound": lower_bound})

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # the default of newer torch
        for scale, lower_bound in ((0.75, -0.75), (0.5, -1.25)):
            given = number(scale), number(lower_bound)
            torch.testing.assert_close(compiled(*given), call(*given), rtol=0, atol=0)


def test_compiled_scale_that_is_computed() -> None:
    """By .item() in the graph: one compilation for all values; the checks of eager calls, when it runs."""
    kwargs = make(FIXED).kwargs

    def call(scale: torch.Tensor, bound: torch.Tensor, states: bool = False) -> Any:
        given = {**kwargs, "scale": scale.item(), "lower_bound": bound.item()}
        if not states:
            return chunk_kda(**given)
        given.pop("safe_gate")
        with torch.no_grad():
            return fused_recurrent_kda(**given)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # the default of newer torch
        for states in (False, True):
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(call, backend=counter, fullgraph=True)
            for scale, bound in ((0.3, -5.0), (0.7, -2.0)):
                given = torch.tensor(scale), torch.tensor(bound), states
                torch.testing.assert_close(compiled(*given), call(*given), rtol=0, atol=0)
            assert counter.frame_count == 1
            with pytest.raises(Exception, match=r"lower_bound is -6.0: must be in \[-5, 0\)"):
                compiled(torch.tensor(0.3), torch.tensor(-6.0), states)


@pytest.mark.filterwarnings("ignore:transpose_state_layout is deprecated")
def test_compiled_with_the_old_name_of_state_v_first() -> None:
    kwargs = make(FIXED).kwargs
    kwargs["initial_state"] = kwargs["initial_state"].transpose(-1, -2).contiguous()
    kwargs.pop("state_v_first")
    for call in (chunk_kda, fused_recurrent_kda):
        given = kwargs if call is chunk_kda else {name: x for name, x in kwargs.items() if name != "safe_gate"}
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for old in (True, 1):
            got = compiled(**given, transpose_state_layout=old)
            torch.testing.assert_close(got, call(**given, state_v_first=True), rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_outputs_and_gradients_exclude_one_another(compiled: bool) -> None:
    kwargs = with_leaves(make(FIXED).kwargs)
    run = torch.compile(chunk_kda, backend="eager", fullgraph=True) if compiled else chunk_kda
    # torch 2.4's compiler keeps the message to itself
    with pytest.raises(Exception, match="out, final_state and state_indices must be None|Observed exception"):
        run(**kwargs, out=torch.zeros_like(kwargs["v"]))


def test_errors_of_compiled_calls_name_the_argument() -> None:
    kwargs = make(FIXED).kwargs
    kwargs["g"] = kwargs["g"][:, 1:]
    with pytest.raises(Exception, match=r"g has shape .*must be \[2, 9, 2, 8\]"):
        torch.compile(chunk_kda, backend="aot_eager", fullgraph=True)(**kwargs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled: bool) -> None:
    """fp32 q, k and v become bf16; what is fp32 inside stays fp32; gradients come back in fp32."""
    call = torch.compile(chunk_kda, backend="aot_eager", fullgraph=True) if compiled else chunk_kda
    kwargs = make(FIXED).kwargs
    lower = {name: kwargs[name].bfloat16() for name in "qkv"}

    def run(**kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(**kwargs)

    o, S = run(**kwargs)
    got = gradients(run, with_leaves(kwargs), 9)
    want_o, want_S = chunk_kda(**{**kwargs, **lower})
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    torch.testing.assert_close((o, S), (want_o, want_S), rtol=0, atol=0)
    want = gradients(chunk_kda, with_leaves({**kwargs, **lower}), 9)
    for name, x in got.items():
        assert x.dtype == kwargs[name].dtype
        torch.testing.assert_close(x, want[name].to(x.dtype), rtol=1e-5, atol=1e-5)


def test_inference_mode() -> None:
    kwargs = make(FIXED).kwargs
    with torch.inference_mode():
        got = torch.compile(chunk_kda, backend="aot_eager", fullgraph=True)(**kwargs)
        torch.testing.assert_close(chunk_kda(**kwargs), got, rtol=0, atol=0)


def test_fake_tensors() -> None:
    """Shapes and dtypes without numbers, on a GPU that need not be there."""
    with FakeTensorMode():
        q, k, v, g = (torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        beta = torch.empty(1, 4096, 8, device="cuda")
        o, S = chunk_kda(q, k, v, g, beta, output_final_state=True, safe_gate=True)
        assert o.shape == v.shape and o.dtype == torch.bfloat16 and o.device.type == "cuda"
        assert S.shape == (1, 8, 128, 128) and S.dtype == torch.float32
        with pytest.raises(ValueError, match="beta has shape"):
            chunk_kda(q, k, v, g, g)


def test_modes_see_one_operator() -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    kwargs = make(FIXED).kwargs
    with Names() as names:
        got = chunk_kda(**kwargs)
    assert names.seen == ["kda_cute.chunk_kda.default"]
    torch.testing.assert_close(got, chunk_kda(**kwargs), rtol=0, atol=0)

    q, k, v, g, beta = (kwargs[name] for name in ("q", "k", "v", "g", "beta"))
    graph = make_fx(lambda *x: chunk_kda(*x)[0])(q, k, v, -g.abs(), beta)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"][0] is torch.ops.kda_cute.chunk_kda.default


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
        ) -> Any:
            return chunk_kda(q, k, v, g, beta, safe_gate=True, output_final_state=True)

    x = make(LOG).kwargs
    arguments = tuple(x[name].contiguous() for name in ("q", "k", "v", "g", "beta"))
    exported = torch.export.export(Layer(), arguments).module()
    torch.testing.assert_close(exported(*arguments), Layer()(*arguments), rtol=0, atol=0)


def test_a_saved_program_needs_no_more_than_the_package(tmp_path: Path) -> None:
    """Its operators are there after `import kda_cute`, without cutlass."""

    class Layer(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
        ) -> Any:
            o, S = chunk_kda(q, k, v, g, beta, 0.5, safe_gate=True, output_final_state=True)
            if torch.__version__.startswith("2.4."):
                return o, S  # loads no operator that writes
            out, final = torch.empty_like(v), torch.empty_like(S)
            chunk_kda(q, k, v, g, beta, safe_gate=True, out=out, final_state=final)
            return o, S, out, final, fused_recurrent_kda(q, k, v, g, beta)[0]

    x = make(LOG).kwargs
    arguments = tuple(x[name].contiguous() for name in ("q", "k", "v", "g", "beta"))
    torch.export.save(torch.export.export(Layer(), arguments), tmp_path / "layer.pt2")
    torch.save((arguments, Layer()(*arguments)), tmp_path / "call.pt")
    program = """
import sys, torch, kda_cute
program = torch.export.load("layer.pt2").module()
arguments, want = torch.load("call.pt")
torch.testing.assert_close(program(*arguments), want)
assert not {"cutlass", "tvm_ffi"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
