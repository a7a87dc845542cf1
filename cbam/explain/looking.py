"""One image, one or more networks: what each predicts, where it looks, and what its gates do.

Shapes: H x W pixels of the preprocessed image, h x w of a block's feature map.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cbam.data.pictures import short_side
from cbam.errors import ConfigError, InputError
from cbam.explain import pair
from cbam.explain.maps import gradcam
from cbam.explain.recording import Refinement, record
from cbam.explain.watching import check_images, explain_dtype_errors, logits_of
from cbam.surgery.effects import eval_mode

CBAM_NAME = "CBAM"


@dataclass(frozen=True, eq=False)
class Viewer:
    """Networks that take the same images, preprocessed in the same way.

    Attributes:
        networks: name -> network, all with the same K classes.
        classes: K names.
        about: one line per network that names its weights.
        size, resized: the shorter side of an image is resized to `resized`, and the central `size` pixels are
            cropped; None for 256 at a size of 224, and in proportion at other sizes.
        mean, std: normalisation per channel, for values in [0, 1].
        mode: interpolation, "bicubic" or "bilinear".

    Raises:
        InputError: `resized` is less than `size`.
    """

    networks: dict[str, nn.Module]
    classes: Sequence[str]
    about: Sequence[str] = ()
    size: int = pair.SIZE
    resized: int | None = None
    mean: Sequence[float] = pair.MEAN
    std: Sequence[float] = pair.STD
    mode: str = "bicubic"

    def __post_init__(self) -> None:
        pair.check_sides(self.size, self.side)

    @property
    def side(self) -> int:
        """The length to which the shorter side of an image is resized."""
        return short_side(self.size) if self.resized is None else self.resized

    def called(self, index: int) -> str:
        """The name of a class, with its number if the name is not unique."""
        return called(self.classes, index)

    def all_called(self) -> list[str]:
        """`called` for all classes at once; one by one, 20,000 classes take a quarter of a minute."""
        counts = Counter(self.classes)
        return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(self.classes)]

    def normalised(self, seen: Tensor) -> Tensor:
        """Normalise a preprocessed image, uint8 (..., 3, H, W) -> float."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (seen / 255 - mean) / std

    def view(self, picture: Tensor) -> Tensor:
        """Resize and crop an image as the networks see it, uint8 (3, H, W) -> (3, size, size)."""
        return pair.view(picture, self.size, self.side, self.mode)

    def boxes_in_view(self, boxes: Sequence[Sequence[float]], height: int, width: int) -> list[list[float]]:
        """Boxes of a height x width image in the coordinates of its view; they may extend outside it."""
        side = min(height, width)
        scale, margin = self.side / side, (self.side - self.size) // 2
        left, top = (width - side) // 2, (height - side) // 2
        at = (left, top, left, top)
        return [[(v - o) * scale - margin for v, o in zip(box, at, strict=True)] for box in boxes]


@dataclass(frozen=True, eq=False)
class Glance:
    """The result of one network for one image."""

    network: str
    heat: Tensor  # (H, W) in [0, 1], the evidence for the target
    probability: float  # of the target
    best: str  # the most probable class, named by `Viewer.called`
    best_probability: float
    best_index: int


@dataclass(frozen=True, eq=False)
class Look:
    """The results of all networks of a `Viewer` for one image.

    Attributes:
        name: name of the image.
        image: uint8 (3, H, W), as the networks see it.
        target, index: the class whose evidence the maps show, named by `Viewer.called`, and its index.
        glances: one per network.
        method: how the maps were made, a key of `maps.METHODS`.
        blocks: network -> block -> recorded gates, one sample each; only blocks with gates.
    """

    name: str
    image: Tensor
    target: str
    index: int
    glances: tuple[Glance, ...]
    method: str = "gradcam"
    blocks: dict[str, dict[str, Refinement]] = field(default_factory=dict)


def default_viewer() -> Viewer:
    """The default pair of networks, plain and with CBAM, with the classes of ImageNet.

    Raises:
        MissingExtraError: timm or the package with the weights is not installed.
        CheckpointError: weights are missing or do not match the network.
    """
    known = pair.gates_record()
    return Viewer(
        {"plain": pair.plain_network(), CBAM_NAME: pair.refined_network()},
        pair.class_names(),
        about=(
            f"plain: EfficientNet-Lite0, ImageNet weights of {pair.PACKAGE}",
            f"{CBAM_NAME}: the same, base frozen, with gates trained on {known['pictures']['train']} "
            f"photographs of {len(known['classes'])} classes ({pair.GATES.name}, in the package)",
        ),
    )


def look(
    viewer: Viewer,
    picture: Tensor,
    name: str = "",
    *,
    target: int | None = None,
    method: str = "gradcam",
    layer: str | None = None,
) -> Look:
    """Run every network of `viewer` on an image, and map the evidence of each for the same class.

    Args:
        picture: uint8 (3, H, W), of any size.
        name: name of the image, for captions.
        target: the class to show the evidence for; by default the first network's prediction.
        method, layer: as in `gradcam`.

    Raises:
        InputError: not such an image, or no such class.
        ConfigError, DtypeError, NonFiniteError: as in `gradcam`.
    """
    return look_at_view(viewer, viewer.view(picture), name, target=target, method=method, layer=layer)


def look_at_view(
    viewer: Viewer,
    seen: Tensor,
    name: str = "",
    *,
    target: int | None = None,
    method: str = "gradcam",
    layer: str | None = None,
) -> Look:
    """`look` for an image that `viewer.view` has preprocessed."""
    if target is not None and not 0 <= target < len(viewer.classes):
        raise InputError(f"target must be a class in 0..{len(viewer.classes) - 1}, got {target}")
    images = viewer.normalised(seen)[None]
    scores: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Refinement]] = {}
    for label, model in viewer.networks.items():
        check_images(images, model)
        with (
            torch.no_grad(),
            eval_mode(model),
            explain_dtype_errors(images, model),
            record(model) as recording,
        ):
            scores[label] = logits_of(model(images))[0].float().softmax(0)
        blocks[label] = {block: did for block, did in recording.items() if did.steps}
    for label, probabilities in scores.items():
        if len(probabilities) != len(viewer.classes):
            raise ConfigError(
                f"{label} has {len(probabilities)} classes, but there are {len(viewer.classes)} class names"
            )
    shown = int(next(iter(scores.values())).argmax()) if target is None else target
    glances = []
    for label, model in viewer.networks.items():
        heat = gradcam(model, images, shown, layer, method)[0]
        best = int(scores[label].argmax())
        glances.append(
            Glance(
                label,
                heat,
                float(scores[label][shown]),
                viewer.called(best),
                float(scores[label][best]),
                best,
            )
        )
    attended = {label: found for label, found in blocks.items() if found}
    return Look(name, seen, viewer.called(shown), shown, tuple(glances), method, attended)


def stages(blocks: dict[str, Refinement]) -> dict[str, Refinement]:
    """The last block for each shape of feature map, in the order in which they run."""
    last: dict[tuple[int, ...], str] = {}
    for name, block in blocks.items():
        last[tuple(block.before.shape[1:])] = name
    return {name: blocks[name] for name in sorted(last.values(), key=list(blocks).index)}


def called(classes: Sequence[str], index: int) -> str:
    """The name of a class, with its number if the name is not unique: "crane (517)"."""
    name = classes[index]
    return name if list(classes).count(name) == 1 else f"{name} ({index})"


def class_index(classes: Sequence[str], text: str) -> int:
    """Parse a class that the user gave by name, by number, or as both, "crane (517)".

    An exact match takes precedence over one that ignores case.

    Raises:
        ConfigError: no such class (the message suggests similar names), or an ambiguous one.
    """
    for index in map(int, re.findall(r" \(([0-9]{1,9})\)$", text)):
        if index < len(classes) and text == f"{classes[index]} ({index})":
            return index
    found = [index for index, name in enumerate(classes) if name == text]
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(classes):
        found = list(dict.fromkeys([*found, int(text)]))
    lowered = [name.lower() for name in classes]
    found = found or [index for index, name in enumerate(lowered) if name == text.lower()]
    if len(found) == 1:
        return found[0]
    if found:
        ways = " or ".join(repr(f"{classes[index]} ({index})") for index in found)
        raise ConfigError(f"{text!r} is ambiguous: give {ways}")
    near = difflib.get_close_matches(text.lower(), lowered, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a class name or 0 to {len(classes) - 1}"
    raise ConfigError(f"no class {text!r}; {hint}")
