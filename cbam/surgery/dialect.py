"""The names of weights in each format, and the tensors, attached blocks and gates of a model."""

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cbam.errors import InputError
from cbam.nn import CBAM
from cbam.nn.gate import SigmoidGate
from cbam.surgery.route import SLOT, is_refined

# ours, under `<block>.cbam.`; the released code's, under the same; timm's CbamModule, under `<block>.se.`
NAMES = [
    ("channel.fc1.weight", "ChannelGate.mlp.1.weight", "channel.fc1.weight"),
    ("channel.fc1.bias", "ChannelGate.mlp.1.bias", "channel.fc1.bias"),
    ("channel.fc2.weight", "ChannelGate.mlp.3.weight", "channel.fc2.weight"),
    ("channel.fc2.bias", "ChannelGate.mlp.3.bias", "channel.fc2.bias"),
    ("spatial.conv.weight", "SpatialGate.spatial.conv.weight", "spatial.conv.conv.weight"),
    *(
        (f"spatial.bn.{name}", f"SpatialGate.spatial.bn.{name}", f"spatial.conv.bn.{name}")
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ),
]


class MisfitError(Exception):
    """Weights do not fit; the message says why, and the caller adds their source."""


class Target:
    """The tensors, attached blocks and gates of a model, by name.

    Wrappers (DistributedDataParallel, torch.compile) are removed. Gains are not among the tensors, because
    their keys depend on their values.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model = unwrapped(model)
        modules = list(model.named_modules(remove_duplicate=False))
        self.blocks = {name: module for name, module in modules if is_refined(module)}
        self.gates = {n: m for n, m in modules if isinstance(m, SigmoidGate)}
        gains = {under(name, "gain") for name in self.gates}
        state = model.state_dict()
        self.tensors = {n: v for n, v in state.items() if isinstance(v, Tensor) and n not in gains}
        if any(v.is_meta or is_lazy(v) for v in self.tensors.values()):
            raise InputError(
                f"{type(model).__name__} has tensors without memory: call to_empty, or run it once"
            )
        if any(hasattr(v, "full_tensor") for v in self.tensors.values()):
            raise InputError(
                f"{type(model).__name__} is sharded (fully_shard): load the weights before sharding"
            )
        attached = tuple(under(block, f"{SLOT}.") for block in self.blocks)
        self.attention = {name for name in self.tensors if name.startswith(attached)}
        # prefixes of attention, both attached and of a CBAM that is part of the network
        self.slots = {*attached, *(under(n, "") for n, m in modules if isinstance(m, CBAM))}

    def head(self) -> set[str]:
        """The tensors of the classifier: the last linear layer or convolution outside attached attention.

        A timm network may have two classifiers, as distilled ones do: then the last layer of each.
        """
        modules = list(self.model.named_modules())
        layers = [
            name
            for name, module in modules
            if isinstance(module, nn.Linear | nn.Conv2d) and under(name, "weight") not in self.attention
        ]
        places = [name for name, module in modules if module in _distilled_heads(self.model)] or [""]
        last = [[f"{n}." for n in layers if f"{n}.".startswith(under(place, ""))][-1:] for place in places]
        return {name for name in self.tensors if name.startswith(tuple(itertools.chain(*last)))}

    def copy(self, values: Mapping[str, Tensor], gains: Mapping[str, float]) -> None:
        """Copy checked values; if that fails nevertheless, restore everything."""
        before = {name: value.clone() for name, value in self.tensors.items()}
        gains_before = {gate: gate.gain for gate in self.gates.values()}
        try:
            for name, gain in gains.items():
                self.gates[name].set_gain(gain)
            state = self.model.state_dict()  # with metadata, which marks the names as current
            state.update(values)
            self.model.load_state_dict(state)
        except BaseException:
            for gate, gain in gains_before.items():
                gate.gain = gain
            for name, value in before.items():
                self.tensors[name].copy_(value)
            raise


def _distilled_heads(model: Any) -> tuple[nn.Module, ...]:
    heads = model.get_classifier() if type(model).__module__.startswith("timm.") else ()
    return heads if isinstance(heads, tuple) else ()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or _compiled(model):
        model = model._orig_mod if _compiled(model) else model.module  # pyright: ignore
    return model


def _compiled(model: nn.Module) -> bool:
    return isinstance(getattr(model, "_orig_mod", None), nn.Module)


def under(module: str, name: str) -> str:
    """The full name of `name` in `module`; the model itself is ""."""
    return f"{module}.{name}" if module else name


def some(names: list[str]) -> str:
    """The first five names, and the number of others."""
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
