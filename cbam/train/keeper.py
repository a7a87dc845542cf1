"""A Lightning callback that saves a run for bit-exact resumption, and stops it at the end of a step."""

import contextlib
import errno
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cbam.data.images import draws
from cbam.errors import CheckpointError, DataError, OutputError, StoppedError
from cbam.train import checkpoint
from cbam.train.distributed import world
from cbam.train.fault import fault
from cbam.train.folder import NONFINITE, Metrics
from cbam.train.guard import rng, set_rng
from cbam.train.lock import check_lock
from cbam.train.loggers import Loggers
from cbam.train.steps import CLOCK, NonFiniteLossError, Steps
from cbam.train.task import summary

PATIENCE = 3  # consecutive failed saves that end a run
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_Stop = tuple[str, int]  # why a run stops, and its exit code
LIMIT: _Stop = ("the time limit", 75)
_STOPS: list[_Stop] = [*((number.name, 128 + number) for number in SIGNALS), LIMIT]

_log = logging.getLogger("cbam")


def _line(entry: dict[str, Any], step: int) -> dict[str, Any]:
    """An epoch's line in metrics.jsonl: without timings, which differ from run to run."""
    return {**{name: value for name, value in entry.items() if name not in CLOCK}, "step": step}


class Keeper(pl.Callback):
    """Saves a checkpoint every `save_every` steps and at the end of every epoch, before its validation.

    The first SIGTERM or SIGINT finishes the step, saves and raises `StoppedError` (exit code 143 or 130), as
    `max_time` does (75); a second signal stops at once. A failed save keeps the older checkpoints and is
    retried at the next one; the third failure in a row raises OutputError.

    Args:
        folder: of the run, locked.
        about: plain values stored in every checkpoint as they are.
        state: what `checkpoint.load` returned, to resume from; None starts a new run.
        save_every, log_every: in steps; None saves only at the end of each epoch.
        copies: how many checkpoints to keep.
        max_time: seconds from `began`; the run stops earlier, by a margin for saving.
        began: a time of `time.monotonic`; None is now.
        say: called with each line for the user.
        overrides: take learning rate, schedule, weight decay and momentum from the recipe instead of `state`.
        loggers: get every line of metrics, including timings.
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
        began: float | None = None,
        say: Callable[[str], None] = _log.info,
        overrides: bool = False,
        loggers: Loggers | None = None,
    ) -> None:
        self.folder, self.about, self.state = folder, about, state
        self.save_every, self.log_every, self.copies = save_every, log_every, copies
        self.metrics = Metrics(folder, say)
        self._say, self.overrides, self._loggers = say, overrides, loggers
        self._began, self._max_time = time.monotonic() if began is None else began, max_time
        self._save_seconds, self._failures, self._step, self._lr = 0.0, 0, 0, 0.0
        self._stop: _Stop | None = None
        self._saved: Path | None = None
        self._unsaved: dict[str, Any] | None = None  # the state that the last save failed to write
        self._here, self._between, self._began_at = world(), True, 0

    # --- resuming ---

    def restore(self, steps: Steps, batches: DataLoader, common: int = 0) -> bool:
        """Restore everything but the optimizer; return whether the epoch still has to be validated.

        `common` is the number of validation batches that every process has at least.
        """
        state, self._steps, self._common = self.state, steps, common
        self._began_at = state["step"] if state else 0
        steps.flags = self._flags
        if state is None:
            self._truncate_metrics(0, -1, [])
            return False
        epoch, seen = state["epoch"], state["seen"]
        if state["steps_per_epoch"] != steps.steps_per_epoch:
            raise CheckpointError(
                f"the checkpoint has {state['steps_per_epoch']} steps per epoch, "
                f"but this run has {steps.steps_per_epoch}"
            )
        self._step = state["step"]
        before = [
            _line(entry, (entry["epoch"] + 1 - steps.first_epoch) * steps.steps_per_epoch)
            for entry in state["history"]
        ]
        self._truncate_metrics(epoch, self._step, before)
        steps.model.load_state_dict(state["model"])
        if steps.average is not None:
            steps.average.load_state_dict(state["average"])
        steps.restore(epoch, seen, state["history"])
        sampler: Any = batches.batch_sampler
        sampler.sampler.resume(epoch, seen["step"] * sampler.size)
        self._restore_rng(state)
        unvalidated = seen["step"] == steps.steps_per_epoch
        if unvalidated:
            steps._seen = {}
        return unvalidated

    def _truncate_metrics(self, epoch: int, step: int, before: list[dict[str, Any]]) -> None:
        if self._here.is_first:
            self.metrics.truncate(epoch, step, before)

    def _restore_rng(self, state: dict[str, Any]) -> None:
        """Restore this process's random state. With a new number of processes, reseed ranks above 0."""
        states = [state["rng"], *state.get("more_rng", [])]
        if len(states) == self._here.size:
            set_rng(states[self._here.rank])
        elif self._here.rank > 0:
            torch.manual_seed(int(draws("rank", self._here.rank, self._step).integers(2**62)))
        else:
            set_rng(states[0])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers()
        if self.state is not None:
            optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
            fresh = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            bases = list(schedule.base_lrs)
            optimizer.load_state_dict(self.state["optimizer"])
            schedule.load_state_dict(self.state["schedule"])
            if self.overrides:
                self._override(optimizer, schedule, bases, fresh)
            trainer.precision_plugin.load_state_dict(self.state.get("scaler", {}))
            self.state = None

    def _override(self, optimizer, schedule, bases: list[Any], fresh: list[tuple[float, float]]) -> None:
        """Replace the restored settings with those of the resuming run."""
        schedule.base_lrs = bases
        momentum = self._steps.recipe.momentum
        for group, base, (_, decay), factor in zip(
            optimizer.param_groups, bases, fresh, schedule.lr_lambdas, strict=True
        ):
            group |= {"initial_lr": base, "lr": base * factor(schedule.last_epoch), "weight_decay": decay}
            if "momentum" in group:
                group["momentum"] = momentum

    # --- steps ---

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        fault("data")
        self._between = False

    def on_after_backward(self, trainer, pl_module) -> None:
        fault("bwd")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        fault("pre_step")
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx) -> None:
        steps = self._steps
        if not steps.ends_step(batch_idx):
            return
        fault("post_step")
        self._step += 1
        self._between = True
        done = steps.place(batch_idx)[0] + 1
        if self._here.is_first and self._step % self.log_every == 0:
            self._log_step(steps)
        self._check_time()
        stop = self._agreed(steps.summed_flags)
        due = self.save_every and self._step % self.save_every == 0
        if due or stop or done == steps.steps_per_epoch:
            self._save(trainer, done)
        if stop:
            self._raise(stop, f"after {done} of {steps.steps_per_epoch} steps of epoch {steps.epoch}")

    def _log_step(self, steps: Steps) -> None:
        entry = {"epoch": steps.epoch, "step": self._step, "loss": steps.step_loss, "lr": self._lr}
        self.metrics.add(entry)
        self._log(entry | steps.rates())

    def _log(self, entry: dict[str, Any]) -> None:
        if self._loggers is not None:
            self._loggers.add(entry, self._step)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._install_handlers()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_) -> None:
        fault("eval")
        self._check_time()
        if self._here.size > 1:  # some processes may have one batch fewer
            flags = self._here.sum(*self._flags()) if batch_idx < self._common else []
            stop = self._agreed(flags)
        else:
            stop = self._stop
        if stop:  # the epoch was saved before its validation
            self._raise(stop, f"in the validation of epoch {self._steps.epoch}")

    def on_train_end(self, trainer, pl_module) -> None:
        """Retry the final save if it failed: a run without its last weights is not finished."""
        if self._unsaved is not None and self._unsaved["step"] == self._step:
            check_lock(self.folder)
            self._write(self._unsaved, last=True)
        if self._here.is_first:
            self.metrics.end()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        """Save the progress so far: before a step with a non-finite loss, or when an image ends the run."""
        self._steps.end_validation()
        if isinstance(exception, NonFiniteLossError):
            if self._here.is_first:
                self._record_pictures(exception)
            self._save_last(trainer)
        elif isinstance(exception, DataError) and self._here.size == 1 and self._has_unsaved_steps():
            if not self._between:  # the image belongs to a later part of the step
                self._steps.undo_parts()
            self._save_last(trainer)

    def _has_unsaved_steps(self) -> bool:
        """Whether there are steps since the last checkpoint."""
        saved = checkpoint.step_of(self._saved) if self._saved else self._began_at
        return self._step > saved

    def _record_pictures(self, error: NonFiniteLossError) -> None:
        about = {"epoch": self._steps.epoch, "step": self._step, "loss": str(error)}
        about |= {"pictures": error.pictures}
        with contextlib.suppress(OSError):
            checkpoint.write(self.folder / NONFINITE, (json.dumps(about) + "\n").encode())

    def _save_last(self, trainer: pl.Trainer) -> None:
        try:
            self._save(trainer, self._steps.seen()["step"])
        except (FloatingPointError, OutputError) as error:
            self._say(f"nothing new was saved: {error}")

    def log_epoch(self, entry: dict[str, Any]) -> None:
        """Write and report the metrics of an epoch."""
        if not self._here.is_first:
            return
        self.metrics.add(_line(entry, self._step))
        self.metrics.sync()
        self._log(entry)
        clock = ""
        if (seconds := entry["seconds"]) == seconds:
            clock = f", {seconds:.1f} s, {entry['images_per_second']:.0f} images/s"
            clock += f", {100 * entry['wait_seconds'] / seconds:.0f} % of the time waiting for images"
        loss = "skipped" if entry["train_loss"] is None else f"loss {entry['train_loss']:.4f}"
        self._say(f"epoch {entry['epoch']}: {loss}, {summary(entry)}{clock}")

    # --- saving ---

    def _save(self, trainer: pl.Trainer, done: int) -> None:
        """Save in the first process. All processes call this, and none continues before it is done."""
        states = self._here.all(rng())
        self._here.from_first(lambda: self._save_all(trainer, done, states))

    def _save_all(self, trainer: pl.Trainer, done: int, states: list[dict[str, Any]]) -> None:
        state = self._state(trainer, done, states)
        if broken := [name for name, value in state["model"].items() if not value.isfinite().all()]:
            raise FloatingPointError(
                f"{len(broken)} tensors of the network contain NaN or infinity after step {self._step} "
                f"({broken[0]}); the last checkpoint was saved before that"
            )
        check_lock(self.folder)
        self.metrics.sync()
        self._write(state)

    def _write(self, state: dict[str, Any], *, last: bool = False) -> None:
        began = time.monotonic()
        try:
            self._saved = checkpoint.save(self.folder, self._step, state)
        except OSError as error:
            self._unsaved = state
            self._save_failed(error, last=last)
            return
        self._failures, self._unsaved = 0, None
        self._save_seconds = max(self._save_seconds, time.monotonic() - began)
        try:
            checkpoint.rotate(self._saved, self.copies)
        except (OSError, CheckpointError) as error:
            self._say(f"older checkpoints were not deleted: {error}")

    def _state(self, trainer: pl.Trainer, done: int, states: list[dict[str, Any]]) -> dict[str, Any]:
        steps = self._steps
        state = {
            **self.about,
            "model": steps.model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "rng": states[0],
            "epoch": steps.epoch,
            "step": self._step,
            "steps_per_epoch": steps.steps_per_epoch,
            "seen": {**steps.seen(), "step": done},
            "history": [*steps.history],  # a copy, as a failed save may be retried after the next validation
        }
        if len(states) > 1:
            state["more_rng"] = states[1:]
        if steps.average is not None:
            state["average"] = steps.average.state_dict()
        if scaler := trainer.precision_plugin.state_dict():
            state["scaler"] = scaler
        return state

    def _save_failed(self, error: OSError, *, last: bool) -> None:
        self._failures += 1
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        what = f"{self.folder}: the checkpoint after step {self._step}"
        line = f"{what} cannot be written ({reason}); the older ones stay"
        if last or self._stop or self._failures >= PATIENCE:
            raise OutputError(line) from error
        self._say(f"{line}, training continues")

    # --- stopping ---

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handle the stop signals inside the block, then restore the previous handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install_handlers()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _install_handlers(self) -> None:
        """Install our handlers. Called again once Lightning has started, as it installs its own."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        name, code = signal.Signals(number).name, 128 + number
        if self._stop not in (None, LIMIT):
            raise StoppedError(f"stopped at once by a second signal ({name}); the checkpoints stay", code)
        self._stop = (name, code)

    def _check_time(self) -> None:
        if self._max_time is None or self._stop:
            return
        margin = 2 * self._save_seconds + min(60, self._max_time / 10)
        if time.monotonic() - self._began > self._max_time - margin:
            self._stop = LIMIT

    def _flags(self) -> list[float]:
        """The stop requests of this process, to be summed over all processes."""
        return [float(self._stop == stop) for stop in _STOPS]

    def _agreed(self, flags: Sequence[float]) -> _Stop | None:
        """Why to stop after this step, agreed on by all processes; None to continue."""
        if self._here.size == 1:
            return self._stop
        return next((stop for stop, flag in zip(_STOPS, flags, strict=False) if flag), None)

    def _raise(self, stop: _Stop, where: str) -> None:
        name, code = stop
        saved = f"saved as {self._saved}" if self._saved else "nothing new to save"
        raise StoppedError(f"stopped by {name} {where}; {saved}; --resume auto continues", code)
