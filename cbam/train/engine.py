"""Lightning's Trainer, configured to be silent and to write no files of its own, on one or more devices."""

import contextlib
import functools
import inspect
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from cbam.errors import CBAMError, DataError, InputError, NonFiniteError, OutOfMemoryError
from cbam.train.distributed import World, world
from cbam.train.recipe import Recipe

_log = logging.getLogger("cbam")
_PRECISIONS = {"fp32": "32-true", "fp64": "64-true"}


class _DDP(DDPStrategy):
    """DDP that leaves the network on its device after an error.

    Lightning would move it back to the CPU, and so wait for a GPU that waits for a process that is gone. The
    message that names that process would never appear.
    """

    _failed = False

    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(exception)

    def teardown(self) -> None:
        if not (self._failed and self.root_device.type == "cuda"):
            super().teardown()


class _Connected(ClusterEnvironment):
    """Tells Lightning that the processes are already started and connected (see distributed.py).

    Each appears to be alone on its machine, since its GPU is already chosen.
    """

    def __init__(self, here: World) -> None:
        super().__init__()
        self._here = here

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._here.size

    def set_world_size(self, size: int) -> None: ...

    def global_rank(self) -> int:
        return self._here.rank

    def set_global_rank(self, rank: int) -> None: ...

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self._here.rank


@contextlib.contextmanager
def trainer(
    device: torch.device, epochs: int, callbacks: Sequence[pl.Callback] = (), recipe: Recipe | None = None
) -> Iterator[pl.Trainer]:
    """A Trainer for `recipe`, or for an evaluation; its errors are raised as ours.

    Raises:
        NonFiniteError, DataError, OutOfMemoryError, InputError: see `cbam.train.fit`.
    """
    settings = recipe or Recipe()
    with _quiet(), _interruptible(), tempfile.TemporaryDirectory() as scratch:
        try:
            yield pl.Trainer(
                max_epochs=epochs,
                default_root_dir=Path(scratch),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                callbacks=list(callbacks),
                accumulate_grad_batches=settings.accumulate,
                # Makes Lightning ask again how long an epoch is: a resumed one is shorter.
                reload_dataloaders_every_n_epochs=1 if callbacks else 0,
                **_devices(device, settings),
            )
        except FloatingPointError as error:
            raise NonFiniteError(f"{error}; a lower learning rate usually helps") from None
        except (RuntimeError, ValueError, MemoryError) as error:
            if isinstance(error, CBAMError):
                raise
            translated = _translated(error, device, recipe)
            if translated is None:
                raise
            raise translated from error


def _devices(device: torch.device, recipe: Recipe) -> dict[str, Any]:
    here, cuda = world(), device.type == "cuda"
    plugins: list[Any] = [_Connected(here)]
    how: dict[str, Any] = {"accelerator": "gpu" if cuda else "cpu", "devices": 1, "plugins": plugins}
    if recipe.precision in _PRECISIONS:
        how["precision"] = _PRECISIONS[recipe.precision]
    else:
        if not cuda:
            _warn_of_emulation(recipe.precision)
        kind = "bf16-mixed" if recipe.precision == "bf16" else "16-mixed"
        plugins.append(MixedPrecision(kind, device.type))
    if here.size > 1:
        how |= {"devices": [torch.cuda.current_device()] if cuda else 1, "num_nodes": here.size}
        how["sync_batchnorm"] = recipe.sync_bn
        # Not in every step: Steps.on_validation_epoch_start broadcasts BatchNorm's statistics.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        how["strategy"] = _DDP(**{name: False})  # pyright: ignore[reportArgumentType]
    return how


@functools.cache
def _warn_of_emulation(precision: str) -> None:
    """Warn once if the CPU only emulates `precision`, which is very slow."""
    name = f"_is_mkldnn_{precision}_supported"  # torch's own test for native convolutions
    known = getattr(torch.ops.mkldnn, name, None)
    if known is not None and not known():
        _log.warning(
            "this CPU has no %s arithmetic: a step may take ten times as long as with --precision fp32",
            precision,
        )


def _translated(error: BaseException, device: torch.device, recipe: Recipe | None) -> BaseException | None:
    """The error of ours to raise instead of this one; None to keep it."""
    text = " ".join(str(error).split())
    if "DataLoader worker" in text:
        return DataError(f"a process that loads images died: {text}")
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if memory or "can't allocate memory" in text:
        return OutOfMemoryError(
            f"out of memory on {device.type}{_memory_advice(device, recipe)} ({text[:200]})"
        )
    if "Expected more than 1 value per channel" in text:
        return InputError(
            "BatchNorm cannot take the variance of a single value per channel, from a batch of one image and "
            "a map of one pixel: use a larger --batch-size, a lower --accumulate or larger images"
        )
    if "Expected to have finished reduction" in text:
        return InputError(f"some parameters of the network were not used in the loss: {text[:300]}")
    return None


def _memory_advice(device: torch.device, recipe: Recipe | None) -> str:
    """The batch size and peak memory, and how to use less, as part of a message."""
    peak = ""
    if device.type == "cuda":
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak"
    if recipe is None:  # an evaluation
        return f"{peak}; a smaller --batch-size needs less"
    batch = recipe.batch_size // (world().size * recipe.accumulate)
    return (
        f" with batches of {batch}{peak}; --accumulate {2 * recipe.accumulate} computes the same steps in "
        "smaller parts"
    )


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
            warnings.filterwarnings("ignore", message=".*is configured to be used as a.*")
            # In fp16 the first steps are skipped, until the loss scale is low enough.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step..` before")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, where Lightning ignores a second one and calls sys.exit(1)."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None  # the original: a subclass may stand for SIGTERM
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
