"""`cbam look --detect`: load detectors from files, run them on images, and draw the figures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cbam.app.look import ROWS, Outcome, image_files, output_folder
from cbam.app.networks import lines_of, named
from cbam.data import decode
from cbam.data.decode import shown
from cbam.errors import CheckpointError, CheckpointNotFoundError, ConfigError, DataError
from cbam.explain.detecting import Detection, Detectors, Finds, detect
from cbam.explain.outlines import detection_figure
from cbam.models.detectors import DETECTORS
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.detector import make_detector
from cbam.train.material import load_trained, ours, settings_of

LISTED = 5  # boxes listed per line
FIGURES = r"detect(-\d+)?\.(png|svg)"


@dataclass(frozen=True)
class DetectRequest:
    """What to detect, and how.

    Attributes:
        paths: images, and folders of images.
        out: the output folder of the figures.
        box, threshold, method, layer: as in `detect`.
    """

    paths: Sequence[Path]
    out: Path
    box: int = 1
    threshold: float = 0.5
    method: str = "layercam"
    layer: str | None = None


def detectors(
    model: str | None, weights: str | None, compare: list[str], classes: str | None, size: int | None
) -> Detectors:
    """Load one detector with its weights, or several to compare.

    Args:
        model: a detector of `cbam.models.detector`; not needed for a checkpoint of `cbam train`.
        weights: its weights file.
        compare: NAME=FILE each. If a file does not name its detector, NAME "plain" means `model`, and any
            other NAME means `model` with that attention.
        classes: a file with one class name per line, in the order of the labels from 1; by default those of
            the checkpoint.
        size: shorter side of the input in pixels; by default that of the checkpoint, or torchvision's.

    Raises:
        ConfigError: inconsistent arguments. CheckpointError: a file does not match its detector.
    """
    if weights is not None and compare:
        raise ConfigError("give --weights FILE or --compare NAME=FILE ..., not both")
    if weights is None and not compare:
        raise ConfigError(
            "--detect needs a trained detector: --model fasterrcnn:resnet50 --weights FILE, or --compare"
        )
    names = lines_of(classes) if classes else None
    parts = [named(text) for text in compare] if compare else [("detector", weights or "")]
    if len({label for label, _ in parts}) < len(parts):
        raise ConfigError("--compare: each detector needs a different name")
    loaded = {label: _load(label, Path(file), model, names, size, bool(compare)) for label, file in parts}
    known = [own for _, _, own in loaded.values()]
    if any(own != known[0] for own in known):
        raise ConfigError("--compare: the detectors were trained on different classes")
    about = [f"{label}: {description}" for label, (description, _, _) in loaded.items()]
    return Detectors({label: net for label, (_, net, _) in loaded.items()}, known[0], about)


def look_for_objects(models: Detectors, request: DetectRequest, say: Callable[[str], None]) -> Outcome:
    """Run the detectors on every image and draw one row each; unreadable images are reported and skipped.

    Raises:
        DataError: there are no images, or none can be read.
        ConfigError: no image has as many boxes as `request.box`.
        OutputError: the figures cannot be written.
    """
    files = image_files(request.paths)
    outcome = Outcome([], [])
    pending: list[tuple[str, list[Detection]]] = []  # figures held back until some image has the box
    most = 0 if request.box > 1 else 1
    with output_folder(request.out):
        for number, start in enumerate(range(0, len(files), ROWS), 1):
            rows = list(_detections(models, files[start : start + ROWS], request, outcome, say))
            most = max([most, *(len(one.boxes) for row in rows for one in row.finds)])
            pending.append(("detect" if len(files) <= ROWS else f"detect-{number}", rows))
            if most >= request.box:
                _draw(pending, request.out, outcome)
        if not outcome.processed:
            raise DataError(f"no image can be read ({len(files)} tried)")
        if most < request.box:
            raise ConfigError(f"--box {request.box}: no image has more than {most} boxes above --threshold")
    return outcome


def _draw(pending: list[tuple[str, list[Detection]]], out: Path, outcome: Outcome) -> None:
    """Draw these figures, each a name and its rows, and empty the list."""
    while pending:
        name, rows = pending.pop(0)
        for ending in (".png", ".svg") if rows else ():
            outcome.figures.append(detection_figure(rows, out / (name + ending)))


def _detections(
    models: Detectors,
    files: Sequence[Path],
    request: DetectRequest,
    outcome: Outcome,
    say: Callable[[str], None],
) -> Iterator[Detection]:
    how = {
        "box": request.box,
        "threshold": request.threshold,
        "method": request.method,
        "layer": request.layer,
    }
    for path in files:
        try:
            seen = detect(models, decode(path), shown(path.name), **how)
        except DataError as error:
            outcome.unreadable.append(str(error))
            say(f"left out: {error}")
            continue
        outcome.processed += 1
        say(f"{shown(path)}: " + "; ".join(_summary(seen, one) for one in seen.finds))
        yield seen


def _summary(seen: Detection, one: Finds) -> str:
    boxes = [
        f"{seen.class_of(label)} {float(score):.2f}"
        for label, score in zip(one.labels[:LISTED], one.scores[:LISTED], strict=True)
    ]
    more = [f"{len(one.boxes) - LISTED} more"] if len(one.boxes) > LISTED else []
    return f"{one.network} finds {', '.join(boxes + more) or 'nothing'}"


def _run_of(file: Path) -> dict[str, Any] | None:
    """The contents of a checkpoint of `cbam train`, or of the newest in a folder; None for other files."""
    if not file.exists():
        raise CheckpointNotFoundError(f"{file}: no such file")
    return ours(file) if file.is_dir() or checkpoint.is_ours(file) else None


def _load(
    label: str, file: Path, model: str | None, names: list[str] | None, size: int | None, arms: bool
) -> tuple[str, nn.Module, list[str]]:
    """A description, the detector, and its classes."""
    state = _run_of(file)
    if state is None:
        if model is None:
            raise ConfigError(f"{file} does not name its detector: give --model, such as fasterrcnn:resnet50")
        if names is None:
            raise ConfigError(f"{file} does not name its classes: give --classes FILE, one name per line")
        name, weights, known = f"{model}+{label}" if arms and label != "plain" else model, file, names
        regions = None
    else:
        config = settings_of(state)
        name, weights = config.model, average_of(state)
        if name.partition(":")[0] not in DETECTORS:
            raise ConfigError(f"{file} holds a classifier, {name}: omit --detect")
        own = list(state["data"]["classes"])
        if names is not None and len(names) != len(own):
            raise ConfigError(
                f"--classes has {len(names)} names, but the number of classes in {file} is {len(own)}; "
                "omit it to use the names from training"
            )
        known, size, regions = names or own, size or config.size, config.regions
    net = make_detector(name, len(known), start="paper", size=size, regions=regions)
    try:
        load_trained(net, weights, name, file)
    except CheckpointError as misfit:
        if state is None:
            raise CheckpointError(f"{misfit}; --classes has {len(known)} names: is that right?") from None
        raise
    return f"{name}, weights of {file}", net.eval(), known
