"""`kda-cute doctor`: found, needed, verdict. Imports no cutlass, needs no working torch."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from . import cache, jit

OK, MISSING, UNTESTED, OPTIONAL = "ok", "MISSING", "untested", "optional"
TESTED_CUDA = 12090  # the driver's, as 1000 * major + 10 * minor
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass
class Row:
    what: str
    found: str
    needed: str
    verdict: str


def doctor() -> int:
    """Print the table. Status 1 if something needed is missing; only where there is a GPU is a GPU needed."""
    gpus = find_gpus()
    rows = [*_common(), *(_gpu_rows(gpus) if gpus else [])]
    if not gpus:
        rows.append(Row("GPU", "none", "compute capability 9.0", OPTIONAL))
    rows.append(_cache_row())
    _print(rows)
    missing = [row.what for row in rows if row.verdict == MISSING]
    if missing:
        print(f"\nmissing: {', '.join(missing)}")
    elif gpus:
        print("\nready: chunk_kda runs the Hopper kernel on CUDA tensors")
    else:
        print("\nno GPU: chunk_kda runs the reference on CPU tensors, warmup and inspect work")
    return 1 if missing else 0


def find_gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of every GPU, from the driver itself: torch may be a build without CUDA."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    gpus = []
    for i in range(count.value):
        name = ctypes.create_string_buffer(256)
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        cuda.cuDeviceGet(ctypes.byref(device), i)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
        gpus.append((name.value.decode(), (major.value, minor.value)))
    return gpus


def _common() -> list[Row]:
    rows = [Row("Python", sys.version.split()[0], ">= 3.10", OK if sys.version_info >= (3, 10) else MISSING)]
    rows.append(_package("torch", "2.4"))
    rows.append(_package("nvidia-cutlass-dsl", "4.8.1", "4.9"))
    rows.append(_package("apache-tvm-ffi", "0.1.15", "0.2"))
    try:
        flavour, path = jit.dsl_runtime()
        rows.append(Row("DSL runtime", f"{flavour}: {path}", "one that the driver can run", OK))
    except RuntimeError as e:
        rows.append(Row("DSL runtime", str(e), "one that the driver can run", MISSING))
    linker = next((name for name in jit.LINKERS if shutil.which(name)), None)
    rows.append(Row("linker", linker or "none", "any: cached kernels load without cutlass", OK if linker else OPTIONAL))
    return rows


def _gpu_rows(gpus: list[tuple[str, tuple[int, int]]]) -> list[Row]:
    rows = []
    hopper = any(capability == (9, 0) for _, capability in gpus)
    for i, (name, (major, minor)) in enumerate(gpus):
        verdict = OK if (major, minor) == (9, 0) else OPTIONAL if hopper else MISSING
        rows.append(Row(f"GPU {i}", f"{name}, compute capability {major}.{minor}", "9.0 (H100, H200)", verdict))
    driver = jit.driver_version() or 0
    verdict = OK if driver >= TESTED_CUDA else UNTESTED if driver >= 12000 else MISSING
    rows.append(Row("driver", f"CUDA {driver // 1000}.{driver % 1000 // 10}", ">= 12.9", verdict))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains at length what the table says in a word
            import torch

            works = torch.cuda.is_available()
        build = torch.version.cuda
    except ImportError:
        return rows
    found = "CPU build" if build is None else f"CUDA {build}" + ("" if works else ", but it cannot use the GPU")
    rows.append(Row("torch's CUDA", found, "a CUDA build that works", OK if works else MISSING))
    return rows


def _package(name: str, least: str, below: str | None = None) -> Row:
    needed = f">= {least}" + (f", < {below}" if below else "")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Row(name, "not installed", needed, MISSING)
    fits = _release(least) <= _release(found) and (below is None or _release(found) < _release(below))
    return Row(name, found, needed, OK if fits else MISSING)


def _release(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _cache_row() -> Row:
    """What would be used. Makes and changes nothing."""
    needed = "a directory that can be written"
    if not cache.enabled():
        return Row("cache", f"turned off (KDA_CUTE_CACHE={os.environ['KDA_CUTE_CACHE']})", needed, OPTIONAL)
    try:
        jit.sources()
        own, roots = cache.locate()
    except cache.NoCache as e:
        return Row("cache", f"not used: {e}", needed, OPTIONAL)
    found, writable = _folder(own)
    if own != roots and os.path.lexists(roots):
        found += f"; root's {_folder(roots)[0]}"
    return Row("cache", found, needed, OK if writable else OPTIONAL)


def _folder(path: Path) -> tuple[str, bool]:
    """What a folder of the cache holds, and whether it can be written."""
    try:
        folder = cache.open_folder(path)
    except OSError as e:
        if os.path.lexists(path):
            return f"{path}: cannot be opened ({e.strerror})", False
        there = next(parent for parent in path.parents if os.path.lexists(parent))
        if os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK):
            return f"{path}: not there yet", True
        return f"{path}: cannot be made in {there}", False
    except cache.NoCache as e:
        return f"{e}: not used", False
    try:
        kernels = [entry.stat().st_size for entry in os.scandir(folder.fd) if entry.name.endswith(cache.SUFFIX)]
        writable = os.access(".", os.W_OK | os.X_OK, dir_fd=folder.fd)
    except OSError as e:
        return f"{path}: cannot be read ({e.strerror})", False
    finally:
        os.close(folder.fd)
    found = f"{path}: {len(kernels)} kernels, {sum(kernels) / 1e6:.1f} MB"
    return found + ("" if writable else ", read-only"), writable


def _print(rows: list[Row]) -> None:
    table = [Row("", "found", "needed", "verdict"), *rows]
    what, found, needed = (max(len(getattr(row, name)) for row in table) for name in ("what", "found", "needed"))
    for row in table:
        print(f"{row.what:{what}}  {row.found:{found}}  {row.needed:{needed}}  {row.verdict}")
