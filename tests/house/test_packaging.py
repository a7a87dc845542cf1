"""The release: exactly the tracked files, one version, and a lowest version for every dependency."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import cbam

ROOT = Path(__file__).parents[2]
PROJECTS = {
    name: tomllib.loads((ROOT / name / "pyproject.toml").read_text("utf-8")) for name in ("", "native")
}


def tracked() -> set[str]:
    """The files under version control, or a skip: an unpacked sdist has none."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def requirements() -> list[str]:
    """Every dependency of both distributions, except those on their own extras."""
    lines: list[str] = []
    for project in PROJECTS.values():
        extras = project["project"].get("optional-dependencies", {}).values()
        lines += project["project"]["dependencies"] + [line for extra in extras for line in extra]
    return [line for line in lines if not line.startswith("cbam[")]


def floorless(lines: list[str]) -> list[str]:
    return [line for line in lines if not re.search(r"[>=]=\s*\d", line)]


def test_every_dependency_has_a_floor():
    assert len(requirements()) > 20
    assert floorless(requirements()) == []
    assert floorless(["torch>=2.10", "pillow", "timm<2", "x==0.1"]) == ["pillow", "timm<2"]


def test_both_distributions_have_one_version_and_one_licence():
    text = (ROOT / "native" / "cbam_native" / "__init__.py").read_text("utf-8")
    assert f'__version__ = "{cbam.__version__}"' in text
    assert (ROOT / "native" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert all("version" in project["project"]["dynamic"] for project in PROJECTS.values())


def test_the_package_is_marked_as_typed():
    assert (Path(cbam.__file__).parent / "py.typed").is_file()


def test_the_files_that_a_release_needs_are_there():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^cff-version: 1\.2\.0$", citation, re.MULTILINE)
    assert "arXiv:1807.06521" in citation
    assert (ROOT / "SECURITY.md").is_file()
    assert "## A release" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_the_sdist_has_the_files_under_version_control(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    expected = tracked()
    line = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    strays = subprocess.run(
        ["git", "ls-files", "-z", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert found - set(strays.stdout.split("\0")) == expected | {"PKG-INFO"}


@pytest.mark.large
def test_the_built_packages_work_in_an_empty_environment(tmp_path):
    line = [sys.executable, ROOT / "tools" / "dist.py", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if "no C++ compiler" in done.stderr:
        pytest.skip("no C++ compiler on the path")
    assert done.returncode == 0, done.stderr
    assert (
        sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["cbam"] * 2 + ["cbam_native"] * 2
    )
