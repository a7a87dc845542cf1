"""Where a run happens: versions, commit, device, memory."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

import cbam

PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "torchcam", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python, of cbam and of what it stands on."""
    found = {"cbam": cbam.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of this package, with "+changes" if its files differ; None outside its checkout."""
    home = Path(cbam.__file__).parent
    if _git(home, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed, perhaps inside a checkout of something else
    found, changes = _git(home, "rev-parse", "HEAD"), _git(home, "status", "--porcelain", "--", ".")
    return f"{found}+changes" if found and changes else found


def describe(device: torch.device) -> dict:
    """Type, name and number of threads of the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def largest_memory() -> float:
    """The largest resident memory of this process so far, in GiB."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
