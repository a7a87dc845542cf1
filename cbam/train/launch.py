"""The rank of a process among those that train one network, and a launcher for one machine.

Imports no torch: `cbam train --devices N` only waits for its processes.
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cbam.errors import DistributedError

GRACE = 10.0  # seconds for the others to end after one process has failed
_OURS, _LAUNCHER = "_CBAM_PLACE", "_CBAM_LAUNCHER"  # set by `launch` for the processes it starts
# Runs this copy of the package, whatever the working directory contains.
_RUN = """import sys; sys.path.insert(0, sys.argv.pop(1)); import cbam; sys.path.append(sys.path.pop(0))
from cbam.__main__ import main; sys.exit(main())"""
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOME = str(Path(__file__).parents[2])

_log = logging.getLogger("cbam")


@dataclass(frozen=True)
class Place:
    """Process `rank` of `size`, the `local_rank`-th of `local_size` on its machine.

    `store` is where they meet: "file:PATH", "tcp:HOST:PORT", or "agent:HOST:PORT" where torchrun serves it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: str


def place() -> Place | None:
    """This process's place, as set by `launch`, torchrun or SLURM's srun; None for a single process.

    Raises:
        DistributedError: their environment variables are invalid.
    """
    env = os.environ
    try:
        if _OURS in env:
            return Place(**json.loads(env[_OURS]))
        here = None
        if "TORCHELASTIC_RUN_ID" in env or env.keys() >= set(_TORCHRUN):
            served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            here = Place(
                int(env["RANK"]), int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1)),
                f"{'agent' if served else 'tcp'}:{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
            )  # fmt: skip
        elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # not in a batch script, which runs without srun
            here = _slurm()
        elif env.get("WORLD_SIZE", "1") not in ("", "0", "1"):
            _warn_incomplete(env["WORLD_SIZE"], tuple(name for name in _TORCHRUN if name not in env))
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise DistributedError(f"the launcher's environment cannot be read: {error!r}") from error
    if here and not (
        0 <= here.rank < here.size and here.local_rank >= 0 and 0 < here.local_size <= here.size
    ):
        raise DistributedError(
            f"the launcher's environment is inconsistent: rank {here.rank} of {here.size}, local rank "
            f"{here.local_rank} of {here.local_size}; ranks count from 0"
        )
    return here


@functools.cache
def _warn_incomplete(size: str, absent: tuple[str, ...]) -> None:
    """Warn once that the environment does not say which of several processes this is."""
    _log.warning("WORLD_SIZE is %s without %s: this process runs alone", size, ", ".join(absent))


def _slurm() -> Place:
    env = os.environ
    size = int(env["SLURM_STEP_NUM_TASKS"])
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
    host = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1")))
    port = 15000 + int(env["SLURM_JOB_ID"]) % 20000
    return Place(
        int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), size // nodes, f"tcp:{host}:{port}"
    )


def first_host(nodes: str) -> str:
    """The first host in a SLURM node list: "gpu[003-006,9],login" -> "gpu003"."""
    first = re.match(r"(\[[^]]*\]|[^,[])*", nodes)
    assert first is not None  # it may be empty
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `cbam ARGUMENTS` in that many processes on this machine; return the exit code of the first failure.

    Signals are forwarded. After a process has failed, the others have GRACE seconds to end; no process
    outlives this one.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"file:{Path(folder) / 'store'}"
        ranks = [_start(arguments, Place(r, processes, r, processes, store)) for r in range(processes)]
        try:
            with _forwarding_signals(ranks) as received:
                ended = _wait(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return _exit_code(ended, processes, received)


def _start(arguments: Sequence[str], where: Place) -> subprocess.Popen:
    environment = {**os.environ, _OURS: json.dumps(asdict(where)), _LAUNCHER: str(os.getpid())}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _RUN, _HOME, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if where.rank == 0 else subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches them only once, from here
    )


@contextlib.contextmanager
def _forwarding_signals(ranks: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Forward signals to the processes; the list collects them as they arrive."""
    received: list[int] = []

    def forward(number: int, frame) -> None:
        received.append(number)
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen]) -> list[tuple[int, int]]:
    """(rank, exit code) in the order in which they ended; those still running after GRACE are left out."""
    ended: list[tuple[int, int]] = []
    deadline = float("inf")
    while len(ended) < len(ranks) and time.monotonic() < deadline:
        known = {rank for rank, _ in ended}
        new = [(r, process.poll()) for r, process in enumerate(ranks) if r not in known]
        ended += [(r, code) for r, code in new if code is not None]
        if deadline == float("inf") and any(ended_with for _, ended_with in ended):
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)
    return ended


def _exit_code(ended: Sequence[tuple[int, int]], processes: int, received: Sequence[int] = ()) -> int:
    """The exit code of the first process that failed by itself, not through another's end or a kill.

    Processes that got one of the `received` signals before they had a handler for it have no code of their
    own.
    """
    failed = [(rank, code) for rank, code in ended if code]
    own = [code for _, code in failed if code > 0 and code != DistributedError.exit_code]
    if own or not failed:
        return own[0] if own else 0
    if received:
        return 128 + received[0]
    if all(code < 0 for _, code in failed) and len(failed) == processes:  # no process could report it
        rank, code = failed[0]
        raise DistributedError(f"process {rank} was ended by {signal.Signals(-code).name}")
    return DistributedError.exit_code


def die_with_parent() -> None:
    """Have SIGTERM sent to this process when the one that launched it ends (Linux)."""
    if _LAUNCHER not in os.environ or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(os.environ[_LAUNCHER]):  # it has already ended; in a container it may be process 1
        os.kill(os.getpid(), signal.SIGTERM)
