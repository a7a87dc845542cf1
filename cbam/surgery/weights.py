"""Load weights of plain networks, our own, the authors' released checkpoints and other implementations.

Loading is all or nothing: everything is read, renamed and checked before the first value is copied.
Files of other implementations imply gain 1, ours contain the gain if it is not 1: the model computes what
the author of the file computed, whichever start its attention had.
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
_MAX_DEPTH = 4  # of dicts around a state dict; a dict may contain itself
_OWN_HEAD = 'cbam.load_weights(..., head="skip") keeps the model\'s own last layer. The model is unchanged'
_COUNTER = ".num_batches_tracked"  # absent in files older than torch 0.4.1, and not part of the function


class _OtherClasses(MisfitError):
    """Only the last layer has a different shape."""

    def __init__(self, message: str, classes: int) -> None:
        super().__init__(message)
        self.classes = classes


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did.

    Attributes:
        format: "plain" (no attention in the file), "cbam" (ours), "released", "timm", "mmyolo" or "luuuyi".
        tensors: how many tensors of the model now have the values of the file.
        missing: attention tensors that are not in the file; they keep their values.
        head_skipped: whether the last layer kept its own values.
        eval_only: whether the model matches the file's implementation in eval mode only: the spatial gate of
            the file has no BatchNorm, and the model's is set to add the bias and do nothing else.
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
    `module.` and `_orig_mod.`, and a surrounding dict such as `dict(epoch, state_dict, ...)`, are removed.
    Every tensor of the plain network must be present; attention may be absent as a whole and then keeps its
    values. Attention of other implementations is translated if ours computes the same, and otherwise refused
    with the reason (docs/dialects.md); it may belong to an attached block, or be where the model has a
    `cbam.CBAM` of its own.

    The checksums in a `torch.save` file reveal a flipped bit. Safetensors files, and files in torch's format
    from before 2020, have none: only damage to the structure, or NaN and infinity, are detected.

    Args:
        model: plain, or with attention attached.
        source: a path, or a state dict.
        head: "load" includes the file's last linear layer (both of a distilled network); "skip" keeps the
            model's own, for other classes.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: unreadable, damaged, unsafe, or it does not fit (OtherClassesError if only the last
            layer does not). The model is unchanged.
        InputError: neither a path nor a state dict, or an unknown `head`.
        MissingExtraError: the file is safetensors, and the package to read it is not installed.
    """
    target, values, gains, loaded = _checked(model, source, head)
    target.copy(values, gains)
    return loaded


def check_weights(model: nn.Module, source: str | PathLike[str] | Mapping[str, Any]) -> Loaded:
    """What `load_weights` would do, and raise, without doing it."""
    return _checked(model, source, "load")[-1]


def _checked(
    model: nn.Module, source: str | PathLike[str] | Mapping[str, Any], head: str
) -> tuple[Target, dict[str, Tensor], dict[str, float], Loaded]:
    """The target, the checked values and gains to copy into it, and the report."""
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
        gains = _pop_gains(tensors, target)
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
    """The state dict in `content`, without surrounding dicts and prefixes."""
    for _ in range(_MAX_DEPTH):
        inner = [w for w in _WRAPPERS if _holds_tensors(content.get(w))] if _is_dict(content) else []
        content = content[inner[0]] if inner else content
    if not isinstance(content, Mapping):
        raise MisfitError(f"it contains a {type(content).__name__}, not a state dict")
    if not content:
        raise MisfitError("it is an empty dict")
    invalid = [
        f"{key} ({type(value).__name__})" for key, value in content.items() if not _is_plain(key, value)
    ]
    if invalid:
        raise MisfitError(f"it is not a state dict of dense tensors: {some(invalid)}")
    tensors = {}
    for key, value in content.items():
        name = key if key in target.tensors else _stripped(key)
        if name in tensors:
            raise MisfitError(f"two of its names are {name} once 'module.' and '_orig_mod.' are removed")
        tensors[name] = value.detach()
    return tensors


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _holds_tensors(value: Any) -> bool:
    """Whether a dict contains a tensor, or may contain one further down; a configuration does not."""
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


def _pop_gains(tensors: dict[str, Tensor], target: Target) -> dict[str, float]:
    """Remove and return the gains of gates whose weights are in `tensors`; the default is 1."""
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
    """Check the names, and return the attention tensors missing in the file: none, or all of them."""
    wanted = [name for name in target.tensors if name not in kept]
    missing = [name for name in wanted if name not in values and not name.endswith(_COUNTER)]
    unexpected = [name for name in values if name not in target.tensors]
    absent = [name for name in missing if name in target.attention]
    if target.attention.isdisjoint(values):
        missing = [name for name in missing if name not in target.attention]
    if not missing and not unexpected:
        return absent
    problems = [
        f"{len(names)} {kind}: {some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    matched = sum(name in values for name in wanted)
    summary = f"{matched} of {len(wanted)} names fit {type(target.model).__name__}; {'; '.join(problems)}"
    raise MisfitError(summary + _hint(missing, unexpected, target))


def _hint(missing: list[str], unexpected: list[str], target: Target) -> str:
    """What would have worked, judging by the names."""
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
    message = f"{len(wrong)} with a different shape: {some(listed)}"
    classes, own = ({n for name in wrong for n in of[name].shape[:1]} for of in (values, target.tensors))
    if wrong <= target.head() and len(classes) == 1 and classes != own:
        raise _OtherClasses(message, *classes)
    raise MisfitError(message)


def _check_values(values: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The values in the dtypes of the model, checked to be finite."""
    invalid = [
        f"{name} ({value.dtype})"
        for name, value in values.items()
        if _number_kind(value) != _number_kind(target.tensors[name])
    ]
    if invalid:
        raise MisfitError(f"{len(invalid)} with an incompatible dtype: {some(invalid)}")
    converted = {name: value.to(target.tensors[name].dtype) for name, value in values.items()}
    broken = [name for name, value in converted.items() if not value.isfinite().all()]
    if broken:
        raise MisfitError(
            f"{len(broken)} tensors hold NaN or infinity in {converted[broken[0]].dtype}: {some(broken)}"
        )
    return converted


def _number_kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()
