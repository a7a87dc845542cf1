"""A network as a graph of torch's own operators, from which every format is written."""

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from cbam.errors import CBAMError, DtypeError, ExportError, InputError, first_line
from cbam.surgery.dialect import unwrapped
from cbam.surgery.effects import eval_mode

OURS = "cbam"  # the namespace of our operators, which no other runtime has
_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
STEP = 32  # pixels between two sizes; networks halve a side five times


def plain(model: nn.Module) -> nn.Module:
    """The network without wrappers, on the CPU; copied only if it has to be moved there.

    Raises:
        InputError: not a module, or one without parameters or without memory. ExportError: it is scripted.
        DtypeError: it is quantised, or its weights are not float32.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"export takes a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError("the model is scripted; export the module it was made from")
    _check_dtypes(model)
    devices = {p.device.type for p in (*model.parameters(), *model.buffers())}
    if "meta" in devices:
        raise InputError(f"{type(model).__name__} has parameters without memory: load its weights first")
    return model if devices == {"cpu"} else copy.deepcopy(model).cpu()


def _check_dtypes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "quantized" in type(module).__module__:
            raise DtypeError(
                f"{name or type(model).__name__} is quantised; export the float32 network, and quantise it "
                "with the tools of the runtime"
            )
    dtypes = {p.dtype for p in model.parameters()}
    if not dtypes:
        raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to export")
    if other := sorted(str(dtype) for dtype in dtypes - {torch.float32}):
        raise DtypeError(
            f"weights are {', '.join(other)}: call model.float(), and let the runtime choose its precision"
        )


@contextlib.contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Context manager: `model` in eval mode, without gradients, autocast and `module.compile()`."""
    before = [(module, module._compiled_call_impl) for module in model.modules()]
    try:
        for module, _ in before:
            module._compiled_call_impl = None
        with torch.no_grad(), torch.autocast("cpu", enabled=False), eval_mode(model):
            yield
    finally:
        for module, compiled in before:
            module._compiled_call_impl = compiled


def inputs(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """A random float32 tensor of each shape, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]


def traced_shape(shape: tuple[int, ...], *, dynamic: bool) -> tuple[int, ...]:
    """The shape to trace with: free dimensions must differ and not be 1, or the graph may depend on them."""
    if not dynamic:
        return shape
    free = [max(2, shape[0])]
    for side in shape[2:]:
        while side in free:
            side += STEP
        free.append(side)
    return (free[0], shape[1], *free[1:])


def unseen_shapes(shape: tuple[int, ...], *, dynamic: bool) -> list[tuple[int, ...]]:
    """Three shapes to check a graph at; for a dynamic graph, three that it was not traced with."""
    if not dynamic:
        return [shape] * 3
    channels, first, *rest = shape[1:]
    return [
        (1, channels, first, *rest),
        (3, channels, first + STEP, *(side + 2 * STEP for side in rest)),
        (4, channels, first + 2 * STEP, *rest),
    ]


def program(model: nn.Module, shape: tuple[int, ...], *, dynamic: bool) -> ExportedProgram:
    """The graph of `model`, which must be `settled`, in torch's own operators.

    Raises:
        ExportError: torch.export cannot export the model, or its graph contains an operator of this package.
        InputError: the model itself does not accept the input.
    """
    (x,) = inputs([traced_shape(shape, dynamic=dynamic)])
    try:
        model(x)
    except CBAMError:
        raise
    except Exception as error:
        reason = first_line(error, 300)
        raise InputError(
            f"{type(model).__name__} does not accept an input of shape {tuple(x.shape)}: {reason}"
        ) from error
    free = {place: Dim.DYNAMIC for place in range(len(shape)) if place != 1} if dynamic else {}
    try:
        named = inspect.signature(model.forward).bind(x).arguments  # x, or the *args with it
        shapes = tree_map(lambda _: free, named)
        with quiet():
            exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises errors of its own and any builtin
        advice = "; leave dynamic out to fix batch and size" if dynamic else ""
        raise ExportError(
            f"torch.export cannot export {type(model).__name__}: {first_line(error, 300)}{advice}"
        ) from error
    ours = {str(n.target) for n in _nodes(exported) if getattr(n.target, "namespace", "") == OURS}
    if ours:
        raise ExportError(
            f"the graph contains operators that only this package has: {', '.join(sorted(ours))}"
        )
    return exported


def _nodes(exported: ExportedProgram) -> Iterator[torch.fx.Node]:
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager: silences the logs and warnings of the exporters, which concern their own code."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
