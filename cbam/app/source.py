"""A network as the command line names it: by name, or by the file or folder that holds its weights."""

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
from cbam.train.material import began_with, load_trained, ours, unnamed
from cbam.train.recipes import Config

_OUTPUTS = 1000
_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar")
_OF_RUN = ("recipe", "model", "data", "limit", "size", "seed", "start", "pretrained")  # stay when it goes on
_RESULTS = {  # of metrics.jsonl, for a reader
    "val_top1": "top-1 error, %",
    "val_top5": "top-5 error, %",
    "val_loss": "validation loss",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A network, and what belongs to it.

    Attributes:
        told: where it came from, in words.
        name: what `cbam.build` makes it from; empty for a network of its author's own.
        card: classes, size, normalisation, and of a run how it was trained and what came out.
        normalised: whether mean and standard deviation are known; else the card has ImageNet's.
    """

    network: nn.Module
    told: str
    name: str
    card: hub.Card
    normalised: bool = True

    def about(self, size: int) -> dict[str, Any]:
        """What the file of another runtime, for images of `size`, tells by name.

        What is not known is left out: how images are brought to another size than the card's, too.
        """
        card = self.card
        told: dict[str, Any] = {"network": self.name, "classes": card.classes}
        if self.normalised:
            told |= {"mean": card.mean, "std": card.std}
        if card.resize and size == card.size:
            told |= {"resize": card.resize, "crop": size}
        return {name: value for name, value in told.items() if value}


def source(
    named: str,
    model: str | None,
    outputs: int | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """The network of a name of `cbam list`, a folder of `save_pretrained`, a run of `cbam train`, or weights.

    Args:
        named: of the network, or of what holds its weights.
        model: of a weights file, which does not say what network it is of.
        outputs: number of classes, of a name and of a weights file; 1000 by default.
        mean, std: that a weights file was trained with, per channel; ImageNet's by default.

    Raises:
        ConfigError: the names do not fit together. CheckpointError: the file does not.
    """
    path = Path(named)
    if not path.exists():
        if "/" in named or path.suffix in _FILES:
            raise CheckpointNotFoundError(f"{named}: no such file")
        if model is not None:
            raise ConfigError(f"{named}: no such file, and --model goes with one")
        net = build(named, num_classes=outputs or _OUTPUTS)
        card = normalised(hub.Card(), mean, std)
        return Source(net, f"{named}, untrained weights", named, card, mean is not None)
    if path.is_dir() or checkpoint.is_ours(path):
        if model is not None or outputs is not None:
            raise ConfigError(f"{named} says what network it is: leave --model and --num-classes out")
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
    """The card with this mean and standard deviation, where they are given.

    Args:
        network, name: of weights, which do not say how they were trained.

    Raises:
        ConfigError: one is given without the other; or none, and timm's weights of this network have others
            than the card: the file may be timm's, or of `cbam train`.
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
            f"weights of {name} do not say how images are normalised: give {ways[0]} for timm's own, "
            f"{ways[1]} for those of `cbam train`"
        )
    return card


def refuse_normalisation(path: Path, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Runs and folders of save_pretrained know theirs."""
    if mean is not None or std is not None:
        raise ConfigError(f"{path} says how images are normalised: leave --mean and --std out")


def _spaced(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _published(folder: Path) -> Source:
    network, card = read_config(folder / CONFIG)
    return Source(hub.from_pretrained(folder), f"weights of {folder}", network.name, card)


def _run(path: Path) -> Source:
    state = ours(path)
    config = began_with(state)
    if config.detects:
        raise ConfigError(
            f"{path} holds a detector, {config.model}, and a classifier is wanted (`cbam look` has --detect)"
        )
    net = build(config.model, num_classes=len(state["data"]["classes"]))
    load_weights(net, average_of(state))
    card = _card(state, config, _metrics(state, path if path.is_dir() else path.parent))
    return Source(net, f"{config.model}, weights of {path}", config.model, card)


def _metrics(state: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The epochs that a folder tells of, where it is the folder of that run and not of another."""
    told = {entry["epoch"]: entry for entry in epochs(folder)}
    for entry in state["history"]:
        known = told.get(entry["epoch"], {})
        if any(known[name] != value for name, value in entry.items() if name in known):
            return []
    began, settings = state["config"], settings_in(folder)
    same = all(began.get(name) == settings[name] for name in _OF_RUN if name in settings)
    return [*told.values()] if same else []


def _card(state: dict[str, Any], config: Config, metrics: list[dict[str, Any]]) -> hub.Card:
    """What the checkpoint of a run says, and the metrics of just these weights, if they were validated."""
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
        results={told: found[key] for key, told in _RESULTS.items() if found.get(key) is not None},
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
    """The settings that say how it was trained; what was off is left out."""
    training = {name: value for name, value in asdict(config.training()).items() if value}
    if config.schedule != "step" or config.milestones:
        del training["step_epochs"]
    del training["nonfinite"]
    begun = {"pretrained": Path(config.pretrained).name} if config.pretrained else {}
    start = {"attention's start": config.start} if config.start else {}
    return {"name": config.recipe, **training, **begun, **start, "seed": config.seed}
