"""`python -m bench.host [--against DIR]`: host time of a call like an earlier one, beside that of another tree in turn.

Each turn is a process of its own, in an order drawn anew each round. Without a Hopper GPU the launch does nothing, and
what is left is what Python does. DIR: a checkout of another commit (`git worktree add DIR COMMIT`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

ONE = """
import importlib, json, sys
tree, root = sys.argv[1:]
sys.path.insert(0, tree)
import torch
import kda_cute.ops
from kda_cute import jit
sys.path.insert(0, root)  # measured by one and the same bench
from bench.cases import Case, make_inputs
from bench.impls import IMPLS
from bench.timing import host_time

gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not gpu:
    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda: None
    jit.load = lambda config: lambda *given: None
    try:
        hopper = importlib.import_module("kda_cute.backends.hopper")
        importlib.import_module("kda_cute.devices").backend_of = lambda q, backend: hopper
    except ImportError:  # before there were backends
        hopper = importlib.import_module("kda_cute.sm90")
        kda_cute.ops._takes_reference = lambda q, backend: False
    hopper.sm_count = hopper._sm_count = lambda device: 132
    hopper.workspace_bytes = lambda *given: 1 << 20
    hopper.current_device = torch._C._cuda_getDevice = lambda: -1
    hopper.current_stream = torch._C._cuda_getCurrentRawStream = lambda device: 0
    hopper.torch = type("torch", (), dict(vars(torch), device=lambda *given: "cpu"))

device, found = "cuda" if gpu else "cpu", {}
buffer = torch.zeros(16, device=device)
calls = {"torch's add_": lambda: buffer.add_(1)}
for case in (Case((1,) * 16, 32, recurrent=True), Case((2048,), 12)):
    calls[case.name] = IMPLS["kda-cute"].make(make_inputs(case, device=device))
for name, call in calls.items():
    for _ in range(5):
        call()
    found[name] = host_time(call, calls=30, repeats=60)
print(json.dumps([kda_cute.__file__, found]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="DIR", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trees = [ROOT] + ([options.against.resolve()] if options.against else [])
    times: dict[Path, dict[str, list[float]]] = {tree: {} for tree in trees}
    for _ in range(options.rounds):
        for tree in random.sample(trees, len(trees)):
            command = [sys.executable, "-c", ONE, str(tree), str(ROOT)]
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{tree}: {done.stderr}")
            place, found = json.loads(done.stdout.splitlines()[-1])
            if not place.startswith(f"{tree}{os.sep}"):
                raise SystemExit(f"{tree}: imported {place}")
            for name, us in found.items():
                times[tree].setdefault(name, []).append(us)
    print("| us of the host, least and median of rounds | " + " | ".join(tree.name for tree in trees) + " |")
    print("|---" * (1 + len(trees)) + "|")
    for name in times[ROOT]:
        cells = (f"{min(times[tree][name]):.2f} {statistics.median(times[tree][name]):.2f}" for tree in trees)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
