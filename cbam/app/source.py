"""A network given on the command line by its name, or by the file or folder with its weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cbam import hub
from cbam.data import cluttered_digits
from cbam.data.digits import NAME
from cbam.data.pictures import short_side
from cbam.errors import CheckpointNotFoundError, ConfigError, OtherClassesError
from cbam.hub.card import read_config
from cbam.hub.folder import CONFIG
from cbam.models import build
from cbam.surgery import load_weights
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.folder import epochs, settings_in
from cbam.train.material import load_trained, ours, settings_of, unnamed
from cbam.train.recipes import Config

_OUTPUTS = 1000
_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar")
_OF_RUN = ("recipe", "model", "data", "limit", "size", "seed", "start", "pretrained")  # unchanged on resuming
_RESULTS = {  # key in metrics.jsonl -> title
    "val_top1": "top-1 error, %",
    "val_top5": "top-5 error, %",
    "val_loss": "validation loss",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A network and its metadata.

    Attributes:
        description: where it comes from, in words.
        name: its name for `cbam.build`; empty for a user's own architecture.
        card: classes, size, normalisation; for a run also how it was trained, and the results.
        normalised: whether mean and standard deviation are known; if not, the card has ImageNet's.
    """

    network: nn.Module
    description: str
    name: str
    card: hub.Card
    normalised: bool = True

    def about(self, size: int) -> dict[str, Any]:
        """The metadata of an exported file for images of `size`.

        Unknown entries are left out, such as resize and crop if `size` is not the card's.
        """
        card = self.card
        metadata: dict[str, Any] = {"network": self.name, "classes": card.classes}
        if self.normalised:
            metadata |= {"mean": card.mean, "std": card.std}
        if card.resize and size == card.size:
            metadata |= {"resize": card.resize, "crop": size}
        return {name: value for name, value in metadata.items() if value}


def source(
    named: str,
    model: str | None,
    outputs: int | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """Load a network from a name of `cbam list`, a folder of `save_pretrained`, a run, or a weights file.

    Args:
        named: the name of the network, or the path of its weights.
        model: the network of a weights file, which does not record it.
        outputs: number of classes, for a name or a weights file; 1000 by default.
        mean, std: normalisation with which a weights file was trained, per channel; ImageNet's by default.

    Raises:
        ConfigError: inconsistent arguments. CheckpointError: the file does not match the network.
    """
    path = Path(named)
    if not path.exists():
        if "/" in named or path.suffix in _FILES:
            raise CheckpointNotFoundError(f"{named}: no such file")
        if model is not None:
            raise ConfigError(f"{named}: no such file, and --model needs a weights file")
        net = build(named, num_classes=outputs or _OUTPUTS)
        card = normalised(hub.Card(), mean, std)
        return Source(net, f"{named}, untrained weights", named, card, mean is not None)
    if path.is_dir() or checkpoint.is_ours(path):
        if model is not None or outputs is not None:
            raise ConfigError(f"{named} names its own network: omit --model and --num-classes")
        refuse_normalisation(path, mean, std)
        return _published(path) if hub.is_published(path) else _run(path)
    if model is None:
        raise unnamed(path)
    net = build(model, num_classes=outputs or _OUTPUTS)
    try:
        load_trained(net, path, model, path)
    except OtherClassesError as error:
        raise error.advising(f"give --num-classes {error.classes}") from None
    card = normalised(hub.Card(), mean, std, net, model)
    return Source(net, f"{model}, weights of {path}", model, card, mean is not None)


def normalised(
    card: hub.Card,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    network: nn.Module | None = None,
    name: str = "",
) -> hub.Card:
    """The card with this mean and standard deviation, if given.

    Args:
        network, name: the network of a weights file, which does not record its normalisation.

    Raises:
        ConfigError: only one of the two is given; or neither, and timm lists other values for this network
            than the card, since the file may be from timm or from `cbam train`.
    """
    if (mean is None) != (std is None):
        raise ConfigError("give --mean and --std together")
    if mean is not None and std is not None:
        return replace(card, mean=tuple(mean), std=tuple(std))
    known = getattr(network, "pretrained_cfg", None) or {}
    own, theirs = (card.mean, card.std), tuple(tuple(known.get(key, ())) for key in ("mean", "std"))
    if all(theirs) and theirs != own:
        ways = [f"--mean {_spaced(m)} --std {_spaced(s)}" for m, s in (theirs, own)]
        raise ConfigError(
            f"a weights file of {name} does not record its normalisation: give {ways[0]} for timm's weights, "
            f"{ways[1]} for those of `cbam train`"
        )
    return card


def refuse_normalisation(path: Path, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raise if mean or std is given for a run or folder of save_pretrained, which record theirs."""
    if mean is not None or std is not None:
        raise ConfigError(f"{path} records its normalisation: omit --mean and --std")


def _spaced(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _published(folder: Path) -> Source:
    network, card = read_config(folder / CONFIG)
    return Source(hub.from_pretrained(folder), f"weights of {folder}", network.name, card)


def _run(path: Path) -> Source:
    state = ours(path)
    config = settings_of(state)
    if config.detects:
        raise ConfigError(
            f"{path} holds a detector, {config.model}; expected a classifier (`cbam look` has --detect)"
        )
    net = build(config.model, num_classes=len(state["data"]["classes"]))
    load_weights(net, average_of(state))
    card = _card(state, config, _metrics(state, path if path.is_dir() else path.parent))
    return Source(net, f"{config.model}, weights of {path}", config.model, card)


def _metrics(state: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The epochs recorded in a folder, if it is the folder of this run; otherwise an empty list."""
    by_epoch = {entry["epoch"]: entry for entry in epochs(folder)}
    for entry in state["history"]:
        known = by_epoch.get(entry["epoch"], {})
        if any(known[name] != value for name, value in entry.items() if name in known):
            return []
    began, settings = state["config"], settings_in(folder)
    same = all(began.get(name) == settings[name] for name in _OF_RUN if name in settings)
    return [*by_epoch.values()] if same else []


def _card(state: dict[str, Any], config: Config, metrics: list[dict[str, Any]]) -> hub.Card:
    """The card of a run's checkpoint, with the metrics of exactly these weights if they were validated."""
    data = state["data"]
    own: dict[str, Any] = {"resize": short_side(data["size"])}
    if config.data is None:
        _, val = cluttered_digits()
        own = {"mean": val.mean, "std": val.std, "resize": val.size}
    found = next((entry for entry in metrics if entry.get("step") == state["step"]), {})
    return hub.Card(
        classes=tuple(data["classes"]),
        size=data["size"],
        exif=config.exif,
        data=Path(config.data).name if config.data else NAME,
        pictures={name: data[name] for name in ("training", "validation", "names") if name in data},
        recipe=_recipe(config),
        results={title: found[key] for key, title in _RESULTS.items() if found.get(key) is not None},
        about=_about(state, config),
        **own,
    )


def _about(state: dict[str, Any], config: Config) -> str:
    data = state["data"]
    done = state["epoch"] + state["seen"]["step"] / state["steps_per_epoch"]
    lines = [
        f"Trained by `cbam train {config.recipe}`, {done:.4g} of {config.epochs} epochs, on "
        f"{data['training']} images; {data['validation']} validated it."
    ]
    if not config.exif:
        lines.append("Its images were taken as they are stored, not turned as their EXIF says.")
    if versions := state.get("versions"):
        lines.append(f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    return " ".join(lines)


def _recipe(config: Config) -> dict[str, Any]:
    """The settings of the training, without those that were off."""
    training = {name: value for name, value in asdict(config.training()).items() if value}
    if config.schedule != "step" or config.milestones:
        del training["step_epochs"]
    del training["nonfinite"]
    begun = {"pretrained": Path(config.pretrained).name} if config.pretrained else {}
    start = {"attention's start": config.start} if config.start else {}
    return {"name": config.recipe, **training, **begun, **start, "seed": config.seed}
