"""The benchmark's bookkeeping, its error figure, its tables and pictures, and what it says without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import types
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from bench import measure, plot, report
from bench.__main__ import run
from bench.cases import SUITES, Case, make_inputs
from bench.impls import IMPLS, given, make
from bench.measure import ERROR_LIMIT, ERROR_TOKENS, error, expected, set_error
from bench.timing import on_quickest_core, split_by_flush
from kda_cute import chunk_kda, demo

ROOT = Path(__file__).parents[1]

TOKENS = {  # suite -> tokens, sequences and heads of its cases
    "headline": [(8192, 1, 96), (8192, 1, 64), (8192, 6, 96), (8192, 6, 64), (8192, 8, 96), (8192, 8, 64)],
    "few-heads": [(8192, 1, 8), (8192, 1, 16), (8192, 1, 32), (2048, 1, 12)],
    "long-context": [(65536, 1, 8), (65536, 1, 16), (262144, 1, 4)],
    "short": [(8192, 64, 32), (8192, 256, 32), (8192, 1024, 32), (1024, 64, 32), (256, 64, 32)],
    "decode": [(4**i, 4**i, 32) for i in range(6)]
    + [(256, 64, 32), (1024, 64, 32)]
    + [(4**i, 4**i, 32) for i in range(6)],
    "tokens": [(1024, 1, 16), (4096, 1, 16), (16384, 1, 16)],
    "gates": [(8192, 1, 96)] * 3 + [(8192, 1, 16)] * 3 + [(65536, 1, 16)] * 3,
    "unbounded": [(8192, 1, H) for H in (96, 96, 64, 64, 16, 16)],
    "length": [(16384 << i, 1, 8) for i in range(7)],
    "serving": [(8256, 68, H) for H in (12, 32, 3, 4, 6, 8, 16)]
    + [(T, N, H) for H in (12, 32) for T, N in ((2048, 1), (2304, 258), (16400, 20))]
    + [(N, N, H) for H in (12, 32, 12, 32) for N in (1, 4, 16, 64, 256, 512)]
    + [(32 * S, 32, H) for H in (12, 32) for S in (2, 4, 8)],
    "ragged": [(70193, 51, 8), (70176, 51, 8)],
}


def row(case: Case, impl: str, us: float | None, **other: object) -> report.Row:
    """As bench/measure.py writes them, with a floor that a copy at 1 TB/s gives."""
    floor_us = case.floor_bytes / 1e6
    known = IMPLS.get(impl)
    return {
        "suite": "made-up", "case": case.name, "T": case.T, "N": case.N, "H": case.H, "gate": case.gate, "impl": impl,
        "label": known.label if known else "memory floor", "version": "1.0" if known else "",
        "peer": bool(known and known.peer), "given": "", "refused": "", "no_graph": "", "wrong": "", "graph_us": us,
        "graph_us_quartiles": us and [us - 1, us + 1], "profiler_us": None, "eager_us": us,
        "eager_us_quartiles": us and [us, us], "host_us": 20.0, "first_s": 0.1, "floor_us": floor_us,
        "gb_s": us and case.floor_bytes / us / 1e3, "copy_percent": us and 100 * floor_us / us, "err_o": 4e-3,
        "gpu": "a GPU", "torch": "2", "cuda": "13", "commit": "abc", "copy_gb_s": 1000.0, **other,
    }  # fmt: skip


def test_floor_counts_every_tensor_once():
    case = Case((5, 3), H=2)
    T, N, H, D = 8, 2, 2, 128
    tensors = 5 * T * H * D * 2 + T * H * 2  # q, k, v, g, o and beta in bf16
    states = 2 * N * H * D * D * 4
    assert case.floor_bytes == tensors + states


def test_suites_hold_what_they_are_named_for():
    assert {suite: [(case.T, case.N, case.H) for case in cases] for suite, cases in SUITES.items()} == TOKENS
    assert sorted({case.gate for case in SUITES["gates"]}) == ["mixed", "prod", "weak"]
    assert [case.state_v_first for case in SUITES["decode"]] == [True] * 8 + [False] * 6


def test_case_names_are_unique_in_a_suite():
    for suite, cases in SUITES.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), suite


def test_a_case_name_means_one_case():
    """Of all suites: what has one name is drawn once."""
    cases = {case for cases in SUITES.values() for case in cases}
    assert len({case.name for case in cases}) == len(cases)


def test_inputs_have_the_shape_of_the_case():
    case = Case((3, 2), H=2, gate="weak")
    x = make_inputs(case, device="cpu")
    assert x.q.shape == (1, 5, 2, 128) and x.state.shape == (2, 2, 128, 128)
    assert x.cu_seqlens is not None and x.cu_seqlens.tolist() == [0, 3, 5]
    assert torch.equal(make_inputs(case, device="cpu").v, x.v)


@pytest.mark.parametrize("lengths", [(40,), (20, 3, 33)])
def test_error_is_small_for_the_operation_and_large_for_a_wrong_last_sequence(lengths: tuple[int, ...]):
    case = Case(lengths, H=3)
    x = make_inputs(case, device="cpu")
    o, _ = IMPLS["reference"].make(x)()
    truth = expected(case, x)
    assert all(tokens.stop - tokens.start <= ERROR_TOKENS for tokens, _, _ in truth)
    assert error(o, truth) < 4e-3  # o in bf16 alone makes 1.7e-3
    wrong = o.clone()
    wrong[:, -lengths[-1] :] *= 2
    assert error(wrong, truth) > ERROR_LIMIT


SERVED = [Case((33, 5, 1, 1), 2, serving="mix")] + [
    Case((tokens,) * 3, 2, recurrent=True, serving=serving)
    for serving, tokens in (("decode", 1), ("fused", 1), ("verify", 4))
]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.serving)
def test_a_call_on_a_pool_is_right_and_can_be_repeated(case: Case):
    x = make_inputs(case, device="cpu")
    pool = x.pool.clone()
    assert x.pool.stride(0) > x.pool[0].numel() and torch.equal(x.state, x.pool[x.indices[:, 0]])
    truth = expected(case, x)
    for _ in range(2):
        x.reset()
        assert torch.equal(x.pool, pool)
        o, states = make("kda-cute", x)()
        assert error(o.view(x.v.shape), truth) < 4e-3
    slots = set(x.indices[:, 0].tolist())
    changed = {slot for slot in range(len(pool)) if not torch.equal(x.pool[slot], pool[slot])}
    assert changed == (set() if case.serving == "verify" else slots)
    assert states.shape == ((3, 4, 2, 128, 128) if case.serving == "verify" else pool.shape)


def test_verify_counts_the_state_of_each_token_and_fused_what_is_fused():
    verify, fused = (Case((S,) * 3, H=2, recurrent=True, serving=name) for S, name in ((4, "verify"), (1, "fused")))
    state, token = 2 * 128 * 128 * 4, 2 * (5 * 2 * 128 + 2)
    assert verify.floor_bytes == 12 * token + (3 + 12) * state
    columns = 3 * 2 * 128 * 2  # in bf16
    assert fused.floor_bytes == 3 * token + 6 * state + columns * (4 + 3 * 6) + 3 * 2 * 128 * 2


def test_servers_kernels_are_measured_in_serving_only():
    plain, served = Case((8,), 2), SERVED[0]
    assert [IMPLS[name].is_for(plain) for name in ("kda-cute", "fla", "sglang", "vllm")] == [True, True, False, False]
    assert all(IMPLS[name].is_for(served) for name in ("kda-cute", "fla", "sglang", "vllm"))
    for name in ("kda_hopper", "reference"):
        with pytest.raises(NotImplementedError, match="has no call with a pool"):
            make(name, make_inputs(served, device="cpu"))
    assert "dense" in given("vllm", served) and given("fla", plain) == ""
    assert given("kda_hopper", plain) and not given("kda_hopper", served)


def test_states_are_gathered_and_scattered_for_who_has_no_pool():
    """FlashKDA, which is made up here."""
    x = make_inputs(SERVED[0], device="cpu")

    def fwd(q, k, v, g, beta, scale, o, A_log, dt_bias, lower_bound, state, final_state, cu):
        chunk_kda(
            q, k, v, g, beta, scale, state, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, lower_bound=lower_bound, state_v_first=True, cu_seqlens=cu, A_log=A_log,
            dt_bias=dt_bias, out=o, final_state=final_state,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_kda", types.SimpleNamespace(fwd=fwd))
        o, _ = make("flash_kda", x)()
        theirs = x.pool.clone()
        with pytest.raises(NotImplementedError, match="has no call for decode"):
            make("flash_kda", make_inputs(SERVED[1], device="cpu"))
    x.reset()
    want, _ = make("kda-cute", x)()
    assert (o - want).norm() / want.norm() < 1e-2 and (theirs - x.pool).norm() / x.pool.norm() < 1e-3


def test_serving_has_a_process_of_its_own():
    command = [sys.executable, "-m", "bench", "--suite", "serving", "--suite", "headline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "a process of its own" in done.stderr


def test_nan_is_an_error_that_json_can_hold():
    made = row(Case((8,), 1), "fla", 1.0)
    set_error(made, math.nan)
    assert made["err_o"] is None and "nan" in made["wrong"]
    assert report.time_us(made) is None
    json.dumps(made, allow_nan=False)
    set_error(good := row(Case((8,), 1), "fla", 1.0), 4e-3)
    assert good["err_o"] == 4e-3 and not good["wrong"]


def test_peers_get_the_tensors_that_the_others_get():
    """kda_hopper, which has no gate, norm or sigmoid of its own, as the reference without them."""
    calls = []

    class Stub:
        @staticmethod
        def kimi_delta_attention(*tensors: torch.Tensor, **flags: object) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append((tensors, flags))
            q, k, v, g, beta, cu = tensors
            o, state = chunk_kda(
                *(y[None] for y in (q, k, v, g, beta)), cu_seqlens=cu, initial_state=flags["initial_state"],
                output_final_state=True, state_v_first=True, safe_gate=True,
            )  # fmt: skip
            return o[0], state

    x = make_inputs(Case((20, 7), H=2), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cudnn", Stub)
        patch.setitem(sys.modules, "cudnn.linear_attention", Stub)
        patch.setitem(sys.modules, "cudnn.linear_attention.ops", Stub)
        o, state = IMPLS["kda_hopper"].make(x)()
        IMPLS["kda_hopper_cuda"].make(x)()
    expected_o, expected_state = IMPLS["reference"].make(x)()
    assert (o - expected_o[0]).norm() / expected_o.norm() < 1e-2  # its q and k are rounded once more
    assert (state - expected_state).norm() / expected_state.norm() < 1e-2
    for tensors, _ in calls:
        assert [t.dtype for t in tensors] == [torch.bfloat16] * 3 + [torch.float32] * 2 + [torch.int32]
        assert all(t.is_contiguous() for t in tensors)
    assert torch.equal(calls[1][0][3], x.g[0].float())  # kda_hopper_cuda has them
    assert [flags["plan_name"] for _, flags in calls] == ["kda_hopper", "kda_hopper_cuda"]


def test_profiler_events_are_told_apart_by_the_flushes():
    one_round = [(1.0, "flush"), (10.0, "a1"), (5.0, "a2"), (1.0, "flush"), (7.0, "b")]
    events = [(float(i), us, name) for i, (us, name) in enumerate(one_round * 3)]
    assert split_by_flush(reversed(events), ["a", "b"], 3) == {"a": 15.0, "b": 7.0}
    assert split_by_flush(events[:-2], ["a", "b"], 3) == {"a": None, "b": None}  # a flush is missing
    assert split_by_flush([], ["a", "b"], 3) == {"a": None, "b": None}


def test_geometric_mean():
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert report.geometric_mean([3.0]) == pytest.approx(3.0)


def test_summary_takes_the_best_peer_and_says_what_was_refused():
    first, second, third = Case((8192,), 96), Case((8192,), 64), Case((2048,), 12)
    rows = [
        row(first, "kda-cute", 500.0),
        row(first, "fla", 2000.0),
        row(first, "kda_hopper_cuda", 1000.0, given="g in fp32"),
        row(first, "fla-gdn", 100.0),  # not the same operation: never the best peer
        row(first, "floor", 250.0),
        row(second, "kda-cute", 400.0),
        row(second, "fla", 3200.0),
        row(second, "kda_hopper_cuda", None, refused="NotImplementedError: no | such shape"),
        row(third, "kda-cute", None, refused="OutOfMemoryError"),
        row(third, "fla", None, profiler_us=90.0, no_graph="it waits for the GPU"),
    ]
    lines = report.summary(rows).splitlines()
    floor_us = first.floor_bytes / 1e6
    ours = f"500 | {500 / floor_us:.2f} | {100 * floor_us / 500:.0f}"
    assert lines[2] == f"| {first.name} | {ours} | cuDNN kda_hopper_cuda | 1000 | 2.00 |"
    assert lines[3].endswith("| fla (Triton) | 3200 | 8.00 |")
    assert lines[4] == f"| {third.name} | refused |  |  | fla (Triton) | 90.0 |  |"
    text = "\n".join(lines)
    assert "4.00 (2 cases) over the best peer" in text  # sqrt(2 * 8)
    assert "fla (Triton) 5.66 (2 cases), cuDNN kda_hopper_cuda 2.00 (1 case)." in text
    assert f"{second.name}: cuDNN kda_hopper_cuda does not run: NotImplementedError: no | such shape." in text
    assert f"{third.name}: fla (Triton) time from the profiler, no CUDA graph: it waits for the GPU." in text
    assert "cuDNN kda_hopper_cuda is given g in fp32." in text
    assert "a device copy moves 1000 GB/s" in text


def test_a_wrong_result_has_no_speed():
    case = Case((8192,), 96)
    rows = [row(case, "kda-cute", 500.0), row(case, "fla", 1.0, wrong="o is wrong"), row(case, "flash_kda", 750.0)]
    assert report.summary(rows).splitlines()[2].endswith("| FlashKDA | 750 | 1.50 |")
    assert "FlashKDA" in report.summary(rows) and f"{case.name}: o is wrong." in report.summary(rows)


def test_every_row_of_the_table_has_every_column():
    case = Case((8192,), 96)
    rows = [
        row(case, "kda-cute", 500.0),
        row(case, "fla", None, refused="a | b"),
        row(case, "reference", None, no_graph="plans on the host"),
        row(case, "floor", 250.0, eager_us=None, host_us=None, first_s=None, err_o=None, eager_us_quartiles=None),
    ]
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_quickest_core_is_one_of_ours_and_for_a_while_only():
    before = os.sched_getaffinity(0)
    with on_quickest_core():
        (core,) = os.sched_getaffinity(0)
    assert core in before and os.sched_getaffinity(0) == before


def test_pictures_of_made_up_rows(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[bench]'")
    rows = []
    for suite in ("headline", "few-heads", "long-context", "gates", "unbounded", "decode"):
        for i, case in enumerate(SUITES[suite]):
            made = row(case, "kda-cute", 300.0 + i), row(case, "fla", 900.0 + i), row(case, "floor", 200.0)
            rows += [{**x, "suite": suite} for x in made]
    rows.append(row(Case((8192,), 96), "kda_hopper", None, refused="refused"))
    written = plot.save(rows, tmp_path)
    assert [path.name for path in written] == ["floor.svg", "tokens.svg", "heads.svg", "gates.svg"]
    for path in written:
        assert path.stat().st_size < 300_000
        xml.etree.ElementTree.parse(path)
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plot.save(rows, tmp_path)] == first
    drawn = plot.drawable(rows)
    heads = plot.time_by_heads(drawn)
    assert heads is not None
    ours = next(line for line in heads.axes[0].lines if line.get_color() == plot.STYLES["kda-cute"][0])
    assert list(ours.get_xdata()) == [8, 16, 32, 64, 96]
    tokens, gates = plot.time_by_tokens(drawn), plot.time_by_gate(drawn)
    assert tokens is not None and titles(tokens) == ["one sequence, H = 8", "one sequence, H = 16"]
    assert gates is not None and titles(gates) == ["T = 8192, H = 16", "T = 8192, H = 96", "T = 65536, H = 16"]
    assert plot.save([], tmp_path) == []


@pytest.fixture
def without_gpu(monkeypatch):
    """bench.measure on the CPU: made-up times, the reference in place of kernels, a peer that refuses."""

    def refuses(x):
        raise NotImplementedError("too few heads.\nmore about it")

    def capture(call):
        if call()[1] is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return types.SimpleNamespace(replay=call), call()

    def writes(x):
        truth, state = IMPLS["reference"].make(x)()
        o = torch.empty_like(x.v)
        return lambda: (o.copy_(truth), state)

    def without_state(x):
        o, _ = IMPLS["reference"].make(x)()
        return lambda: (o, None)

    stand_ins = {"kda-cute": writes, "fla": without_state, "flash_kda": refuses}
    for name, stand_in in stand_ins.items():
        monkeypatch.setitem(IMPLS, name, dataclasses.replace(IMPLS[name], make=stand_in))
    monkeypatch.setitem(SUITES, "short", [Case((9, 4), 2), Case((7,), 2)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "_free", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(demo, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(measure, "make_inputs", lambda case: make_inputs(case, device="cpu"))
    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "event_times", lambda calls, *_, **__: dict.fromkeys(calls, (9.0, 10.0, 11.0)))
    monkeypatch.setattr(measure, "host_time", lambda *_: 5.0)
    monkeypatch.setattr(measure, "profiler_times", lambda calls: dict.fromkeys(calls, 8.0))


def options(out, **other):
    defaults = dict(suite=["short"], impl=["kda-cute", "fla", "flash_kda"], out=out, budget=None, commit="abc")
    return argparse.Namespace(**{**defaults, **other})


def test_a_run_writes_a_row_for_everything(without_gpu, tmp_path):
    assert run(options(tmp_path)) == 0
    rows = report.read([str(tmp_path / "short.json")])
    assert [(r["case"], r["impl"]) for r in rows] == [
        (case.name, impl) for case in SUITES["short"] for impl in ("kda-cute", "fla", "flash_kda", "floor")
    ]
    needed = "suite case T N H gate impl version graph_us eager_us host_us first_s floor_us err_o gpu commit"
    for r in rows:
        assert set(needed.split()) <= set(r)
    ours, fla, refused, floor = rows[:4]
    assert (ours["graph_us"], ours["eager_us"], ours["host_us"], ours["profiler_us"]) == (10.0, 10.0, 5.0, 8.0)
    assert ours["err_o"] < 4e-3 and ours["first_s"] > 0
    assert ours["gb_s"] == pytest.approx(SUITES["short"][0].floor_bytes / 10e-6 / 1e9)
    assert fla["graph_us"] is None and fla["eager_us"] == 10.0
    assert fla["no_graph"] == "RuntimeError: operation not permitted when stream is capturing"
    assert refused["refused"] == "NotImplementedError: too few heads" and refused["eager_us"] is None
    assert floor["graph_us"] == floor["floor_us"] == pytest.approx(SUITES["short"][0].floor_bytes / 1e6)


def test_report_reads_what_a_run_wrote(without_gpu, monkeypatch, tmp_path, capsys):
    assert run(options(tmp_path)) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench.report", str(tmp_path / "short.json")])
    assert report.main() == 0
    summary = capsys.readouterr().out
    assert summary.startswith("| case |") and printed.endswith(summary)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--all"])
    assert report.main() == 0
    assert capsys.readouterr().out.rstrip() in printed


def test_a_graph_that_does_not_compute_o_is_found_out(without_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "capture", lambda call: (types.SimpleNamespace(replay=lambda: None), call()))
    assert run(options(tmp_path, impl=["kda-cute"])) == 0
    assert report.read([str(tmp_path / "short.json")])[0]["wrong"].startswith("o is wrong")


def test_over_the_budget_no_case_starts(without_gpu, tmp_path, capsys):
    assert run(options(tmp_path, budget=-1.0, suite=["short", "decode"])) == 0
    left_out = capsys.readouterr().out.split("Left out: ")[1]
    assert all(f"{suite}: {case.name}" in left_out for suite in ("short", "decode") for case in SUITES[suite])
    assert not list(tmp_path.iterdir())


def test_a_lost_gpu_ends_the_run_and_keeps_what_there_is(without_gpu, monkeypatch, tmp_path, capsys):
    def breaks(x):
        if x.cu_seqlens is None:  # the second case
            monkeypatch.setattr(torch.cuda, "synchronize", refuse_all)
            raise RuntimeError("an illegal memory access was encountered")
        return lambda: (x.v, None)

    def refuse_all():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(IMPLS, "fla", dataclasses.replace(IMPLS["fla"], make=breaks))
    assert run(options(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "context was lost" in said and SUITES["short"][1].name in said and "fla (Triton)" in said
    rows = report.read([str(tmp_path / "short.json")])
    assert {r["case"] for r in rows} == {SUITES["short"][0].name}


def test_the_reference_is_timed_unasked_only_where_it_is_small(without_gpu, monkeypatch):
    monkeypatch.setattr(measure, "REFERENCE_LIMIT", 20)
    common = dict(gpu="", torch="", cuda="", commit="", copy_gb_s=1000.0)
    large, small = SUITES["short"]
    for case, asked, timed in ((large, False, False), (large, True, True), (small, False, True)):
        made, _ = measure.measure(case, ["reference"], asked, common)
        assert (made["eager_us"] == 10.0) == timed and made["graph_us"] is None
        assert bool(made["refused"]) != timed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs():
    done = subprocess.run([sys.executable, "-m", "bench"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Hopper GPU" in done.stderr and "CUDA build of torch" in done.stderr
    assert not done.stdout


def test_the_pages_show_what_was_measured():
    root = Path(__file__).parents[1]
    results = {path.stem: report.read([str(path)]) for path in (root / "bench/results").glob("*.json")}
    assert results.keys() <= SUITES.keys()
    page, readme = ((root / name).read_text() for name in ("docs/performance.md", "README.md"))
    for rows in results.values():
        assert report.summary(rows) in page
    rows = results["headline"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == [case.name for case in SUITES["headline"]]
    assert report.summary(rows).split("\n\n")[0] in readme
    gpu, torch_version, cuda, commit = (rows[0][key] for key in ("gpu", "torch", "cuda", "commit"))
    assert f"{gpu}, torch {torch_version}, CUDA {cuda}, commit {commit};" in readme
    assert all(path.stat().st_size < 300_000 for path in (root / "bench/results").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: there it is a measurement")
def test_host_time_beside_another_tree(tmp_path: Path) -> None:
    """On the CPU the launch does nothing; the other tree is this one by another path."""
    for name in ("kda_cute", "kernels", "reference", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "bench.host", "--rounds", "1", "--against", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
    assert rows[0][1].strip() == ROOT.name and len(rows) == 5
    for _, *cells in rows[2:]:
        for cell in cells:
            least, median = map(float, cell.split())
            assert 0 < least <= median
