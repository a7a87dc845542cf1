"""A run killed at any point and resumed ends like an undisturbed one (rows R1, R2, R3, R22, K14)."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cbam

# 3 steps per epoch, 2 epochs, saved after steps 2, 3, 4, 6; 8 lines of metrics; one batch of validation.
STEPS, SAVES = (1, 2, 3, 6), (1, 2, 3, 4)  # first, in the middle of an epoch, at its end, last
POINTS = {
    **dict.fromkeys(("data", "fwd", "bwd", "pre_step", "post_step"), STEPS),
    **{f"save:{part}": SAVES for part in ("open", "half", "pre_fsync", "pre_rename", "post_rename")},
    "rotate": (1, 2),
    "eval": (1, 2),
    "log": (1, 2, 4, 8),
}
FAULTS = [f"{point}:{count}" for point, counts in POINTS.items() for count in counts]
AGAIN = ("data:1", "save:half:1", "bwd:1", "log:1", "save:post_rename:1", "pre_step:1", "fwd:2")


def ended(runs: list[list[str]]) -> list[dict]:
    """How each run ended, having met these faults one after the other."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cbam.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kills.py")],
        input="".join(json.dumps(run) + "\n" for run in runs),
        capture_output=True, text=True, env=environment, timeout=60 + 20 * len(runs), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_killed_at_each_kind_of_point_ends_bitwise_the_same():
    # R1, R2, R3, R22, K14
    runs = [
        ["post_step:2"],
        ["save:half:3", "eval:1"],
        ["save:pre_rename:1", "log:4"],
        ["bwd:6"],
        ["rotate:1", "data:1", "log:1"],
        ["eval:2"],
    ]
    baseline, *killed = ended([[], *runs])
    assert [end["killed"] for end in killed] == [len(run) for run in runs]
    assert {end["digest"] for end in killed} == {baseline["digest"]}
    assert baseline["left"] == ["last.json", "metrics.jsonl", "step-00000004.ckpt", "step-00000006.ckpt"]


@pytest.mark.large
def test_runs_killed_a_hundred_times_end_bitwise_the_same():
    # R1, R2, R3, R22, K14
    runs = [[fault, again, "eval:1"] for fault, again in zip(FAULTS, itertools.cycle(AGAIN), strict=False)]
    baseline, *killed = ended([[], *runs])
    assert [run for run, end in zip(runs, killed, strict=True) if end["killed"] == 0] == []
    assert sum(end["killed"] for end in killed) >= 100
    assert [run for run, end in zip(runs, killed, strict=True) if end["digest"] != baseline["digest"]] == []
