"""fused_recurrent_kda: the reference behind it, its contract, and what the kernel's warps compute, run on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kda_cute import chunk_kda, fused_recurrent_kda, replay_shape
from kda_cute.kernels.config import KdaDecodeConfig
from kda_cute.reference import recurrence
from tests import by_token
from tests.lanes import LANES, Warp, copy_of, on_the_cpu
from tests.strategies import Case, cases, make

SHORT = Case(1, (5, 5), H=2, group=2, initial_state="fp32", final_state="new", K=16, V=8)
PACKED = Case(2, (3, 0, 1, 9), "int32", H=2, initial_state="fp32", final_state="new", state_v_first=True, K=16, V=8)
BOTH = pytest.mark.parametrize("case", [SHORT, PACKED], ids=["fixed", "packed"])


def call_of(case: Case, **changes: Any) -> dict[str, Any]:
    kwargs = {**make(case).kwargs, **changes}
    return {name: x for name, x in kwargs.items() if name != "safe_gate"}


@given(case=cases(served=False, max_tokens=40, max_heads=2))
def test_is_the_recurrence(case: Case) -> None:
    kwargs = make(case).kwargs
    o, S = fused_recurrent_kda(**call_of(case))
    exact = torch.float64 if case.dtype == "fp64" else torch.float32
    o_true, S_true = recurrence(**kwargs, dtype=exact)
    assert o.dtype == kwargs["q"].dtype
    torch.testing.assert_close(o, o_true.to(o.dtype), rtol=0, atol=0, equal_nan=True)
    if S is not None:
        assert S_true is not None
        torch.testing.assert_close(S, S_true.to(S.dtype), rtol=0, atol=0, equal_nan=True)


def test_tokens_of_no_sequence_leave_zeros() -> None:
    case = Case(3, (3, 0, 2), "int32", tail=4, H=2, K=16, V=8, initial_state="fp32")
    states = torch.full((1, case.T, 2, 16, 8), float("nan"))
    out = torch.full((1, case.T, 2, 8), float("nan"), dtype=torch.bfloat16)
    fused_recurrent_kda(**call_of(case), out=out, token_states=states)
    for x in (out, states):
        assert (x[:, 5:] == 0).all() and (x[:, :5] != 0).any()


def test_arguments_come_in_the_order_of_fla() -> None:
    names = (
        "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
        "use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens"
    )
    assert list(inspect.signature(fused_recurrent_kda).parameters)[:17] == names.split()


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    """Equal but for rounding: sums over tensors of other shapes may be made in another order. That is at most 20
    roundings to fp32 for each of 9 tokens, then one of the result; a token more or less changes a fifth."""
    assert x.dtype == y.dtype
    rounding = 20 * 9 * torch.finfo(torch.float32).eps * y.abs().max().item()
    rtol = torch.finfo(x.dtype).eps if x.dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(x, y, rtol=rtol, atol=rounding)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_states_after_each_token_are_the_final_ones_of_prefixes(case: Case, dtype: torch.dtype | None) -> None:
    kwargs = call_of(case)
    shape = (case.B, case.T, *case.state_shape[1:])
    given_states = None if dtype is None else torch.full(shape, float("nan"), dtype=dtype)
    o, S, states = fused_recurrent_kda(**kwargs, output_token_states=dtype is None, token_states=given_states)
    assert states.shape == shape and (states is given_states or states.dtype == torch.float32)
    plain_o, plain_S = fused_recurrent_kda(**kwargs)
    close(o, plain_o)
    close(S, plain_S)
    flat = states.flatten(0, 1)
    bounds = [(b * case.T, (b + 1) * case.T) for b in range(case.B)]
    if case.cu_seqlens is not None:
        bounds = list(zip(case.cuts[:-1], case.cuts[1:], strict=True))
    tensors = {name: kwargs[name].flatten(0, 1)[None] for name in ("q", "k", "v", "g", "beta")}
    for n, (begin, end) in enumerate(bounds):
        for t in range(begin, end):
            part = {name: x[:, begin : t + 1] for name, x in tensors.items()}
            start = kwargs["initial_state"][n : n + 1]
            want = fused_recurrent_kda(**{**kwargs, **part, "initial_state": start, "cu_seqlens": None})[1]
            close(flat[t], want[0].to(flat.dtype))


@BOTH
def test_prefill_and_then_token_by_token(case: Case) -> None:
    """chunk_kda of all tokens is chunk_kda of the first ones and the rest one by one, states updated in place."""
    kwargs = call_of(
        Case(**{**vars(case), "lengths": (20,) * 3, "cu_seqlens": None, "dtype": "fp64", "g_dtype": "fp64"})
    )
    names = ("q", "k", "v", "g", "beta")
    o, S = chunk_kda(**kwargs)
    pieces = [chunk_kda(**{**kwargs, **{name: kwargs[name][:, :13] for name in names}})]
    state = pieces[0][1]
    for t in range(13, 20):
        one = {name: kwargs[name][:, t : t + 1] for name in names}
        step = {**kwargs, **one, "initial_state": state, "final_state": state, "output_final_state": False}
        pieces.append(fused_recurrent_kda(**step))
        assert pieces[-1][1] is state
    torch.testing.assert_close(torch.cat([x[0] for x in pieces], 1), o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, S, rtol=1e-9, atol=1e-9)


def test_pool_of_states() -> None:
    case = Case(3, (1,) * 4, H=2, initial_state="fp32", pool=3, K=16, V=8)
    kwargs = call_of(case)
    before, indices = kwargs["initial_state"].clone(), kwargs["state_indices"]
    o, S = fused_recurrent_kda(**kwargs)
    assert S is kwargs["initial_state"] and (indices < 0).any()
    kept = indices >= 0
    start = torch.zeros(case.state_shape)
    start[kept] = before[indices[kept]]
    plain = {name: x for name, x in kwargs.items() if name != "state_indices"}
    o_plain, S_plain = fused_recurrent_kda(**{**plain, "initial_state": start, "output_final_state": True})
    torch.testing.assert_close(o[kept], o_plain[kept], rtol=0, atol=0)
    assert (o[~kept] == 0).all()
    torch.testing.assert_close(S[indices[kept]], S_plain[kept], rtol=0, atol=0)
    others = torch.ones(len(S), dtype=torch.bool)
    others[indices[kept]] = False
    assert torch.equal(S[others], before[others])


BAD = {
    "shape": (
        lambda s: s[:, :-1],
        ValueError,
        r"token_states has shape \[2, 4, 4, 16, 8\]: must be \[2, 5, 4, 16, 8\]",
    ),
    "dtype": (lambda s: s.half(), TypeError, "token_states is float16"),
    "strides": (lambda s: s.transpose(-1, -2).contiguous().transpose(-1, -2), ValueError, "token_states has strides"),
    "no tensor": (lambda s: 3, TypeError, "token_states is a int"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_token_states(change: Any, error: type[Exception], message: str) -> None:
    states = torch.zeros(SHORT.B, SHORT.T, *SHORT.state_shape[1:])
    with pytest.raises(error, match=message):
        fused_recurrent_kda(**call_of(SHORT), token_states=change(states))


def test_has_no_gradient_and_says_so() -> None:
    kwargs = call_of(SHORT)
    kwargs["q"].requires_grad_()
    with pytest.raises(
        NotImplementedError, match="q requires grad: fused_recurrent_kda has no backward; chunk_kda has"
    ):
        fused_recurrent_kda(**kwargs)
    with torch.no_grad():
        fused_recurrent_kda(**kwargs)


@BOTH
def test_compiles_into_one_graph(case: Case) -> None:
    kwargs = call_of(case)
    want = fused_recurrent_kda(**kwargs, output_token_states=True)
    compiled = torch.compile(fused_recurrent_kda, fullgraph=True, backend="eager")
    got = compiled(**kwargs, output_token_states=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# ---- the kernel's arithmetic


decode: Any = copy_of("kda_cute.kernels.decode_sm90")
f32 = np.float32


@contextmanager
def on_lanes(warp: Warp) -> Iterator[None]:
    with on_the_cpu(decode, warp):
        yield


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("K", [64, 128])
def test_a_block_makes_a_token(state_v_first: bool, K: int) -> None:
    """32 rows of a state, from what is in shared memory for the second token, against the formulas."""
    rng = np.random.default_rng(7)
    kernel = decode.KdaDecodeSm90(KdaDecodeConfig(state_v_first=state_v_first, K=K))
    V, block_row, keys = 128, 32, kernel.keys
    S = rng.standard_normal((V, K)).astype(f32)
    q, k, v = (rng.standard_normal(n).astype(f32) for n in (K, K, V))
    a, beta, scale = rng.random(K).astype(f32), f32(0.7), f32(0.25)
    rq, rk = scale / np.sqrt((q * q).sum() + 1e-6), 1 / np.sqrt((k * k).sum() + 1e-6)
    want = S.astype(np.float64) * a
    u = beta * (v - want @ (rk * k))
    want += u[:, None] * (rk * k)
    o_want = want @ (rq * q)

    block = Warp()
    tables = 0, 1024, 2048, 3072, 4096, 8192
    numbers = np.array([rq, rk, (q * k).sum(), beta], f32)
    for at, x in zip(tables, (q, k, a, v[32:64], numbers), strict=False):
        block.memory[at + x.nbytes : at + 2 * x.nbytes] = x.view(np.uint8)

    def place(warp: int, i: int) -> tuple[Any, Any]:
        """(row, channel) of the lanes' i-th elements."""
        if state_v_first:
            return block_row + 8 * warp + i // keys, LANES * keys + i % keys
        return block_row + LANES % 8 * 4 + i % 4, (warp * 4 + LANES // 8) * keys + i // 4

    held = [[S[place(warp, i)] for i in range(8 * K // 32)] for warp in range(4)]
    o = np.full(V, np.nan)

    def store(out: Any, row: Any, values: Any, mine: Any) -> None:
        for i, x in enumerate(values):
            mask = np.broadcast_to(mine, (32,))
            out[(row + i)[mask]] = x[mask]

    kernel.store = store
    with on_lanes(block):
        for warp in range(4):
            if state_v_first:
                kernel.step(held[warp], tables, 1, o, block_row, 8 * warp, LANES)
            else:
                kernel.send_sums(held[warp], tables, 1, warp, LANES)
        for warp in range(4):
            if not state_v_first:
                kernel.take_sums(held[warp], tables, 1, o, block_row, warp, LANES)
    for warp in range(4):
        for i in range(8 * K // 32):
            np.testing.assert_allclose(held[warp][i], want[place(warp, i)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(o[32:64], o_want[32:64], rtol=1e-4, atol=1e-4)
    assert np.isnan(o[:32]).all() and np.isnan(o[64:]).all()


# ---- of single tokens


OPTIONS = ("scale", "lower_bound", "state_v_first", "A_log", "dt_bias", "allow_neg_eigval")


@settings(max_examples=60)
@given(call=by_token.calls)
def test_by_token_is_token_by_token(call: dict[str, Any]) -> None:
    """The reference, against calls of one sequence and one token with nothing but states."""
    before = by_token.arguments("cpu", **{**call, "group": 1, "dtypes": ("fp32", "fp32")}, dtype="fp64", K=8, V=32)
    kwargs, want = by_token.copied(before), by_token.copied(before)
    o, *_ = fused_recurrent_kda(**kwargs)
    inputs = {name: before[name].flatten(0, 1) for name in ("q", "k", "v", "g", "beta")}
    wanted_o = torch.zeros_like(inputs["v"])
    slots, accepted, rows = (before.get(x) for x in ("state_indices", "num_accepted_tokens", "token_state_indices"))
    B, T = before["q"].shape[:2]
    cuts = before["cu_seqlens"].tolist() if "cu_seqlens" in before else [T * b for b in range(B + 1)]
    options = {name: x for name, x in before.items() if name.startswith("use_") or name in OPTIONS}
    null, pool, v_first = before["null_index"], before["initial_state"], before["state_v_first"]
    assert slots is not None
    for n, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        count = 1 if accepted is None else int(accepted[n])
        own = slots[n].reshape(-1).tolist()
        first = own[0] if "replay" in before else own[count - 1]
        if first <= null:
            continue
        S = pool[first : first + 1].double()
        if "has_initial_state" in before and not before["has_initial_state"][n]:
            S = torch.zeros_like(S)
        row = n if rows is None else int(rows[n])
        if "replay" in before:
            for x in before["replay"][row, :count].double() if row >= 0 else ():
                a, k, u = x[:, 0, :8], x[:, 0, 8:16], x[:, :, 16:].flatten(1)
                outer = u[..., :, None] * k[..., None, :]
                S = S * a[..., None, :] + outer if v_first else S * a[..., :, None] + outer.transpose(-1, -2)
            want["initial_state"][first] = S[0]
        for t in range(end - begin):
            one = {name: x[None, begin + t : begin + t + 1] for name, x in inputs.items()}
            o_t, S = fused_recurrent_kda(**one, **options, initial_state=S, output_final_state=True)
            wanted_o[begin + t] = o_t[0, 0]
            if "token_states" in before and row >= 0 and t < before["token_states"].shape[1]:
                want["token_states"][row, t] = S[0]
            if slots.dim() == 2 and t < len(own) and own[t] > null and before["update_state"]:
                want["initial_state"][own[t]] = S[0]
        if slots.dim() == 1 and before.get("update_state"):
            want["initial_state"][first] = S[0]
    torch.testing.assert_close(o.flatten(0, 1), wanted_o, rtol=1e-6, atol=1e-6)
    for name in ("initial_state", "token_states"):
        if name in want:
            torch.testing.assert_close(kwargs[name], want[name], rtol=1e-5, atol=1e-5)


def test_replay_commits_what_was_accepted() -> None:
    """What is on record of accepted tokens makes the state that these tokens have made."""
    case = Case(5, (12,) * 3, H=2, K=8, V=32, dtype="fp64", gate="log", beta_sigmoid=False, initial_state="fp32")
    kwargs, names = call_of(case), ("q", "k", "v", "g", "beta")
    state, record = kwargs["initial_state"].double(), torch.zeros(replay_shape(3, 4, 2, 8, 32))
    for first, last, accepted in ((0, 4, (0, 0, 0)), (4, 6, (0, 2, 4))):
        tokens = {name: kwargs[name][:, first:last] for name in names}
        tokens.update(initial_state=state, replay=record, num_accepted_tokens=torch.tensor(accepted))
        fused_recurrent_kda(**{**kwargs, **tokens})
        for n, count in enumerate(accepted):
            one = {name: kwargs[name][n : n + 1, :count] for name in names}
            one.update(initial_state=kwargs["initial_state"][n : n + 1].double(), output_final_state=True)
            torch.testing.assert_close(
                state[n : n + 1], fused_recurrent_kda(**{**kwargs, **one})[1], rtol=1e-6, atol=1e-6
            )
