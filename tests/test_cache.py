"""The kernel cache under everything that can go wrong with it. A kernel is compiled and loaded, never launched."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from kda_cute import cache, cubin, jit
from tests import tiny_kernel
from tests.tiny_kernel import TinyConfig

CONFIG = TinyConfig()


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """An empty cache, and a process that has compiled and loaded nothing."""
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KDA_CUTE_CACHE", raising=False)
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(jit, "_loaded", {})
    monkeypatch.setattr(jit, "stats", jit.Stats())


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def stub(monkeypatch):
    """Compiles in no time: machine code is a text, loading it gives a function that returns the text."""

    def compile_stub(config, arch, symbol):
        jit.stats.compiled += 1
        return {"kind": "stub", "symbol": symbol}, b"machine code"

    monkeypatch.setattr(jit, "_compile", compile_stub)
    monkeypatch.setattr(jit, "_open", lambda header, payload: lambda: payload)


def entry(root: Path) -> Path:
    (path,) = root.glob(f"*{cache.SUFFIX}")
    return path


def load_again(monkeypatch) -> jit.Stats:
    """What a new process does."""
    forget(monkeypatch)
    assert jit.load(CONFIG)() == b"machine code"
    return jit.stats


def warnings(caplog) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


# ---- as it should be ------------------------------------------------------------------------------------------------


def test_memory_then_disk(stub, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "kda_cute"):
        fn = jit.load(CONFIG)
        assert jit.load(CONFIG) is fn
        assert jit.stats == jit.Stats(compiled=1, loaded=0)
        assert load_again(monkeypatch) == jit.Stats(compiled=0, loaded=1)
    assert not warnings(caplog)


def test_directory_and_files_are_private(stub, root):
    jit.load(CONFIG)
    assert root.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in root.iterdir())


def test_default_directory_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("KDA_CUTE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "kda_cute"


def test_turned_off(stub, monkeypatch, root):
    monkeypatch.setenv("KDA_CUTE_CACHE", "0")
    jit.load(CONFIG)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert not root.exists()


def test_old_versions_are_pruned(stub, monkeypatch, root):
    for digit in range(cache.KEEP + 3):
        monkeypatch.setattr(jit, "key", lambda config, arch, digit=digit: f"{digit:064}"[::-1])
        forget(monkeypatch)
        jit.load(CONFIG)
        os.utime(root / f"tiny0-sm_90a-{f'{digit:064}'[::-1][:32]}{cache.SUFFIX}", (digit, digit))
    assert len(list(root.glob(f"*{cache.SUFFIX}"))) == cache.KEEP
    assert load_again(monkeypatch).loaded == 1  # the newest is among them


@pytest.mark.parametrize("what", ["edited", "added", "arch", "config", "dsl", "tvm_ffi", "switch"])
def test_key_covers(what, monkeypatch, tmp_path):
    sources = tmp_path / "kernels"
    sources.mkdir()
    (sources / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(jit, "_source_dirs", lambda: [sources])
    versions = {"nvidia-cutlass-dsl": "1", "apache-tvm-ffi": "1"}
    monkeypatch.setattr(jit, "_version", versions.__getitem__)
    config, arch = CONFIG, "sm_90a"
    before = jit.key(config, arch)
    assert jit.key(config, arch) == before
    if what == "edited":
        (sources / "a.py").write_text("x = 2\n")
    elif what == "added":
        (sources / "b.py").write_text("")
    elif what == "arch":
        arch = "sm_100a"
    elif what == "config":
        config = TinyConfig(variant=1)
    elif what == "dsl":
        versions["nvidia-cutlass-dsl"] = "2"
    elif what == "tvm_ffi":
        versions["apache-tvm-ffi"] = "2"
    else:
        monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    assert jit.key(config, arch) != before


def test_edited_source_is_compiled_again(stub, monkeypatch, tmp_path):
    sources = tmp_path / "kernels"
    sources.mkdir()
    (sources / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(jit, "_source_dirs", lambda: [sources])
    jit.load(CONFIG)
    assert load_again(monkeypatch).loaded == 1
    (sources / "a.py").write_text("x = 2\n")
    assert load_again(monkeypatch).compiled == 1


# ---- faults ---------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def flip_header(path):
    data = bytearray(path.read_bytes())
    data[70] ^= 1
    path.write_bytes(data)


def world_writable(path):
    path.chmod(0o666)


def group_writable(path):
    path.chmod(0o620)


def link(path):
    moved = path.with_name("elsewhere")
    path.rename(moved)
    path.symlink_to(moved)


def pipe(path):
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    "damage", [truncate, empty, flip, flip_header, world_writable, group_writable, link, pipe], ids=lambda f: f.__name__
)
def test_bad_entry_is_discarded_and_rebuilt(damage, stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    damage(entry(root))
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "discarded" in warnings(caplog)
    caplog.clear()
    assert load_again(monkeypatch) == jit.Stats(compiled=0, loaded=1)
    assert not warnings(caplog)


def test_entry_of_another_key_is_not_loaded(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    path = entry(root)
    jit.load(TinyConfig(variant=1))
    (other,) = set(root.glob(f"*{cache.SUFFIX}")) - {path}
    shutil.copy(other, path)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "cannot be loaded" in warnings(caplog)


def foreign(monkeypatch, is_foreign):
    """Let files for which is_foreign(mode) holds look like another user's, neither ours nor root's."""
    me = 12345
    monkeypatch.setattr(os, "geteuid", lambda: me)

    def owned(st):
        fields = list(st)
        fields[4] = me + 1 if is_foreign(st.st_mode) else me
        return os.stat_result(fields)

    stat, fstat = os.stat, os.fstat
    monkeypatch.setattr(os, "stat", lambda *a, **k: owned(stat(*a, **k)))
    monkeypatch.setattr(os, "fstat", lambda *a, **k: owned(fstat(*a, **k)))


def test_foreign_entry_is_discarded(stub, monkeypatch, caplog):
    jit.load(CONFIG)
    foreign(monkeypatch, lambda mode: mode & 0o170000 == 0o100000)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "owned by uid 12346" in warnings(caplog)


def test_foreign_directory_is_not_used(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    foreign(monkeypatch, lambda mode: mode & 0o170000 == 0o040000)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "not used" in warnings(caplog)
    assert entry(root).exists()  # it is not ours to clean


def test_entry_of_root_is_trusted(stub, monkeypatch, caplog):
    """A container image's cache, filled by root and used by somebody else."""
    jit.load(CONFIG)
    foreign(monkeypatch, lambda mode: False)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    stat, fstat = os.stat, os.fstat

    def roots(st):
        fields = list(st)
        fields[4] = 0
        return os.stat_result(fields)

    monkeypatch.setattr(os, "stat", lambda *a, **k: roots(stat(*a, **k)))
    monkeypatch.setattr(os, "fstat", lambda *a, **k: roots(fstat(*a, **k)))
    assert load_again(monkeypatch) == jit.Stats(compiled=0, loaded=1)
    assert not warnings(caplog)


def test_world_writable_directory_is_emptied(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    root.chmod(0o777)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "discarded" in warnings(caplog)
    assert root.stat().st_mode & 0o777 == 0o700
    assert load_again(monkeypatch).loaded == 1


def test_directory_cannot_be_made(stub, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert load_again(monkeypatch).compiled == 1
    assert "cannot be used" in warnings(caplog)


def test_directory_is_a_file(stub, root, monkeypatch, caplog):
    root.write_text("")
    assert load_again(monkeypatch).compiled == 1
    assert "cannot be used" in warnings(caplog)


def refuse_new_files(root, error, monkeypatch):
    """Not by mode bits: the tests may run as root, whom they do not stop."""
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and str(path).startswith(str(root)):
            raise OSError(error, os.strerror(error), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
def test_unwritable_directory_costs_a_warning(error, stub, root, monkeypatch, caplog):
    """Read-only, forbidden, full: not even a lock file can be made."""
    refuse_new_files(root, error, monkeypatch)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "cannot write to the kernel cache" in warnings(caplog)
    assert not list(root.glob(f"*{cache.SUFFIX}"))


def test_read_only_directory_still_serves(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    refuse_new_files(root, errno.EROFS, monkeypatch)
    assert load_again(monkeypatch) == jit.Stats(compiled=0, loaded=1)
    assert not warnings(caplog)


def test_disk_fills_up_while_writing(stub, root, monkeypatch, caplog):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "No space left" in warnings(caplog)
    assert not [path for path in root.iterdir() if path.suffix != ".lock"]  # no half-written file stays


def test_crash_before_the_rename_leaves_nothing_that_is_loaded(stub, root, monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            jit.load(CONFIG)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)


def test_lock_held_for_ever(stub, root, monkeypatch, caplog):
    import filelock

    jit.load(CONFIG)
    path = entry(root)
    path.unlink()
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    with filelock.FileLock(path.with_suffix(".lock")):
        assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)
    assert "was not released" in warnings(caplog)


def test_failed_compilation_leaves_the_lock_free(stub, root, monkeypatch):
    def broken(config, arch, symbol):
        raise SyntaxError("kernel under edit")

    with monkeypatch.context() as m:
        m.setattr(jit, "_compile", broken)
        with pytest.raises(SyntaxError):
            jit.load(CONFIG)
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    assert load_again(monkeypatch) == jit.Stats(compiled=1, loaded=0)


# ---- many at once ---------------------------------------------------------------------------------------------------


def test_threads_compile_once(stub, monkeypatch):
    start = threading.Barrier(8)
    results = []

    def ask():
        start.wait()
        results.append(jit.load(CONFIG))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and len(set(map(id, results))) == 1
    assert jit.stats == jit.Stats(compiled=1, loaded=0)


def test_fork_while_a_thread_compiles(stub):
    """The child gets a free lock, not one that a thread of its parent holds for ever."""
    held, release = threading.Event(), threading.Event()

    def hold():
        with jit._lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if jit._lock.acquire(timeout=5) else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


STUB_PROCESS = """
import os, sys, time
from kda_cute import jit
from tests.tiny_kernel import TinyConfig
def compile_stub(config, arch, symbol):
    with open(sys.argv[1], "a") as f:
        f.write("compiled\\n")
    time.sleep(0.5)
    return {"kind": "stub", "symbol": symbol}, b"machine code"
jit._compile = compile_stub
jit._open = lambda header, payload: lambda: payload
assert jit.load(TinyConfig())() == b"machine code"
"""

REAL_PROCESS = """
import sys
from kda_cute import jit
from tests import tiny_kernel
jit.compile_kernel = tiny_kernel.compile
jit.load(tiny_kernel.TinyConfig())
assert jit.stats.compiled + jit.stats.loaded == 1
if jit.stats.compiled:
    with open(sys.argv[1], "a") as f:
        f.write("compiled\\n")
elif "--linked" in sys.argv:
    assert "cutlass" not in sys.modules, "loading must not import cutlass"
"""

LINKED = ["--linked"] if any(map(shutil.which, jit.LINKERS)) else []


@pytest.mark.parametrize("script", [STUB_PROCESS, REAL_PROCESS], ids=["stub", "real"])
def test_16_cold_processes_compile_once(script, tmp_path):
    count = tmp_path / "count"
    command = [sys.executable, "-c", script, str(count), *LINKED]
    here = Path(__file__).parents[1]
    processes = [subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True) for _ in range(16)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert count.read_text() == "compiled\n"


# ---- a real kernel --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(jit, "compile_kernel", tiny_kernel.compile)


def check_callable(fn):
    """As far as a kernel goes without a GPU: its argument checks run, so the code is linked and loaded."""
    with pytest.raises(ValueError, match="device_type=cuda"):
        fn(torch.zeros(4), torch.zeros(4))


def test_real_kernel_compiles_and_loads(tiny, monkeypatch, root):
    check_callable(jit.load(CONFIG))
    forget(monkeypatch)
    check_callable(jit.load(CONFIG))
    assert jit.stats == jit.Stats(compiled=0, loaded=1)
    header, payload = jit.artifact(CONFIG)
    assert header["kind"] == ("so" if LINKED else "o")
    assert [cubin.sm(image) for image in cubin.extract(payload)] == [90]


def test_real_kernel_without_a_linker(tiny, monkeypatch):
    monkeypatch.setattr(jit, "LINKERS", ())
    check_callable(jit.load(CONFIG))
    forget(monkeypatch)
    check_callable(jit.load(CONFIG))
    assert jit.artifact(CONFIG)[0]["kind"] == "o"
    assert jit.stats == jit.Stats(compiled=0, loaded=1)


def test_real_kernel_with_every_disk_full(tiny, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)  # where the linker works
    monkeypatch.setattr("tempfile.mkstemp", full)  # what the cache writes
    check_callable(jit.load(CONFIG))
    assert "No space left" in warnings(caplog)


def test_real_kernel_with_the_cache_off(tiny, monkeypatch):
    monkeypatch.setenv("KDA_CUTE_CACHE", "0")
    check_callable(jit.load(CONFIG))


def test_first_compilation_says_so(tiny, caplog):
    with caplog.at_level(logging.INFO, "kda_cute"):
        jit.load(CONFIG)
        jit.load(CONFIG)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "tiny0" in record.getMessage()


@pytest.mark.parametrize("terminal, seconds, shown", [(True, 0.5, True), (True, 0.0, False), (False, 0.5, False)])
def test_progress_bar(terminal, seconds, shown, monkeypatch):
    """Only on a terminal and only when it takes long."""

    class Stderr(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stderr", Stderr())
    monkeypatch.setattr(jit, "BAR_AFTER_S", 0.1)
    with jit._ticker("tiny0"):
        time.sleep(seconds)
    assert ("compiling tiny0" in sys.stderr.getvalue()) == shown


@pytest.mark.parametrize("before", [None, "sm_100a"])
def test_environment_is_put_back(before, tiny, monkeypatch):
    if before is None:
        monkeypatch.delenv("CUTE_DSL_ARCH", raising=False)
    else:
        monkeypatch.setenv("CUTE_DSL_ARCH", before)
    jit.load(CONFIG)
    assert os.environ.get("CUTE_DSL_ARCH") == before
    assert [cubin.sm(image) for image in cubin.extract(jit.artifact(CONFIG)[1])] == [90]


def test_kernel_for_another_architecture_is_refused(monkeypatch):
    """A kernel that ignores `arch` fails when it is compiled, not when it is launched."""
    from kda_cute.jit import _compile_arch

    def other(config, arch):
        with _compile_arch("sm_80"):
            return tiny_kernel.compile(config, arch)

    monkeypatch.setattr(jit, "compile_kernel", other)
    with pytest.raises(RuntimeError, match="asked for sm_90a but compiled for sm_80"):
        jit.load(CONFIG)


def test_spills_and_counts_are_read_from_the_cubin(tiny):
    (kernel,) = cubin.kernels(cubin.extract(jit.artifact(CONFIG)[1])[0])
    assert kernel.registers > 0
    assert kernel.spills == kernel.stack == kernel.count("HGMMA") == 0
    assert kernel.count("LDG") == 2 and kernel.count("STG") == 1 and kernel.count("EXIT") >= 1
