"""How well maps find an object whose boxes are known, and how well they find what a network needs.

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

THRESHOLDS = torch.arange(1, 100) / 100  # of a map's largest value
STEPS = 10  # of deletion and insertion
_BLUR = 11  # pixels at a side of 224: insertion begins from an image of which nothing can be told


def box_area(boxes: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    """The share of each pixel that lies in some box: x0, y0, x1, y1 each -> (H, W) in [0, 1].

    Pixel (i, j) covers [j, j+1] x [i, i+1]. Where boxes overlap in part of a pixel, the larger share counts.
    """
    area = torch.zeros(height, width, dtype=torch.float64)
    for x0, y0, x1, y1 in boxes:
        if x1 < x0 or y1 < y0:
            raise InputError("box_area: a box ends before it starts; boxes are x0, y0, x1, y1")
        area = torch.maximum(area, _cover(y0, y1, height)[:, None] * _cover(x0, x1, width))
    return area


def pointing(maps: Tensor, area: Tensor) -> Tensor:
    """The pointing game (arXiv 1608.00507): is the largest value on the object? (N, H, W) twice -> (N,).

    1 or 0; of several pixels with the largest value the share that is on the object, so that a map without
    a preference scores as a guess would. A pixel that is covered in part counts from one half on.
    """
    _check(maps, area)
    largest = maps == maps.amax((1, 2), keepdim=True)
    return (largest & (area >= 0.5)).sum((1, 2)) / largest.sum((1, 2))


def energy(maps: Tensor, area: Tensor) -> Tensor:
    """The share of each map's energy, the sum of its non-negative values, on the object: (N,) in [0, 1].

    A map without energy says nothing: it scores as an even one would, the object's share of the image.
    """
    _check(maps, area)
    weight = maps.double().clamp(min=0)
    weight = torch.where(weight.sum((1, 2), keepdim=True) > 0, weight, torch.ones_like(weight))
    return (weight * area).sum((1, 2)) / weight.sum((1, 2))


def overlap(maps: Tensor, area: Tensor, thresholds: Tensor = THRESHOLDS) -> Tensor:
    """Intersection over union of the object and what of a map is at least a share of its largest value.

    Returns:
        (N, T): for each of T thresholds in (0, 1]. One threshold is chosen for all images of a set:
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

    The probability of `target` while the pixels of the map are taken out in order of their value, put to the
    image's mean colour (smaller is better), and while they are put into a blurred image (larger is
    better); by the trapezium rule over `steps` equal steps. Pixels of equal value go in reading order.

    Args:
        model: a classifier.
        image: normalised, (3, H, W).
        heat: (H, W).
        target: class.
        steps: the image is `steps` + 1 times judged on each curve.
    """
    _check(heat[None], heat[None].double().clamp(0, 1))
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    cuts = torch.linspace(0, len(order), steps + 1)[:, None]
    taken = (rank[None] < cuts).view(steps + 1, 1, *heat.shape)
    mean = image.mean((1, 2), keepdim=True).expand_as(image)
    gone, blurred = torch.where(taken, mean, image), torch.where(taken, image, _blurred(image))
    with torch.no_grad(), eval_mode(model):
        scores = logits_of(model(torch.cat([gone, blurred]))).float().softmax(1)[:, target]
    curves = scores.view(2, -1).double()
    deletion, insertion = torch.trapezoid(curves, dx=1 / steps, dim=1).tolist()
    return deletion, insertion


def centre_prior(height: int, width: int) -> Tensor:
    """A map that knows nothing of the image: a bell in its middle, a quarter of each side wide."""
    rows, columns = (
        torch.exp(-0.5 * (((torch.arange(n) + 0.5) / n - 0.5) / 0.25) ** 2) for n in (height, width)
    )
    return rows[:, None] * columns


def untrained(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """A copy of `model` that has learned nothing: fresh weights, BatchNorm set by one look at `images`.

    Weights that no layer can reset, such as the layer scale of a ConvNeXt or the positions of a transformer,
    are drawn from a normal distribution with the mean and the deviation that they have.
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
    """A Gaussian blur, its edges repeated; (3, H, W) -> the same."""
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
        raise NonFiniteError("a map holds NaN or infinity")
