"""A Lightning callback that saves a run so that it can go on bit for bit, and stops it at a step's end."""

import contextlib
import errno
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cbam.errors import CheckpointError, OutputError, StoppedError
from cbam.train import checkpoint
from cbam.train.classification import Classification
from cbam.train.fault import fault
from cbam.train.folder import Metrics

PATIENCE = 3  # saves that may fail one after the other
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("cbam")


class Keeper(pl.Callback):
    """Saves every `save_every` steps and at the end of every epoch, before it is validated.

    A first SIGTERM or SIGINT ends the step, saves and raises `StoppedError` (exit code 143 or 130), as
    `max_time` does (75); a second one ends at once. A save that fails leaves the older checkpoints and is
    tried again at the next; the third failure in a row is an OutputError.

    Args:
        folder: of the run, locked.
        about: plain values that go into every checkpoint as they are.
        state: what `checkpoint.load` read, to go on from; None starts afresh.
        save_every, log_every: in steps; None saves at the ends of epochs alone.
        copies: how many checkpoints stay.
        max_time: seconds from now; the stop comes earlier by a margin for saving.
        say: is told, in a line, what the user should know.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        *,
        state: dict[str, Any] | None = None,
        save_every: int | None = None,
        log_every: int = 50,
        copies: int = 3,
        max_time: float | None = None,
        say: Callable[[str], None] = _log.info,
    ) -> None:
        self.folder, self.about, self.state = folder, about, state
        self.save_every, self.log_every, self.copies = save_every, log_every, copies
        self.metrics = Metrics(folder, say)
        self._say = say
        self._began, self._max_time = time.monotonic(), max_time
        self._save_seconds, self._failures, self._step, self._lr = 0.0, 0, 0, 0.0
        self._stop: tuple[str, int] | None = None
        self._saved: Path | None = None

    # --- going on ---

    def take_up(self, task: Classification, batches: DataLoader) -> bool:
        """Put all but the optimizer where the checkpoint has it; whether its epoch waits for validation."""
        state, self._task = self.state, task
        if state is None:
            self.metrics.cut(0, -1)
            return False
        epoch, seen = state["epoch"], state["seen"]
        if state["steps_per_epoch"] != task.steps_per_epoch:
            raise CheckpointError(
                f"the checkpoint counts {state['steps_per_epoch']} steps per epoch, "
                f"this run {task.steps_per_epoch}"
            )
        self._step = state["step"]
        self.metrics.cut(epoch, self._step)
        task.model.load_state_dict(state["model"])
        task.take_up(epoch, seen, state["history"])
        sampler: Any = batches.sampler
        sampler.resume(epoch, seen["step"] * (batches.batch_size or 1))
        _set_rng(state["rng"])
        waits = seen["step"] == task.steps_per_epoch
        if waits:
            task._seen = {}
        return waits

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()
        if self.state is not None:
            trainer.optimizers[0].load_state_dict(self.state["optimizer"])
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.state["schedule"])
            self.state = None

    # --- steps ---

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        fault("data")

    def on_after_backward(self, trainer, pl_module) -> None:
        fault("bwd")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        fault("pre_step")
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx) -> None:
        fault("post_step")
        self._step += 1
        task = self._task
        if self._step % self.log_every == 0:
            loss = outputs["loss"].item()
            self.metrics.add({"epoch": task.epoch, "step": self._step, "loss": loss, "lr": self._lr})
        self._check_time()
        done = task.offset + batch_idx + 1
        due = self.save_every and self._step % self.save_every == 0
        if due or self._stop or done == task.steps_per_epoch:
            self._save(trainer, done)
        if self._stop:
            self._raise(f"after {done} of {task.steps_per_epoch} steps of epoch {task.epoch}")

    def on_validation_start(self, trainer, pl_module) -> None:
        self._listen()

    def on_validation_batch_end(self, *_) -> None:
        fault("eval")
        self._check_time()
        if self._stop:  # the epoch was saved before its validation
            self._raise(f"in the validation of epoch {self._task.epoch}")

    def log_epoch(self, entry: dict[str, Any]) -> None:
        """Write the line of an epoch; what the clock says of it is no part of the run and stays out."""
        timeless = {name: value for name, value in entry.items() if not name.endswith("seconds")}
        self.metrics.add({**timeless, "step": self._step})
        self.metrics.sync()
        self._say(
            f"epoch {entry['epoch']}: loss {entry['train_loss']:.4f}, "
            f"validation loss {entry['val_loss']:.4f}, "
            f"top-1 error {entry['val_top1']:.2f} %"
            + (f", {seconds:.1f} s" if (seconds := entry["seconds"]) == seconds else "")
        )

    # --- saving ---

    def _save(self, trainer: pl.Trainer, done: int) -> None:
        state = self._state(trainer, done)
        if broken := [name for name, value in state["model"].items() if not value.isfinite().all()]:
            raise FloatingPointError(
                f"{len(broken)} tensors of the network hold NaN or infinity after step {self._step} "
                f"({broken[0]}); the last checkpoint is from before"
            )
        self.metrics.sync()
        began = time.monotonic()
        try:
            self._saved = checkpoint.save(self.folder, self._step, state)
        except OSError as error:
            self._failed(error)
            return
        self._failures = 0
        self._save_seconds = max(self._save_seconds, time.monotonic() - began)
        try:
            checkpoint.rotate(self.folder, self.copies)
        except OSError as error:
            self._say(f"older checkpoints stay: {error}")

    def _state(self, trainer: pl.Trainer, done: int) -> dict[str, Any]:
        task = self._task
        return {
            **self.about,
            "model": task.model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "rng": _rng(),
            "epoch": task.epoch,
            "step": self._step,
            "steps_per_epoch": task.steps_per_epoch,
            "seen": {**task.seen(), "step": done},
            "history": task.history,
        }

    def _failed(self, error: OSError) -> None:
        self._failures += 1
        room = "no room on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        what = f"{self.folder}: the checkpoint after step {self._step}"
        told = f"{what} cannot be written ({room}); the older stay"
        if self._stop or self._failures >= PATIENCE:
            raise OutputError(told) from error
        self._say(f"{told}, training goes on")

    # --- stopping ---

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals that ask to stop, and give them back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        """Lightning sets handlers of its own when it starts, so this is called again then."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame) -> None:
        name, code = signal.Signals(number).name, 128 + number
        if self._stop:
            raise StoppedError(f"stopped at once by a second signal ({name}); the checkpoints stay", code)
        self._stop = (name, code)

    def _check_time(self) -> None:
        if self._max_time is None or self._stop:
            return
        margin = 2 * self._save_seconds + min(60, self._max_time / 10)
        if time.monotonic() - self._began > self._max_time - margin:
            self._stop = ("the time limit", 75)

    def _raise(self, where: str) -> None:
        assert self._stop is not None
        name, code = self._stop
        saved = f"saved as {self._saved}" if self._saved else "the checkpoint it came from holds"
        raise StoppedError(f"stopped by {name} {where}; {saved}; --resume auto goes on", code)


def _rng() -> dict[str, Any]:
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": states}


def _set_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
