"""The settings of `cbam train`, and the named recipes. Imports no torch: the help is made from it.

A recipe is a function that returns a Config; `dataclasses.replace` makes variants of it.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cbam.errors import ConfigError
from cbam.train.option import option
from cbam.train.recipe import NONFINITE, OPTIMIZERS, PRECISIONS, SCHEDULES, Recipe

AUGMENTATIONS = ("none", "flip", "ssd")  # those of cbam.data.augment, which needs torch
DETECT = "detect/"  # prefix of the recipes for detectors
FINE_TUNING = "imagenet/finetune"  # the recipe whose learning rate is for pretrained weights
STARTS = ("paper", "identity")
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Config:
    """The settings of a run. All invalid settings are reported together (`ConfigError`)."""

    recipe: str = option("digits", "the recipe that these settings started from")
    data: str | None = option(
        None,
        "image folder: train/ and val/ with one folder per class, or one folder, which is split; or a folder "
        "of train-*.parquet and validation-*.parquet; for detect/... a folder in COCO or Pascal VOC layout",
    )
    model: str = option(
        "resnet_tiny+cbam",
        "network, see `cbam list`; with attention: resnet50+cbam; a detector: fasterrcnn:resnet50+cbam",
        "NAME",
    )
    epochs: int = option(10, "passes over the training images", "N")
    batch_size: int = option(64, "images per step, on all devices together", "N")
    optimizer: str = option("sgd", f"one of {', '.join(OPTIMIZERS)}", "NAME")
    lr: float = option(0.05, "peak learning rate", "RATE")
    momentum: float = option(0.9, "momentum of SGD", "M")
    weight_decay: float = option(1e-4, "weight decay, on every parameter", "W")
    decay_matrices_only: bool = option(False, "no weight decay on biases and norm layers")
    schedule: str = option("cosine", f"one of {', '.join(SCHEDULES)}", "NAME")
    step_epochs: int = option(30, "with the step schedule: epochs between divisions by 10", "N")
    milestones: tuple[int, ...] = option(
        (), "with the step schedule: divide by 10 after these epochs instead", "N"
    )
    warmup_epochs: float = option(0.0, "epochs in which the learning rate rises linearly to --lr", "N")
    attention_lr: float = option(1.0, "learning rate of attention, as a multiple of --lr", "FACTOR")
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes", "SHARE")
    mixup: float = option(0.0, "mixup, with the share drawn from Beta(A, A); 0: off", "A")
    cutmix: float = option(0.0, "CutMix, with the share drawn from Beta(A, A); 0: off", "A")
    ema: float = option(
        0.0, "decay of an exponential moving average of the weights, which is evaluated; 0: off", "DECAY"
    )
    nonfinite: str = option("stop", f"what to do at a NaN or infinite loss: {' or '.join(NONFINITE)}", "WHAT")
    size: int | None = option(
        None,
        "side of the images, in pixels (chosen from an image folder); for a detector the shorter side",
        "PIXELS",
    )
    exif: bool = option(
        True, "rotate images as their EXIF says; torchvision's folders, and most published numbers, do not"
    )
    augment: str | None = option(None, f"for detectors: {', '.join(AUGMENTATIONS)}", "NAME")
    regions: int | None = option(
        None,
        "with fasterrcnn: train the second stage on N regions per image, and test on 2 N (without: 512 and "
        "1000; fasterrcnn_c4: 128 and 300)",
        "N",
    )
    limit: int | None = option(None, "use only about N training and N validation images", "N")
    seed: int = option(0, "seed of the weights, the order and the augmentation", "N")
    pretrained: str | None = option(
        None,
        "start from these weights, of a network with or without attention: a file, a run, or a folder of "
        "save_pretrained; a recipe from scratch then uses a tenth of its learning rate",
        "FILE",
    )
    start: str | None = option(
        None,
        "how attention starts: paper, initialised as in the authors' code, or identity, multiplying by one "
        "(default: paper; identity with --pretrained)",
        "paper|identity",
    )
    freeze_norm: bool = option(
        False,
        "for a detector with --pretrained: freeze its BatchNorms as the file has them, except attention's",
    )
    precision: str = option("fp32", f"one of {', '.join(PRECISIONS)}", "NAME")
    compile: bool = option(False, "run the network through torch.compile")
    sync_bn: bool = option(False, "BatchNorm over the images of all GPUs")
    device: str = option("auto", "auto, cpu or cuda", "NAME")
    devices: int = option(1, "processes on this machine, one GPU each; they share every batch", "N")
    nodes: int = option(1, "number of machines; start the command on each, with torchrun or srun", "N")
    accumulate: int = option(1, "compute every step in N parts, which takes less memory", "N")
    workers: int = option(0, "processes that load images", "N")
    save_every: int | None = option(None, "also save every N steps, not only after each epoch", "N")
    log_every: int = option(50, "write a line of metrics every N steps", "N")
    keep: int = option(3, "how many checkpoints to keep", "N")
    loggers: tuple[str, ...] = option(
        ("csv", "tensorboard"), f"where metrics go besides metrics.jsonl: {', '.join(LOGGERS)}", "NAME"
    )

    def __post_init__(self) -> None:
        for name in ("loggers", "milestones"):
            if isinstance(value := getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(value))
        problems = [text for good, text in self._rules() if not good]
        try:
            self.training()
        except ConfigError as error:
            problems.append(str(error).removeprefix("bad recipe: "))
        if problems:
            raise ConfigError("; ".join(problems))

    def _rules(self):
        for name in ("size", "limit", "regions", "save_every", "log_every", "keep", "devices", "nodes"):
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            good = (value is None and optional) or (type(value) is int and value > 0)
            yield good, f"{name} must be a whole number above 0, got {value!r}"
        for name, most in (("seed", 2**32 - 1), ("workers", 1024)):
            value = getattr(self, name)
            yield type(value) is int and 0 <= value <= most, f"{name} must be 0 to {most}, got {value!r}"
        yield self.device in ("auto", "cpu", "cuda"), f"device must be auto, cpu or cuda, got {self.device!r}"
        yield self.start in (None, *STARTS), f"start must be {' or '.join(STARTS)}, got {self.start!r}"
        good = isinstance(self.model, str) and self.model != ""
        yield good, f"model must be the name of a network, got {self.model!r}"
        for name in self.loggers:
            yield name in LOGGERS, f"loggers must be of {', '.join(LOGGERS)}, got {name!r}"
        yield from self._rules_of_task()
        yield type(self.exif) is bool, f"exif must be true or false, got {self.exif!r}"
        if self.recipe == "digits":
            yield self.data is None, "the recipe digits makes its own images; for DATA use the recipe folder"
            yield self.size is None, "size belongs to an image folder, and no DATA is given"

    def _rules_of_task(self):
        if not self.detects:
            for name in ("augment", "regions"):
                yield getattr(self, name) is None, f"{name} is for detectors: the recipes {DETECT}..."
            yield not self.freeze_norm, f"freeze_norm is for detectors: the recipes {DETECT}..."
            return
        good = self.augment in AUGMENTATIONS
        yield good, f"augment must be one of {', '.join(AUGMENTATIONS)}, got {self.augment!r}"
        for name in ("label_smoothing", "mixup", "cutmix", "compile"):
            yield not getattr(self, name), f"{name} is not for detectors"
        yield self.exif, "boxes refer to images rotated as their EXIF says: exif cannot be turned off"

    @property
    def detects(self) -> bool:
        """Whether the run trains a detector."""
        return self.recipe.startswith(DETECT)

    def settled(self) -> "Config":
        """The same settings, with the default start of attention filled in."""
        if self.start or not isinstance(self.model, str) or "+" not in self.model:
            return self
        return replace(self, start="identity" if self.pretrained else "paper")

    def training(self) -> Recipe:
        """The part of the settings that the training loop needs."""
        return Recipe(**{item.name: getattr(self, item.name) for item in fields(Recipe)})

    @classmethod
    def names(cls) -> list[str]:
        """The names of all settings."""
        return [item.name for item in fields(cls)]


# May change when a run is resumed: where and how fast it runs, not what it computes.
FREE = (
    *("data", "device", "devices", "nodes", "accumulate", "workers", "compile"),
    *("save_every", "log_every", "keep", "loggers"),
)
# May change when it is resumed with --override.
OVERRIDABLE = (
    *("epochs", "lr", "momentum", "weight_decay", "schedule", "step_epochs", "milestones", "warmup_epochs"),
    *("label_smoothing", "mixup", "cutmix", "nonfinite"),
)


def digits() -> Config:
    """Handwritten digits in clutter, made on the spot: minutes on two CPU cores."""
    return Config("digits", epochs=16, batch_size=32)


def folder() -> Config:
    """An image folder of your own, from scratch or with --pretrained FILE."""
    return Config("folder", model="resnet18+cbam")


def imagenette() -> Config:
    """Imagenette, ten classes of ImageNet, from scratch."""
    return Config("imagenette", model="resnet18+cbam", epochs=40, batch_size=128, lr=0.1, warmup_epochs=2)


def imagenet_paper() -> Config:
    """ImageNet-1k as in the paper: 90 epochs, learning rate 0.1 divided by 10 every 30."""
    return Config(
        "imagenet/paper", model="resnet50+cbam", epochs=90, batch_size=256, lr=0.1, schedule="step", size=224,
        save_every=1000,
    )  # fmt: skip


def imagenet_modern() -> Config:
    """ImageNet-1k with newer methods: cosine, warm-up, label smoothing, mixup and CutMix, EMA, bf16."""
    return Config(
        "imagenet/modern", model="resnet50+cbam", epochs=100, batch_size=1024, lr=0.5, weight_decay=2e-5,
        decay_matrices_only=True, warmup_epochs=5, label_smoothing=0.1, mixup=0.2, cutmix=1.0, ema=0.9999,
        precision="bf16", compile=True, size=224, save_every=500,
    )  # fmt: skip


def imagenet_finetune() -> Config:
    """Attention in a trained network (--pretrained FILE): identity start, gates at ten times the rate."""
    return Config(
        FINE_TUNING, model="resnet50+cbam", epochs=15, batch_size=256, lr=0.005, warmup_epochs=0.5,
        attention_lr=10.0, precision="bf16", size=224, save_every=1000,
    )  # fmt: skip


def detect_coco() -> Config:
    """COCO, Faster R-CNN without a pyramid, as for table 6; schedule of torchvision's reference."""
    return Config(
        "detect/coco", model="fasterrcnn_c4:resnet50+cbam", augment="flip", epochs=26, batch_size=16, lr=0.02,
        schedule="step", milestones=(16, 22), warmup_epochs=0.14, freeze_norm=True, save_every=1000,
    )  # fmt: skip


def detect_voc() -> Config:
    """Pascal VOC, 07+12 trainval and the test of 07, StairNet as in table 7: SSD's 120,000 steps."""
    return Config(
        "detect/voc", model="stairnet300:vgg16+cbam", augment="ssd", epochs=232, batch_size=32, lr=0.001,
        weight_decay=5e-4, schedule="step", milestones=(155, 193), save_every=1000,
    )  # fmt: skip


def detect_short() -> Config:
    """A few hundred images with boxes: half-cosine schedule over 40 epochs."""
    return Config(
        "detect/short", model="fasterrcnn:resnet18+cbam", augment="flip", epochs=40, batch_size=8, lr=0.01,
        warmup_epochs=1, freeze_norm=True,
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "folder": folder,
    "imagenette": imagenette,
    "imagenet/paper": imagenet_paper,
    "imagenet/modern": imagenet_modern,
    FINE_TUNING: imagenet_finetune,
    "detect/coco": detect_coco,
    "detect/voc": detect_voc,
    "detect/short": detect_short,
}


def fine_tuning_rate(name: str, given: dict[str, Any]) -> float | None:
    """A tenth of a from-scratch recipe's learning rate, for a run that starts from pretrained weights.

    As in `cbam compare`, and common in fine-tuning; None if `given` has a rate, or the recipe's stays.
    """
    scratch = name != FINE_TUNING and not name.startswith(DETECT)
    return recipe(name).lr / 10 if scratch and given.get("pretrained") and "lr" not in given else None


def recipe(name: str) -> Config:
    """The settings of the recipe `name`.

    Raises:
        ConfigError: there is no such recipe; the message suggests the nearest name.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1, 0.0)
        raise ConfigError(f"unknown recipe {name!r}; did you mean {near[0]!r}? see `cbam recipes`")
    return RECIPES[name]()


def full_path(data: str | os.PathLike) -> str:
    """The absolute path of DATA, as stored in the settings of a run."""
    return str(Path(data).absolute())


def changes(
    before: dict[str, Any], now: dict[str, Any], *, override: bool = False
) -> tuple[list[str], list[str]]:
    """How the settings of a resumed run differ: the refused changes, and the allowed ones."""
    allowed = FREE + (OVERRIDABLE if override else ())
    diff = {
        name: f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if now[name] != before.get(name)
    }
    refused = [line for name, line in diff.items() if name not in allowed]
    return refused, [line for name, line in diff.items() if name in allowed]
