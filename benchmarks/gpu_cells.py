"""The cells of tests/triton/ on this device, shared by several processes: first step of benchmarks/gpu.py."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "tests" / "triton" / "cells.py"
# What a library of that machine warns of, in its import or later, says nothing of the kernels.
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default")


def agree(seconds: float, dry: bool) -> bool:
    """Whether every cell passes within `seconds`; a few of them in a dry run.

    Progress is said every ten seconds, then the end of what each process said: of one that did not end, the
    name of the cell it was at.
    """
    end = time.monotonic() + seconds
    cells = listed(["-k", "gains or identity"] if dry else ["-m", "not large"], seconds)
    # Compiling takes most of the time. The references in float64 are computed on the CPU.
    shares = min(len(cells), 1 if dry else max(1, (os.cpu_count() or 2) // 2))
    threads = os.environ | {"OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = [Path(folder) / str(i) for i in range(shares)]
        running = [
            stack.enter_context(
                started([*PYTEST, "-v", *cells[i::shares]], stack.enter_context(log.open("w")), env=threads)
            )
            for i, log in enumerate(logs)
        ]
        for second in itertools.count():
            codes = [process.poll() for process in running]
            if None not in codes or time.monotonic() > end:
                break
            if second % 10 == 0:
                print(f"cells: {progress(logs)} of {len(cells)}", flush=True)
            time.sleep(1)
        for code, log in zip(codes, logs, strict=True):
            told = log.read_text().strip()
            last = told.rpartition("\n")[2]
            print({0: last, None: f"did not end: {last}"}.get(code, told[-4000:]), flush=True)
    return bool(cells) and all(code == 0 for code in codes)


def listed(chosen: list[str], seconds: float) -> list[str]:
    """The names of the cells; none, and why, where pytest cannot collect them."""
    with started([*PYTEST, "-q", "--collect-only", str(CELLS), *chosen], subprocess.PIPE) as process:
        told = process.communicate(timeout=seconds)[0]
    if process.returncode:
        print(told[-4000:], flush=True)
        return []
    return [line for line in told.splitlines() if f"{CELLS.name}::" in line]


def progress(logs: list[Path]) -> str:
    """How many cells are done, and how many of these wrong."""
    ended = [line for log in logs for line in log.read_text().splitlines() if line.endswith("%]")]
    return f"{len(ended)} ({sum(' FAILED ' in line or ' ERROR ' in line for line in ended)} failed)"


@contextmanager
def started(command: list[str], stdout: Any, **options: Any) -> Iterator[subprocess.Popen]:
    """A process, which is ended with all that it started: nothing stays on the GPU."""
    options |= {"stdout": stdout, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
