"""One case: every implementation on the same tensors, in one process, as rows for the JSON file."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import serving
from .cases import Case, Inputs, Serving, make_inputs
from .impls import IMPLS, Call, given, make, version
from .report import Row
from .timing import REPEATS, capture, event_times, host_time, profiler_times

REFERENCE_LIMIT = 1 << 16  # T * H up to which the reference is timed unasked
REFERENCE_REPEATS = 5  # it takes tens of milliseconds
SERVING_REPEATS = 10  # there are many cases
ERROR_TOKENS = 1024  # at the start of a sequence
ERROR_LIMIT = 0.05  # ten times that of any implementation here: what is above computes something else

Slice = tuple[slice, torch.Tensor, torch.Tensor]  # tokens, heads, o in fp64


class DeviceLost(RuntimeError):
    """An implementation left the GPU's context unusable: nothing can be measured any more in this process."""


def measure(case: Case, impls: Sequence[str], asked: bool, common: dict[str, Any]) -> list[Row]:
    """asked: the implementations were named, not all that there are. common: what all rows of the run share."""
    rows = {name: _row(case, name, common) for name in impls}
    floor = _row(case, "floor", common)
    floor.update(graph_us=floor["floor_us"], gb_s=common["copy_gb_s"], copy_percent=100.0)
    try:
        _measure(case, rows, asked)
    except DeviceLost:
        raise
    except Exception as e:
        _still_usable(e, case.name)
        for row in rows.values():
            row["refused"] = row["refused"] or f"the case failed: {reason(e)}"
    finally:
        _free()
    for row in rows.values():
        if row["graph_us"]:
            row["gb_s"] = case.floor_bytes / row["graph_us"] / 1e3
            row["copy_percent"] = 100 * row["floor_us"] / row["graph_us"]
    return [*rows.values(), floor]


def _measure(case: Case, rows: dict[str, Row], asked: bool) -> None:
    x = make_inputs(case)
    if "reference" in rows and not asked and case.T * case.H > REFERENCE_LIMIT:
        rows["reference"]["refused"] = f"not timed above T * H = {REFERENCE_LIMIT} unless named with --impl"
    calls = _first_calls(x, rows)

    replays, results = {}, {}
    for name, call in calls.items():
        if IMPLS[name].no_graph:
            rows[name]["no_graph"] = IMPLS[name].no_graph
            continue
        try:
            graph, results[name] = capture(call)
            replays[name] = graph.replay
        except Exception as e:
            _still_usable(e, IMPLS[name].label)
            rows[name]["no_graph"] = reason(e.__context__ or e)  # what invalidated the capture, not that it is invalid

    truth = expected(case, x) if any(IMPLS[name].checked for name in calls) else []
    for name, call in calls.items():
        if not IMPLS[name].checked:
            continue
        if name in replays:
            with torch.inference_mode():  # some results are inference tensors
                results[name][0].zero_()
                x.reset()
            replays[name]()  # so that what is compared is what the timed graph computes
            o = results[name][0]
        else:
            x.reset()
            o = call()[0]
        set_error(rows[name], error(o.view(x.v.shape), truth))

    repeats = SERVING_REPEATS if case.serving else REPEATS
    host = (SERVING_REPEATS, 2) if case.serving else ()
    for name, (lower, median, upper) in event_times(replays, repeats).items():
        rows[name].update(graph_us=median, graph_us_quartiles=(lower, upper))
    fast = {name: call for name, call in calls.items() if name != "reference"}
    eager = event_times(fast, repeats, from_idle=True)
    if "reference" in calls:
        eager |= event_times({"reference": calls["reference"]}, REFERENCE_REPEATS, from_idle=True)
    for name, (lower, median, upper) in eager.items():
        rows[name].update(eager_us=median, eager_us_quartiles=(lower, upper))
        rows[name]["host_us"] = (
            host_time(calls[name], 1, REFERENCE_REPEATS) if name == "reference" else host_time(calls[name], *host)
        )


def profile(case: Case, rows: Iterable[Row]) -> None:
    """Adds the profiler's times. After all else has been measured: once started it may go on slowing launches down."""
    measured = {row["impl"]: row for row in rows if row["eager_us"]}
    try:
        x = make_inputs(case)
        calls = {name: make(name, x) for name in measured}
        for call in calls.values():
            call()
        for name, us in profiler_times(calls).items():
            measured[name]["profiler_us"] = us
    except Exception as e:
        _still_usable(e, case.name)
        print(f"no profiler times for {case.name}: {reason(e)}", flush=True)
    finally:
        _free()


def _first_calls(x: Inputs, rows: dict[str, Row]) -> dict[str, Call]:
    """The calls that work, after their first run, which is timed, and two more."""
    calls = {}
    for name, row in rows.items():
        if row["refused"]:
            continue
        try:
            call = make(name, x)
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            row["first_s"] = time.perf_counter() - start
            call()
            call()
            torch.cuda.synchronize()
            calls[name] = call
        except Exception as e:
            _still_usable(e, row["label"])
            row["refused"] = reason(e)
    return calls


def expected(case: Case, x: Inputs) -> list[Slice]:
    """o in fp64: the first tokens of the first and the last sequence, first and last head."""
    from kda_cute import chunk_kda

    heads = torch.tensor(sorted({0, case.H - 1}), device=x.q.device)
    slices = []
    for n in sorted({0, case.N - 1}):
        start = sum(case.lengths[:n])
        tokens = slice(start, start + min(case.lengths[n], ERROR_TOKENS))
        if isinstance(x, Serving) and case.serving == "fused":
            every = torch.arange(case.H, device=x.q.device)
            slices.append((tokens, every, serving.expected(x, n)))
            continue
        q, k, v, g, beta = (y[:, tokens].index_select(2, heads).double() for y in (x.q, x.k, x.v, x.g, x.beta))
        with torch.no_grad():
            o, _ = chunk_kda(
                q, k, v, g, beta, initial_state=x.state[n : n + 1].index_select(1, heads),
                A_log=x.A_log.index_select(0, heads), dt_bias=x.dt_bias.index_select(0, heads),
                use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                lower_bound=x.lower_bound, state_v_first=x.state_v_first, backend="reference",
            )  # fmt: skip
        slices.append((tokens, heads, o))
    return slices


def error(o: torch.Tensor, truth: Sequence[Slice]) -> float:
    """Relative Frobenius error over all slices together."""
    wrong = sum(((o[:, tokens].index_select(2, heads) - t) ** 2).sum().item() for tokens, heads, t in truth)
    return math.sqrt(wrong / sum((t**2).sum().item() for _, _, t in truth))


def set_error(row: Row, err: float) -> None:
    row["err_o"] = err if math.isfinite(err) else None  # NaN is not JSON
    if not err <= ERROR_LIMIT:
        row["wrong"] = f"o is wrong: its error against fp64 is {err:.1e}"


def _row(case: Case, name: str, common: dict[str, Any]) -> Row:
    impl = IMPLS.get(name)
    return dict(
        case=case.name, T=case.T, N=case.N, H=case.H, gate=case.gate, impl=name,
        label=impl.label if impl else "memory floor", version=version(impl) if impl else "",
        peer=bool(impl and impl.peer), given=given(name, case) if impl else "", refused="", no_graph="", wrong="",
        graph_us=None, graph_us_quartiles=None, profiler_us=None, eager_us=None, eager_us_quartiles=None, host_us=None,
        first_s=None, floor_us=case.floor_bytes / common["copy_gb_s"] / 1e3, gb_s=None, copy_percent=None, err_o=None,
        **common,
    )  # fmt: skip


def reason(e: BaseException) -> str:
    lines = f"{type(e).__name__}: {e}".splitlines()
    return lines[0][:300].strip().rstrip(".")


def _still_usable(e: Exception, who: str) -> None:
    try:
        torch.cuda.synchronize()
    except Exception:
        raise DeviceLost(f"{who}: {reason(e)}") from e


def _free() -> None:
    gc.collect()
    with contextlib.suppress(Exception):  # the context may be lost, which is reported elsewhere
        torch.cuda.empty_cache()
