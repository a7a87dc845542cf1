"""Which code a run was made with: the commit, whether it was changed, and the CPU kernels."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import cbam
from cbam.studies import machine
from cbam.train.versions import versions

ROOT = Path(cbam.__file__).parents[1]


def test_the_digest_of_a_commits_sources_needs_no_checkout():
    if machine.commit() is None:
        pytest.skip("no git checkout")
    commit = machine.commit()
    assert commit is not None
    found = machine.source_of(commit.removesuffix("+changes"), ROOT)
    assert found is not None
    assert found == machine.source() or commit.endswith("+changes")
    assert machine.source_of("no-such-commit", ROOT) is None


def test_kernels_built_from_other_sources_count_as_changed_code(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    shutil.copytree(ROOT / "native" / "csrc", tmp_path / "native" / "csrc")
    shutil.copy(ROOT / "native" / "compile.py", tmp_path / "native")
    (tmp_path / "cbam").mkdir()
    (tmp_path / "cbam" / "__init__.py").touch()
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    monkeypatch.setattr(cbam, "__file__", str(tmp_path / "cbam" / "__init__.py"))
    spec = importlib.util.spec_from_file_location("compile_native", ROOT / "native" / "compile.py")
    compiling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiling)
    own = compiling.sources()

    def state(**installed):
        """Whether the code counts as changed with this cbam-native, and its recorded version."""
        kernels = SimpleNamespace(__version__="0.1.0", **installed) if installed else None
        monkeypatch.setitem(sys.modules, "cbam_native", kernels)
        return machine.commit().endswith("+changes"), versions().get("cbam-native")

    assert state(sources=lambda: own) == (False, f"0.1.0+{own[:12]}")
    assert state(sources=lambda: "f" * 64) == (True, f"0.1.0+{'f' * 12}")
    assert state(library=None) == (False, "0.1.0")  # of an older version, which does not state its sources
    assert state() == (False, None)
    with monkeypatch.context() as patch:
        asked = machine._git
        patch.setattr(machine, "_git", lambda *a: None if "status" in a else asked(*a))
        assert state()[0]  # git did not answer in time
    (tmp_path / "native" / "csrc" / "pool.h").write_text("changed")
    assert state(library=None)[0]
    assert not state()[0]
