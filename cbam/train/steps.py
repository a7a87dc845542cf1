"""The LightningModule: trains any task by any recipe, in one process or as one of several."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cbam.data import ALONE, Shard
from cbam.errors import InputError
from cbam.train.average import Average
from cbam.train.distributed import world
from cbam.train.fault import fault
from cbam.train.guard import Pending, Snapshot
from cbam.train.optimizer import make_optimizer, parameter_groups
from cbam.train.recipe import Recipe
from cbam.train.task import Part, Task

CLOCK = ("seconds", "step_seconds", "wait_seconds", "images_per_second")  # timings of an epoch
SKIPS = 10  # consecutive steps that may be skipped
LEAST_SCALE = 2.0**-10  # of the loss in fp16: gradients still not finite at a thousandth never will be

_log = logging.getLogger("cbam")


class NonFiniteLossError(FloatingPointError):
    """The loss is not finite; `pictures` are the images of the step, in the processes where it is not."""

    def __init__(self, message: str, pictures: list[int]) -> None:
        super().__init__(message)
        self.pictures = pictures


class Steps(pl.LightningModule):
    """Trains the network of `task` by `recipe`; adds one dict of metrics per epoch to `history`.

    Metrics are exact: computed over the whole epoch and all processes.

    Args:
        steps_per_epoch: optimizer steps.
        first_epoch: the number of the first epoch.
        samples: size of the training set.
        seed: for the random draws of mixing.
        shard: this process's part of a step.
        on_step: called with the work of every batch; on_epoch, with the metrics of every epoch.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe | None = None,
        *,
        steps_per_epoch: int = 1,
        first_epoch: int = 0,
        samples: int = 0,
        seed: int = 0,
        shard: Shard = ALONE,
        on_step: Callable[[int], None] | None = None,
        on_epoch: Callable[[dict], None] | None = None,
    ) -> None:
        super().__init__()
        self.task, self.model = task, task.model
        self.recipe = recipe or Recipe()
        self.steps_per_epoch, self.first_epoch = steps_per_epoch, first_epoch
        self.on_step, self.on_epoch = on_step, on_epoch
        self.average = Average(task.model, self.recipe.ema) if self.recipe.ema else None
        self.flags: Callable[[], Sequence[float]] = tuple  # this process's, summed over all in every step
        self.summed_flags: list[float] = []
        self.history: list[dict] = []
        self.outputs: list = []
        self.collected: Any = None  # of the last validation
        self._samples, self._seed, self._shard = samples, seed, shard
        self._compiled = torch.compile(task.model) if self.recipe.compile else None
        self._snapshot = Snapshot(task.model)
        self._seen: dict = {}
        self.validated: dict = {}
        self._skip, self._skipped, self._averaged = False, 0, False
        self._step_sums = [0.0, 0.0, 0.0]
        self._indices = torch.empty(0)

    def configure_optimizers(self):
        recipe = self.recipe
        optimizer = make_optimizer(recipe, parameter_groups(recipe, self.model))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: recipe.lr_factor(step, self.steps_per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- an epoch of training ---

    def on_train_epoch_start(self) -> None:
        # Lightning has just set the sampler to its own epoch number, which starts at 0.
        self._set_sampler(self.epoch)
        self._begin(self._seen or {"step": 0, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]})
        self._seen = {}

    def _set_sampler(self, epoch: int) -> None:
        self.trainer.train_dataloader.sampler.set_epoch(epoch)  # type: ignore[union-attr]

    def _begin(self, seen: dict) -> None:
        self.offset, self._lr = seen["step"], seen["lr"]
        self._sums = torch.tensor(seen.get("sums", [0.0, 0, 0]), dtype=torch.float64)
        self._began, self._seconds, self._steps = time.perf_counter(), float("nan"), []
        self._waited, self._ended, self._images = 0.0, self._began, 0.0
        self._last_rates = (self._began, 0.0, 0.0)

    @property
    def epoch(self) -> int:
        """The number of the current epoch, counting earlier trainings."""
        return self.first_epoch + self.current_epoch

    def seen(self) -> dict:
        """The progress of the current epoch, as plain values for `restore`."""
        return {
            "step": self.offset + len(self._steps),
            "lr": self._lr,
            "sums": self._sums.tolist(),
        }

    def restore(self, epoch: int, seen: dict, history: list[dict]) -> None:
        """Resume in `epoch`, after the progress in `seen`."""
        self.first_epoch, self._seen, self.history = epoch, seen, list(history)
        self._begin(seen)

    # --- a step of training, in `accumulate` batches ---

    def place(self, batch_idx: int) -> tuple[int, int]:
        """The step of the epoch that a batch belongs to, and its number within that step."""
        step, part = divmod(batch_idx, self._shard.accumulate)
        return self.offset + step, part

    @property
    def step_loss(self) -> float | None:
        """The mean loss of the last step; None if it was skipped."""
        return None if self._skip else self._step_sums[0] / max(1, self._step_sums[2])

    def rates(self) -> dict[str, float]:
        """Images per second over all processes, and the share of time spent waiting, since the last call."""
        now = time.perf_counter()
        began, images, waited = self._last_rates
        self._last_rates = (now, self._images, self._waited)
        seconds = max(1e-9, now - began)
        return {
            "images_per_second": (self._images - images) / seconds,
            "wait_share": (self._waited - waited) / seconds,
        }

    def ends_step(self, batch_idx: int) -> bool:
        """Whether the optimizer steps after this batch."""
        return (batch_idx + 1) % self._shard.accumulate == 0

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        now = time.perf_counter()
        self._waited += now - self._ended
        if self.place(batch_idx)[1] == 0:
            self._step_began, self._step_sums, self._skip = now, [0.0, 0.0, 0.0], False
            self._snapshot.take()

    def training_step(self, batch, batch_idx: int) -> Tensor:
        step, number = self.place(batch_idx)
        samples = min(self.recipe.batch_size, self._samples - step * self.recipe.batch_size)
        parts = self._shard.parts
        count = self._shard.share(samples, number) if parts > 1 else len(batch["index"])
        key = (self._seed, self.epoch, step, number, world().rank)
        part = Part(count, count if parts == 1 else samples, parts, key)
        model = self.model if self._compiled is None else self._compiled  # it has no truth value, so no `or`
        loss, tally = self.task.loss(model, batch, part)
        self._pending, self._indices = (Pending(loss, tally), count, samples), batch["index"]
        fault("fwd")
        return loss

    def on_after_backward(self) -> None:
        """Collect the loss, and agree among all processes whether to take the step."""
        pending, count, samples = self._pending
        value, tally = pending.numbers()
        total = value * (count if self._shard.parts == 1 else samples / self._shard.parts)
        bad = value != value or value in (float("inf"), float("-inf"))
        agreed = world().sum(0.0 if bad else total, tally, count, bad, *self.flags())
        self.summed_flags = agreed[4:]
        self._step_sums = [a + b for a, b in zip(self._step_sums, agreed[:3], strict=True)]
        if agreed[3]:
            self._reject_step(value, bad)
        self._images += agreed[2]
        if world().size > 1:
            self._check_unused()

    def _reject_step(self, value: float, bad: bool) -> None:
        batch_idx = self.trainer.fit_loop.epoch_loop.batch_idx
        step, _ = self.place(batch_idx)
        mine = self._indices.tolist() if bad else []
        pictures = [index for part in world().all(mine) for index in part]
        indices = ", ".join(map(str, pictures[:8])) + (", ..." if len(pictures) > 8 else "")
        what = f"the loss is {value if bad else 'not finite'} in epoch {self.epoch}, step {step}"
        self._skipped += not self._skip
        if self.recipe.nonfinite == "stop" or self._skipped > SKIPS:
            self._snapshot.restore()
            skipped = f"; the {self._skipped - 1} steps before were skipped" if self._skipped > 1 else ""
            raise NonFiniteLossError(
                f"{what}, on the training images {indices}; no step was taken{skipped}", pictures
            )
        self._skip = True
        if world().is_first:
            _log.warning("%s, on the training images %s; the step is skipped", what, indices)

    def _check_unused(self) -> None:
        unused = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise InputError(
                f"{len(unused)} parameters of the network were not used in the loss "
                f"({', '.join(unused[:5])}); training in several processes requires all of them"
            )

    def on_before_optimizer_step(self, optimizer) -> None:
        self._check_scale()
        if self._skip:  # without gradients the optimizer changes neither parameters nor momentum
            self._snapshot.restore()
            optimizer.zero_grad(set_to_none=True)
        else:
            self._skipped = 0

    def _check_scale(self) -> None:
        """Stop when fp16 skips step after step, halving the loss scale each time, and trains nothing.

        This adds no GPU synchronisation: the scaler waits for the same gradients next.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and (scale := scaler.get_scale()) < LEAST_SCALE:
            raise FloatingPointError(
                f"the fp16 loss scale fell to {scale:g} before epoch {self.epoch}, step "
                f"{len(self._steps) + self.offset}: steps were skipped because their gradients were not "
                "finite at any scale; use --precision bf16 or fp32"
            )

    def optimizer_step(self, *arguments, **named) -> None:
        super().optimizer_step(*arguments, **named)
        if self._skip:
            return
        self._sums += torch.tensor(self._step_sums, dtype=torch.float64)
        if self.average is not None:
            self.average.update()

    def undo_parts(self) -> None:
        """Undo what the parts of an unfinished step changed; a step counts only once it is complete."""
        self._snapshot.restore()

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        self._ended = time.perf_counter()
        if self.ends_step(batch_idx):
            self._steps.append(self._ended - self._step_began)
        self._report_work(3 * len(batch["index"]))

    def on_train_epoch_end(self) -> None:
        # Lightning validates before this hook, so the epoch's time was taken when validation began.
        self.finish_epoch(self.epoch)
        self._set_sampler(self.epoch + 1)  # Lightning asks for its length before it sets the epoch

    def finish_epoch(self, epoch: int) -> None:
        """Add the epoch to `history` after its training and validation."""
        loss, tally, count = self._sums.tolist()
        trained = {"train_loss": loss / max(1, count), **self.task.trained(tally / max(1, count))}
        entry = {
            "epoch": epoch,
            "lr": self._lr,
            **(trained if count else dict.fromkeys(trained)),  # None if every step was skipped
            **self.validated,
            "seconds": self._seconds,
            "step_seconds": statistics.median(self._steps or [float("nan")]),
            "wait_seconds": self._waited,
            "images_per_second": self._images / self._seconds,
        }
        self.history.append(entry)
        if self.on_epoch is not None:
            self.on_epoch(entry)

    # --- validation ---

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self._seconds = time.perf_counter() - self._began
        world().broadcast(list(self.model.buffers()))
        if self.average is not None:
            world().broadcast(list(self.average.tensors.values()))
            self.average.swap()
            self._averaged = True
        self.outputs, self.collected = [], None

    def validation_step(self, batch, batch_idx: int) -> None:
        self.outputs.append(self.task.output(batch))
        self._report_work(len(batch["index"]))

    def on_validation_epoch_end(self) -> None:
        self.end_validation()
        self.collected = self.task.collected(self.outputs)
        self.outputs, self.validated = [], self.task.scores(self.collected)

    def end_validation(self) -> None:
        """Swap the weights back in for their average; also after an error in a validation."""
        if self._averaged and self.average is not None:
            self.average.swap()
        self._averaged = False

    def _report_work(self, images: int) -> None:
        if self.on_step is not None:
            self.on_step(images * world().size)  # the other processes do as much
