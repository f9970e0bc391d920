"""How the package hangs together: imports, one definition of a call's arguments, and what is shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kda_cute import torch_ops  # noqa: F401 - registers the operators
from kda_cute.call import ARGUMENTS, TENSORS, WRITTEN, Call, Checkpoints, key

ROOT = Path(__file__).parents[1]
PACKAGES = {"kda_cute": "kda_cute", "kernels": "kda_cute.kernels", "reference": "kda_cute.reference"}
MODULES = {
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder, package in PACKAGES.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(name: str, tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(module, names) of what a module imports of this package when it is imported itself."""
    found = []
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in tree.body if isinstance(tree, ast.Module) else ():
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            found.append(
                (".".join([*parent, *(node.module or "").split(".")]).strip("."), [x.name for x in node.names])
            )
    return found


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        edges[name] = set()
        for module, names in imports(name, tree):
            for x in names:
                target = f"{module}.{x}" if f"{module}.{x}" in MODULES else module
                if target in MODULES and target != name:
                    edges[name].add(target)
    assert edges["kda_cute.ops"] and edges["kda_cute.dispatch"]
    seen: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in seen:
            for other in sorted(edges[name]):
                visit(other, (*path, name))
            seen[name] = 1

    for name in edges:
        visit(name, ())


def test_private_names_stay_in_their_module() -> None:
    for name, tree in TREES.items():
        for module, names in imports(name, tree):
            private = [x for x in names if x.startswith("_") and not x.startswith("__")]
            assert not private, f"{name} imports {private} of {module}"
        own = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
                private_use = node.attr.startswith("_") and not node.attr.startswith("__")
                inside_torch_or_tuple = node.attr in ("_fields", "_make", "_replace", "_asdict")
                assert not private_use or inside_torch_or_tuple, f"{name}: {node.value.id}.{node.attr}"


# ---- a call's arguments


def example() -> dict[str, Any]:
    x = torch.zeros(1, 3, 2, 4)
    given: dict[str, Any] = dict.fromkeys(Call._fields)
    given.update({name: x for name in ("q", "k", "v", "g", "beta")})
    given.update({name: False for name, kind in Call.__annotations__.items() if "bool" in str(kind)})
    given["null_index"] = -1
    return given


@pytest.mark.parametrize("name", Call._fields)
def test_key_tells_calls_apart_by(name: str) -> None:
    """All that is no tensor; of a tensor whether it is given, of q and cu_seqlens the shape."""
    given = example()
    before = key(tuple(given.values()), 0)
    assert key(tuple(given.values()), 0) == before and key(tuple(given.values()), 1) != before
    changed: Any = {
        "scale": 0.5, "lower_bound": -1.0, "null_index": 0, "backend": "cute", "q": torch.zeros(1, 3, 2, 5),
        "checkpoints": Checkpoints(torch.zeros(1), torch.zeros(1), 1),
    }.get(name, torch.zeros(3) if name in TENSORS else True)  # fmt: skip
    differs = key(tuple({**given, name: changed}.values()), 0) != before
    assert differs == (name not in ("k", "v", "g", "beta"))  # which torch's guards look at


def test_operators_take_the_arguments_of_a_call() -> None:
    rest = {
        "chunk_kda": (),
        "chunk_kda_out": ("out", "final_state", "checkpoint_state", "checkpoint_offsets", "checkpoint_indices"),
        "fused_recurrent_kda_out": (
            "out", "final_state", "token_states", "replay", "token_state_indices", "num_accepted_tokens",
        ),
    }  # fmt: skip
    assert {x for names in rest.values() for x in names} >= {*WRITTEN}
    for operator, names in rest.items():
        schema = getattr(torch.ops.kda_cute, operator).default._schema
        assert [x.name for x in schema.arguments] == [*ARGUMENTS, *names]
        written = [x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write]
        assert written == [name for name in names if name in WRITTEN]
    kinds = {x.name: str(x.type) for x in torch.ops.kda_cute.chunk_kda.default._schema.arguments}
    others = {name for names in rest.values() for name in names}
    assert {name for name, kind in kinds.items() if "Tensor" in kind} == {*TENSORS} - others


# ---- what is shipped


def copy_of_the_project(to: Path) -> Path:
    """Not in the checkout, where a build leaves a folder behind."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    for file in files:
        if (ROOT / file).is_file():
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            (to / file).write_bytes((ROOT / file).read_bytes())
    return to


def test_a_wheel_has_every_module_and_works(tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path / "source")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(tmp_path / "installed")
    wanted = {
        "/".join((*package.split("."), *path.relative_to(ROOT / folder).parts))
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert wanted <= shipped and "kda_cute/examples/kimi_linear/model.py" in shipped
    program = (
        "import torch, kda_cute; from kda_cute.kernels import config; x = torch.rand(1, 5, 2, 64);"
        "o, S = kda_cute.chunk_kda(x, x, x, -x, x[..., 0], output_final_state=True);"
        "assert o.shape == x.shape and S.shape == (1, 2, 64, 64); print(kda_cute.__file__, config.__file__)"
    )
    installed = tmp_path / "installed"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(installed)) for place in done.stdout.split()), done.stdout
