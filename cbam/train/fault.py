"""Named points where a test can kill the process, to prove that the run survives it."""

import os
import signal

_passed: dict[str, int] = {}


def fault(point: str) -> None:
    """Do nothing, unless CBAM_FAULT is `point:count`: then the process kills itself at that pass.

    It is for tests, not a setting. Counts start at 1. Like a power cut, SIGKILL leaves no time for cleanup.
    """
    wanted = os.environ.get("CBAM_FAULT")
    if not wanted or wanted.rpartition(":")[0] != point:
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] == int(wanted.rpartition(":")[2]):
        os.kill(os.getpid(), signal.SIGKILL)
