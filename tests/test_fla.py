"""The backend for flash-linear-attention: what it takes, what it leaves and why. Runs on fla if that is installed (and
imports, which takes triton), else on as much of fla as the backend sees."""

from __future__ import annotations

import importlib
import os
import re
import sys
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kda_cute import devices
from kda_cute.call import DIFFERENTIABLE
from kda_cute.ops import chunk_kda
from tests.strategies import Case, make
from tests.test_contract import OnGpu, kernel, on_gpu  # noqa: F401

H, D, T = 2, 128, 20
SAFE = Case(1, (T,), H=H, initial_state="fp32", final_state="new", state_v_first=True)
PACKED = Case(1, (7, 13), "int64", H=H, initial_state="fp32", final_state="new")
LOG = Case(1, (T,), H=H, gate="log", decay="extreme")
SOFTPLUS = Case(1, (T,), H=H, group=3, gate="softplus", decay="extreme", initial_state="fp32")


def stand_in() -> dict[str, ModuleType]:
    """fla 0.6's registration and dispatch, in short; its chunk_kda says that it was called."""

    class BaseBackend:
        env_var: str | None = None

        def is_enabled(self) -> bool:
            return os.environ.get(self.env_var or "", "1") != "0"

    backends: list[Any] = []

    def default(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
        lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False,
        cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs,
    ):  # fmt: skip
        raise LookupError("fla's own")

    @wraps(default)
    def chunk_kda(*args: Any, **kwargs: Any) -> Any:
        for backend in backends:
            if backend.is_available() and backend.is_enabled() and backend.chunk_kda_verifier(*args, **kwargs)[0]:
                return backend.chunk_kda(*args, **kwargs)
        return default(*args, **kwargs)

    def register(function: Any) -> Any:
        assert function is chunk_kda or function == "kda"
        return lambda backend: (backends if function is chunk_kda else decoders).append(backend()) or backend

    decoders: list[Any] = []

    def fused_recurrent_kda_fwd(
        q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None, output_final_state=False,
        inplace_final_state=True, state_v_first=False, cu_seqlens=None, ssm_state_indices=None,
        num_accepted_tokens=None, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
        use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, out=None, **kwargs,
    ):  # fmt: skip
        raise LookupError("fla's own")

    @wraps(fused_recurrent_kda_fwd)
    def decode(*args: Any, **kwargs: Any) -> Any:
        for backend in decoders:
            if backend.is_available() and backend.is_enabled():
                if backend.fused_recurrent_kda_fwd_verifier(*args, **kwargs)[0]:
                    return backend.fused_recurrent_kda_fwd(*args, **kwargs)
        return fused_recurrent_kda_fwd(*args, **kwargs)

    names = {
        "fla": {}, "fla.backends": dict(BaseBackend=BaseBackend, register=register), "fla.ops": {},
        "fla.ops.kda": dict(chunk_kda=chunk_kda),
        "fla.ops.kda.fused_recurrent": dict(fused_recurrent_kda_fwd=decode),
    }  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    for name, content in names.items():
        vars(modules[name]).update(content)
    return modules


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(the backend's module, fla's chunk_kda with the backend registered), on what says that it is a Hopper GPU."""
    try:
        import fla.ops.kda  # noqa: F401
    except ImportError:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kda_cute.fla", raising=False)
    module = importlib.import_module("kda_cute.fla")
    monkeypatch.setattr(devices, "is_hopper", lambda index: True)
    monkeypatch.setattr(module._Backend, "is_available", classmethod(lambda cls: True))
    monkeypatch.delenv("FLA_KDA_CUTE", raising=False)
    return SimpleNamespace(
        chunk_kda=sys.modules["fla.ops.kda"].chunk_kda,
        verify=module.KdaCuteBackend().chunk_kda_verifier,
        decode=sys.modules["fla.ops.kda.fused_recurrent"].fused_recurrent_kda_fwd,
        verify_decode=module.KdaCuteDecodeBackend().fused_recurrent_kda_fwd_verifier,
    )


def case_arguments(case: Case = SAFE, **changes: Any) -> dict[str, Any]:
    return {**on_gpu(make(case).kwargs), **changes}


@pytest.mark.parametrize("case", [SAFE, PACKED, LOG, SOFTPLUS], ids=["safe", "packed", "log", "softplus"])
def test_calls_go_to_the_kernel(case: Case, fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    kwargs = case_arguments(case)
    assert fla.verify(**kwargs) == (True, None)
    o, S = fla.chunk_kda(**kwargs)
    (tensors, options), = kernel  # fmt: skip
    assert tensors["q"] is kwargs["q"] and options["initial_state"] is kwargs.get("initial_state")
    assert (o == 1).all() and (S is None if case.final_state is None else (S == 2).all())


def test_arguments_by_position_are_in_flas_order(fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    x = case_arguments(SAFE)
    names = (
        "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel",
        "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "safe_gate", "lower_bound",
    )  # fmt: skip
    by_position = [x[name] for name in names] + [True, False, x["state_v_first"]]  # recompute, intermediate states
    fla.chunk_kda(*by_position, A_log=x["A_log"], dt_bias=x["dt_bias"], cu_seqlens_cpu=None, use_graph=True)
    chunk_kda(**x)
    (_, got), (_, want) = kernel
    assert got["state_v_first"] is True and got["lower_bound"] == -5.0
    assert all(got[name] is want[name] or got[name] == want[name] for name in got if name not in ("o", "final_state"))


def test_what_fla_ignores_is_ignored(fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    fla.chunk_kda(**case_arguments(LOG, A_log=torch.zeros(H), dt_bias=torch.zeros(H * D), cp_context=None))
    assert kernel[0][1]["A_log"] is None and kernel[0][1]["dt_bias"] is None


DECLINED: dict[str, tuple[Case, dict[str, Any], str]] = {
    "cpu": (SAFE, dict(q=torch.zeros(1, T, H, D, dtype=torch.bfloat16)), "needs a Hopper GPU: q is on cpu"),
    "K": (Case(1, (T,), H=H, K=32), {}, "q has K = 32: must be 64 or 128$"),
    "fp32": (Case(1, (T,), H=H, dtype="fp32"), {}, "q, k and v are float32"),
    "lower bound": (SAFE, dict(lower_bound=-7.0, safe_gate=False), r"lower_bound is -7.0: must be in \[-5, 0\)"),
    "shape": (SAFE, dict(beta=torch.zeros(1, T, H + 1)), "beta has shape"),
    "context parallel": (SAFE, dict(cp_context=object()), "no context parallelism"),
    "unknown": (SAFE, dict(head_first=False), "does not know the argument head_first"),
}


@pytest.mark.parametrize("case, changes, why", DECLINED.values(), ids=DECLINED)
def test_declines(case: Case, changes: dict[str, Any], why: str, fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    accepted, reason = fla.verify(**case_arguments(case, **changes))
    assert not accepted and reason.startswith("kda_cute") and re.search(why, reason), reason
    with pytest.raises(Exception):  # noqa: B017 - fla's own path, which has no GPU here
        fla.chunk_kda(**case_arguments(case, **changes))
    assert not kernel


def test_declines_gradients(fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    kwargs = case_arguments()
    kwargs["A_log"].requires_grad_()
    assert "no backward" in fla.verify(**kwargs)[1]
    with torch.no_grad():
        assert fla.verify(**kwargs) == (True, None)


def decode_arguments(case: Case, **changes: Any) -> dict[str, Any]:
    kwargs = {**case_arguments(case), "inplace_final_state": False, **changes}
    return {name: x for name, x in kwargs.items() if name != "safe_gate"}


ONE = Case(1, (1,) * 4, H=H, initial_state="fp32", state_v_first=True)


@pytest.mark.parametrize("case", [SAFE, PACKED, LOG, SOFTPLUS, ONE], ids=["safe", "packed", "log", "softplus", "one"])
def test_decoding_goes_to_the_kernel(case: Case, fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    kwargs = decode_arguments(case)
    assert fla.verify_decode(**kwargs) == (True, None)
    o, S = fla.decode(**kwargs)
    (tensors, options), = kernel  # fmt: skip
    assert tensors["q"] is kwargs["q"] and options["initial_state"] is kwargs.get("initial_state")
    assert (o == 1).all() and (S is None if case.final_state is None else (S == 2).all())


def test_decoding_in_place_and_from_a_pool(fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    kwargs = decode_arguments(ONE, inplace_final_state=True)
    assert fla.decode(**kwargs)[1] is kwargs["initial_state"]
    pool, indices = torch.zeros(7, *ONE.state_shape[1:]), torch.tensor([3, 0, 6, -1])
    kwargs = decode_arguments(ONE, inplace_final_state=True, initial_state=pool, ssm_state_indices=indices)
    assert fla.decode(**kwargs)[1] is pool
    assert kernel[1][1]["state_indices"] is indices
    slots = dict(ssm_state_indices=indices.int().view(4, 1), num_accepted_tokens=torch.ones(4, dtype=torch.int32))
    assert fla.decode(**{**kwargs, **slots})[1] is pool
    assert kernel[2][1]["state_indices"] is slots["ssm_state_indices"]


def test_decoding_keeps_no_gradient(fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    kwargs = decode_arguments(ONE)
    kwargs["A_log"].requires_grad_()
    assert not fla.decode(**kwargs)[0].requires_grad and len(kernel) == 1


DECODE_DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "accepted": (dict(num_accepted_tokens=torch.ones(4)), "num_accepted_tokens is float32"),
    "beta": (dict(beta=torch.zeros(4, 1, H, D)), "beta has a value for each channel"),
    "indices": (dict(ssm_state_indices=torch.zeros(2, dtype=torch.int32)), "ssm_state_indices are given"),
    "indices of another batch": (
        dict(ssm_state_indices=torch.zeros(3, 2, dtype=torch.int32), inplace_final_state=True),
        r"state_indices has shape [3, 2]",
    ),
    "shape": (dict(beta=torch.zeros(4, 1, H + 1)), "beta has shape"),
}


@pytest.mark.parametrize("changes, why", DECODE_DECLINED.values(), ids=DECODE_DECLINED)
def test_decoding_declines(changes: dict[str, Any], why: str, fla: Any, kernel: list[Any]) -> None:  # noqa: F811
    accepted, reason = fla.verify_decode(**decode_arguments(ONE, **changes))
    assert not accepted and reason is not None and why in reason and not kernel


def test_a_gpu_of_rocm_is_no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kda_cute.fla", raising=False)
    module = importlib.import_module("kda_cute.fla")
    monkeypatch.delitem(sys.modules, "kda_cute.fla")
    monkeypatch.setattr(devices, "gpu", lambda index: ((9, 0), "a GPU"))
    assert devices.is_hopper(0)
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert not devices.is_hopper(0)


def test_off_by_environment(fla: Any, kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("FLA_KDA_CUTE", "0")
    with pytest.raises(Exception):  # noqa: B017 - fla's own path, which has no GPU here
        fla.chunk_kda(**case_arguments())
    assert not kernel
    monkeypatch.setenv("FLA_KDA_CUTE", "1")
    fla.chunk_kda(**case_arguments())
    assert len(kernel) == 1


def test_without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.backends", None)
    monkeypatch.delitem(sys.modules, "kda_cute.fla", raising=False)
    with pytest.raises(ImportError, match=r"kda_cute\.fla needs fla-core >= 0\.6"):
        importlib.import_module("kda_cute.fla")


# ---- gradients of our own chunk_kda


@pytest.mark.parametrize("case", [SAFE, PACKED], ids=["fixed", "packed"])
def test_backward_by_fla(case: Case, kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """fla's chunk_kda gets the call as it was, states and parameters in fp32; gradients of tokens that no sequence has
    are zero, though fla leaves them as they were."""
    seen: list[dict[str, Any]] = []

    def fla_chunk_kda(*qkvgb: torch.Tensor, **options: Any) -> Any:
        seen.append(options)
        return chunk_kda(*qkvgb, **{**options, "backend": "reference"})

    monkeypatch.setattr("kda_cute.gradients.fla", lambda: fla_chunk_kda)
    monkeypatch.setattr(OnGpu, "detach", lambda self: torch.Tensor.detach(self).as_subclass(OnGpu), raising=False)
    kwargs = make(case).kwargs
    kwargs["initial_state"] = kwargs["initial_state"].bfloat16()
    leaves = [kwargs[name] for name in DIFFERENTIABLE]
    for x in leaves:
        x.requires_grad_()
    o, S = chunk_kda(**on_gpu(kwargs))
    got = torch.autograd.grad([o.float().sum(), S.sum()], leaves)
    want = torch.autograd.grad([x.float().sum() for x in chunk_kda(**kwargs)], leaves)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    (options,) = seen
    assert options["initial_state"].dtype == options["A_log"].dtype == torch.float32
    assert options["dt_bias"].shape == (H * D,) and "backend" not in options


def test_backward_by_fla_looks_at_cu_seqlens(kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """fla's kernels would write where it says, outside of the gradients too."""
    monkeypatch.setattr("kda_cute.gradients.fla", lambda: pytest.fail)
    monkeypatch.setattr(OnGpu, "detach", lambda self: torch.Tensor.detach(self).as_subclass(OnGpu), raising=False)
    kwargs = make(PACKED).kwargs
    kwargs["v"].requires_grad_()
    kwargs["cu_seqlens"] = torch.tensor([0, 7, T + 1])
    o, _ = chunk_kda(**on_gpu(kwargs))
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 21: must be at most T = 20"):
        o.float().sum().backward()
