"""benchmarks/gpu.sh without a GPU: it refuses, or runs through every step by the interpreter."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert "no GPU here: DRY=1" in done.stderr.splitlines()[-1]


@pytest.mark.large
def test_a_dry_run_goes_through_every_step_and_writes_rows(tmp_path):
    pytest.importorskip("timm")
    done = run(tmp_path, DRY="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tables = {
        path.name.partition("-")[0]: list(csv.DictReader(path.read_text().splitlines()))
        for path in tmp_path.iterdir()
    }
    assert set(tables) == {"kernels", "hosts", "blocks", "networks", "compiled"}
    named = {row["kernel"] for row in tables["kernels"]}
    assert {"pool", "squeeze", "refine", "reduce_gradient", "weigh", "write"} < named
    for rows in tables.values():
        assert all(row["device"] and row["torch"] for row in rows)


@pytest.mark.large
def test_cells_that_fail_end_it_with_1(tmp_path):
    done = run(tmp_path, DRY="1", STEPS="cells", PYTEST_ADDOPTS="-p no_such_plugin")
    assert done.returncode == 1
