"""From a kernel configuration to something callable: memory -> disk -> compile.

Compiling imports cutlass (seconds) and runs the DSL; loading what an earlier process compiled does neither. For that
the DSL's exported object is linked into a shared library at once, which the dynamic loader opens without the DSL. On a
machine without a linker the object is kept as it is and the DSL's own loader opens it, import of cutlass included.
Measured on two CPU cores, warm page cache: library 3 ms after `import tvm_ffi` (30-45 ms), DSL loader 0.7-1.2 s.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from . import cache, cubin

T = TypeVar("T")

logger = logging.getLogger("kda_cute")

ARCH = "sm_90a"
FORMAT = 1  # of header and payload; part of the key
BAR_AFTER_S = 2.0
RUNTIME = "libcute_dsl_runtime.so"
ARCHS = (ARCH,)  # that the kernels compile for
LINKERS = ("ld", "ld.lld", "cc", "gcc", "clang")
# The DSL's switches that say what is printed, written or kept, not what the code is; the DSL declares them so itself
# (`affects_compile=False`). All others are in the key, also those that are not known here.
NOT_IN_KEY = re.compile(
    "CUTE_DSL_(LOG_.*|PRINT_AFTER_PREPROCESSOR|PRINT_IR|SHOW_STACKTRACE|FILTER_STACKTRACE|WARNINGS_IGNORE"
    "|ENABLE_OPTIMIZATION_WARNINGS|JIT_TIME_PROFILING|DEBUG_LEAVES|KEEP|KEEP_(IR|PTX|CUBIN|SASS)|DUMP_DIR|CACHE_DIR"
    "|NO_CACHE|DISABLE_FILE_CACHING|JIT_CACHE_MAX_ELEMS"
    "|ARCH)"  # asked for by the caller, and in the key as such
)


@dataclasses.dataclass
class Stats:
    """What this process did. `compiled` stays 0 in a process that finds everything in the cache."""

    compiled: int = 0
    loaded: int = 0


stats = Stats()

_loaded: dict[tuple[Any, str], Callable[..., Any]] = {}
_lock = threading.RLock()  # the DSL traces one kernel at a time, so one lock serves all configurations


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # its holder is a thread that does not exist in the child


os.register_at_fork(after_in_child=_after_fork)


def load(config: Any, arch: str = ARCH) -> Callable[..., Any]:
    """The compiled kernel of a configuration, a tvm-ffi function that takes torch tensors by position."""
    fn = _loaded.get((config, arch))
    if fn is None:
        with _lock:
            fn = _loaded.get((config, arch))
            if fn is None:
                fn = _loaded[config, arch] = _load_or_compile(config, arch)
    return fn


def warmup(configs: Iterable[Any] | None = None, arch: str = ARCH) -> None:
    """Compile configurations, or all for bf16 models, into the cache. Needs no GPU: for building container images."""
    if configs is None:
        from .kernels.config import all_configs

        configs = all_configs()
    if arch not in ARCHS:
        raise ValueError(f"arch is {arch!r}: must be {' or '.join(ARCHS)}")
    configs = list(configs)
    if not cache.enabled():
        logger.warning("KDA_CUTE_CACHE turns the cache off: warmup compiles for this process only")
    for config in _bar(configs):
        load(config, arch)


# ---- what the cache is keyed by --------------------------------------------------------------------------------------


def key(config: Any, arch: str = ARCH) -> str:
    """Digest of all that decides the machine code. The compile options are in the kernel sources, hence covered."""
    parts = {
        "format": FORMAT,
        "sources": sources(),
        "dsl": _version("nvidia-cutlass-dsl"),
        "toolkit": dsl_runtime()[0],
        "tvm_ffi": _version("apache-tvm-ffi"),
        "python": f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}",
        "host": platform.machine(),
        "arch": arch,
        # The DSL's own switches: line info, assertions, ...
        "env": {k: v for k, v in os.environ.items() if k.startswith("CUTE_DSL_") and not NOT_IN_KEY.fullmatch(k)},
        "config": [type(config).__qualname__, dataclasses.asdict(config)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sources() -> dict[str, str]:
    """Digest of each source of the kernels. NoCache if they cannot be read: they could change unnoticed."""
    try:
        found = {str(p.relative_to(d)): _sha256(p) for d in _source_dirs() for p in sorted(d.rglob("*.py"))}
    except OSError as e:
        raise cache.NoCache(f"the kernels' sources cannot be read: {e}") from None
    if not found:  # imported from a zip, or without sources
        raise cache.NoCache(f"the kernels' sources are not files in {', '.join(map(str, _source_dirs()))}")
    return found


def _source_dirs() -> list[Path]:
    from . import kernels

    return [Path(p) for p in kernels.__path__]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@lru_cache
def dsl_runtime() -> tuple[str, str]:
    """Toolkit flavour ("cu12", "cu13") and path of the DSL's runtime library: the newest one that the driver can run.

    The DSL makes the same choice when it is imported, which is what this avoids. CUTE_DSL_LIBS names another library,
    not another compiler.
    """
    named = [path for path in os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep) if path.endswith(RUNTIME)]
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = {int(path.parent.parent.name[2:]): path for root in roots for path in root.glob(f"cu[0-9]*/lib/{RUNTIME}")}
    driver = driver_version()
    usable = [major for major in found if driver is None or major <= driver // 1000]
    if named:
        return f"cu{max(usable)}" if usable else "env", named[0]
    if not usable:
        have = ", ".join(f"cu{m}" for m in sorted(found)) or "none"
        raise RuntimeError(
            f"no CuTe DSL runtime for this machine: installed {have}, CUDA of the driver {driver}; "
            "install nvidia-cutlass-dsl (CUDA 12) or nvidia-cutlass-dsl[cu13]"
        )
    return f"cu{max(usable)}", str(found[max(usable)])


@lru_cache
def driver_version() -> int | None:
    """The newest CUDA that the GPU driver can run, as 1000 * major + 10 * minor; None without a driver."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value or None


# ---- disk and compiler -----------------------------------------------------------------------------------------------


def artifact(config: Any, arch: str = ARCH) -> tuple[dict, bytes]:
    """Header and machine code of a configuration, from the cache or compiled; loads nothing."""
    return _find_or_make(config, arch, lambda header, payload: (header, payload))


def cached(config: Any, arch: str = ARCH) -> bool:
    """Whether a later process will find this configuration on disk."""
    name = entry_name(config, arch)
    if name is None:
        return False
    with cache.folders() as folders:
        return any(cache.read(folder, name) for folder in folders)


def _load_or_compile(config: Any, arch: str) -> Callable[..., Any]:
    compiled_before = stats.compiled
    fn = _find_or_make(config, arch, _open)
    stats.loaded += stats.compiled == compiled_before
    return fn


def entry_name(config: Any, arch: str = ARCH) -> str | None:
    """Name of the entry of a configuration. None where it cannot be kept, with a warning unless that is asked for."""
    if cache.directory() is None:
        return None
    try:
        return f"{config.name}-{arch}-{key(config, arch)[:32]}"
    except cache.NoCache as e:
        cache.not_used(e)
        return None


def _find_or_make(config: Any, arch: str, use: Callable[[dict, bytes], T]) -> T:
    name = entry_name(config, arch)
    if name is None:
        return use(*_make(config, arch, f"kda_{uuid.uuid4().hex}", None))
    symbol = f"kda_{name[-32:]}"  # holds the key: a library that is not the one asked for cannot be called

    def find(folders: list[cache.Folder]) -> T | None:
        for folder in folders:
            entry = cache.read(folder, name)
            if entry is None:
                continue
            try:
                if entry[0]["symbol"] != symbol:
                    raise ValueError(f"holds {entry[0]['symbol']}")
                return use(*entry)
            except Exception as e:  # whole and ours, but not loadable here: a library it was linked against has changed
                cache.ignore(folder, name, f"cannot be loaded ({type(e).__name__}: {e})")
        return None

    with cache.folders() as folders:
        if (found := find(folders)) is not None:
            return found
    with cache.own_folder() as own:
        if own is None:
            return use(*_make(config, arch, symbol, None))
        with cache.lock(own, name):
            if (found := find([own])) is not None:  # another process made it meanwhile
                return found
            header, payload = _make(config, arch, symbol, own)
            if cache.write(own, name, header, payload):
                cache.prune(own)
    return use(header, payload)


def _make(config: Any, arch: str, symbol: str, folder: cache.Folder | None) -> tuple[dict, bytes]:
    where = folder.path if folder else "memory"
    logger.info("compiling %s for %s (once, then it is in %s)", config.name, arch, where)
    return _compile(config, arch, symbol)


def compile_kernel(config: Any, arch: str) -> Any:
    """The DSL's result for a configuration. The one place that imports a kernel, and with it cutlass."""
    from .kernels import build_sm90, decode_sm90, fused_decode_sm90, fwd_sm90
    from .kernels.config import KdaBuildConfig, KdaDecodeConfig, KdaFusedDecodeConfig

    kernels = {KdaBuildConfig: build_sm90, KdaDecodeConfig: decode_sm90, KdaFusedDecodeConfig: fused_decode_sm90}
    return kernels.get(type(config), fwd_sm90).compile(config, arch)


def _compile(config: Any, arch: str, symbol: str) -> tuple[dict, bytes]:
    """Header and payload: a shared library ("so"), or the DSL's object ("o") where there is no linker."""
    start = time.perf_counter()
    with _ticker(config.name):
        with _compile_arch(arch):
            compiled = compile_kernel(config, arch)
        obj = _export(compiled, symbol)
        library = _link(obj)
    payload = library or obj
    for image in cubin.extract(payload):
        if not arch.startswith(f"sm_{cubin.sm(image)}"):
            raise RuntimeError(f"{config.name} was asked for {arch} but compiled for sm_{cubin.sm(image)}")
    stats.compiled += 1
    header = {
        "kind": "so" if library else "o",
        "symbol": symbol,
        "config": dataclasses.asdict(config),
        "arch": arch,
        "dynamic_smem": _dynamic_smem(compiled),
        "seconds": round(time.perf_counter() - start, 2),
        "dsl": _version("nvidia-cutlass-dsl"),
        "tvm_ffi": _version("apache-tvm-ffi"),
    }
    return header, payload


@contextmanager
def _compile_arch(arch: str) -> Iterator[None]:
    """CUTE_DSL_ARCH for one compilation; then the environment, and what the DSL remembers of it, are as before."""
    before = os.environ.get("CUTE_DSL_ARCH")
    os.environ["CUTE_DSL_ARCH"] = arch
    try:
        from cutlass.cutlass_dsl import CuTeDSL

        env = CuTeDSL._get_dsl().envar
        remembered = env._arch
        env.arch = arch
        try:
            yield
        finally:
            env._arch = before if remembered == arch else remembered  # None: detected when next asked for
    finally:
        if before is None:
            del os.environ["CUTE_DSL_ARCH"]
        else:
            os.environ["CUTE_DSL_ARCH"] = before


def _dynamic_smem(compiled: Any) -> list[int] | None:
    """Bytes of shared memory that each launch asks for. A launch argument: not in the cubin, but in the host IR."""
    ir = str(compiled.ir_module)
    config = r"struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"  # grid, block, bytes, ...
    launch = rf"%(\w+) = llvm\.getelementptr %\w+\[0, 2\] : [^\n]*{config}"
    found = []
    for match in re.finditer(launch, ir):
        stored = re.compile(rf"llvm\.store %(\w+), %{match[1]} : i64").search(ir, match.end())
        values = (
            re.findall(rf"%{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)", ir[: stored.start()]) if stored else []
        )
        if not values:
            return None
        found.append(int(values[-1]))  # names are per function: the nearest definition above
    return found or None


def _export(compiled: Any, symbol: str) -> bytes:
    """The DSL's object, through memory: a full disk must not cost the call."""
    with os.fdopen(os.memfd_create(symbol, os.MFD_CLOEXEC), "rb") as f:
        compiled.export_to_c(object_file_path=f"/proc/self/fd/{f.fileno()}", function_name=symbol)
        return f.read()


def _link(obj: bytes) -> bytes | None:
    """The object as a shared library that names the runtime libraries it needs. None where it cannot be linked."""
    libs = [dsl_runtime()[1], _tvm_ffi_library()]
    flags = ["-z", "now"]  # a symbol that is not there shows when the library is loaded, not at some call
    why = "no linker found"
    try:
        with tempfile.TemporaryDirectory(prefix="kda_cute-") as tmp:  # mode 0700
            source, target = Path(tmp, "kernel.o"), Path(tmp, "kernel.so")
            source.write_bytes(obj)
            for linker in filter(shutil.which, LINKERS):
                extra = flags if linker.startswith("ld") else ["-nostdlib", "-Wl," + ",".join(flags)]
                command = [linker, "-shared", "-o", str(target), str(source), *libs, *extra]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    return target.read_bytes()
                why = f"{linker}: {done.stderr.strip()}"
    except OSError as e:
        why = str(e)
    logger.debug("cached kernels will load through the DSL, which takes a second or more (%s)", why)
    return None


# ---- loading ---------------------------------------------------------------------------------------------------------


def _tvm_ffi_library() -> str:
    import tvm_ffi

    return str(tvm_ffi.libinfo.find_libtvm_ffi())


@lru_cache
def _preload() -> list[ctypes.CDLL]:
    """The libraries that a kernel library needs, found by their sonames from here on."""
    return [ctypes.CDLL(path) for path in (dsl_runtime()[1], _tvm_ffi_library())]


_open_files: list[int] = []


def _open(header: dict, payload: bytes) -> Callable[..., Any]:
    """Load verified bytes as code. They reach the loader through a sealed anonymous file, which nobody can swap."""
    import tvm_ffi

    fd = os.memfd_create(header["symbol"], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as f:
        f.write(payload)
    _seal(fd)
    # Stays open: the loader knows libraries by path, so a reused descriptor number would give the old library.
    _open_files.append(fd)
    path = f"/proc/self/fd/{fd}"
    if header["kind"] == "so":
        _preload()
        library = ctypes.CDLL(path)
        address = ctypes.cast(getattr(library, f"__tvm_ffi_{header['symbol']}"), ctypes.c_void_p).value
        assert address is not None
        return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=library)
    import cutlass.cute as cute

    return cute.runtime.load_module(path, enable_tvm_ffi=True)[header["symbol"]]


def _seal(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


# ---- progress --------------------------------------------------------------------------------------------------------


def _bar(configs: list[Any]) -> Iterable[Any]:
    if not sys.stderr.isatty():
        return configs
    from tqdm import tqdm

    return tqdm(configs, desc="kda_cute: warmup", unit="kernel")


@contextmanager
def _ticker(name: str) -> Iterator[None]:
    """On a terminal, a running clock for a compilation that takes longer than BAR_AFTER_S."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    done = threading.Event()

    def tick() -> None:
        if done.wait(BAR_AFTER_S):
            return
        with tqdm(desc=f"kda_cute: compiling {name}", bar_format="{desc} [{elapsed}]", leave=False, delay=1e-3) as bar:
            bar.start_t -= BAR_AFTER_S
            while not done.wait(0.2):
                bar.refresh()

    thread = threading.Thread(target=tick, name="kda_cute-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
