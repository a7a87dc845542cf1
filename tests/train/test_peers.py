"""Several processes train as one and fail as one (rows D33, R1, R6, R7, R9 to R12, R17, R26, R27)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cbam


def ended(*scenarios: list) -> tuple[list, str]:
    """How each scenario of peers.py ended, and what was written to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cbam.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("peers.py")],
        input="".join(json.dumps(scenario) + "\n" for scenario in scenarios),
        capture_output=True, text=True, env=environment, timeout=60 + 60 * len(scenarios), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


WAYS = {19: [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)], 21: [(1, 1), (2, 4)]}
CHANGES = [(1, 1), (1, 2), (2, 1)]
GPUS = {  # what each process sees, by how it was started
    "all to each": [["a", "b"], ["a", "b"]],
    "its own to each": [["a"], ["b"]],
    "two to each": [["a", "b"], ["c", "d"]],
    "one to all": [["a"], ["a"]],
    "too few": [["a", "b"]] * 3,
}
KILLS = ["bwd:3", "save:half:1@0", "pre_step:2@1"]
ALL = [
    *(["equal", size, parts, pictures] for pictures, ways in WAYS.items() for size, parts in ways),
    *(["changed", first, then] for first, then in CHANGES),
    ["killed", 2, []],
    ["killed", 2, KILLS],
    ["nan", "stop", [2]],
    ["nan", "skip", [2]],
    ["broken"],
    ["hung"],
    ["told_to_stop", 0],
    ["told_to_stop", 1],
    ["unused"],
    *(["gpus", seen] for seen in GPUS.values()),
]


@pytest.fixture(scope="module")
def ends():
    """How each scenario of ALL ended, by name and arguments, and what was written to "stderr"."""
    found, err = ended(*ALL)
    return {json.dumps(scenario): end for scenario, end in zip(ALL, found, strict=True)} | {"stderr": err}


def end_of(ends: dict, *scenario):
    return ends[json.dumps(scenario)]


def apart(a: list, b: list) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)


@pytest.mark.parametrize("pictures", WAYS)
def test_two_processes_or_microbatches_train_as_one_and_count_every_image_once(ends, pictures):
    # D33, R12: the last step is not full, and shared unevenly
    ((one,), *others) = (end_of(ends, "equal", *way, pictures) for way in WAYS[pictures])
    assert one["code"] == 0
    for process in (process for processes in others for process in processes):
        *ours, work = one["value"]
        *theirs, told = process["value"]
        assert all(apart(mine, its) <= 1e-12 for mine, its in zip(ours, theirs, strict=True))
        assert work <= told <= 1.5 * work, "each reports the work of all, padding included"


def test_a_run_resumes_with_another_number_of_processes(ends):
    # R12, K21
    baseline, *others = (end_of(ends, "changed", *change) for change in CHANGES)
    for other in others:
        assert apart(baseline["weights"], other["weights"]) <= 1e-12


def check_kills(run: list[str], end: dict, baseline: dict) -> None:
    *failed, last = end["ends"]
    assert len(failed) == len(run)
    assert [process["code"] for process in last] == [0, 0]
    for ranks in failed:
        assert sorted(process["code"] for process in ranks) == [-9, 9], (run, ranks)
        (survivor,) = (process for process in ranks if process["code"] == 9)
        dead = ranks.index(next(process for process in ranks if process["code"] == -9))
        assert f"process {dead} (pid " in survivor["error"]
        assert " is gone" in survivor["error"]
        assert not survivor["silent"]
        assert survivor["seconds"] < 15  # 4 on an idle machine
    assert end["digest"] == baseline["digest"], run


def test_the_survivor_names_the_killed_process_and_the_run_resumes_the_same(ends):
    # R1, R6, K14, R27
    check_kills(KILLS, end_of(ends, "killed", 2, KILLS), end_of(ends, "killed", 2, []))


@pytest.mark.large
def test_runs_of_two_processes_killed_anywhere_end_bitwise_the_same():
    # R1, R2, R6, K14
    points = ("data:4@1", "fwd:2@0", "post_step:5@0", "save:pre_rename:2@0", "eval:1@1", "log:3@0", "bwd:6@1")
    runs = [[], *([point, "pre_step:1@1"] for point in points)]
    (baseline, *killed), _ = ended(*(["killed", 2, run] for run in runs))
    for run, end in zip(runs[1:], killed, strict=True):
        check_kills(run, end, baseline)


@pytest.mark.large
def test_the_fp16_scaler_is_resumed_and_decides_for_all_processes():
    # R11
    run = ["post_step:3@0"]
    (baseline, killed), _ = ended(["killed", 2, [], "fp16"], ["killed", 2, run, "fp16"])
    check_kills(run, killed, baseline)


def test_a_nan_loss_in_one_process_stops_all_before_the_step(ends):
    # R10
    stopped = end_of(ends, "nan", "stop", [2])
    assert [end["code"] for end in stopped] == [5, 5]
    assert [end["silent"] for end in stopped] == [False, True]
    assert "epoch 0, step 1, on the training images" in stopped[0]["error"]
    assert (stopped[0]["step"], len(stopped[0]["pictures"])) == (1, 4)


def test_all_processes_skip_the_same_step(ends):
    # R10
    skipped = end_of(ends, "nan", "skip", [2])
    assert [end["code"] for end in skipped] == [0, 0]
    assert skipped[0]["value"] == skipped[1]["value"]
    assert all(abs(weight) < 100 for weight in skipped[0]["value"])
    assert ends["stderr"].count("the step is skipped") == 1


def test_the_first_error_ends_all_processes_and_is_reported_once(ends):
    # R9
    first, second = end_of(ends, "broken")
    assert (first["code"], second["code"]) == (9, 3)
    assert second["error"] == "DataError: 12.jpg: not an image"
    assert "process 1 (pid" in first["error"]
    assert "stopped: DataError: 12.jpg: not an image" in first["error"]
    assert (first["silent"], second["silent"]) == (True, False)


def test_a_hanging_process_is_named_with_the_code_where_the_others_wait(ends):
    # R7
    first, _ = end_of(ends, "hung")
    assert first["code"] == 9
    assert "process 1 (pid" in first["error"]
    assert "does not answer" in first["error"]
    assert "fitting.py" in ends["stderr"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(ends, rank):
    # R17
    stopped = end_of(ends, "told_to_stop", rank)
    assert [end["code"] for end in stopped] == [143, 143]
    assert [end["silent"] for end in stopped] == [False, True]
    assert stopped[0]["step"] in (1, 2)
    assert "saved as" in stopped[0]["error"]
    assert [end["saved"] for end in stopped] == [1, 1]  # the first to exit has the others killed


def test_parameters_without_a_gradient_are_named(ends):
    # R26
    both = end_of(ends, "unused")
    assert [end["code"] for end in both] == [2, 2]
    assert "(unused.weight, unused.bias)" in both[0]["error"]


@pytest.mark.parametrize(
    ("how", "taken"), [("all to each", [0, 1]), ("its own to each", [0, 0]), ("two to each", [0, 1])]
)
def test_each_process_takes_the_gpu_of_its_local_rank_or_the_only_visible_one(ends, how, taken):
    assert [end.get("value") for end in end_of(ends, "gpus", GPUS[how])] == [[number] for number in taken]


def test_processes_that_would_share_a_gpu_are_refused(ends):
    shared, few = end_of(ends, "gpus", GPUS["one to all"]), end_of(ends, "gpus", GPUS["too few"])
    assert [end["code"] for end in (*shared, *few)] == [2] * 5
    assert all("processes 0 and 1 have the same GPU (a)" in end["error"] for end in shared)
    assert sum(not end["silent"] for end in shared) == 1
    told = "3 processes on this machine need a GPU each, but a process sees 2 here: start 2"
    assert any(told in end["error"] for end in few)
