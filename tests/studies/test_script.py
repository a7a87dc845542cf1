"""The script that fills the studies on a GPU machine, tried on a CPU at a tiny size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cbam

ROOT = Path(cbam.__file__).parents[1]


def script(data: Path, out: Path, minutes: str = "9", **settings: str) -> subprocess.CompletedProcess:
    tiny = "--limit 8 --batch-size 4 --size 32 --network resnet_tiny --arms se parallel"
    own = {"DEVICE": "cpu", "JOBS": "2", "SEEDS": "1", "EPOCHS": "1", "STUDIES": "order", "MORE": tiny}
    environment = {**os.environ, **own, **settings, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu_studies.sh", data, minutes, out],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            for i in range(4):
                path = tmp_path / "pictures" / split / str(label) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.mark.large
def test_the_script_stops_at_the_time_limit_and_resumes_from_there(tmp_path, pictures):
    stopped = script(pictures, tmp_path / "out", "0")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert not list(tmp_path.glob("out/order/*.json"))
    done = script(pictures, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("out/order/*.json"))) == 2
    again = script(pictures, tmp_path / "out")
    assert again.returncode == 0
    assert "order on images: 2 of 2 runs have a record" in again.stdout
    assert " seed 0: top-1" not in again.stdout


@pytest.mark.large
def test_the_script_returns_the_exit_code_of_the_failure(tmp_path):
    failed = script(tmp_path / "nothing", tmp_path / "out")
    assert failed.returncode == 3
    assert "no such folder" in failed.stdout
