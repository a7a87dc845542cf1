"""Convert the weights of an attached model to the names of the released code, or of timm."""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from cbam.errors import CheckpointError, InputError
from cbam.nn import CBAM
from cbam.surgery.dialect import NAMES, MisfitError, Target, some, under
from cbam.surgery.route import SLOT, Route
from cbam.surgery.tracing import trace

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, nn.GroupNorm.forward)


def convert_state_dict(model: nn.Module, to: str = "released") -> dict[str, Tensor]:
    """The weights of `model` under the names of the authors' released code, or of timm's CbamModule.

    The result has its own memory. A gain, which neither format has, must be a power of two. It is folded into
    the affine layer before the attention (times both gains), the first layer of the MLP (divided by both) and
    the convolution of the spatial gate (divided by its gain). In eval mode the output stays bit-identical, as
    long as no activation leaves the normal range of the dtype (float16 ends at 65504).

    timm's module must have biases: `block_args={"attn_layer": partial(CbamModule, mlp_bias=True)}` with
    CbamModule from timm.layers.cbam.

    Args:
        model: a network with CBAM attached.
        to: "released" or "timm".

    Raises:
        InputError: an unknown format.
        CheckpointError: an attention, or a gain, that the format cannot express; it names the block.
    """
    if to not in ("released", "timm"):
        raise InputError(f'to must be "released" or "timm", got {to!r}')
    target = Target(model)
    if not target.blocks:
        raise CheckpointError(f"{type(model).__name__} has no attention attached; its state_dict() is plain")
    state = {name: value.detach().clone() for name, value in target.tensors.items()}
    for name, block in target.blocks.items():
        try:
            _check_convertible(block.get_submodule(SLOT), to)
            _fold_gains(target, name, state)
        except MisfitError as misfit:
            raise CheckpointError(f"{name or type(block).__name__}: {misfit}") from None
    return _renamed(state, target, to)


def _check_convertible(attention: nn.Module, to: str) -> None:
    if type(attention) is not CBAM:
        raise MisfitError(
            f"its attention is {type(attention).__name__}, and {to} weights are only for cbam.CBAM"
        )
    if attention.spatial.dim != 2:
        raise MisfitError(f"its attention has dim={attention.spatial.dim}, and {to} weights are for images")
    if set(attention.channel.pools) != {"avg", "max"}:
        raise MisfitError(f"its pools are {attention.channel.pools}, and {to} weights need avg and max")
    if to == "released" and attention.spatial.kernel_size != 7:
        raise MisfitError(
            f"its spatial kernel is {attention.spatial.kernel_size}, but the released code has 7"
        )
    odd = attention.state_dict().keys() - {ours for ours, _, _ in NAMES} - {"channel.gain", "spatial.gain"}
    if odd:
        raise MisfitError(f"{to} weights have no name for its {some(sorted(odd))}")


def _fold_gains(target: Target, name: str, state: dict[str, Tensor]) -> None:
    """Fold the gains of one block exactly into its affine layer, MLP and spatial convolution."""
    slot = under(name, SLOT)
    gates = (target.gates[f"{slot}.channel"], target.gates[f"{slot}.spatial"])
    channel, spatial = (1.0 if gate.gain is None else gate.gain.item() for gate in gates)
    if channel == spatial == 1:
        return
    affine = _affine_names(target, affine_before(target.blocks[name]))
    if not affine:
        raise MisfitError(
            f"its gain of {channel * spatial:g} folds only into an unshared normalisation or convolution "
            "right before the attention; save model.state_dict() instead"
        )
    for tensor in affine:
        _scale(state, tensor, channel * spatial)
    _scale(state, f"{slot}.channel.fc1.weight", 1 / (channel * spatial))
    _scale(state, f"{slot}.spatial.conv.weight", 1 / spatial)


def affine_before(block: nn.Module) -> nn.Module | None:
    """The layer with weight and bias whose output is the input of the attention of `block`, if any."""
    route = type(block)._cbam_route  # pyright: ignore[reportAttributeAccessIssue]
    if route.when == "after":
        module = block.get_submodule(route.child)
    else:
        module = _producer(block, route)
    while module is not None and not isinstance(module, _NORMS):
        if type(module) is nn.Conv2d:
            return module
        module = _producer(module, None)
    return module if module is not None and _ends_in_affine(module) else None


def _ends_in_affine(norm: nn.Module) -> bool:
    """Whether a norm ends with its affine map: torch's do, and timm's if they have no activation."""
    ours = type(norm).forward in _FORWARDS
    children = list(norm.children())
    no_activation = bool(children) and all(type(child) is nn.Identity for child in children)
    return getattr(norm, "affine", False) and (ours or no_activation)


def _producer(parent: nn.Module, route: Route | None) -> nn.Module | None:
    """The child of `parent` whose output, used nowhere else, is the value at `route`, or returned."""
    try:
        graph = trace(parent)
    except Exception:  # the forward cannot be traced, so nothing is known
        return None
    if route is None or route.when == "output":
        value: Any = graph.output_node().args[0]
    elif route.when == "before":
        value = next(
            (n.args[0] for n in graph.nodes if n.op == "call_module" and n.target == route.child), None
        )
    else:
        value = next((n for n in graph.nodes if n.name == route.child), None)
    while isinstance(value, Node) and value.op == "call_module":
        # for a "graph" route, the value still has the users that attention comes before
        if len(value.users) != 1 and not (route and route.when == "graph"):
            return None
        child = parent.get_submodule(str(value.target))
        if type(child) is not nn.Identity:
            return child
        value = value.args[0]
    return None


def _affine_names(target: Target, affine: nn.Module | None) -> list[str]:
    """The names of the weight and bias of a layer; empty if they are shared or computed from others."""
    if affine is None:
        return []
    name = next(name for name, module in target.model.named_modules() if module is affine)
    tensors = [under(name, kind) for kind in ("weight", "bias") if getattr(affine, kind) is not None]
    uses = [p for _, p in target.model.named_parameters(remove_duplicate=False)]
    own = all(sum(p is getattr(affine, kind) for p in uses) < 2 for kind in ("weight", "bias"))
    return tensors if own and all(tensor in target.tensors for tensor in tensors) else []


def _scale(state: dict[str, Tensor], name: str, factor: float) -> None:
    scaled = state[name] * factor
    if math.frexp(factor)[0] != 0.5 or not torch.equal(scaled / factor, state[name]):
        raise MisfitError(
            f"folding its gain multiplies {name} by {factor:g}, which is not exact in {scaled.dtype}; a gain "
            "must be a power of two; for float16's narrow range, convert copy.deepcopy(model).float()"
        )
    state[name] = scaled


def _renamed(state: dict[str, Tensor], target: Target, to: str) -> dict[str, Tensor]:
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    new_names = {}
    for block in target.blocks:
        for ours, released, timm in NAMES:
            theirs = f"{SLOT}.{released}" if to == "released" else f"se.{timm}"
            new_names[under(block, f"{SLOT}.{ours}")] = under(block, theirs)
    for name, value in state.items():
        if to == "timm" and name in new_names:
            value = _as_timm(name, value)
        renamed[new_names.get(name, name)] = value
    # torchvision's MNASNet refuses a state dict without the version in its metadata
    renamed._metadata = target.model.state_dict()._metadata  # pyright: ignore
    return renamed


def _as_timm(name: str, value: Tensor) -> Tensor:
    if name.endswith((".fc1.weight", ".fc2.weight")):
        return value[:, :, None, None]
    return value.flip(1) if name.endswith(".spatial.conv.weight") else value
