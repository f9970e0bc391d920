"""The kernel cache under everything that can go wrong with it. A kernel is compiled and loaded, never launched."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kda_cute import cache, cubin, doctor, environment, jit
from tests import tiny_kernel
from tests.tiny_kernel import TinyConfig

CONFIG = TinyConfig()
DAY = 24 * 3600
NOBODY = 54321  # a uid without a passwd entry


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """An empty cache, and a process that has compiled and loaded nothing."""
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KDA_CUTE_CACHE", raising=False)
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(jit, "_loaded", {})
    monkeypatch.setattr(jit, "stats", jit.Stats())
    monkeypatch.setattr(environment, "_warned", set())


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache" / f"kda_cute-{os.geteuid()}"


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


def tree(path: Path) -> dict[str, tuple]:
    """All that could change below a directory, itself included."""
    found = {}
    for p in (path, *path.rglob("*")):
        st = p.lstat()
        content = p.read_bytes() if stat.S_ISREG(st.st_mode) else None
        found[str(p)] = (st.st_mode, st.st_uid, st.st_gid, st.st_ino, st.st_mtime_ns, content)
    return found


# ---- other users -----------------------------------------------------------------------------------------------------


def as_user(uid: int, function):
    """The function's result in a child process of that user. Forked: this checkout may be closed to others."""
    jit.key(CONFIG)  # what is read of the installed packages is remembered
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if uid != os.geteuid():
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            result = (function(), None)
        except BaseException:
            result = (None, traceback.format_exc())
        with os.fdopen(send, "wb") as f:
            f.write(pickle.dumps(result))
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as f:
        value, error = pickle.loads(f.read())
    os.waitpid(child, 0)
    assert error is None, error
    return value


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
users = pytest.mark.parametrize("uid", [os.geteuid(), pytest.param(NOBODY, marks=needs_root)], ids=["self", "other"])


@pytest.fixture
def shared(monkeypatch):
    """A directory that every user can reach, unlike pytest's, and that the cache is given."""
    path = Path(tempfile.mkdtemp(prefix="kda_cute-test-"))
    path.chmod(0o755)
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(path))
    monkeypatch.setattr(jit, "sources", lambda: {"a.py": "digest"})
    yield path
    shutil.rmtree(path)


@pytest.fixture
def session(stub, monkeypatch, caplog):
    """What a new process of a user does: how often it compiled and loaded, and what it warned of."""

    def run(uid: int, config=CONFIG) -> tuple[jit.Stats, str]:
        def load():
            forget(monkeypatch)
            caplog.clear()
            assert jit.load(config)() == b"machine code"
            return jit.stats, warnings(caplog)

        return as_user(uid, load)

    return run


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


COMPILED, LOADED = jit.Stats(compiled=1, loaded=0), jit.Stats(compiled=0, loaded=1)


@users
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o2775])
def test_directory_that_others_use(mode, uid, shared, session):
    """Sticky or not: nothing in it changes, but for a folder that only this user can write."""
    (shared / "other.kda").write_bytes(b"another program's")
    (shared / "tiny0-sm_90a-0123456789abcdef0123456789abcdef.kda").write_bytes(b"named as ours")
    (shared / "folder").mkdir()
    (shared / "folder" / "x.kda").write_bytes(b"")
    for path in (*shared.rglob("*"), shared):
        if uid != os.geteuid():
            os.chown(path, -1, uid)
        os.utime(path, (0, 0))
    shared.chmod(mode)
    before = tree(shared)
    assert session(uid) == (COMPILED, "")
    assert session(uid) == (LOADED, "")
    as_user(uid, lambda: doctor._cache_row())
    after = tree(shared)
    mine = shared / f"kda_cute-{uid}"
    assert mine.stat().st_mode & 0o022 == 0 and mine.stat().st_uid == uid
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {str(shared)}  # its time, for a name in it is new
    assert after[str(shared)][:4] == before[str(shared)][:4]
    assert all(path.startswith(str(mine)) for path in set(after) - set(before))


@users
def test_doctor_changes_nothing(uid, shared, session):
    def snapshot():
        before = tree(shared)
        row = as_user(uid, doctor._cache_row)
        assert tree(shared) == before
        return row

    shared.chmod(0o1777)
    mine = shared / f"kda_cute-{uid}"
    row = snapshot()
    assert row.verdict == "ok" and f"{mine}: not there yet" in row.found
    session(uid)
    row = snapshot()
    assert row.verdict == "ok" and f"{mine}: 1 kernels" in row.found
    mine.chmod(0o777)
    row = snapshot()
    assert row.verdict == "optional" and "writable by others (mode 0777): not used" in row.found
    shutil.rmtree(mine)
    mine.symlink_to(shared)
    row = snapshot()
    assert row.verdict == "optional" and "is a symbolic link: not used" in row.found


@needs_root
def test_doctor_without_permission(shared):
    row = as_user(NOBODY, doctor._cache_row)
    assert row.verdict == "optional" and f"cannot be made in {shared}" in row.found


def folder_of_others(path, uid):
    path.mkdir()
    os.chown(path, 12345, 12345)


def folder_that_all_write(path, uid):
    path.mkdir()
    path.chmod(0o1777)
    os.chown(path, uid, -1)


def folder_that_a_group_writes(path, uid):
    path.mkdir()
    path.chmod(0o775)
    os.chown(path, uid, -1)


def symlink(path, uid):
    (path.parent / "elsewhere").mkdir(mode=0o700)
    os.chown(path.parent / "elsewhere", uid, -1)
    path.symlink_to("elsewhere")


def dangling_symlink(path, uid):
    path.symlink_to("nowhere")


def file(path, uid):
    path.write_bytes(b"")


def fifo(path, uid):
    os.mkfifo(path)


TAKEN = [
    pytest.param(folder_of_others, "owned by uid 12345", marks=needs_root),
    (folder_that_all_write, "writable by others (mode 1777)"),
    (folder_that_a_group_writes, "writable by others (mode 0775)"),
    (symlink, "symbolic link"),
    (dangling_symlink, "symbolic link"),
    (file, "Not a directory"),
    (fifo, "Not a directory"),
]
taken = pytest.mark.parametrize("make, why", TAKEN, ids=lambda p: getattr(p, "__name__", ""))


@users
@taken
def test_name_that_is_taken(make, why, uid, shared, session):
    """Who else can write below the same directory may have been there first: refused once, and left as it is."""
    make(shared / f"kda_cute-{uid}", uid)
    shared.chmod(0o1777)
    before = tree(shared)
    stats, said = session(uid)
    assert stats == COMPILED
    assert said.count("\n") == 0 and "kernel cache not used" in said and why in said
    assert tree(shared) == before


@needs_root
@taken
def test_roots_name_that_is_taken(make, why, shared, session):
    """A folder of root's is looked into, but not what only has its name."""
    make(shared / "kda_cute-0", NOBODY + 1)
    shared.chmod(0o1777)
    before = tree(shared)
    stats, said = session(NOBODY)
    assert stats == COMPILED and "root's kernel cache not used" in said and said.count("\n") == 0
    assert session(NOBODY)[0] == LOADED
    assert {path: before[path] for path in before if path != str(shared)}.items() <= tree(shared).items()


@needs_root
def test_root_fills_an_image_and_others_read_it(shared, session):
    with umask(0o022):
        assert session(0) == (COMPILED, "")
    before = tree(shared)
    assert session(NOBODY) == (LOADED, "")
    stats, said = session(NOBODY, TinyConfig(variant=1))  # root has not made this one, and nothing can be written
    assert stats == COMPILED and "not used" in said and said.count("\n") == 0
    assert tree(shared) == before
    row = as_user(NOBODY, doctor._cache_row)
    assert f"root's {shared / 'kda_cute-0'}: 1 kernels" in row.found


@needs_root
def test_root_makes_the_given_directory_for_all(shared, session, monkeypatch):
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(shared / "opt" / "kernels"))
    with umask(0):
        assert session(0) == (COMPILED, "")
    assert session(NOBODY) == (LOADED, "")
    assert not [path for path in shared.rglob("*") if path.stat().st_mode & 0o022]


@needs_root
def test_user_does_not_read_what_root_keeps_to_itself(shared, session):
    shared.chmod(0o1777)
    with umask(0o077):
        session(0)
    assert session(NOBODY) == (COMPILED, "")
    assert session(NOBODY) == (LOADED, "")
    assert "cannot be opened (Permission denied)" in as_user(NOBODY, doctor._cache_row).found


@needs_root
def test_root_does_not_read_what_users_make(shared, session):
    shared.chmod(0o1777)
    session(NOBODY)
    assert session(0) == (COMPILED, "")


@users
@pytest.mark.parametrize("mask", [0, 0o002, 0o022, 0o077])
def test_umask(mask, uid, shared, session):
    """However generous it is, nobody else can write."""
    shared.chmod(0o1777)
    with umask(mask):
        assert session(uid) == (COMPILED, "")
    assert session(uid) == (LOADED, "")
    mine = shared / f"kda_cute-{uid}"
    for path in (mine, *mine.iterdir()):
        assert path.stat().st_mode & 0o022 == 0
        assert uid == 0 or path.stat().st_mode & 0o077 == 0


def test_folder_that_is_exchanged_while_it_is_open(root, tmp_path):
    """In a directory without a sticky bit others may move it away: what was checked is what is used."""
    with cache.own_folder() as folder:
        root.rename(tmp_path / "moved")
        root.mkdir()
        os.mkfifo(root / "tiny.lock")
        with cache.lock(folder, "tiny"):
            assert cache.write(folder, "tiny", {"a": 1}, b"code")
        assert cache.read(folder, "tiny") == ({"a": 1}, b"code")
        cache.prune(folder)
    assert [path.name for path in root.iterdir()] == ["tiny.lock"]
    assert entry(tmp_path / "moved").name == "tiny.kda"


def test_folder_that_another_process_makes_at_the_same_time(root, monkeypatch, caplog):
    """It is not there when it is looked for, and is when it is made."""
    real = os.open

    def slow(path, *args, **kwargs):
        if Path(path) == root and not root.exists():
            try:
                return real(path, *args, **kwargs)
            finally:
                root.mkdir(parents=True, mode=0o700)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", slow)
    with cache.own_folder() as folder:
        assert folder is not None and folder.path == root
    assert warnings(caplog) == ""


# ---- where there is no place for it ----------------------------------------------------------------------------------


def no_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)  # of this uid, as in a container
    monkeypatch.delenv("KDA_CUTE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def no_entry(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def no_home_for_tilde(monkeypatch):
    no_home(monkeypatch)
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", "~/kernels")


def nobodys_home(monkeypatch):
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", "~nosuchuser/x")


def relative_xdg_and_no_home(monkeypatch):
    no_home(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")


def home_that_is_a_file(monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.delenv("KDA_CUTE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def working_directory_that_is_gone(monkeypatch):
    path = tempfile.mkdtemp()
    monkeypatch.chdir(path)
    os.rmdir(path)
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", "relative")


NOWHERE = [
    no_home, no_home_for_tilde, nobodys_home, relative_xdg_and_no_home, home_that_is_a_file,
    working_directory_that_is_gone,
]  # fmt: skip


@pytest.mark.parametrize("where", NOWHERE, ids=lambda f: f.__name__)
def test_nowhere_to_keep_it(where, stub, monkeypatch, caplog):
    where(monkeypatch)
    assert load_again(monkeypatch) == COMPILED
    assert warnings(caplog).count("\n") == 0 and "kernel cache not used" in warnings(caplog)
    assert not jit.cached(CONFIG)
    row = doctor._cache_row()
    assert row.verdict == "optional"


@needs_root
def test_user_without_a_home(stub, monkeypatch, caplog):
    """No HOME, and a uid that has no entry, for once really."""
    monkeypatch.setattr(jit, "sources", lambda: {"a.py": "digest"})
    for name in ("HOME", "KDA_CUTE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def call():
        return load_again(monkeypatch), warnings(caplog), doctor._cache_row().found

    stats, said, row = as_user(NOBODY, call)
    assert stats == COMPILED
    assert "no such home directory" in said and "no such home directory" in row


@needs_root
def test_user_whose_home_is_roots(shared, session, monkeypatch):
    monkeypatch.delenv("KDA_CUTE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(shared))
    stats, said = session(NOBODY)
    assert stats == COMPILED and "Permission denied" in said and said.count("\n") == 0


def test_relative_xdg_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.delenv("KDA_CUTE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / f"kda_cute-{os.geteuid()}"


# ---- as it should be -------------------------------------------------------------------------------------------------


def test_memory_then_disk(stub, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "kda_cute"):
        fn = jit.load(CONFIG)
        assert jit.load(CONFIG) is fn
        assert jit.stats == COMPILED
        assert load_again(monkeypatch) == LOADED
    assert not warnings(caplog)


def test_default_directory_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("KDA_CUTE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / f"kda_cute-{os.geteuid()}"


@pytest.mark.parametrize("value", ["0", "false", "False", "OFF", "no", " 0 "])
def test_turned_off(value, stub, monkeypatch, root, caplog):
    monkeypatch.setenv("KDA_CUTE_CACHE", value)
    jit.load(CONFIG)
    assert load_again(monkeypatch) == COMPILED
    assert not root.parent.exists() and not warnings(caplog)
    assert "turned off" in doctor._cache_row().found


@pytest.mark.parametrize("value", ["1", "true", "On", "YES", ""])
def test_turned_on(value, stub, monkeypatch, caplog):
    monkeypatch.setenv("KDA_CUTE_CACHE", value)
    jit.load(CONFIG)
    assert load_again(monkeypatch) == LOADED
    assert not warnings(caplog)


@pytest.mark.parametrize("default", [False, True])
def test_switch_that_is_neither(default, monkeypatch, caplog):
    monkeypatch.setenv("KDA_CUTE_X", "maybe")
    assert environment.switch("KDA_CUTE_X", default) is default
    assert environment.switch("KDA_CUTE_X", default) is default
    assert warnings(caplog) == (
        "KDA_CUTE_X is 'maybe': must be one of 1, true, on, yes, 0, false, off, no; "
        f"taken as {int(default)}"
    )  # fmt: skip


@pytest.mark.parametrize("value, on", [("false", False), ("", False), ("yes", True)])
def test_check_switch(value, on):
    """KDA_CUTE_CHECK is read when the package is imported."""
    code = "from kda_cute import contract; print(contract.CHECK_VALUES)"
    env = {**os.environ, "KDA_CUTE_CHECK": value}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True
    )
    assert done.stdout == f"{on}\n", done.stderr


def made(root: Path, name: str, days: float) -> Path:
    path = root / name
    path.write_bytes(b"")
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def test_what_is_not_used_goes(stub, monkeypatch, root):
    jit.load(CONFIG)
    digest = "0123456789abcdef" * 2
    old = [
        made(root, name, cache.UNUSED_DAYS + 1)
        for name in (
            f"kda_x-sm_90a-{digest}.kda",
            f"kda_x-sm_90a-{digest}.lock",
            f".kda_x-sm_90a-{digest}-1234abcd.tmp",
        )
    ]
    stay = [
        made(root, f"kda_x-sm_90a-{digest[::-1]}.kda", cache.UNUSED_DAYS - 1),
        made(root, f"kda_x-sm_90a-{digest}.txt", 1000),
        made(root, "notes.kda", 1000),
    ]
    (root / f"kda_y-sm_90a-{digest}.kda").symlink_to("notes.kda")
    jit.load(TinyConfig(variant=1))
    assert not [path for path in old if path.exists()]
    assert all(path.exists() for path in stay) and (root / f"kda_y-sm_90a-{digest}.kda").is_symlink()
    assert load_again(monkeypatch) == LOADED


def test_many_versions_stay(stub, monkeypatch, root):
    """Other jobs may be using them."""
    for digit in range(30):
        monkeypatch.setattr(jit, "key", lambda config, arch, digit=digit: f"{digit:064}"[::-1])
        forget(monkeypatch)
        jit.load(CONFIG)
    assert len(list(root.glob(f"*{cache.SUFFIX}"))) == 30


def test_use_is_noted(stub, monkeypatch, root):
    """So that what is loaded every week is not thrown away for its age."""
    jit.load(CONFIG)
    os.utime(entry(root), (time.time() - (cache.UNUSED_DAYS - 1) * DAY,) * 2)
    assert load_again(monkeypatch) == LOADED
    assert time.time() - entry(root).stat().st_mtime < 60
    today = time.time() - DAY / 2
    os.utime(entry(root), (today, today))
    assert load_again(monkeypatch) == LOADED
    assert entry(root).stat().st_mtime == pytest.approx(today)  # once a day is enough


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
        monkeypatch.setenv("CUTE_DSL_A_NEW_ONE", "1")
    assert jit.key(config, arch) != before


def dsl_switches(affects_compile: bool) -> list[str]:
    """As the DSL itself declares them."""
    from cutlass.cutlass_dsl import CuTeDSL

    settings = type(CuTeDSL._get_dsl().envar)._ENV_VAR_SPEC
    return [
        f"CUTE_DSL_{s.source}" for s in settings if isinstance(s.source, str) and s.affects_compile == affects_compile
    ]


SILENT = ["CUTE_DSL_LOG_AUTOTUNE", "CUTE_DSL_KEEP", "CUTE_DSL_KEEP_PTX", "CUTE_DSL_DEBUG_LEAVES"]


def test_key_leaves_out_what_does_not_change_the_code(monkeypatch):
    """A directory of each job's own, or a log, must not have each job compile."""
    before = jit.key(CONFIG)
    for name in {*SILENT, *dsl_switches(affects_compile=False)}:
        monkeypatch.setenv(name, "/tmp/job1")
    assert jit.key(CONFIG) == before


def test_key_covers_all_that_the_dsl_says_changes_the_code(monkeypatch):
    before = jit.key(CONFIG)
    names = dsl_switches(affects_compile=True)
    assert {"CUTE_DSL_LINEINFO", "CUTE_DSL_COMPILER_OPT", "CUTE_DSL_ENABLE_ASSERTIONS"} <= set(names)
    for name in names:
        with monkeypatch.context() as m:
            m.setenv(name, "1")
            assert (jit.key(CONFIG) != before) == (name != "CUTE_DSL_ARCH"), name


SWITCHES = """
import sys
from kda_cute import cubin, jit
from tests import tiny_kernel
jit.compile_kernel = tiny_kernel.compile
(image,) = cubin.extract(jit.artifact(tiny_kernel.TinyConfig())[1])
sys.stdout.buffer.write(b"cubin:" + image.hex().encode())
"""


def test_what_the_key_leaves_out_changes_no_code(tmp_path):
    values = dict.fromkeys({*SILENT, *dsl_switches(affects_compile=False)}, "1")
    values |= {"CUTE_DSL_KEEP": "ir,ptx,cubin", "CUTE_DSL_DUMP_DIR": str(tmp_path), "CUTE_DSL_CACHE_DIR": str(tmp_path)}

    def code(switches: dict[str, str]) -> str:
        env = {**os.environ, "KDA_CUTE_CACHE": "0", "PYTHONPATH": str(Path(__file__).parents[1]), **switches}
        # The log is written to the working directory.
        done = subprocess.run([sys.executable, "-c", SWITCHES], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("cubin:")[1].split()[0]

    assert code(values) == code({})
    assert list(tmp_path.glob("*.ptx"))  # they did arrive


def test_library_that_is_named_is_not_a_compiler_that_is_chosen(monkeypatch, tmp_path):
    """CUTE_DSL_LIBS: the compiler is the one for the driver all the same, and in the key."""
    library = str(tmp_path / jit.RUNTIME)
    flavour = jit.dsl_runtime()[0]
    before = jit.key(CONFIG)
    monkeypatch.setenv("CUTE_DSL_LIBS", library)
    jit.dsl_runtime.cache_clear()
    try:
        assert jit.dsl_runtime() == (flavour, library)
        assert jit.key(CONFIG) != before
    finally:
        jit.dsl_runtime.cache_clear()


@pytest.mark.parametrize("why", ["zip", "no sources", "unreadable"])
def test_sources_that_cannot_be_read(why, stub, monkeypatch, tmp_path, root, caplog):
    """What is not in the key could change unnoticed: nothing is kept."""
    directory = tmp_path / ("kernels.zip/kda_cute/kernels" if why == "zip" else "kernels")
    if why != "zip":
        directory.mkdir()
    if why == "unreadable":
        (directory / "a.py").symlink_to(tmp_path / "gone.py")
    monkeypatch.setattr(jit, "_source_dirs", lambda: [directory])
    assert load_again(monkeypatch) == COMPILED
    assert "kernels' sources" in warnings(caplog) and warnings(caplog).count("\n") == 0
    assert not root.exists()
    assert not jit.cached(CONFIG)
    assert "kernels' sources" in doctor._cache_row().found


def test_imported_from_a_zip(tmp_path):
    here = Path(__file__).parents[1]
    for name, source in (
        ("kda_cute", "kda_cute"),
        ("kda_cute/kernels", "kernels"),
        ("kda_cute/reference", "reference"),
    ):
        shutil.copytree(here / source, tmp_path / "zip" / name, ignore=shutil.ignore_patterns("__pycache__"))
    archive = shutil.make_archive(str(tmp_path / "kda"), "zip", tmp_path / "zip")
    code = """
import kda_cute
from kda_cute import jit
from kda_cute.kernels.config import KdaDecodeConfig
assert ".zip" in kda_cute.__file__
def compile_stub(config, arch, symbol):
    return {"symbol": symbol}, b"code"
jit._compile = compile_stub
print(jit.artifact(KdaDecodeConfig())[1], jit.cached(KdaDecodeConfig()))
"""
    env = {**os.environ, "PYTHONPATH": archive}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "b'code' False\n", done.stderr
    assert done.stderr.count("kernel cache not used") == 1
    assert not (tmp_path / "cache").exists()


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


def directory(path):
    path.unlink()
    path.mkdir()


DAMAGE = [truncate, empty, flip, flip_header, world_writable, group_writable]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_bad_entry_is_ignored_and_replaced(damage, stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    damage(entry(root))
    assert load_again(monkeypatch) == COMPILED
    assert "ignored" in warnings(caplog) and warnings(caplog).count("\n") == 0
    caplog.clear()
    assert load_again(monkeypatch) == LOADED
    assert not warnings(caplog)


@pytest.mark.parametrize("damage", [link, pipe, directory], ids=lambda f: f.__name__)
def test_what_was_not_made_here_stays(damage, stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    path = entry(root)
    damage(path)
    before = path.lstat()
    assert load_again(monkeypatch) == COMPILED
    assert "ignored" in warnings(caplog) and "not a file of kda_cute's and stays" in warnings(caplog)
    assert path.lstat() == before


@needs_root
def test_file_of_another_user_stays(shared, session):
    """In a folder of this user's own. Root's would be trusted, if it were whole."""
    shared.chmod(0o1777)
    session(NOBODY)
    path = entry(shared / f"kda_cute-{NOBODY}")
    os.chown(path, NOBODY + 1, 0)
    path.chmod(0o644)
    before = path.lstat()
    stats, said = session(NOBODY)
    assert stats == COMPILED and f"owned by uid {NOBODY + 1}" in said and "stays" in said
    assert path.lstat() == before
    os.chown(path, 0, 0)
    assert session(NOBODY) == (LOADED, "")


def test_entry_of_another_key_is_not_loaded(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    path = entry(root)
    jit.load(TinyConfig(variant=1))
    (other,) = set(root.glob(f"*{cache.SUFFIX}")) - {path}
    shutil.copy(other, path)
    assert load_again(monkeypatch) == COMPILED
    assert "cannot be loaded" in warnings(caplog)


def foreign(monkeypatch, is_foreign):
    """Let files for which is_foreign(mode) holds look like another user's, neither ours nor root's."""
    fstat = os.fstat

    def owned(fd):
        fields = list(fstat(fd))
        if is_foreign(fields[0]):
            fields[4] = 12345
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", owned)


def test_foreign_entry_is_ignored(stub, monkeypatch, caplog):
    jit.load(CONFIG)
    foreign(monkeypatch, stat.S_ISREG)
    assert load_again(monkeypatch) == COMPILED
    assert "owned by uid 12345" in warnings(caplog)


def test_foreign_directory_is_not_used(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    foreign(monkeypatch, stat.S_ISDIR)
    assert load_again(monkeypatch) == COMPILED
    assert "not used" in warnings(caplog)
    assert entry(root).exists()  # it is not ours to clean


def test_directory_cannot_be_made(stub, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDA_CUTE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert load_again(monkeypatch) == COMPILED
    assert "Not a directory" in warnings(caplog)


def test_directory_is_a_file(stub, root, monkeypatch, caplog):
    root.parent.write_text("")
    assert load_again(monkeypatch) == COMPILED
    assert "Not a directory" in warnings(caplog)


def refuse_new_files(error, monkeypatch):
    """Not by mode bits: the tests may run as root, whom they do not stop."""
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and str(path).lstrip(".").startswith("tiny"):
            raise OSError(error, os.strerror(error), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
def test_unwritable_directory_costs_a_warning(error, stub, root, monkeypatch, caplog):
    """Read-only, forbidden, full: not even a lock file can be made."""
    refuse_new_files(error, monkeypatch)
    assert load_again(monkeypatch) == COMPILED
    assert "cannot write to the kernel cache" in warnings(caplog)
    assert not list(root.glob(f"*{cache.SUFFIX}"))


def test_read_only_directory_still_serves(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    refuse_new_files(errno.EROFS, monkeypatch)
    assert load_again(monkeypatch) == LOADED
    assert not warnings(caplog)


def test_disk_fills_up_while_writing(stub, root, monkeypatch, caplog):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert load_again(monkeypatch) == COMPILED
    assert "No space left" in warnings(caplog)
    assert not [path for path in root.iterdir() if path.suffix != ".lock"]  # no half-written file stays


def test_crash_before_the_rename_leaves_nothing_that_is_loaded(stub, root, monkeypatch):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            jit.load(CONFIG)
    assert [path.suffix for path in root.iterdir()] == [".lock"]
    assert load_again(monkeypatch) == COMPILED


def test_lock_held_for_ever(stub, root, monkeypatch, caplog):
    jit.load(CONFIG)
    path = entry(root)
    path.unlink()
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    with open(path.with_suffix(".lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert load_again(monkeypatch) == COMPILED
    assert "was not released" in warnings(caplog)


def test_failed_compilation_leaves_the_lock_free(stub, root, monkeypatch):
    def broken(config, arch, symbol):
        raise SyntaxError("kernel under edit")

    with monkeypatch.context() as m:
        m.setattr(jit, "_compile", broken)
        with pytest.raises(SyntaxError):
            jit.load(CONFIG)
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    assert load_again(monkeypatch) == COMPILED


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
    assert jit.stats == COMPILED


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
    assert jit.stats == LOADED
    header, payload = jit.artifact(CONFIG)
    assert header["kind"] == ("so" if LINKED else "o")
    assert [cubin.sm(image) for image in cubin.extract(payload)] == [90]


def test_real_kernel_without_a_linker(tiny, monkeypatch):
    monkeypatch.setattr(jit, "LINKERS", ())
    check_callable(jit.load(CONFIG))
    forget(monkeypatch)
    check_callable(jit.load(CONFIG))
    assert jit.artifact(CONFIG)[0]["kind"] == "o"
    assert jit.stats == LOADED


def test_real_kernel_with_every_disk_full(tiny, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)  # where the linker works
    monkeypatch.setattr(os, "fsync", full)  # what the cache writes
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


@pytest.mark.parametrize("terminal, after, shown", [(True, 0.0, True), (True, 3600.0, False), (False, 0.0, False)])
def test_progress_bar(terminal, after, shown, monkeypatch):
    """Only on a terminal and only when it takes long."""

    class Stderr(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stderr", Stderr())
    monkeypatch.setattr(jit, "BAR_AFTER_S", after)
    with jit._ticker("tiny0"):
        deadline = time.monotonic() + (60 if shown else 0.3)
        while "compiling tiny0" not in sys.stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
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
