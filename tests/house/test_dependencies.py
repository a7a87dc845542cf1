"""The lowest versions allowed have no known vulnerabilities that matter here."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Package -> first version without the vulnerabilities that matter here: through untrusted files or visitors.
FLOORS = {
    "torch": ("2.10", "CVE-2026-24747, a file overwrites memory although weights_only is set"),
    "pillow": ("12.3", "CVE-2026-54059, -54060, -55379, -55380, -55798, damaged images"),
    "pytorch-lightning": (
        "2.6.6",
        "CVE-2026-58659, code of a checkpoint is run; 2.6.2 and 2.6.3 were malware",
    ),
    "transformers": ("5.5", "CVE-2026-4372 and CVE-2026-5241, code is run from a configuration"),
    "onnx": ("1.21", "CVE-2026-27489 and CVE-2026-34445, files outside of a model's folder are read"),
    "gradio": ("6.16", "CVE-2026-28414 and -28416, and a path that leads out of a folder"),
    "scikit-learn": ("1.5", "CVE-2024-5206"),
    "datasets": ("4.0", "older ones run the script of a data set"),
    "pyyaml": ("5.4", "CVE-2020-14343, although no YAML is constructed here"),
}


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def lowest() -> dict[str, set[str]]:
    """Package -> the lowest versions that pyproject.toml allows in all its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found: dict[str, set[str]] = {}
    for line in (*project["dependencies"], *extras):
        if match := re.match(r"([A-Za-z0-9_-]+)(?:\[[\w,]+\])?(?:[>=]=([\d.]+))?", line):
            found.setdefault(match[1].lower(), set()).add(match[2] or "0")
    return found


# W16
@pytest.mark.parametrize("package", FLOORS)
def test_no_version_with_a_known_vulnerability_is_allowed(package):
    first, why = FLOORS[package]
    assert lowest()[package], f"{package} is no longer a dependency"
    for floor in lowest()[package]:
        assert version(floor) >= version(first), why


# W16
def test_the_installed_versions_are_above_the_floors():
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for package, (first, why) in FLOORS.items():
        try:
            found = installed(package)
        except PackageNotFoundError:
            continue
        numbers = re.match(r"\d+(\.\d+)*", found)
        assert numbers
        assert version(numbers[0]) >= version(first), f"{package} {found}: {why}"
