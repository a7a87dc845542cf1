"""One picture, one or several networks: what each says, what it looks at, and what its gates do.

Shapes: H x W pixels of the picture as the networks see it, h x w of a block's feature map.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError, InputError
from cbam.explain import pair
from cbam.explain.maps import gradcam
from cbam.explain.recording import Refinement, record
from cbam.explain.watching import eval_mode, logits_of

CBAM_NAME = "CBAM"


@dataclass(frozen=True, eq=False)
class Viewer:
    """Networks that see the same pictures in the same way.

    Attributes:
        networks: name -> network of K classes, all with the same ones.
        classes: K names.
        about: one line per network, which weights it has.
        size, resized: the shorter side of a picture becomes `resized`, its middle `size` pixels are seen.
        mean, std: per channel, of values in [0, 1].
        mode: how pictures are resized, "bicubic" or "bilinear".
    """

    networks: dict[str, nn.Module]
    classes: Sequence[str]
    about: Sequence[str] = ()
    size: int = pair.SIZE
    resized: int = pair.RESIZED
    mean: Sequence[float] = pair.MEAN
    std: Sequence[float] = pair.STD
    mode: str = "bicubic"

    def normalised(self, seen: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) -> float."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (seen / 255 - mean) / std

    def view(self, picture: Tensor) -> Tensor:
        """What the networks see of a picture, uint8 (3, size, size)."""
        return pair.view(picture, self.size, self.resized, self.mode)

    def boxes_in_view(self, boxes: Sequence[Sequence[float]], height: int, width: int) -> list[list[float]]:
        """Boxes of a picture of this height and width as they lie in its view; they may reach out of it."""
        side = min(height, width)
        scale, margin = self.resized / side, (self.resized - self.size) // 2
        left, top = (width - side) // 2, (height - side) // 2
        at = (left, top, left, top)
        return [[(v - o) * scale - margin for v, o in zip(box, at, strict=True)] for box in boxes]


@dataclass(frozen=True, eq=False)
class Glance:
    """What one network makes of one picture."""

    network: str
    heat: Tensor  # (H, W) in [0, 1]: where the evidence for the target lies
    probability: float  # of the target
    best: str  # the class it finds most probable
    best_probability: float


@dataclass(frozen=True, eq=False)
class Look:
    """One picture as all networks of a `Viewer` see it.

    Attributes:
        name: of the picture.
        image: uint8 (3, H, W), what the networks see.
        target: the class whose evidence the maps show.
        glances: one per network.
        method: what made the maps, a key of `maps.METHODS`.
        blocks: network -> block -> what its attention did, one sample each; attended blocks only.
    """

    name: str
    image: Tensor
    target: str
    glances: tuple[Glance, ...]
    method: str = "gradcam"
    blocks: dict[str, dict[str, Refinement]] = field(default_factory=dict)


def default_viewer() -> Viewer:
    """The default pair, plain and with CBAM, and the classes of ImageNet.

    Raises:
        MissingExtraError: timm or the package of the weights is not installed.
        CheckpointError: weights are missing or do not fit.
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
    """Look at a picture with every network of `viewer`; all show the evidence for the same class.

    Args:
        picture: uint8 (3, H, W), of any size.
        name: of the picture, for captions.
        target: the class to show the evidence for; by default the first network's prediction.
        method, layer: as in `gradcam`.

    Raises:
        InputError: not such a picture, or no such class.
        ConfigError, NonFiniteError: as in `gradcam`.
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
    """`look` for what `viewer.view` gave."""
    if target is not None and not 0 <= target < len(viewer.classes):
        raise InputError(f"target must be a class in 0..{len(viewer.classes) - 1}, got {target}")
    images = viewer.normalised(seen)[None]
    scores: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Refinement]] = {}
    for label, model in viewer.networks.items():
        with torch.no_grad(), eval_mode(model), record(model) as recording:
            scores[label] = logits_of(model(images))[0].float().softmax(0)
        blocks[label] = recording
    for label, probabilities in scores.items():
        if len(probabilities) != len(viewer.classes):
            raise ConfigError(
                f"{label} has {len(probabilities)} classes, there are {len(viewer.classes)} names"
            )
    shown = int(next(iter(scores.values())).argmax()) if target is None else target
    glances = []
    for label, model in viewer.networks.items():
        heat = gradcam(model, images, shown, layer, method)[0]
        best = int(scores[label].argmax())
        glances.append(
            Glance(label, heat, float(scores[label][shown]), viewer.classes[best], float(scores[label][best]))
        )
    attended = {label: found for label, found in blocks.items() if found}
    return Look(name, seen, viewer.classes[shown], tuple(glances), method, attended)


def stages(blocks: dict[str, Refinement]) -> dict[str, Refinement]:
    """The last block of each size of feature map, in the order in which they run."""
    last: dict[tuple[int, ...], str] = {}
    for name, block in blocks.items():
        last[tuple(block.before.shape[1:])] = name
    return {name: blocks[name] for name in sorted(last.values(), key=list(blocks).index)}


def class_index(classes: Sequence[str], text: str) -> int:
    """The class that a user names, by its number or by its name, whatever the case.

    Raises:
        ConfigError: no such class, with those near it.
    """
    if text.isascii() and text.isdigit() and int(text) < len(classes):
        return int(text)
    lowered = [name.lower() for name in classes]
    if text.lower() in lowered:
        return lowered.index(text.lower())
    near = difflib.get_close_matches(text.lower(), lowered, 3, 0.5)
    hint = f"near it: {', '.join(near)}" if near else f"give one by its name or by 0 to {len(classes) - 1}"
    raise ConfigError(f"no class {text!r}; {hint}")
