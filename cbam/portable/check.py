"""Does a file compute what the network computes?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from cbam.errors import ExportError, NonFiniteError, first_line

# Of the largest value of an output. Outputs that agree to this have the same largest class, unless the two
# best of the network lie within twice this of each other.
TOLERANCE = 1e-5
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Agreement:
    """How a file and the network compare.

    Attributes:
        shapes: of the inputs that both were run on.
        difference: the largest absolute difference, relative to the largest absolute value of that output.
    """

    shapes: tuple[tuple[int, ...], ...]
    difference: float


def agreement(
    model: nn.Module, run: Run, inputs: Sequence[Tensor], where: str, advice: str = ""
) -> Agreement:
    """Compare every output of `model`, which is `settled`, with that of `run`.

    Args:
        where: the file, for messages. advice: what to do if it does not run; the end of a message.

    Raises:
        ExportError: the file does not run, or an output differs in shape, or by more than TOLERANCE.
        NonFiniteError: the network itself computes NaN or infinity.
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
        worst = max(worst, share)
    return worst
