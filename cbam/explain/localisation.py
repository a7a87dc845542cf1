"""Scores of maps: how well they localise objects with known boxes, and how faithful they are to the network.

Shapes: N maps of H x W pixels; an area (N, H, W) is the share of each pixel that a box of the object covers.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.errors import InputError, NonFiniteError
from cbam.explain.watching import logits_of
from cbam.surgery.effects import eval_mode, seeded

THRESHOLDS = torch.arange(1, 100) / 100  # as a share of a map's maximum
STEPS = 10  # of deletion and insertion
_BLUR = 11  # sigma in pixels at a side of 224; insertion starts from an image blurred beyond recognition


def box_area(boxes: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    """The share of each pixel that boxes cover: boxes x0, y0, x1, y1 -> (H, W) in [0, 1].

    Pixel (i, j) covers [j, j+1] x [i, i+1]. If several boxes cover part of a pixel, the largest share counts.
    """
    area = torch.zeros(height, width, dtype=torch.float64)
    for x0, y0, x1, y1 in boxes:
        if x1 < x0 or y1 < y0:
            raise InputError("box_area: a box ends before it starts; boxes are x0, y0, x1, y1")
        area = torch.maximum(area, _cover(y0, y1, height)[:, None] * _cover(x0, x1, width))
    return area


def pointing(maps: Tensor, area: Tensor) -> Tensor:
    """The pointing game (arXiv 1608.00507): is the maximum on the object? (N, H, W) twice -> (N,).

    1 or 0; if several pixels have the maximum, the share of them on the object, so that a constant map scores
    like a random guess. A pixel is on the object if at least half of it is covered.
    """
    _check(maps, area)
    largest = maps == maps.amax((1, 2), keepdim=True)
    return (largest & (area >= 0.5)).sum((1, 2)) / largest.sum((1, 2))


def energy(maps: Tensor, area: Tensor) -> Tensor:
    """The share of each map's energy, the sum of its non-negative values, on the object: (N,) in [0, 1].

    A map without energy scores like a constant map: the object's share of the image.
    """
    _check(maps, area)
    weight = maps.double().clamp(min=0)
    weight = torch.where(weight.sum((1, 2), keepdim=True) > 0, weight, torch.ones_like(weight))
    return (weight * area).sum((1, 2)) / weight.sum((1, 2))


def overlap(maps: Tensor, area: Tensor, thresholds: Tensor = THRESHOLDS) -> Tensor:
    """Intersection over union of the object and the pixels of a map above a share of its maximum.

    Returns:
        (N, T), one column per threshold in (0, 1]. One threshold is chosen for all images of a set:
        `overlap(...).mean(0).max()`.
    """
    _check(maps, area)
    scaled = maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    scores = []
    for threshold in thresholds.tolist():
        chosen = (scaled >= threshold).double()
        both, either = torch.minimum(chosen, area), torch.maximum(chosen, area)
        scores.append(both.sum((1, 2)) / either.sum((1, 2)))
    return torch.stack(scores, 1)


def deletion_insertion(
    model: nn.Module, image: Tensor, heat: Tensor, target: int, steps: int = STEPS
) -> tuple[float, float]:
    """The areas under the deletion and the insertion curve of a map (RISE, arXiv 1806.07421).

    The curves are the probability of `target` while pixels, in descending order of the map, are replaced by
    the image's mean colour (deletion, lower is better) or inserted into a blurred image (insertion, higher is
    better); trapezoidal rule over `steps` equal steps. Pixels of equal value go in row-major order.

    Args:
        model: a classifier.
        image: normalised, (3, H, W).
        heat: (H, W).
        target: class index.
        steps: each curve evaluates the network on `steps` + 1 images.
    """
    _check(heat[None], heat[None].double().clamp(0, 1))
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    cuts = torch.linspace(0, len(order), steps + 1)[:, None]
    selected = (rank[None] < cuts).view(steps + 1, 1, *heat.shape)
    mean = image.mean((1, 2), keepdim=True).expand_as(image)
    deleted, blurred = torch.where(selected, mean, image), torch.where(selected, image, _blurred(image))
    with torch.no_grad(), eval_mode(model):
        scores = logits_of(model(torch.cat([deleted, blurred]))).float().softmax(1)[:, target]
    curves = scores.view(2, -1).double()
    deletion, insertion = torch.trapezoid(curves, dx=1 / steps, dim=1).tolist()
    return deletion, insertion


def centre_prior(height: int, width: int) -> Tensor:
    """A map that ignores the image: a Gaussian at its centre, with a sigma of a quarter of each side."""
    rows, columns = (
        torch.exp(-0.5 * (((torch.arange(n) + 0.5) / n - 0.5) / 0.25) ** 2) for n in (height, width)
    )
    return rows[:, None] * columns


def untrained(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """A copy of `model` with random weights, and BatchNorm statistics from one forward pass on `images`.

    Weights that no layer can reset, such as the layer scale of a ConvNeXt or the position embedding of a
    transformer, are drawn from a normal distribution with their own mean and standard deviation.
    """
    fresh = copy.deepcopy(model)
    with seeded(seed, images.device):
        for layer in fresh.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()  # pyright: ignore[reportCallIssue]
        for own, trained in zip(fresh.parameters(), model.parameters(), strict=True):
            if torch.equal(own, trained):
                own.data = trained.mean() + trained.std(correction=0) * torch.randn_like(trained)
    fresh.eval()
    norms = [layer for layer in fresh.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        fresh(images)
    return fresh.eval()


def _blurred(image: Tensor) -> Tensor:
    """Gaussian blur with replicated edges, (3, H, W) -> (3, H, W)."""
    sigma = max(_BLUR * min(image.shape[1:]) / 224, 1.0)
    reach = min(int(3 * sigma), min(image.shape[1:]) - 1)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    bell = (bell / bell.sum()).to(image.dtype)
    wide = F.pad(image[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(wide, bell[None, None, None]), bell[None, None, :, None])[:, 0]


def _cover(start: float, end: float, size: int) -> Tensor:
    """How much of each of `size` unit cells lies in [start, end]."""
    cell = torch.arange(size, dtype=torch.float64)
    return ((cell + 1).clamp(max=end) - cell.clamp(min=start)).clamp(min=0)


def _check(maps: Tensor, area: Tensor) -> None:
    if maps.dim() != 3 or maps.shape != area.shape:
        raise InputError(
            f"expected maps and areas (N, H, W), got {tuple(maps.shape)} and {tuple(area.shape)}"
        )
    if not maps.isfinite().all():
        raise NonFiniteError("a map contains NaN or infinity")
