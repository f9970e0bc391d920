"""torch.func, forward_ad, torch.jit.trace and second derivatives: the right value, or an error that says what to do."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from kda_cute import chunk_kda, chunk_kda_summary, fused_recurrent_kda, fwd
from kda_cute.call import DIFFERENTIABLE
from tests.strategies import Case, make
from tests.test_contract import arguments
from tests.test_known_calls import PACKED as SERVED
from tests.test_known_calls import checks, full, launches, make_known  # noqa: F401
from tests.test_library import nothing_compiled_before, operator, operator_arguments, with_leaves  # noqa: F401

FP64 = Case(1, (7, 13), "int64", tail=3, H=1, group=2, K=8, V=4, dtype="fp64", g_dtype="fp64", beta_dtype="fp32",
            initial_state="fp32", final_state="new")  # fmt: skip
SOFTPLUS = replace(FP64, gate="softplus", lengths=(9, 9), cu_seqlens=None, tail=0, dt_bias="heads", state_v_first=True)
LOG = replace(FP64, gate="log", beta_sigmoid=False)
cases = pytest.mark.parametrize("case", [FP64, SOFTPLUS, LOG], ids=["safe", "softplus", "log"])
FORWARD_MODE = 'no forward-mode derivative .*backend="reference" outside of torch.compile has one'
NOT_BY_OPERATOR = f"{FORWARD_MODE}|must override the setup_context"  # torch 2.4's error comes first
FUNC_GRAD = 'no gradient under torch.func .*backend="reference" outside of torch.compile has one'


def _reads_under_func() -> bool:
    try:
        torch.func.grad(lambda x: x.sum() * len(torch.zeros(1).tolist()))(torch.zeros(1))
    except RuntimeError:
        return False
    return True


# torch 2.4 cannot, and says so in an error of its own
reads_under_func = pytest.mark.skipif(not _reads_under_func(), reason="this torch has no tolist() under torch.func")


def floats(case: Case) -> tuple[list[str], list[torch.Tensor], dict[str, Any]]:
    """The names and values of what can be differentiated, in fp64, and the rest of the call."""
    kwargs = make(case).kwargs
    names = [name for name in DIFFERENTIABLE if name in kwargs]
    return names, [kwargs.pop(name).double() for name in names], kwargs


def function(
    case: Case, call: Callable[..., Any] = chunk_kda
) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """One number, of all results, as a function of those tensors."""
    names, primals, rest = floats(case)
    if call is fused_recurrent_kda:
        rest.pop("safe_gate")

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        o, S = call(**rest, **dict(zip(names, tensors, strict=True)))
        weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in (o, S)]
        return (o * weights[0]).sum() + (S * weights[1]).sum()

    return f, primals


def tangents(primals: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in primals]


def derivative(f: Callable[..., torch.Tensor], primals: list[torch.Tensor], along: list[torch.Tensor]) -> torch.Tensor:
    """By reverse mode, which has tests of its own."""
    leaves = [x.clone().requires_grad_() for x in primals]
    made = torch.autograd.grad(f(*leaves), leaves)
    return sum(((x * y).sum() for x, y in zip(made, along, strict=True)), torch.zeros((), dtype=torch.float64))


# ---- forward mode


@reads_under_func
@cases
@pytest.mark.parametrize("by", [chunk_kda, fused_recurrent_kda])
def test_forward_mode_of_the_reference(case: Case, by: Callable[..., Any]) -> None:
    f, primals = function(case, by)
    along = tangents(primals)
    want = derivative(function(case)[0], primals, along)
    value, got = torch.func.jvp(f, tuple(primals), tuple(along))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=0)
    torch.testing.assert_close(value, f(*primals), rtol=1e-12, atol=0)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, primals, along)))
        torch.testing.assert_close(dual.tangent, want, rtol=1e-8, atol=0)


def recurrent_operator(**kwargs: Any) -> Any:
    out, state = torch.zeros_like(kwargs["v"]), torch.zeros(FP64.state_shape)
    torch.ops.kda_cute.fused_recurrent_kda_out(
        *operator_arguments({**kwargs, "safe_gate": False}), out, state, *[None] * 4
    )
    return out, state


def writing_operator(**kwargs: Any) -> Any:
    out, state = torch.zeros_like(kwargs["v"]), torch.zeros(FP64.state_shape)
    torch.ops.kda_cute.chunk_kda_out(*operator_arguments(kwargs), out, state, None, None, None)
    return out, state


@pytest.mark.parametrize("by", [operator, writing_operator, recurrent_operator])
def test_operators_have_no_forward_mode(by: Callable[..., Any]) -> None:
    """Of none of their inputs, and as parts of other derivatives neither."""
    f, primals = function(FP64, by)
    along = tangents(primals)
    for i, (x, t) in enumerate(zip(primals, along, strict=True)):

        def of_one(y: torch.Tensor, i: int = i) -> torch.Tensor:
            return f(*primals[:i], y, *primals[i + 1 :])

        with pytest.raises((NotImplementedError, RuntimeError), match=NOT_BY_OPERATOR):
            torch.func.jvp(of_one, (x,), (t,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
            of_one(forward_ad.make_dual(x, t))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        f(*(forward_ad.make_dual(x.requires_grad_(), t) for x, t in zip(primals, along, strict=True)))


def test_gradients_of_the_operator_have_no_forward_mode() -> None:
    kwargs = with_leaves(make(FP64).kwargs)
    o, _ = operator(**kwargs)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.autograd.grad(o, kwargs["q"], forward_ad.make_dual(torch.ones_like(o), torch.ones_like(o)))


@pytest.mark.parametrize("by", [chunk_kda, fused_recurrent_kda])
@pytest.mark.parametrize("how", ["jvp in", "jvp around", "dual in", "dual around"])
def test_compiled_calls_have_no_forward_mode(by: Callable[..., Any], how: str) -> None:
    f, primals = function(FP64, by)
    x, t = primals[0], torch.ones_like(primals[0])

    def of_q(q: torch.Tensor) -> torch.Tensor:
        return f(q, *primals[1:])

    def compiled(g: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(g, backend="aot_eager", fullgraph=True)

    def by_dual(g: Callable[..., Any], x: torch.Tensor, t: torch.Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(g(forward_ad.make_dual(x, t))).tangent

    run: dict[str, Callable[[], Any]] = {
        "jvp in": lambda: compiled(lambda x, t: torch.func.jvp(of_q, (x,), (t,)))(x, t),
        "jvp around": lambda: torch.func.jvp(compiled(of_q), (x,), (t,))[1],
        "dual in": lambda: compiled(lambda x, t: by_dual(of_q, x, t))(x, t),
        "dual around": lambda: by_dual(compiled(of_q), x, t),
    }
    try:
        got = run[how]()
    except Exception as error:  # torch's own, of many types; that of torch 2.4 keeps ours to itself
        ours = "forward-mode derivative" if how != "jvp around" else "torch.func.jvp"
        assert ours in str(error) or torch.__version__.startswith("2.4."), error
    else:  # torch did not compile: the reference has one
        torch.testing.assert_close(got, torch.func.jvp(of_q, (x,), (t,))[1])


# ---- torch.func


@reads_under_func
@cases
def test_func_grad_of_the_reference(case: Case) -> None:
    f, primals = function(case)
    got = torch.func.grad(f, tuple(range(len(primals))))(*primals)
    leaves = [x.clone().requires_grad_() for x in primals]
    torch.testing.assert_close(got, torch.autograd.grad(f(*leaves), leaves), rtol=1e-9, atol=1e-12)


@cases
@pytest.mark.parametrize("by", [chunk_kda, fused_recurrent_kda])
def test_vmap_of_the_reference(case: Case, by: Callable[..., Any]) -> None:
    f, primals = function(case, by)
    stacked = [torch.stack([x, x / 2, -x]) for x in primals]
    got = torch.func.vmap(f)(*stacked)
    torch.testing.assert_close(got, torch.stack([f(*x) for x in zip(*stacked, strict=True)]))
    got = torch.func.vmap(f, (0, *[None] * (len(primals) - 1)))(stacked[0], *primals[1:])
    torch.testing.assert_close(got, torch.stack([f(x, *primals[1:]) for x in stacked[0]]))


@reads_under_func
def test_vmap_of_a_gradient() -> None:
    f, primals = function(FP64)
    stacked = torch.stack([primals[2], primals[2] / 2])

    def df(v: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(f, 2)(*primals[:2], v, *primals[3:])

    torch.testing.assert_close(torch.func.vmap(df)(stacked), torch.stack([df(v) for v in stacked]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_vmap_of_the_operator(compiled: bool) -> None:
    f, primals = function(FP64, chunk_kda if compiled else operator)
    stacked = [torch.stack([x, x / 2, -x]) for x in primals]
    mapped = torch.func.vmap(f)
    if compiled:
        mapped = torch.compile(mapped, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(mapped(*stacked), torch.stack([f(*x) for x in zip(*stacked, strict=True)]))


# ---- second derivatives


def test_second_derivatives() -> None:
    """The reference has them, the operator says who has."""
    f, primals = function(FP64)
    assert torch.autograd.gradgradcheck(lambda k: f(primals[0], k, *primals[2:]), primals[1].requires_grad_())
    f, primals = function(FP64, operator)
    leaves = [y.requires_grad_() for y in primals]
    made = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match='have no gradient themselves: those of backend="reference"'):
        torch.autograd.grad(made[1].square().sum(), leaves[1])


# ---- torch.jit.trace


class Layer(torch.nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.A_log = how, torch.nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
        cu_seqlens: torch.Tensor, state: torch.Tensor,
    ) -> Any:  # fmt: skip
        names = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
        gate: dict[str, Any] = dict(A_log=self.A_log, lower_bound=-5.0, cu_seqlens=cu_seqlens)
        flags: dict[str, Any] = {**dict.fromkeys(names, True), **gate}
        if self.how == "chunk":
            return chunk_kda(q, k, v, g, beta, initial_state=state, output_final_state=True, **flags)
        if self.how == "summary":
            return chunk_kda_summary(k, v, g, beta, **flags)
        if self.how == "checkpoints":
            return chunk_kda(q, k, v, g, beta, **flags, checkpoint_interval=32)
        with torch.no_grad():
            if self.how == "recurrent":
                return fused_recurrent_kda(q, k, v, g, beta, initial_state=state, output_final_state=True, **flags)
            if self.how == "token states":
                flags["output_token_states"] = True
                o, _, states = fused_recurrent_kda(q, k, v, g, beta, initial_state=state, **flags)
                return o, states
            out, final = torch.zeros_like(v), state.clone()
            fwd(q, k, v, g, beta, 0.3, out, self.A_log, torch.zeros_like(g[0, 0]), -5.0, final, final, cu_seqlens)
            return out, final


def traced_arguments(seed: int, *cuts: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, g = (torch.randn(1, 9, 2, 8, generator=generator) for _ in range(4))
    beta, state = torch.randn(1, 9, 2, generator=generator), torch.randn(2, 2, 8, 8, generator=generator)
    return q, k, v, g, beta, torch.tensor(cuts), state


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["chunk", "summary", "recurrent", "token states", "fwd"])
def test_jit_trace_records_the_operator(how: str) -> None:
    """So a traced module, saved and loaded too, is right for other numbers, and for sequences cut elsewhere."""
    layer = Layer(how)
    traced = torch.jit.trace(layer, traced_arguments(0, 0, 4, 9))
    assert "kda_cute::" in str(traced.graph) and "aten::solve_triangular" not in str(traced.graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = traced_arguments(1, 0, 7, 9)
    for module in (traced, torch.jit.load(file)):
        torch.testing.assert_close(module(*other), layer(*other), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_jit_trace_refuses_checkpoints() -> None:
    with pytest.raises(NotImplementedError, match="checkpoint_interval is given: must be None under .*torch.jit.trace"):
        torch.jit.trace(Layer("checkpoints"), traced_arguments(0, 0, 4, 9))


# ---- a GPU's known call: transforms must not take the way on which nothing is looked at


def known(launches: list[Any]) -> dict[str, Any]:  # noqa: F811
    kwargs = full(SERVED)
    make_known(kwargs, launches)
    return kwargs


def allocating(launches: list[Any]) -> dict[str, Any]:  # noqa: F811
    from tests.test_contract import on_gpu

    kwargs = on_gpu(arguments(SERVED, output_final_state=True))
    make_known(kwargs, launches)
    return kwargs


@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
def test_forward_mode_of_a_known_call(name: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs = known(launches)
    x = kwargs[name]
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            chunk_kda(**{**kwargs, name: forward_ad.make_dual(x, torch.ones_like(x))})
        assert not launches
        chunk_kda(**kwargs)  # has no derivative to lose
        assert len(launches) == 1
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(lambda y: chunk_kda(**{**kwargs, name: y})[0], (x,), (torch.ones_like(x),))
    assert len(launches) == 1


def test_func_grad_of_a_known_call(launches: list[Any]) -> None:  # noqa: F811
    kwargs = allocating(launches)
    with pytest.raises(NotImplementedError, match=FUNC_GRAD):
        torch.func.grad(lambda v: chunk_kda(**{**kwargs, "v": v})[0].float().sum())(kwargs["v"])
    assert not launches


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_known_call(launches: list[Any]) -> None:  # noqa: F811
    kwargs = allocating(launches)
    v = torch.stack([kwargs["v"], kwargs["v"]])
    o, S = torch.func.vmap(lambda v: chunk_kda(**{**kwargs, "v": v}))(v)
    assert o.shape == v.shape and S.shape == (2, *SERVED.state_shape)
    assert [call[3][0] for call in launches] == [v[0].data_ptr(), v[1].data_ptr()]


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_jit_trace_of_a_known_call(launches: list[Any]) -> None:  # noqa: F811
    kwargs = allocating(launches)
    traced = torch.jit.trace(lambda v: chunk_kda(**{**kwargs, "v": v}), kwargs["v"], check_trace=False)
    assert "kda_cute::chunk_kda" in str(traced.graph)
    launches.clear()
    traced(kwargs["v"])
    assert len(launches) == 1


@pytest.mark.parametrize("what", ["checkpoint_interval", "out", "final_state", "recurrent"])
def test_vmap_of_what_writes(what: str, launches: list[Any]) -> None:  # noqa: F811
    kwargs = allocating(launches)
    given = {
        "checkpoint_interval": 32,
        "out": torch.empty_like(kwargs["v"]),
        "final_state": torch.empty(SERVED.state_shape),
    }
    call: Callable[..., Any] = chunk_kda
    if what == "recurrent":
        call = fused_recurrent_kda
        kwargs.pop("safe_gate")
    else:
        kwargs[what] = given[what]
    with pytest.raises(NotImplementedError, match=r"must be None under torch\.vmap, .* B is for many sequences"):
        torch.func.vmap(lambda v: call(**{**kwargs, "v": v})[0])(kwargs["v"][None])
    assert not launches
