"""What once gave wrong numbers without an error on a GPU. Needs a Hopper GPU; `pytest -m gpu`."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kda_cute import chunk_kda, fused_recurrent_kda, jit, known_calls
from kda_cute.backends import hopper
from kda_cute.reference import recurrence
from tests.gpu.oracle import BOUND, relative_error
from tests.gpu.test_kda_gpu import BAD_CUTS, BAD_CUTS_64, DEVICE, bits
from tests.strategies import Case, make

pytestmark = pytest.mark.gpu
SPLIT = pytest.mark.parametrize("split", [1, 2], ids=["v_split=1", "v_split=2"])
BOTH = pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])


@contextlib.contextmanager
def pause_behind_launches() -> Iterator[None]:
    """A thread that has launched a kernel gives up the GIL, so that another's launches come between those of a call."""
    load = jit.load

    def slow(config: Any) -> Callable[..., Any]:
        kernel = load(config)

        def launch(*arguments: Any) -> None:
            kernel(*arguments)
            time.sleep(1e-5)

        return launch

    with pytest.MonkeyPatch.context() as m:
        m.setattr(jit, "load", slow)
        m.setattr(known_calls, "known", {})
        yield


@contextlib.contextmanager
def v_split(split: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hopper, "v_split", lambda *_: split)
        m.setattr(hopper, "builds_maps", lambda *_: False)
        m.setattr(known_calls, "known", {})
        yield


def run(function: Callable[..., Any], kwargs: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, ...]:
    kwargs = {**kwargs, "output_final_state": True, **changes}
    if function is fused_recurrent_kda:
        kwargs.pop("safe_gate", None)
    return function(**kwargs)


# ---- host threads that share the default stream


SHARED = {  # T, H, lengths of a packed batch, weak gates, checkpoints, blocks that share a head or None
    "cut": ((1200,) * 7, 31, "strong", None, 1),
    "segments": ((8192,), 4, "strong", None, 1),
    "maps": ((8192,), 4, "weak", None, None),
    "checkpoints": ((8192,), 4, "weak", 512, None),
    "split": ((4096,), 8, "strong", None, 2),
    "decode": ((1,) * 64, 8, "strong", None, 0),
}


@pytest.mark.parametrize("kind", SHARED)
def test_threads_on_the_default_stream(kind: str, threads: int = 3, calls: int = 1500) -> None:
    """Other calls run between two launches of one call, and a replayed graph beside them: the same bits as alone."""
    lengths, H, decay, interval, split = SHARED[kind]
    packed = "int32" if len(lengths) > 1 else None
    case = Case(51, lengths, packed, H=H, decay=decay, initial_state="fp32", final_state="new")
    function = fused_recurrent_kda if kind == "decode" else chunk_kda
    inputs = [make(replace(case, seed=51 + i), DEVICE).kwargs for i in range(threads)]
    options = {} if interval is None else {"checkpoint_interval": interval}

    def call(i: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [*run(function, inputs[i], **options)]

    def differs(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(bits(x) != bits(y)).any() for x, y in zip(found, wanted, strict=True)]).any()

    with pause_behind_launches(), v_split(split) if split else contextlib.nullcontext():
        alone = [[x.clone() for x in call(i)] for i in range(threads)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = call(0)
        wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(threads + 1)]
        failed: list[BaseException] = []
        start = threading.Barrier(threads + 1)

        def work(i: int) -> None:
            try:
                start.wait()
                for n in range(calls):
                    if i < threads:
                        wrong[i] += differs(call(i), alone[i])
                    else:
                        graph.replay()
                        wrong[i] += differs(replayed, alone[0])
                    if n % 50 == 49:
                        torch.cuda.current_stream().synchronize()
            except BaseException as error:  # a thread's error ends with it
                failed.append(error)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(threads + 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failed, failed
    assert [int(x) for x in wrong] == [0] * (threads + 1)
    for kept in hopper.kept_workspaces.values():
        assert len(kept) <= threads + 1


# ---- tokens of no sequence


def uncovered(cuts: list[int], T: int) -> list[int]:
    cuts = [min(max(x, 0), T) for x in cuts]
    has = {t for a, b in zip(cuts[:-1], cuts[1:], strict=True) for t in range(a, b)}
    return [t for t in range(T) if t not in has]


WRONG = {**BAD_CUTS, **BAD_CUTS_64}
RIGHT = {"tail": [0, 30, 30, 61], "none": [0, 0, 0, 0], "head": [20, 30, 50, 100], "both": [7, 8, 8, 90]}


@pytest.mark.parametrize("out", ["contiguous", "strided", None])
@pytest.mark.parametrize("V", [128, 64])
@pytest.mark.parametrize("name", [*WRONG, *RIGHT])
@SPLIT
@BOTH
def test_tokens_of_no_sequence_are_zero(
    function: Callable[..., Any], split: int, name: str, V: int, out: str | None
) -> None:
    """Whatever cu_seqlens is; and the states after them."""
    if split == 2 and (V == 64 or function is fused_recurrent_kda):
        pytest.skip("one block has all of V")
    cuts, T = {**WRONG, **RIGHT}[name], 100
    kwargs = make(Case(52, (50, 30, 20), "int64", H=3, V=V, initial_state="fp32"), DEVICE).kwargs
    kwargs["cu_seqlens"].copy_(torch.tensor(cuts))
    o = torch.full((1, T, 3, V), math.nan, dtype=torch.bfloat16, device=DEVICE)
    if out == "strided":
        o = torch.full((1, T, 5, 2 * V), math.nan, dtype=torch.bfloat16, device=DEVICE)[:, :, 1:4, :V]
    options: dict[str, Any] = {"out": o} if out else {}
    if function is fused_recurrent_kda:
        options["token_states"] = torch.full((1, T, 3, 128, V), math.nan, device=DEVICE)
    with v_split(split):
        o, _, *states = run(function, kwargs, **options)
    rest = uncovered(cuts, T)
    for x in (o, *states):
        assert (x[:, rest] == 0).all() and x.isfinite().all()


@pytest.mark.parametrize("T", [1, 77])
@BOTH
def test_no_sequence_at_all(function: Callable[..., Any], T: int) -> None:
    kwargs = make(Case(53, (T,), "int32", H=2), DEVICE).kwargs
    kwargs["cu_seqlens"] = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    o = torch.full((1, T, 2, 128), math.nan, dtype=torch.bfloat16, device=DEVICE)
    run(function, kwargs, out=o)
    assert (o == 0).all()


@SPLIT
def test_a_long_tail_and_many_sequences(split: int) -> None:
    case = Case(54, tuple(n % 5 for n in range(300)), "int32", tail=20_000, H=3, final_state="new")
    o = torch.full((1, case.T, 3, 128), math.nan, dtype=torch.bfloat16, device=DEVICE)
    with v_split(split):
        run(chunk_kda, make(case, DEVICE).kwargs, out=o)
    assert (o[:, case.cuts[-1] :] == 0).all() and o.isfinite().all()


# ---- states from one pool into another


@pytest.mark.parametrize("lengths, packed", [((0, 0, 0), "int32"), ((0, 0), None), ((5, 0, 40), "int64")])
@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")])
@BOTH
def test_states_reach_another_pool(
    function: Callable[..., Any], dtypes: tuple[str, str], lengths: tuple[int, ...], packed: str | None
) -> None:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    case = Case(55, lengths, packed, H=2)
    kwargs = make(case, DEVICE).kwargs
    pool = torch.randn(6, 2, 128, 128, device=DEVICE).to(types[dtypes[0]])
    indices = torch.tensor([4, -1, 1][: case.N], dtype=torch.int32, device=DEVICE)
    results = []
    for backend in (None, "reference"):
        other = torch.full(pool.shape, 7.0, dtype=types[dtypes[1]], device=DEVICE)
        run(function, kwargs, initial_state=pool, state_indices=indices, final_state=other, backend=backend)
        results.append(other.float())
    kernel, reference = results
    for n, (i, length) in enumerate(zip(indices.tolist(), lengths, strict=True)):
        if i < 0:
            continue
        if length == 0:
            assert torch.equal(kernel[i], pool[i].to(types[dtypes[1]]).float()), n
        assert relative_error(kernel[i], reference[i]) <= BOUND
    others = [i for i in range(6) if i not in indices.tolist()]
    assert (kernel[others] == 7).all()


# ---- gates at their ends


@pytest.mark.parametrize("A_log", [88.0, 89.0, 1e4, -1e4, -math.inf, 20.0])
@pytest.mark.parametrize("dt_bias", [None, 0.0, 1e4, -1e4, 60.0, -60.0])
@pytest.mark.parametrize("g", [0.0, 1.0, -1.0, 1e4, -1e4])
@pytest.mark.parametrize("gate", ["safe", "softplus"])
@BOTH
def test_gates_at_their_ends(
    function: Callable[..., Any], gate: str, g: float, dt_bias: float | None, A_log: float
) -> None:
    """Of the log decay: exp(A_log) (g + dt_bias) may overflow, sigmoid and softplus of it do not."""
    kwargs = make(Case(56, (40,), H=2, gate=gate, initial_state="fp32", dt_bias="heads"), DEVICE).kwargs
    kwargs["g"].fill_(g)
    kwargs["A_log"].fill_(A_log)
    if dt_bias is None:
        kwargs.pop("dt_bias")
    else:
        kwargs["dt_bias"].fill_(dt_bias)
    o, S = run(function, kwargs)
    x = kwargs["g"].double() + (dt_bias or 0.0)
    a = torch.tensor(A_log, dtype=torch.float64)
    if gate == "safe":
        decay = kwargs["lower_bound"] * torch.where(x == 0, 0.0, a.exp() * x).sigmoid()
    else:  # in log space: softplus(x) is exp(x) where x is far below 0
        decay = -torch.where(x < -30, (a + x).exp(), (a + torch.nn.functional.softplus(x).log()).exp())
    # what is left of a token that loses everything is not compared
    kwargs = {**kwargs, "g": decay.clamp(min=-1e4), "use_gate_in_kernel": False, "lower_bound": None}
    for name in ("A_log", "dt_bias", "safe_gate"):
        kwargs.pop(name, None)
    o_true, S_true = recurrence(**{**kwargs, "output_final_state": True})
    assert S_true is not None
    assert relative_error(o, o_true) <= BOUND and relative_error(S, S_true) <= BOUND


# ---- numbers that are not finite, or whose squares are not


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
@SPLIT
@BOTH
def test_what_came_before_stays(function: Callable[..., Any], split: int, gate: str, name: str, poison: float) -> None:
    """Of a token that is not finite only what comes later may show anything, in its head and sequence; what the
    definition has as a number is that number."""
    if split == 2 and function is fused_recurrent_kda:
        pytest.skip("one block has a row")
    call = make(Case(57, (40, 75, 33), "int64", H=2, gate=gate, initial_state="fp32"), DEVICE)
    for token in (0, 9, 31, 40, 74):
        kwargs = {**call.kwargs, name: call.tensors[name].clone()}
        at = kwargs[name][0, 40 + token, 1]
        if name == "beta":
            at.fill_(poison)
        else:
            at[token] = poison
        with v_split(split):
            o, S = run(function, kwargs)
        o_true, S_true = recurrence(
            **{**kwargs, "cu_seqlens": torch.tensor([0, 40, 115, 148]), "output_final_state": True}
        )
        assert S_true is not None
        expected_finite = o_true.isfinite()
        assert o[expected_finite].isfinite().all(), (token, "o")
        assert S[S_true.isfinite()].isfinite().all(), (token, "S")
        before = slice(40, 40 + token)
        for cut, h in ((before, 1), (slice(0, 40), 1), (slice(115, 148), 1), (slice(None), 0)):
            want = o_true[:, cut, h]
            if want.numel():
                assert relative_error(o[:, cut, h], want) <= BOUND * (1 + 2 / want.shape[1] ** 0.5), (token, cut, h)
        if math.isnan(poison):
            assert not o[~expected_finite].isfinite().any(), (token, "a number where there is none")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [1.0, 2.0**40, 2.0**63, 2.0**64, 2.0**100, 3.38e38])
@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
@SPLIT
@BOTH
def test_large_queries_and_keys(function: Callable[..., Any], split: int, gate: str, size: float, dtype: str) -> None:
    """l2norm of whatever the dtype has."""
    if split == 2 and function is fused_recurrent_kda:
        pytest.skip("one block has a row")
    if dtype == "fp16" and size > 1:
        size = 65504.0
    call = make(Case(58, (100, 33), "int32", H=2, gate=gate, dtype=dtype, g_dtype=dtype, initial_state="fp32"), DEVICE)
    kwargs = dict(call.kwargs)
    for name in ("q", "k"):
        x = kwargs[name].clone()
        x[:, 20:24] = (x[:, 20:24].double().clamp(-1, 1) * size).to(x.dtype)
        x[:, 50] = torch.where(x[:, 50] > 0, size, -size)
        kwargs[name] = x
    with v_split(split):
        o, S = run(function, kwargs)
    o_true, S_true = recurrence(**{**kwargs, "cu_seqlens": torch.tensor([0, 100, 133]), "output_final_state": True})
    assert S_true is not None
    assert relative_error(o, o_true) <= BOUND and relative_error(S, S_true) <= BOUND
