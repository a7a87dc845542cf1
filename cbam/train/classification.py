"""What Lightning trains: a classifier that takes uint8 pictures and normalises them on the device.

Shapes: N pictures, K classes. A batch is a dict: "image" uint8 (N, 3, H, W), "target" (N,), "index" (N,).
"""

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.data import ALONE, Shard
from cbam.errors import InputError
from cbam.surgery import attached
from cbam.train.average import Average
from cbam.train.distributed import world
from cbam.train.fault import fault
from cbam.train.guard import Before, Pending
from cbam.train.mixing import Mix, mix
from cbam.train.recipe import Recipe

CLOCK = ("seconds", "step_seconds", "wait_seconds", "images_per_second")  # of an epoch, no part of the run
SKIPS = 10  # steps in a row that may be skipped

_log = logging.getLogger("cbam")


class NonFiniteLossError(FloatingPointError):
    """The loss is not finite; `pictures` are those of the step, of all processes."""

    def __init__(self, message: str, pictures: list[int]) -> None:
        super().__init__(message)
        self.pictures = pictures


class Classification(pl.LightningModule):
    """Cross-entropy training of `model` by `recipe`; per epoch one dict is added to `history`.

    Top-1 and top-5 errors are exact: they come from counts over the whole epoch, of all processes.

    Args:
        steps_per_epoch: optimizer steps.
        first_epoch: the number of the first epoch.
        samples: of the training set.
        seed: of what is drawn for mixing.
        shard: this process's part of a step.
        on_step: is told the work of every batch; on_epoch, the metrics of every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
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
        self.model = model
        self.recipe = recipe or Recipe()
        self.steps_per_epoch, self.first_epoch = steps_per_epoch, first_epoch
        self.on_step, self.on_epoch = on_step, on_epoch
        self.mean, self.std = tuple(mean), tuple(std)
        self.average = Average(model, self.recipe.ema) if self.recipe.ema else None
        self.wishes: Callable[[], Sequence[float]] = tuple  # what this process wants all to know of a step
        self.wished: list[float] = []  # and what all of them did, summed
        self.history: list[dict] = []
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._samples, self._seed, self._shard = samples, seed, shard
        self._compiled = torch.compile(model) if self.recipe.compile else None
        self._before = Before(model)
        self._seen: dict = {}
        self._validated: dict = {}
        self._skip, self._skipped = False, 0
        self._step_sums = [0.0, 0.0, 0.0]
        self._indices = torch.empty(0)
        self._gathered: tuple = ()

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> logits (N, K)."""
        return self.model(normalise(image, self.mean, self.std))

    def configure_optimizers(self):
        recipe = self.recipe
        optimizer = make_optimizer(recipe, parameter_groups(recipe, self.model))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: recipe.lr_factor(step, self.steps_per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- an epoch of training ---

    def on_train_epoch_start(self) -> None:
        # Lightning has just set the sampler to an epoch counted from 0.
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
        self._asked = (self._began, 0.0, 0.0)

    @property
    def epoch(self) -> int:
        """The number of the epoch, those of earlier trainings counted."""
        return self.first_epoch + self.current_epoch

    def seen(self) -> dict:
        """What of the running epoch is done, as plain values: see `take_up`."""
        return {
            "step": self.offset + len(self._steps),
            "lr": self._lr,
            "sums": self._sums.tolist(),
        }

    def take_up(self, epoch: int, seen: dict, history: list[dict]) -> None:
        """Go on in `epoch`, of which `seen` is done."""
        self.first_epoch, self._seen, self.history = epoch, seen, list(history)
        self._begin(seen)

    # --- a step of training, in `accumulate` batches ---

    def place(self, batch_idx: int) -> tuple[int, int]:
        """The step of the epoch that a batch belongs to, and its number in that step."""
        step, part = divmod(batch_idx, self._shard.accumulate)
        return self.offset + step, part

    @property
    def step_loss(self) -> float:
        """The mean loss of the step that was taken last."""
        return self._step_sums[0] / max(1, self._step_sums[2])

    def rates(self) -> dict[str, float]:
        """Pictures per second, of all processes, and the share of it waited for them, since last asked."""
        now = time.perf_counter()
        began, images, waited = self._asked
        self._asked = (now, self._images, self._waited)
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
            self._step_began, self._step_sums = now, [0.0, 0.0, 0.0]
            self._before.remember()

    def training_step(self, batch, batch_idx: int) -> Tensor:
        step, part = self.place(batch_idx)
        pixels = normalise(batch["image"], self.mean, self.std)
        mixed = mix(pixels, self.recipe, (self._seed, self.epoch, step, part, world().rank))
        logits = (self._compiled or self.model)(mixed.image)
        target = batch["target"]
        samples = min(self.recipe.batch_size, self._samples - step * self.recipe.batch_size)
        count = self._shard.share(samples, part) if self._shard.parts > 1 else len(logits)
        loss = self._loss(logits, target, mixed, count, samples)
        wrong = (logits[:count].argmax(1) != target[:count]).sum()
        self._pending, self._indices = (Pending(loss, wrong), count, samples), batch["index"]
        fault("fwd")
        return loss

    def _loss(self, logits: Tensor, target: Tensor, mixed: Mix, count: int, samples: int) -> Tensor:
        """The mean over the batch; of a part, what makes the mean over all parts that over the step."""
        whole, smooth = self._shard.parts == 1, self.recipe.label_smoothing

        def entropy(target: Tensor) -> Tensor:
            kind = "mean" if whole else "none"
            return F.cross_entropy(logits, target, label_smoothing=smooth, reduction=kind)

        loss = entropy(target)
        if mixed.share < 1:
            loss = mixed.share * loss + (1 - mixed.share) * entropy(target.flip(0))
        return loss if whole else loss[:count].sum() * (self._shard.parts / samples)

    def on_after_backward(self) -> None:
        """Take in the loss, and see with all processes whether there may be a step."""
        pending, count, samples = self._pending
        value, wrong = pending.numbers()
        total = value * (count if self._shard.parts == 1 else samples / self._shard.parts)
        bad = value != value or value in (float("inf"), float("-inf"))
        agreed = world().sum(0.0 if bad else total, wrong, count, bad, *self.wishes())
        self.wished = agreed[4:]
        self._step_sums = [a + b for a, b in zip(self._step_sums, agreed[:3], strict=True)]
        if agreed[3]:
            self._refuse(value, bad)
        else:
            self._sums += torch.tensor(agreed[:3], dtype=torch.float64)
        self._images += agreed[2]
        if world().size > 1:
            self._name_unused()

    def _refuse(self, value: float, bad: bool) -> None:
        batch_idx = self.trainer.fit_loop.epoch_loop.batch_idx
        step, _ = self.place(batch_idx)
        mine = self._indices.tolist() if bad else []
        pictures = [index for part in world().all(mine) for index in part]
        told = ", ".join(map(str, pictures[:8])) + (", ..." if len(pictures) > 8 else "")
        what = f"the loss is {value if bad else 'not finite'} in epoch {self.epoch}, step {step}"
        self._skipped += not self._skip
        if self.recipe.nonfinite == "stop" or self._skipped > SKIPS:
            self._before.restore()
            often = f"; the {self._skipped - 1} steps before were skipped" if self._skipped > 1 else ""
            raise NonFiniteLossError(
                f"{what}, of the training pictures {told}; no step was taken{often}", pictures
            )
        self._skip = True
        if world().is_first:
            _log.warning("%s, of the training pictures %s; the step is skipped", what, told)

    def _name_unused(self) -> None:
        unused = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise InputError(
                f"{len(unused)} parameters of the network had no part in the loss ({', '.join(unused[:5])}); "
                "several processes can train only what all of them use"
            )

    def on_before_optimizer_step(self, optimizer) -> None:
        if self._skip:  # without a gradient the optimizer leaves a parameter and its momentum alone
            self._before.restore()
            optimizer.zero_grad(set_to_none=True)
        else:
            self._skipped = 0

    def optimizer_step(self, *arguments, **named) -> None:
        super().optimizer_step(*arguments, **named)
        if self.average is not None and not self._skip:
            self.average.update()
        self._skip = False

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        self._ended = time.perf_counter()
        if self.ends_step(batch_idx):
            self._steps.append(self._ended - self._step_began)
        self._tell(3 * len(batch["target"]))

    def on_train_epoch_end(self) -> None:
        # Lightning validates before this hook: the epoch's seconds were taken when validation began.
        self.finish_epoch(self.epoch)
        self._set_sampler(self.epoch + 1)  # Lightning asks for its length before it sets the epoch

    def finish_epoch(self, epoch: int) -> None:
        """Add the epoch to `history`, once it has been trained and validated."""
        loss, wrong, count = self._sums.tolist()
        entry = {
            "epoch": epoch,
            "lr": self._lr,
            "train_loss": loss / max(1, count),
            "train_top1": 100 * wrong / max(1, count),
            **self._validated,
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
        world().spread(list(self.model.buffers()))
        if self.average is not None:
            world().spread(list(self.average.tensors.values()))
            self.average.swap()
        self.outputs, self._gathered = [], ()

    def validation_step(self, batch, batch_idx: int) -> None:
        logits = self(batch["image"]).float().cpu()
        self.outputs.append((logits, batch["target"].cpu(), batch["index"].cpu()))
        self._tell(len(logits))

    def on_validation_epoch_end(self) -> None:
        if self.average is not None:
            self.average.swap()
        logits, targets, _ = self.collected()
        loss, top1, top5 = scores(logits, targets)
        self._validated = {"val_loss": loss, "val_top1": top1, "val_top5": top5}

    def collected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), targets (N,) and indices (N,) of the last validation, of all processes, by index."""
        if not self._gathered:
            parts = (torch.cat(part) for part in zip(*self.outputs, strict=True))
            logits, targets, indices = (world().joined(part) for part in parts)
            order = indices.argsort()
            self._gathered = (logits[order], targets[order], indices[order])
        return self._gathered

    def _tell(self, images: int) -> None:
        if self.on_step is not None:
            self.on_step(images)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, 3, H, W) -> float of zero mean and unit variance, in channels_last: faster in convolutions.

    `mean` and `std` are the data set's, of values / 255.
    """
    kind = torch.get_default_dtype()  # float64 in a training of that precision
    scale = image.new_tensor([255 * s for s in std], dtype=kind).view(3, 1, 1)
    shift = image.new_tensor([255 * m for m in mean], dtype=kind).view(3, 1, 1)
    return ((image.to(kind) - shift) / scale).contiguous(memory_format=torch.channels_last)


def parameter_groups(recipe: Recipe, model: nn.Module) -> list[dict]:
    """The parameters that are trained, by learning rate and weight decay."""
    gates = {id(p) for part in attached(model).values() for p in part.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            apart = recipe.attention_lr != 1 and id(parameter) in gates
            bare = recipe.decay_matrices_only and parameter.ndim < 2
            groups.setdefault((apart, bare), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.lr * (recipe.attention_lr if apart else 1),
            "weight_decay": 0.0 if bare else recipe.weight_decay,
        }
        for (apart, bare), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def make_optimizer(recipe: Recipe, parameters) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameters`."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def scores(logits: Tensor, targets: Tensor) -> tuple[float, float, float | None]:
    """Mean cross-entropy, top-1 error and top-5 error in %; top-5 is None with five classes or fewer."""
    loss = F.cross_entropy(logits.double(), targets).item()
    top1 = 100 * (logits.argmax(1) != targets).double().mean().item()
    if logits.shape[1] <= 5:
        return loss, top1, None
    best = logits.topk(5, dim=1).indices
    top5 = 100 * (best != targets[:, None]).all(1).double().mean().item()
    return loss, top1, top5
