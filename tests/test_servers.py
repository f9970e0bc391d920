"""Laying out the servers' Triton kernels, from made-up wheels."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.gpu import servers


def test_files_and_stubs_are_laid_out(tmp_path: Path) -> None:
    for wheel, names in servers.FILES.items():
        with zipfile.ZipFile(tmp_path / f"{wheel}-py3-none-any.whl", "w") as archive:
            for name in (*names, "more/than/that.py"):
                archive.writestr(name, f"# {name}\n")
    to = tmp_path / "out"
    size = servers.extract(to, tmp_path)
    files = {str(file.relative_to(to)): file for file in to.rglob("*.py")}
    assert size == sum(file.stat().st_size for file in files.values())
    for name in (x for names in servers.FILES.values() for x in names):
        assert files[name].read_text() == f"# {name}\n"
    for name, text in servers.STUBS.items():
        compile(files[name].read_text(), name, "exec")
        assert files[name].read_text() == text
    assert not any(name.startswith("more") for name in files)
    for file in files.values():
        assert file.parent == to or (file.parent / "__init__.py").exists()
    for modules in servers.MODULES.values():
        for module in modules:
            path = module.replace(".", "/")
            assert f"{path}.py" in files or f"{path}/__init__.py" in files


def test_a_wheel_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no sglang-0.5.23-.*pip download --no-deps sglang==0.5.23"):
        servers.extract(tmp_path / "out", tmp_path)


def test_kernels_that_are_missing_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "MODULES", {"sglang": ("kda_cute", "no_such_server.kernels")})
    assert "no_such_server" in (servers.missing("sglang") or "")
    monkeypatch.setattr(servers, "MODULES", {"sglang": ("kda_cute",)})
    assert servers.missing("sglang") is None
