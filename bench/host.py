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

ONE = '''
import json, sys, time, statistics, importlib, torch
import kda_cute
from kda_cute import chunk_kda, fused_recurrent_kda, jit, ops
torch.set_num_threads(1)
gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
device = "cuda" if gpu else "cpu"
if not gpu:
    jit.load = lambda config: lambda *given: None
    try:
        hopper = importlib.import_module("kda_cute.backends.hopper")
        devices = importlib.import_module("kda_cute.devices")
        devices.backend_of = lambda q, backend: hopper
    except ImportError:
        hopper = importlib.import_module("kda_cute.sm90")
        ops._takes_reference = lambda q, backend: False
    hopper.sm_count = hopper._sm_count = lambda device: 132
    hopper.workspace_bytes = lambda *given: 0
    hopper.current_device = torch._C._cuda_getDevice = lambda: -1


def arguments(T, N, H):
    D, bf16 = 128, {"device": device, "dtype": torch.bfloat16}
    q, k, v, g = (torch.randn(1, T, H, D, **bf16) for _ in range(4))
    state = torch.randn(N, H, D, D, device=device)
    given = dict(
        q=q, k=k, v=v, g=g, beta=torch.randn(1, T, H, **bf16), A_log=torch.rand(H, device=device),
        dt_bias=torch.rand(H, D, device=device), initial_state=state, final_state=torch.empty_like(state),
        out=torch.empty_like(v), use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, lower_bound=-5.0, state_v_first=True,
    )
    if N > 1:
        given["cu_seqlens"] = torch.arange(N + 1, device=device) * (T // N)
    return given


def median_us(call, calls=30, repeats=60):
    """The least of short runs' medians: what other work adds is not the call's."""
    medians = []
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
        spent = []
        for _ in range(calls):
            start = time.perf_counter_ns()
            call()
            spent.append(time.perf_counter_ns() - start)
        medians.append(statistics.median(spent) / 1e3)
    return min(medians)


found = {}
for name, function, given in (
    ("decode, 16 x 1, H = 32", fused_recurrent_kda, arguments(16, 16, 32)),
    ("prefill, 2048, H = 12", chunk_kda, arguments(2048, 1, 12)),
):
    for _ in range(5):
        function(**given)
    found[name] = median_us(lambda: function(**given))
buffer = torch.zeros(16, device=device)
found["torch's add_"] = median_us(lambda: buffer.add_(1))
print(json.dumps([kda_cute.__file__, found]))
'''


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="DIR", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trees = [ROOT] + ([options.against.resolve()] if options.against else [])
    times: dict[Path, dict[str, list[float]]] = {tree: {} for tree in trees}
    for _ in range(options.rounds):
        for tree in random.sample(trees, len(trees)):
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
            done = subprocess.run(
                [sys.executable, "-c", ONE], cwd=tree, env=environment, capture_output=True, text=True
            )
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
