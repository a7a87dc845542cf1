"""Create or update the virtual environment of this checkout: `python tools/environment.py .venv`.

`python tools/environment.py .venv native` then compiles the CPU kernels into it; without them everything
works, only slower. If this Python can already import torch and torchvision, they are used instead of
downloaded again. Packages are installed with uv if it is on the path, else with pip. Run by `make` from the
root of the checkout; needs only Python.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

# Upper bounds of download and disk space for all packages, with any supported torch; on Linux with CUDA.
LINUX_GB, OTHER_GB = (4, 8), (1, 2)

PROBE = """
import json, sys, torch, torchvision
from importlib.metadata import version
print(json.dumps({
    "torch": version("torch"),
    "torchvision": version("torchvision"),
    "folders": [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))],
}))
"""


def main(folder: Path) -> None:
    """Install this project into `folder`, with everything that its tests and its demo need."""
    unfinished = folder / ".unfinished"
    if unfinished.exists() or (folder.exists() and not runs(folder)):
        print(f"{folder} is incomplete: creating it again")
        shutil.rmtree(folder)
    found = usable_torch()
    fresh = not folder.exists()
    if fresh:
        say_size(found)
    folder.mkdir(exist_ok=True)
    unfinished.touch()  # remains if anything below is interrupted, even by SIGKILL
    if fresh:
        create(folder, found)
    subprocess.run(installer(folder, found), check=True)
    unfinished.unlink()


def runs(folder: Path) -> bool:
    """Whether the interpreter in `folder` starts."""
    python = folder / "bin" / "python"
    return python.exists() and subprocess.run([python, "-c", ""], check=False).returncode == 0


def usable_torch() -> dict | None:
    """Versions and folders of this Python's torch and torchvision; None if absent or too old."""
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return None
    found = json.loads(probe.stdout.splitlines()[-1])
    return found if number(found["torch"]) >= number(torch_floor()) else None


def torch_floor() -> str:
    """The oldest torch that pyproject.toml allows."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(line for line in project["dependencies"] if line.startswith("torch>="))


def number(version: str) -> tuple[int, ...]:
    """Major and minor version: (2, 10) for "2.10.1+cpu" or "torch>=2.10"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def say_size(found: dict | None) -> None:
    """Print the size of the download, and exit if the disk is too full for it."""
    if found:
        print(f"Using torch {found['torch']} and torchvision {found['torchvision']} from {sys.executable}")
        return
    download, disk = LINUX_GB if platform.system() == "Linux" else OTHER_GB
    print(f"No usable torch and torchvision in {sys.executable}: downloading up to {download} GB,")
    print(f"up to {disk} GB on disk. To use your own, run make PYTHON=/path/to/python-with-torch", flush=True)
    free = shutil.disk_usage(".").free / 1e9
    if free < disk:
        sys.exit(f"only {free:.1f} GB of disk space are free here, {disk} GB are needed")


def create(folder: Path, found: dict | None) -> None:
    """Create the environment; if torch was `found`, with access to this Python's packages."""
    venv.create(folder, system_site_packages=bool(found), with_pip=False, symlinks=True)
    if found and sys.prefix != sys.base_prefix:  # this Python is itself in a virtual environment
        (site,) = (folder / "lib").glob("python*/site-packages")
        lines = [f"import site; site.addsitedir({path!r})\n" for path in found["folders"]]
        (site / "outer.pth").write_text("".join(lines), encoding="utf-8")


def native(folder: Path) -> None:
    """Compile native/ for the torch in `folder` and install it there; print one line if that fails."""
    print("Compiling the CPU kernels", flush=True)
    flags = ["--quiet", "--no-build-isolation", "--no-deps", "--force-reinstall", "./native"]
    done = subprocess.run([*pip(folder), "install", *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"Continuing without the CPU kernels: {reason(done.stdout + done.stderr)}", flush=True)


def reason(log: str) -> str:
    """The line of a failed build that gives the reason: the compile step's, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    own = [line.partition("Unbuildable:")[2].strip() for line in lines if "Unbuildable:" in line]
    return (own or lines)[-1]


def installer(folder: Path, found: dict | None) -> list[str]:
    """The command that installs the project into `folder`."""
    python, project = str(folder / "bin" / "python"), ["--editable", ".[dev]"]
    uv = shutil.which("uv")
    if uv and not found:  # uv does not see packages outside the environment
        cache = subprocess.run(
            [uv, "cache", "dir"], capture_output=True, text=True, check=False
        ).stdout.strip()
        return [
            uv,
            "pip",
            "install",
            "--python",
            python,
            *([] if writable(cache) else ["--no-cache"]),
            *project,
        ]
    if not found:
        return [*pip(folder), "install", *project]
    keep = folder / "keep.txt"
    keep.write_text(
        "".join(f"{name}=={found[name]}\n" for name in ("torch", "torchvision")), encoding="utf-8"
    )
    return [*pip(folder), "install", "--constraint", str(keep), *project]


def pip(folder: Path) -> list[str]:
    """A pip command that installs into `folder`: this Python's pip, else one installed there."""
    python = str(folder / "bin" / "python")
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([python, "-m", "ensurepip"], check=True)
    return [python, "-m", "pip"]


def writable(path: str) -> bool:
    """Whether `path` is a writable folder, created if necessary."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)


if __name__ == "__main__":
    try:
        native(Path(sys.argv[1])) if sys.argv[2:] == ["native"] else main(Path(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"setting up {sys.argv[1]} failed: {' '.join(map(str, error.cmd))}")
    except KeyboardInterrupt:
        sys.exit(f"setting up {sys.argv[1]} was interrupted; the next make starts it again")
