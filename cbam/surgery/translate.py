"""Weights of other CBAM implementations under our names, where ours computes the same function.

docs/dialects.md compares what each implementation computes, and measures what is claimed here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cbam.nn import CBAM
from cbam.surgery.dialect import NAMES, MisfitError, Target, under
from cbam.surgery.route import SLOT

_RESIDUAL = "adds its input to its output, x + CBAM(x), which no gate computes"


@dataclass(frozen=True)
class Dialect:
    """The CBAM of one implementation, by the names of its weights.

    Attributes:
        name: the value of `Loaded.format`.
        names: theirs -> ours, below the attention; or below the block, if the gates are its children.
        marks: those of `names` that no other implementation uses.
        mean_first: whether the spatial convolution reads [mean, max] instead of [max, mean].
        normed: whether a BatchNorm follows that convolution.
        refusal: why ours cannot compute its function; "" if it can.
    """

    name: str
    names: Mapping[str, str]
    marks: tuple[str, ...]
    mean_first: bool = False
    normed: bool = True
    refusal: str = ""


def _layers(fc1: str, fc2: str, conv: str) -> dict[str, str]:
    return {
        f"{fc1}.weight": "channel.fc1.weight",
        f"{fc1}.bias": "channel.fc1.bias",
        f"{fc2}.weight": "channel.fc2.weight",
        f"{fc2}.bias": "channel.fc2.bias",
        f"{conv}.weight": "spatial.conv.weight",
        f"{conv}.bias": "spatial.bn.bias",
    }


_RELEASED = {released: ours for ours, released, _ in NAMES}
DIALECTS = (
    Dialect("released", _RELEASED, tuple(_RELEASED)),
    Dialect("timm", {timm: ours for ours, _, timm in NAMES}, ("spatial.conv.conv.weight",), mean_first=True),
    Dialect(
        "mmyolo",
        _layers("channel_attention.fc.0.conv", "channel_attention.fc.1.conv", "spatial_attention.conv.conv"),
        ("spatial_attention.conv.conv.weight",),
        mean_first=True,
        normed=False,
    ),
    Dialect(
        "luuuyi",
        _layers("ca.fc.0", "ca.fc.2", "sa.conv1") | _layers("ca.fc1", "ca.fc2", "sa.conv1"),  # both versions
        ("sa.conv1.weight",),
        mean_first=True,
        normed=False,
    ),
    Dialect(
        "External-Attention",
        _layers("ca.se.0", "ca.se.2", "sa.conv"),
        ("ca.se.0.weight",),
        normed=False,
        refusal=_RESIDUAL,
    ),
    Dialect(
        "Peachypie98",
        _layers("cam.linear.0", "cam.linear.2", "sam.conv"),
        ("cam.linear.0.weight",),
        normed=False,
        refusal=_RESIDUAL,
    ),
    Dialect(
        "ultralytics",
        {"spatial_attention.cv1.weight": "spatial.conv.weight"},
        ("spatial_attention.cv1.weight",),
        mean_first=True,
        normed=False,
        refusal="computes its channel gate with one layer from C to C on the mean only, without a maximum, "
        "a hidden layer or a ReLU",
    ),
)


def dialect_of(names: Collection[str]) -> Dialect | None:
    """The other implementation whose attention is among these names, if any."""
    for dialect in DIALECTS:
        ends = tuple(f".{mark}" for mark in dialect.marks)
        if any(f".{name}".endswith(ends) for name in names):
            return dialect
    return None


def translated(tensors: dict[str, Tensor], target: Target) -> tuple[str, dict[str, Tensor], bool]:
    """The file's format, its tensors under our names, and whether they are exact in eval mode only.

    Raises:
        MisfitError: ours cannot compute what the file's implementation computes.
    """
    dialect = dialect_of([name for name in tensors if name not in target.tensors])
    if dialect is None:
        return ("plain" if target.attention.isdisjoint(tensors) else "cbam"), dict(tensors), False
    if dialect.refusal:
        raise MisfitError(f"its attention is that of {dialect.name}, which {dialect.refusal}")
    renamed = _renamed(tensors, dialect, target)
    for slot in target.slots:
        if isinstance(target.model.get_submodule(slot.removesuffix(".")), CBAM):
            _complete(renamed, slot, dialect, target)
    return dialect.name, renamed, not dialect.normed


def _renamed(tensors: dict[str, Tensor], dialect: Dialect, target: Target) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        new = name if name in target.tensors else _our_name(name, dialect, target)
        if new in renamed:
            raise MisfitError(f"two of its tensors are for {new}")
        renamed[new] = value
    return renamed


def _our_name(name: str, dialect: Dialect, target: Target) -> str:
    """Our name for `<attention>.<theirs>`, `<block>.<any child>.<theirs>` or `<block>.<theirs>`."""
    theirs = next((suffix for suffix in dialect.names if f".{name}".endswith(f".{suffix}")), None)
    if theirs is None:
        return name
    ours = dialect.names[theirs]
    place = name.removesuffix(theirs).removesuffix(".")
    if under(place, "") in target.slots:
        return under(place, ours)
    for block in (place, place.rpartition(".")[0]):
        if block in target.blocks:
            return under(block, f"{SLOT}.{ours}")
    return name


def _complete(tensors: dict[str, Tensor], slot: str, dialect: Dialect, target: Target) -> None:
    """Turn 1x1 convolutions into matrices, [mean, max] into [max, mean]; add missing biases and the norm."""
    for layer in ("fc1", "fc2"):
        weight, bias = tensors.get(f"{slot}channel.{layer}.weight"), f"{slot}channel.{layer}.bias"
        if weight is not None and weight.shape[2:] == (1, 1):
            tensors[f"{slot}channel.{layer}.weight"] = weight[:, :, 0, 0]
        if weight is not None and bias in target.tensors and dialect.name != "released":
            tensors.setdefault(bias, torch.zeros_like(target.tensors[bias]))
    conv = tensors.get(f"{slot}spatial.conv.weight")
    if conv is not None and dialect.mean_first and conv.dim() == 4:
        tensors[f"{slot}spatial.conv.weight"] = conv.flip(1)
    if conv is not None and not dialect.normed:
        _add_norm(tensors, f"{slot}spatial.bn.", target)


def _add_norm(tensors: dict[str, Tensor], norm: str, target: Target) -> None:
    """Add a BatchNorm that, in eval mode, adds the convolution's bias and does nothing else."""
    if f"{norm}running_var" not in target.tensors:
        return
    eps: Any = target.model.get_submodule(norm.removesuffix(".")).eps
    values = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1 - eps}
    for name, value in values.items():
        if f"{norm}{name}" in target.tensors:
            tensors.setdefault(f"{norm}{name}", torch.full_like(target.tensors[f"{norm}{name}"], value))
