"""What a study is: the rows of a table, and how all of them are trained.

An `Arm` is what a row trains, and a `Protocol` the training that all rows share. With a seed, they are the
settings of one run (`run_config`), which determine the name of its record.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cbam.errors import ConfigError
from cbam.train.recipe import Recipe
from cbam.train.recipes import Config, detect_coco, detect_short, detect_voc

STARTS, PRECISIONS = ("paper", "identity"), ("fp32", "bf16")
SEEDS = 5  # that a row needs
DIGITS = "digits"


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Args:
        label: the row's name in tables.
        attention: a name of `cbam.models.attentions()`, "" for the plain network.
        network: the row's own network; None for the protocol's.
        against: the rows that this one is compared with, paired by seed.
        start: the initialisation of the attention, "paper" or "identity".
        forked: start from a plain network already trained for as many epochs.
        reduction: of the channel attention; None for its default.
        where: the places, as `cbam.attach` takes them; None for every residual block.
        paper: the paper's numbers for the row, in %, in the order of the study's measures.
    """

    label: str
    attention: str = ""
    network: str | None = None
    against: tuple[str, ...] = ()
    start: str = "paper"
    forked: bool = False
    reduction: int | None = None
    where: str | None = None
    paper: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Measure:
    """What a table compares, in %: its key in the metrics of an epoch, and its title."""

    key: str
    title: str
    lower_is_better: bool = True

    @property
    def better(self) -> str:
        """The side of zero, "left" or "right", on which a difference is an improvement."""
        return "left" if self.lower_is_better else "right"


ERRORS = (Measure("val_top1", "top-1 error"), Measure("val_top5", "top-5 error"))
# Training images from which on a data set counts as large: as ImageNet, COCO, VOC 07+12.
LARGE, LARGE_COCO, LARGE_VOC = 1_000_000, 100_000, 10_000


@dataclass(frozen=True)
class Study:
    """A table: its rows by name, and what a reader must know about it.

    Args:
        small: the rows for data sets smaller than the paper's; None for all.
        large: the rows for data sets as large as the paper's; None for all.
        measures: what is compared; the sentences and the figure use the first one.
        large_from: the number of training images from which on a data set counts as large.
        usual: the protocol for a data set, given its name, number of training images and image size.
        boxed: whether it trains detectors, on images with boxes.
        rules: the metric that its measures need, "voc" or "coco"; None if both have them.
        paper_data: what the paper's numbers were measured on.
    """

    name: str
    title: str
    arms: dict[str, Arm]
    notes: tuple[str, ...] = ()
    small: tuple[str, ...] | None = None
    large: tuple[str, ...] | None = None
    measures: tuple[Measure, ...] = ERRORS
    large_from: int = LARGE
    usual: "Callable[[str, int, int | None], Protocol]" = lambda *about: usual(*about)
    boxed: bool = False
    rules: str | None = None
    paper_data: str = "ImageNet"

    def is_small(self, train: int) -> bool:
        """Whether a data set of so many training images is smaller than the paper's."""
        return train < self.large_from

    def chosen(self, *, small: bool) -> dict[str, Arm]:
        """The rows of the whole table."""
        names = (self.small if small else self.large) or tuple(self.arms)
        return {name: self.arms[name] for name in names}

    @property
    def many_networks(self) -> bool:
        """Whether rows name networks of their own."""
        return any(arm.network for arm in self.arms.values())


@dataclass(frozen=True)
class Protocol:
    """How every row of a study is trained; all problems are reported together (`ConfigError`).

    Args:
        data: "digits", or the name of an image folder.
        size: side of the images in pixels; None: chosen from the folder.
        limit: use about this many training and validation images; None for all.
        resident: the images are kept on the device, and cropped and flipped there.
        small: the data set is smaller than the paper's.
        warmup_epochs, milestones: see `cbam.train.Recipe`; None for none.
        augment, regions: for detectors, see `cbam.train.recipes.Config`.
    """

    data: str
    network: str
    epochs: int
    batch_size: int
    lr: float
    schedule: str = "cosine"
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    size: int | None = None
    limit: int | None = None
    precision: str = "fp32"
    resident: bool = False
    small: bool = True
    warmup_epochs: float | None = None
    milestones: tuple[int, ...] | None = None
    augment: str | None = None
    regions: int | None = None

    def __post_init__(self) -> None:
        problems = []
        try:
            self.recipe()
        except ConfigError as error:
            problems.append(str(error))
        if self.precision not in PRECISIONS:
            problems.append(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("size", "limit", "regions"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                problems.append(f"{name} must be a whole number above 0, got {value!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    def recipe(self) -> Recipe:
        """The recipe that trains one network."""
        return Recipe(
            epochs=self.epochs, batch_size=self.batch_size, optimizer=self.optimizer, lr=self.lr,
            momentum=self.momentum, weight_decay=self.weight_decay, schedule=self.schedule,
            precision=self.precision, warmup_epochs=self.warmup_epochs or 0.0,
            milestones=self.milestones or (),
        )  # fmt: skip


def digits() -> Protocol:
    """Cluttered digits: 15 to 30 s on one CPU core.

    The learning rate is that of `cbam compare` (cbam/studies/task.py says how it was chosen). Batch and
    epochs give 720 steps, as many as a whole comparison takes; docs/evidence.md says what was tried first.
    """
    return Protocol(DIGITS, "resnet_tiny", epochs=8, batch_size=16, lr=0.05)


def imagenette() -> Protocol:
    """An image folder of some ten thousand images, from scratch, on one GPU: the rate of the paper, and
    half a cosine in place of its steps, which are made for 90 epochs.

    With a warm-up: without it, plain networks fall behind at some seeds, and attention would win merely
    because it damps the start (docs/evidence.md).
    """
    return Protocol(
        "", "resnet18", epochs=40, batch_size=128, lr=0.1, warmup_epochs=2.0, precision="bf16", resident=True
    )


def imagenet() -> Protocol:
    """ImageNet-1k as in the paper."""
    return Protocol("", "resnet50", epochs=90, batch_size=256, lr=0.1, schedule="step", size=224, small=False)


ROOM = 8 << 30  # bytes of images that may be kept on a device


def usual(data: str, train: int, size: int | None) -> Protocol:
    """The protocol for a data set, given its name, number of training images and image size."""
    assert size is not None
    if data == DIGITS:
        return digits()
    if train >= LARGE:
        return dataclasses.replace(imagenet(), data=data)
    fits = train * 3 * size**2 <= ROOM
    return dataclasses.replace(imagenette(), data=data, resident=fits)


def faster_rcnn(data: str, train: int, size: int | None) -> Protocol:
    """The protocol of table 6: the recipe detect/coco for COCO, detect/short for smaller data sets."""
    return _of_recipe(data, detect_coco() if train >= LARGE_COCO else detect_short(), train < LARGE_COCO)


def single_shot(data: str, train: int, size: int | None) -> Protocol:
    """The protocol of table 7: detect/voc; for smaller data sets 120 epochs from scratch, half a cosine."""
    own = detect_voc()
    if train >= LARGE_VOC:
        return _of_recipe(data, own, False)
    short = dataclasses.replace(
        own, epochs=120, batch_size=16, lr=0.01, schedule="cosine", milestones=(), warmup_epochs=2
    )
    return _of_recipe(data, short, True)


def _of_recipe(data: str, config: Config, small: bool) -> Protocol:
    shared = {field.name for field in dataclasses.fields(Protocol)} & set(Config.names())
    own = {name: getattr(config, name) for name in shared - {"data", "size", "limit"}}
    own |= {"milestones": config.milestones or None, "warmup_epochs": config.warmup_epochs or None}
    return Protocol(data=data, network="", small=small, **own)


_OF_ARM = ("network", "attention", "start", "forked", "reduction", "where")


def run_config(protocol: Protocol, arm: Arm, seed: int) -> dict[str, Any]:
    """The settings of one run as JSON values, by which its record is found."""
    config = dataclasses.asdict(protocol)
    del config["small"]
    own = {name: getattr(arm, name) for name in _OF_ARM}
    config |= own | {"network": arm.network or protocol.network, "seed": seed}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


def run_key(config: dict[str, Any]) -> str:
    """A digest of the settings, eight hexadecimal digits.

    Settings that are off or left out do not enter it, so that adding a setting later renames no record.
    """
    return hashlib.sha256(json.dumps(explicit(config), sort_keys=True).encode()).hexdigest()[:8]


def explicit(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not off or left out."""
    return {name: value for name, value in config.items() if value is not None and value is not False}


def shared_part(study: Study, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that all rows of a table share."""
    own = {*_OF_ARM, "seed"} - (set() if study.many_networks else {"network"})
    return {name: value for name, value in config.items() if name not in own}


def run_name(protocol: Protocol, arm: str, config: dict[str, Any]) -> str:
    """The name of a run's record, without its ending."""
    return f"{file_safe(protocol.data)}-{arm}-s{config['seed']}-{run_key(config)}"


def file_safe(data: str) -> str:
    """The name of a data set for file names; folder names may hold characters that break links."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", data)
