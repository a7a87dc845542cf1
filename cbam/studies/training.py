"""One run of a study: the network of a row, trained on the images of the study, and its record."""

import contextlib
import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbam.data import BoxedImages, Images, Resident, cluttered_digits, digest_of_names, image_folder
from cbam.data.images import check_int
from cbam.errors import AttachError, ConfigError, NonFiniteError
from cbam.models import MobileNetV1, build, profile
from cbam.models.detectors import DETECTORS
from cbam.models.variants import VARIANTS
from cbam.nn import ATTENTION
from cbam.studies import machine
from cbam.studies.boxes import BoxedPictures
from cbam.studies.records import SCHEMA
from cbam.studies.study import DIGITS, Protocol, run_key
from cbam.surgery import attach, attached
from cbam.surgery.effects import seeded
from cbam.train import checkpoint, fit
from cbam.train.detector import make_detector

SAVE_EVERY = 1000  # steps


class Pictures:
    """The training and validation images of a study, read when first needed.

    Args:
        folder: an image folder; None for the digits.
        size: side in pixels; None: chosen from the folder.
        limit: use about this many training and validation images; None for all.
    """

    def __init__(
        self, folder: str | None = None, *, size: int | None = None, limit: int | None = None
    ) -> None:
        train, val = image_folder(folder, size=size) if folder else cluttered_digits()
        self.folder, self.all, self.name = folder, len(train), DIGITS
        if folder:
            self.name = train.name if train.name != DIGITS else f"{train.name}_folder"
        if limit:
            train, val = (images.subset(min(limit, len(images))) for images in (train, val))
        self.size = train.size if folder else None
        self._found = train, val
        self._ready: tuple[Images, Images] | None = None

    @cached_property
    def about(self) -> dict[str, Any]:
        """What identifies these images, independent of their path.

        "sha256" is a digest of classes and targets, "files" one of the file names, if there are files.
        """
        train, val = self._found
        labels = repr((train.classes, train.targets, val.targets))
        about = {
            "name": train.name,
            "train": len(train),
            "val": len(val),
            "size": train.size,
            "classes": len(train.classes),
            "sha256": hashlib.sha256(labels.encode()).hexdigest(),
        }
        if train.inner_name(0):
            about["files"] = digest_of_names(train, val)
        return about

    def ready(self, protocol: Protocol, device: torch.device) -> tuple[Images, Images]:
        """Both sets, on the device if the protocol asks for it; the digits' validation set always."""
        if self._ready is None:
            train, val = self._found
            if protocol.resident:
                train = Resident(train, device, augment=True)
            if protocol.resident or self.name == DIGITS:
                val = Resident(val, device, augment=False)
            self._ready = train, val
        return self._ready


@dataclass
class Checkpoints:
    """The checkpoints of a long training, from which it is resumed until it has a record.

    Args:
        folder: for this training only.
        run: the run whose time is counted.
        about: what must be unchanged to resume: settings, images and code.
        end: when to stop, on the monotonic clock; None for never.
        say: called with each line of progress.
        trunk: the same for the network that a forked run starts from; all its forks share the folder.
    """

    folder: Path
    run: str
    about: dict[str, Any]
    end: float | None
    say: Callable[[str], None]
    trunk: "Checkpoints | None" = None
    seconds: float = 0.0  # that earlier processes spent on the run

    def keeper(self):
        """The keeper that saves, stops and resumes the training."""
        from cbam.train.keeper import Keeper

        state = self._newest()
        if state is not None and state["run"] == self.run:
            self.seconds += sum(entry["seconds"] for entry in _timed_epochs(state["history"]))
        left = None if self.end is None else max(0.0, self.end - time.monotonic())
        about = {"run": self.run, "about": self.about}
        return Keeper(
            self.folder, about, state=state, save_every=SAVE_EVERY, copies=2, max_time=left, say=self.say
        )

    def _newest(self) -> dict[str, Any] | None:
        """The state to resume from; checkpoints of other settings or other code are moved aside."""
        found = checkpoint.newest(self.folder, self.say) if self.folder.exists() else None
        if found and (about := found[1].get("about")) != self.about:
            self.say("the checkpoints found are of other settings or other code: they are moved aside")
            shutil.rmtree(self._aside(about), ignore_errors=True)
            self.folder.rename(self._aside(about))
            found = None
        if found is None and (own := self._aside(self.about)).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            own.rename(self.folder)
            found = checkpoint.newest(self.folder, self.say)
        self.folder.mkdir(parents=True, exist_ok=True)
        return found[1] if found else None

    def _aside(self, about: Any) -> Path:
        described = json.dumps(about, sort_keys=True, default=str).encode()
        return self.folder.with_name(f"{self.folder.name}.{hashlib.sha256(described).hexdigest()[:8]}")


class Training:
    """Trains one run after another on the same images and device."""

    def __init__(
        self,
        protocol: Protocol,
        pictures: Pictures | BoxedPictures,
        device: torch.device,
        *,
        workers: int = 0,
    ) -> None:
        self.protocol, self.pictures, self.device = protocol, pictures, device
        self.workers = check_int("workers", workers, 0, 1024)
        self._forked: tuple[dict[str, Any], nn.Module, list[dict]] | None = None
        self._diverged: tuple[dict[str, Any], str] | None = None
        self._costs: dict[str, dict[str, Any]] = {}

    def run(
        self, config: dict[str, Any], on_work: Callable[[float], None], checkpoints: Checkpoints | None = None
    ) -> dict[str, Any]:
        """Train and validate one run; returns the measured part of its record.

        Args:
            config: see `cbam.studies.study.run_config`.
            on_work: called with each further share of the run that is done; they add up to 1.
            checkpoints: where the run is saved, and resumed from.

        Raises:
            ConfigError, DataError: settings or images that do not go together.
            StoppedError: the time of `checkpoints` is over; the run is saved.
        """
        train, val = self._pictures()  # read once for all runs, so not counted in the first one's time
        began, worked = time.monotonic(), time.process_time()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        phases = 2 if config["forked"] else 1
        total = phases * config["epochs"] * (3 * len(train) + len(val))
        on_passes = partial(_advance, on_work, total)
        found: dict[str, Any] = {"schema": SCHEMA, "created": created, "status": "complete", "start": None}
        history: list[dict] = []
        with fast_convolutions(self.device):
            try:
                if config["forked"]:
                    model, start = self._fork(config, on_passes, checkpoints)
                    found["start"] = {"sha256": fingerprint(model), "epochs": _without_nan(start)}
                else:
                    model = plain(config, len(train.classes))
                refine(model, config)
                history = self._fit(model, config, on_passes, checkpoints and checkpoints.keeper())
            except NonFiniteError as error:
                found["status"] = f"NonFiniteError: {error}"
        timed = _timed_epochs(history)
        spent = sum(entry["seconds"] for entry in timed)
        before = sum(part.seconds for part in (checkpoints, checkpoints and checkpoints.trunk) if part)
        return found | {
            **self.cost(config),
            "epochs": _without_nan(history),
            "images_per_second": len(train) * len(timed) / spent if spent else None,
            "seconds": time.monotonic() - began + before,
            "processor_seconds": time.process_time() - worked,
            "memory_gib": machine.largest_memory(),
            "device_memory_gib": _device_memory(self.device),
        }

    def cost(self, config: dict[str, Any]) -> dict[str, Any]:
        """`cost_of` a run, computed once for all its seeds.

        Raises:
            ConfigError: the network cannot be built.
        """
        key = run_key(config | {"seed": 0})
        if key not in self._costs:
            about = self.pictures.about
            self._costs[key] = cost_of(config, about["classes"], about["size"])
        return self._costs[key]

    def _fork(
        self, config: dict[str, Any], on_passes: Callable[[int], None], checkpoints: Checkpoints | None
    ) -> tuple[nn.Module, list[dict]]:
        """A copy of the trained plain network, and its history; the last one is cached for the next row.

        Raises:
            NonFiniteError: its training diverges, now or in the last call.
        """
        train, _ = self._pictures()
        own = trunk(config)
        if self._diverged is not None and self._diverged[0] == own:
            raise NonFiniteError(self._diverged[1])
        if self._forked is None or self._forked[0] != own:
            model = plain(own, len(train.classes))
            keeper = checkpoints and checkpoints.trunk and checkpoints.trunk.keeper()
            try:
                self._forked = own, model, self._fit(model, own | {"forked": False}, on_passes, keeper)
            except NonFiniteError as error:
                self._diverged = own, str(error)
                raise
        else:
            on_passes(own["epochs"] * (3 * len(train) + len(self._pictures()[1])))
        _, model, history = self._forked
        copy = plain(own, len(train.classes))
        copy.load_state_dict(model.state_dict())
        return copy, history

    def _pictures(self) -> tuple[Images, Images] | tuple[BoxedImages, BoxedImages]:
        return self.pictures.ready(self.protocol, self.device)

    def _fit(
        self, model: nn.Module, config: dict, on_passes: Callable[[int], None], keeper: Any
    ) -> list[dict]:
        train, val = self._pictures()
        return fit(
            model,
            train,
            val,
            self.protocol.recipe(),
            seed=config["seed"],
            device=self.device.type,
            first_epoch=config["epochs"] if config["forked"] else 0,
            workers=self.workers,
            on_step=on_passes,
            keeper=keeper,
        )


def trunk(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the network that a forked run starts from."""
    return config | {"attention": "", "start": "paper", "where": None, "reduction": None}


def plain(config: dict[str, Any], classes: int) -> nn.Module:
    """The network of a run without attention, initialised from the run's seed only."""
    with seeded(config["seed"]):
        return _built(config, classes)


def _built(config: dict[str, Any], classes: int) -> nn.Module:
    name = config["network"]
    if not _is_detector(name):
        return build(name, num_classes=classes)
    return make_detector(name, classes, start="paper", size=config["size"], regions=config.get("regions"))


def _is_detector(network: str) -> bool:
    return network.partition(":")[0] in DETECTORS


def refine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Attach the attention of a run in place, initialised from the run's seed."""
    if not config["attention"]:
        return model
    attention = (ATTENTION | VARIANTS)[config["attention"]]
    if config["reduction"] is not None:
        attention = partial(attention, reduction=config["reduction"])  # pyright: ignore[reportCallIssue]
    where = config["where"] or _usual_places(model, config["network"])
    with seeded(config["seed"]):
        return attach(model, where, attention, start=config["start"])


def _usual_places(model: nn.Module, network: str) -> str | None:
    """Where attention goes in a network; None for the ends of its residual blocks."""
    if isinstance(model, MobileNetV1):
        return MobileNetV1.UNITS
    if network.startswith("stairnet300"):
        from cbam.models.ssd import ATTENTION_AT

        return ATTENTION_AT
    return None


def fingerprint(model: nn.Module) -> str:
    """A digest of all weights, equal for runs forked from the same network."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cost_of(config: dict[str, Any], classes: int, size: int | None) -> dict[str, Any]:
    """Parameters, 10^9 multiply-accumulates per image, and places of attention, on the meta device.

    The multiply-accumulates of a detector depend on what it finds, so they are None.

    Raises:
        ConfigError: the network cannot be built.
    """
    try:
        with torch.device("meta"):
            model = refine(_built(config, classes), config)
            if size is None or _is_detector(config["network"]):
                parameters, gmac = sum(p.numel() for p in model.parameters()), None
            else:
                cost = profile(model, size)
                parameters, gmac = cost.parameters, cost.gmac
    except AttachError as error:
        raise ConfigError(f"{config['network']}, {config['attention']}: {error}") from error
    return {"parameters": parameters, "gmac": gmac, "sites": len(attached(model))}


def _device_memory(device: torch.device) -> float | None:
    """The peak memory of tensors on a GPU since the run began, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _timed_epochs(history: list[dict]) -> list[dict]:
    """The epochs whose time is known; it is NaN for one that was resumed at its validation."""
    return [entry for entry in history if entry["seconds"] == entry["seconds"]]


def _without_nan(history: list[dict]) -> list[dict]:
    """The history with None for NaN, which JSON lacks."""
    return [{name: None if value != value else value for name, value in e.items()} for e in history]


def _advance(on_work: Callable[[float], None], total: int, passes: int) -> None:
    on_work(passes / total)


@contextlib.contextmanager
def fast_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN benchmark its algorithms, which pays off as all batches but the last have one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
