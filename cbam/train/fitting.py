"""Train and evaluate classifiers and detectors: functions around Lightning's Trainer."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cbam.data import BoxedImages, Images, Shard, loader
from cbam.data.images import draws
from cbam.errors import ConfigError, DataError, MissingExtraError
from cbam.surgery.effects import modes_restored, seeded
from cbam.train.distributed import World, world
from cbam.train.recipe import Recipe
from cbam.train.task import Task, percent

if TYPE_CHECKING:
    from cbam.train.keeper import Keeper


@dataclass(frozen=True)
class Evaluation:
    """The results of a network on a data set of N images and K classes.

    top1, top5: errors in %; top5 is None with five classes or fewer. loss: mean cross-entropy.
    probabilities: (N, K), by index. targets: (N,).
    """

    top1: float
    top5: float | None
    loss: float
    probabilities: Tensor
    targets: Tensor

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 error {self.top5:.2f} %"
        return f"top-1 error {self.top1:.2f} %{top5}, loss {self.loss:.4f}"


@dataclass(frozen=True)
class Detections:
    """The results of a detector on a data set.

    scores: by name, in %, see `cbam.train.detection`. found, truth: by the index of the image, see
    `cbam.train.detection_metrics`.
    """

    scores: dict[str, float | None]
    found: dict[int, dict[str, Tensor]]
    truth: dict[int, dict[str, Tensor]]

    def __str__(self) -> str:
        known = ((name.removeprefix("val_"), value) for name, value in self.scores.items())
        return ", ".join(f"{name} {percent(value)}" for name, value in known)


def fit(
    model: nn.Module,
    train: Images | BoxedImages,
    val: Images | BoxedImages,
    recipe: Recipe,
    *,
    seed: int,
    device: str = "auto",
    first_epoch: int = 0,
    workers: int = 0,
    on_step: Callable[[int], None] | None = None,
    keeper: "Keeper | None" = None,
) -> list[dict]:
    """Train `model` in place and return one dict of metrics per epoch.

    The order of the images and their augmentation are functions of (seed, epoch, index): two models
    trained with the same seed and epochs see the same batches. On a CPU the same call gives the same
    weights, bit for bit. Errors are in %, `seconds` is the training part of the epoch, `step_seconds`
    the median step, `wait_seconds` the time spent waiting for images. With an average (`ema`), the average
    is evaluated, and ends up in `model`. Images with boxes train a detector, others a classifier.

    With several processes (see distributed.py), each makes the same call and computes its part of every
    batch. The steps are the same except that BatchNorm and dropout see only that part.

    Args:
        seed: for the order and all randomness in the model (the caller's generator is left unchanged).
        first_epoch: the number of the first epoch, for a model that has been trained before.
        on_step: called with the work of every step, in forward passes of an image; training counts three.
        keeper: saves checkpoints, and resumes from the one it was given, bit for bit on a CPU.

    Raises:
        ConfigError: no such device, or the processes cannot share the batches. DataError: a bad image.
        NonFiniteError: a loss or an output is not finite. OutOfMemoryError.
        DistributedError: another process is gone.
        StoppedError: the keeper was asked to stop. OutputError: it can no longer save.
    """
    with lightning():
        from cbam.train.steps import Steps
    here, where = world(), pick_device(device)
    if recipe.precision == "fp64":
        model.double()  # before a checkpoint is loaded into it
    _check_processes(here, where, recipe, val)
    shard = Shard(here.rank, here.size, recipe.accumulate)
    gpu = where.type == "cuda"
    batches = loader(
        train, recipe.batch_size, train=True, seed=seed, workers=workers, shard=shard, pinned=gpu
    )
    batches.sampler.set_epoch(first_epoch)  # type: ignore[attr-defined]
    steps = Steps(
        _task(model, train, recipe),
        recipe,
        steps_per_epoch=len(batches) // recipe.accumulate,
        first_epoch=first_epoch,
        samples=len(train),
        seed=seed,
        shard=shard,
        on_step=on_step,
        on_epoch=keeper.log_epoch if keeper else None,
    )
    val_batches = _val_loader(
        val, 2 * recipe.batch_size // shard.parts, workers, gpu
    )  # no gradients are kept
    with seeded(_process_seed(seed, here), where), modes_restored(model), _signal_handling(keeper):
        model.to(memory_format=torch.channels_last)  # fastest for convolutions
        try:
            _train(steps, batches, val_batches, where, keeper)
            if steps.average is not None:
                steps.average.swap()
        finally:
            for each in (batches, val_batches):
                each.end()  # type: ignore[attr-defined]
            model.to(memory_format=torch.contiguous_format)
    return steps.history


def _train(steps, batches: DataLoader, val_batches: DataLoader, where: torch.device, keeper) -> None:
    """Run the remaining epochs, after the validation that a killed run did not finish."""
    from cbam.train.engine import trainer

    recipe, callbacks, first_epoch = steps.recipe, [keeper] if keeper else [], steps.first_epoch
    common = len(val_batches.dataset) // world().size  # type: ignore[arg-type]
    if keeper and keeper.restore(steps, batches, -(-common // val_batches.batch_sampler.size)):  # type: ignore[union-attr]
        with trainer(where, 1, callbacks, recipe) as loop:
            loop.validate(steps, val_batches, verbose=False)
        steps.finish_epoch(steps.first_epoch)
        steps.first_epoch += 1
        batches.sampler.set_epoch(steps.first_epoch)  # type: ignore[attr-defined]
    left = recipe.epochs - (steps.first_epoch - first_epoch)
    with trainer(where, left, callbacks, recipe) as loop:
        steps.model.train()
        if left > 0:
            loop.fit(steps, batches, val_batches)


def _val_loader(images: Images | BoxedImages, batch_size: int, workers: int, gpu: bool) -> DataLoader:
    """This process's part of a validation set: every world-th image."""
    shard = Shard(world().rank, world().size)
    return loader(images, max(1, batch_size), train=False, workers=workers, shard=shard, pinned=gpu)


def _check_processes(here: World, where: torch.device, recipe: Recipe, val: Images | BoxedImages) -> None:
    parts = here.size * recipe.accumulate
    if recipe.batch_size % parts:
        raise ConfigError(
            f"batch_size {recipe.batch_size} cannot be split evenly into {here.size} processes with "
            f"{recipe.accumulate} batches each; use a multiple of {parts}"
        )
    if here.size > len(val):
        raise ConfigError(f"{len(val)} validation images are too few for {here.size} processes")
    if recipe.sync_bn and where.type == "cpu":
        raise ConfigError("sync_bn: torch has a synchronised BatchNorm for GPUs only; leave it out")


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Evaluation:
    """Errors and probabilities of `model` on `images`, in eval mode, every image exactly once.

    With several processes (see distributed.py) each evaluates its part, and all return the whole.

    Raises:
        NonFiniteError: the network gives NaN. DataError: a bad image. ConfigError: no such device.
    """
    steps = _validated(model, images, batch_size, device, workers, on_step)
    _, indices, targets, logits = steps.collected
    _check_complete(images, indices.tolist())
    loss, top1, top5 = (steps.validated[f"val_{name}"] for name in ("loss", "top1", "top5"))
    return Evaluation(top1, top5, loss, logits.double().softmax(1), targets)


def evaluate_detector(
    model: nn.Module,
    images: BoxedImages,
    *,
    batch_size: int = 16,
    device: str = "auto",
    workers: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Detections:
    """Scores and detections of `model` on `images`: see `evaluate`.

    Raises:
        NonFiniteError: a box or a score is NaN. DataError: a bad image. ConfigError: no such device.
    """
    steps = _validated(model, images, batch_size, device, workers, on_step)
    found, truth = steps.collected
    _check_complete(images, list(found))
    return Detections(steps.validated, found, truth)


def _validated(
    model: nn.Module,
    images: Images | BoxedImages,
    batch_size: int,
    device: str,
    workers: int,
    on_step: Callable[[int], None] | None,
) -> Any:
    """The `Steps` of an evaluation, with the collected outputs and their metrics."""
    with lightning():
        from cbam.train.engine import trainer
        from cbam.train.steps import Steps
    here = world()
    if here.size > len(images):
        raise ConfigError(f"{len(images)} images are too few for {here.size} processes")
    where = pick_device(device)
    steps = Steps(_task(model, images), on_step=on_step)
    batches = _val_loader(images, batch_size, workers, where.type == "cuda")
    with trainer(where, 1) as loop, seeded(0, where), modes_restored(model):
        try:
            loop.validate(steps, batches, verbose=False)
        finally:
            batches.end()  # type: ignore[attr-defined]
    return steps


def _check_complete(images: Images | BoxedImages, indices: list[int]) -> None:
    if indices != list(range(len(images))):
        raise DataError(f"{images.name}: {len(indices)} images were evaluated instead of {len(images)}")


def _task(model: nn.Module, images: Images | BoxedImages, recipe: Recipe | None = None) -> Task:
    """The task that belongs to the images: detection if they have boxes, else classification."""
    if isinstance(images, BoxedImages):
        from cbam.train.detection import Detection

        return Detection(model, images.classes, images.rules)
    from cbam.train.classification import Classification

    return Classification(model, images.mean, images.std, recipe)


def pick_device(device: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> the device; "auto" is the GPU if there is one.

    Raises:
        ConfigError: any other name, or "cuda" on a machine without a usable GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: PyTorch finds no usable GPU here; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def lightning() -> Iterator[None]:
    """Name the extra to install if Lightning or one of its dependencies is missing."""
    try:
        yield
    except ImportError as error:
        if error.name and error.name.startswith("cbam"):
            raise
        raise MissingExtraError.of("training", "train") from error


def _process_seed(seed: int, here: World) -> int:
    """The seed for randomness in the network, different in each process."""
    return seed if here.is_first else int(draws("rank", here.rank, seed).integers(2**62))


def _signal_handling(keeper: "Keeper | None") -> contextlib.AbstractContextManager:
    return keeper.handling_signals() if keeper else contextlib.nullcontext()
