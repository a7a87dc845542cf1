"""The place of a process among several, and the exit code of a launch (rows R6, R9, R25)."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from cbam.errors import ConfigError, DistributedError
from cbam.train import Config
from cbam.train.distributed import World, joined, world
from cbam.train.launch import (
    Place,
    _exit_code,
    _start,
    _warn_incomplete,
    die_with_parent,
    first_host,
    launch,
    place,
)
from cbam.train.runs import _device_counts


@pytest.fixture(autouse=True)
def _no_distributed_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_has_no_place_and_is_a_world_of_one():
    assert place() is None
    with joined(None) as here:
        assert here == world() == World()
        assert here.sum(1.5, 2) == [1.5, 2]
        assert here.all("a") == ["a"]


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    here = Place(0, 3, 0, 3, f"file:{tmp_path / 'store'}")
    with pytest.raises(ConfigError, match=r"3 processes on this machine .* sees 2 here: start 2"):
        joined(here, cuda=True).__enter__()
    assert world() == World()


def test_a_process_that_never_started_is_named_after_one_timeout(monkeypatch, tmp_path):
    # R6, R25
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    here = Place(0, 2, 0, 2, f"file:{tmp_path / 'store'}")
    began = time.monotonic()
    with pytest.raises(DistributedError, match=r"^process 1, which never started, does not answer"):
        joined(here, timeout=1.0).__enter__()
    assert time.monotonic() - began < 10
    assert world() == World()


def test_the_place_of_a_process_is_read_from_torchrun(monkeypatch):
    said = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a1",
        "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(5, 8, 1, 4, "agent:a1:29500")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert place() == Place(5, 8, 1, 4, "tcp:a1:29500")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(DistributedError, match="environment cannot be read") as caught:
        place()
    assert caught.value.exit_code == 9


def test_the_place_of_a_process_is_read_from_srun(monkeypatch):
    said = {
        "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_NNODES": "2",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_JOB_ID": "123456", "SLURM_NODELIST": "gpu[003-004]",
    }  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(9, 16, 1, 8, f"tcp:gpu003:{15000 + 123456 % 20000}")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a job of a single process
    assert place() is None


def test_the_batch_script_of_a_slurm_job_is_a_single_process(monkeypatch):
    said = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert place() is None, "only srun has started the other three"


def test_world_size_without_rank_warns_that_the_process_runs_alone(monkeypatch, caplog):
    _warn_incomplete.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() is None
    assert not caplog.messages
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "a1")
    assert place() is place() is None
    assert caplog.messages == ["WORLD_SIZE is 4 without RANK, MASTER_PORT: this process runs alone"]


@pytest.mark.parametrize(
    "said",
    [{"RANK": "2"}, {"RANK": "-1"}, {"LOCAL_RANK": "-1"}, {"LOCAL_WORLD_SIZE": "0"}, {"WORLD_SIZE": "0"}],
)
def test_inconsistent_ranks_are_refused_before_waiting(monkeypatch, said):
    fit = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a1", "MASTER_PORT": "29500"}
    for name, value in (fit | said).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=r"inconsistent: rank -?\d of \d, local rank -?\d of \d"):
        place()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[7,9]", "n7"),
        ("gpu[003-006,9],login", "gpu003"),
        ("x-1,y", "x-1"),
        ("gpu[1-2]-ib", "gpu1-ib"),
        ("rack[0-1]n[3,7],a", "rack0n3"),
    ],
)
def test_the_first_host_of_a_slurm_node_list_is_found(nodes, first):
    assert first_host(nodes) == first


def test_a_launch_returns_the_exit_code_of_the_original_failure():
    # R9
    assert _exit_code([(0, 0), (1, 0)], 2) == 0
    assert _exit_code([(1, 3), (0, 9)], 2) == 3
    assert _exit_code([(0, 9), (1, 3)], 2) == 3
    assert _exit_code([(0, 143), (1, 143)], 2) == 143
    assert _exit_code([(1, -9), (0, 9)], 2) == 9
    with pytest.raises(DistributedError, match="process 1 was ended by SIGKILL"):
        _exit_code([(1, -9), (0, -15)], 2)
    assert _exit_code([(1, -15), (0, -15)], 2, [15]) == 143  # before they had installed their handlers
    assert _exit_code([(1, -15), (0, 9)], 2, [15]) == 143
    assert _exit_code([(1, -2), (0, -2)], 2, [2]) == 130
    assert _exit_code([(0, 75), (1, 75)], 2, [15]) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_launch_terminated_while_starting_exits_with_143():
    # R18
    code = "import sys; from cbam.train.launch import launch; sys.exit(launch(['train', 'digits'], 2))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as launched:
        try:
            deadline = time.monotonic() + 60
            while len(_children(launched.pid)) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            launched.send_signal(signal.SIGTERM)
            assert launched.wait(60) == 143
        finally:
            launched.kill()


def test_a_process_ends_with_its_launcher_even_if_that_is_process_1(monkeypatch):
    # R6
    started, ended, parent = [], [], [1]
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: started.append(env))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    _start([], Place(0, 2, 0, 2, "file:store"))
    for name, value in started[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    monkeypatch.setattr(os, "kill", lambda _, number: ended.append(number))
    die_with_parent()
    assert ended == []
    parent[0] = 7  # the process that adopts orphans
    die_with_parent()
    assert ended == [signal.SIGTERM]


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_more_devices_than_started_processes_are_refused():
    with pytest.raises(ConfigError, match="devices is 4, but 1 was started"):
        _device_counts({"devices": 4})
    assert _device_counts({}) == {"devices": 1, "nodes": 1}
    assert Config(**json.loads(json.dumps({"recipe": "digits", "devices": 4}))).devices == 4


def test_python_files_in_the_working_folder_are_not_imported(tmp_path):
    # R6
    for name in ("cbam.py", "random.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('mine was run')")
    code = "import sys; sys.path.append(sys.argv[1]); from cbam.train.launch import launch\n"
    code += "sys.exit(launch(['list'], 2))"
    home = str(Path(launch.__code__.co_filename).parents[2])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, home], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "mine was run" not in done.stderr
    assert "resnet_tiny" in done.stdout
