"""Does a file compute what the network computes?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from cbam.errors import ExportError, NonFiniteError, first_line

TOLERANCE = 1e-5  # of the largest value of an output, in float32
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Agreement:
    """How a file and the network compare.

    Attributes:
        shapes: of the inputs that both computed.
        difference: the largest difference of two values, as a share of the largest value of that output.
    """

    shapes: tuple[tuple[int, ...], ...]
    difference: float


def agreement(
    model: nn.Module, run: Run, inputs: Sequence[Tensor], where: str, advice: str = ""
) -> Agreement:
    """Compare every output of the settled `model` with those of `run`, in value and in the class they name.

    `advice` is what to do where the file does not run at all.

    Raises:
        ExportError: they differ by more than TOLERANCE, in the largest class, or in shape.
        NonFiniteError: the network itself computes NaN or infinity, so that nothing can be compared.
    """
    worst = 0.0
    for x in inputs:
        wanted = [value for value in tree_flatten(model(x.clone()))[0] if isinstance(value, Tensor)]
        if not all(value.isfinite().all() for value in wanted):
            raise NonFiniteError(f"the network computes NaN or infinity for an input {tuple(x.shape)}")
        try:
            found = run(x)
        except Exception as error:  # every runtime has errors of its own
            raise ExportError(
                f"{where} does not run at {tuple(x.shape)}: {first_line(error, 300)}{advice}"
            ) from error
        worst = max(worst, _difference(wanted, found, f"{where} at {tuple(x.shape)}"))
    return Agreement(tuple(tuple(x.shape) for x in inputs), worst)


def _difference(wanted: Sequence[Tensor], found: Sequence[Tensor], where: str) -> float:
    shapes = [tuple(value.shape) for value in wanted]
    if shapes != (got := [tuple(value.shape) for value in found]):
        raise ExportError(f"{where}: outputs of shapes {got}, the network's are {shapes}")
    worst = 0.0
    for one, other in zip(wanted, found, strict=True):
        if not one.numel():
            continue
        exact = one.double()  # of a mask and of whole numbers, too
        scale = exact.abs().amax().item() or 1.0
        share = (exact - other.double()).abs().amax().item() / scale
        if not share <= TOLERANCE:  # NaN is no agreement either
            raise ExportError(
                f"{where}: differs from the network by {share:.1e} of the largest value, over {TOLERANCE}"
            )
        _refuse_other_class(one, other, where, scale)
        worst = max(worst, share)
    return worst


def _refuse_other_class(one: Tensor, other: Tensor, where: str, scale: float) -> None:
    """Where the two best are nearer to each other than the tolerance, neither is the largest class."""
    if one.dim() < 2 or one.shape[1] < 2 or not one.is_floating_point():
        return
    best = one.topk(2, dim=1).values
    decided = best.select(1, 0) - best.select(1, 1) > 2 * TOLERANCE * scale
    if torch.any((one.argmax(1) != other.argmax(1)) & decided):
        raise ExportError(f"{where}: names other classes than the network")
