"""Write tests/FAULTS.md, which test covers which fault, from the tests: `python -m docs.fill_faults`.

A test names the rows that it covers in its docstring, or in a comment, `# R6` or `# C1, C2: why`, inside it,
directly above it, or above the table of its cases. tests/faults.toml holds the rows.
"""

import ast
import functools
import io
import re
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tests" / "faults.toml"
PAGE = ROOT / "tests" / "FAULTS.md"
_ROW = re.compile(r"\b[TSKDRCWE]\d{1,2}\b")


def read() -> dict:
    """Read tests/faults.toml: groups of rows, why some are grave, and those not covered, with the reason."""
    return tomllib.loads(ROWS.read_text("utf-8"))


def rows(catalogue: dict) -> dict[str, str]:
    """Row -> its title, in order."""
    return {row: title for group in catalogue["group"] for row, title in group["rows"].items()}


def grave(catalogue: dict) -> dict[str, str]:
    """Grave row -> the harm that it would do."""
    return {row: harm for harm, listed in catalogue["grave"].items() for row in listed.split()}


@functools.cache
def covered() -> dict[str, list[str]]:
    """Row -> the tests that name it, as file::test."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for row, test in named(path.read_text("utf-8")):
            place = f"{path.relative_to(ROOT / 'tests').as_posix()}::{test}"
            if place not in found[row]:
                found[row].append(place)
    return dict(found)


def named(source: str) -> Iterator[tuple[str, str]]:
    """Yield (row, test) for each row that a docstring or a comment of the source names."""
    tree = ast.parse(source)
    tests = _tests(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield from ((row, node.name) for row in _ROW.findall(ast.get_docstring(node) or ""))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (mentioned := _ROW.findall(token.string)):
            line = token.start[0]
            inside = [name for start, end, name in tests if start <= line <= end]
            after = [name for start, _, name in tests if start > line]
            for row in mentioned:
                if test := (inside or after or [""])[0]:
                    yield row, test


def _tests(tree: ast.Module) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of each test function, decorators included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.append((start, node.end_lineno or start, node.name))
    return sorted(found)


def page() -> str:
    """The text of tests/FAULTS.md."""
    catalogue, tests = read(), covered()
    left, harms, titles = catalogue["left"], grave(catalogue), rows(catalogue)
    count = sum(row in tests for row in titles)
    parts = [
        "# Faults",
        "What can go wrong, and the tests that cover it. `make faults` computes this page from the tests and "
        "from [faults.toml](faults.toml).",
        f"{count} of {len(titles)} rows are covered, {len(titles) - count} are not, with the reason. "
        f"{len(harms)} rows are grave: they would mean a silent wrong result, lost work, code run from a "
        "file, or unauthorised access; all of these are covered.",
    ]
    for group in catalogue["group"]:
        lines = ["| row | fault | covered by |", "| --- | --- | --- |"]
        lines += [_line(row, title, tests, left, harms) for row, title in group["rows"].items()]
        parts += [f"## {group['title']}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _line(
    row: str, title: str, tests: dict[str, list[str]], left: dict[str, str], harms: dict[str, str]
) -> str:
    harm = f" **({harms[row]})**" if row in harms else ""
    if row not in tests:
        return f"| {row} | {title}{harm} | not covered: {left.get(row, '?')} |"
    first = tests[row][:3]
    links = ", ".join(map(_link, first))
    more = f" and {len(tests[row]) - len(first)} more" if len(tests[row]) > len(first) else ""
    return f"| {row} | {title}{harm} | {links}{more} |"


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name.removeprefix('test_').replace('_', ' ')}]({file})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
