"""`python -m bench --suite headline`: kda-cute beside every peer that is installed, same tensors, one process.

Prints a Markdown table and, with --json FILE, writes the rows. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("FLA_FLASH_KDA", "0")  # fla's own Triton kernels, not a backend of it

import torch  # noqa: E402

from .cases import LOWER_BOUND, SUITES, Case, make_inputs  # noqa: E402
from .impls import IMPLS, version  # noqa: E402
from .timing import copy_bandwidth, graph_times, host_time  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, action="append", help="default: headline")
    parser.add_argument("--impl", choices=IMPLS, action="append", help="default: all that import")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("the benchmark needs a Hopper GPU (H100, H200) and a CUDA build of torch", file=sys.stderr)
        return 1
    bandwidth = copy_bandwidth()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}, device copy {bandwidth / 1e12:.2f} TB/s\n")
    print("| case | implementation | GPU us (quartiles) | x floor | host us | first call s | o against fp64 |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for suite in options.suite or ["headline"]:
        for case in SUITES[suite]:
            rows += run(suite, case, options.impl or list(IMPLS), bandwidth, gpu)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


def run(suite: str, case: Case, impls: list[str], bandwidth: float, gpu: str) -> list[dict]:
    inputs = make_inputs(case)
    floor_us = case.floor_bytes / bandwidth * 1e6
    calls, first_s, refused = {}, {}, {}
    for name in impls:
        try:
            calls[name] = IMPLS[name][0](inputs)
            start = time.perf_counter()
            calls[name]()
            torch.cuda.synchronize()
            first_s[name] = time.perf_counter() - start
        except Exception as e:  # a peer that is absent or refuses the case is a row of its own
            calls.pop(name, None)
            refused[name] = f"{type(e).__name__}: {e}".splitlines()[0]
    times = graph_times(calls)
    rows = []
    for name in impls:
        row = dict(
            suite=suite, case=case.name, T=case.T, N=case.N, H=case.H, gate=case.gate, impl=name,
            version=version(IMPLS[name][1]), gpu=gpu, commit=commit(), floor_us=floor_us,
        )  # fmt: skip
        rows.append(row)
        if name in refused:
            row["refused"] = refused[name]
            print(f"| {case.name} | {name} | {refused[name]} | | | | |", flush=True)
            continue
        lower, median, upper = times[name]
        row.update(
            graph_us=median, graph_us_quartiles=(lower, upper), first_s=first_s[name],
            host_us=host_time(calls[name]), err_o=error(case, inputs, calls[name]()[0]),
        )  # fmt: skip
        print(
            f"| {case.name} | {name} | {median:.0f} ({lower:.0f}-{upper:.0f}) | {median / floor_us:.2f} | "
            f"{row['host_us']:.0f} | {row['first_s']:.1f} | {row['err_o']:.1e} |",
            flush=True,
        )
    return rows


def error(case: Case, x, o: torch.Tensor) -> float:
    """Relative Frobenius error of o against fp64, on the first sequence's first 1024 tokens and 2 heads."""
    from kda_cute import chunk_kda

    t, h = min(case.lengths[0], 1024), 2
    q, k, v, g, beta = (y[:, :t, :h].double() for y in (x.q, x.k, x.v, x.g, x.beta))
    expected, _ = chunk_kda(
        q, k, v, g, beta, initial_state=x.state[:1, :h], A_log=x.A_log[:h], dt_bias=x.dt_bias[:h],
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=True,
        lower_bound=LOWER_BOUND, state_v_first=True, backend="reference",
    )  # fmt: skip
    return ((o[:, :t, :h] - expected).norm() / expected.norm()).item()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
