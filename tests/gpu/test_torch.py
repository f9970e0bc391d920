"""chunk_kda on a Hopper GPU as torch and fla use it: compiled, captured, differentiated, in fla's layer and model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kda_cute import chunk_kda, library
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
    monkeypatch.setattr(library, "_fla", lambda: None)  # who makes gradients is tested below
    kwargs = make(case, "cuda").kwargs
    arguments = operator_arguments(kwargs)
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda.default, arguments)
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda.default, operator_arguments(with_leaves(kwargs)))
    out, state = torch.zeros_like(kwargs["v"]), torch.zeros(case.state_shape, device="cuda")
    torch.library.opcheck(torch.ops.kda_cute.chunk_kda_out.default, [*arguments, out, state])


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
        monkeypatch.setattr(library, "_fla", lambda: None)
    else:
        pytest.importorskip("fla.ops.kda", reason="needs fla-core: pip install '.[bench]'", exc_type=ImportError)
        assert library._fla() is not None
    exact = {**make(case, "cuda").oracle_kwargs, "output_final_state": True}
    want = gradients(recurrence, with_leaves(exact, torch.float64), case.cuts[-1])
    for run in (chunk_kda, torch.compile(chunk_kda, fullgraph=True)):
        got = gradients(run, with_leaves(make(case, "cuda").kwargs), case.cuts[-1])
        assert got.keys() == want.keys()
        for name, x in got.items():
            assert (x - want[name]).norm() <= 2e-2 * want[name].norm(), name


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
