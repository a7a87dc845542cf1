"""Trains a tiny network in forked processes that kill themselves, and prints as JSON how each run ended.

Started by test_kills.py as a program of its own: torch is imported once, with one thread, and every trial
is a fork, which costs milliseconds. Each line of the standard input is a JSON list of faults
("point:count"); a run meets one after the other, is resumed after each, and finally runs to its end.
"""

import hashlib
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from cbam import CBAM
from cbam.data import cluttered_digits
from cbam.train import Recipe, checkpoint, fit
from cbam.train.folder import METRICS
from cbam.train.keeper import Keeper
from cbam.train.steps import CLOCK

RECIPE = Recipe(epochs=2, batch_size=8, lr=0.1, momentum=0.9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), CBAM(8), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def train(folder: Path, images) -> None:
    found = checkpoint.newest(folder, print)
    keeper = Keeper(
        folder, {}, state=found[1] if found else None, save_every=2, log_every=1, copies=2, say=lambda _: None
    )
    fit(network(), *images, RECIPE, seed=1, device="cpu", keeper=keeper)


def forked(folder: Path, images, fault: str) -> bool:
    """Train in a fork; return whether the fault killed it."""
    return forked_into(folder, images, fault, train)


def forked_into(folder: Path, images, fault: str, train) -> bool:
    """The same with a given function to train."""
    child = os.fork()
    if child == 0:
        try:
            os.environ["CBAM_FAULT"] = fault
            train(folder, images)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"{fault}: {status}"
    return status != 0


def digest(folder: Path) -> str:
    """Digest of all that a run leaves: weights, buffers, momentum, schedule, RNG, sums, history, metrics."""
    found = checkpoint.newest(folder, print)
    assert found is not None
    state = found[1]
    for entry in state["history"]:
        for name in CLOCK:
            del entry[name]
    sha = hashlib.sha256((folder / METRICS).read_bytes())
    _add(sha, state)
    return sha.hexdigest()


def _add(sha, value) -> None:
    if isinstance(value, torch.Tensor):
        sha.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for name in value:
            sha.update(str(name).encode())
            _add(sha, value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(sha, item)
    else:
        sha.update(repr(value).encode())


def answers() -> TextIO:
    """A stream for the results: the standard output, which gloo and others no longer write to."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_set, val = cluttered_digits()
    images, told = (train_set.subset(24), val.subset(20)), answers()
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            killed = sum(forked(Path(folder), images, fault) for fault in json.loads(line))
            assert not forked(Path(folder), images, "")
            left = sorted(path.name for path in Path(folder).iterdir())
            ended = {"killed": killed, "digest": digest(Path(folder)), "left": left}
            print(json.dumps(ended), file=told, flush=True)


if __name__ == "__main__":
    main()
