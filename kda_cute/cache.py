"""Compiled kernels on disk: bytes in, verified bytes out. Knows nothing about kernels.

The directory that is given may be one that others use, /tmp even. So everything lies in a folder of this user's below
it, `kda_cute-UID`, and nothing outside of it is touched. The bytes are loaded as code: a folder or a file counts only
if nobody else could have written it (owned by this user or root, writable by nobody else, no link), a file only if its
digest matches. Both are opened once, checked through that descriptor and used through it: what was checked is what is
loaded. What cannot be trusted stays as it is; only regular files of this user's are replaced. Whatever goes wrong costs
a warning and a compilation, never the call.

Root's folder is looked into too, for container images: root fills it, whoever runs the container reads it.

An entry is one file, replaced atomically: sha256 of the rest in hex, newline, a line of JSON, the payload.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .environment import switch, warn_once

SUFFIX = ".kda"
DAY = 24 * 3600.0
UNUSED_DAYS = 30  # that an entry stays. Not a number of them: how many versions other jobs use is not known here
# flock dies with its holder, so only a hung holder (or a network file system) gets here. Compiling twice is harmless:
# the lock saves work, os.replace keeps the file whole.
LOCK_TIMEOUT_S = 120.0
_MADE = re.compile(r"\.?\w+-\w+-[0-9a-f]{32}(\.kda|\.lock|-[0-9a-f]+\.tmp)")  # names of files that are made here


class NoCache(Exception):
    """Why kernels cannot be kept on disk, in words for a warning."""


@dataclass(frozen=True)
class Folder:
    """A folder that can be trusted, held open: its path may come to name another one."""

    path: Path
    fd: int


# ---- where it is -----------------------------------------------------------------------------------------------------


def enabled() -> bool:
    return switch("KDA_CUTE_CACHE", True)


def locate() -> tuple[Path, Path]:
    """This user's folder and root's, whether they are there or not: below KDA_CUTE_CACHE_DIR, else below ~/.cache."""
    moved, xdg = os.environ.get("KDA_CUTE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    base = moved or (xdg if os.path.isabs(xdg) else "~/.cache")  # XDG's specification ignores relative paths
    what = f"{'KDA_CUTE_CACHE_DIR' if moved else 'the cache directory'} is {base}"
    path = os.path.expanduser(base)
    if path.startswith("~"):
        raise NoCache(f"{what}: there is no such home directory")
    try:
        path = os.path.abspath(path)
    except OSError as e:  # below a working directory that is gone
        raise NoCache(f"{what}: {e}") from None
    return Path(path, f"kda_cute-{os.geteuid()}"), Path(path, "kda_cute-0")


def directory() -> Path | None:
    """This user's folder, or None: turned off, or, after a warning, nowhere."""
    if not enabled():
        return None
    try:
        return locate()[0]
    except NoCache as e:
        not_used(e)
        return None


def not_used(why: object) -> None:
    warn_once(f"kernel cache not used, each process compiles its kernels: {why}")


# ---- what can be trusted ---------------------------------------------------------------------------------------------


def _distrust(st: os.stat_result) -> str | None:
    """Why a file with this status could have been written by someone else; None if it could not."""
    if st.st_uid not in (os.geteuid(), 0):
        return f"is owned by uid {st.st_uid}, not by uid {os.geteuid()} or root"
    if st.st_mode & 0o022:
        return f"is writable by others (mode {stat.S_IMODE(st.st_mode):04o})"
    return None


def _private() -> bool:
    """Whether only this user reads what it makes. What root makes, everybody may, as far as its umask goes."""
    return os.geteuid() != 0


def open_folder(path: Path) -> Folder:
    """The folder, if it can be trusted. NoCache if it is something else; OSError if it is not there or not readable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        # Of one that is not there nothing more is asked: another process may be making it just now.
        if isinstance(e, PermissionError | FileNotFoundError) or not os.path.lexists(path):
            raise
        why = "is a symbolic link" if os.path.islink(path) else f"cannot be opened ({e.strerror})"
        raise NoCache(f"{path} {why}") from None
    if unsafe := _distrust(os.fstat(fd)):
        os.close(fd)
        raise NoCache(f"{path} {unsafe}")
    return Folder(path, fd)


def _make(path: Path) -> None:
    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    for p in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(p, 0o700 if _private() else 0o755)


@contextmanager
def folders() -> Iterator[list[Folder]]:
    """The folders to look in: this user's, then root's. Makes none."""
    with ExitStack() as stack:
        found = []
        if directory():
            own, roots = locate()
            for path in dict.fromkeys((own, roots)):
                try:
                    folder = open_folder(path)
                except OSError:  # what that means for writing is told when it comes to it
                    continue
                except NoCache as e:
                    if path == own:
                        not_used(e)
                    else:
                        warn_once(f"root's kernel cache not used: {e}")
                    continue
                stack.callback(os.close, folder.fd)
                found.append(folder)
        yield found


@contextmanager
def own_folder() -> Iterator[Folder | None]:
    """The folder to write to, made if need be. None, after a warning, if it cannot be had."""
    folder = None
    if path := directory():
        try:
            try:
                folder = open_folder(path)
            except FileNotFoundError:
                _make(path)
                folder = open_folder(path)
        except (NoCache, OSError) as e:
            not_used(e)
    try:
        yield folder
    finally:
        if folder:
            os.close(folder.fd)


# ---- entries ---------------------------------------------------------------------------------------------------------


def _pack(header: dict, payload: bytes) -> bytes:
    body = json.dumps(header, sort_keys=True).encode() + b"\n" + payload
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _unpack(data: bytes) -> tuple[dict, bytes]:
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("is truncated or corrupted (its digest does not match)")
    header, _, payload = body.partition(b"\n")
    return json.loads(header), payload


def read(folder: Folder, name: str) -> tuple[dict, bytes] | None:
    """Header and payload of an entry. One that cannot be trusted is ignored with a warning."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name + SUFFIX, flags, dir_fd=folder.fd)
    except FileNotFoundError:
        return None
    except OSError as e:  # a link, no permission
        ignore(folder, name, f"cannot be opened ({e.strerror})")
        return None
    try:
        st = os.fstat(fd)
        why = "is not a regular file" if not stat.S_ISREG(st.st_mode) else _distrust(st)
        if why is None:
            with os.fdopen(fd, "rb", closefd=False) as f:
                entry = _unpack(f.read())
            _used(fd, st)
            return entry
    except (ValueError, OSError) as e:
        why = str(e)
    finally:
        os.close(fd)
    ignore(folder, name, why)
    return None


def _used(fd: int, st: os.stat_result) -> None:
    """Note on the file that it was used, once a day. Many file systems do not keep the time of access."""
    if st.st_uid == os.geteuid() and time.time() - st.st_mtime > DAY:
        with suppress(OSError):  # read-only
            os.utime(fd)


def ignore(folder: Folder, name: str, why: str) -> None:
    warn_once(f"cached kernel {folder.path / (name + SUFFIX)} {why}; ignored, it is compiled again")


def write(folder: Folder, name: str, header: dict, payload: bytes) -> bool:
    """Write an entry atomically. A full or read-only directory costs a warning."""
    target, temporary = name + SUFFIX, f".{name}-{secrets.token_hex(4)}.tmp"
    try:
        if not _may_replace(folder, target):
            return False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600 if _private() else 0o644, dir_fd=folder.fd)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(_pack(header, payload))
                f.flush()
                os.fsync(f.fileno())  # else a power cut can leave the name on an empty file
            os.replace(temporary, target, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder.fd)
            raise
    except OSError as e:
        warn_once(f"cannot write to the kernel cache {folder.path}, the next process compiles again: {e}")
        return False
    return True


def _may_replace(folder: Folder, target: str) -> bool:
    try:
        st = os.stat(target, dir_fd=folder.fd, follow_symlinks=False)
    except FileNotFoundError:
        return True
    if stat.S_ISREG(st.st_mode) and st.st_uid == os.geteuid():
        return True
    warn_once(f"{folder.path / target} is not a file of kda_cute's and stays; the next process compiles again")
    return False


def prune(folder: Folder) -> None:
    """Delete what was made here and has not been used for UNUSED_DAYS."""
    with suppress(OSError):
        for name in os.listdir(folder.fd):
            if not _MADE.fullmatch(name):
                continue
            with suppress(FileNotFoundError):
                st = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
                ours = stat.S_ISREG(st.st_mode) and st.st_uid == os.geteuid()
                if ours and time.time() - st.st_mtime > UNUSED_DAYS * DAY:
                    os.unlink(name, dir_fd=folder.fd)  # who waits for a lock that goes compiles once more; harmless


@contextmanager
def lock(folder: Folder, name: str) -> Iterator[bool]:
    """One process at a time makes an entry. Yields False, after a warning, where no lock can be had; go on without."""
    path, fd, held = folder.path / f"{name}.lock", None, False
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(path.name, flags, 0o600, dir_fd=folder.fd)
        os.utime(fd)  # in use: not to be pruned
        held = _acquire(fd)
        if not held:
            warn_once(f"lock {path} was not released in {LOCK_TIMEOUT_S:g} s; compiling without it")
    except OSError as e:  # read-only or full directory, a file system without locks
        warn_once(f"cannot lock {path}, compiling without: {e}")
    try:
        yield held
    finally:
        if fd is not None:
            if held:
                fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough if this process has forked meanwhile
            os.close(fd)


def _acquire(fd: int) -> bool:
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
