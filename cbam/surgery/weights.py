"""Load weights of plain networks, of ours, of the authors' released checkpoints and of other codes.

Loading is all or nothing: everything is read, renamed and checked before the first value is copied.
Other codes' files mean gain 1, ours say their gain where it is not 1: the model computes what the file's
author computed, however its attention was started.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbam.errors import CheckpointError, InputError, OtherClassesError
from cbam.surgery.checkpoint import read
from cbam.surgery.dialect import MisfitError, Target, some, under
from cbam.surgery.route import SLOT
from cbam.surgery.translate import dialect_of, translated

__all__ = ["Loaded", "check_weights", "load_weights"]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params", "weights")
_MAX_DEPTH = 4  # of dicts around a state dict; a dict may hold itself
_OWN_HEAD = 'cbam.load_weights(..., head="skip") keeps the model\'s own last layer. The model is unchanged'
_COUNTER = ".num_batches_tracked"  # absent in files older than torch 0.4.1, and no part of the function


class _OtherClasses(MisfitError):
    """The last layer alone is of another shape."""

    def __init__(self, told: str, classes: int) -> None:
        super().__init__(told)
        self.classes = classes


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did.

    Attributes:
        format: "plain" (no attention in the file), "cbam" (ours), "released", "timm", "mmyolo" or "luuuyi".
        tensors: how many tensors of the model now hold the file's values.
        missing: attention tensors that the file does not have; they keep their values.
        head_skipped: whether the last layer kept its own values.
        eval_only: whether the model computes what the file's code does in eval mode alone: the file's spatial
            gate has no BatchNorm, and the model's is set to add the bias and do nothing else.
    """

    format: str
    tensors: int
    missing: tuple[str, ...]
    head_skipped: bool
    eval_only: bool = False


def load_weights(
    model: nn.Module, source: str | PathLike[str] | Mapping[str, Any], *, head: str = "load"
) -> Loaded:
    """Copy weights into `model`, all or nothing.

    Files are safetensors or `torch.save` files, read without running any code from them. The prefixes
    `module.` and `_orig_mod.`, and a surrounding dict such as `dict(epoch, state_dict, ...)`, are taken off.
    Every tensor of the plain network must be there; attention may be absent as a whole and then stays as it
    is. Attention of other codes is translated where ours computes the same, and refused with the reason where
    it does not (docs/dialects.md); it may belong to an attached block, or stand where the model has a
    `cbam.CBAM` of its own.

    A flipped bit in a `torch.save` file is found by the file's own checksums. A safetensors file, and one in
    torch's format of before 2020, has none: there only damage to the structure or the finiteness shows.

    Args:
        model: plain, or with attention attached.
        source: a path, or a state dict.
        head: "load" takes the file's last linear layer too (both of a distilled network); "skip" leaves the
            model's own, for other classes.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: unreadable, damaged, unsafe, or it does not fit (OtherClassesError where nothing but
            the last layer does not). The model is unchanged.
        InputError: neither a path nor a state dict, or an unknown `head`.
        MissingExtraError: the file is safetensors, and the package to read it is absent.
    """
    target, values, gains, loaded = _fitted(model, source, head)
    target.copy(values, gains)
    return loaded


def check_weights(model: nn.Module, source: str | PathLike[str] | Mapping[str, Any]) -> Loaded:
    """What `load_weights` would do, and raise, without doing it."""
    return _fitted(model, source, "load")[-1]


def _fitted(
    model: nn.Module, source: str | PathLike[str] | Mapping[str, Any], head: str
) -> tuple[Target, dict[str, Tensor], dict[str, float], Loaded]:
    """What is to be copied, and where to, once all of it has been checked."""
    if head not in ("load", "skip"):
        raise InputError(f'head must be "load" or "skip", got {head!r}')
    if isinstance(source, Mapping):
        content, where = source, "the state dict"
    elif isinstance(source, str | PathLike):
        content, where = read(Path(source)), str(source)
    else:
        raise InputError(f"expected a path or a state dict, got {type(source).__name__}")
    target = Target(model)
    try:
        tensors = _tensors(content, target)
        file_format, tensors, eval_only = translated(tensors, target)
        tensors = _without_counters(tensors, target)
        gains = _take_gains(tensors, target)
        kept = target.head() if head == "skip" else set()
        values = {name: value for name, value in tensors.items() if name not in kept}
        missing = _check_names(values, target, kept)
        _check_shapes(values, target)
        values = _check_values(values, target)
    except _OtherClasses as misfit:
        raise OtherClassesError(f"{where}: {misfit}", misfit.classes, _OWN_HEAD) from None
    except MisfitError as misfit:
        raise CheckpointError(f"{where}: {misfit}. The model is unchanged") from None
    loaded = Loaded(file_format, len(values), tuple(missing), bool(kept), eval_only)
    return target, values, gains, loaded


def _tensors(content: Any, target: Target) -> dict[str, Tensor]:
    """The state dict in `content`, without wrapper dicts and prefixes."""
    for _ in range(_MAX_DEPTH):
        inner = [w for w in _WRAPPERS if _holds_tensors(content.get(w))] if _is_dict(content) else []
        content = content[inner[0]] if inner else content
    if not isinstance(content, Mapping):
        raise MisfitError(f"it holds a {type(content).__name__}, not a state dict")
    if not content:
        raise MisfitError("it is an empty dict")
    odd = [f"{key} ({type(value).__name__})" for key, value in content.items() if not _is_plain(key, value)]
    if odd:
        raise MisfitError(f"it is no state dict of dense tensors: {some(odd)}")
    tensors = {}
    for key, value in content.items():
        name = key if key in target.tensors else _stripped(key)
        if name in tensors:
            raise MisfitError(f"two of its names are {name} once 'module.' and '_orig_mod.' are taken off")
        tensors[name] = value.detach()
    return tensors


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _holds_tensors(value: Any) -> bool:
    """Whether a dict holds a tensor, or may hold one further down; a configuration does not."""
    return _is_dict(value) and any(
        isinstance(inner, Tensor) or (key in _WRAPPERS and _is_dict(inner)) for key, inner in value.items()
    )


def _is_plain(key: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(key, str) and dense and not value.is_quantized and not value.is_meta


def _stripped(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _take_gains(tensors: dict[str, Tensor], target: Target) -> dict[str, float]:
    """The gain of every gate whose weights are in `tensors`, 1 by default; gains are removed from these."""
    gains = {}
    for gate in target.gates:
        if any(under(gate, name) in tensors for name, _ in target.gates[gate].named_parameters()):
            gain = tensors.pop(under(gate, "gain"), torch.ones(()))
            if gain.numel() != 1 or gain.is_complex() or not 0 < gain.item() < math.inf:
                raise MisfitError(f"{under(gate, 'gain')} must be one positive number, got {gain.tolist()}")
            gains[gate] = gain.item()
    return gains


def _without_counters(tensors: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The tensors without the counters of BatchNorms that are frozen in the model."""

    def frozen(name: str) -> bool:
        mean = name.removesuffix(_COUNTER) + ".running_mean"
        return name.endswith(_COUNTER) and name not in target.tensors and mean in target.tensors

    return {name: value for name, value in tensors.items() if not frozen(name)}


def _check_names(values: Collection[str], target: Target, kept: set[str]) -> list[str]:
    """The attention tensors that the file does not have: none, or all of them."""
    wanted = [name for name in target.tensors if name not in kept]
    missing = [name for name in wanted if name not in values and not name.endswith(_COUNTER)]
    unexpected = [name for name in values if name not in target.tensors]
    absent = [name for name in missing if name in target.attention]
    if target.attention.isdisjoint(values):
        missing = [name for name in missing if name not in target.attention]
    if not missing and not unexpected:
        return absent
    complaints = [
        f"{len(names)} {kind}: {some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    matched = sum(name in values for name in wanted)
    summary = f"{matched} of {len(wanted)} names fit {type(target.model).__name__}; {'; '.join(complaints)}"
    raise MisfitError(summary + _hint(missing, unexpected, target))


def _hint(missing: list[str], unexpected: list[str], target: Target) -> str:
    """What would have worked, as far as the names show."""
    if not target.slots and (dialect_of(unexpected) or any(f".{SLOT}." in f".{name}" for name in unexpected)):
        return (
            ". The file has attention: call cbam.attach(model) first, or name the network with it, as in "
            "resnet50+cbam"
        )
    if prefix := _prefix(unexpected, missing):
        return (
            f". The file's names begin with {prefix!r}: load "
            f"{{k.removeprefix({prefix!r}): v for k, v in state_dict.items()}}"
        )
    if prefix := _prefix(missing, unexpected):
        return f". The model's names begin with {prefix!r}: load into model.get_submodule({prefix[:-1]!r})"
    return ""


def _prefix(longer: list[str], shorter: Iterable[str]) -> str:
    """The prefix that turns most of the longer names into shorter ones; empty if there is none."""
    ends = set(shorter)
    for name in longer[:1]:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join(parts[:cut]) + "."
            hits = sum(other.removeprefix(prefix) in ends for other in longer if other.startswith(prefix))
            if 2 * hits > len(longer):
                return prefix
    return ""


def _check_shapes(values: Mapping[str, Tensor], target: Target) -> None:
    wrong = {name for name, value in values.items() if value.shape != target.tensors[name].shape}
    if not wrong:
        return
    listed = [
        f"{name} is {tuple(values[name].shape)}, the model's {tuple(target.tensors[name].shape)}"
        for name in values
        if name in wrong
    ]
    told = f"{len(wrong)} of other shape: {some(listed)}"
    classes, own = ({n for name in wrong for n in of[name].shape[:1]} for of in (values, target.tensors))
    if wrong <= target.head() and len(classes) == 1 and classes != own:
        raise _OtherClasses(told, *classes)
    raise MisfitError(told)


def _check_values(values: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The values in the model's dtypes, every one of them finite."""
    odd = [
        f"{name} ({value.dtype})"
        for name, value in values.items()
        if _kind(value) != _kind(target.tensors[name])
    ]
    if odd:
        raise MisfitError(f"{len(odd)} of another kind of number: {some(odd)}")
    converted = {name: value.to(target.tensors[name].dtype) for name, value in values.items()}
    broken = [name for name, value in converted.items() if not value.isfinite().all()]
    if broken:
        raise MisfitError(
            f"{len(broken)} tensors hold NaN or infinity in {converted[broken[0]].dtype}: {some(broken)}"
        )
    return converted


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()
