"""chunk_kda on a Hopper GPU against the fp64 reference on the same GPU. Needs one; `pytest -m gpu`.

KDA_CUTE_GPU_EXAMPLES sets the number of random calls (2000).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings

from kda_cute import contract, known_calls
from kda_cute.backends import hopper
from kda_cute.kernels.config import ITEM_COST, part
from kda_cute.ops import chunk_kda, chunk_kda_summary, fwd
from kda_cute.reference import chunked, recurrence
from tests.gpu.oracle import (
    BOUND,
    DRAW,
    check_checkpoints,
    check_o,
    check_offsets,
    check_state,
    give_memory_back,
    relative_error,
    truth,
)
from tests.strategies import DTYPES, Call, Case, Guarded, cases, guarded_states, make

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SENTINEL = -7.25  # around outputs; any change of it, to NaN too, is seen in the bits
VARLEN = Case(11, (300, 0, 17, 1, 64, 130, 15), "int64", H=3, initial_state="fp32", final_state="new")
FIXED = Case(12, (257, 257), H=4, g_dtype="fp32", initial_state="bf16", final_state="new", state_v_first=True)
LOG = Case(13, (65, 33, 200), "int32", H=2, gate="log", g_dtype="fp32", final_state="new", state_v_first=True)
BOTH = pytest.mark.parametrize("case", [VARLEN, FIXED, LOG], ids=["varlen", "fixed", "log"])


@pytest.fixture(scope="module", autouse=True, params=[1, 2], ids=["v_split=1", "v_split=2"])
def split_of(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each test with a head in one block and with one in two, whatever the heuristic would take."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hopper, "v_split", lambda *_: request.param)
        m.setattr(hopper, "builds_maps", lambda *_: False)  # see test_maps.py
        m.setattr(known_calls, "known", {})
        yield request.param


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """The kernel gets so many blocks at most, and so cuts items, as otherwise only in large calls. 0: all there are."""
    with pytest.MonkeyPatch.context() as m:
        if count:
            m.setattr(hopper, "sm_count", lambda _: count)
            m.setattr(known_calls, "known", {})
        yield


@contextlib.contextmanager
def uncut() -> Iterator[None]:
    """Each sequence and head goes from its begin to its end in one block."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hopper, "workspace_bytes", lambda *_: 0)
        m.setattr(known_calls, "known", {})
        yield


@pytest.fixture(params=[0, 5], ids=["whole", "cut"])
def few_blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    with multiprocessors(request.param):
        yield


def run(call: Call, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    o, S = chunk_kda(**{**call.kwargs, "output_final_state": True, **changes})
    assert S is not None
    return o, S


# ---- the whole contract


def replaced(call: Call, pool: torch.Tensor | None) -> Call:
    """The call as it was before its pool was written."""
    if pool is None:
        return call
    return Call({**call.inputs, "initial_state": Guarded(pool, pool)}, call.flags, call.case)


def check(case: Case, run: Callable[..., Any] = chunk_kda, at_most: float = BOUND, draw: float = DRAW) -> None:
    """One call between canaries, with poison where its results go, against fp64."""
    give_memory_back()
    call = make(case, DEVICE)
    expected = truth(call)
    outputs: dict[str, Guarded] = {}
    shape = (case.B, case.T, case.HV, case.V)
    if case.out:
        strides, offset = case.out_layout.strides(shape), case.out_layout.offset
        outputs["out"] = Guarded.allocate(shape, DTYPES[case.dtype], DEVICE, SENTINEL, strides, offset)
    else:  # most likely the memory that the call allocates next
        torch.full(shape, math.nan, dtype=DTYPES[case.dtype], device=DEVICE)
    if case.final_state in ("bf16", "fp32"):
        dtype = DTYPES[case.final_state]
        outputs["final_state"] = guarded_states(
            torch.empty(case.state_shape, dtype=dtype, device=DEVICE), case, SENTINEL
        )
    for guarded in outputs.values():
        guarded.tensor.fill_(math.nan)
    indices = call.tensors.get("state_indices")
    if indices is not None:
        outputs["initial_state"] = call.inputs["initial_state"]
    if case.offsets is not None:
        outputs["checkpoint_state"] = call.inputs["checkpoint_state"]
        kept_before = call.tensors["checkpoint_state"].clone()
    before = {name: guarded.snapshot() for name, guarded in {**call.inputs, **outputs}.items()}
    pool = call.tensors["initial_state"].clone() if indices is not None else None

    given = {**call.kwargs, **{name: guarded.tensor for name, guarded in outputs.items()}}
    if case.checkpoint_interval is not None:
        given["checkpoint_interval"] = case.checkpoint_interval
    o, S, *states = run(**given)

    covered = case.T if case.cu_seqlens is None else case.cuts[-1]
    intact = {}
    for name, guarded in call.inputs.items():
        if name in outputs:
            continue
        intact[name] = guarded.untouched_outside(before[name], guarded.tensor[:0])
    for name, guarded in outputs.items():
        intact[name] = guarded.untouched_outside(before[name])
    verdict = torch.stack(list(intact.values())).tolist()
    assert all(verdict), f"written where nothing may be: {[n for n, ok in zip(intact, verdict, strict=True) if not ok]}"

    assert o.shape == shape and o.dtype == DTYPES[case.dtype]
    assert (o[:, covered:] == 0).all(), "o of tokens of no sequence is not zero"
    check_o(call, o, expected, at_most)
    if case.checkpoint_interval is not None:
        check_checkpoints(call, states[0])
    if case.offsets is not None:
        check_offsets(replaced(call, pool), kept_before)
    if indices is not None:
        assert S is outputs["initial_state"].tensor and pool is not None
        kept = ~call.null
        others = torch.ones(len(S), dtype=torch.bool, device=S.device)
        others[indices[kept]] = False
        assert torch.equal(bits(S[others]), bits(pool[others]))
        final = expected.S.to(S.dtype)  # what is not kept is not compared
        final[kept] = S[indices[kept]]
        check_state(call, final, expected, at_most, draw)
    elif case.final_state is None:
        assert S is None
    else:
        assert S is not None and S.shape == case.state_shape
        assert S.dtype == (torch.float32 if case.final_state == "new" else DTYPES[case.final_state])
        check_state(call, S, expected, at_most, draw)
    if case.out:
        assert o is outputs["out"].tensor
    if "final_state" in outputs:
        assert S is outputs["final_state"].tensor


@settings(settings.get_profile(os.environ.get("KDA_CUTE_GPU_PROFILE", "gpu")))
@given(case=cases(served=True, max_tokens=400))
@example(  # a state that is what one token left in a channel or two
    case=Case(
        344, (131, 131), H=4, group=3, gate="log", decay="strong", beta_dtype="bf16", beta_sigmoid=False,
        final_state="bf16", zeros=True,
    )
)  # fmt: skip
def test_call(case: Case) -> None:
    with multiprocessors((0, 2, 5)[case.seed % 3]):
        check(case)


LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
@pytest.mark.parametrize("g_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("cu_seqlens", ["int32", "int64"])
def test_every_length_at_once(gate: str, g_dtype: str, cu_seqlens: str) -> None:
    check(Case(14, LENGTHS + LENGTHS[::-1], cu_seqlens, tail=5, H=3, gate=gate, g_dtype=g_dtype, initial_state="fp32",
               final_state="fp32", out=True))  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
def test_every_length_as_a_batch(length: int, gate: str) -> None:
    check(Case(15, (length,) * 3, H=2, gate=gate, initial_state="bf16", final_state="bf16", out=True))


@pytest.mark.parametrize("lengths", [(8192,), (3000, 1, 5000, 191)], ids=["one", "four"])
@pytest.mark.parametrize("decay", ["strong", "weak", "mixed"])
def test_long(lengths: tuple[int, ...], decay: str) -> None:
    check(Case(16, lengths, "int64", H=4, decay=decay, initial_state="fp32", final_state="fp32", out=True))


def test_many_heads() -> None:
    check(Case(17, (200, 123), "int32", H=96, initial_state="fp32", final_state="new"))


def test_more_sequences_than_a_grid_is_high() -> None:
    """65535 is the limit of gridDim.y. The ends are compared; the lengths are 0, 1, 2, 0, 1, 2 ..."""
    N, ends = 70_001, 300
    call = make(Case(18, tuple(n % 3 for n in range(N)), "int32", H=1, final_state="new"), DEVICE)
    o, S = run(call)
    for first in (0, N - ends):
        a, b = call.case.cuts[first], call.case.cuts[first + ends]
        part = {n: call.kwargs[n][:, a:b] for n in ("q", "k", "v", "g", "beta")}
        cuts = torch.tensor(call.case.cuts[first : first + ends + 1]) - a
        o_ref, S_ref = chunked(**{**call.oracle_kwargs, **part, "cu_seqlens": cuts})
        assert S_ref is not None
        assert relative_error(o[:, a:b], o_ref) <= BOUND
        assert relative_error(S[first : first + ends], S_ref) <= BOUND


# ---- accuracy: the figures that the project promises


GATES = pytest.mark.parametrize("gates, bound", [("strong", 4.2e-3), ("weak", 5.0e-3), ("mixed", 5.0e-3)])


def errors(
    T: int, H: int, gates: str, g_dtype: str, state: bool, reference: Callable[..., Any],
    lower_bound: float | None = -5.0,
) -> tuple[float, float]:  # fmt: skip
    """Of o and the final state. strong: g, A_log, dt_bias of FlashKDA's benchmark."""
    D = 128
    generator = torch.Generator(DEVICE).manual_seed(19)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=DEVICE)

    q, k, v, beta = (x.bfloat16() for x in (*randn(3, 1, T, H, D), randn(1, T, H)))
    g = randn(1, T, H, D).to(DTYPES[g_dtype])
    A_log = torch.zeros(H, device=DEVICE)
    if gates == "strong":
        A_log = rand(H) if lower_bound else torch.linspace(0, math.log(200), H, device=DEVICE)
    # the softplus gate without A_log is a fifth of the safe one where both are weak: then as weak as that one
    weak = -8.0 + (0 if lower_bound else math.log(5))
    dt_bias = {"strong": rand(H, D), "weak": torch.full((H, D), weak, device=DEVICE), "mixed": 12 * rand(H, D) - 10}
    kwargs: dict[str, Any] = dict(
        q=q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias[gates], use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, lower_bound=lower_bound, state_v_first=True,
        initial_state=randn(1, H, D, D) if state else None, output_final_state=True,
    )  # fmt: skip
    o, S = chunk_kda(**kwargs)
    o_ref, S_ref = reference(**kwargs)
    assert S is not None and S_ref is not None
    return relative_error(o, o_ref), relative_error(S, S_ref)


@pytest.mark.parametrize("state", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("g_dtype", ["bf16", "fp32"])
@GATES
def test_accuracy(gates: str, bound: float, g_dtype: str, state: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """T = 2048, H = 4, against the fp64 recurrence."""
    error = errors(2048, 4, gates, g_dtype, state, recurrence)
    with capsys.disabled():
        setting = f"{gates} gates, g {g_dtype}, {'with' if state else 'no'} initial state"
        print(f"\n  {setting}: o {error[0]:.2e}, final state {error[1]:.2e}, at most {bound:.1e}", end="")
    assert max(error) <= bound


@pytest.mark.parametrize("state", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("g_dtype", ["bf16", "fp32"])
@GATES
def test_accuracy_without_a_lower_bound(
    gates: str, bound: float, g_dtype: str, state: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The softplus gate, strong: exp(A_log) from 1 to 200."""
    error = errors(2048, 4, gates, g_dtype, state, recurrence, lower_bound=None)
    with capsys.disabled():
        setting = f"{gates} softplus gates, g {g_dtype}, {'with' if state else 'no'} initial state"
        print(f"\n  {setting}: o {error[0]:.2e}, final state {error[1]:.2e}, at most {bound:.1e}", end="")
    assert max(error) <= bound


@GATES
def test_accuracy_of_a_long_sequence(gates: str, bound: float, capsys: pytest.CaptureFixture[str]) -> None:
    """T = 65536, H = 2, against the chunked recurrence in fp64."""
    error = errors(65536, 2, gates, "bf16", True, functools.partial(chunked, dtype=torch.float64))
    with capsys.disabled():
        print(
            f"\n  {gates} gates, T = 65536: o {error[0]:.2e}, final state {error[1]:.2e}, at most {bound:.1e}", end=""
        )
    assert max(error) <= bound


# ---- states on the way


@pytest.mark.parametrize("interval", [32, 64, 1024])
@pytest.mark.parametrize("decay", ["strong", "weak"])
@pytest.mark.parametrize("lengths", [(5000,), (300, 0, 17, 1, 2500, 64, 130), (200, 200, 200)])
@pytest.mark.parametrize("v_first", [False, True])
def test_checkpoints(lengths: tuple[int, ...], decay: str, interval: int, v_first: bool) -> None:
    """Those of the reference, and o and the final states of a call without them; in segments and again too."""
    cu_seqlens = None if len(set(lengths)) == 1 else "int32"
    case = Case(
        30, lengths, cu_seqlens, H=2, decay=decay, initial_state="fp32", final_state="new", state_v_first=v_first
    )
    call = make(case, DEVICE)
    o, S = run(call)
    o_kept, S_kept, states = chunk_kda(**call.kwargs, checkpoint_interval=interval)
    assert relative_error(o_kept, o) <= BOUND and relative_error(S_kept, S) <= BOUND
    want = chunk_kda(**{**call.kwargs, "output_final_state": True}, checkpoint_interval=interval, backend="reference")[
        2
    ]
    count = sum(-(-n // interval) for n in lengths) if cu_seqlens else want.shape[1]
    assert states.shape == want.shape
    assert relative_error(states[:, :count], want[:, :count]) <= BOUND
    kept = chunk_kda(**call.kwargs, return_intermediate_states=True)[2]
    assert kept.dtype == torch.bfloat16 and torch.isfinite(kept).all()


# ---- the same bits, whenever and wherever


@pytest.mark.parametrize("count", [2, 3, 8, 31])
@pytest.mark.parametrize("lengths", [(333,) * 5, (700, 0, 1, 33, 64, 1500, 31) * 3], ids=["fixed", "packed"])
@pytest.mark.parametrize("g_dtype", ["bf16", "fp32"])
def test_cuts_change_no_bit(g_dtype: str, lengths: tuple[int, ...], count: int) -> None:
    """An item goes on in another block with the state that it had in fp32."""
    cu_seqlens = "int32" if len(set(lengths)) > 1 else None
    call = make(Case(23, lengths, cu_seqlens, H=7, g_dtype=g_dtype, initial_state="fp32", final_state="new"), DEVICE)
    with uncut():
        o_whole, S_whole = run(call)
    with multiprocessors(count):
        o, S = run(call)
    assert torch.equal(o, o_whole) and torch.equal(S, S_whole)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("count", [0, 24])
@pytest.mark.parametrize("lengths", [(3000,), (1500, 33, 0, 2500)], ids=["one", "four"])
@pytest.mark.parametrize("inputs", ["strong", "edge", "weak", "mixed", "turning", "poisoned", "huge", "silent"])
def test_segments_change_no_bit(inputs: str, lengths: tuple[int, ...], count: int, split_of: int) -> None:
    """Whether segments begin without the state before them, wait for it, or begin wrongly and run again: edge forgets
    just enough for a guess, which is right in some segments and wrong in others; turning is weak in one head and now
    weak, now strong in another; poisoned has a NaN and an infinity that what comes later would forget; huge an initial
    state and values that it forgets late; silent has no values, so that states come to zero, and stay."""
    H, sms = 3, count or torch.cuda.get_device_properties(DEVICE).multi_processor_count
    units = [-(-length // 32) + ITEM_COST for length in lengths]
    assert part(H * sum(units), max(units), sms // split_of)[1] > 0, "no segments"
    decay = inputs if inputs in ("weak", "mixed") else "strong"
    cu_seqlens = "int64" if len(lengths) > 1 else None
    case = Case(27, lengths, cu_seqlens, H=H, decay=decay, initial_state="fp32", final_state="new")
    call = make(case, DEVICE)
    x = call.tensors
    if inputs == "edge":
        x["A_log"][:], x["dt_bias"][:] = 0, -1.285  # 2^-50 in 32 tokens, in every channel
        x["g"][:] = 0
    elif inputs == "turning":
        x["A_log"][:] = 0
        x["g"][:, :, 0] -= 12
        x["g"][:, 700:1400, 1] -= 12
    elif inputs == "poisoned":
        x["v"][0, 1000, :, 5] = math.nan
        x["initial_state"][0, :, :, 9] = math.inf
    elif inputs == "huge":
        x["v"][0, 1000:1030] *= 1e30
        x["initial_state"] *= 1e30
    elif inputs == "silent":
        x["v"][:] = 0
    with uncut():
        o_whole, S_whole = run(call)
    for _ in range(10):
        with multiprocessors(count):
            o, S = run(call)
        if inputs == "poisoned":  # what comes out not finite is done again from its segment's begin, token by token
            for x, whole in ((o, o_whole), (S, S_whole)):
                finite = whole.isfinite()
                assert torch.equal(x.isfinite(), finite) and relative_error(x[finite], whole[finite]) <= BOUND
        else:
            assert torch.equal(bits(o), bits(o_whole)) and torch.equal(bits(S), bits(S_whole))


@BOTH
@pytest.mark.usefixtures("few_blocks")
def test_deterministic(case: Case) -> None:
    call = make(case, DEVICE)
    o, S = run(call)
    for _ in range(19):
        o_again, S_again = run(call)
        assert torch.equal(o, o_again) and torch.equal(S, S_again)


@BOTH
@pytest.mark.usefixtures("few_blocks")
def test_graph_replays_with_other_inputs(case: Case) -> None:
    call, other = make(case, DEVICE), make(Case(**{**vars(case), "seed": 99, "lengths": case.lengths[::-1]}), DEVICE)
    o_eager, S_eager = run(other)
    run(call)  # warm-up: compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, S = run(call)
    for name, x in call.tensors.items():
        x.copy_(other.tensors[name])
    for _ in range(2):
        o.fill_(math.nan), S.fill_(math.nan)
        graph.replay()
        assert torch.equal(o, o_eager) and torch.equal(S, S_eager)


@BOTH
@pytest.mark.usefixtures("few_blocks")
def test_runs_on_the_current_stream(case: Case) -> None:
    """Inputs that become right only behind a long wait on a side stream."""
    call = make(case, DEVICE)
    o_default, S_default = run(call)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            late = {name: x.clone() for name, x in call.tensors.items()}
            late["v"].zero_()
            torch.cuda._sleep(2_000_000)
            late["v"].copy_(call.tensors["v"])
            results.append(run(call, **late))
    torch.cuda.synchronize()
    for o, S in results:
        assert torch.equal(o, o_default) and torch.equal(S, S_default)


@BOTH
def test_waits_for_nothing(case: Case) -> None:
    call = make(case, DEVICE)
    run(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_gpu() -> None:
    """Tensors on a device that is not the current one."""
    call = make(FIXED, DEVICE)
    o, S = run(call)
    o_other, S_other = run(call, **{name: x.to("cuda:1") for name, x in call.tensors.items()})
    assert o_other.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(o.cpu(), o_other.cpu()) and torch.equal(S.cpu(), S_other.cpu())


def test_order_of_sequences_does_not_matter() -> None:
    call = make(VARLEN, DEVICE)
    o, S = run(call)
    order = [3, 1, 6, 0, 5, 4, 2]
    cuts = VARLEN.cuts
    tokens = torch.tensor([t for n in order for t in range(cuts[n], cuts[n + 1])], device=DEVICE)
    permuted = Case(**{**vars(VARLEN), "lengths": tuple(VARLEN.lengths[n] for n in order)})
    inputs = {name: call.tensors[name][:, tokens] for name in ("q", "k", "v", "g", "beta")}
    o_permuted, S_permuted = run(
        call,
        **inputs,
        initial_state=call.tensors["initial_state"][order],
        cu_seqlens=torch.tensor(permuted.cuts, device=DEVICE),
    )
    assert torch.equal(o_permuted, o[:, tokens]) and torch.equal(S_permuted, S[order])


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("decay", ["strong", "weak", "mixed"])
def test_summary(decay: str, state_v_first: bool) -> None:
    """The map applied to the initial state is the final state, which another GPU would begin with."""
    case = Case(28, (1700,), H=3, decay=decay, initial_state="fp32", final_state="new", state_v_first=state_v_first)
    call = make(case, DEVICE)
    unused = ("q", "scale", "initial_state", "output_final_state")
    M, C = chunk_kda_summary(**{name: x for name, x in call.kwargs.items() if name not in unused})
    S0 = call.tensors["initial_state"].double()
    S = (S0 @ M.double() if state_v_first else M.double() @ S0) + C
    _, expected = chunked(**call.oracle_kwargs)
    assert expected is not None and relative_error(S, expected) <= BOUND


def test_fwd_is_chunk_kda() -> None:
    call = make(Case(**{**vars(VARLEN), "state_v_first": True, "dt_bias": "heads"}), DEVICE)
    a = call.tensors
    o, S = run(call)
    out, final_state = torch.empty_like(o), torch.empty_like(S)
    fwd(a["q"], a["k"], a["v"], a["g"], a["beta"], 128**-0.5, out, a["A_log"], a["dt_bias"], -5.0,
        initial_state=a["initial_state"], final_state=final_state, cu_seqlens=a["cu_seqlens"])  # fmt: skip
    assert torch.equal(out, o) and torch.equal(final_state, S)


def test_state_updated_in_place() -> None:
    """Serving passes one tensor as initial_state and final_state."""
    call = make(VARLEN, DEVICE)
    o, S = run(call)
    state = call.tensors["initial_state"].clone()
    o_in_place, _ = run(call, initial_state=state, final_state=state)
    assert torch.equal(o_in_place, o) and torch.equal(state, S)


# ---- large


def test_a_million_tokens() -> None:
    case = Case(20, (1 << 20,), H=1, decay="mixed", initial_state="fp32", final_state="new")
    call = make(case, DEVICE)
    o, S = run(call)
    o_ref, S_ref = chunked(**call.oracle_kwargs)
    assert S_ref is not None
    assert relative_error(o, o_ref) <= BOUND and relative_error(S, S_ref) <= BOUND
    assert relative_error(o[:, -100:], o_ref[:, -100:]) <= BOUND
    half = case.T // 2
    first, second = ({n: call.tensors[n][:, cut] for n in ("q", "k", "v", "g", "beta")}
                     for cut in (slice(None, half), slice(half, None)))  # fmt: skip
    o1, S1 = run(call, **first)
    o2, S2 = run(call, **second, initial_state=S1)
    assert relative_error(torch.cat((o1, o2), 1), o.double()) <= BOUND and relative_error(S2, S.double()) <= BOUND


def free_gigabytes(need: float) -> None:
    """Waits for a minute at most for what other processes use just then."""
    torch.cuda.empty_cache()
    end = time.monotonic() + 60
    while (free := torch.cuda.mem_get_info()[0] / 1e9) < need and time.monotonic() < end:
        time.sleep(1)
    if free < need:
        pytest.skip(f"needs {need} GB of GPU memory, {free:.0f} GB are free")


def big(*shape: int) -> torch.Tensor:
    """bf16 noise, over 2^31 elements: uniform, made in place, because randn's temporaries would double the memory."""
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).uniform_(-2, 2)


def test_past_2_to_the_31_elements() -> None:
    """As a batch and packed: the last sequence lies past 2^31 elements in q, k, v, g and o."""
    free_gigabytes(40)
    N, length, H, D = 33, 4096, 128, 128
    assert (N - 1) * length * H * D >= 2**31
    torch.manual_seed(21)
    q, k, v, g = (big(N, length, H, D) for _ in range(4))
    beta = big(N, length, H)
    flags: dict[str, Any] = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, lower_bound=-5.0,
                 use_beta_sigmoid_in_kernel=True, safe_gate=True, output_final_state=True)  # fmt: skip
    o, S = chunk_kda(q, k, v, g, beta, **flags)
    assert S is not None
    for n in (0, N - 2, N - 1):
        for h in (0, H - 1):
            part = [x[n : n + 1, :, h : h + 1] for x in (q, k, v, g, beta)]
            o_ref, S_ref = chunked(*part, **flags)
            assert S_ref is not None
            assert relative_error(o[n : n + 1, :, h : h + 1], o_ref) <= BOUND, (n, h)
            assert relative_error(S[n : n + 1, h : h + 1], S_ref) <= BOUND, (n, h)
    cuts = torch.arange(N + 1, device=DEVICE) * length
    packed = [x.flatten(0, 1)[None] for x in (q, k, v, g, beta)]
    del q, k, v, g
    o_packed, S_packed = chunk_kda(*packed, **flags, cu_seqlens=cuts)
    assert S_packed is not None and torch.equal(S_packed, S)
    assert all(torch.equal(o_packed[0, n * length : (n + 1) * length], o[n]) for n in range(N))


@pytest.mark.parametrize("state_v_first", [False, True])
def test_states_past_2_to_the_31_elements(state_v_first: bool) -> None:
    free_gigabytes(30)
    N, H, D = 1100, 128, 128
    assert (N - 20) * H * D * D >= 2**31
    torch.manual_seed(22)
    q, k, v, g = (big(1, 2 * N, H, D) for _ in range(4))
    beta = big(1, 2 * N, H)
    initial_state = big(N, H, D, D)
    cuts = 2 * torch.arange(N + 1, device=DEVICE)
    flags: dict[str, Any] = dict(
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, lower_bound=-1.0, use_beta_sigmoid_in_kernel=True,
        safe_gate=True, output_final_state=True, state_v_first=state_v_first,
    )  # fmt: skip
    o, S = chunk_kda(q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cuts, **flags)
    assert S is not None
    last = slice(N - 10, N)
    tokens = slice(2 * N - 20, 2 * N)
    o_ref, S_ref = chunked(
        *(x[:, tokens] for x in (q, k, v, g, beta)),
        initial_state=initial_state[last],
        cu_seqlens=2 * torch.arange(11),
        **flags,
    )
    assert S_ref is not None
    assert relative_error(o[:, tokens], o_ref) <= BOUND and relative_error(S[last], S_ref) <= BOUND


# ---- bad input


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
def test_nan_stays_in_its_sequence_and_head(gate: str, name: str, poison: float) -> None:
    case = Case(23, (40, 75, 1, 33), "int64", H=3, gate=gate, initial_state="fp32", final_state="new")
    call = make(case, DEVICE)
    o, S = run(call)
    for token in (0, 14, 74):  # in the first chunk, and next to the sequence behind
        bad = call.tensors[name].clone()
        if name == "initial_state":
            bad[1, 1, token] = poison
        else:
            bad[0, 40 + token, 1] = poison
        seen = 114 if name == "initial_state" else 40 + token
        o_bad, S_bad = run(call, **{name: bad})
        if math.isnan(poison):
            assert S_bad[1, 1].isnan().any() or name == "q"
            assert o_bad[0, seen, 1].isnan().any()
        o_bad[0, 40:115, 1], S_bad[1, 1] = o[0, 40:115, 1], S[1, 1]
        assert torch.equal(o_bad, o) and torch.equal(S_bad, S)


def test_nan_in_tokens_of_no_sequence() -> None:
    case = Case(24, (40, 23), "int64", tail=30, H=2, initial_state="fp32", final_state="new")
    call = make(case, DEVICE)
    o, S = run(call)
    for name in ("q", "k", "v", "g", "beta"):
        call.tensors[name][:, 63:] = math.nan
    o_bad, S_bad = run(call)
    assert torch.equal(o_bad[:, :63], o[:, :63]) and torch.equal(S_bad, S)


T_BAD = 100
BAD_CUTS = {
    "decreasing": [0, 60, 20, 100],
    "negative": [0, -30, 50, 100],
    "negative-start": [-17, 30, 50, 100],
    "past-T": [0, 50, 100, 101],
    "far-past-T": [0, 50, 100_000, 200_000],
    "starts-past-T": [150, 200, 250, 300],
    "overlong": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    "lowest": [-(2**31), 0, 50, -(2**31)],
    "mixed": [90, 10, 300, -5],
}
BAD_CUTS_64 = {"past-int32": [0, 2**33 + 5, 2**40, 2**62], "below-int32": [0, -(2**33) - 5, 2**33, -(2**62)]}


@pytest.mark.parametrize(
    "dtype, cuts",
    [
        pytest.param(dtype, cuts, id=f"{dtype}-{name}")
        for dtype, table in [("int32", BAD_CUTS), ("int64", {**BAD_CUTS, **BAD_CUTS_64})]
        for name, cuts in table.items()
    ],
)
@pytest.mark.parametrize("gate", ["safe", "softplus", "log"])
def test_bad_cu_seqlens(gate: str, dtype: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing out of bounds is written and nothing hangs; KDA_CUTE_CHECK=1 finds it."""
    case = Case(25, (50, 30, 20), dtype, H=3, gate=gate, initial_state="fp32", final_state="fp32", out=True)
    call = make(case, DEVICE)
    call.tensors["cu_seqlens"].copy_(torch.tensor(cuts))
    outputs = {
        "out": Guarded.allocate((1, T_BAD, 3, 128), torch.bfloat16, DEVICE, SENTINEL),
        "final_state": Guarded.allocate(case.state_shape, torch.float32, DEVICE, SENTINEL),
    }
    before = {name: guarded.snapshot() for name, guarded in {**call.inputs, **outputs}.items()}
    tensors = {name: guarded.tensor for name, guarded in outputs.items()}
    chunk_kda(**call.kwargs, **tensors)
    torch.cuda.synchronize()
    for name, guarded in call.inputs.items():
        assert guarded.untouched_outside(before[name], guarded.tensor[:0]), name
    for name, guarded in outputs.items():
        assert guarded.untouched_outside(before[name]), name
    monkeypatch.setattr(contract, "CHECK_VALUES", True)
    with pytest.raises(ValueError, match="cu_seqlens"):
        chunk_kda(**call.kwargs, **tensors)


def test_check_finds_a_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "CHECK_VALUES", True)
    call = make(LOG, DEVICE)
    run(call)
    call.tensors["g"][0, 5, 1, 7] = -5.5
    with pytest.raises(ValueError, match=r"g\[0, 5, 1, 7\] is -5.5"):
        run(call)


def test_reference_on_the_gpu() -> None:
    """What the kernel does not serve says so, and backend="reference" serves it there."""
    call = make(Case(26, (70,), H=2, group=2, gate="softplus", K=48, V=32, final_state="new"), DEVICE)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        run(call)
    o, S = run(call, backend="reference")
    o_ref, S_ref = chunked(**call.oracle_kwargs)
    assert S_ref is not None
    assert relative_error(o, o_ref) <= 2e-3 and relative_error(S, S_ref) <= 1e-5
