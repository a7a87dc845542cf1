"""Run a copy of a block on its own: which axis holds the channels, and does a route preserve the function?

The copy is on the CPU, in float32 and eval mode, without the user's hooks. So nothing in the model changes,
and no input of the whole network has to be guessed. An identity start would hide a wrong channel axis; runs
at two sizes reveal it.
"""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from cbam.errors import first_line
from cbam.surgery.effects import rng_restored
from cbam.surgery.graph import Add
from cbam.surgery.route import Route, refine, restore
from cbam.surgery.tracing import trace_with_effects

# Small sizes first, then those that windows, patches and fixed position tables need.
_SIZES = (
    *(((6, 10), (10, 4)), ((16, 24), (24, 8)), ((56, 112), (112, 56))),
    *(((side, side),) for side in (7, 14, 8, 16, 32)),
)
_DRAWS = 32  # training steps in which stochastic depth must keep the branch at least once


class MisfitError(Exception):
    """A block cannot have attention at a place; the message says why."""


@dataclass(frozen=True)
class Value:
    """The value at a place: a tensor with `dims` dimensions and `channels` on axis 1."""

    channels: int
    dims: int


class Probe(nn.Module):
    """A stand-in for attention that records the shape of each input, and multiplies it by `factor`."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.factor = 1

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape if isinstance(x, Tensor) else torch.Size())
        return x if self.factor == 1 else x * self.factor


class Bench:
    """A copy of a block, and inputs that it accepts.

    Raises:
        MisfitError: the block cannot be copied, or does not run on any input of plausible size.
    """

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        try:
            self.block = _detached_copy(block)
        except Exception as error:  # copying a user's objects can raise anything
            raise MisfitError(f"cannot be copied: {first_line(error)}") from error
        self._graph = graph
        self._refusal = ""
        self._drew = False  # whether the last run drew random numbers
        arguments = [
            n for n in graph.nodes if n.op == "placeholder" and not n.args and "*" not in str(n.target)
        ]
        if len(arguments) != 1:
            raise MisfitError(f"its forward needs {len(arguments)} inputs")
        self._plain: list[Any] = []  # the output of the plain block for each input
        self.inputs = self._find_inputs()
        if not self.inputs:
            raise MisfitError(self._refusal_reason())

    def value_at(self, add: Add) -> Value:
        """The value at the end of the branch of `add`.

        Raises:
            MisfitError: the branch does not have the shape of the sum, or no fixed channel axis.
        """
        shapes = []
        for x in self.inputs:
            recorded = _recorded_shapes(self.block, self._graph, x)
            branch, shortcut, total = (recorded.get(n.name) for n in (add.branch, add.shortcut, add.node))
            if branch is None or not branch == shortcut == total:
                raise MisfitError("a gate: its branch is broadcast over the shortcut")
            shapes.append(branch)
        first, *others = shapes
        if len(first) != self.inputs[0].dim():
            raise MisfitError(f"works on {_kind(len(first))}, not on (N, C, ...) maps")
        moved = any(other[1] != first[1] or other[2:] == first[2:] for other in others)
        if moved or (not others and first[1] == first[2]):  # in one square input, channels are the odd axis
            raise MisfitError("works on channels-last (N, H, W, C) values")
        if first[1] == 1:
            raise MisfitError("a mask: it has one channel")
        return Value(first[1], len(first))

    def check(self, route: Route, value: Value) -> None:
        """Put a probe at `route` and compare with the plain block.

        Raises:
            MisfitError: the probe is not called exactly once, in training too; it does not get `value`, or
                changes the output; or the block does not run with it.
            UnroutableError: the code of the block does not allow the route.
        """
        probe = Probe()
        refine(self.block, route, probe)
        try:
            for x, expected in zip(self.inputs, self._plain, strict=True):
                out = self._probed(route, probe, x)
                if len(probe.shapes) != 1:
                    raise MisfitError(f"{route} runs {len(probe.shapes)} times in one forward")
                if len(probe.shapes[0]) != value.dims or probe.shapes[0][1] != value.channels:
                    raise MisfitError(
                        f"{route} has shape {tuple(probe.shapes[0])}, the branch {value.channels} channels"
                    )
                if not _same(out, expected):
                    raise MisfitError(f"{route} changes the function of the block")
            probe.factor = 2
            if _same(self._probed(route, probe, self.inputs[0]), self._plain[0]):
                raise MisfitError(f"{route} does not reach the output")
            self._check_training(route, probe)
        finally:
            restore(self.block)

    def _check_training(self, route: Route, probe: Probe) -> None:
        """Raise if training takes another path, on which the attention would not be trained."""
        self.block.training = True  # only the block itself: its children compute as in evaluation
        try:
            for seed in range(_DRAWS):
                self._probed(route, probe, self.inputs[0], seed)
                if len(probe.shapes) == 1:
                    return
                if not self._drew:  # with draws it may be stochastic depth, which skips the branch at times
                    break
        finally:
            self.block.training = False
        raise MisfitError(f"{route} runs {len(probe.shapes)} times in training")

    def _probed(self, route: Route, probe: Probe, x: Tensor, seed: int = 0):
        """The output of the block with the probe in it."""
        probe.shapes.clear()
        try:
            return self._run(x, seed)
        except Exception as error:  # for example of a block that inspects itself or its caller
            raise MisfitError(f"{route} makes the forward fail: {first_line(error)}") from error

    def _run(self, x: Tensor, seed: int = 0):
        with torch.no_grad(), warnings.catch_warnings(), _float32_on_cpu(), rng_restored(seed) as draws:
            warnings.simplefilter("ignore")  # the user did not request this forward
            x = x.clone()  # the block may write to its input, which is then a result too
            out = self.block(x), x
        self._drew = bool(draws)
        return out

    def _find_inputs(self) -> list[Tensor]:
        dims = _dims(self.block)
        for sizes in _SIZES:
            for channels in _entry_channels(self.block, self._graph):
                inputs = [_ramp(1, channels, *_fit(size, dims)) for size in sizes]
                self._plain = []
                if all(self._runs(x) for x in inputs):
                    return inputs
        return []

    def _runs(self, x: Tensor) -> bool:
        try:
            self._plain.append(self._run(x))
        except Exception as error:  # running a user's block can raise anything
            self._refusal = self._refusal or first_line(error)
            return False
        return True

    def _refusal_reason(self) -> str:
        channels = next(iter(_entry_channels(self.block, self._graph)), 0)
        if not channels:
            return "cannot be run alone: no layer determines its channels"
        if self._runs(_ramp(1, 6, 10, channels)):
            return "works on channels-last (N, H, W, C) values"
        if self._runs(_ramp(1, 60, channels)):
            return "works on tokens (N, L, C)"
        return f"cannot be run alone: {self._refusal}"


def traced_on_an_example(block: nn.Module) -> tuple[fx.Graph, list[str]] | None:
    """The graph, for a small input, of a forward that depends on sizes; None if no input works."""
    try:
        clone = _detached_copy(block)
    except Exception:  # copying a user's objects can raise anything
        return None
    channels = _entry_channels(clone, fx.Graph())[:3]  # whole networks have many, and none works
    for (size, *_), c in itertools.product(_SIZES, channels):
        example = _ramp(1, c, *_fit(size, _dims(clone)))
        with contextlib.suppress(Exception), warnings.catch_warnings(), _float32_on_cpu():
            warnings.simplefilter("ignore")  # the user did not request this forward
            return trace_with_effects(clone, training=False, example=example)
    return None


def static_channels(child: nn.Module) -> Value | None:
    """The output of a convolution or BatchNorm, from its definition; None for other modules."""
    layer = child
    while isinstance(layer, nn.Sequential) and len(layer) and type(layer).forward is nn.Sequential.forward:
        if "forward" in vars(layer):
            return None
        layer = layer[-1]
    if "forward" in vars(layer) or not _is_of_torch(type(layer).forward):
        return None
    if isinstance(layer, _ConvNd):
        return Value(layer.out_channels, 2 + len(layer.kernel_size))
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
        dims = {nn.BatchNorm1d: 3, nn.BatchNorm3d: 5}
        return Value(layer.num_features, next((d for t, d in dims.items() if isinstance(layer, t)), 4))
    return None


def _is_of_torch(function: object) -> bool:
    return getattr(function, "__module__", "").startswith("torch.nn.")


@contextlib.contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Context manager: `module` runs without the user's forward hooks."""
    saved = []
    for m in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            saved.append((m, name, dict(vars(m)[name])))
            vars(m)[name].clear()
    try:
        yield
    finally:
        for m, name, hooks in saved:
            vars(m)[name].update(hooks)


@contextlib.contextmanager
def _float32_on_cpu() -> Iterator[None]:
    """Context manager: new tensors are by default float32 on the CPU, like the copy."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _detached_copy(block: nn.Module) -> nn.Module:
    """A copy of `block` on the CPU, in float32 and eval mode, without hooks, with random weights."""
    # Pruning and the old weight norm keep computed weights as attributes, which torch cannot deepcopy.
    attributes = [v for m in block.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    with without_hooks(block):
        clone = copy.deepcopy(block, {id(v): v.detach().clone() for v in attributes if not v.is_leaf})
    for m in clone.modules():
        vars(m).update({name: v.cpu().float() for name, v in vars(m).items() if _is_floating(v)})
        m._backward_hooks.clear()
        m._backward_pre_hooks.clear()
        m._forward_hooks_with_kwargs.clear()
        m._forward_pre_hooks_with_kwargs.clear()
        m._forward_hooks_always_called.clear()
    if any(t.is_meta for t in (*clone.parameters(), *clone.buffers())):
        clone.to_empty(device="cpu")
        for b in clone.buffers():
            b.zero_() if b.dtype.is_floating_point else b.fill_(1)
    clone = clone.cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in clone.parameters():
            # Affine scales that start at zero would let every check of the branch pass.
            p.uniform_(0.5, 1.5, generator=generator) if p.dim() < 2 else p.uniform_(
                -0.3, 0.3, generator=generator
            )
    return clone.requires_grad_(False)


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        super().__init__(block, graph=graph)
        self.recorded: dict[str, torch.Size] = {}
        self._constants = {n.target: n.meta["constant"] for n in graph.nodes if "constant" in n.meta}

    def call_module(self, target, args, kwargs):
        # a child may append to a list argument, but lists in a graph are immutable
        args = tuple(list(a) if isinstance(a, list) else a for a in args)
        return super().call_module(target, args, kwargs)

    def fetch_attr(self, target):
        value = self._constants[target] if target in self._constants else super().fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        value = torch.zeros_like(value, device="cpu") if value.is_meta else value.cpu()
        return value.float() if value.is_floating_point() else value

    def run_node(self, n: fx.Node):
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.recorded[n.name] = out.shape
        return out


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta


def _recorded_shapes(block: nn.Module, graph: fx.Graph, x: Tensor) -> dict[str, torch.Size]:
    """The shape of every tensor in the graph.

    Raises:
        MisfitError: the graph does not run, although the traced forward does.
    """
    interpreter = _ShapeRecorder(block, graph)
    try:
        with torch.no_grad(), _float32_on_cpu(), rng_restored():
            interpreter.run(x.clone())
    except Exception as error:  # a graph lacks the side effects of the forward
        raise MisfitError(f"its traced forward does not run: {first_line(error)}") from error
    return interpreter.recorded


def _entry_channels(block: nn.Module, graph: fx.Graph) -> list[int]:
    """Candidates for the input channels, likeliest first: of layers that the block calls, then of others."""
    children = dict(block.named_modules())
    readers = [children[str(n.target)] for n in graph.nodes if n.op == "call_module"]
    found = [_in_channels(m) for reader in [*readers, block] for m in reader.modules()]
    return list(dict.fromkeys(c for c in found if c))


def _in_channels(module: nn.Module) -> int:
    if isinstance(module, _ConvNd):
        return module.in_channels
    if isinstance(module, _NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return module.in_features if isinstance(module, nn.Linear) else 0


def _dims(block: nn.Module) -> int:
    return next((len(m.kernel_size) for m in block.modules() if isinstance(m, _ConvNd)), 2)


def _fit(size: tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (*size, 6)[:dims] if dims != 1 else (size[0] * size[1],)


def _ramp(*shape: int) -> Tensor:
    """A deterministic tensor without equal neighbours."""
    steps = torch.linspace(-2, 2, torch.Size(shape).numel(), dtype=torch.float32, device="cpu")
    return steps.sin().mul(3).reshape(shape)


def _same(a, b) -> bool:
    """Whether two outputs are bit-identical, through tuples, lists and dicts; NaN equals NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def _kind(dims: int) -> str:
    return {2: "vectors (N, C)", 3: "tokens (N, L, C)"}.get(dims, f"{dims}-D values")
