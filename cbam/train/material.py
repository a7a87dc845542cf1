"""What the settings of a run refer to: its images, its network and its checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cbam import hub
from cbam.data import BoxedImages, Images, boxed_folder, cluttered_digits, digest_of_names, picture_set
from cbam.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cbam.hub.card import read_config
from cbam.hub.folder import CONFIG, WEIGHTS
from cbam.models import build, freeze_norm
from cbam.surgery import attached, load_weights
from cbam.surgery.checkpoint import read
from cbam.surgery.effects import seeded
from cbam.surgery.weights import Loaded
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.detector import load_initial_weights, make_detector
from cbam.train.recipes import Config


def pictures(config: Config) -> tuple[Images, Images] | tuple[BoxedImages, BoxedImages]:
    """The training and validation sets."""
    if config.detects:
        return _boxed(config)
    if config.data is None:
        sets = cluttered_digits()
    else:
        sets = picture_set(config.data, size=config.size, exif=config.exif)
    if config.limit:
        train, val = (images.subset(min(config.limit, len(images))) for images in sets)
        return train, val
    return sets


def about(train: Images | BoxedImages, val: Images | BoxedImages) -> dict[str, Any]:
    """What identifies a data set, independent of its path."""
    return {
        "classes": train.classes, "training": len(train), "validation": len(val), "size": train.size,
        "names": digest_of_names(train, val),
        **{f"{s} objects": part.digest() for s, part in (("training", train), ("validation", val))
           if isinstance(part, BoxedImages)},
    }  # fmt: skip


def _boxed(config: Config) -> tuple[BoxedImages, BoxedImages]:
    if config.data is None:
        raise ConfigError(f"the recipe {config.recipe} needs DATA, a folder of COCO or Pascal VOC")
    train, val = boxed_folder(config.data)
    if config.limit:
        train, val = train.subset(config.limit), val.subset(config.limit)
    if not val.scored:
        val.notes.append("no validation image has an object to score, so AP is unknown (-)")
    return train.augmented(config.augment or "none"), val


def network(
    config: Config, classes: int, *, loaded: bool = False, say: Callable[[str], None] = lambda _: None
) -> nn.Module:
    """The network of a run, initialised by its seed, with its pretrained weights unless `loaded` later.

    `say` reports what it starts from.
    """
    start = config.settled().start or "paper"
    with seeded(config.seed):
        if config.detects:
            model = make_detector(
                config.model, classes, start=start, size=config.size, regions=config.regions
            )
        else:
            model = build(config.model, num_classes=classes, start=start)
    if not loaded and (description := _load_initial(model, config, start)):
        say(description)
    if config.freeze_norm and config.pretrained:  # from scratch there are no statistics to keep
        freeze_norm(model)
    return model


def _load_initial(model: nn.Module, config: Config, start: str) -> str:
    """Load the pretrained weights; return a description of what the network starts from."""
    places, parts, with_attention = len(attached(model)), [], False
    if config.pretrained:
        try:
            found, inside = load_initial_weights(model, config.model, weights_from(config.pretrained))
        except CheckpointError as misfit:
            raise with_path(config.pretrained, misfit) from None
        parts.append(taken(config.pretrained, found) + (" into the detector's backbone" if inside else ""))
        with_attention = found.format != "plain"
    if places:
        parts.append(f"attention at {places} places {_STARTS['file' if with_attention else start]}")
    return "; ".join(parts)


_STARTS = {
    "file": "as in the file",
    "paper": "initialised as in the paper (--start identity: multiplying by one)",
    "identity": "starts as the identity, multiplying by one",
}


def taken(path: str, loaded: Loaded) -> str:
    """A description of what was loaded from a file, a run or a folder."""
    head = "; its last layer is left out, as it is for other classes" if loaded.head_skipped else ""
    return f"weights of {path}: {loaded.tensors} tensors loaded{head}"


def weights_from(path: str) -> str | dict[str, Tensor]:
    """The argument for `load_weights`, from a weights file, a run, a checkpoint or a published folder.

    For a run that keeps an average of its weights it is the average, which the run was validated with.
    """
    where = Path(path)
    if hub.is_published(where):
        return str(where / WEIGHTS)
    if where.is_dir() or checkpoint.is_ours(where):
        return average_of(ours(where))
    return path


def load_trained(model: nn.Module, source: Path | dict[str, Tensor], name: str, where: Path) -> None:
    """Load weights from `where` into the network `name`, to be used without further training.

    Raises:
        CheckpointError: they do not fit, or have no attention, which would be untrained.
    """
    if load_weights(model, source).missing:
        raise CheckpointError(
            f"{where} has no attention weights, so the attention of {name} would be untrained: "
            f"give --model {name.partition('+')[0]}, or the weights of {name}"
        )


def unnamed(path: Path) -> ConfigError:
    """The error for a weights file, which does not record its network.

    Raises:
        CheckpointError: it is not a weights file, or damaged.
    """
    read(path)
    return ConfigError(f"{path} does not record its network: give --model NAME, see `cbam list`")


def with_path(path: str, misfit: CheckpointError) -> CheckpointError:
    """The error with the path of the weights; for a state dict read from a run it has none yet."""
    message = str(misfit)
    return misfit if path in message else CheckpointError(f"{path}: {message}")


def network_name(path: str) -> str:
    """The name of the network that the weights are of; "" for a weights file, which does not record it."""
    where = Path(path)
    if hub.is_published(where):
        return read_config(where / CONFIG)[0].name
    if where.is_dir() or checkpoint.is_ours(where):
        return settings_of(ours(where)).model
    return ""


def settings_of(state: dict[str, Any]) -> Config:
    """The settings that a checkpoint's run began with.

    Raises:
        CheckpointError: some of them are unknown to this version.
    """
    unknown = [name for name in state["config"] if name not in Config.names()]
    if unknown:
        raise CheckpointError(
            f"the checkpoint has settings that this cbam does not know ({', '.join(unknown)}); upgrade cbam"
        )
    return Config(**state["config"]).settled()  # runs of older versions do not record the start of attention


def ours(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint of `cbam train`, or of the newest valid one in a folder."""
    return found_at(path, lambda _: None)[1]


def found_at(path: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The same with its file; `say` reports damaged ones that are skipped.

    Raises:
        CheckpointNotFoundError: there is none. CheckpointError: it is damaged, or not from `cbam train`.
    """
    found = checkpoint.newest(path, say) if path.is_dir() else (path, checkpoint.load(path))
    if found is None:
        raise CheckpointNotFoundError(f"{path}: no checkpoint in this folder")
    file, state = found
    if absent := {"config", "data", "model", "seen"} - state.keys():
        raise CheckpointError(f"{file}: not a checkpoint of cbam train, it lacks {', '.join(sorted(absent))}")
    return file, state
