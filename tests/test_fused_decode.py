"""fused_decode_kda: the reference behind it, its contract, and what the kernel's blocks do, run on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kda_cute import fused_decode, fused_decode_kda, fused_recurrent_kda
from kda_cute.backends import fused_hopper
from kda_cute.kernels.config import KdaFusedDecodeConfig
from tests import blocks, fused_cases, wrapped
from tests.fused_cases import FusedCase, cases, check, make

SMALL = FusedCase(1, N=3, H=2, K=16, V=8)


@given(case=cases(6, 2), K=st.sampled_from((8, 16)), V=st.sampled_from((8, 24)))
def test_is_its_parts_one_after_the_other(case: FusedCase, K: int, V: int) -> None:
    check(make(replace(case, K=K, V=V, beyond=False)), fused_decode_kda)


def test_nothing_around_is_fused_recurrent_kda() -> None:
    case = replace(SMALL, conv=False, norm=False, indices=None)
    kwargs = make(case).kwargs
    before = kwargs["initial_state"].clone()
    o, S = fused_decode_kda(**kwargs)
    q, k, v = kwargs["mixed_qkv"].split([32, 32, 16], -1)
    shape = (case.N, 1, case.H, -1)
    want, S_want = fused_recurrent_kda(
        q.reshape(shape), k.reshape(shape), v.reshape(shape), kwargs["g"][:, None], kwargs["beta"][:, None],
        kwargs["A_log"], kwargs["dt_bias"], initial_state=before, output_final_state=True, state_v_first=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, lower_bound=-5.0,
    )  # fmt: skip
    torch.testing.assert_close(o, want[:, 0], rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(S, S_want)


def test_no_sequences() -> None:
    o, _ = fused_decode_kda(**make(replace(SMALL, N=0)).kwargs)
    assert o.shape == (0, 2, 8)


def test_in_fp64() -> None:
    kwargs = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for name, x in make(SMALL).kwargs.items()}  # fmt: skip
    o, S = fused_decode_kda(**kwargs)
    assert o.dtype == S.dtype == torch.float64 and o.isfinite().all()


def test_both_states_of_a_slot_in_one_page() -> None:
    """As servers with one pool of pages have them: they lie between one another, and share nothing."""
    case = FusedCase(2, N=3, H=2)
    kwargs = make(case).kwargs
    plain = {**kwargs, "initial_state": kwargs["initial_state"].clone(), "conv_state": kwargs["conv_state"].clone()}
    state, kept = plain["initial_state"], plain["conv_state"]
    page = state[0].nbytes + kept[0].nbytes + 64
    memory = torch.zeros(len(state) * page, dtype=torch.uint8)
    pool = memory.view(torch.float32).as_strided(state.shape, (page // 4, *state.stride()[1:]))
    begin = state[0].nbytes // 2
    kept_in = memory.view(torch.bfloat16).as_strided(kept.shape, (page // 2, *kept.stride()[1:]), begin)
    pool.copy_(state)
    kept_in.copy_(kept)
    o, _ = fused_decode_kda(**{**kwargs, "initial_state": pool, "conv_state": kept_in})
    want, _ = fused_decode_kda(**plain)
    assert torch.equal(o, want) and torch.equal(pool, state) and torch.equal(kept_in, kept)
    with pytest.raises(ValueError, match="initial_state shares memory with conv_state"):
        kept_in = memory.view(torch.bfloat16).as_strided(kept.shape, (page // 2, *kept.stride()[1:]), begin - 1)
        fused_decode_kda(**{**kwargs, "initial_state": pool, "conv_state": kept_in})


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(kwargs: dict[str, Any]) -> None:
        for name, f in changes.items():
            kwargs[name] = f(kwargs.get(name)) if callable(f) else f

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]] = {
    "no tensor": (changed(mixed_qkv=3), TypeError, "mixed_qkv is a int: must be a torch.Tensor"),
    "dtype of x": (changed(mixed_qkv=lambda x: x.int()), TypeError, "mixed_qkv is int32: must be bfloat16 or"),
    "shape of x": (changed(mixed_qkv=lambda x: x[0]), ValueError, r"mixed_qkv has shape \[80\]: must be \[N, 2 H K"),
    "columns": (changed(mixed_qkv=lambda x: x[:, :-1]), ValueError, r"mixed_qkv has shape \[3, 79\]: must be \[N, 2 H"),
    "columns apart": (
        changed(mixed_qkv=lambda x: x.repeat_interleave(2, 1)[:, ::2]), ValueError,
        r"mixed_qkv has strides \(160, 2\): must be contiguous in its last dimension",
    ),
    "heads": (changed(num_heads=3), ValueError, "num_heads is 3: must be 2, what the 80 columns"),
    "shape of g": (changed(g=lambda x: x[:2]), ValueError, r"g has shape \[2, 2, 16\]: must be \[N, HV, K\] with"),
    "shape of beta": (changed(beta=lambda x: x[:, :1]), ValueError, r"beta has shape \[3, 1\]: must be \[3, 2\]"),
    "lower bound": (changed(lower_bound=-6.0), ValueError, r"lower_bound is -6.0: must be in \[-5, 0\), or None"),
    "no A_log": (changed(A_log=None, lower_bound=None), ValueError, "A_log is None: must be a tensor of shape"),
    "shape of A_log": (changed(A_log=lambda x: x[:1]), ValueError, r"A_log has shape \[1\]: must be \[2\], \[HV\]"),
    "state dtype": (changed(initial_state=lambda x: x.half()), TypeError, "initial_state is float16: must be bfloat16"),
    "state order": (
        changed(initial_state=lambda x: x.transpose(2, 3)), ValueError, r"initial_state has shape \[6, 2, 16, 8\]",
    ),
    "state not dense": (
        changed(initial_state=lambda x: x.repeat_interleave(2, 1)[:, ::2]), ValueError, "initial_state has strides",
    ),
    "state pitch": (
        changed(initial_state=lambda x: torch.zeros(6 * 257 + 7)[: 6 * 257].view(6, 257)[:, :256].view(6, 2, 8, 16)),
        ValueError, "initial_state has strides .*: must have dense states, a multiple of 16 bytes",
    ),
    "index dtype": (changed(state_indices=lambda x: x.short()), TypeError, "state_indices is int16: must be int32"),
    "index shape": (changed(state_indices=lambda x: x[:2]), ValueError, r"state_indices has shape \[2\]: must be"),
    "index beyond": (changed(state_indices=lambda x: x + 6), ValueError, r"state_indices\[0\] is \d+: must be below 6"),
    "index twice": (changed(state_indices=lambda x: x * 0 + 2), ValueError, r"state_indices\[1\] is 2: must not be"),
    "few states": (
        changed(state_indices=None, initial_state=lambda x: x[:2]), ValueError, "initial_state has shape .* N = 3",
    ),
    "null index": (changed(null_index=1), ValueError, "null_index is 1: must be -1 or 0"),
    "conv indices": (
        changed(conv_state_indices=lambda _: torch.arange(3)), TypeError, "conv_state_indices is int64: must be int32",
    ),
    "conv indices alone": (
        changed(conv_state_indices=lambda _: torch.arange(3), state_indices=None), ValueError, "conv_state_indices is",
    ),
    "conv weight": (changed(conv_weight=lambda x: x[:, :3]), ValueError, r"conv_weight has shape \[80, 3\]: must be"),
    "conv weight dtype": (changed(conv_weight=lambda x: x.half()), TypeError, "conv_weight is float16: must be bf"),
    "conv weight strides": (
        changed(conv_weight=lambda x: x.repeat(1, 2)[:, ::2]), ValueError, "conv_weight has strides .* must be",
    ),
    "conv bias": (changed(conv_bias=lambda x: x.double()), TypeError, "conv_bias is float64: must be bfloat16"),
    "no conv state": (changed(conv_state=None), ValueError, "conv_state is None: must be a tensor"),
    "no conv weight": (changed(conv_weight=None), ValueError, "conv_bias is given: must be None without conv_weight"),
    "conv state": (changed(conv_state=lambda x: x[..., :2]), ValueError, r"conv_state has shape \[6, 80, 2\]: must be"),
    "no gate": (changed(output_gate=None), ValueError, "output_gate is None: must be a tensor, as norm_weight is one"),
    "norm weight": (changed(norm_weight=lambda x: x[:4]), ValueError, r"norm_weight has shape \[4\]: must be \[8\]"),
    "activation": (changed(norm_activation="relu"), ValueError, "norm_activation is 'relu': must be one of"),
    "eps": (changed(norm_eps=-1.0), ValueError, "norm_eps is -1.0: must be finite and not negative"),
    "scale": (changed(scale="1"), TypeError, "scale is a str: must be a float or None"),
    "out": (changed(out=lambda _: torch.zeros(3, 2, 8)), TypeError, "out is float32: must be bfloat16"),
    "backend": (changed(backend="triton"), ValueError, "backend is 'triton': must be None"),
    "no GPU": (changed(backend="cute"), ValueError, "mixed_qkv is on cpu: must be on a CUDA device"),
    "shared memory": (
        changed(out=lambda _: None, output_gate=lambda x: x.contiguous()), ValueError, "out shares memory with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(change: Any, error: type[Exception], message: str) -> None:
    inputs = make(replace(SMALL, gaps=True))
    kwargs = inputs.kwargs
    change(kwargs)
    if "shares" in message:
        kwargs["out"] = kwargs["output_gate"]
    before = {name: guard.snapshot() for name, guard in inputs.guards.items()}
    with pytest.raises(error, match=message):
        fused_decode_kda(**kwargs)
    assert all(guard.untouched_outside(before[name], guard.tensor[:0]) for name, guard in inputs.guards.items())


def test_has_no_gradient_and_says_so() -> None:
    kwargs = make(SMALL).kwargs
    kwargs["conv_weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match="conv_weight requires grad: fused_decode_kda has no backward"):
        fused_decode_kda(**kwargs)
    with torch.no_grad():
        fused_decode_kda(**kwargs)


def test_is_not_compiled_and_says_so() -> None:
    kwargs = make(SMALL).kwargs
    with pytest.raises(Exception, match="fused_decode_kda is not served under torch.compile"):
        torch.compile(fused_decode_kda, fullgraph=True, backend="eager")(**kwargs)


# ---- the kernel


fused, base = blocks.modules()


def on_blocks(rows: int | None = None) -> Callable[..., Any]:
    """fused_decode_kda as the kernel does it."""

    def run(**kwargs: Any) -> Any:
        kwargs = {name: x for name, x in kwargs.items() if name != "num_heads"}
        rest = dict.fromkeys(fused_decode.FusedCall._fields)
        call = fused_decode.FusedCall(**{**rest, **kwargs})
        sizes = fused_decode.check(call)
        call = call._replace(scale=sizes.K**-0.5 if call.scale is None else call.scale)
        o = torch.full((sizes.N, sizes.HV, sizes.V), float("nan"), dtype=call.mixed_qkv.dtype)
        o = o if call.out is None else call.out
        gate: Any = "softplus" if call.lower_bound is None else "safe"
        g_dtype: Any = "fp32" if call.g.dtype == torch.float32 else "bf16"
        config = KdaFusedDecodeConfig(g_dtype, gate, call.conv_weight is not None, call.norm_weight is not None)
        z = o if call.output_gate is None else call.output_gate
        numbers = fused_hopper.numbers(call, sizes)
        blocks.run(fused, base, config, (call.mixed_qkv, call.g, z, o), numbers, rows or sizes.N)
        return o, call.initial_state

    return run


PLAIN = FusedCase(3, N=1)
KERNEL = {
    "all": replace(PLAIN, N=2, H=2),
    "heads share q and k": replace(PLAIN, group=3, gaps=True, pitch=16),
    "heads share, no norm": replace(PLAIN, group=2, norm=False),
    "heads share, no convolution": replace(PLAIN, H=2, group=2, conv=False),
    "nothing around": replace(PLAIN, H=2, group=2, conv=False, norm=False, gaps=True, out=True),
    "no norm": replace(PLAIN, norm=False, conv_layout="taps", state="bf16", out=True, gaps=True),
    "no convolution": replace(PLAIN, conv=False, activation="swish", beta_dtype="fp32", state="bf16", pitch=48),
    "softplus": replace(PLAIN, gate="softplus", conv_layout="view", gaps=True, beta_dtype="fp16", g_dtype="fp32"),
    "fp32 weights": replace(PLAIN, weight_dtype="fp32", activation="swish", scale=0.5),
    "no bias": replace(PLAIN, bias=False, A_log=False, dt_bias=None),
    "no indices": replace(PLAIN, N=2, indices=None, null_index=0),
    "wide indices": replace(PLAIN, N=2, indices="int64", separate=True, pitch=4096),
    "nulls": replace(PLAIN, N=3, seed=4, nulls=True, separate=True, null_index=0, out=True),
    "nulls of heads that share": replace(PLAIN, N=2, group=2, nulls=True, out=True),
    "wide nulls": replace(PLAIN, N=4, seed=5, indices="int64", nulls=True, beyond=True),
    "beyond": replace(PLAIN, N=2, seed=6, indices="int64", beyond=True),
    "large": replace(PLAIN, conv=False, large=True),
    "large, convolved": replace(PLAIN, large=True, conv_layout="taps"),
    "no l2norm": replace(PLAIN, l2norm=False, weight_dtype="fp32"),
}


@pytest.mark.parametrize("case", KERNEL.values(), ids=KERNEL)
def test_blocks(case: FusedCase) -> None:
    check(make(case), on_blocks())


def test_blocks_of_a_grid_that_is_too_large() -> None:
    """More sequences than a column of the grid has, and not a multiple."""
    check(make(replace(PLAIN, N=3, conv=False)), on_blocks(rows=2))


@settings(max_examples=3)
@given(case=fused_cases.cases(2, 1).filter(lambda case: case.dtype == "bf16" and case.N > 0))
def test_blocks_of_any_call(case: FusedCase) -> None:
    check(make(case), on_blocks())


# ---- what torch has around a tensor


@pytest.fixture(scope="module", autouse=True)
def two_processes() -> Iterator[None]:
    yield from wrapped.processes()


TENSORS = (
    "mixed_qkv", "g", "beta", "A_log", "dt_bias", "initial_state", "state_indices", "conv_weight", "conv_bias",
    "conv_state", "conv_state_indices", "output_gate", "norm_weight", "out",
)  # fmt: skip


def full_call() -> dict[str, Any]:
    return make(replace(SMALL, indices="int64", separate=True, bias=True, out=True)).kwargs


@pytest.mark.parametrize("name", TENSORS)
def test_a_view_with_another_sign_is_not_known(name: str) -> None:
    """Its address is that of a tensor that is."""
    call = {**full_call(), "scale": 0.5}

    def key() -> Any:
        fields = {x: call.get(x) for x in fused_decode.FusedCall._fields}
        return fused_hopper._key(fused_decode.FusedCall(**fields), None)

    with torch.no_grad():
        assert key() is not None
        call[name] = torch._neg_view(call[name])
        assert key() is None


@pytest.mark.parametrize("kind", wrapped.KINDS)
@pytest.mark.parametrize("name", TENSORS)
def test_every_argument_in_every_wrapper(name: str, kind: str) -> None:
    """The same numbers as without it, or an error that names the argument."""
    wrap, error, message = wrapped.KINDS[kind]
    if kind == "negated" and name in fused_decode.WRITTEN:
        error, message = TypeError, "^{} is a view with another sign"
    plain, call = full_call(), full_call()
    assert {x for x, y in plain.items() if isinstance(y, torch.Tensor)} == {*TENSORS}
    call[name] = wrap(call[name])
    with torch.no_grad():
        if error is not None:
            with pytest.raises(error, match=message.format(name).replace("like q$", "like mixed_qkv$")):
                fused_decode_kda(**call)
            return
        fused_decode_kda(**call)
        fused_decode_kda(**plain)
    for written in fused_decode.WRITTEN:
        assert torch.equal(wrapped.numbers(call[written]), wrapped.numbers(plain[written]))
