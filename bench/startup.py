"""`python -m bench.startup`: the first call with an empty cache, with a full one, and how often shapes recompile.

Each figure is from a process of its own; torch's import and the start of CUDA are not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

CHILD = """
import json, sys, time, torch
torch.zeros(1, device="cuda"); torch.cuda.synchronize()
def inputs(T, H, n):
    q, k, v, g = (torch.randn(1, T, H, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    cu = None if n == 0 else torch.linspace(0, T, n + 1, device="cuda").round().int()
    beta = torch.rand(1, T, H, device="cuda")
    return dict(q=q, k=k, v=v, g=g, beta=beta, cu_seqlens=cu, safe_gate=True, lower_bound=-5.0,
                use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, output_final_state=True)
x = inputs(1024, 8, 0)
torch.cuda.synchronize()
start = time.perf_counter()
import kda_cute
kda_cute.chunk_kda(**x)
torch.cuda.synchronize()
first = time.perf_counter() - start
from kda_cute import jit
before = jit.stats.compiled
import random
random.seed(0)
for _ in range(100):
    kda_cute.chunk_kda(**inputs(random.randint(1, 5000), random.randint(1, 40), random.randint(0, 9)))
torch.cuda.synchronize()
print(json.dumps(dict(first_s=round(first, 2), compiled=before, compiled_by_100_shapes=jit.stats.compiled - before,
                      imported_cutlass="cutlass" in sys.modules)))
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "second process", "third process"):
            done = subprocess.run(
                [sys.executable, "-c", CHILD],
                env={**os.environ, "KDA_CUTE_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return done.returncode
            print(name, json.loads(done.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
