"""Rooms import only from floors below, and some rooms import no package except torch.

A room is a module or a package directly under cbam/. It imports from floors strictly below and from itself;
the public names of `cbam` count as the rooms that define them.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cbam"

FLOORS = {
    "errors": -2,
    "files": -1,
    "ops": 0,
    "nn": 1,
    "surgery": 2,
    "data": 2,
    "models": 3,
    "explain": 3,
    "portable": 3,
    "hub": 4,
    "timm_names": 4,
    "train": 5,
    "studies": 6,
    "app": 7,
}
EXEMPT = ("__init__.py", "__main__.py")  # the entry points import from every floor
TRITON = "ops/triton_*.py"  # imported on first use of a GPU; at module level only by each other
TORCH_ONLY = ("__init__.py", "errors", "ops", "nn", "surgery")  # what `import cbam` and `attach` need


def floor_offenders(package: Path) -> list[str]:
    """One line per import in `package` that is not from a floor below: file:line, what, why."""
    found = []
    for path, room, tree in modules(package):
        if path.parent == package and path.name in EXEMPT:
            continue
        if room not in FLOORS:
            found.append(f"{path}:1: the room {room} is on no floor; give it one in FLOORS")
            continue
        for line, target in rooms_imported(path, tree, package):
            if target != room and FLOORS.get(target, 99) >= FLOORS[room]:
                found.append(f"{path}:{line}: {room} (floor {FLOORS[room]}) imports {target}")
    return found


def extra_offenders(package: Path) -> list[str]:
    """One line per import, at module level in a TORCH_ONLY room, of more than torch: file:line, what."""
    found = []
    for path, room, tree in modules(package):
        allowed = {"torch", package.name, *sys.stdlib_module_names}
        if path.match(TRITON):
            allowed.add("triton")
        if room in TORCH_ONLY:
            for node in at_module_level(tree):
                names = absolute_names(path, node, package)
                found += [
                    f"{path}:{node.lineno}: {room} imports {name} at module level"
                    for name in names
                    if name.split(".")[0] not in allowed
                ]
    return found


def modules(package: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    """Path, room and syntax tree of each module."""
    for path in sorted(package.rglob("*.py")):
        first = path.relative_to(package).parts[0]
        yield (
            path,
            first if first in EXEMPT else first.removesuffix(".py"),
            ast.parse(path.read_text("utf-8")),
        )


def rooms_imported(path: Path, tree: ast.Module, package: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of each import of ours anywhere in a module: in functions and for the type checker too."""
    homes = public_homes(package)
    fronts = set()  # the names that `cbam` itself is bound to here
    for node in ast.walk(tree):
        for name in absolute_names(path, node, package):
            top, *rest = name.split(".")
            if top == package.name and rest and rest[0] != "__version__":
                yield node.lineno, homes.get(rest[0], rest[0])
        if isinstance(node, ast.Import):
            fronts |= {a.asname or a.name for a in node.names if a.name == package.name}
            fronts |= {
                package.name for a in node.names if a.name.startswith(f"{package.name}.") and not a.asname
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in fronts:
            room = homes.get(node.attr, node.attr)
            if room in FLOORS:
                yield node.lineno, room


def absolute_names(path: Path, node: ast.AST, package: Path) -> list[str]:
    """The dotted names that an import statement, or a call of import_module with a literal, brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            folder = path.parents[node.level - 1].relative_to(package.parent)
            base = ".".join([*folder.parts, *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
        "import_module",
        "__import__",
    ):
        return [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def public_homes(package: Path) -> dict[str, str]:
    """Public name -> the room that defines it, from the package's __init__."""
    for node in ast.parse((package / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return {name: home.split(".")[1] for name, home in ast.literal_eval(node.value).items()}
    return {}


def at_module_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, in `if`, `try`, `with` and class bodies too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from at_module_level(node)


def test_every_import_is_from_a_lower_floor():
    offenders = floor_offenders(PACKAGE)
    assert not offenders, "\n".join(offenders)


def test_the_lower_floors_import_only_torch():
    offenders = extra_offenders(PACKAGE)
    assert not offenders, "\n".join(offenders)


@pytest.fixture
def house(tmp_path):
    """A package `cbam` in tmp_path, and a function that writes one of its modules."""
    package = tmp_path / "cbam"

    def write(name: str, text: str) -> Path:
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return package

    write("__init__.py", '_HOME = {"attach": "cbam.surgery"}\n')
    return write


@pytest.mark.parametrize(
    ("module", "text", "line"),
    [
        ("ops/a.py", "import torch\nfrom cbam.nn import CBAM\n", 2),
        ("ops/a.py", "import cbam.nn.cbam\n", 1),
        ("nn/a.py", "def f():\n    from cbam import surgery\n", 2),
        ("nn/a.py", "from cbam import attach\n", 1),
        ("nn/a.py", "import cbam\n\n\ncbam.attach\n", 4),
        ("nn/a.py", "import cbam as house\nhouse.train\n", 2),
        ("nn/a.py", "import cbam.ops\ncbam.train\n", 2),
        ("surgery/a.py", "from ..data import loader\n", 1),
        ("surgery/deep/a.py", "from ... import data\n", 1),
        ("explain/a.py", "from cbam.models import build\n", 1),
        ("errors.py", "from cbam.ops import x\n", 1),
        ("train/a.py", "if TYPE_CHECKING:\n    from cbam.studies import x\n", 2),
        ("data/a.py", "import importlib\nimportlib.import_module('cbam.explain')\n", 2),
        ("app/a.py", "import cbam.attic\n", 1),
        ("attic/a.py", "import torch\n", 1),
    ],
)
def test_an_import_not_from_a_lower_floor_is_named(house, module, text, line):
    package = house(module, text)
    (offender,) = floor_offenders(package)
    assert offender.startswith(f"{package / module}:{line}: ")


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("app/a.py", "from cbam import __version__, studies, attach\nfrom cbam.train import fit\n"),
        ("nn/a.py", "from cbam.ops.x import y\nfrom cbam.nn.b import z\nfrom . import b\nfrom .b import c\n"),
        ("nn/a.py", "import cbamboo\nfrom torch import nn\nimport cbam\ncbam.__version__, cbam.ops\n"),
        ("__main__.py", "from cbam.app.cli import main\n"),
    ],
)
def test_an_import_from_a_lower_floor_is_accepted(house, module, text):
    assert floor_offenders(house(module, text)) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("import torch\nimport timm.models\n", [2]),
        ("try:\n    from PIL import Image\nexcept ImportError:\n    pass\n", [2]),
        ("class A:\n    import numpy\n", [2]),
        ("def f():\n    import torchvision\nimport json, cbam.ops\n", []),
        ("if TYPE_CHECKING:\n    import numpy\n", []),
        ("import triton\n", [1]),
    ],
)
def test_an_optional_package_at_module_level_is_named(house, text, lines):
    package = house("surgery/a.py", text)
    house("data/a.py", "import numpy\n")  # not one of the rooms that need only torch
    found = extra_offenders(package)
    assert [int(offender.split(":")[1]) for offender in found] == lines
