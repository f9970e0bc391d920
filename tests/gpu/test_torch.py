"""chunk_kda on a Hopper GPU as torch and fla use it: compiled, captured, differentiated, in fla's layer and model."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import kda_cute.gradients
from kda_cute import chunk_kda, chunk_kda_summary, fused_recurrent_kda, fwd
from kda_cute.call import DIFFERENTIABLE
from kda_cute.reference import recurrence
from tests.strategies import Case, make
from tests.test_library import gradients, nothing_compiled_before, operator_arguments, with_leaves  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's kernels with the first of the configurations that they would try for minutes."""
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return
    prune_configs = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, kwargs: prune_configs(self, kwargs)[:1])


FIXED = Case(1, (257, 257), H=4, initial_state="fp32", final_state="new")
PACKED = Case(2, (300, 0, 17, 130), "int64", H=2, g_dtype="fp32", initial_state="fp32", final_state="new")
LOG = Case(3, (200,), H=2, gate="log", decay="weak", final_state="new", state_v_first=True)
CASES = {"fixed": FIXED, "packed": PACKED, "log": LOG}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_opcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kda_cute.gradients.fla", lambda: None)  # who makes gradients is tested below
    kwargs = make(case, "cuda").kwargs
    arguments = operator_arguments(kwargs)
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda.default, arguments)
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda.default, operator_arguments(with_leaves(kwargs)))
    out, state = torch.zeros_like(kwargs["v"]), torch.zeros(case.state_shape, device="cuda")
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda_out.default, [*arguments, out, state, None, None, None])


@cases
def test_compiled(case: Case) -> None:
    """By inductor, in one graph, to the bits of the call as it is; with CUDA graphs too."""
    kwargs = make(case, "cuda").kwargs
    want = chunk_kda(**kwargs)
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(chunk_kda, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(**kwargs), want, rtol=0, atol=0)


def test_compiled_updates_a_state_in_place_inside_a_graph() -> None:
    kwargs = make(FIXED, "cuda").kwargs
    start = kwargs.pop("initial_state")
    state, want = start.clone(), start.clone()

    def step(state: torch.Tensor) -> torch.Tensor:
        return chunk_kda(**kwargs, initial_state=state, final_state=state)[0] * 2

    compiled = torch.compile(step, fullgraph=True)
    with torch.no_grad():
        compiled(state)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = compiled(state)
        state.copy_(start)
        for _ in range(2):
            graph.replay()
            want_o = step(want)
            torch.testing.assert_close((o, state), (want_o, want), rtol=0, atol=0)


@cases
@pytest.mark.parametrize("by", ["reference", "fla"])
def test_gradients(case: Case, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against those of the token recurrence in fp64, compiled too."""
    if by == "reference":
        monkeypatch.setattr("kda_cute.gradients.fla", lambda: None)
    else:
        pytest.importorskip("fla.ops.kda", reason="needs fla-core: pip install '.[bench]'", exc_type=ImportError)
        assert kda_cute.gradients.fla() is not None
    exact = {**make(case, "cuda").oracle_kwargs, "output_final_state": True}
    want = gradients(recurrence, with_leaves(exact, torch.float64), case.cuts[-1])
    for run in (chunk_kda, torch.compile(chunk_kda, fullgraph=True)):
        got = gradients(run, with_leaves(make(case, "cuda").kwargs), case.cuts[-1])
        assert got.keys() == want.keys()
        for name, x in got.items():
            assert (x - want[name]).norm() <= 2e-2 * want[name].norm(), name


def test_gradients_of_sequences_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error about cu_seqlens, and a GPU that goes on: no index past the end on the device."""
    monkeypatch.setattr("kda_cute.gradients.fla", lambda: None)
    kwargs = with_leaves(make(PACKED, "cuda").kwargs)
    kwargs["cu_seqlens"] = torch.tensor([0, 300, 300, 317, 100_000], device="cuda")
    with pytest.raises(ValueError, match="cu_seqlens is .*: must be within 0 and T = 447"):
        torch.ops.kda_cute.chunk_kda_backward(
            torch.ones_like(kwargs["v"]), None, *operator_arguments(kwargs), [True] * len(DIFFERENTIABLE)
        )
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3


# ---- every accepted parameter, by both backends

SMALL = Case(4, (40, 24), "int32", H=2, group=2, initial_state="fp32", final_state="new")


@pytest.mark.parametrize("gate", ["safe", "softplus"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_shapes_and_dtypes_of_the_parameters(gate: str, backend: str | None) -> None:
    """To the bits of the same numbers as [HV] and [HV, K] in fp32."""
    kwargs = make(replace(SMALL, gate=gate), "cuda").kwargs
    A_log, dt_bias = kwargs["A_log"].bfloat16().float(), kwargs["dt_bias"].view(4, 128).bfloat16().float()
    calls = (
        lambda **x: chunk_kda(**x),
        lambda **x: chunk_kda(**x, return_intermediate_states=True, chunk_size=32),
        lambda **x: fused_recurrent_kda(**{name: y for name, y in x.items() if name != "safe_gate"}),
    )
    for call in calls:
        want = call(**{**kwargs, "A_log": A_log, "dt_bias": dt_bias}, backend=backend)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for given in (A_log, A_log.view(1, 1, 4, 1), torch.stack((A_log, A_log), -1)[:, 0]):
                for bias in (dt_bias, dt_bias.flatten(), dt_bias.T.contiguous().T):
                    shaped = {**kwargs, "A_log": given.to(dtype), "dt_bias": bias.to(dtype)}
                    got = call(**shaped, backend=backend)
                    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_shapes_of_the_gradients_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kda_cute.gradients.fla", lambda: None)
    for backend in (None, "reference"):
        kwargs = make(SMALL, "cuda").kwargs
        kwargs["A_log"] = kwargs["A_log"].view(1, 1, 4, 1).requires_grad_()
        kwargs["dt_bias"] = kwargs["dt_bias"].view(4, 128).requires_grad_()
        o, _ = chunk_kda(**kwargs, backend=backend)
        made = torch.autograd.grad(o.float().square().sum(), [kwargs["A_log"], kwargs["dt_bias"]])
        assert made[0].shape == (1, 1, 4, 1) and made[1].shape == (4, 128)
        assert all(x.isfinite().all() and x.any() for x in made)


@pytest.mark.parametrize("dtype, device", [(torch.float64, None), (torch.float16, None), (torch.float32, "meta")])
def test_defaults_of_torch(dtype: torch.dtype, device: str | None) -> None:
    kwargs = make(SMALL, "cuda").kwargs
    names = ("k", "v", "g", "beta")
    flags = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "lower_bound", "A_log",
             "dt_bias", "cu_seqlens")  # fmt: skip
    out, final = torch.empty_like(kwargs["v"]), torch.empty(SMALL.state_shape, device="cuda")

    def calls() -> list[Any]:
        recurrent = {name: x for name, x in kwargs.items() if name != "safe_gate"}
        fwd(*(kwargs[name] for name in ("q", *names)), 0.3, out, kwargs["A_log"], kwargs["dt_bias"], -5.0, None, final,
            kwargs["cu_seqlens"])  # fmt: skip
        return [
            chunk_kda(**kwargs), chunk_kda(**kwargs, checkpoint_interval=32)[:2], fused_recurrent_kda(**recurrent),
            fused_recurrent_kda(**recurrent, output_token_states=True), (out.clone(), final.clone()),
            chunk_kda_summary(*(kwargs[name] for name in names), **{name: kwargs[name] for name in flags}),
        ]  # fmt: skip

    want = calls()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        got = calls()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# ---- torch's transforms: the kernel's call is known before each


def known(**changes: Any) -> dict[str, Any]:
    kwargs = {**make(SMALL, "cuda").kwargs, **changes}
    for _ in range(3):
        chunk_kda(**kwargs)
    return kwargs


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
def test_forward_mode(name: str) -> None:
    kwargs = known()
    x = kwargs[name]
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            chunk_kda(**{**kwargs, name: forward_ad.make_dual(x, torch.ones_like(x))})
        torch.testing.assert_close(chunk_kda(**kwargs), chunk_kda(**kwargs), rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda y: chunk_kda(**{**kwargs, name: y})[0], (x,), (torch.ones_like(x),))
    by_reference = {**kwargs, "backend": "reference"}
    _, tangent = torch.func.jvp(lambda y: chunk_kda(**{**by_reference, name: y})[1], (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all() and (tangent.any() or name == "q")


def test_func_grad() -> None:
    kwargs = known()
    with pytest.raises(NotImplementedError, match="no gradient under torch.func"):
        torch.func.grad(lambda v: chunk_kda(**{**kwargs, "v": v})[1].sum())(kwargs["v"])
    got = torch.func.grad(lambda v: chunk_kda(**{**kwargs, "v": v}, backend="reference")[1].sum())(kwargs["v"])
    assert got.isfinite().all() and got.any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    kwargs = known()
    v, A_log = (torch.stack([kwargs[name], kwargs[name] / 2]) for name in ("v", "A_log"))
    got = torch.func.vmap(lambda v, A_log: chunk_kda(**{**kwargs, "v": v, "A_log": A_log}))(v, A_log)
    want = [chunk_kda(**{**kwargs, "v": v[i], "A_log": A_log[i]}) for i in range(2)]
    torch.testing.assert_close(got, tuple(map(torch.stack, zip(*want, strict=True))), rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="under torch.vmap"):
        out = torch.empty_like(kwargs["v"])
        torch.func.vmap(lambda v: chunk_kda(**{**kwargs, "v": v, "out": out})[0])(v)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("recurrent", [False, True])
def test_jit_trace(recurrent: bool) -> None:
    """Records a call that launches: other numbers and cuts, after the memory has been used for something else."""
    kwargs = known()
    given = {name: x for name, x in kwargs.items() if name not in ("q", "v", "cu_seqlens", "safe_gate")}

    def call(q: torch.Tensor, v: torch.Tensor, cuts: torch.Tensor) -> Any:
        return (fused_recurrent_kda if recurrent else chunk_kda)(q=q, v=v, cu_seqlens=cuts, **given)

    traced = torch.jit.trace(call, (kwargs["q"], kwargs["v"], kwargs["cu_seqlens"]), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = kwargs["q"] / 2, -kwargs["v"], torch.tensor([0, 5, 64], dtype=torch.int32, device="cuda")
    for module in (traced, torch.jit.load(file)):
        torch.full((1 << 22,), torch.nan, device="cuda")
        torch.testing.assert_close(module(*other), call(*other), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:transpose_state_layout is deprecated")
def test_compiled_scale_and_layout() -> None:
    """A scale by .item(), one of numpy, and the old name of state_v_first: what a call as it is makes of them."""
    kwargs = make(replace(SMALL, initial_state=None), "cuda").kwargs
    kwargs.pop("state_v_first")

    def call(scale: Any) -> Any:
        scale = scale.item() if isinstance(scale, torch.Tensor) else scale
        return chunk_kda(**{**kwargs, "scale": scale}, transpose_state_layout=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(call, fullgraph=True)
        for scale in (torch.tensor(0.25), torch.tensor(0.5), np.float32(0.25), np.float64(0.125)):
            torch.testing.assert_close(compiled(scale), call(scale), rtol=0, atol=0)


# ---- fla, with one line


@pytest.fixture
def fla() -> Any:
    pytest.importorskip("fla.ops.kda", reason="needs fla-core: pip install '.[bench]'", exc_type=ImportError)
    import kda_cute.fla

    return kda_cute.fla


def on_and_off(monkeypatch: pytest.MonkeyPatch, run: Any) -> tuple[Any, Any]:
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    monkeypatch.setenv("FLA_KDA_CUTE", "1")
    on = run()
    monkeypatch.setenv("FLA_KDA_CUTE", "0")
    return on, run()


@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_layer(packed: bool, fla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fla.layers import KimiDeltaAttention

    torch.manual_seed(0)
    layer = KimiDeltaAttention(512, num_heads=4, safe_gate=True, lower_bound=-5.0, layer_idx=0).cuda().bfloat16().eval()
    x = torch.randn(1, 1000, 512, device="cuda", dtype=torch.bfloat16)
    cuts = {"cu_seqlens": torch.tensor([0, 300, 301, 1000], device="cuda")} if packed else {}
    calls: list[str] = []
    monkeypatch.setattr(fla.ops, "chunk_kda", lambda **kwargs: calls.append("ours") or chunk_kda(**kwargs))
    with torch.no_grad():
        ours, theirs = on_and_off(monkeypatch, lambda: layer(x, **cuts)[0])
    assert calls == ["ours"]
    assert (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm()


def test_model_prefills_and_decodes(fla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a prefill, then of tokens one by one from its cache, with this backend and with Triton."""
    pytest.importorskip("transformers", reason="needs transformers: pip install flash-linear-attention")
    from fla.models import KDAConfig, KDAForCausalLM

    torch.manual_seed(0)
    config = KDAConfig(
        hidden_size=256, num_heads=2, head_dim=128, num_hidden_layers=2, vocab_size=512, safe_gate=True,
        lower_bound=-5.0, fuse_cross_entropy=False, fuse_swiglu=False, fuse_norm=False,
    )  # fmt: skip
    model = KDAForCausalLM(config).cuda().bfloat16().eval()
    tokens = torch.randint(512, (2, 305), device="cuda")

    def logits() -> torch.Tensor:
        with torch.no_grad():
            out = model(tokens[:, :300], use_cache=True)
            found = [out.logits]
            for i in range(300, 305):
                out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                found.append(out.logits)
        return torch.cat(found, 1).float()

    calls: list[str] = []
    monkeypatch.setattr(fla.ops, "chunk_kda", lambda **kwargs: calls.append("ours") or chunk_kda(**kwargs))
    ours, theirs = on_and_off(monkeypatch, logits)
    assert len(calls) == config.num_hidden_layers
    assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_training_stays_with_fla(fla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fla.ops.kda import chunk_kda as fla_chunk_kda

    monkeypatch.setattr(fla.ops, "chunk_kda", lambda **kwargs: pytest.fail("has no backward"))
    kwargs = with_leaves(make(FIXED, "cuda").kwargs)
    o, _ = fla_chunk_kda(**kwargs)
    o.float().sum().backward()
    assert kwargs["q"].grad.abs().sum() > 0
