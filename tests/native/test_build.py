"""Building cbam-native, and running without it."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_missing_compiler_is_reported_in_one_line(no_compiler):
    done = subprocess.run([sys.executable, ROOT / "native" / "compile.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "cbam-native was not built: no C++ compiler (c++, g++ or clang++) on the path\n"


def test_a_missing_compiler_in_cxx_is_reported_by_name(no_compiler, monkeypatch):
    monkeypatch.setenv("CXX", "nope -O3")
    with pytest.raises(Exception, match=r"^\$CXX names nope, which is not on the path$"):
        loaded(ROOT / "native" / "compile.py").find_compiler()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these flags are x86-64's")
def test_march_in_cxx_does_not_break_the_portable_level(monkeypatch, tmp_path):
    compiling = loaded(ROOT / "native" / "compile.py")
    try:
        monkeypatch.setenv("CXX", f"{compiling.find_compiler()[0]} -march=x86-64-v3")
    except compiling.Unbuildable as error:
        pytest.skip(str(error))
    tried, run = [], compiling.run

    def parse(command):
        if "-DCBAM_LEVEL=level_portable" in command:
            run([*command, "-fsyntax-only"])
            tried.append(command)
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(compiling, "run", parse)
    compiling.compile_to(tmp_path / "kernels.so")
    assert len(tried) == 1


def test_the_first_error_of_the_compiler_is_reported():
    compiling = loaded(ROOT / "native" / "compile.py")
    program = "import sys; print('note', file=sys.stderr); sys.exit('a.cpp:1: error: unknown word')"
    with pytest.raises(compiling.Unbuildable, match=r"failed: a\.cpp:1: error: unknown word"):
        compiling.run([sys.executable, "-c", program])


def test_make_continues_if_the_kernels_cannot_be_built(monkeypatch, capsys, tmp_path):
    environment = loaded(ROOT / "tools" / "environment.py")
    fails = [
        sys.executable,
        "-c",
        "import sys; sys.exit('  x.Unbuildable: no C++ compiler\\n  [end of output]')",
    ]
    monkeypatch.setattr(environment, "pip", lambda folder: fails)
    environment.native(tmp_path)
    assert capsys.readouterr().out.splitlines()[1:] == ["Continuing without the CPU kernels: no C++ compiler"]


def test_the_wheel_fits_every_python_of_the_platform(monkeypatch):
    compiling = loaded(ROOT / "native" / "compile.py")
    monkeypatch.setattr(compiling, "compile_to", lambda library: None)
    build = {}
    hook = object.__new__(compiling.CompileHook)
    hook.initialize("standard", build)
    assert build["tag"].startswith("py3-none-")
    assert not build["pure_python"]


def test_a_missing_cbam_native_is_logged_once_and_the_equation_runs():
    program = """
        import logging, sys
        logging.basicConfig(format="%(message)s")
        sys.modules["cbam_native"] = None
        import torch, cbam
        block = cbam.CBAM(8)
        block(torch.randn(1, 8, 5, 5)), block(torch.randn(1, 8, 5, 5))
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    remedy = "in a checkout: pip install hatchling; pip install --no-build-isolation ./native"
    assert done.stderr.count(f"cbam-native is not installed ({remedy})") == 1


def test_a_digest_of_the_sources_is_written_next_to_the_library(monkeypatch, tmp_path):
    compiling = loaded(ROOT / "native" / "compile.py")
    monkeypatch.setattr(compiling, "find_compiler", lambda: [sys.executable])
    monkeypatch.setattr(compiling, "find_torch", lambda: tmp_path)
    monkeypatch.setattr(compiling, "run", lambda command: Path(command[command.index("-o") + 1]).touch())
    compiling.compile_to(tmp_path / "kernels.so")
    assert (tmp_path / "kernels.sha256").read_text() == compiling.sources()
