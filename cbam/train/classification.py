"""What Lightning trains: a classifier that takes uint8 pictures and normalises them on the device.

Shapes: N pictures, K classes. A batch is a dict: "image" uint8 (N, 3, H, W), "target" (N,), "index" (N,).
"""

import statistics
import time
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.train.fault import fault
from cbam.train.recipe import Recipe


class Classification(pl.LightningModule):
    """Cross-entropy training of `model` by `recipe`; per epoch one dict is added to `history`.

    Top-1 and top-5 errors are exact: they come from counts over the whole epoch.
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
        on_step: Callable[[int], None] | None = None,
        on_epoch: Callable[[dict], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.first_epoch = first_epoch
        self.on_step, self.on_epoch = on_step, on_epoch
        self._seen: dict = {}
        self._validated: dict = {}
        self.history: list[dict] = []
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> logits (N, K)."""
        return self.model(normalise(image, self.mean, self.std))

    def configure_optimizers(self):
        recipe = self.recipe
        assert recipe is not None
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(recipe, parameters)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: recipe.lr_factor(step, self.steps_per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        self._step_began = time.perf_counter()

    def training_step(self, batch, batch_idx: int) -> Tensor:
        logits = self(batch["image"])
        loss = F.cross_entropy(logits, batch["target"])
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            pictures = ", ".join(map(str, batch["index"][:8].tolist()))
            raise FloatingPointError(
                f"the loss is {value} in epoch {self.epoch}, step {self.offset + batch_idx}, of the training "
                f"pictures {pictures}{', ...' if len(logits) > 8 else ''}; no step was taken"
            )
        fault("fwd")
        wrong = (logits.argmax(1) != batch["target"]).sum().item()
        count = len(logits)
        self._sums += torch.tensor([value * count, wrong, count], dtype=torch.float64)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        self._steps.append(time.perf_counter() - self._step_began)
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
            "train_loss": loss / count,
            "train_top1": 100 * wrong / count,
            **self._validated,
            "seconds": self._seconds,
            "step_seconds": statistics.median(self._steps or [float("nan")]),
        }
        self.history.append(entry)
        if self.on_epoch is not None:
            self.on_epoch(entry)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self._seconds = time.perf_counter() - self._began
        self.outputs = []

    def validation_step(self, batch, batch_idx: int) -> None:
        logits = self(batch["image"]).float().cpu()
        self.outputs.append((logits, batch["target"].cpu(), batch["index"].cpu()))
        self._tell(len(logits))

    def on_validation_epoch_end(self) -> None:
        logits, targets, _ = self.collected()
        loss, top1, top5 = scores(logits, targets)
        self._validated = {"val_loss": loss, "val_top1": top1, "val_top5": top5}

    def collected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), targets (N,) and indices (N,) of the last validation, by index."""
        logits, targets, indices = (torch.cat(part) for part in zip(*self.outputs, strict=True))
        order = indices.argsort()
        return logits[order], targets[order], indices[order]

    def _tell(self, images: int) -> None:
        if self.on_step is not None:
            self.on_step(images)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, 3, H, W) -> float of zero mean and unit variance, in channels_last: faster in convolutions.

    `mean` and `std` are the data set's, of values / 255.
    """
    scale = image.new_tensor([255 * s for s in std], dtype=torch.float32).view(3, 1, 1)
    shift = image.new_tensor([255 * m for m in mean], dtype=torch.float32).view(3, 1, 1)
    return ((image.float() - shift) / scale).contiguous(memory_format=torch.channels_last)


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
