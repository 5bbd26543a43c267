"""The floors of the package: a module imports its own floor or lower, without cycles."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import kdfast

PACKAGE = Path(kdfast.__file__).parent

#: From the ground; the longest prefix of a module's name says where it is.
FLOORS = (
    ("kdfast._core", "kdfast.views"),
    ("kdfast.spec",),
    ("kdfast.kernels",),
    ("kdfast.ops",),
    ("kdfast.loss", "kdfast.soft_targets", "kdfast.uld", "kdfast.distributed", "kdfast.plan"),
    ("kdfast.methods", "kdfast.cache"),
    ("kdfast.distiller",),
    ("kdfast.integrations", "kdfast.language"),
    ("kdfast.reporting", "kdfast.cache.job", "kdfast.cache.plot"),
    ("kdfast.benchmark", "kdfast.compress", "kdfast.demo", "kdfast.training", "kdfast.tuning"),
    ("kdfast", "kdfast.__main__", "kdfast.cli"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
#: The public faces: whatever else is there has a folder whose name says what it is.
FACES = {"__init__", "__main__", "distiller", "distributed", "loss", "plan", "soft_targets", "uld"}


def floor(module: str) -> int:
    name = module
    while name not in FLOOR:
        name = name.rpartition(".")[0]
    if name == "kdfast" and module != "kdfast":
        pytest.fail(f"{module} has no floor: add it to FLOORS")
    return FLOOR[name]


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def operators() -> dict[str, str]:
    """The module that defines each operator."""
    defined = {}
    for name, path in modules().items():
        source = path.read_text(encoding="utf-8")
        if "torch.library.Library" in source:
            defined |= {op: name for op in re.findall(r"\bdefine\(\s*f?\"(\w+)\(", source)}
    return defined


def named(text: str) -> str | None:
    """The module that a string names, such as ``kdfast.kernels.triton.dense_launch`` or ``package.module:function``."""
    name = text.partition(":")[0]
    return name if name in modules() and "." in name else None


def imports(name: str) -> set[tuple[str, bool]]:
    """The modules of this package that one names, and whether as it is imported; strings and operators among them."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    own = {  # what a package gives as an attribute when it is asked for it
        id(inner)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and str(inner.value).startswith(f"{name}.")
    }
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body
        for inner in ast.walk(child)
    }
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        targets: list[str | None] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                targets.append(whole if whole in modules() or whole == "kdfast._core" else base)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | own:
            targets = [named(node.value)]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"(torch\.ops\.kdfast|_ops)\.\w+", ast.unparse(node)):
            targets = [operators().get(node.attr)]
        for target in targets:
            if target is not None and target.partition(".")[0] == "kdfast" and target != name:
                found.add((target, id(node) not in later and id(node) not in typing))
    return found


def test_the_root_has_the_faces_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == FACES


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_its_own_floor_or_lower(name):
    if name == "kdfast":
        pytest.skip("the top, which names every face")
    above = {target for target, _ in imports(name) if floor(target) > floor(name)}
    assert not above


def test_no_cycles():
    graph = {name: {t for t, now in imports(name) if now and t in modules()} for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_test_sees_what_it_forbids(tmp_path, monkeypatch):
    """Each form counts: import, from, a name in a package, in a function, as a string, by an operator."""
    forms = {
        "import kdfast.cli.bench": "kdfast.cli.bench",
        "from kdfast.cli import bench": "kdfast.cli.bench",
        "from kdfast import _core": "kdfast._core",
        "def f():\n    from kdfast.cli.bench import bench": "kdfast.cli.bench",
        "HOME = 'kdfast.cli.bench'": "kdfast.cli.bench",
        "import torch\ntorch.ops.kdfast.dense_fused()": "kdfast.ops.dense.operators",
    }
    assert operators()["dense_fused"] == "kdfast.ops.dense.operators"
    for k, (source, target) in enumerate(forms.items()):
        path = tmp_path / f"case{k}.py"
        path.write_text(source)
        monkeypatch.setitem(modules(), f"kdfast.spec.case{k}", path)
        assert target in {t for t, _ in imports(f"kdfast.spec.case{k}")}, source
