"""Runs of several processes from the command line: how many there are, and that none is left behind.

Rows R4, R6, R8, R9, R17, R18, R25.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cbam
from cbam.train import checkpoint

ROOT = Path(cbam.__file__).parents[1]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
TRAIN = (
    "train", "digits", "--limit", "400", "--epochs", "2", "--batch-size", "8", "--device", "cpu",
    "--model", "resnet_tiny", "--save-every", "3", "--loggers", "csv", "--out", "run",
)  # fmt: skip


def descendants(pid: int) -> list[int]:
    """The processes below one, as /proc has them."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
                if state != "Z":
                    below.setdefault(int(parent), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = below.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def alive(pids: list[int]) -> list[int]:
    left = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
                left.append(pid)
    return left


@contextlib.contextmanager
def running(folder: Path, *command: str, most: int = 12, steps: int = 3, **environment: str):
    """A command in a session of its own, once it has saved a checkpoint some steps on; most children seen.

    It is killed as a whole when it is not over after the block, or has more than `most` processes below it.
    """
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    before = [path.name for path in folder.glob("run/step-*.ckpt")]
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env=known, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    seen, deadline = 0, time.monotonic() + 120
    try:
        while len({p.name for p in folder.glob("run/step-*.ckpt")} - set(before)) < min(steps, 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            seen = max(seen, len(descendants(process.pid)))
            assert seen <= most, "the processes multiply"
            time.sleep(0.05)
        yield process, seen
    finally:
        children = descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in alive(children):
            os.kill(child, signal.SIGKILL)
        process.communicate()


def gone(pids: list[int], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


@LINUX
def test_there_are_as_many_processes_as_workers_and_none_outlives_a_kill(tmp_path):
    # R4, R18: two loaders, for training and for validation
    with running(tmp_path, "cbam", *TRAIN, "--workers", "2") as (process, most):
        workers = descendants(process.pid)
        assert 2 <= len(workers) <= most <= 4
        process.kill()
        assert gone(workers)
    with running(tmp_path, "cbam", *TRAIN, "--workers", "2", "--resume", "auto") as (process, most):
        workers = descendants(process.pid)
        assert most <= 4
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.endswith("--resume auto continues\n")
        assert err.count("cbam: ") == 1
        assert "Traceback" not in err
        assert gone(workers)
    assert not (tmp_path / "run" / "lock").exists()


@LINUX
def test_a_killed_process_of_two_ends_the_run_and_is_named_once(tmp_path):
    # R6, R9, R25: they meet without a port
    with running(tmp_path, "cbam", *TRAIN, "--devices", "2", "--workers", "1") as (process, most):
        assert most <= 6
        everybody = descendants(process.pid)
        began = time.monotonic()
        os.kill(sorted(everybody)[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 9
        told = [line for line in err.splitlines() if line.startswith("cbam: ")]
        assert len(told) == 1
        assert told[0].startswith("cbam: process 1 (pid ")
        assert " is gone" in told[0]
        assert time.monotonic() - began < 20  # 3 on an idle machine
        assert gone(everybody)


@LINUX
@pytest.mark.large
def test_ctrl_c_and_a_kill_of_the_launcher_save_and_end_all(tmp_path):
    # R17, R18
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        command = ("cbam", *TRAIN, "--devices", "2", "--workers", "1", "--resume", "auto")
        with running(tmp_path, *command) as (process, _):
            everybody = descendants(process.pid)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
            assert process.returncode == code
            assert len([line for line in err.splitlines() if line.startswith("cbam: stopped by")]) == 1
            assert gone(everybody)


@LINUX
@pytest.mark.large
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_killed_processes_with_the_same_result(tmp_path, rank):
    # R8
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    calm.mkdir()
    cut.mkdir()
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.1")
    again = ("--max-restarts", "3", "-m", "cbam", *TRAIN, "--resume", "auto")
    with running(calm, *torchrun, *again) as (process, _):
        assert process.wait(120) == 0
    with running(cut, *torchrun, *again) as (process, _):
        ranks = [pid for pid in descendants(process.pid) if is_rank(pid)]
        os.kill(sorted(ranks)[rank], signal.SIGKILL)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "resuming from" in out
    states = [checkpoint.load(checkpoint.checkpoints(folder / "run")[0]) for folder in (calm, cut)]
    ours, theirs = (state["model"] for state in states)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (calm / "run" / "metrics.jsonl").read_text() == (cut / "run" / "metrics.jsonl").read_text()


def is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"-m\0cbam" in command and b"distributed.run" not in command
    return False


@pytest.mark.large
def test_srun_starts_processes_that_find_each_other_and_share_an_evaluation(tmp_path):
    # R25, D33: what SLURM would set, on one machine
    small = ["digits", "--limit", "30", "--epochs", "1", "--batch-size", "8", "--model", "resnet_tiny"]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = {}
    for command in (["train", *small, "--out", "run"], ["eval", "run"]):
        ranks = []
        for rank in range(2):
            slurm = {
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2",
                "SLURM_NNODES": "1",
                "SLURM_JOB_ID": str(os.getpid()), "SLURM_NODELIST": "localhost",
            }  # fmt: skip
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cbam", *command, "--device", "cpu"], cwd=tmp_path,
                    env={**known, **slurm}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        outs = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], outs
        assert outs[1][0] == ""
        told[command[0]] = outs[0][0].splitlines()[-1]
    alone = subprocess.run(
        [sys.executable, "-m", "cbam", "eval", "run", "--device", "cpu"], cwd=tmp_path, env=known,
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert alone.stdout.splitlines()[-1] == told["eval"]


def test_several_machines_need_an_external_launcher(capsys):
    from cbam.app import cli

    assert cli.main(["train", "digits", "--nodes", "2"]) == 2
    assert "start the command with torchrun (on each) or srun" in capsys.readouterr().err
