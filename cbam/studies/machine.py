"""Where a run takes place: commit, device, memory."""

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

import cbam
from cbam.train.versions import native

SOURCES = (".py", ".cpp", ".h", ".cu")


def commit() -> str | None:
    """The git commit of this package, with "+changes" if files are modified; None outside its checkout.

    This includes the CPU kernels, if installed: their sources, and that these are what was compiled.
    """
    home = Path(cbam.__file__).parent
    if _git(home, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed, perhaps inside a checkout of something else
    kernels, sources = native(), _kernels(home.parent / "native")
    looked_at = [".", *(str(path) for path in sources if kernels)]
    found, status = _git(home, "rev-parse", "HEAD"), _git(home, "status", "--porcelain", "--", *looked_at)
    changes = status != ""  # also if git times out
    if sources and kernels and kernels[1]:  # older builds do not record their sources
        changes = changes or kernels[1] != digest({path.name: path.read_bytes() for path in sources})
    return f"{found}+changes" if found and changes else found


def _kernels(home: Path) -> list[Path]:
    """The sources of the CPU kernels in a checkout, as listed in `native/compile.py`."""
    return [home / "compile.py", *(home / "csrc").iterdir()] if (home / "csrc").is_dir() else []


def source() -> str:
    """A digest of the sources of this package, equal on all machines for the same commit."""
    home = Path(cbam.__file__).parent
    return digest({path.relative_to(home).as_posix(): path.read_bytes() for path in home.rglob("*")
                   if path.suffix in SOURCES and "__pycache__" not in path.parts})  # fmt: skip


def source_of(commit: str, folder: Path) -> str | None:
    """`source()` of a commit of the checkout `folder`; None if git does not know it."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "archive", "--format=tar", commit, "cbam"],
            capture_output=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        files = [member for member in archive if member.isfile() and Path(member.name).suffix in SOURCES]
        return digest({member.name.removeprefix("cbam/"): _content(archive, member) for member in files})


def digest(files: dict[str, bytes]) -> str:
    """SHA-256 of names and contents, sorted by name."""
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name} {len(content)} ".encode() + content)
    return whole.hexdigest()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def describe(device: torch.device) -> dict:
    """Type and name of the device, and the number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def largest_memory() -> float:
    """The peak resident memory of this process, in GiB."""
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
