"""Plain and refined network on the same images: the data of each row of the comparison figure."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError, InputError
from cbam.explain.figure import Row
from cbam.explain.maps import gradcam
from cbam.explain.recording import Refinement, record
from cbam.explain.watching import check_images, explain_dtype_errors, logits_of
from cbam.surgery.effects import eval_mode


def compare_rows(
    plain: nn.Module,
    refined: nn.Module,
    images: Tensor,
    shown: Tensor,
    targets: Tensor,
    classes: Sequence[str],
    boxes: Tensor | None = None,
    block: str | None = None,
) -> list[Row]:
    """Compute one `Row` per image with both networks, for `comparison_figure`.

    The maps of both networks show the evidence for the true class. The networks are left unchanged.

    Args:
        plain: the network without attention.
        refined: the same network with attention.
        images: normalised, float (N, 3, H, W), on the networks' device.
        shown: the same images for display, (N, 3, H, W), uint8 or float in [0, 1].
        targets: the true classes, int (N,).
        classes: class names.
        boxes: (N, 4) x0, y0, x1, y1 in pixels, NaN if unknown.
        block: the block whose feature map is shown; by default the last one with attention. If `refined` has
            no attention from this library, the rows have no feature maps.

    Raises:
        InputError: the shapes do not match, or a network outputs NaN or infinity.
        ConfigError: `block` has no attention from this library.
    """
    check_images(images, plain)
    check_images(images, refined)
    _check_lengths(images, shown, targets, classes, boxes)
    with record(refined) as recording:
        refined_probability = _probability(refined, images, targets)
    plain_probability = _probability(plain, images, targets)
    name, refinement = _select_block(recording, block)
    plain_maps = gradcam(plain, images, targets).cpu()
    refined_maps = gradcam(refined, images, targets).cpu()
    features = _features(refinement)
    return [
        Row(
            label=str(classes[int(targets[i])]),
            image=shown[i].detach().cpu(),
            plain_map=plain_maps[i],
            refined_map=refined_maps[i],
            plain_probability=float(plain_probability[i]),
            refined_probability=float(refined_probability[i]),
            box=None if boxes is None or boxes[i].isnan().any() else tuple(boxes[i].tolist()),
            block=name,
            **(features[i] if features else {}),
        )
        for i in range(len(images))
    ]


def _select_block(recording: dict[str, Refinement], block: str | None) -> tuple[str, Refinement | None]:
    if block is None:
        return next(reversed(recording.items()), ("", None))
    if block not in recording:
        raise ConfigError(
            f"block {block!r} has no attention; blocks with attention: {', '.join(recording) or 'none'}"
        )
    return block, recording[block]


def _features(refinement: Refinement | None) -> list[dict[str, Any]]:
    """Per sample: channel means of the map before and after each gate, and the spatial gate, each (h, w)."""
    if refinement is None:
        return []
    before = _mean_activation(refinement.before)
    after = [(step.kind, _mean_activation(step.after)) for step in refinement.steps]
    gate = refinement.spatial_gate
    return [
        {
            "before": before[i],
            "after": tuple((kind, value[i]) for kind, value in after),
            "spatial_gate": None if gate is None else gate[i, 0].float().cpu(),
            "middle": next((step.middle for step in refinement.steps if step.kind != "what"), 1.0),
        }
        for i in range(len(before))
    ]


def _mean_activation(features: Tensor) -> Tensor:
    """Mean absolute activation over channels, (N, C, h, w) -> (N, h, w)."""
    return features.float().abs().mean(1).cpu()


def _probability(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The softmax probability of each image's true class, (N,)."""
    with torch.no_grad(), eval_mode(model), explain_dtype_errors(images, model):
        scores = logits_of(model(images)).float()
    if int(targets.max()) >= scores.shape[1]:
        raise InputError(f"target {int(targets.max())} is not one of the network's {scores.shape[1]} classes")
    return scores.softmax(1).gather(1, targets.to(scores.device).long()[:, None])[:, 0]


def _check_lengths(images: Tensor, shown: Tensor, targets: Tensor, classes: Sequence[str], boxes) -> None:
    N = len(images)
    if shown.dim() != 4 or len(shown) != N or targets.shape != (N,):
        raise InputError(
            f"expected {N} images in `shown`, (N, 3, H, W), and {N} targets, "
            f"got {tuple(shown.shape)} and {tuple(targets.shape)}"
        )
    if shown.shape[-2:] != images.shape[-2:]:
        size = tuple(images.shape[-2:])
        raise InputError(f"`shown` must be as large as the images, {size}, got {tuple(shown.shape[-2:])}")
    if boxes is not None and boxes.shape != (N, 4):
        raise InputError(f"expected {N} boxes (N, 4), got {tuple(boxes.shape)}")
    if int(targets.min()) < 0 or int(targets.max()) >= len(classes):
        raise InputError(
            f"targets must be in 0..{len(classes) - 1}, the range of the class names, got {targets.tolist()}"
        )
