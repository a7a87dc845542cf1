"""Training and evaluation of a classifier: two functions around Lightning's Trainer."""

import contextlib
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cbam.data import Images, loader
from cbam.errors import ConfigError, DataError, MissingExtraError, NonFiniteError
from cbam.train.recipe import Recipe

if TYPE_CHECKING:
    from cbam.train.keeper import Keeper


@dataclass(frozen=True)
class Evaluation:
    """How a network does on a data set of N pictures and K classes.

    top1, top5: errors in %; top5 is None with five classes or fewer. loss: mean cross-entropy.
    probabilities: (N, K), by index. targets: (N,).
    """

    top1: float
    top5: float | None
    loss: float
    probabilities: Tensor
    targets: Tensor


def fit(
    model: nn.Module,
    train: Images,
    val: Images,
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

    The order of the pictures and their augmentation are functions of (seed, epoch, index): two models
    trained with the same seed and epochs see the same batches. On a CPU the same call gives the same
    weights, bit for bit. Errors are in %, `seconds` is the training part of the epoch, `step_seconds`
    the median step.

    Args:
        seed: of the order and of whatever is random in the model (the caller's generator is left alone).
        first_epoch: the number of the first epoch, for a model that has been trained before.
        on_step: is told the work of every step in forward passes of a picture; training counts three.
        keeper: saves checkpoints, and goes on from the one it was given, bit for bit on a CPU.

    Raises:
        ConfigError: no such device. NonFiniteError: the loss is not finite. DataError: a bad picture.
        StoppedError: the keeper was told to stop. OutputError: it can no longer save.
    """
    task_class = _lightning()
    batches = loader(train, recipe.batch_size, train=True, seed=seed, workers=workers)
    batches.sampler.set_epoch(first_epoch)  # type: ignore[attr-defined]
    task = task_class(
        model,
        train.mean,
        train.std,
        recipe,
        steps_per_epoch=len(batches),
        first_epoch=first_epoch,
        on_step=on_step,
        on_epoch=keeper.log_epoch if keeper else None,
    )
    checks = loader(val, 2 * recipe.batch_size, train=False, workers=workers)  # no gradients are kept
    where, callbacks = pick_device(device), [keeper] if keeper else []
    with _seeded(seed), _modes_restored(model), keeper.listening() if keeper else contextlib.nullcontext():
        model.to(memory_format=torch.channels_last)  # what convolutions are fastest in
        try:
            if keeper and keeper.take_up(task, batches):
                # Saved between the last step of an epoch and its validation, which comes first then.
                with _trainer(where, 1, callbacks) as trainer:
                    trainer.validate(task, checks, verbose=False)
                task.finish_epoch(task.first_epoch)
                task.first_epoch += 1
                batches.sampler.set_epoch(task.first_epoch)  # type: ignore[attr-defined]
            left = recipe.epochs - (task.first_epoch - first_epoch)
            with _trainer(where, left, callbacks) as trainer:
                model.train()
                if left > 0:
                    trainer.fit(task, batches, checks)
        finally:
            model.to(memory_format=torch.contiguous_format)
    return task.history


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Evaluation:
    """Errors and probabilities of `model` on `images`, in eval mode, every picture exactly once."""
    task = _lightning()(model, images.mean, images.std, on_step=on_step)
    batches = loader(images, batch_size, train=False, workers=workers)
    with _trainer(pick_device(device), 1) as trainer, _seeded(0), _modes_restored(model):
        trainer.validate(task, batches, verbose=False)
    logits, targets, indices = task.collected()
    if not torch.equal(indices, torch.arange(len(images))):
        raise DataError(f"{images.name}: {len(indices)} pictures were evaluated instead of {len(images)}")
    scored = task._validated
    return Evaluation(
        scored["val_top1"], scored["val_top5"], scored["val_loss"], logits.double().softmax(1), targets
    )


def pick_device(device: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> the device; "auto" is the GPU where there is one.

    Raises:
        ConfigError: another name, or "cuda" on a machine without a usable GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: PyTorch finds no usable GPU here; take --device cpu, or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _lightning():
    try:
        from cbam.train.classification import Classification
    except ImportError as error:
        if error.name and error.name.startswith("cbam"):
            raise
        raise MissingExtraError.of("training", "train") from error
    return Classification


@contextlib.contextmanager
def _trainer(device: torch.device, epochs: int, callbacks: Sequence = ()) -> Iterator:
    """Lightning's Trainer, silent, writing nothing where the user works, and giving Ctrl-C back."""
    import pytorch_lightning as pl

    with _quiet(), _interruptible(), tempfile.TemporaryDirectory() as scratch:
        try:
            yield pl.Trainer(
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=1,
                max_epochs=epochs,
                default_root_dir=Path(scratch),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                callbacks=list(callbacks),
                # Asks anew how long an epoch is: a resumed one is shorter.
                reload_dataloaders_every_n_epochs=1 if callbacks else 0,
            )
        except FloatingPointError as error:
            raise NonFiniteError(f"{error}; a lower learning rate usually helps") from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that loads pictures died: {error}") from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning's own
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C with sys.exit(1), deaf to a second one; here it is KeyboardInterrupt again."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None  # what was raised: a subclass may tell SIGTERM from Ctrl-C
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
