"""`kda-cute`: doctor, demo, warmup, inspect."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence

from . import __version__, cache, cubin, jit
from .kernels.config import Config, all_configs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kda-cute", description="Kimi Delta Attention on Hopper GPUs")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser(
        "doctor", help="what this machine has and what is needed; fails if it has a GPU and something needed is missing"
    )
    demo = commands.add_parser("demo", help="a small Kimi Linear answers from a long context; KDA's error and speed")
    demo.add_argument("--cpu", action="store_true", help="the small demo on the CPU even if there is a Hopper GPU")
    warmup = commands.add_parser("warmup", help="compile into the cache; needs no GPU")
    inspect = commands.add_parser(
        "inspect", help="what ptxas made of each kernel, fails if it spills too much; needs no GPU"
    )
    inspect.add_argument("--sass", action="store_true", help="print the disassembly too")
    warmup.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that compile, about 1 GB of memory each (%(default)s)",
    )
    for command in (warmup, inspect):
        command.add_argument(
            "configs", nargs="*", metavar="CONFIG", help="names of configurations; default: all for bf16 models"
        )
        command.add_argument(
            "--arch", default=jit.ARCH, choices=jit.ARCHS, help="architecture to compile for (%(default)s)"
        )

    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("kda_cute").setLevel(logging.INFO)

    if args.command == "doctor":
        from .doctor import doctor

        return doctor()
    if args.command == "demo":
        from .demo import run

        return run(cpu=args.cpu)
    try:
        configs = select(args.configs)
    except ValueError as e:
        parser.error(str(e))
    if args.command == "warmup":
        if args.jobs < 1:
            parser.error(f"argument --jobs: is {args.jobs}, must be at least 1")
        return run_warmup(configs, args.arch, args.jobs)
    return run_inspect(configs, args.arch, sass=args.sass)


def select(names: Sequence[str]) -> list[Config]:
    known = {config.name: config for config in [*all_configs(), *all_configs("fp16")]}
    for name in names:
        if name not in known:
            raise ValueError(f"configuration is {name!r}: must be one of {', '.join(known)}")
    return [known[name] for name in names] or all_configs()


def run_warmup(configs: Sequence[Config], arch: str, jobs: int = 1) -> int:
    if not cache.enabled():
        print("KDA_CUTE_CACHE turns the cache off: there is nothing to fill", file=sys.stderr)
        return 1
    with cache.own_folder() as own:
        kept = own is not None and jit.entry_name(configs[0], arch) is not None
        absent = [config for config in configs if not jit.cached(config, arch)]
        if not kept and absent:
            print("there is no cache to fill (see the warnings above)", file=sys.stderr)
            return 1
        if jobs > 1 and len(absent) > 1:
            compile_apart([config.name for config in absent], arch, jobs)
        else:
            jit.warmup(absent, arch)
        still = [config.name for config in absent if not jit.cached(config, arch)]
    where = f", in {own.path}" if own else ""
    compiled = len(absent) - len(still)
    print(f"{len(configs)} kernels: {compiled} compiled, {len(configs) - len(absent)} already there{where}")
    if still:
        print(f"not in the cache (see the warnings above): {', '.join(still)}", file=sys.stderr)
    return 1 if still else 0


def compile_apart(names: Sequence[str], arch: str, jobs: int) -> None:
    """In processes of their own, which say what went wrong."""
    command = [sys.executable, "-m", "kda_cute", "warmup", "--arch", arch]
    shares = [share for i in range(jobs) if (share := names[i::jobs])]
    for process in [subprocess.Popen([*command, *share], stdout=subprocess.DEVNULL) for share in shares]:
        process.wait()


def run_inspect(configs: Sequence[Config], arch: str, sass: bool = False) -> int:
    try:
        cubin.nvdisasm()
    except FileNotFoundError as e:
        print(e, file=sys.stderr)
        return 1
    within = True
    for config in configs:
        allowed = cubin.max_spills(config)
        header, payload = jit.artifact(config, arch)
        dynamic = header["dynamic_smem"]
        for image in cubin.extract(payload):
            kernels = cubin.kernels(image)
            for i, kernel in enumerate(kernels):
                smem = f"{kernel.static_smem} static"
                if dynamic and len(dynamic) == len(kernels):  # by order of launch
                    smem += f" + {dynamic[i]} at launch"
                per_role = f", setmaxnreg {sorted(set(kernel.setmaxnreg))}" if kernel.setmaxnreg else ""
                print(f"{config.name} ({arch})")
                print(f"  registers      {kernel.registers} a thread at entry{per_role}")
                print(f"  shared memory  {smem} bytes")
                stl, ldl = kernel.count("STL"), kernel.count("LDL")
                print(
                    f"  spills         {kernel.spills} registers a thread of at most {allowed} (STL {stl}, LDL {ldl})"
                )
                print(f"  tensor cores   {kernel.count('HGMMA')} HGMMA, {kernel.count('HMMA')} HMMA")
                print(f"  TMA            {kernel.count('UTMALDG')} UTMALDG, {kernel.count('UTMASTG')} UTMASTG")
                print(f"  instructions   {kernel.opcodes.total()}")
                within = within and kernel.spills <= allowed
            if sass:
                print(cubin.disassembly(image))
    if not within:
        print("FAILED: a kernel spills more registers than it may", file=sys.stderr)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
