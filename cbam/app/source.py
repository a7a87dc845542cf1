"""A network as the command line names it: by name, or by the file or folder that holds its weights."""

from dataclasses import asdict, dataclass
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
from cbam.train.folder import epochs
from cbam.train.material import began_with, ours
from cbam.train.recipes import Config

_OUTPUTS = 1000
_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar")
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
    """

    network: nn.Module
    told: str
    name: str
    card: hub.Card

    def about(self, size: int) -> dict[str, Any]:
        """What the file of another runtime, for pictures of `size`, tells by name.

        What is not known is left out: how pictures are brought to another size than the card's, too.
        """
        card = self.card
        told = {"network": self.name, "mean": card.mean, "std": card.std, "classes": card.classes}
        if card.resize and size == card.size:
            told |= {"resize": card.resize, "crop": size}
        return {name: value for name, value in told.items() if value}


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
        net = build(named, num_classes=outputs or _OUTPUTS)
        return Source(net, f"{named}, untrained weights", named, hub.Card())
    if path.is_dir() or checkpoint.is_ours(path):
        if model is not None or outputs is not None:
            raise ConfigError(f"{named} says what network it is: leave --model and --num-classes out")
        return _published(path) if hub.is_published(path) else _run(path)
    if model is None:
        raise ConfigError(f"{named} does not say what network it is: give --model NAME, see `cbam list`")
    net = build(model, num_classes=outputs or _OUTPUTS)
    try:
        load_weights(net, path)
    except OtherClassesError as error:
        raise error.advising(f"give --num-classes {error.classes}") from None
    return Source(net, f"{model}, weights of {path}", model, hub.Card())


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
    card = _card(state, config, epochs(path if path.is_dir() else path.parent))
    return Source(net, f"{config.model}, weights of {path}", config.model, card)


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
        data=Path(config.data).name if config.data else NAME,
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
        f"{data['training']} pictures; {data['validation']} validated it."
    ]
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
