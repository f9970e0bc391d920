"""`python -m bench`: kda-cute beside every peer that is installed, same tensors, one process. Needs a Hopper GPU.

Prints Markdown at the end; with --out DIR it writes DIR/SUITE.json after each case. `python -m bench.report` makes the
tables of docs/performance.md from that, `python -m bench.plot` the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import report
from .cases import SUITES, Case
from .impls import IMPLS, given, installed
from .measure import DeviceLost, measure, profile


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite", choices=SUITES, action="append", help="may be given more than once; default: headline"
    )
    parser.add_argument(
        "--impl", choices=IMPLS, action="append", help="may be given more than once; default: all found"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write DIR/SUITE.json")
    parser.add_argument("--budget", metavar="SECONDS", type=float, help="start no new case after so long")
    parser.add_argument("--commit", help="what the rows say, where this is a copy without .git")
    parser.add_argument("--check", action="store_true", help="only say whether the benchmark can run here")
    options = parser.parse_args()
    if "serving" in (options.suite or ()) and len(set(options.suite)) > 1:
        parser.error("--suite serving needs a process of its own: it changes how Triton tunes kernels")
    if torch.version.hip or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print(
            f"the benchmark needs a Hopper GPU (H100, H200) and a CUDA build of torch; here: {_found()}.\n"
            f"Peers that are installed are measured too: pip install '.[bench]' brings fla and cuDNN's.",
            file=sys.stderr,
        )
        return 1
    if options.check:
        return 0
    return run(options)


def run(options: argparse.Namespace) -> int:
    from kda_cute.demo import copy_bandwidth

    started = time.monotonic()
    impls = options.impl or installed()
    common = dict(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda,
        commit=options.commit or commit(), copy_gb_s=copy_bandwidth(torch.device("cuda")) / 1e9,
    )  # fmt: skip
    print(
        f"{common['gpu']}, torch {common['torch']}, CUDA {common['cuda']}, commit {common['commit']}, "
        f"device copy {common['copy_gb_s']:.0f} GB/s"
    )
    suites = {suite: SUITES[suite] for suite in options.suite or ["headline"]}
    for name in impls:
        others = next((text for cases in suites.values() for case in cases if (text := given(name, case))), "")
        print(f"- {IMPLS[name].label}" + (f" is given {others}" if others else ""))
    for name in IMPLS:
        if not options.impl and name not in impls:
            print(f"- not installed: {IMPLS[name].label}", flush=True)

    done: list[tuple[str, Case, list[report.Row]]] = []
    left_out = []
    lost = None
    for suite, cases in suites.items():
        for case in cases:
            if lost or (options.budget is not None and time.monotonic() - started > options.budget):
                left_out.append(f"{suite}: {case.name}")
                continue
            try:
                those = [name for name in impls if IMPLS[name].is_for(case)]
                rows = measure(case, those, bool(options.impl), dict(suite=suite, **common))
            except DeviceLost as e:
                lost = f"{suite}: {case.name}: {e}"
                continue
            print(f"{case.name}: {', '.join(map(report.short, rows))}", file=sys.stderr, flush=True)
            done.append((suite, case, rows))
            _write(options.out, suite, done)
    if not lost:
        try:
            for suite, case, rows in done:
                if case.serving:  # many cases, and all can be captured
                    continue
                profile(case, rows)
                _write(options.out, suite, done)
        except DeviceLost as e:
            lost = f"profiler: {e}"

    everything = [row for _, _, rows in done for row in rows]
    if everything:
        print(f"\n{report.table(everything)}\n\n{report.summaries(everything)}")
    if left_out:
        print("\nLeft out: " + "; ".join(left_out))
    if lost:
        print(f"\nThe GPU's context was lost, the rest cannot run in this process. {lost}", file=sys.stderr)
    return 1 if lost else 0


def _write(out: Path | None, suite: str, done: list[tuple[str, Case, list[report.Row]]]) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for name, _, rows in done if name == suite for row in rows]
    part = out / f"{suite}.json.part"
    part.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(part, out / f"{suite}.json")  # whoever stops this leaves a whole file


def commit() -> str:
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--", "kda_cute", "kernels", "reference", "bench/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _found() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__}, built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, which finds no GPU"
    return torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
