"""The argument contract: one test for each error, and what a call that is right returns and writes."""

from __future__ import annotations

import inspect
import logging
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kda_cute import checkpoints, contract, devices, known_calls
from kda_cute.backends import hopper
from kda_cute.call import Call
from kda_cute.ops import chunk_kda, fused_recurrent_kda, fwd
from kda_cute.reference import chunked
from tests.strategies import DTYPES, Case, cases, make

B, T, H, D = 1, 20, 2, 128
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SAFE = Case(1, (T,) * B, H=H)
LOG = Case(1, (T,) * B, H=H, gate="log")
VARLEN = Case(1, (7, 13), "int64", H=H, state_v_first=True, initial_state="fp32")
SOFTPLUS = Case(1, (T,) * B, H=H, gate="softplus")


def arguments(case: Case = SAFE, **changes: Any) -> dict[str, Any]:
    return {**make(case).kwargs, **changes}


def zeros(*shape: int, dtype: torch.dtype = bf16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


BAD = {
    # not a tensor
    "q-list": (SAFE, dict(q=[1.0]), TypeError, "q is a list: must be a torch.Tensor"),
    "k-none": (SAFE, dict(k=None), TypeError, "k is a NoneType"),
    "v-float": (SAFE, dict(v=1.0), TypeError, "v is a float"),
    "g-none": (SAFE, dict(g=None), TypeError, "g is a NoneType"),
    "beta-float": (SAFE, dict(beta=0.5), TypeError, "beta is a float"),
    "A_log-float": (SAFE, dict(A_log=0.5), TypeError, "A_log is a float"),
    "dt_bias-list": (SAFE, dict(dt_bias=[0.5]), TypeError, "dt_bias is a list"),
    "cu_seqlens-list": (SAFE, dict(cu_seqlens=[0, T]), TypeError, "cu_seqlens is a list"),
    "initial_state-list": (SAFE, dict(initial_state=[0]), TypeError, "initial_state is a list"),
    "final_state-true": (SAFE, dict(final_state=True), TypeError, "final_state is a bool"),
    "out-true": (SAFE, dict(out=True), TypeError, "out is a bool"),
    "scale-tensor": (SAFE, dict(scale=torch.tensor(1.0)), TypeError, "scale is a Tensor: must be a float"),
    "scale-str": (SAFE, dict(scale="1"), TypeError, "scale is a str"),
    "lower_bound-str": (SAFE, dict(lower_bound="-5"), TypeError, "lower_bound is a str"),
    # dtype
    "q-int": (SAFE, dict(q=zeros(B, T, H, D, dtype=torch.int32)), TypeError, "q is int32: must be bfloat16 or"),
    "k-dtype": (SAFE, dict(k=zeros(B, T, H, D, dtype=fp32)), TypeError, "k is float32: must be bfloat16 like q"),
    "v-dtype": (SAFE, dict(v=zeros(B, T, H, D, dtype=fp16)), TypeError, "v is float16: must be bfloat16 like q"),
    "g-dtype": (SAFE, dict(g=zeros(B, T, H, D, dtype=torch.int8)), TypeError, "g is int8"),
    "beta-dtype": (SAFE, dict(beta=zeros(B, T, H, dtype=torch.bool)), TypeError, "beta is bool"),
    "A_log-dtype": (SAFE, dict(A_log=zeros(H, dtype=torch.int64)), TypeError, "A_log is int64"),
    "dt_bias-dtype": (SAFE, dict(dt_bias=zeros(H, D, dtype=torch.int64)), TypeError, "dt_bias is int64"),
    "cu_seqlens-dtype": (
        SAFE,
        dict(cu_seqlens=torch.tensor([0.0, T])),
        TypeError,
        "cu_seqlens is float32: must be int",
    ),
    "initial_state-fp16": (
        SAFE,
        dict(initial_state=zeros(B, H, D, D, dtype=fp16)),
        TypeError,
        "initial_state is float16",
    ),
    "initial_state-fp64": (
        SAFE,
        dict(initial_state=zeros(B, H, D, D, dtype=fp64)),
        TypeError,
        "initial_state is float64",
    ),
    "final_state-fp16": (SAFE, dict(final_state=zeros(B, H, D, D, dtype=fp16)), TypeError, "final_state is float16"),
    "out-dtype": (SAFE, dict(out=zeros(B, T, H, D, dtype=fp32)), TypeError, "out is float32: must be bfloat16 like q"),
    # shape
    "q-3d": (SAFE, dict(q=zeros(T, H, D)), ValueError, r"q has shape \[20, 2, 128\]: must be \[B, T, H, K\]"),
    "q-no-heads": (SAFE, dict(q=zeros(B, T, 0, D)), ValueError, "q has shape"),
    "q-no-channels": (SAFE, dict(q=zeros(B, T, H, 0)), ValueError, "q has shape"),
    "k-heads": (SAFE, dict(k=zeros(B, T, H + 1, D)), ValueError, "k has shape"),
    "k-tokens": (SAFE, dict(k=zeros(B, T + 1, H, D)), ValueError, "k has shape"),
    "v-3d": (SAFE, dict(v=zeros(T, H, D)), ValueError, "v has shape"),
    "v-batch": (SAFE, dict(v=zeros(B + 1, T, H, D)), ValueError, "v has shape"),
    "v-tokens": (SAFE, dict(v=zeros(B, T + 1, H, D)), ValueError, "v has shape"),
    "v-heads": (SAFE, dict(v=zeros(B, T, H + 1, D)), ValueError, "v has shape .* multiple of q's H = 2"),
    "v-no-heads": (SAFE, dict(v=zeros(B, T, 0, D)), ValueError, "v has shape"),
    "g-channels": (SAFE, dict(g=zeros(B, T, H, D - 1)), ValueError, "g has shape"),
    "g-heads": (SAFE, dict(g=zeros(B, T, H)), ValueError, "g has shape"),
    "beta-heads": (SAFE, dict(beta=zeros(B, T, H + 1)), ValueError, "beta has shape"),
    "A_log-heads": (SAFE, dict(A_log=zeros(H + 1)), ValueError, r"A_log has shape \[3\]: must be \[2\], \[HV\]"),
    "dt_bias-heads": (SAFE, dict(dt_bias=zeros(H)), ValueError, "dt_bias has shape"),
    "dt_bias-swapped": (SAFE, dict(dt_bias=zeros(D, H)), ValueError, "dt_bias has shape"),
    "initial_state-count": (SAFE, dict(initial_state=zeros(B + 1, H, D, D)), ValueError, "initial_state has shape"),
    "initial_state-varlen": (VARLEN, dict(initial_state=zeros(1, H, D, D)), ValueError, "initial_state has shape"),
    "initial_state-heads": (SAFE, dict(initial_state=zeros(B, H + 1, D, D)), ValueError, "initial_state has shape"),
    "final_state-count": (SAFE, dict(final_state=zeros(B + 1, H, D, D)), ValueError, "final_state has shape"),
    "final_state-strides": (
        SAFE,
        dict(final_state=zeros(B, H, D, 2 * D)[..., :D]),
        ValueError,
        "final_state has strides .* must be contiguous",
    ),
    "out-shape": (SAFE, dict(out=zeros(B, T + 1, H, D)), ValueError, "out has shape"),
    "cu_seqlens-2d": (VARLEN, dict(cu_seqlens=torch.tensor([[0, T]])), ValueError, "cu_seqlens has shape"),
    "cu_seqlens-empty": (
        VARLEN,
        dict(cu_seqlens=torch.tensor([], dtype=torch.int64)),
        ValueError,
        "cu_seqlens has shape",
    ),
    "batch-and-cu_seqlens": (
        Case(1, (5, 5), H=H),
        dict(cu_seqlens=torch.tensor([0, 10])),
        ValueError,
        "q has B = 2: must be 1 with cu_seqlens",
    ),
    # device
    **{
        f"{name}-device": (
            VARLEN,
            {name: zeros(*shape, dtype=dtype, device="meta")},
            ValueError,
            f"{name} is on meta: must be on cpu like q",
        )
        for name, shape, dtype in [
            ("k", (B, T, H, D), bf16),
            ("v", (B, T, H, D), bf16),
            ("g", (B, T, H, D), bf16),
            ("beta", (B, T, H), bf16),
            ("A_log", (H,), fp32),
            ("dt_bias", (H * D,), fp32),
            ("cu_seqlens", (3,), torch.int64),
            ("initial_state", (2, H, D, D), fp32),
            ("final_state", (2, H, D, D), fp32),
            ("out", (B, T, H, D), bf16),
        ]
    },
    # values and combinations
    "lower_bound-low": (SAFE, dict(lower_bound=-5.01), ValueError, r"lower_bound is -5.01: must be in \[-5, 0\)"),
    "lower_bound-zero": (SAFE, dict(lower_bound=0.0), ValueError, "lower_bound is 0.0"),
    "lower_bound-nan": (SAFE, dict(lower_bound=math.nan), ValueError, "lower_bound is nan"),
    "lower_bound-missing": (SAFE, dict(lower_bound=None), ValueError, "lower_bound is None: must be in"),
    "A_log-missing": (SOFTPLUS, dict(A_log=None), ValueError, "A_log is None: must be a tensor"),
    "A_log-extra": (LOG, dict(A_log=zeros(H)), ValueError, "A_log is given: must be None unless use_gate_in_kernel"),
    "dt_bias-extra": (LOG, dict(dt_bias=zeros(H, D)), ValueError, "dt_bias is given: must be None unless"),
    "neg_eigval-alone": (
        SAFE,
        dict(allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False),
        ValueError,
        "allow_neg_eigval is True: must be False unless",
    ),
    "scale-nan": (SAFE, dict(scale=math.nan), ValueError, "scale is nan: must be finite"),
    "backend-unknown": (SAFE, dict(backend="triton"), ValueError, "backend is 'triton': must be None"),
    "backend-cute-cpu": (SAFE, dict(backend="cute"), ValueError, "q is on cpu: must be on a CUDA device .*reference"),
    "out-and-grad": (
        SAFE,
        dict(q=zeros(B, T, H, D).requires_grad_(), out=zeros(B, T, H, D)),
        NotImplementedError,
        "q requires grad: out, final_state and state_indices must be None",
    ),
    # a pool of states
    "indices-list": (VARLEN, dict(state_indices=[0, 1]), TypeError, "state_indices is a list"),
    "indices-dtype": (
        VARLEN,
        dict(state_indices=torch.tensor([0.0, 1.0])),
        TypeError,
        "state_indices is float32: must be int32 or int64",
    ),
    "indices-shape": (
        VARLEN,
        dict(state_indices=zeros(3, dtype=torch.int32)),
        ValueError,
        r"state_indices has shape \[3\]: must be \[2\], \[N\]",
    ),
    "indices-of-tokens": (
        VARLEN,
        dict(state_indices=zeros(2, 3, dtype=torch.int32), initial_state=zeros(5, H, D, D, dtype=fp32)),
        ValueError,
        r"state_indices has shape \[2, 3\]: must be \[2\], \[N\]$",
    ),
    "null-index": (VARLEN, dict(null_index=1), ValueError, "null_index is 1: must be -1 or 0"),
    "null-index-None": (VARLEN, dict(null_index="0"), ValueError, "null_index is '0': must be -1 or 0"),
    "has-no-state": (
        SAFE,
        dict(has_initial_state=zeros(B, dtype=torch.bool), initial_state=None),
        ValueError,
        "initial_state is None: must be given with has_initial_state",
    ),
    "has-dtype": (
        SAFE,
        dict(has_initial_state=zeros(B, dtype=torch.int32), initial_state=zeros(B, H, D, D, dtype=fp32)),
        TypeError,
        "has_initial_state is int32: must be bool",
    ),
    "has-shape": (
        VARLEN,
        dict(has_initial_state=zeros(3, dtype=torch.bool), initial_state=zeros(2, H, D, D, dtype=fp32)),
        ValueError,
        r"has_initial_state has shape \[3\]: must be \[2\], \[N\]",
    ),
    # checkpoints at offsets
    "offsets-without-state": (
        VARLEN,
        dict(checkpoint_offsets=zeros(2, dtype=torch.int32)),
        ValueError,
        "checkpoint_state is None: must be a tensor with checkpoint_offsets",
    ),
    "state-without-offsets": (
        VARLEN,
        dict(checkpoint_state=zeros(2, H, D, D, dtype=fp32)),
        ValueError,
        "checkpoint_state is given: must be None without checkpoint_offsets",
    ),
    "offsets-shape": (
        VARLEN,
        dict(checkpoint_offsets=zeros(3, dtype=torch.int32), checkpoint_state=zeros(2, H, D, D, dtype=fp32)),
        ValueError,
        r"checkpoint_offsets has shape \[3\]: must be \[2\], \[N\], or",
    ),
    "offsets-dtype": (
        VARLEN,
        dict(checkpoint_offsets=zeros(2, dtype=fp32), checkpoint_state=zeros(2, H, D, D, dtype=fp32)),
        TypeError,
        "checkpoint_offsets is float32: must be int32 or int64",
    ),
    "checkpoint-shape": (
        VARLEN,
        dict(checkpoint_offsets=zeros(2, 3, dtype=torch.int32), checkpoint_state=zeros(2, H, D, D, dtype=fp32)),
        ValueError,
        r"checkpoint_state has shape \[2, 2, 128, 128\]: must be \[2, 3, 2, 128, 128\]",
    ),
    "checkpoint-indices-shape": (
        VARLEN,
        dict(
            checkpoint_offsets=zeros(2, 3, dtype=torch.int32),
            checkpoint_indices=zeros(2, dtype=torch.int32),
            checkpoint_state=zeros(7, H, D, D, dtype=fp32),
        ),
        ValueError,
        r"checkpoint_indices has shape \[2\]: must be \[2, 3\]",
    ),
    "checkpoint-indices-past-the-pool": (
        VARLEN,
        dict(
            checkpoint_offsets=torch.tensor([1, 2]),
            checkpoint_indices=torch.tensor([1, 7]),
            checkpoint_state=zeros(7, H, D, D, dtype=fp32),
        ),
        ValueError,
        r"checkpoint_indices\[1\] is 7: must be below P = 7",
    ),
    "both-kinds-of-checkpoints": (
        VARLEN,
        dict(
            checkpoint_interval=32,
            checkpoint_offsets=torch.tensor([1, 2]),
            checkpoint_state=zeros(2, H, D, D, dtype=fp32),
        ),
        ValueError,
        "checkpoint_offsets is given: must be None with checkpoint_interval",
    ),
    "indices-no-pool": (
        VARLEN,
        dict(state_indices=zeros(2, dtype=torch.int32), initial_state=None),
        ValueError,
        "initial_state is None: must be the pool|final_state is None: must be a pool",
    ),
    "indices-strided-pool": (
        VARLEN,
        dict(state_indices=zeros(2, dtype=torch.int32), initial_state=zeros(5, H, D, 2 * D, dtype=fp32)[..., :D]),
        ValueError,
        "initial_state, updated in place, has strides .* must be contiguous",
    ),
    "indices-past-the-pool": (
        VARLEN,
        dict(state_indices=torch.tensor([0, 5], dtype=torch.int32), initial_state=zeros(5, H, D, D, dtype=fp32)),
        ValueError,
        r"state_indices\[1\] is 5: must be below P = 5",
    ),
    "indices-twice": (
        VARLEN,
        dict(state_indices=torch.tensor([3, 3], dtype=torch.int32), initial_state=zeros(5, H, D, D, dtype=fp32)),
        ValueError,
        r"state_indices\[1\] is 3: must not be that of state_indices\[0\] too",
    ),
    # values of cu_seqlens: free to check on the CPU
    "cu_seqlens-start": (
        VARLEN,
        dict(cu_seqlens=torch.tensor([1, 7, T])),
        ValueError,
        r"cu_seqlens\[0\] is 1: must be 0",
    ),
    "cu_seqlens-negative": (VARLEN, dict(cu_seqlens=torch.tensor([0, -7, T])), ValueError, r"cu_seqlens\[1\] is -7"),
    "cu_seqlens-decreases": (VARLEN, dict(cu_seqlens=torch.tensor([0, 9, 8])), ValueError, r"cu_seqlens\[2\] is 8"),
    "cu_seqlens-past-T": (VARLEN, dict(cu_seqlens=torch.tensor([0, 7, T + 1])), ValueError, r"at most T = 20"),
    # fla's other arguments
    "fla-unknown": (SAFE, dict(head_first=False), TypeError, "unexpected keyword argument 'head_first'"),
    "fla-chunk_size": (SAFE, dict(chunk_size=48), ValueError, "chunk_size is 48: must be 32 or 64"),
    "interval-odd": (
        SAFE,
        dict(checkpoint_interval=48),
        ValueError,
        "checkpoint_interval is 48: must be a multiple of 32",
    ),
    "interval-zero": (SAFE, dict(checkpoint_interval=0), ValueError, "checkpoint_interval is 0: must be a multiple"),
    "interval-bool": (SAFE, dict(checkpoint_interval=True), TypeError, "checkpoint_interval is a bool: must be an int"),
    "interval-float": (
        SAFE,
        dict(checkpoint_interval=64.0),
        TypeError,
        "checkpoint_interval is a float: must be an int",
    ),
    "interval-tensor": (
        SAFE,
        dict(checkpoint_interval=torch.tensor(64)),
        TypeError,
        "checkpoint_interval is a Tensor: must be an int",
    ),
    "fla-cp_context": (SAFE, dict(cp_context=object()), NotImplementedError, "cp_context"),
    "fla-both-layouts": (
        SAFE,
        dict(transpose_state_layout=True, state_v_first=True),
        ValueError,
        "transpose_state_layout is given",
    ),
}


@pytest.mark.parametrize("case, changes, error, message", BAD.values(), ids=BAD)
def test_error(case: Case, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chunk_kda(**arguments(case, **changes))


def test_state_shape_follows_the_layout() -> None:
    state = zeros(B, H, 128, 64, dtype=fp32)
    kwargs = arguments(Case(1, (T,) * B, H=H, K=128, V=64))
    chunk_kda(**{**kwargs, "initial_state": state, "state_v_first": False})
    with pytest.raises(ValueError, match=r"initial_state has shape .* \[N, HV, V, K\] because state_v_first=True"):
        chunk_kda(**{**kwargs, "initial_state": state, "state_v_first": True})


# ---- what the GPU path alone refuses: tensors that say they are on a GPU, and a kernel that only takes notes


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be a CUDA one, as far as the dispatch looks."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self) -> int:
        return 0


def on_gpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "q": kwargs["q"].as_subclass(OnGpu)}


PREPARED = (  # what the launch is made for
    "scale", "lower_bound", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval", "state_v_first",
)  # fmt: skip


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """A Hopper GPU whose kernel records its arguments, fills o with ones and final_state with twos."""
    calls: list[Any] = []

    def prepare(of: Call, sizes: Any) -> Any:
        def launch(call: Call, o: torch.Tensor, final_state: torch.Tensor | None, checked: bool = False) -> bool:
            names = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias", "cu_seqlens", "state_indices")
            x = {name: getattr(call, name) for name in names} | {"o": o, "final_state": final_state}
            if any(t is not None and t.data_ptr() % 16 for name, t in x.items() if name not in ("beta", "cu_seqlens")):
                return False
            options = {name: getattr(of, name) for name in PREPARED}
            calls.append(({name: x.pop(name) for name in names[:5]}, {**x, **options}))
            o.fill_(1)
            if final_state is not None:
                final_state.fill_(2)
            return True

        return launch

    monkeypatch.setattr(devices, "gpu", lambda index: ((9, 0), "NVIDIA H200"))
    monkeypatch.setattr(hopper, "prepare", prepare)
    monkeypatch.setattr(hopper, "copies_logged", set())
    monkeypatch.setattr(known_calls, "known", {})
    return calls


NOT_SERVED = {
    "K": (Case(1, (T,), H=H, K=32), {}, "q has K = 32: must be 64 or 128 on the GPU"),
    "V": (Case(1, (T,), H=H, V=256), {}, "v has V = 256: must be 64 or 128 on the GPU"),
    "fp32": (Case(1, (T,), H=H, dtype="fp32"), {}, "q, k and v are float32: must be bfloat16 or float16"),
    "g": (Case(1, (T,), H=H, g_dtype="fp64"), {}, "g is float64: must be bfloat16, float16 or float32"),
    "beta": (Case(1, (T,), H=H, beta_dtype="fp64"), {}, "beta is float64: must be bfloat16, float16 or float32"),
}


@pytest.mark.parametrize("case, changes, message", NOT_SERVED.values(), ids=NOT_SERVED)
def test_not_served_on_the_gpu(case: Case, changes: dict[str, Any], message: str, kernel: list[Any]) -> None:
    kwargs = arguments(case, **changes)
    with pytest.raises(NotImplementedError, match=message + '.*backend="reference"'):
        chunk_kda(**on_gpu(kwargs))
    assert not kernel
    chunk_kda(**kwargs, backend="reference")


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
def test_gradients_on_the_gpu(name: str, kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward by the kernel, backward by something else."""
    monkeypatch.setattr("kda_cute.gradients.fla", lambda: None)
    kwargs = arguments(Case(1, (T,), H=H, initial_state="fp32", final_state="new"))
    kwargs[name].requires_grad_()
    o, S = chunk_kda(**on_gpu(kwargs))
    assert len(kernel) == 1 and (o == 1).all() and (S == 2).all()
    (got,) = torch.autograd.grad([o.float().sum(), S.sum()], kwargs[name])
    want = torch.autograd.grad([x.float().sum() for x in chunk_kda(**kwargs)], kwargs[name])[0]
    assert len(kernel) == 1 and got.dtype == kwargs[name].dtype
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert not chunk_kda(**on_gpu(kwargs))[0].requires_grad
    assert len(kernel) == 2


def test_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpu", lambda index: ((8, 0), "NVIDIA A100-SXM4-80GB"))
    with pytest.raises(RuntimeError, match=r'A100.*\(compute capability 8.0\).*Hopper.*backend="reference" works'):
        chunk_kda(**on_gpu(arguments()))


def test_a_gpu_of_rocm_is_no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(devices, "gpu", lambda index: ((9, 0), "AMD Instinct MI250X"))
    with pytest.raises(
        RuntimeError, match=r'AMD Instinct MI250X under ROCm: .* NVIDIA Hopper.*backend="reference" works'
    ):
        chunk_kda(**on_gpu(arguments()))


def test_another_device() -> None:
    kwargs = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments().items()}
    with pytest.raises(ValueError, match='q is on meta: must be on a CUDA device.*backend="reference"'):
        chunk_kda(**kwargs)


def test_kernel_gets_the_callers_tensors(kernel: list[Any]) -> None:
    """No copy, no conversion for what TMA can address: a slice of a packed projection, say."""
    packed = torch.randn(B, T, H, 3 * D).to(bf16)
    q, k, v = packed.split(D, -1)
    kwargs = on_gpu(arguments(VARLEN, q=q, k=k, v=v))
    o, S = chunk_kda(**kwargs)
    (tensors, options), = kernel  # fmt: skip
    for name in ("k", "v", "g", "beta"):
        assert tensors[name] is kwargs[name]
    assert tensors["q"].data_ptr() == q.data_ptr() and tensors["q"].stride() == q.stride()
    for name in ("A_log", "dt_bias", "initial_state", "cu_seqlens"):
        assert options[name] is kwargs[name]
    assert options["o"] is o and o.dtype == bf16 and o.shape == v.shape and (o == 1).all()
    assert S is None and options["final_state"] is None
    assert options["scale"] == D**-0.5 and options["lower_bound"] == -5.0
    assert set(options) == set(
        "scale o initial_state final_state A_log dt_bias lower_bound use_qk_l2norm_in_kernel use_gate_in_kernel "
        "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens state_indices".split()
    )


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state", "cu_seqlens"])
def test_kernel_gets_a_copy(name: str, kernel: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    kwargs = arguments(VARLEN)
    x = kwargs[name]
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    kwargs[name] = wide[..., 0]  # every stride doubled, the last one too
    kwargs["final_state"] = zeros(2, H, D, D, dtype=fp32)
    with caplog.at_level(logging.WARNING, "kda_cute"):
        chunk_kda(**on_gpu(kwargs))
        chunk_kda(**on_gpu(kwargs))
    tensors, options = kernel[0]
    got = {**tensors, **options}[name]
    assert got.is_contiguous() and torch.equal(got, x)
    assert [r.getMessage().split()[0] for r in caplog.records] == [name]  # once


@pytest.mark.parametrize("what", ["address", "stride", "expanded", "stride of a dimension of 1"])
def test_kernel_gets_a_copy_of_what_tma_cannot_address(what: str, kernel: list[Any]) -> None:
    q = arguments()["q"]
    flat = torch.zeros(q.numel() + T * H * 8 + 1, dtype=bf16)
    given = {
        "address": flat[1 : 1 + q.numel()].view(q.shape),
        "stride": flat.as_strided(q.shape, (T * H * (D + 1), H * (D + 1), D + 1, 1)),
        "expanded": flat[:D].expand(q.shape),
        "stride of a dimension of 1": flat.as_strided(q.shape, (7, H * D, D, 1)),
    }[what]
    if what != "expanded":
        given.copy_(q)
    chunk_kda(**on_gpu(arguments(k=given)))
    got = kernel[0][0]["k"]
    assert got.stride() == (T * H * D, H * D, D, 1) and got.data_ptr() % 16 == 0
    assert got.data_ptr() != given.data_ptr() and torch.equal(got, given)


def test_kernel_writes_a_strided_out_through_a_copy(kernel: list[Any]) -> None:
    wide = torch.zeros(B, T, H, D + 1, dtype=bf16)
    out = wide[..., :D]
    o, _ = chunk_kda(**on_gpu(arguments(out=out)))
    assert o is out and (out == 1).all() and (wide[..., D] == 0).all()
    assert kernel[0][1]["o"].is_contiguous()


def test_kernel_gets_aligned_states_and_parameters(kernel: list[Any]) -> None:
    case = Case(1, (T,), H=H, initial_state="bf16", state_offset=1)
    final_state = torch.zeros(H * D * D + 1)[1:].view(B, H, D, D)
    kwargs = arguments(case, final_state=final_state)
    _, S = chunk_kda(**on_gpu(kwargs))
    options = kernel[0][1]
    for name in ("initial_state", "A_log", "dt_bias", "final_state"):
        assert kwargs[name].data_ptr() % 16 and options[name].data_ptr() % 16 == 0
        assert name == "final_state" or torch.equal(options[name], kwargs[name])
    assert S is final_state and (final_state == 2).all()


def test_kernel_gets_contiguous_parameters_in_fp32(kernel: list[Any]) -> None:
    A_log, dt_bias = torch.randn(1, 1, H, 1).to(bf16), torch.randn(D, H, dtype=fp64).T
    chunk_kda(**on_gpu(arguments(A_log=A_log, dt_bias=dt_bias)))
    options = kernel[0][1]
    assert options["A_log"].dtype == fp32 and torch.equal(options["A_log"], A_log.float())
    assert options["dt_bias"].dtype == fp32 and torch.equal(options["dt_bias"], dt_bias.float())
    assert options["dt_bias"].is_contiguous()


@pytest.mark.parametrize("state_v_first", [False, True])
def test_kernel_gets_a_new_final_state(state_v_first: bool, kernel: list[Any]) -> None:
    o, S = chunk_kda(**on_gpu(arguments(output_final_state=True, state_v_first=state_v_first)))
    assert S is not None and S.shape == (B, H, D, D) and S.dtype == fp32 and (S == 2).all()


EMPTY = {
    "T": Case(1, (0, 0), H=H, initial_state="bf16"),
    "T-varlen": Case(1, (0, 0, 0), "int32", H=H, initial_state="fp32"),
    "T-no-state": Case(1, (0,), H=H),
    "N": Case(1, (), H=H, initial_state="fp32"),
    "N-varlen": Case(1, (), "int64", tail=3, H=H, initial_state="fp32"),
}


@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_nothing_to_do(case: Case, gpu: bool, kernel: list[Any]) -> None:
    kwargs = arguments(case, output_final_state=True)
    kwargs = on_gpu(kwargs) if gpu else kwargs
    o, S = chunk_kda(**kwargs)
    assert S is not None and S.dtype == fp32 and S.shape == case.state_shape and o.shape == (case.B, case.T, H, D)
    expected = kwargs.get("initial_state", torch.zeros(case.state_shape))
    assert torch.equal(S, expected.float()) and S.data_ptr() != expected.data_ptr() or not S.numel()
    given = torch.full(case.state_shape, math.nan, dtype=bf16)
    _, S = chunk_kda(**{**kwargs, "final_state": given})
    assert S is given and torch.equal(given, expected.to(bf16))
    assert not kernel


def test_check_finds_bad_values_on_the_gpu(kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = on_gpu(arguments(VARLEN, cu_seqlens=torch.tensor([0, 9, 8])))
    chunk_kda(**bad)
    assert len(kernel) == 1  # nobody looked
    monkeypatch.setattr(contract, "CHECK_VALUES", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 8: must be at least cu_seqlens\[1\] = 9"):
        chunk_kda(**bad)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    chunk_kda(**bad)  # a capture cannot wait
    assert len(kernel) == 2


# ---- KDA_CUTE_CHECK


@pytest.mark.parametrize("value, checked", [("1", True), ("0", False), ("", False), (None, False)])
def test_check_is_asked_for_by_the_environment(value: str | None, checked: bool) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "KDA_CUTE_CHECK"}
    if value is not None:
        environment["KDA_CUTE_CHECK"] = value
    program = "from kda_cute import contract; print(contract.CHECK_VALUES)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(checked)


@pytest.mark.parametrize("value", [-5.03, 0.01, math.nan, -math.inf])
def test_check_of_the_log_decay(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, (7, 9), "int64", tail=4, H=H, gate="log", g_dtype="fp32")
    kwargs = arguments(case)
    monkeypatch.setattr(contract, "CHECK_VALUES", True)
    chunk_kda(**kwargs)
    kwargs["g"][0, 16:] = value  # tokens of no sequence are nobody's promise
    chunk_kda(**kwargs)
    kwargs["g"][0, 15, 1, 77] = value
    with pytest.raises(ValueError, match=r"g\[0, 15, 1, 77\] is .*: must be in \[-5, 0\]"):
        chunk_kda(**kwargs)
    chunk_kda(**{**kwargs, "safe_gate": False})  # nothing was promised
    monkeypatch.setattr(contract, "CHECK_VALUES", False)
    chunk_kda(**kwargs)


@given(
    cuts=st.lists(st.integers(-(2**40), 2**40) | st.integers(-3, 300), min_size=2, max_size=9),
    T=st.integers(0, 300),
    interval=st.sampled_from((32, 64, 96)),
    spare=st.integers(0, 3),
)
def test_checkpoints_have_room_whatever_cu_seqlens_says(cuts: list[int], T: int, interval: int, spare: int) -> None:
    """A kernel stores as many as the tokens that it takes have, and cannot see how many there may be."""
    rows = max(T // interval + len(cuts) - 1 if spare else 0, -(-T // interval)) + spare
    first = checkpoints.first_rows(torch.tensor(cuts), T, interval, rows).tolist()
    clamped = [min(max(x, 0), T) for x in cuts]
    for n, (begin, end) in enumerate(zip(clamped[:-1], clamped[1:], strict=True)):
        count = -(-max(end - begin, 0) // interval)
        assert 0 <= first[n] and first[n] + count <= rows
    if cuts == sorted(cuts) and rows >= T // interval + len(cuts) - 1:
        counts = [-(-(b - a) // interval) for a, b in zip(clamped[:-1], clamped[1:], strict=True)]
        assert first == [sum(counts[:n]) for n in range(len(counts))]


# ---- what a right call returns


@given(case=cases(served=False, max_tokens=60, max_heads=2))
def test_cpu_call_is_the_reference(case: Case) -> None:
    call = make(case)
    compute = fp64 if case.dtype == "fp64" else fp32
    o_ref, S_ref = chunked(**call.oracle_kwargs, dtype=compute)
    assert S_ref is not None
    extra: dict[str, Any] = {}
    if case.out:
        extra["out"] = torch.full((case.B, case.T, case.HV, case.V), math.nan, dtype=DTYPES[case.dtype])
    if case.final_state in ("bf16", "fp32"):
        extra["final_state"] = torch.full(case.state_shape, math.nan, dtype=DTYPES[case.final_state])
    o, S = chunk_kda(**call.kwargs, **extra)
    assert o.dtype == DTYPES[case.dtype] and torch.equal(o, o_ref.to(o.dtype))  # zero behind the last sequence
    if case.out:
        assert o is extra["out"]
    if case.final_state is None:
        assert S is None
    else:
        assert S is not None and torch.equal(S, S_ref.to(S.dtype))
        assert S is extra["final_state"] if case.final_state != "new" else S.dtype == compute


def test_signature() -> None:
    """The issue's, which is fla's with ours behind the star."""
    names = (
        "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
        "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound state_v_first cu_seqlens "
        "A_log dt_bias state_indices null_index has_initial_state checkpoint_interval checkpoint_offsets "
        "checkpoint_state checkpoint_indices batch_invariant out final_state backend fla_kwargs"
    )
    parameters = inspect.signature(chunk_kda).parameters
    assert list(parameters) == names.split()
    assert all(parameters[n].kind == inspect.Parameter.KEYWORD_ONLY for n in names.split()[16:-1])


def test_fla_arguments_that_change_nothing() -> None:
    kwargs = arguments(VARLEN)
    o, _ = chunk_kda(**kwargs)
    extra = dict(disable_recompute=True, cu_seqlens_cpu=torch.tensor([0, 7, 20]), chunk_size=32, cp_context=None)
    o_extra, _ = chunk_kda(**kwargs, **extra, return_intermediate_states=False)
    assert torch.equal(o, o_extra)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_interval_of_any_kind_of_integer(kind: Any) -> None:
    kwargs = arguments(VARLEN)
    for x, y in zip(
        chunk_kda(**kwargs, checkpoint_interval=kind(64)), chunk_kda(**kwargs, checkpoint_interval=64), strict=True
    ):
        assert x is y is None or torch.equal(x, y)


def test_errors_of_fused_recurrent_kda_name_it() -> None:
    kwargs = {name: x for name, x in arguments(VARLEN).items() if name != "safe_gate"}
    with pytest.raises(TypeError, match=r"fused_recurrent_kda\(\) got an unexpected keyword argument 'head_first'"):
        fused_recurrent_kda(**kwargs, head_first=False)
    with pytest.raises(
        NotImplementedError, match="return_intermediate_states is True: must be False .* has output_token_states"
    ):
        fused_recurrent_kda(**kwargs, return_intermediate_states=True)
    assert len(fused_recurrent_kda(**kwargs, return_intermediate_states=False)) == 2


def test_fla_old_name_of_state_v_first() -> None:
    kwargs = arguments(Case(1, (T,), H=H, initial_state="fp32"), output_final_state=True)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        _, S_old = chunk_kda(**{**kwargs, "state_v_first": False}, transpose_state_layout=True)
    _, S = chunk_kda(**{**kwargs, "state_v_first": True})
    assert S is not None and S_old is not None and torch.equal(S, S_old)


def test_gradients_flow_on_the_cpu() -> None:
    kwargs = arguments(output_final_state=True)
    kwargs["v"] = kwargs["v"].clone().requires_grad_()
    kwargs["A_log"] = kwargs["A_log"].clone().requires_grad_()
    o, S = chunk_kda(**kwargs)
    assert S is not None
    (o.float().sum() + S.sum()).backward()
    for name in ("v", "A_log"):
        assert kwargs[name].grad.dtype == kwargs[name].dtype and kwargs[name].grad.abs().sum() > 0


def test_fwd_is_flash_kda() -> None:
    """FlashKDA's call: everything fused, states [N, H, V, K], out written and nothing returned."""
    case = Case(1, (7, 13), "int64", H=H, dt_bias="heads", initial_state="bf16", state_v_first=True)
    a = make(case).tensors
    out, final_state = torch.full_like(a["v"], math.nan), torch.full_like(a["initial_state"], math.nan)
    result = fwd(
        a["q"], a["k"], a["v"], a["g"], a["beta"], 0.1, out, a["A_log"].requires_grad_(), a["dt_bias"], -5.0,
        initial_state=a["initial_state"], final_state=final_state, cu_seqlens=a["cu_seqlens"],
    )  # fmt: skip
    assert result is None
    o, S = chunk_kda(
        **{k: x.detach() for k, x in a.items()},
        scale=0.1,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        safe_gate=True,
        lower_bound=-5.0,
        state_v_first=True,
        output_final_state=True,
    )
    assert S is not None and torch.equal(out, o) and torch.equal(final_state, S.to(bf16))


def test_fwd_needs_out_and_lower_bound() -> None:
    a = make(SAFE).tensors
    positional = [a["q"], a["k"], a["v"], a["g"], a["beta"], 0.1]
    with pytest.raises(TypeError, match="out is a NoneType"):
        fwd(*positional, None, a["A_log"], a["dt_bias"], -5.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lower_bound is None"):
        fwd(*positional, torch.empty_like(a["v"]), a["A_log"], a["dt_bias"], None)  # type: ignore[arg-type]
