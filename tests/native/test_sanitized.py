"""The kernels compiled with the address and undefined-behaviour sanitizers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.large
def test_the_sanitizers_find_nothing(tmp_path):
    """The tests of this folder except large ones, with a library that stops at an error."""
    compiler = next(filter(shutil.which, ("g++", "clang++")), None)
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs g++ or clang++, on Linux")
    # The sanitizer intercepts exceptions too: libstdc++ has to be loaded before it starts.
    names = "libasan.so", "libstdc++.so"
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip(f"{compiler} has no {' or '.join(names)}")
    spec = importlib.util.spec_from_file_location("compile_native", ROOT / "native" / "compile.py")
    compiling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiling)
    library = tmp_path / "kernels.so"
    compiling.compile_to(library, sanitize=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not large"]
    command += [str(Path(__file__).parent), "--kernels", str(library)]
    command += ["--ignore", str(Path(__file__).with_name("test_bits.py"))]  # bits hold only in a plain build
    preload = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **preload}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert "AddressSanitizer" not in report, report[-4000:]
    assert "runtime error" not in report, report[-4000:]
    assert done.returncode == 0, report[-4000:]
    assert " passed" in report
