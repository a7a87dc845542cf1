"""The files of the repository: their contents, names and lengths."""

import re
import subprocess
from pathlib import Path

import pytest

import cbam

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cbam"

MAX_LINES = 450  # longer files should be split
NOT_A_NAME = {"util", "utils", "helper", "helpers", "common", "misc", "base", "manager", "managers", "v2"}

# Assembled from parts, because this file is searched too.
HOSTS = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("registry", "npmjs"))]
HOSTS += [".".join(("download", "pytorch", "org/whl")), ".".join(("deb", "debian", "org"))]
FOLDERS = [f"/{name}/" for name in ("root", "work", "home", "Users", "tmp/w")]
NOT_HERE = re.compile("|".join([*map(re.escape, HOSTS), *(rf"(?<![\w./:~-]){name}\w" for name in FOLDERS)]))


def tracked() -> list[Path]:
    """The files under version control; without git, those of the package, docs and tests."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    folders = ("cbam", "docs", "tests")
    return [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")
    ]


def foreign(path: Path) -> list[str]:
    """file:line of each absolute machine path or registry host that a text file names."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        return []  # an image
    return [
        f"{path}:{number}: {line.strip()[:120]}"
        for number, line in enumerate(lines, 1)
        if NOT_HERE.search(line)
    ]


def test_no_file_names_a_machine_path_or_a_registry():
    found = [line for path in tracked() for line in foreign(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [*HOSTS, *(f"{folder}x" for folder in FOLDERS)])
def test_a_machine_path_or_a_registry_is_found(tmp_path, name):
    (tmp_path / "a.txt").write_text(f'first\nsee "{name}" there\n', encoding="utf-8")
    assert foreign(tmp_path / "a.txt") == [f'{tmp_path / "a.txt"}:2: see "{name}" there']


@pytest.mark.parametrize("folder", FOLDERS)
def test_relative_paths_and_web_addresses_are_accepted(tmp_path, folder):
    (tmp_path / "a.txt").write_text(
        f"docs{folder}x https://example.org{folder}x .{folder}x", encoding="utf-8"
    )
    assert foreign(tmp_path / "a.txt") == []


def test_the_version_is_written_once():
    texts = [ROOT / "pyproject.toml", *PACKAGE.rglob("*.py")]
    holders = [
        path.relative_to(ROOT).as_posix()
        for path in texts
        if f'"{cbam.__version__}"' in path.read_text("utf-8")
    ]
    assert holders == ["cbam/__init__.py"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", cbam.__version__)


def test_the_changelog_has_this_version():
    assert f"\n## {cbam.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_licence_is_mit():
    assert (ROOT / "LICENSE").read_text("utf-8").startswith("MIT License\n")
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_no_file_of_the_package_is_too_long():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert lengths
    assert not [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_LINES]


def test_no_module_has_a_generic_name():
    paths = [path for folder in (PACKAGE, ROOT / "tests") for path in folder.rglob("*.py")]
    named = [path for path in paths if {*path.relative_to(ROOT).with_suffix("").parts} & NOT_A_NAME]
    stems = [path for path in paths if {*path.stem.removeprefix("test_").strip("_").split("_")} & NOT_A_NAME]
    assert not named + stems
