"""Random calls for as long as asked:  python -m tests.fuzz --minutes 10   (`make fuzz MINUTES=10`)

On a Hopper GPU the kernel against fp64, elsewhere the reference against itself. The first failure is shrunk, printed
and kept in .hypothesis/, from where the tests try it first. Exit status 1 if there was one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from hypothesis import settings

from tests.conftest import no_hopper
from tests.profiles import load_default


def targets() -> list[Callable[[], None]]:
    """Tests that draw their own arguments."""
    if no_hopper() is None:
        os.environ["KDA_CUTE_GPU_PROFILE"] = "fuzz"
        from tests.gpu.test_kda_gpu import test_call

        return [test_call]
    from tests import test_contract, test_invariances, test_reference

    print("no Hopper GPU: fuzzing the reference")
    modules = (test_reference, test_invariances, test_contract)
    return [f for module in modules for f in vars(module).values() if hasattr(f, "hypothesis")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    end = time.monotonic() + 60 * parser.parse_args().minutes
    load_default()
    settings.load_profile("fuzz")
    size = settings.get_profile("fuzz").max_examples
    rounds = 0
    tests = targets()
    while time.monotonic() < end:
        test = tests[rounds % len(tests)]
        test()
        rounds += 1
        print(
            f"{rounds} rounds of at most {size} examples, {max(0, end - time.monotonic()) / 60:.1f} min left",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
