"""Build the release distributions into a folder, and try them: `python tools/dist.py dist`.

Two distributions, each as an sdist and a wheel: cbam, which is pure Python, and cbam-native, whose wheel
holds the compiled CPU kernels. A wheel is built from its unpacked sdist, so that an sdist that lacks a file
fails here and not for a user. Both wheels are then installed into an empty environment and used, first
without torch, then with the one of this Python. Run by `make dist` from the root of the checkout; needs
hatchling, and for the kernels a C++ compiler and torch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

from environment import pip

ROOT = Path(__file__).parents[1]
PROJECTS = (ROOT, ROOT / "native")

WITHOUT_TORCH = """
import cbam
try:
    cbam.attach
except ImportError as error:
    assert isinstance(error, cbam.errors.MissingExtraError) and "pip install torch" in str(error), error
else:
    raise SystemExit("torch is installed")
"""
WITH_TORCH = """
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import cbam, cbam_native

package = Path(cbam.__file__).parent
for module in (cbam, cbam_native):
    assert Path(module.__file__).is_relative_to(sys.prefix), module.__file__
assert version("cbam") == cbam.__version__ == version("cbam-native") == cbam_native.__version__
assert (package / "py.typed").is_file() and list(package.glob("explain/weights/*.safetensors"))
model, x = cbam.build("resnet_tiny").eval(), torch.randn(2, 3, 64, 64)
before = model(x)
with cbam.ops.using("fused"):
    assert torch.equal(cbam.attach(model)(x), before)
    model.train()(x).sum().backward()
"""


def main(folder: Path) -> None:
    """Build every sdist and wheel into `folder`, and try the wheels."""
    folder.mkdir(parents=True, exist_ok=True)
    distributions = [build_both(project, folder) for project in PROJECTS]
    try_out([wheel for _, wheel in distributions])
    for path in (path for pair in distributions for path in pair):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


def try_out(wheels: list[Path]) -> None:
    """Install `wheels` into an empty environment and use them; exit on the first failure."""
    with tempfile.TemporaryDirectory() as place:
        empty = Path(place) / "environment"
        venv.create(empty, with_pip=False)
        files = [str(wheel.resolve()) for wheel in wheels]
        call([*pip(empty), "install", "--quiet", "--no-deps", "--no-index", *files], place)
        python = str(empty / "bin" / "python")
        call([python, "-c", WITHOUT_TORCH], place)
        call([str(empty / "bin" / "cbam"), "--version"], place)
        (site,) = (empty / "lib").glob("python*/site-packages")
        outer = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (site / "outer.pth").write_text(outer, encoding="utf-8")
        call([python, "-c", WITH_TORCH], place)
        call([str(empty / "bin" / "cbam"), "sites", "resnet_tiny"], place)


def call(line: list[str], folder: str) -> None:
    """Run a command in `folder`, where it cannot import from the checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(line, cwd=folder, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the wheels do not work: {' '.join(line[:3])}\n{done.stdout}{done.stderr}")


def build_both(project: Path, folder: Path) -> tuple[Path, Path]:
    """Build the sdist of `project`, and the wheel from it."""
    sdist = build("sdist", project, folder)
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (source,) = Path(unpacked).iterdir()
        return sdist, build("wheel", source, folder)


def build(target: str, project: Path, folder: Path) -> Path:
    """Build `target` ("sdist" or "wheel") of `project` with hatchling into `folder`."""
    with tempfile.TemporaryDirectory() as fresh:
        line = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", fresh]
        done = subprocess.run(line, cwd=project, capture_output=True, text=True, check=False)
        if done.returncode:
            log = (done.stderr.strip() or done.stdout.strip() or "no output from hatchling").splitlines()
            sys.exit(f"the {target} of {project.name} was not built: {log[-1]}")
        (made,) = Path(fresh).iterdir()
        return Path(shutil.move(made, folder / made.name))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "dist")
