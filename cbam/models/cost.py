"""The cost of a network: parameters and multiply-accumulates."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cbam.errors import InputError
from cbam.surgery.effects import eval_mode


class Cost(NamedTuple):
    """Number of parameters, and 10^9 multiply-accumulates for one image."""

    parameters: int
    gmac: float


def profile(model: nn.Module, size: int | tuple[int, int] = 224) -> Cost:
    """Count the parameters of `model`, and its multiply-accumulates for one RGB image of `size`.

    Convolutions and matrix products are counted, as in the paper's tables (which call them GFLOPs); sums,
    pooling and activations are not. The image runs in eval mode without gradients, on the device and in the
    dtype of the model's first parameter; the mode of every module is restored. On the meta device
    (`with torch.device("meta"): model = build(name)`) nothing is computed and no memory is used.

    Args:
        size: side of a square image, or (height, width), in pixels.

    Raises:
        InputError: a size that is not a positive int or pair, or a model without parameters.
    """
    sides = size if isinstance(size, tuple) else (size, size)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise InputError(f"size must be a positive int or a pair of them, got {size!r}")
    like = next(model.parameters(), None)
    if like is None:
        raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to count")
    counter = FlopCounterMode(display=False)
    with eval_mode(model), torch.no_grad(), counter:
        model(torch.zeros(1, 3, *sides, dtype=like.dtype, device=like.device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() / 2 / 1e9)
