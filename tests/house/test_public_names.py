"""Public names exist, are listed, and have a docstring."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import cbam

PACKAGE = Path(cbam.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


@pytest.mark.parametrize("name", cbam.__all__)
def test_a_public_name_resolves_and_has_a_docstring(name):
    assert inspect.getdoc(getattr(cbam, name))


def test_the_package_lists_its_public_names():
    assert sorted(cbam.__all__) == sorted({*cbam._HOME, *cbam._ROOMS} - {"errors"})
    assert set(cbam.__all__) <= set(dir(cbam))


def test_a_type_checker_sees_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(checked.test) == "TYPE_CHECKING"
    imported = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imported for alias in node.names} == set(cbam.__all__)


def test_an_unknown_name_raises_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="'cbam' has no attribute 'atach'"):
        _ = cbam.atach


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_lists_all_its_public_names(room):
    module = importlib.import_module(f"cbam.{room}")
    listed = getattr(module, "__all__", None)
    assert listed is not None, f"cbam.{room} has no __all__"
    assert len(set(listed)) == len(listed)
    assert all(getattr(module, name) is not None for name in listed)
    bound = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith(f"cbam.{room}")
    }
    assert bound <= set(listed), f"not in __all__: {sorted(bound - set(listed))}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_modules_and_their_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text("utf-8"))
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_"
    ]
    silent = [f"{relative(path)}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    assert not silent, "\n".join(silent)
