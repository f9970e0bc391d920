"""The plugins of SGLang and vLLM: what they change, what they hand on to this package's functions, and what they leave.

The servers are stand-ins: packages with the modules that the plugins touch, whose functions have the parameters of the
released ones (sglang 0.5.23, vllm 0.33.0) and say that they were called."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import kda_cute
from kda_cute.integrations import parameters, when_imported
from kda_cute.integrations import sglang as sglang_plugin
from kda_cute.integrations import vllm as vllm_plugin

H, D, SLOTS = 2, 16, 6
PAGE = (Path(__file__).parents[1] / "docs/serving.md").read_text()
POOL_IN_PLACE = pytest.mark.skipif(
    "null_index" not in inspect.signature(kda_cute.chunk_kda).parameters, reason="chunk_kda has no null_index yet"
)


def function(name: str, takes: str, indent: str = "") -> str:
    """Source of a function that notes its call in the package's list `calls`. Only the first parameter is required."""
    given, *rest = takes.split()
    signature = ", ".join([given, *(x if x.startswith("*") else f"{x}=None" for x in rest)])
    body = f"import {{package}} as p; p.calls.append(({name!r}, dict(locals()))); return {name!r}, None"
    return f"{indent}def {name}({signature}):\n{indent}    {body}\n"


def write_package(root: Path, package: str, modules: dict[str, str]) -> None:
    for name, source in {package: "calls = []\n", **modules}.items():
        file = root.joinpath(*name.split("."), "__init__.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source.replace("{package}", package))
        for parent in file.relative_to(root).parents:
            init = root / parent / "__init__.py"
            if str(parent) != "." and not init.exists():
                init.write_text("")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, dict[str, str]], ModuleType]]:
    """Makes a package of a server, which is gone after the test."""
    made: list[str] = []

    def make(package: str, modules: dict[str, str]) -> ModuleType:
        assert package not in sys.modules, f"{package} is installed here: these tests need its stand-in"
        write_package(tmp_path, package, modules)
        made.append(package)
        importlib.invalidate_caches()
        return importlib.import_module(package)

    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield make
    sys.meta_path[:] = finders
    for name in [x for x in sys.modules if x.split(".")[0] in made]:
        del sys.modules[name]
    for finder in sys.meta_path:
        getattr(finder, "waiting", {}).clear()
    for plugin in (sglang_plugin, vllm_plugin):
        plugin.once.said.clear()


class Recorder:
    """In place of a function of this package."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception | None = None) -> None:
        self.signature = inspect.signature(getattr(kda_cute, name))
        self.calls: list[dict[str, Any]] = []
        self.error = error
        monkeypatch.setattr(kda_cute, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert not torch.is_grad_enabled()
        if self.error:
            raise self.error
        known = list(self.signature.parameters)
        call = {**dict(zip(known, args, strict=False)), **kwargs}
        self.calls.append(call)
        o = call.get("out")
        o = torch.full_like(call["v"], 7) if o is None else o.fill_(7)
        states = (call["token_states"],) if call.get("token_states") is not None else ()
        return o, call.get("final_state", call.get("initial_state")), *states

    @property
    def call(self) -> dict[str, Any]:
        (call,) = self.calls
        return call


def packed(T: int, seed: int = 0) -> torch.Tensor:
    """What a convolution leaves: q, k and v side by side."""
    return torch.randn(T, 3 * H * D, generator=torch.Generator().manual_seed(seed))


def qkv(mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[1, T, H, D], strided views."""
    return tuple(x.unflatten(-1, (H, D)).unsqueeze(0) for x in mixed.split(H * D, dim=-1))


def inputs(T: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """A gate [1, T, H, D]; beta logits [1, T, H], rows of a wider projection; the gate's parameters, A_log in 4-D."""
    r = torch.Generator().manual_seed(seed)
    return {
        "g": torch.randn(1, T, H, D, generator=r),
        "beta": torch.randn(1, T, 3 * H, generator=r)[..., H : 2 * H],
        "A_log": torch.nn.Parameter(torch.randn(1, 1, H, 1, generator=r)),
        "dt_bias": torch.nn.Parameter(torch.randn(H * D, generator=r)),
    }


def pool(seed: int = 2) -> torch.Tensor:
    """[SLOTS, H, D, D] with a pitch."""
    wide = torch.randn(SLOTS, H * D * D + 64, generator=torch.Generator().manual_seed(seed))
    return wide[:, : H * D * D].unflatten(1, (H, D, D))


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """The same memory, read the same way."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


# ---- SGLang

DISPATCHER = "self decode_backend prefill_backend verify_backend"
PACKED = "mixed_qkv a b A_log dt_bias scale ssm_states cache_indices num_v_heads head_v_dim lower_bound **kwargs"
DECODE = "q k v a b A_log dt_bias ssm_states cache_indices query_start_loc lower_bound **kwargs"
VERIFY = (
    "A_log dt_bias q k v a b ssm_states cache_indices query_start_loc intermediate_states_buffer "
    "intermediate_state_indices cache_steps retrieve_parent_token lower_bound **kwargs"
)
EXTEND = (
    "q k v g beta ssm_states cache_indices query_start_loc A_log dt_bias lower_bound beta_is_raw "
    "return_intermediate_states **kwargs"
)
LINEAR = "sglang.srt.layers.attention.linear"


def sglang_modules(version: str = "0.5.23", dispatcher: str = DISPATCHER) -> dict[str, str]:
    methods = {"packed_decode": PACKED, "decode": DECODE, "target_verify": VERIFY, "extend": EXTEND}
    base = "from abc import ABC, abstractmethod\nclass LinearAttnKernelBase(ABC):\n"
    base += "    supports_track_state_snapshot = False\n    uses_state_checkpoints = False\n"
    base += "".join(
        f"    @abstractmethod\n    def {name}(self, *args, **kwargs): ...\n" for name in ("decode", "extend")
    )
    triton = "class TritonKDAKernel:\n" + "".join(function(x, f"self {methods[x]}", "    ") for x in methods)
    signature = ", ".join(dispatcher.split())
    return {
        "sglang.version": f"__version__ = {version!r}\n",
        "sglang.srt.arg_groups.choices": "choices = ['triton', 'flashkda']\n"
        "add_linear_attn_kernel_backend_choices = choices.extend\n",
        "sglang.srt.runtime_context": "from types import SimpleNamespace\n"
        "mamba = SimpleNamespace(linear_attn_backend='triton', linear_attn_decode_backend=None,\n"
        "    linear_attn_prefill_backend=None, linear_attn_verify_backend=None)\n"
        "def get_exec(): return SimpleNamespace(mamba=mamba)\n",
        f"{LINEAR}.utils": "from enum import Enum\nclass LinearAttnKernelBackend(Enum):\n"
        "    TRITON = 'triton'\n    FLASHKDA = 'flashkda'\n    CUSTOM = 'custom'\n"
        "    @classmethod\n    def _missing_(cls, value): return cls.CUSTOM\n"
        "    def is_custom(self): return self is LinearAttnKernelBackend.CUSTOM\n",
        f"{LINEAR}.kernels.kernel_backend": base,
        f"{LINEAR}.kda_backend": triton + "class KDAKernelDispatcher:\n"
        f"    def __init__({signature}):\n"
        "        backends = [x for name, x in locals().items() if name != 'self']\n"
        "        if any(x.is_custom() for x in backends): raise ValueError(f'Unsupported: {backends}')\n"
        "        self.triton_kernel = self.decode_kernel = self.verify_kernel = TritonKDAKernel()\n"
        "        self.extend_kernel = self.triton_kernel\n"
        "        self.prefill_backend, self.verify_backend = prefill_backend, verify_backend\n"
        "        self.supports_packed_decode, self.supports_packed_decode_safe_gate = True, False\n",
    }


def dispatch(monkeypatch: pytest.MonkeyPatch, hopper: bool = True, **names: str) -> Any:
    """SGLang's dispatcher, as KDAAttnBackend makes it of the names on the command line."""
    backend = importlib.import_module(f"{LINEAR}.kda_backend")
    kind = importlib.import_module(f"{LINEAR}.utils").LinearAttnKernelBackend
    mamba = importlib.import_module("sglang.srt.runtime_context").mamba
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0) if hopper else (8, 0))
    for phase, name in names.items():
        setattr(mamba, f"linear_attn_{phase}_backend", name)
    return backend.KDAKernelDispatcher(*(kind(names.get(x, "triton")) for x in ("decode", "prefill", "verify")))


@pytest.fixture
def sglang(server: Any, caplog: pytest.LogCaptureFixture) -> ModuleType:
    caplog.set_level(logging.INFO)
    module = server("sglang", sglang_modules())
    sglang_plugin.register()
    return module


@pytest.fixture
def kernel(sglang: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    return dispatch(monkeypatch, prefill="kda_cute", decode="kda_cute", verify="kda_cute").extend_kernel


def test_sglang_knows_the_name(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server("sglang", sglang_modules())
    sglang_plugin.register()
    assert importlib.import_module("sglang.srt.arg_groups.choices").choices[-1] == "kda_cute"
    assert f"{LINEAR}.kda_backend" not in sys.modules  # a process without a model does without it
    (line,) = caplog.messages
    assert line == "kda_cute: --linear-attn-{prefill,decode,verify}-backend kda_cute can be chosen"


@pytest.mark.parametrize("phase", ["decode", "prefill", "verify"])
def test_sglang_runs_the_phase_that_was_chosen(
    sglang: ModuleType, phase: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = dispatch(monkeypatch, **{phase: "kda_cute"})
    kernels = {"decode": dispatcher.decode_kernel, "prefill": dispatcher.extend_kernel}
    kernels["verify"] = dispatcher.verify_kernel
    names = {x: type(kernel).__name__ for x, kernel in kernels.items()}
    assert names == {x: "KdaCuteKernel" if x == phase else "TritonKDAKernel" for x in kernels}
    assert dispatcher.supports_packed_decode_safe_gate == (phase == "decode")
    base = importlib.import_module(f"{LINEAR}.kernels.kernel_backend").LinearAttnKernelBase
    assert isinstance(kernels[phase], base) and kernels[phase].supports_track_state_snapshot
    assert caplog.messages[-1] == f"kda_cute {kda_cute.__version__}: SGLang's KDA {phase} on KdaCuteKernel"


def test_the_page_has_the_lines_of_the_log(server: Any, monkeypatch: pytest.MonkeyPatch, shown: Any) -> None:
    server("sglang", sglang_modules())
    server("vllm", vllm_modules())
    sglang_plugin.register()
    vllm_plugin.register()
    dispatch(monkeypatch, prefill="kda_cute", decode="kda_cute", verify="kda_cute")
    for module in (K3, K3_OPS):
        importlib.import_module(module)
    _, *lines = shown.messages
    assert len(lines) == 3 and all(f"    {line}\n" in PAGE for line in lines)


def test_sglang_default_backend_is_decode_and_prefill(sglang: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    context = importlib.import_module("sglang.srt.runtime_context")
    context.mamba.linear_attn_backend = "kda_cute"
    backend = importlib.import_module(f"{LINEAR}.kda_backend")
    kind = importlib.import_module(f"{LINEAR}.utils").LinearAttnKernelBackend
    dispatch(monkeypatch)  # a Hopper GPU from here on
    dispatcher = backend.KDAKernelDispatcher(kind("kda_cute"), kind("kda_cute"), kind("triton"))
    kernels = (dispatcher.decode_kernel, dispatcher.extend_kernel, dispatcher.verify_kernel)
    assert [type(x).__name__ for x in kernels] == ["KdaCuteKernel", "KdaCuteKernel", "TritonKDAKernel"]


def test_sglang_leaves_other_backends_alone(sglang: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(dispatch(monkeypatch, prefill="flashkda").extend_kernel).__name__ == "TritonKDAKernel"
    with pytest.raises(ValueError, match="Unsupported"):
        dispatch(monkeypatch, prefill="of another plugin")


def test_sglang_without_a_hopper_gpu(
    sglang: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = dispatch(monkeypatch, hopper=False, prefill="kda_cute", decode="kda_cute")
    assert type(dispatcher.extend_kernel).__name__ == "TritonKDAKernel"
    assert caplog.records[-1].levelname == "WARNING"
    assert "Triton stays for SGLang's KDA decode, prefill: needs a Hopper GPU (9.0), this is a 8.0" in caplog.text


@pytest.mark.parametrize(
    ("modules", "line"),
    [
        (sglang_modules("0.6.0"), "no backend for SGLang 0.6.0, known are 0.5.23"),
        (sglang_modules("0.0.0.dev0"), "no backend for SGLang 0.0.0.dev0"),
        ({"sglang.version": "__version__ = '0.5.23'"}, "SGLang's plugin failed, kernels of the server stay: "),
    ],
)
def test_sglang_that_is_not_known(
    server: Any, modules: dict[str, str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    server("sglang", modules)
    sglang_plugin.register()
    assert line in caplog.text and caplog.records[-1].levelname == "WARNING"
    if len(modules) > 1:
        own = importlib.import_module(f"{LINEAR}.kda_backend").KDAKernelDispatcher.__init__
        assert not hasattr(own, "__wrapped__")
        assert "kda_cute" not in importlib.import_module("sglang.srt.arg_groups.choices").choices


def test_sglang_with_another_dispatcher(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server("sglang", sglang_modules(dispatcher=DISPATCHER + " draft_backend"))
    sglang_plugin.register()
    own = importlib.import_module(f"{LINEAR}.kda_backend").KDAKernelDispatcher.__init__
    assert not hasattr(own, "__wrapped__") and "its KDAKernelDispatcher takes" in caplog.text


def test_sglang_off(server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("KDA_CUTE_SGLANG", "0")
    server("sglang", sglang_modules())
    sglang_plugin.register()
    assert importlib.import_module("sglang.srt.arg_groups.choices").choices == ["triton", "flashkda"]
    assert caplog.messages == ["kda_cute: no backend for SGLang, KDA_CUTE_SGLANG is 0"]


@pytest.mark.parametrize("shape", ["flat", "4-D"])
def test_sglang_packed_decode(kernel: Any, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Recorder(monkeypatch, "fused_recurrent_kda")
    B, x, states = 3, inputs(3), pool()
    mixed = packed(B)
    a = x["g"].reshape(B, H * D) if shape == "flat" else x["g"].reshape(B, 1, H, D)
    b = x["beta"] if shape == "flat" else x["beta"].transpose(0, 1)
    indices = torch.tensor([4, -1, 2], dtype=torch.int32)
    o = kernel.packed_decode(
        mixed, a, b, A_log=x["A_log"], dt_bias=x["dt_bias"], scale=0.5, ssm_states=states, cache_indices=indices,
        num_v_heads=H, head_v_dim=D, lower_bound=-5.0, replayssm_d=None,
    )  # fmt: skip
    call = ours.call
    assert o.shape == (1, B, H, D) and (o == 7).all()
    assert call["q"].data_ptr() == mixed.data_ptr() and call["v"].shape == (B, 1, H, D)
    for name, part in zip("qkv", qkv(mixed), strict=True):
        assert torch.equal(call[name].transpose(0, 1), part)
    assert call["g"].shape == (B, 1, H, D) and torch.equal(call["g"].transpose(0, 1), x["g"])
    assert call["beta"].data_ptr() == x["beta"].data_ptr() and call["beta"].stride(0) == 3 * H  # no copy
    assert same(call["initial_state"], states) and same(call["state_indices"], indices) and call["scale"] == 0.5
    assert call["null_index"] == -1 and call["state_v_first"] and call["lower_bound"] == -5.0
    assert call["use_gate_in_kernel"] and call["use_beta_sigmoid_in_kernel"] and call["use_qk_l2norm_in_kernel"]
    assert call.get("cu_seqlens") is None and same(call["A_log"], x["A_log"]) and same(call["dt_bias"], x["dt_bias"])


def test_sglang_decode(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Recorder(monkeypatch, "fused_recurrent_kda")
    x, states, starts = inputs(3), pool(), torch.arange(4, dtype=torch.int32)
    q, k, v = qkv(packed(3))
    indices = torch.tensor([4, -1, 2, 5, 5], dtype=torch.int32)
    o = kernel.decode(
        q, k, v, x["g"].reshape(3, H * D), x["beta"], A_log=x["A_log"], dt_bias=x["dt_bias"], ssm_states=states,
        cache_indices=indices, query_start_loc=starts, lower_bound=None,
    )  # fmt: skip
    call = ours.call
    assert o.shape == (1, 3, H, D) and same(call["q"], q) and same(call["v"], v) and same(call["cu_seqlens"], starts)
    assert same(call["state_indices"], indices[:3]) and call["null_index"] == -1 and call["lower_bound"] is None
    assert torch.equal(call["g"], x["g"]) and same(call["beta"], x["beta"])


def verify(kernel: Any, T: int = 4, **more: Any) -> Any:
    x = inputs(T)
    q, k, v = qkv(packed(T))
    arguments = dict(
        A_log=x["A_log"], dt_bias=x["dt_bias"], q=q, k=k, v=v, a=x["g"].reshape(T, H * D), b=x["beta"],
        ssm_states=pool(), cache_indices=torch.tensor([1, 3], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 2, 4], dtype=torch.int32),
        intermediate_states_buffer=torch.zeros(5, 2, H, D, D),
        intermediate_state_indices=torch.tensor([0, 1, 2, 3], dtype=torch.int32), cache_steps=2,
        retrieve_parent_token=None, lower_bound=-5.0,
    )  # fmt: skip
    assert list(arguments) == VERIFY.split()[:-1]
    return kernel.target_verify(**{**arguments, **more})


def test_sglang_verify(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Recorder(monkeypatch, "fused_recurrent_kda")
    scratch = torch.zeros(5, 2, H, D, D)
    o = verify(kernel, intermediate_states_buffer=scratch)
    call = ours.call
    assert o.shape == (1, 4, H, D) and call["update_state"] is False and same(call["token_states"], scratch)
    assert call["token_state_indices"].tolist() == [0, 1] and call["state_indices"].tolist() == [1, 3]
    assert call["g"].shape == (1, 4, H, D) and call["state_v_first"]


@pytest.mark.parametrize(
    "more",
    [
        {"retrieve_parent_token": torch.zeros(2, 2)},
        {"cache_ring": True, "replayssm_rawv": torch.zeros(1)},
        {"intermediate_states_buffer": None},
    ],
    ids=["tree", "ring", "no scratch"],
)
def test_sglang_verifies_trees_and_rings_itself(
    kernel: Any, sglang: ModuleType, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ours = Recorder(monkeypatch, "fused_recurrent_kda")
    for _ in range(2):
        assert verify(kernel, **more) == ("target_verify", None)
    assert not ours.calls and caplog.text.count("target_verify goes to the server's own kernel") == 1
    name, call = sglang.calls[-1]
    assert name == "target_verify" and call["cache_steps"] == 2 and call["lower_bound"] == -5.0
    for key, value in more.items():
        assert call.get(key, call["kwargs"].get(key)) is value


def extend(kernel: Any, T: int = 70, **more: Any) -> Any:
    x = inputs(T + 2)  # the gate and beta of padded rows come along
    q, k, v = qkv(packed(T))
    arguments = dict(
        q=q, k=k, v=v, g=x["g"], beta=x["beta"], ssm_states=pool(),
        cache_indices=torch.tensor([1, -1, 3], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 3, 3, T], dtype=torch.int32), A_log=x["A_log"], dt_bias=x["dt_bias"],
        lower_bound=-5.0, beta_is_raw=True, return_intermediate_states=False,
    )  # fmt: skip
    assert list(arguments) == EXTEND.split()[:-1]
    rest = dict(extend_seq_lens_cpu=[3, 0, T - 3], is_spec_decode=False, layer_id=3, track_ssm_h_src=None)
    return kernel.extend(**{**arguments, **rest, **more})


def test_sglang_extend(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Recorder(monkeypatch, "chunk_kda")
    states = pool()
    o = extend(kernel, ssm_states=states)
    call = ours.call
    assert o.shape == (1, 70, H, D) and (o == 7).all()
    assert call["q"].stride(1) == 3 * H * D  # the packed views as they are
    assert call["g"].shape == (1, 70, H, D) and call["beta"].shape == (1, 70, H) and call["beta"].stride(1) == 3 * H
    assert same(call["initial_state"], states) and call["state_indices"].tolist() == [1, -1, 3]
    assert call["null_index"] == -1 and call["state_v_first"] and call["use_beta_sigmoid_in_kernel"]
    assert call["use_gate_in_kernel"] and call["use_qk_l2norm_in_kernel"] and call["lower_bound"] == -5.0
    assert "checkpoint_offsets" not in call and "has_initial_state" not in call
    extend(kernel, beta_is_raw=False)
    assert not ours.calls[-1]["use_beta_sigmoid_in_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sglang_tracks_states(kernel: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before chunk 0 is that of the slot, before the kernel overwrites it."""
    ours = Recorder(monkeypatch, "chunk_kda")
    states, track = pool().to(dtype), torch.full((3, H, D, D), 9.0)
    chunks = torch.tensor([0, -1, 1], dtype=torch.int32)
    o, h = extend(
        kernel, ssm_states=states, track_state=track, track_chunk_idx=chunks, return_intermediate_states=True,
        track_ssm_h_src=torch.tensor([0, 2]),
    )  # fmt: skip
    call = ours.call
    assert o.shape == (1, 70, H, D) and h is None
    assert call["checkpoint_offsets"].tolist() == [0, 0, 64] and same(call["checkpoint_state"], track)
    assert torch.equal(track[0], states[1].float())


def test_sglang_extend_that_only_wants_last_states(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Recorder(monkeypatch, "chunk_kda")
    o, h = extend(kernel, return_intermediate_states=True, track_ssm_h_src=torch.zeros(0, dtype=torch.int64))
    assert h is None and o.shape == (1, 70, H, D) and len(ours.calls) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"is_spec_decode": True},
        {"return_intermediate_states": True},
        {"return_intermediate_states": True, "track_ssm_h_src": torch.zeros(1, dtype=torch.int64)},
    ],
    ids=["draft", "h", "h of tracked rows"],
)
def test_sglang_extends_itself(
    kernel: Any, sglang: ModuleType, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Recorder(monkeypatch, "chunk_kda")
    assert extend(kernel, **more) == ("extend", None) and not ours.calls
    call = sglang.calls[-1][1]
    assert call["return_intermediate_states"] == more.get("return_intermediate_states", False)
    assert call["kwargs"]["layer_id"] == 3 and "track_state" in call["kwargs"]


def test_sglang_runs_what_is_refused(
    kernel: Any, sglang: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Recorder(monkeypatch, "chunk_kda", ValueError("K is 256: must be at most 128"))
    Recorder(monkeypatch, "fused_recurrent_kda", NotImplementedError("no"))
    for _ in range(3):
        assert extend(kernel) == ("extend", None) and verify(kernel) == ("target_verify", None)
    lines = [x for x in caplog.messages if "own kernel" in x]
    assert lines == [
        "kda_cute: a call of extend goes to the server's own kernel: K is 256: must be at most 128",
        "kda_cute: a call of target_verify goes to the server's own kernel: no",
    ]


def test_sglang_other_errors_are_errors(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, "chunk_kda", RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        extend(kernel)


def alone(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: dict[str, torch.Tensor], tokens: slice, state: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence by itself, in dense tensors: what a batch with a pool has to give."""
    parts = (y[:, tokens].contiguous() for y in (q, k, v, x["g"], x["beta"]))
    return kda_cute.chunk_kda(
        *parts, initial_state=None if state is None else state[None].clone(), output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, lower_bound=-5.0,
        state_v_first=True, A_log=x["A_log"].detach(), dt_bias=x["dt_bias"].detach(), backend="reference",
    )  # fmt: skip


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@POOL_IN_PLACE
def test_sglang_numbers(kernel: Any) -> None:
    T, states, track = 140, pool(), torch.zeros(3, H, D, D)
    before, x, (q, k, v) = states.clone(), inputs(T), qkv(packed(T))
    starts = torch.tensor([0, 70, 73, T], dtype=torch.int32)
    slots = torch.tensor([1, -1, 3], dtype=torch.int32)
    o, h = kernel.extend(
        q, k, v, x["g"], x["beta"], ssm_states=states, cache_indices=slots, query_start_loc=starts, A_log=x["A_log"],
        dt_bias=x["dt_bias"], lower_bound=-5.0, beta_is_raw=True, track_state=track,
        track_chunk_idx=torch.tensor([1, -1, 0], dtype=torch.int32), return_intermediate_states=True,
    )  # fmt: skip
    assert h is None and not o[:, 70:73].any()
    for n, slot in ((0, 1), (2, 3)):
        want, last = alone(q, k, v, x, slice(int(starts[n]), int(starts[n + 1])), before[slot])
        close(o[:, starts[n] : starts[n + 1]], want)
        close(states[slot], last[0])
    untouched = [0, 2, 4, 5]
    assert torch.equal(states[untouched], before[untouched]) and torch.equal(track[2], before[3])
    close(track[0], alone(q, k, v, x, slice(0, 64), before[1])[1][0])

    after, scratch = states.clone(), torch.zeros(5, 2, H, D, D)
    x, (q, k, v) = inputs(4), qkv(packed(4))
    o = verify(kernel, ssm_states=states, intermediate_states_buffer=scratch)
    assert torch.equal(states, after) and not scratch[2:].any()
    for n, slot in ((0, 1), (1, 3)):
        for t in range(2):
            want, last = alone(q, k, v, x, slice(2 * n, 2 * n + t + 1), after[slot])
            close(o[:, 2 * n : 2 * n + t + 1], want)
            close(scratch[n, t], last[0])

    o = kernel.packed_decode(
        packed(4), x["g"].reshape(4, H * D), x["beta"], A_log=x["A_log"], dt_bias=x["dt_bias"], scale=D**-0.5,
        ssm_states=states, cache_indices=torch.tensor([1, -1, 0, 5]), num_v_heads=H, head_v_dim=D, lower_bound=-5.0,
    )  # fmt: skip
    assert not o[:, 1].any()
    for n, slot in ((0, 1), (2, 0), (3, 5)):
        want, last = alone(q, k, v, x, slice(n, n + 1), after[slot])
        close(o[:, n : n + 1], want)
        close(states[slot], last[0])


# ---- vLLM

# Parameters of the functions that are replaced, as vllm 0.33.0 has them.
K3, K3_OPS = "vllm.models.kimi_k3.nvidia.kda", "vllm.models.kimi_k3.nvidia.ops.third_party.kda"
GLM, LING = "vllm.models.glm5next.common.kda", "vllm.model_executor.models.bailing_moe_v3"
VLLM = {
    K3: {
        "_flashkda_prefill": "q, k, v, g, beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, out, "
        "final_state, workspace, checkpoint_state=None, checkpoint_offsets=None",
    },
    K3_OPS: {
        "chunk_kda_with_fused_gate": "q, k, v, raw_g, raw_beta, A_log, g_bias, scale=None, initial_state=None, "
        "output_final_state=False, lower_bound=None, use_qk_l2norm_in_kernel=False, cu_seqlens=None, out=None, "
        "**kwargs",
        "fused_recurrent_kda": "q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, "
        "ssm_state_indices, num_accepted_tokens=None, out=None, fuse_gate=None",
        "fused_recurrent_kda_packed_decode": "mixed_qkv, raw_g, raw_beta, A_log, dt_bias, lower_bound, "
        "initial_state, state_indices, scale=None, out=None",
    },
    GLM: {
        "gather_initial_states": "state, indices, has_initial_state",
        "scatter_states": "state, src, indices",
        "Glm5NextLinearAttention._flashkda_prefill": "self, q, k, v, g, beta, initial_state, cu_seqlens, out, "
        "checkpoint=None, raw_qkv=None, conv_state=None, recurrent_state=None",
        "chunk_kda_with_fused_gate": "q, k, v, raw_g, beta, A_log, g_bias, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None, safe_gate=False, "
        "lower_bound=-5.0, **kwargs",
        "fused_recurrent_kda": "q, k, v, g, beta=None, scale=None, initial_state=None, inplace_final_state=True, "
        "use_qk_l2norm_in_kernel=True, cu_seqlens=None, ssm_state_indices=None, num_accepted_tokens=None, out=None, "
        "sigmoid_beta=False, a_log=None, g_bias=None, compute_gate=False, lower_bound=-5.0, **kwargs",
    },
    LING: {
        "chunk_kda": "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, cu_seqlens=None, **kwargs",
        "fused_recurrent_kda": "q, k, v, g, beta=None, scale=None, initial_state=None, inplace_final_state=True, "
        "use_qk_l2norm_in_kernel=True, cu_seqlens=None, ssm_state_indices=None, **kwargs",
        "fused_recurrent_kda_fwd": "q, k, v, g, beta, scale, initial_state, inplace_final_state=True, "
        "cu_seqlens=None, ssm_state_indices=None, num_accepted_tokens=None, use_qk_l2norm_in_kernel=False",
    },
}


def vllm_modules(version: str = "0.33.0", hopper: bool = True, **changed: str | None) -> dict[str, str]:
    """changed: other parameters of a function, or None for no such function."""
    modules = {
        "vllm.version": f"__version__ = {version!r}\n",
        "vllm.platforms": "class current_platform:\n    is_cuda = staticmethod(lambda: True)\n"
        f"    is_device_capability = staticmethod(lambda capability: {hopper})\n",
    }
    for module, functions in VLLM.items():
        source, inside = "", ""
        for path, signature in functions.items():
            *classes, name = path.split(".")
            given = changed.get(name, signature)
            if given is None:
                continue
            if classes and inside != classes[0]:
                source += f"class {classes[0]}:\n"
            inside = classes[0] if classes else ""
            pad = "    " * len(classes)
            source += f"{pad}def {name}({given}):\n{pad}    import vllm as p\n"
            source += f"{pad}    p.calls.append(({name!r}, dict(locals())))\n{pad}    return {name!r}, None\n"
        modules[module] = source
    return modules


@pytest.fixture
def vllm(server: Any) -> ModuleType:
    module = server("vllm", vllm_modules())
    vllm_plugin.register()
    return module


@pytest.fixture
def shown(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_vllm_is_changed_when_a_model_is_loaded(vllm: ModuleType, shown: pytest.LogCaptureFixture) -> None:
    assert not shown.messages and not [x for x in sys.modules if x in VLLM]
    for name, functions in VLLM.items():
        module = importlib.import_module(name)
        for path in functions:
            *classes, last = path.split(".")
            owner = getattr(module, classes[0]) if classes else module
            ours = getattr(owner, last)
            assert ours.__wrapped__.__module__ == name and parameters(ours) == parameters(ours.__wrapped__)
        names = ", ".join(path.split(".")[-1] for path in functions)
        assert shown.messages[-1] == f"kda_cute {kda_cute.__version__}: in {name} replaced {names}"
    assert {x.levelname for x in shown.records} == {"INFO"} and len(shown.records) == len(VLLM)
    own = importlib.import_module(K3)._flashkda_prefill
    vllm_plugin.register()
    assert importlib.import_module(K3)._flashkda_prefill is own and len(shown.records) == len(VLLM)


def test_vllm_off(server: Any, monkeypatch: pytest.MonkeyPatch, shown: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("KDA_CUTE_VLLM", "0")
    server("vllm", vllm_modules())
    vllm_plugin.register()
    assert shown.messages == ["kda_cute: vLLM keeps its kernels, KDA_CUTE_VLLM is 0"]
    assert not hasattr(importlib.import_module(K3)._flashkda_prefill, "__wrapped__")


@pytest.mark.parametrize(
    ("modules", "line"),
    [
        (vllm_modules("0.34.0"), "vLLM keeps its kernels: known is 0.33.x, this is 0.34.0"),
        (vllm_modules("dev"), "vLLM keeps its kernels: known is 0.33.x, this is dev"),
        ({**vllm_modules(), "vllm.version": ""}, "vLLM's plugin failed, kernels of the server stay: ImportError"),
        (vllm_modules(hopper=False), f"{K3} is left alone: needs a Hopper GPU (9.0)"),
        ({**vllm_modules(), "vllm.platforms": ""}, f"the change of {K3} failed, kernels of the server stay: Impo"),
        (vllm_modules(_flashkda_prefill=None), "replaced nothing; left _flashkda_prefill: there is no _flashkda_pre"),
        (vllm_modules(_flashkda_prefill="q, k, v"), "left _flashkda_prefill: parameters of _flashkda_prefill are (q, "),
    ],
    ids=["newer", "dev", "no version", "no Hopper", "no platform", "no function", "another function"],
)  # fmt: skip
def test_vllm_that_is_not_known(
    server: Any, modules: dict[str, str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    server("vllm", modules)
    vllm_plugin.register()
    module = importlib.import_module(K3)
    assert line in caplog.text and {x.levelname for x in caplog.records} == {"WARNING"}
    assert not hasattr(getattr(module, "_flashkda_prefill", None), "__wrapped__")


def test_functions_that_only_work_together_stay_together(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server("vllm", vllm_modules(scatter_states="state, src, indices, mask"))
    vllm_plugin.register()
    module = importlib.import_module(GLM)
    assert not hasattr(module.gather_initial_states, "__wrapped__")
    assert not hasattr(module.Glm5NextLinearAttention._flashkda_prefill, "__wrapped__")
    assert hasattr(module.fused_recurrent_kda, "__wrapped__")
    assert "replaced fused_recurrent_kda; left gather_initial_states, scatter_states, Glm5Next" in caplog.text


def prefill(T: int = 40) -> dict[str, Any]:
    """What vLLM's prefill functions are called with, for sequences of 0 and T tokens."""
    q, k, v = qkv(packed(T))
    return {"q": q, "k": k, "v": v, **inputs(T), "cu_seqlens": torch.tensor([0, 0, T], dtype=torch.int32)}


def test_vllm_k3_prefill(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = Recorder(monkeypatch, "chunk_kda"), prefill()
    first, last, kept = (torch.zeros(2, H, D, D) for _ in range(3))
    offsets, out = torch.tensor([0, 16], dtype=torch.int32), torch.empty(1, 40, H, D)
    call = dict(x, lower_bound=-5.0, initial_state=first, out=out, final_state=last, workspace=torch.empty(1))
    function = importlib.import_module(K3)._flashkda_prefill
    o, state = function(**call)
    assert o is out and state is last and "checkpoint_offsets" not in ours.call
    function(**call, checkpoint_state=kept, checkpoint_offsets=offsets)
    given = ours.calls[-1]
    assert all(same(given[name], x[name]) for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens"))
    assert given["initial_state"] is first and given["final_state"] is last and given["out"] is out
    assert given["checkpoint_state"] is kept and given["checkpoint_offsets"] is offsets
    assert given["use_gate_in_kernel"] and given["use_beta_sigmoid_in_kernel"] and given["use_qk_l2norm_in_kernel"]
    assert given["lower_bound"] == -5.0 and given["state_v_first"] and "state_indices" not in given
    assert not vllm.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_kimi_linear_prefill(vllm: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = Recorder(monkeypatch, "chunk_kda"), prefill()
    first = torch.zeros(2, H, D, D, dtype=dtype)
    o, last = importlib.import_module(K3_OPS).chunk_kda_with_fused_gate(
        q=x["q"], k=x["k"], v=x["v"], raw_g=x["g"], raw_beta=x["beta"], A_log=x["A_log"], g_bias=x["dt_bias"],
        lower_bound=None, initial_state=first, output_final_state=True, use_qk_l2norm_in_kernel=True,
        cu_seqlens=x["cu_seqlens"],
    )  # fmt: skip
    given = ours.call
    assert (o == 7).all() and last is given["final_state"] and last.dtype == dtype and last is not first
    assert same(given["g"], x["g"]) and same(given["beta"], x["beta"]) and same(given["dt_bias"], x["dt_bias"])
    assert given["lower_bound"] is None and given["use_gate_in_kernel"] and given["use_beta_sigmoid_in_kernel"]


def test_vllm_packed_decode(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x, mixed, states = Recorder(monkeypatch, "fused_recurrent_kda"), inputs(3), packed(3), pool()
    indices, out = torch.tensor([4, 0, -1], dtype=torch.int32), torch.empty(1, 5, H, D)[:, 1:4]
    function = importlib.import_module(K3_OPS).fused_recurrent_kda_packed_decode
    call = dict(
        mixed_qkv=mixed, raw_g=x["g"], raw_beta=x["beta"], A_log=x["A_log"].flatten(), dt_bias=x["dt_bias"],
        lower_bound=-5.0, initial_state=states, state_indices=indices,
    )  # fmt: skip
    o, pool_again = function(**call)
    given = ours.call
    assert o.shape == (1, 3, H, D) and pool_again is states and same(given["initial_state"], states)
    assert torch.equal(given["q"].transpose(0, 1), qkv(mixed)[0]) and given["q"].data_ptr() == mixed.data_ptr()
    assert given["g"].shape == (3, 1, H, D) and given["beta"].data_ptr() == x["beta"].data_ptr()
    assert given["null_index"] == 0 and given["state_indices"] is indices and given["state_v_first"]
    assert given.get("scale") is None and given.get("cu_seqlens") is None and given["lower_bound"] == -5.0
    o, _ = function(**call, out=out)
    assert o is out and (out == 7).all() and ours.calls[-1]["out"].shape == (3, 1, H, D)


def test_vllm_speculative_decode(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x, (q, k, v) = Recorder(monkeypatch, "fused_recurrent_kda"), inputs(6), qkv(packed(6))
    states, table = pool(), torch.tensor([[1, 2, 3], [4, 5, 0], [0, 0, 0]], dtype=torch.int32)
    accepted, starts = torch.tensor([2, 1, 1], dtype=torch.int32), torch.tensor([0, 3, 6], dtype=torch.int32)
    out = torch.empty(1, 6, H, D)
    o, again = importlib.import_module(K3_OPS).fused_recurrent_kda(
        q=q, k=k, v=v, raw_g=x["g"], raw_beta=x["beta"], A_log=x["A_log"].flatten(), dt_bias=x["dt_bias"],
        lower_bound=-5.0, initial_state=states, cu_seqlens=starts, ssm_state_indices=table,
        num_accepted_tokens=accepted, out=out,
    )  # fmt: skip
    given = ours.call
    assert (o == 7).all() and given["out"] is out and again is states
    assert same(given["state_indices"], table[:2]) and same(given["num_accepted_tokens"], accepted[:2])
    assert given["null_index"] == 0 and given["use_gate_in_kernel"] and given["use_beta_sigmoid_in_kernel"]


class Exporter:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def export(self, checkpoint: Any, **others: Any) -> None:
        self.calls.append((checkpoint, others))


def glm_layer(x: dict[str, Any]) -> Any:
    layer = importlib.import_module(GLM).Glm5NextLinearAttention()
    layer.A_log, layer.dt_bias, layer.kda_lower_bound, layer.head_dim = x["A_log"], x["dt_bias"], -5.0, D
    layer._checkpoint_exporter = Exporter()
    return layer


ROWS = (torch.tensor([1, 3], dtype=torch.int32), torch.tensor([False, True]))


def test_vllm_glm_prefill_in_place(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is neither gathered nor scattered."""
    ours, x, states, module = Recorder(monkeypatch, "chunk_kda"), prefill(), pool(), importlib.import_module(GLM)
    layer = glm_layer(x)
    arguments = {name: x[name] for name in ("q", "k", "v", "g", "beta", "cu_seqlens")}
    checkpoint = SimpleNamespace(checkpoint_offsets=torch.tensor([0, 16], dtype=torch.int32))
    raw, conv, out = torch.zeros(1), torch.zeros(2), torch.empty(1, 40, H, D)
    first = module.gather_initial_states(states, *ROWS)
    o, last = layer._flashkda_prefill(
        **arguments, initial_state=first, out=out, checkpoint=checkpoint, raw_qkv=raw, conv_state=conv,
        recurrent_state=states,
    )  # fmt: skip
    module.scatter_states(states, last, ROWS[0])
    given = ours.call
    assert o is out and not vllm.calls and same(given["initial_state"], states) and "final_state" not in given
    assert given["state_indices"] is ROWS[0] and given["has_initial_state"] is ROWS[1] and given["null_index"] == 0
    assert given["A_log"] is x["A_log"] and given["lower_bound"] == -5.0
    assert given["checkpoint_offsets"] is checkpoint.checkpoint_offsets
    kept = given["checkpoint_state"]
    assert kept.shape == (2, H, D, D) and kept.dtype == states.dtype
    ((about, others),) = layer._checkpoint_exporter.calls
    assert about is checkpoint and others == {
        "raw_qkv": raw, "conv_state": conv, "recurrent_checkpoint": kept, "recurrent_state": states,
        "cu_seqlens": x["cu_seqlens"],
    }  # fmt: skip
    layer._flashkda_prefill(**arguments, initial_state=first, out=None)
    assert len(layer._checkpoint_exporter.calls) == 1 and ours.calls[-1]["out"] is None


def test_vllm_glm_prefill_that_is_refused(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own functions get gathered states, and scatter theirs."""
    Recorder(monkeypatch, "chunk_kda", ValueError("no"))
    x, states, module = prefill(), pool(), importlib.import_module(GLM)
    layer, checkpoint = glm_layer(x), SimpleNamespace(checkpoint_offsets=torch.zeros(2))
    arguments = {name: x[name] for name in ("q", "k", "v", "cu_seqlens")}
    first = module.gather_initial_states(states, *ROWS)
    gathered = ("gather_initial_states", None)  # what the stand-in returns
    result = layer._flashkda_prefill(
        **arguments, g=x["g"], beta=x["beta"], initial_state=first, out=None, checkpoint=checkpoint
    )
    assert result == ("_flashkda_prefill", None) and not layer._checkpoint_exporter.calls
    result = module.chunk_kda_with_fused_gate(
        **arguments, raw_g=x["g"], beta=x["beta"], A_log=x["A_log"], g_bias=x["dt_bias"], initial_state=first
    )
    assert result == ("chunk_kda_with_fused_gate", None)
    module.scatter_states(states, torch.zeros(2, H, D, D), ROWS[0])
    names = [name for name, _ in vllm.calls]
    assert names == [
        "gather_initial_states", "_flashkda_prefill", "gather_initial_states", "chunk_kda_with_fused_gate",
        "scatter_states",
    ]  # fmt: skip
    assert vllm.calls[1][1]["initial_state"] == vllm.calls[3][1]["initial_state"] == gathered
    assert vllm.calls[1][1]["checkpoint"] is checkpoint and vllm.calls[0][1]["state"] is states


@pytest.mark.parametrize("safe_gate", [True, False])
def test_vllm_glm_chunks(vllm: ModuleType, safe_gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x, states, module = Recorder(monkeypatch, "chunk_kda"), prefill(), pool(), importlib.import_module(GLM)
    o, last = module.chunk_kda_with_fused_gate(
        q=x["q"], k=x["k"], v=x["v"], raw_g=x["g"], beta=x["beta"], A_log=x["A_log"], g_bias=x["dt_bias"],
        initial_state=module.gather_initial_states(states, *ROWS), output_final_state=True,
        use_qk_l2norm_in_kernel=True, cu_seqlens=x["cu_seqlens"], safe_gate=safe_gate, lower_bound=-5.0,
    )  # fmt: skip
    given = ours.call
    assert last is states and given["lower_bound"] == (-5.0 if safe_gate else None) and given["use_gate_in_kernel"]
    assert not given.get("use_beta_sigmoid_in_kernel")  # vLLM has taken its sigmoid


def test_vllm_glm_decode(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x, (q, k, v) = Recorder(monkeypatch, "fused_recurrent_kda"), inputs(3), qkv(packed(3))
    states, starts = pool(), torch.arange(4, dtype=torch.int32)
    function = importlib.import_module(GLM).fused_recurrent_kda
    call = dict(
        q=q, k=k, v=v, g=x["g"], beta=x["beta"], initial_state=states, use_qk_l2norm_in_kernel=True,
        cu_seqlens=starts, ssm_state_indices=torch.tensor([4, 0, 2, 0, 0], dtype=torch.int32), sigmoid_beta=True,
        a_log=x["A_log"], g_bias=x["dt_bias"], compute_gate=True, lower_bound=-5.0,
    )  # fmt: skip
    o, again = function(**call)
    given = ours.call
    assert (o == 7).all() and again is states and given["state_indices"].tolist() == [4, 0, 2]
    assert given["use_gate_in_kernel"] and given["use_beta_sigmoid_in_kernel"] and given["A_log"] is x["A_log"]
    assert given["null_index"] == 0 and given["lower_bound"] == -5.0 and "num_accepted_tokens" not in given
    assert function(**{**call, "inplace_final_state": False}) == ("fused_recurrent_kda", None)
    assert function(**call, unheard_of=1) == ("fused_recurrent_kda", None) and len(ours.calls) == 1
    assert vllm.calls[-1][1]["kwargs"] == {"unheard_of": 1}


@pytest.mark.parametrize(("lower_bound", "safe"), [(-5.0, True), (-8.0, False)])
def test_vllm_ling_prefill(vllm: ModuleType, lower_bound: float, safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x, first = Recorder(monkeypatch, "chunk_kda"), prefill(), torch.zeros(2, H, D, D)
    _, last = importlib.import_module(LING).chunk_kda(
        q=x["q"], k=x["k"], v=x["v"], g=-x["g"].abs(), beta=x["beta"].sigmoid(), initial_state=first,
        output_final_state=True, use_qk_l2norm_in_kernel=True, safe_gate=True, lower_bound=lower_bound,
        cu_seqlens=x["cu_seqlens"],
    )  # fmt: skip
    given = ours.call
    assert last is given["final_state"] and given["safe_gate"] is safe and "lower_bound" not in given
    assert not given.get("use_gate_in_kernel") and not given.get("use_beta_sigmoid_in_kernel")


def test_vllm_ling_decode(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x, (q, k, v) = Recorder(monkeypatch, "fused_recurrent_kda"), inputs(4), qkv(packed(4))
    states, module = pool(), importlib.import_module(LING)
    call = dict(q=q, k=k, v=v, g=-x["g"].abs(), beta=x["beta"].sigmoid(), initial_state=states)
    module.fused_recurrent_kda(
        **call, use_qk_l2norm_in_kernel=True, safe_gate=True, lower_bound=-5.0,
        cu_seqlens=torch.arange(5, dtype=torch.int32), ssm_state_indices=torch.tensor([1, 2, 0, 3]),
    )  # fmt: skip
    module.fused_recurrent_kda_fwd(
        **call, scale=0.5, inplace_final_state=True, cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32),
        ssm_state_indices=torch.tensor([[1, 2], [3, 4]]), num_accepted_tokens=torch.tensor([1, 2]),
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    plain, speculative = ours.calls
    assert plain["state_indices"].tolist() == [1, 2, 0, 3] and plain.get("scale") is None
    assert speculative["num_accepted_tokens"].tolist() == [1, 2] and speculative["scale"] == 0.5
    for given in ours.calls:
        assert given["null_index"] == 0 and given["state_v_first"] and same(given["initial_state"], states)
        assert not given.get("use_gate_in_kernel") and "lower_bound" not in given
    per_value = {**call, "beta": torch.zeros(1, 4, H, D)}
    result = module.fused_recurrent_kda_fwd(**per_value, scale=0.5, cu_seqlens=torch.arange(5))
    assert result == ("fused_recurrent_kda_fwd", None)


def test_vllm_runs_what_is_refused(
    vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Recorder(monkeypatch, "chunk_kda", ValueError("K is 256: must be at most 128"))
    x, function = prefill(), importlib.import_module(K3)._flashkda_prefill
    call = dict(x, lower_bound=-5.0, initial_state=None, out=None, final_state=None, workspace=None)
    for _ in range(3):
        assert function(**call) == ("_flashkda_prefill", None)
    (line,) = [x for x in caplog.messages if "own kernel" in x]
    assert line.endswith("_flashkda_prefill goes to the server's own kernel: K is 256: must be at most 128")
    assert len(vllm.calls) == 3 and all(vllm.calls[0][1][name] is value for name, value in call.items())


@POOL_IN_PLACE
def test_vllm_numbers(vllm: ModuleType) -> None:
    T, states, module = 40, pool(), importlib.import_module(GLM)
    x, before = prefill(T), states.clone()
    x["cu_seqlens"] = torch.tensor([0, 17, T], dtype=torch.int32)
    q, k, v = x["q"], x["k"], x["v"]
    checkpoint = SimpleNamespace(checkpoint_offsets=torch.tensor([0, 16], dtype=torch.int32))
    layer = glm_layer(x)
    o, last = layer._flashkda_prefill(
        q, k, v, x["g"], x["beta"], module.gather_initial_states(states, *ROWS), x["cu_seqlens"], None, checkpoint
    )
    kept = layer._checkpoint_exporter.calls[0][1]["recurrent_checkpoint"]
    module.scatter_states(states, last, ROWS[0])
    for slot, tokens, state in ((1, slice(0, 17), None), (3, slice(17, T), before[3])):
        want, final = alone(q, k, v, x, tokens, state)
        close(o[:, tokens], want)
        close(states[slot], final[0])
    close(kept[1], alone(q, k, v, x, slice(17, 33), before[3])[1][0])
    assert torch.equal(states[[0, 2, 4, 5]], before[[0, 2, 4, 5]])

    after, x, mixed = states.clone(), inputs(3), packed(3)
    ops = importlib.import_module(K3_OPS)
    o, _ = ops.fused_recurrent_kda_packed_decode(
        mixed, x["g"], x["beta"], x["A_log"].flatten(), x["dt_bias"], -5.0, states, torch.tensor([4, 0, 2])
    )
    assert not o[:, 1].any() and torch.equal(states[0], after[0])
    for n, slot in ((0, 4), (2, 2)):
        want, final = alone(*qkv(mixed), x, slice(n, n + 1), after[slot])
        close(o[:, n : n + 1], want)
        close(states[slot], final[0])

    after, x, (q, k, v) = states.clone(), inputs(4), qkv(packed(4))
    table, accepted = torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 1])
    o, _ = ops.fused_recurrent_kda(
        q, k, v, x["g"], x["beta"], x["A_log"].flatten(), x["dt_bias"], -5.0, states,
        torch.tensor([0, 2, 4], dtype=torch.int32), table, accepted,
    )  # fmt: skip
    for n, start in ((0, 2), (1, 3)):
        for t in range(2):
            tokens = slice(2 * n, 2 * n + t + 1)
            want, final = alone(q, k, v, x, tokens, after[start])
            close(o[:, tokens], want)
            close(states[table[n, t]], final[0])


# ---- what both share


def test_a_callback_after_an_import(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    log, seen = logging.getLogger("test"), []
    server("tiny_server", {"tiny_server.a": "x = 1\n", "tiny_server.b": "y = 2\n"})
    when_imported("tiny_server.a", lambda module: seen.append(module.x), log)
    when_imported("tiny_server.a", lambda module: 1 / 0, log)
    assert importlib.util.find_spec("tiny_server.a") is not None and not seen  # looking is not importing
    module = importlib.import_module("tiny_server.a")
    assert (
        seen == [1] and "the change of tiny_server.a failed" in caplog.text and inspect.getsource(module) == "x = 1\n"
    )
    when_imported("tiny_server.a", lambda module: seen.append(module.x + 1), log)  # it has been imported
    importlib.import_module("tiny_server.b")
    assert seen == [1, 2]


def test_entry_points_exist() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for group, target in {
        "sglang.srt.plugins": "kda_cute.integrations.sglang:register",
        "vllm.general_plugins": "kda_cute.integrations.vllm:register",
    }.items():
        assert f'[project.entry-points."{group}"]\nkda_cute = "{target}"' in text
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))
