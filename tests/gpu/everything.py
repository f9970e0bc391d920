"""All that a kernel change has to pass on a Hopper GPU, in parallel: `python -m tests.gpu.everything` (`make gpu-all`).

Kernels are compiled first. Then the GPU tests run beside random calls with seeds of their own, then the tests that need
most of the GPU's memory, then compute-sanitizer's four tools, alone: racecheck slows down all else, and all else slows
it down. With an H100 and 16 cores it takes about eight minutes. Prints a line for each part; exit status 1 if one
failed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kda_cute.kernels.config import all_configs
from tests.conftest import no_hopper

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfEs")
CHUNKED, DECODE = "tests/gpu/test_kda_gpu.py", "tests/gpu/test_decode_gpu.py"
FUSED = "tests/gpu/test_fused_decode_gpu.py"
RANDOM, LARGE = "test_call", "million or past_2"
SEEDS = 8  # processes of random calls of chunk_kda, each with both v_splits; three of fused_recurrent_kda, one fused
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


class Part:
    def __init__(self, name: str, command: tuple[str, ...], logs: Path, **environment: str):
        self.name, self.log, self.started = name, logs / f"{name.replace(' ', '-')}.log", time.monotonic()
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def wait(self, seconds: float) -> bool:
        try:
            status = str(self.process.wait(max(1.0, self.started + seconds - time.monotonic())))
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = f"not done after {seconds:.0f} s"
        lines = self.log.read_text(errors="replace").splitlines()
        end = next((line for line in reversed(lines) if line.strip()), "")
        passed = status == "0"
        print(f"{'ok    ' if passed else 'FAILED'} {self.name}: {end.strip('= ')}" + f" ({status})" * (not passed))
        if not passed:
            print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))))
        sys.stdout.flush()
        return passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.everything", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000, help="random calls of chunk_kda (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the first process of random calls; default: another one each time")
    parser.add_argument("--seconds", type=float, default=400, help="for each part (%(default)s)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="default: a new one, which is said")
    parser.add_argument("--no-sanitizers", action="store_true")
    options = parser.parse_args()
    if reason := no_hopper():
        print(reason, file=sys.stderr)
        return 1
    logs = options.logs or Path(tempfile.mkdtemp(prefix="kda-cute-gpu-"))
    logs.mkdir(parents=True, exist_ok=True)
    cores, seed = os.cpu_count() or 1, random.randrange(1 << 20) if options.seed is None else options.seed
    print(f"logs in {logs}, first seed {seed}")
    done = [warmup(cores, logs).wait(options.seconds)]

    def drawn(name: str, file: str, at: int, examples: int) -> Part:
        command = (*PYTEST, "-n0", file, "-k", RANDOM, f"--hypothesis-seed={seed + at}")
        return Part(f"{name} {at}", command, logs, KDA_CUTE_GPU_EXAMPLES=str(examples))

    parts = [drawn("random calls", CHUNKED, i, -(-options.calls // (2 * SEEDS))) for i in range(SEEDS)]
    parts += [drawn("random decoding", DECODE, i, -(-options.calls // 10)) for i in range(3)]
    parts.append(drawn("random fused decoding", FUSED, 0, -(-options.calls // 10)))
    rest = (
        *PYTEST,
        f"-n{max(1, min(12, cores - 4))}",
        "-m",
        "gpu",
        "tests/gpu",
        "-k",
        f"not {RANDOM} and not ({LARGE})",
    )
    done += [part.wait(options.seconds) for part in [Part("tests", rest, logs), *parts]]
    large = (*PYTEST, "-n0", "-m", "gpu", "tests/gpu", "-k", LARGE)
    done.append(Part("tests of large tensors", large, logs).wait(options.seconds))
    if not options.no_sanitizers:
        done += sanitizers(logs, options.seconds)
    print("all passed" if all(done) else "FAILED")
    return 0 if all(done) else 1


def warmup(cores: int, logs: Path) -> Part:
    names = [config.name for dtype in ("bf16", "fp16") for config in all_configs(dtype)]
    return Part("warmup", (sys.executable, "-m", "kda_cute", "warmup", "--jobs", str(min(16, cores)), *names), logs)


def sanitizers(logs: Path, seconds: float) -> list[bool]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("FAILED sanitizers: compute-sanitizer is not on the path (CUDA toolkit)")
        return [False]
    run = (sys.executable, "-m", "tests.gpu.sanitize")
    parts = [Part(name, (tool, "--tool", name, "--error-exitcode", "1", *run), logs) for name in TOOLS]
    return [part.wait(seconds) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
