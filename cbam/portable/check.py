"""Check that an exported file computes what the network computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from cbam.errors import ExportError, NonFiniteError, first_line

# Relative to the largest value of an output. Outputs that agree to this have the same top class, unless two
# classes lie within twice this of each other.
TOLERANCE = 1e-5
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Agreement:
    """How closely a file and the network agree.

    Attributes:
        shapes: of the inputs that both were run on.
        difference: the largest absolute difference, relative to the largest absolute value of that output.
    """

    shapes: tuple[tuple[int, ...], ...]
    difference: float


def agreement(
    model: nn.Module, run: Run, inputs: Sequence[Tensor], where: str, advice: str = ""
) -> Agreement:
    """Compare every output of `model`, which must be `settled`, with that of `run`.

    Args:
        where: the file, for messages. advice: what to do if it does not run, as the end of the message.

    Raises:
        ExportError: the file does not run, or an output differs in shape, or by more than TOLERANCE.
        NonFiniteError: the network itself computes NaN or infinity.
    """
    worst = 0.0
    for x in inputs:
        expected = [value for value in tree_flatten(model(x.clone()))[0] if isinstance(value, Tensor)]
        if not all(value.isfinite().all() for value in expected):
            raise NonFiniteError(
                f"the network computes NaN or infinity for an input of shape {tuple(x.shape)}"
            )
        try:
            actual = run(x)
        except Exception as error:  # runtimes raise errors of their own
            raise ExportError(
                f"{where} does not run at {tuple(x.shape)}: {first_line(error, 300)}{advice}"
            ) from error
        worst = max(worst, _difference(expected, actual, f"{where} at {tuple(x.shape)}"))
    return Agreement(tuple(tuple(x.shape) for x in inputs), worst)


def _difference(expected: Sequence[Tensor], actual: Sequence[Tensor], where: str) -> float:
    shapes = [tuple(value.shape) for value in expected]
    if shapes != (actual_shapes := [tuple(value.shape) for value in actual]):
        raise ExportError(f"{where}: the outputs have shapes {actual_shapes}, those of the network {shapes}")
    worst = 0.0
    for one, other in zip(expected, actual, strict=True):
        if not one.numel():
            continue
        exact = one.double()  # also for bool and integer outputs
        scale = exact.abs().amax().item() or 1.0
        relative = (exact - other.double()).abs().amax().item() / scale
        if not relative <= TOLERANCE:  # true for NaN as well
            raise ExportError(
                f"{where}: differs from the network by {relative:.1e} of the largest value, over {TOLERANCE}"
            )
        worst = max(worst, relative)
    return worst
