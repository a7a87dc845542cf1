"""Recording of what attention does to the feature map of each block, step by step.

Shapes: N samples, C channels, H x W pixels of the block's feature map. For attention on signals (`dim=1`) or
volumes (`dim=3`), L or D x H x W in place of H x W.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType

from torch import Tensor, nn

from cbam.explain.watching import check_hookable
from cbam.nn import CBAM, ECA, GAM, ChannelAttention, GlobalContext, SelectiveKernel, SpatialAttention, gam
from cbam.nn.gate import Gate
from cbam.ops import rescale
from cbam.surgery import attached

# Found in hand-written networks too; attached attention is found regardless of its class.
_OURS = (Gate, CBAM, GAM, GlobalContext, SelectiveKernel)
_ONE_SIGMOID = (ChannelAttention, SpatialAttention, ECA, gam._What, gam._Where)


@dataclass(frozen=True, eq=False)
class Step:
    """One gate of a block, and the feature map after it.

    Attributes:
        kind: "what" (a gate per channel), "where" (per pixel) or "both".
        gate: (N, C, 1, 1), (N, 1, H, W) or (N, C, H, W), the factor of the map. GAM's what and where both
            have the last shape.
        after: (N, C, H, W).
        middle: midpoint of the gate's range; for CBAM half the gain, so 1 after an identity start, where it
            changes nothing, and 1/2 in the paper's form, where it halves the map.
    """

    kind: str
    gate: Tensor
    after: Tensor
    middle: float = 1.0


@dataclass(frozen=True, eq=False)
class Refinement:
    """One block's feature map before, between and after its gates, as detached copies from the forward pass.

    Attributes:
        before, after: the attention's input and output, (N, C, H, W).
        steps: the gates in the order in which they are computed: what, then where for CBAM, the reverse for
            the reversed arrangement. Gates computed in parallel from the same map are also listed one by one;
            the map after each is the product so far. Empty if the attention has no gate.
    """

    before: Tensor
    steps: tuple[Step, ...]
    after: Tensor

    def step(self, kind: str) -> Step | None:
        """The first step of this kind."""
        return next((step for step in self.steps if step.kind == kind), None)

    @property
    def channel_gate(self) -> Tensor | None:
        """What: (N, C, 1, 1), the mean over pixels; None if there is no such gate."""
        if (step := self.step("what")) is None:
            return None
        pixels = tuple(range(2, step.gate.dim()))
        return step.gate.mean(pixels, keepdim=True)

    @property
    def spatial_gate(self) -> Tensor | None:
        """Where: (N, 1, H, W), mean over channels, also of a gate of both; None if there is neither."""
        step = self.step("where") or self.step("both")
        return None if step is None else step.gate.mean(1, keepdim=True)


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Refinement]]:
    """Record what attention does in the forward passes inside the `with` block.

        with cbam.explain.record(model) as recording:
            model(images)
        recording["layer4.1"].spatial_gate      # (N, 1, H, W)

    The dict maps block names to recordings, in the order in which the blocks run; a later pass replaces an
    earlier one. It contains all attention attached by `cbam.attach`, and every attention module of `cbam.nn`
    that the network itself uses, under the name of its parent module. The values are those of the forward
    pass itself, in training too: nothing is computed twice. The model is left unchanged, also after an
    exception. Recordings can be nested.

    Raises:
        ConfigError: the model is compiled or scripted.
    """
    check_hookable(model)
    recording: dict[str, Refinement] = {}
    with ExitStack() as undo:
        for name, attention in _blocks(model).items():
            _watch(name, attention, recording, undo)
        yield recording


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Block name -> its attention: an attached one, or an outermost module of `cbam.nn`."""
    units = list(attached(model).values())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and (isinstance(module, _OURS) or any(module is unit for unit in units)):
            found[name] = module
    parents = [name.rpartition(".")[0] for name in found]
    only_children = {parent for parent in parents if parent and parents.count(parent) == 1}
    return {
        parent if parent in only_children else name: found[name]
        for parent, name in zip(parents, found, strict=True)
    }


def _gates(attention: nn.Module) -> list[Gate]:
    """The outermost gates of an attention."""
    found: dict[str, Gate] = {}
    for name, module in attention.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Gate) and not inside:
            found[name] = module
    return list(found.values())


def _watch(name: str, attention: nn.Module, recording: dict[str, Refinement], undo: ExitStack) -> None:
    """Record a `Refinement` under `name` each time `attention` runs; `undo` removes all hooks."""
    seen: dict[Gate, Tensor] = {}  # in the order of the calls
    after: dict[Gate, Tensor] = {}
    dim = _dim(attention)

    def keep_map(own: Gate, _, out: Tensor) -> None:
        if own in seen:
            after[own] = _copy(out)

    for gate in _gates(attention):
        _record_gate(gate, seen, undo)
        undo.callback(gate.register_forward_hook(keep_map).remove)

    def keep(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], out: Tensor) -> None:
        if module is not attention:  # the hook was copied along with the model
            return
        x, *_ = (*args, *named.values())
        before, last = _batch(_copy(x), dim), _batch(_copy(out), dim)
        steps, current = [], before
        for own, value in seen.items():
            value, known = _batch(value, dim), after.get(own)
            current = rescale(current, value) if known is None else _batch(known, dim)
            steps.append(Step(_kind(own, value, before), value, current, _middle(own)))
        recording[name] = Refinement(before, tuple(steps), last)
        seen.clear()
        after.clear()

    undo.callback(attention.register_forward_hook(keep, with_kwargs=True).remove)


def _dim(attention: nn.Module) -> int:
    """The number of spatial dimensions of the maps that an attention takes."""
    sized = (ChannelAttention, SpatialAttention)
    return next((part.dim for part in attention.modules() if isinstance(part, sized)), 2)


def _record_gate(module: Gate, seen: dict[Gate, Tensor], undo: ExitStack) -> None:
    """Copy what `module.gate` returns into `seen`; an instance attribute shadows the method until `undo`.

    If the model is copied in the meantime, the gates of the copy are not recorded.
    """
    shadow = vars(module).get("gate")  # of an outer recording
    gate = module.gate

    def restore() -> None:
        del vars(module)["gate"]
        if shadow is not None:
            vars(module)["gate"] = shadow

    undo.callback(restore)
    vars(module)["gate"] = _RecordedGate(module, gate, seen)


class _RecordedGate:
    """A gate's method that keeps a copy of its result."""

    def __init__(self, module: Gate, gate, seen: dict[Gate, Tensor]) -> None:
        self._module, self._gate, self._seen = module, gate, seen

    def __call__(self, x: Tensor) -> Tensor:
        value = self._gate(x)
        self._seen[self._module] = _copy(value)
        return value

    def __deepcopy__(self, memo: dict):
        """In a copied model, the method of the copied module."""
        return MethodType(type(self._module).gate, copy.deepcopy(self._module, memo))


def _kind(own: Gate, gate: Tensor, x: Tensor) -> str:
    if own.kind is not None:
        return own.kind
    if gate.shape[1] == 1 < x.shape[1]:
        return "where"
    return "what" if gate.shape[2:].numel() == 1 else "both"


def _middle(gate: Gate) -> float:
    gain = getattr(gate, "gain", None)
    return (1.0 if gain is None else float(gain)) / 2 if isinstance(gate, _ONE_SIGMOID) else 1.0


def _batch(x: Tensor, dim: int) -> Tensor:
    """Add the batch dimension if it is missing."""
    return x[None] if x.dim() == dim + 1 else x


def _copy(x: Tensor) -> Tensor:
    """A detached copy, since the block may later write to the same memory."""
    return x.detach().clone()
