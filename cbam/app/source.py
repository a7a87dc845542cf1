"""A network as the command line names it: by name, or by the file or folder that holds its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cbam import hub
from cbam.data import cluttered_digits
from cbam.data.images import IMAGENET_MEAN, IMAGENET_STD
from cbam.errors import CheckpointNotFoundError, ConfigError
from cbam.models import build
from cbam.surgery import load_weights
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.material import ours

_SIZE, _OUTPUTS = 224, 1000
_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar")


@dataclass(frozen=True, eq=False)
class Source:
    """A network, where it came from in words, and what belongs to it.

    Attributes:
        size: side of its pictures in pixels.
        about: "network", "mean", "std" and, where they are known, "classes".
    """

    network: nn.Module
    told: str
    size: int
    about: dict[str, Any]


def source(named: str, model: str | None, outputs: int | None) -> Source:
    """The network of a name of `cbam list`, a folder of `save_pretrained`, a run of `cbam train`, or weights.

    Args:
        named: of the network, or of what holds its weights.
        model: of a weights file, which does not say what network it is of.
        outputs: number of classes, of a name and of a weights file; 1000 by default.

    Raises:
        ConfigError: the names do not fit together. CheckpointError: the file does not.
    """
    path = Path(named)
    if not path.exists():
        if "/" in named or path.suffix in _FILES:
            raise CheckpointNotFoundError(f"{named}: no such file")
        if model is not None:
            raise ConfigError(f"{named}: no such file, and --model goes with one")
        return _fresh(named, outputs or _OUTPUTS)
    if path.is_dir() and (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        _refuse(named, model, outputs)
        return _published(path)
    if path.is_dir() or checkpoint.step_of(path) >= 0:
        _refuse(named, model, outputs)
        return _run(path)
    if model is None:
        raise ConfigError(f"{named} does not say what network it is: give --model NAME, see `cbam list`")
    net = build(model, num_classes=outputs or _OUTPUTS)
    load_weights(net, path)
    return Source(net, f"{model}, weights of {path}", _SIZE, _about(model))


def _refuse(named: str, model: str | None, outputs: int | None) -> None:
    if model is not None or outputs is not None:
        raise ConfigError(f"{named} says what network it is: leave --model and --num-classes out")


def _fresh(name: str, outputs: int) -> Source:
    net = build(name, num_classes=outputs)
    return Source(net, f"{name}, untrained weights", _SIZE, _about(name))


def _published(folder: Path) -> Source:
    card = hub.card_of(folder)
    about = {"mean": card.mean, "std": card.std, "classes": card.classes}
    return Source(hub.from_pretrained(folder), f"weights of {folder}", card.size, about)


def _run(path: Path) -> Source:
    state = ours(path)
    config, data = state["config"], state["data"]
    net = build(config["model"], num_classes=len(data["classes"]))
    load_weights(net, average_of(state))
    about = _about(config["model"]) | {"classes": data["classes"]}
    if config["data"] is None:
        _, val = cluttered_digits()
        about |= {"mean": val.mean, "std": val.std}
    return Source(net, f"{config['model']}, weights of {path}", data["size"], about)


def _about(name: str) -> dict[str, Any]:
    return {"network": name, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
