"""Metrics for other programs: CSV, TensorBoard, W&B, MLflow. One that fails is reported once and dropped.

None of them is the record of a run: that is metrics.jsonl, which has no timings and resumes byte for byte.
"""

import contextlib
import csv
import io
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cbam.errors import StoppedError
from cbam.train.checkpoint import write
from cbam.train.folder import TABLE, WANDB, epochs
from cbam.train.task import is_epoch


class _Logger(Protocol):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def finalize(self, status: str) -> None: ...


class Loggers:
    """The loggers of these names in the folder of a run; those that can also show `config`."""

    def __init__(
        self, names: tuple[str, ...], folder: Path, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self._say, self._loggers = say, {}
        for name in names:
            self._guarded(name, lambda make=_MAKERS[name], name=name: self._keep(name, make(folder, config)))

    def _keep(self, name: str, logger: _Logger | None) -> None:
        if logger is not None:
            self.put(name, logger)

    def put(self, name: str, logger: _Logger) -> None:
        """Add a logger."""
        self._loggers[name] = logger

    def add(self, metrics: dict[str, Any], step: int) -> None:
        """Log the metrics after a step, counted over the whole run."""
        numbers = {n: float(v) for n, v in metrics.items() if isinstance(v, int | float) and v == v}
        for name, logger in list(self._loggers.items()):
            self._guarded(name, lambda to=logger: to.log_metrics(numbers, step))

    def close(self) -> None:
        """Finish and flush all loggers."""
        for name, logger in list(self._loggers.items()):
            self._guarded(name, lambda to=logger: to.finalize("success"))

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except StoppedError:  # from a second signal in the meantime, not from the logger
            raise
        except (Exception, SystemExit) as error:
            self._loggers.pop(name, None)
            self._say(f"{name}: {type(error).__name__}: {error}; training continues without it")


class ProgressLine:
    """Reports the progress and speed of a run to `now`, at most once every `every` seconds."""

    def __init__(self, now: Callable[[str], None], epochs: int, *, every: float) -> None:
        self._now, self._epochs, self._every, self._last = now, epochs, every, float("-inf")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if is_epoch(metrics) or time.monotonic() < self._last + self._every:
            return
        self._last = time.monotonic()
        rate, waited = metrics["images_per_second"], metrics["wait_share"]
        loss = f"loss {metrics['loss']:.4f}" if "loss" in metrics else "skipped"
        self._now(
            f"epoch {metrics['epoch']:.0f} of {self._epochs}, step {step}: {loss}, "
            f"{rate:.0f} images/s, {100 * waited:.0f} % of the time waiting for images"
        )

    def finalize(self, status: str) -> None: ...


class _Table:
    """epochs.csv: a row per epoch, rewritten from metrics.jsonl each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if is_epoch(metrics):
            with contextlib.suppress(OSError):  # the next epoch, or the end, writes all rows
                self._write()

    def _write(self) -> None:
        rows = epochs(self._folder)
        if not rows:
            return
        text = io.StringIO()
        table = csv.DictWriter(text, rows[0], lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        write(self._folder / TABLE, text.getvalue().encode())

    def finalize(self, status: str) -> None:
        self._write()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._make, self._writer = folder, SummaryWriter, None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._writer is None:  # only now is the step known from which earlier events are discarded
            self._writer = self._make(str(self._folder / "tensorboard"), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()


def _tensorboard(folder: Path, config: dict[str, Any]) -> _Logger | None:
    try:
        return _TensorBoard(folder)
    except ImportError:  # it is on by default, and not everybody has it
        return None


def _wandb(folder: Path, config: dict[str, Any]) -> _Logger:
    from pytorch_lightning.loggers import WandbLogger

    file = folder / WANDB
    if not file.exists():
        write(file, secrets.token_hex(8).encode())  # a folder's name is not unique
    name, own = "-".join(folder.absolute().parts[-2:]), file.read_text("utf-8")
    return WandbLogger(project="cbam", name=name, id=own, save_dir=folder, resume="allow", config=config)


def _mlflow(folder: Path, config: dict[str, Any]) -> _Logger:
    from pytorch_lightning.loggers import MLFlowLogger

    logger = MLFlowLogger("cbam", run_name=folder.name)
    logger.log_hyperparams(config)
    return logger


_MAKERS: dict[str, Callable[[Path, dict[str, Any]], _Logger | None]] = {
    "csv": lambda folder, config: _Table(folder),
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
