"""Run the cells of tests/triton/ on this device in several processes: first step of benchmarks/gpu.py."""

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
# Warnings of other libraries on the GPU machine are not errors here.
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default")


def agree(seconds: float, dry: bool) -> bool:
    """Whether every cell passes within `seconds`; a dry run takes only a few of them.

    Prints progress every ten seconds, then the end of each process's output: for one that did not finish, the
    name of its current cell.
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
            output = log.read_text().strip()
            last = output.rpartition("\n")[2]
            print({0: last, None: f"did not finish: {last}"}.get(code, output[-4000:]), flush=True)
    return bool(cells) and all(code == 0 for code in codes)


def listed(chosen: list[str], seconds: float) -> list[str]:
    """The names of the cells; if pytest cannot collect them, print why and return none."""
    with started([*PYTEST, "-q", "--collect-only", str(CELLS), *chosen], subprocess.PIPE) as process:
        output = process.communicate(timeout=seconds)[0]
    if process.returncode:
        print(output[-4000:], flush=True)
        return []
    return [line for line in output.splitlines() if f"{CELLS.name}::" in line]


def progress(logs: list[Path]) -> str:
    """The number of cells done, and of failures among them."""
    ended = [line for log in logs for line in log.read_text().splitlines() if line.endswith("%]")]
    return f"{len(ended)} ({sum(' FAILED ' in line or ' ERROR ' in line for line in ended)} failed)"


@contextmanager
def started(command: list[str], stdout: Any, **options: Any) -> Iterator[subprocess.Popen]:
    """Start a process, and kill its whole group at the end, so that nothing stays on the GPU."""
    options |= {"stdout": stdout, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
