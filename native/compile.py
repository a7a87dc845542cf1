"""Compile the kernels: the build hook of this package; `python compile.py [--sanitize]` compiles in place.

This needs a C++ compiler, and torch for its headers and library, but not CUDA. Each instruction set is a
separate unit, of which the library selects one when it is loaded; all other code is for any processor.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # compiling in place needs no build tool
    BuildHookInterface = object  # pyright: ignore[reportAssignmentType]

HERE = Path(__file__).parent
LIBRARY = HERE / "cbam_native" / "kernels.so"
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Rounding is as written except for the fused multiply-add, which torch's own kernels use too.
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# Unroll loops over a few vectors, whose sums would otherwise go through memory; clang does so by default. Two
# warnings are off: one comes from gcc's own intrinsics, the other from vectors as arguments.
GCC = ["-fpeel-loops", "-Wno-maybe-uninitialized", "-Wno-psabi"]
# The oldest torch whose shims are used: the library runs with this and every later version.
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
LEVELS = {
    "portable": ["-DCBAM_BYTES=16"],
    "avx2": ["-DCBAM_BYTES=32", *AVX2],
    "avx512": ["-DCBAM_BYTES=64", *AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
SANITIZE = [
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]


class Unbuildable(RuntimeError):
    """The reason why the library cannot be built, in one line."""


class CompileHook(BuildHookInterface):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """Compiles the library into the wheel, which fits every Python 3 on this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compile_to(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{wheel_platform()}"


def compile_to(library: Path, *, sanitize: bool = False) -> None:
    """Compile all units, as many at a time as there are cores, and link them to `library`.

    Raises:
        Unbuildable: there is no compiler or no torch, or compiling failed.
    """
    compiler, torch = find_compiler(), find_torch()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    extra = [f"-ffile-prefix-map={path}={name}" for path, name in ((HERE, "native"), (torch, "torch"))]
    extra += SANITIZE if sanitize else []
    # $CXX or the compiler's defaults may select newer processors; each level sets its own.
    extra += ["-march=x86-64"] if x86 else []
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for level, flags in LEVELS.items():
            if x86 or level == "portable":
                # On x86 only machines without AVX2 use the portable level, so it is compiled fast.
                speed = ["-O1"] if x86 and level == "portable" else ["-O2"]
                jobs[level] = [
                    *speed,
                    *KERNEL,
                    *([] if is_clang(compiler) else GCC),
                    *flags,
                    f"-DCBAM_LEVEL=level_{level}",
                ]
                jobs[level] += [str(HERE / "csrc" / "level.cpp")]
        jobs["ops"] = [
            "-O1",
            OLDEST_TORCH,
            *(["-DCBAM_X86"] if x86 else []),
            "-isystem",
            str(torch / "include"),
        ]
        jobs["ops"] += [str(HERE / "csrc" / "ops.cpp")]
        objects = {name: str(Path(folder) / f"{name}.o") for name in jobs}
        commands = [[*compiler, *COMMON, *extra, *jobs[n], "-c", "-o", objects[n]] for n in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        made = Path(folder) / library.name
        links = ["-L", str(torch / "lib"), "-ltorch_cpu", *(["-lc10"] if not sanitize else [])]
        run([*compiler, *extra, "-shared", "-o", str(made), *objects.values(), *links])
        shutil.move(made, library)
    library.with_suffix(".sha256").write_text(sources())


def sources() -> str:
    """A digest of what a library is compiled from: this file and csrc/. `cbam` computes it for a checkout."""
    whole = hashlib.sha256()
    for path in sorted([HERE / "compile.py", *(HERE / "csrc").iterdir()], key=lambda path: path.name):
        content = path.read_bytes()
        whole.update(f"{path.name} {len(content)} ".encode() + content)
    return whole.hexdigest()


def find_compiler() -> list[str]:
    """The C++ compiler: $CXX if it is set, else c++, g++ or clang++."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = [wanted] if wanted else [[name] for name in ("c++", "g++", "clang++")]
    for command in found:
        if shutil.which(command[0]):
            return command
    if wanted:
        raise Unbuildable(f"$CXX names {wanted[0]}, which is not on the path")
    raise Unbuildable("no C++ compiler (c++, g++ or clang++) on the path")


def find_torch() -> Path:
    """The folder of the torch that this Python imports."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unbuildable(
            "torch is not installed: install it first, then cbam-native with --no-build-isolation"
        )
    return Path(spec.origin).parent


def is_clang(compiler: list[str]) -> bool:
    """Whether the compiler is clang, under any name."""
    answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return "clang" in answer


def run(command: list[str]) -> None:
    """Run a compiler; its first error becomes the reason."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Unbuildable(f"{command[0]} failed: {lines[0] if lines else f'exit {done.returncode}'}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def wheel_platform() -> str:
    """The platform tag of a wheel that is built here."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    try:
        if "--sanitize" in sys.argv[1:]:
            compile_to(HERE / "cbam_native" / "kernels-sanitized.so", sanitize=True)
        else:
            compile_to(LIBRARY)
    except Unbuildable as error:
        sys.exit(f"cbam-native was not built: {error}")
