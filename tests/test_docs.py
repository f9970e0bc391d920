"""README and docs: links lead somewhere, snippets run, commands exist, and the pages name all that is public."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kda_cute
from kda_cute.cli import main
from tests.test_fla import fla  # noqa: F401
from tests.test_structure import copy_of_the_project

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
API = (ROOT / "docs/api.md").read_text()
CODE = re.compile(r"^```\w*\n(.*?)^```$|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{slug}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{again}" if again else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}"


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 160


SNIPPETS = [
    pytest.param(code, id=f"{name(page)}-{i}")
    for page in PAGES
    for i, (language, code) in enumerate(FENCED.findall(page.read_text()))
    if language == "python"
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code: str, fla: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """On the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given: dict[str, Any] = {}
    exec(code, given)
    for result in ("o", "state", "pool"):
        assert result not in given or given[result].isfinite().all() and given[result].any()


@pytest.mark.gpu
@pytest.mark.parametrize("code", [snippet for snippet in SNIPPETS if snippet.id.startswith("README")])
def test_snippets_run_on_the_gpu(code: str, fla: Any) -> None:  # noqa: F811
    given: dict[str, Any] = {}
    exec(code, given)
    assert "o" not in given or given["o"].is_cuda and given["o"].isfinite().all()


def commands(pattern: str) -> list[str]:
    code = [c for page in PAGES for block, span in CODE.findall(page.read_text()) for c in (block or span).splitlines()]
    return sorted({found for line in code for found in re.findall(pattern, line.partition(" #")[0])})


def ran(command: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints, without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def make(tmp_path: Path) -> list[str]:
    """make, with this Python for that of .venv."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".stamp").touch()
    return ["make", f"VENV={tmp_path}"]


def test_the_commands_of_the_readme_are_those_that_run_here() -> None:
    block = next(code for language, code in FENCED.findall(README.read_text()) if language == "bash")
    lines = {line.partition("#")[0].strip() for line in block.splitlines()}
    assert lines == {"pip install .", "kda-cute doctor", "make demo", "make test"}


def test_pip_install(tmp_path: Path) -> None:
    source, to = copy_of_the_project(tmp_path / "source"), tmp_path / "installed"
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(to),
    ]  # into a folder, from what is here
    ran([sys.executable, "-m", "pip", "install", "-q", *options, str(source)])
    program = "import kda_cute.kernels.config as x; print(x.__file__)"
    printed = ran([sys.executable, "-c", program], cwd=tmp_path, PYTHONPATH=str(to))
    assert printed.startswith(str(to))


def test_make_demo(make: list[str]) -> None:
    printed = ran([*make, "demo"])
    assert "KDA" in printed and "SDPA" in printed


def test_make_test(make: list[str]) -> None:
    printed = ran([*make, "test", "ARGS=-q -n0 tests/test_bench.py"])
    assert re.search(r"\d+ passed", printed)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", commands(r"^make ([a-z-]+)"))
def test_make_has_the_targets(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands(r"^kda-cute ([a-z]+)"))
def test_the_command_line_has_the_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"`kda-cute {command}`" in API


@pytest.mark.parametrize("module", commands(r"\bpython -m ([\w.]+)"))
def test_the_modules_are_there(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_the_extras_are_there() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = {extra for page in PAGES for extra in re.findall(r"'\.\[(\w+)\]'", page.read_text())}
    assert "cu13" in extras
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def test_doctor_runs() -> None:
    assert "kda-cute doctor" in README.read_text()
    done = subprocess.run([sys.executable, "-m", "kda_cute", "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert "verdict" in done.stdout


@pytest.mark.parametrize("function", [f for f in kda_cute.__all__ if not f.startswith("_")])
def test_the_api_page_has_all_functions_and_arguments(function: str) -> None:
    assert f"## {function}\n" in API
    for parameter in inspect.signature(getattr(kda_cute, function)).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert re.search(rf"\b{parameter.name}\b", API), f"{function}: {parameter.name}"


def test_the_kernels_have_what_their_pages_name() -> None:
    """`module.name` of kernels/, in pages that say what is: those of experiments tell of what was."""
    modules = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py")}
    has = {
        module: {
            getattr(node, "name", None) or getattr(node, "id", None)
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Name))
        }
        for module, tree in modules.items()
    }
    looked_at = 0
    for page in PAGES:
        if page.parent.name != "kernel" or page.stem.startswith("experiments"):
            continue
        for module, thing in re.findall(r"`(\w+)\.(\w+)[`(]", page.read_text()):
            if module in has and thing != "py":
                looked_at += 1
                assert thing in has[module], f"{name(page)}: {module}.{thing}"
    assert looked_at > 50


def test_the_api_page_has_all_environment_variables() -> None:
    read = re.compile(r'(?:switch\(|environ\.get\(|env_var = )"(\w+)"')
    used = {variable for path in (ROOT / "kda_cute").rglob("*.py") for variable in read.findall(path.read_text())}
    assert {"KDA_CUTE_CACHE", "KDA_CUTE_CACHE_DIR", "KDA_CUTE_CHECK", "FLA_KDA_CUTE"} <= used
    assert not {x for x in used if not x.startswith("CUTE_DSL_") and f"`{x}`" not in API}
