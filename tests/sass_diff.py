"""Whether a change left machine code as it was: `make sass-diff BASE=<commit>`.

Compiles configurations at a commit and in the working tree, and compares the instructions of their kernels. What only
moves Python code must say that all are the same. Needs git and no GPU; both sides keep their kernels in build/sass.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kda_cute import cache, cubin

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "sass"
NAMES = """
from kda_cute.kernels.config import all_configs
print(*[config.name for dtype in ("bf16", "fp16") for config in all_configs(dtype)])
"""


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and what ptxas made of it. Names of kernels hold those of modules and are not here."""

    text: bytes
    registers: int
    stack: int
    instructions: int

    def __str__(self) -> str:
        return f"{self.instructions} instructions, {self.registers} registers, stack {self.stack} bytes"


def compile_all(tree: Path, names: list[str], kept: Path) -> None:
    """Compiles configurations of a tree into a cache of its own, as many at a time as there are cores."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "KDA_CUTE_CACHE_DIR": str(kept)}
    environment.pop("KDA_CUTE_CACHE", None)
    workers = os.cpu_count() or 1

    def some(names: list[str]) -> None:
        command = [sys.executable, "-m", "kda_cute", "warmup", *names]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tree}: {done.stderr}")

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(some, [part for i in range(workers) if (part := names[i::workers])]))


def names_of(tree: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.check_output([sys.executable, "-c", NAMES], cwd=tree, env=environment, text=True).split()


def digest(folder: Path) -> str:
    sources = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def read(kept: Path) -> dict[str, list[Code]]:
    """Configuration -> its kernels; of several entries, which another compiler made, the newest."""
    found = {}
    for path in sorted(kept.rglob(f"*{cache.SUFFIX}"), key=lambda path: path.stat().st_mtime):
        _, header, payload = path.read_bytes().split(b"\n", 2)
        json.loads(header)  # else the format has changed
        found[path.name.rsplit("-", 2)[0]] = [code for image in cubin.extract(payload) for code in codes(image)]
    return found


def codes(image: bytes) -> list[Code]:
    texts = cubin.texts(image)
    return [
        Code(texts[kernel.name], kernel.registers, kernel.stack, kernel.opcodes.total())
        for kernel in cubin.kernels(image)
    ]


def differences(base: dict[str, list[Code]], new: dict[str, list[Code]]) -> list[str]:
    """A line for each kernel that is not the same on both sides."""
    lines = []
    for name in sorted(base.keys() | new.keys()):
        if name not in base or name not in new:
            lines.append(f"{name}: only in {'the working tree' if name in new else 'BASE'}")
            continue
        if len(base[name]) != len(new[name]):
            lines.append(f"{name}: {len(base[name])} kernels, then {len(new[name])}")
            continue
        for i, (a, b) in enumerate(zip(base[name], new[name], strict=True)):
            if a != b:
                lines.append(f"{name}, kernel {i}: {a}; then {b}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="names of configurations; default: all")
    options = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", f"{options.base}^{{commit}}"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "base")
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", tree, commit], cwd=ROOT, check=True)
        try:
            names = [set(options.configs or names_of(side)) for side in (tree, ROOT)]
            both = sorted(names[0] & names[1])
            sides = []
            for side in (tree, ROOT):
                kept = KEPT / digest(side / "kernels")  # one version of each kernel
                compile_all(side, both, kept)
                sides.append({name: found for name, found in read(kept).items() if name in both})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    lines = differences(*sides) + [f"{name}: only on one side" for name in sorted(names[0] ^ names[1])]
    for line in lines:
        print(line)
    same = len(both) - len({line.split(":")[0].split(",")[0] for line in lines} & set(both))
    print(f"{same} of {len(both)} configurations have the same machine code as {commit[:12]}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
