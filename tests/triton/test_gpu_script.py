"""benchmarks/gpu.sh without a GPU: it refuses, or runs every step in the interpreter.

And its parts, which must not lose what was measured: time that runs out, cells that fail or hang, `ncu`.
"""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu, gpu_cells

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(out: Path, **settings: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("DRY", "STEPS", "TRITON_INTERPRET")}
    return subprocess.run(
        [str(SCRIPT), "10", str(out)],
        env=environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of every step that has some."""
    return {
        path.name.partition("-")[0]: list(csv.DictReader(path.read_text().splitlines()))
        for path in out.glob("*")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_reported(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert "no GPU: to test the script without one, run DRY=1" in done.stderr.splitlines()[-1]


@pytest.mark.large
def test_a_dry_run_runs_every_step_and_writes_rows(tmp_path):
    pytest.importorskip("timm")
    done = run(tmp_path, DRY="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = tables(tmp_path)
    assert set(found) == {"kernels", "hosts", "blocks", "networks", "compiled"}
    named = {row["kernel"] for row in found["kernels"]}
    assert {"pool", "squeeze", "refine", "reduce_gradient", "weigh", "write"} < named
    for rows in found.values():
        assert all(row["device"] and row["torch"] and row["gate"] == "passed" for row in rows)


@pytest.mark.large
def test_a_collection_error_exits_with_1_and_the_reason(tmp_path):
    done = run(tmp_path, DRY="1", STEPS="cells", PYTEST_ADDOPTS="-p no_such_plugin")
    assert done.returncode == 1
    assert "no_such_plugin" in done.stdout


def test_the_script_passes_the_commit_on(tmp_path):
    assert "--commit abc1234" in run(tmp_path, PYTHON="echo", COMMIT="abc1234").stdout
    assert "--commit" not in run(tmp_path, PYTHON="echo", COMMIT="").stdout


@pytest.fixture
def steps(monkeypatch):
    """Steps of one row, which record that they ran, instead of the real ones."""
    done = []

    def step(name):
        def rows(job):
            done.append(name)
            yield {"us": 1.5}

        return rows

    monkeypatch.setattr(gpu, "STEPS", {name: step(name) for name in gpu.STEPS})
    return done


def settled(monkeypatch, out, *arguments, agreed=True):
    """The exit code, and the rows by step."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "agree", lambda *arguments: agreed)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--out", str(out), *arguments])
    code = gpu.main()
    return code, tables(out)


@pytest.mark.parametrize("agreed", [True, False])
def test_failing_cells_skip_ratios_and_mark_the_other_rows(tmp_path, monkeypatch, steps, agreed):
    code, found = settled(monkeypatch, tmp_path / "new", agreed=agreed)
    assert code == (0 if agreed else 1)
    assert steps == (list(gpu.STEPS) if agreed else ["kernels", "hosts", "ncu"])
    assert {row["gate"] for rows in found.values() for row in rows} == {"passed" if agreed else "unverified"}


def test_rows_without_cells_are_unverified(tmp_path, monkeypatch, steps):
    code, found = settled(monkeypatch, tmp_path, "--steps", "blocks")
    assert code == 0
    assert [row["gate"] for row in found["blocks"]] == ["unverified"]


def test_a_row_is_saved_before_the_next_is_measured(tmp_path, monkeypatch, steps, capsys):
    def kernels(job):
        for us in (1.5, 2.5):
            yield {"us": us}
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(gpu.STEPS, "kernels", kernels)
    code, found = settled(monkeypatch, tmp_path, "--steps", "kernels", "hosts")
    assert code == 1
    assert "an illegal memory access" in capsys.readouterr().err
    assert [row["us"] for row in found["kernels"]] == ["1.5", "2.5"]
    assert steps == ["hosts"]


@pytest.mark.parametrize(("of_git", "commit"), [(None, "abc1234"), ("def5678+changes", "def5678+changes")])
def test_rows_have_the_given_commit_if_git_knows_none(tmp_path, monkeypatch, steps, of_git, commit):
    monkeypatch.setattr(gpu.machine, "commit", lambda: of_git)
    _, found = settled(monkeypatch, tmp_path, "--steps", "kernels", "--commit", "abc1234")
    assert [row["commit"] for row in found["kernels"]] == [commit]


def test_a_step_that_would_end_late_is_skipped(tmp_path, monkeypatch, capsys):
    code, found = settled(monkeypatch, tmp_path, "--minutes", "0.3")  # 18 seconds
    assert code == 75
    assert found == {}
    assert "skipped, no time: resnet50, compiled" in capsys.readouterr().out
    job = gpu.Job(tmp_path, time.monotonic() + 30, dry=True)
    assert job.has_time("short", needs=20)
    assert not job.has_time("long", needs=40)
    assert job.left_out == ["long"]


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Write the cells, and return whether they agree."""

    def agree(text, seconds=60.0):
        (tmp_path / "cells.py").write_text(text)
        return gpu_cells.agree(seconds, dry=True)

    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # these cells need none
    monkeypatch.setattr(gpu_cells, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_cells, "CELLS", tmp_path / "cells.py")
    return agree


def test_cells_agree_only_if_all_pass(cells, capsys):
    assert cells("def test_gains(): pass")
    assert not cells("def test_gains(): pass\ndef test_identity(): assert 1 == 2")
    assert "assert 1 == 2" in capsys.readouterr().out
    assert not cells("def test_gains(): pass\nimport no_such_module")
    assert "No module named 'no_such_module'" in capsys.readouterr().out
    assert not cells("def test_other(): pass")  # no cell ran


def test_a_warning_of_a_library_does_not_fail_the_cells(cells, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n')
    old = "warnings.warn('an old package is installed', FutureWarning)"
    assert cells(f"import warnings\n{old}\ndef test_gains(): {old}")


HANGS = """
import subprocess, time
def test_gains():
    with open("pipe", "w") as pipe:
        subprocess.Popen(["sh", "-c", "echo here; sleep 600"], stdout=pipe)
    time.sleep(600)
"""


def test_a_hanging_cell_is_named_and_killed_with_its_children(cells, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for seconds in (4, 12, 36):  # a loaded machine may take long to reach the cell
        assert not cells(HANGS, seconds=seconds)
        output = capsys.readouterr().out
        if "cells.py" in output:
            break
    assert "did not finish: cells.py::test_gains" in output
    assert read_until_closed(pipe) == b"here\n"


def read_until_closed(pipe: int, seconds: float = 4) -> bytes:
    """What was written into a pipe, once the last process that could write has ended."""
    said, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            part = os.read(pipe, 100)
        except BlockingIOError:
            time.sleep(0.05)
            continue
        if not part:
            os.close(pipe)
            return said
        said += part
    raise TimeoutError("a child is left")


NCU = """#!/bin/sh
echo "$@" > "$(dirname "$0")/arguments"
echo '==PROF== Connected'
echo '"ID","Kernel Name","Metric Value"'
echo '"0","pool","12.5"'
"""


def profiled(folder, monkeypatch, program, *left):
    """The rows with this program as `ncu` and these seconds left, and the job."""
    (folder / "ncu").write_text(program)
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    seconds = iter(left)
    monkeypatch.setattr(gpu.Job, "left", lambda job: next(seconds))
    job = gpu.Job(folder, 0.0, dry=True)
    return list(gpu.profiled(job)), job


def test_ncu_does_not_lock_the_clocks_and_its_table_is_read(tmp_path, monkeypatch):
    rows, _ = profiled(tmp_path, monkeypatch, NCU, 100, 100)
    assert rows == [{"ID": "0", "Kernel Name": "pool", "Metric Value": "12.5"}]
    assert "--clock-control none --cache-control none" in (tmp_path / "arguments").read_text()


def test_ncu_is_skipped_if_late_and_ends_in_time(tmp_path, monkeypatch):
    rows, job = profiled(tmp_path, monkeypatch, NCU, 30)
    assert (rows, job.left_out) == ([], ["ncu"])
    assert not (tmp_path / "arguments").exists()
    rows, job = profiled(tmp_path, monkeypatch, "#!/bin/sh\nsleep 600", 100, 0.2)
    assert (rows, job.left_out) == ([], ["ncu"])
