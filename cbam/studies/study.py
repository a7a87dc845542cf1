"""What a study is: the rows of a table, each a named recipe, and how all of them are trained.

A row says what it trains (`Arm`); the training that all rows share is a `Protocol`; both together with a seed
are the settings of one run (`run_config`), which name its record.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from cbam.errors import ConfigError
from cbam.train.recipe import Recipe

STARTS, PRECISIONS = ("paper", "identity"), ("fp32", "bf16")
SEEDS = 5  # fewer make no table
DIGITS = "digits"


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Args:
        label: the row's name for a reader.
        attention: a name of `cbam.models.attentions()`, "" for the plain network.
        network: the row's own network; None for the protocol's.
        against: the rows that this one is compared with, paired by seed.
        start: how the attention begins, "paper" or "identity".
        forked: attached to a plain network that was trained before, for as many epochs.
        reduction: of the channel attention; None for its default.
        where: the places, as `cbam.attach` takes them; None for every residual block.
        paper: top-1 and top-5 error that the paper prints for the row, in %.
    """

    label: str
    attention: str = ""
    network: str | None = None
    against: tuple[str, ...] = ()
    start: str = "paper"
    forked: bool = False
    reduction: int | None = None
    where: str | None = None
    paper: tuple[float, float] | None = None


@dataclass(frozen=True)
class Study:
    """A table: its rows by name, and what a reader must know of it.

    Args:
        small: the rows for data sets smaller than ImageNet; None for all.
    """

    name: str
    title: str
    arms: dict[str, Arm]
    notes: tuple[str, ...] = ()
    small: tuple[str, ...] | None = None

    def chosen(self, *, small: bool) -> dict[str, Arm]:
        """The rows that count as the whole table."""
        names = self.small if small and self.small else tuple(self.arms)
        return {name: self.arms[name] for name in names}

    @property
    def many_networks(self) -> bool:
        """Whether the rows name their networks themselves."""
        return any(arm.network for arm in self.arms.values())


@dataclass(frozen=True)
class Protocol:
    """How every row of a study is trained; all problems of a bad one are reported together.

    Args:
        data: "digits", or the name of an image folder.
        size: side of the pictures in pixels; None: chosen from the folder.
        limit: about so many training and validation pictures; None for all.
        resident: the pictures lie on the device, and are cropped and flipped there.
        small: the data set is smaller than ImageNet.
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

    def __post_init__(self) -> None:
        problems = []
        try:
            self.recipe()
        except ConfigError as error:
            problems.append(str(error))
        if self.precision not in PRECISIONS:
            problems.append(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("size", "limit"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                problems.append(f"{name} must be a whole number above 0, got {value!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    def recipe(self) -> Recipe:
        """What trains one network once."""
        return Recipe(
            epochs=self.epochs, batch_size=self.batch_size, optimizer=self.optimizer, lr=self.lr,
            momentum=self.momentum, weight_decay=self.weight_decay, schedule=self.schedule,
            precision=self.precision,
        )  # fmt: skip


def digits() -> Protocol:
    """Cluttered digits: 15 to 30 s on one CPU core.

    The learning rate is that of `cbam compare` (cbam/studies/task.py says how it was chosen). Batch and
    epochs make as many steps as a comparison makes in all, 720; docs/evidence.md says what was tried first.
    """
    return Protocol(DIGITS, "resnet_tiny", epochs=8, batch_size=16, lr=0.05)


def imagenette() -> Protocol:
    """An image folder of some ten thousand pictures, from scratch, on one GPU: the rates of the paper, and
    half a cosine in place of its steps, which are made for 90 epochs."""
    return Protocol("", "resnet18", epochs=40, batch_size=128, lr=0.1, precision="bf16", resident=True)


def imagenet() -> Protocol:
    """ImageNet-1k as in the paper."""
    return Protocol("", "resnet50", epochs=90, batch_size=256, lr=0.1, schedule="step", size=224, small=False)


PROTOCOLS = {"digits": digits, "imagenette": imagenette, "imagenet": imagenet}
LARGE = 1_000_000  # training pictures, from which a data set is taken for ImageNet
ROOM = 8 << 30  # bytes of pictures that may lie on a device


def usual(data: str, train: int, size: int) -> Protocol:
    """The protocol for a data set of that name, number of training pictures and size of pictures."""
    if data == DIGITS:
        return digits()
    if train >= LARGE:
        return dataclasses.replace(imagenet(), data=data)
    fits = train * 3 * size**2 <= ROOM
    return dataclasses.replace(imagenette(), data=data, resident=fits)


_OF_ARM = ("network", "attention", "start", "forked", "reduction", "where")


def run_config(protocol: Protocol, arm: Arm, seed: int) -> dict[str, Any]:
    """The settings of one run, as plain values: what its record is found by."""
    config = dataclasses.asdict(protocol)
    del config["small"]
    own = {name: getattr(arm, name) for name in _OF_ARM}
    return config | own | {"network": arm.network or protocol.network, "seed": seed}


def run_key(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that stand for these settings.

    What is off or left out has no part in it, so that a setting which is added later renames no record.
    """
    return hashlib.sha256(json.dumps(said(config), sort_keys=True).encode()).hexdigest()[:8]


def said(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not off or left out."""
    return {name: value for name, value in config.items() if value is not None and value is not False}


def shared_part(study: Study, config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's settings all rows of a table have in common."""
    own = {*_OF_ARM, "seed"} - (set() if study.many_networks else {"network"})
    return {name: value for name, value in config.items() if name not in own}


def run_name(protocol: Protocol, arm: str, config: dict[str, Any]) -> str:
    """The name of a run's record, without its ending."""
    data = re.sub(r"[^A-Za-z0-9_.]+", "_", protocol.data)
    return f"{data}-{arm}-s{config['seed']}-{run_key(config)}"
