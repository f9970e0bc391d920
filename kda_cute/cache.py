"""Compiled kernels on disk: bytes in, verified bytes out. Knows nothing about kernels.

The bytes are loaded as code, so a file counts only if nobody else could have written it (directory and file owned by
this user or root, writable by nobody else) and its digest matches. It is opened once, checked through that descriptor
and handed on as bytes: what was checked is what is loaded. Whatever goes wrong costs a warning and a compilation, never
the call.

An entry is one file, replaced atomically: sha256 of the rest in hex, newline, a line of JSON, the payload.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("kda_cute")

SUFFIX = ".kda"
KEEP = 8  # versions of one kernel that stay: a few environments and a few edits, not every edit ever made
# flock dies with its holder, so only a hung holder (or a network file system) gets here. Compiling twice is harmless:
# the lock saves work, os.replace keeps the file whole.
LOCK_TIMEOUT_S = 120.0


def directory() -> Path | None:
    """Where the cache is: KDA_CUTE_CACHE_DIR, else the platform's user cache directory; None under KDA_CUTE_CACHE=0."""
    if os.environ.get("KDA_CUTE_CACHE", "1") == "0":
        return None
    if moved := os.environ.get("KDA_CUTE_CACHE_DIR"):
        return Path(moved).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("kda_cute", appauthor=False))


def _distrust(st: os.stat_result) -> str | None:
    """Why a file with this status could have been written by someone else; None if it could not."""
    if st.st_uid not in (os.geteuid(), 0):  # root may fill a container image's cache for everybody
        return f"is owned by uid {st.st_uid}, not by uid {os.geteuid()} or root"
    if st.st_mode & 0o022:
        return f"is writable by others (mode {stat.S_IMODE(st.st_mode):04o})"
    return None


def prepare(root: Path) -> bool:
    """Make `root` (mode 0700) and say whether entries in it can be trusted."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        st = os.stat(root)
    except OSError as e:
        logger.warning("kernel cache %s cannot be used, kernels compile in every process: %s", root, e)
        return False
    if not stat.S_ISDIR(st.st_mode):
        logger.warning("kernel cache %s is not a directory, kernels compile in every process", root)
        return False
    if (why := _distrust(st)) is None:
        return True
    if st.st_uid != os.geteuid():
        logger.warning("kernel cache %s %s; not used, kernels compile in every process", root, why)
        return False
    logger.warning("kernel cache %s %s; its kernels are discarded and its mode set to 0700", root, why)
    try:
        os.chmod(root, 0o700)  # first, so that nobody adds files while the old ones go
        for entry in root.glob(f"*{SUFFIX}"):
            entry.unlink()
    except OSError as e:
        logger.warning("kernel cache %s cannot be cleaned, kernels compile in every process: %s", root, e)
        return False
    return True


def _pack(header: dict, payload: bytes) -> bytes:
    body = json.dumps(header, sort_keys=True).encode() + b"\n" + payload
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _unpack(data: bytes) -> tuple[dict, bytes]:
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("is truncated or corrupted (its digest does not match)")
    header, _, payload = body.partition(b"\n")
    return json.loads(header), payload


def read(root: Path, name: str) -> tuple[dict, bytes] | None:
    """Header and payload of an entry. One that cannot be trusted is discarded with a warning and reads as absent."""
    path = root / (name + SUFFIX)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as e:  # a link, no permission
        discard(root, name, f"cannot be opened ({e})")
        return None
    with os.fdopen(fd, "rb") as f:
        st = os.fstat(fd)
        why = "is not a regular file" if not stat.S_ISREG(st.st_mode) else _distrust(st)
        if why is None:
            try:
                return _unpack(f.read())
            except (ValueError, OSError) as e:
                why = str(e)
    discard(root, name, why)
    return None


def discard(root: Path, name: str, why: str) -> None:
    path = root / (name + SUFFIX)
    logger.warning("cached kernel %s %s; discarded, it is compiled again", path, why)
    with suppress(OSError):
        path.unlink()


def write(root: Path, name: str, header: dict, payload: bytes) -> bool:
    """Write an entry atomically. A full or read-only directory costs a warning."""
    temporary = None
    try:
        fd, temporary = tempfile.mkstemp(dir=root, prefix=f".{name}-")  # mode 0600
        with os.fdopen(fd, "wb") as f:
            f.write(_pack(header, payload))
            f.flush()
            os.fsync(f.fileno())  # else a power cut can leave the name on an empty file
        os.replace(temporary, root / (name + SUFFIX))
    except OSError as e:
        logger.warning("cannot write to the kernel cache %s, the next process compiles again: %s", root, e)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        return False
    return True


def prune(root: Path, family: str) -> None:
    """Keep the newest KEEP entries whose name starts with `family`."""
    with suppress(OSError):
        entries = sorted(root.glob(f"{family}*{SUFFIX}"), key=lambda p: p.stat().st_mtime, reverse=True)
        for entry in entries[KEEP:]:
            entry.unlink(missing_ok=True)
            entry.with_suffix(".lock").unlink(missing_ok=True)  # a waiter on the old file compiles once more; harmless


@contextmanager
def lock(root: Path, name: str) -> Iterator[bool]:
    """One process at a time makes an entry. Yields False, after a warning, where no lock can be had; go on without."""
    import filelock

    guard = filelock.FileLock(root / f"{name}.lock", timeout=LOCK_TIMEOUT_S, mode=0o600)
    held = False
    try:
        guard.acquire()
        held = True
    except filelock.Timeout:
        logger.warning("lock %s was not released in %g s; compiling without it", guard.lock_file, LOCK_TIMEOUT_S)
    except (OSError, NotImplementedError) as e:  # read-only or full directory, a file system without locks
        logger.warning("cannot lock %s, compiling without: %s", guard.lock_file, e)
    try:
        yield held
    finally:
        if held:
            guard.release()
