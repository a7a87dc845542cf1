"""Weights from and to files of other shapes: plain networks, ours, the authors' released checkpoints, timm's.

Loading is all or nothing: everything is read, renamed and checked before the first value is copied.
Released and timm files mean gain 1, ours say their gain where it is not 1: the model computes what the file's
author computed, however its attention was started.
"""

import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbam.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingExtraError
from cbam.nn import CBAM, ChannelAttention, SpatialAttention
from cbam.surgery.graph import trace
from cbam.surgery.route import SLOT, is_refined

# ours, under `<block>.cbam.`; the released code, under the same; timm's CbamModule, under `<block>.se.`
_NAMES = [
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
_FROM_RELEASED = {released: ours for ours, released, _ in _NAMES}
_FROM_TIMM = {timm: ours for ours, _, timm in _NAMES}
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params", "weights")
_COUNTER = ".num_batches_tracked"  # absent in files older than torch 0.4.1, and no part of the function


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did.

    Attributes:
        format: "plain" (no attention in the file), "cbam" (ours), "released" or "timm".
        tensors: how many tensors of the model now hold the file's values.
        missing: attention tensors that the file does not have; they keep their values.
        head_reset: whether the head kept its own values.
    """

    format: str
    tensors: int
    missing: tuple[str, ...]
    head_reset: bool


def load_weights(
    model: nn.Module, source: str | PathLike[str] | Mapping[str, Any], *, head: str = "keep"
) -> Loaded:
    """Copy weights into `model`, all or nothing.

    Files are safetensors or `torch.save` files, read without running any code from them. The prefixes
    `module.` and `_orig_mod.`, and a surrounding dict such as `dict(epoch, state_dict, ...)`, are taken off.
    Every tensor of the plain network must be there; attention may be absent as a whole and then stays as it
    is.

    A flipped bit in a `torch.save` file is found by the file's own checksums. A safetensors file has none:
    there only damage to the header, the length or the finiteness of a value shows.

    Args:
        model: plain, or with attention attached.
        source: a path, or a state dict.
        head: "keep" loads the last linear layer too; "reset" leaves the model's own, for other classes.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: unreadable, damaged, unsafe, or it does not fit. The model is unchanged.
        InputError: neither a path nor a state dict, or an unknown `head`.
        MissingExtraError: the file is safetensors, and the package to read it is absent.
    """
    if head not in ("keep", "reset"):
        raise InputError(f'head must be "keep" or "reset", got {head!r}')
    if isinstance(source, Mapping):
        content, where = source, "the state dict"
    elif isinstance(source, str | PathLike):
        content, where = _read(Path(source)), str(source)
    else:
        raise InputError(f"expected a path or a state dict, got {type(source).__name__}")
    target = _Target(model)
    try:
        tensors = _tensors(content, target)
        file_format, tensors = _translated(tensors, target)
        gains = _take_gains(tensors, target)
        kept = target.head() if head == "reset" else set()
        values = {name: value for name, value in tensors.items() if name not in kept}
        missing = _check_names(values, target, kept)
        _check_shapes(values, target)
        values = _check_values(values, target)
    except _MisfitError as misfit:
        raise CheckpointError(f"{where}: {misfit}. The model is unchanged") from None
    target.copy(values, gains)
    return Loaded(file_format, len(values), tuple(missing), bool(kept))


def convert_state_dict(model: nn.Module, to: str = "released") -> dict[str, Tensor]:
    """The weights of `model` under the names of the authors' released code, or of timm's CbamModule.

    The copy has its own memory. A gain, which neither format knows, is folded by powers of two into the
    affine layer before the attention (times both gains), the first layer of the MLP (divided by both) and the
    convolution of the spatial gate (divided by its gain). In eval mode the function stays the same to the
    bit, as long as no activation leaves the dtype's normal range (float16 ends at 65504).

    timm's module must have biases: `block_args={"attn_layer": partial(CbamModule, mlp_bias=True)}` with
    CbamModule from timm.layers.cbam.

    Args:
        model: a network with CBAM attached.
        to: "released" or "timm".

    Raises:
        InputError: an unknown format.
        CheckpointError: an attention, or a gain, that the format cannot hold; it names the block.
    """
    if to not in ("released", "timm"):
        raise InputError(f'to must be "released" or "timm", got {to!r}')
    target = _Target(model)
    if not target.blocks:
        raise CheckpointError(f"{type(model).__name__} has no attention attached; its state_dict() is plain")
    state = {name: value.detach().clone() for name, value in target.tensors.items()}
    for name, block in target.blocks.items():
        try:
            _check_convertible(block.get_submodule(SLOT), to)
            _fold_gains(target, name, state)
        except _MisfitError as misfit:
            raise CheckpointError(f"{name or type(block).__name__}: {misfit}") from None
    return _renamed(state, target, to)


class _MisfitError(Exception):
    """Why weights do not fit; the caller adds where they come from."""


# --- the model's side -----------------------------------------------------------------------------


class _Target:
    """The tensors, attached blocks and gates of a model, by name.

    A wrapper that only lends its module (DistributedDataParallel, torch.compile) is looked through. A gain is
    no tensor here: its key comes and goes with its value.
    """

    def __init__(self, model: nn.Module) -> None:
        while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or _compiled(model):
            model = model._orig_mod if _compiled(model) else model.module  # pyright: ignore
        self.model = model
        modules = list(model.named_modules(remove_duplicate=False))
        self.blocks = {name: module for name, module in modules if is_refined(module)}
        self.gates = {n: m for n, m in modules if isinstance(m, ChannelAttention | SpatialAttention)}
        gains = {_under(name, "gain") for name in self.gates}
        state = model.state_dict()
        self.tensors = {n: v for n, v in state.items() if isinstance(v, Tensor) and n not in gains}
        slots = tuple(_under(block, f"{SLOT}.") for block in self.blocks)
        self.attention = {name for name in self.tensors if name.startswith(slots)}

    def names_of(self, wanted: nn.Module) -> list[str]:
        """Every name of a module."""
        modules = self.model.named_modules(remove_duplicate=False)
        return [name for name, module in modules if module is wanted]

    def head(self) -> set[str]:
        """The tensors of the last linear layer or convolution that is no attention's: the classifier."""
        last = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and _under(name, "weight") not in self.attention
        ]
        return {name for name in self.tensors if last and name.startswith(f"{last[-1]}.")}

    def copy(self, values: Mapping[str, Tensor], gains: Mapping[str, float]) -> None:
        """Copy checked values; put everything back if that fails none the less."""
        before = {name: value.clone() for name, value in self.tensors.items()}
        gains_before = {gate: gate.gain for gate in self.gates.values()}
        try:
            for name, gain in gains.items():
                self.gates[name].set_gain(gain)
            state = self.model.state_dict()  # its metadata says that the names are today's
            state.update(values)
            self.model.load_state_dict(state)
        except BaseException:
            for gate, gain in gains_before.items():
                gate.gain = gain
            for name, value in before.items():
                self.tensors[name].copy_(value)
            raise


def _compiled(model: nn.Module) -> bool:
    return isinstance(getattr(model, "_orig_mod", None), nn.Module)


def _under(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


# --- from the file's names to the model's ---------------------------------------------------------


def _tensors(content: Any, target: _Target) -> dict[str, Tensor]:
    """The state dict inside `content`, without wrapper dicts and prefixes."""
    while isinstance(content, Mapping) and (inner := [w for w in _WRAPPERS if _is_dict(content.get(w))]):
        content = content[inner[0]]
    if not isinstance(content, Mapping):
        raise _MisfitError(f"it holds a {type(content).__name__}, not a state dict")
    if not content:
        raise _MisfitError("it is an empty dict")
    odd = [f"{key} ({type(value).__name__})" for key, value in content.items() if not _is_plain(key, value)]
    if odd:
        raise _MisfitError(f"it is no state dict of dense tensors: {_some(odd)}")
    tensors = {}
    for key, value in content.items():
        name = key if key in target.tensors else _stripped(key)
        if name in tensors:
            raise _MisfitError(f"two of its names are {name} once 'module.' and '_orig_mod.' are taken off")
        tensors[name] = value.detach()
    return tensors


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_plain(key: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(key, str) and dense and not value.is_quantized and not value.is_meta


def _stripped(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _translated(tensors: dict[str, Tensor], target: _Target) -> tuple[str, dict[str, Tensor]]:
    """The file's format, and its tensors under our names."""
    foreign = [name for name in tensors if name not in target.tensors]
    if any(name.endswith(tuple(f".{suffix}" for suffix in _FROM_RELEASED)) for name in foreign):
        return "released", _ours(tensors, target, _FROM_RELEASED)
    if any(name.endswith(".spatial.conv.conv.weight") for name in foreign):
        return "timm", _from_timm(_ours(tensors, target, _FROM_TIMM), target)
    return ("plain" if target.attention.isdisjoint(tensors) else "cbam"), dict(tensors)


def _ours(tensors: dict[str, Tensor], target: _Target, table: dict[str, str]) -> dict[str, Tensor]:
    """Rename `<block>.<any one name>.<theirs>` to `<block>.cbam.<ours>` at the attached blocks."""
    renamed = {}
    for name, value in tensors.items():
        new = name
        if name not in target.tensors:
            theirs = next((suffix for suffix in table if name.endswith(f".{suffix}")), "")
            block = name.removesuffix(f".{theirs}").rpartition(".")[0]
            if theirs and block in target.blocks:
                new = _under(block, f"{SLOT}.{table[theirs]}")
        if new in renamed:
            raise _MisfitError(f"it has two attentions for {new}")
        renamed[new] = value
    return renamed


def _from_timm(tensors: dict[str, Tensor], target: _Target) -> dict[str, Tensor]:
    """1x1 convolutions to matrices, [mean, max] to [max, mean], no biases to zero biases."""
    for block in target.blocks:
        slot = _under(block, SLOT)
        for layer in (f"{slot}.channel.fc1", f"{slot}.channel.fc2"):
            weight, bias = tensors.get(f"{layer}.weight"), f"{layer}.bias"
            if weight is not None and weight.shape[2:] == (1, 1):
                tensors[f"{layer}.weight"] = weight[:, :, 0, 0]
            if weight is not None and bias in target.tensors:
                tensors.setdefault(bias, torch.zeros_like(target.tensors[bias]))
        if (conv := tensors.get(f"{slot}.spatial.conv.weight")) is not None and conv.dim() == 4:
            tensors[f"{slot}.spatial.conv.weight"] = conv.flip(1)
    return tensors


def _take_gains(tensors: dict[str, Tensor], target: _Target) -> dict[str, float]:
    """The gain of every gate whose weights are in `tensors`: 1 unless said; what is said is removed there."""
    gains = {}
    for gate in target.gates:
        if any(f"{gate}.{name}" in tensors for name, _ in target.gates[gate].named_parameters()):
            gain = tensors.pop(f"{gate}.gain", torch.ones(()))
            if gain.numel() != 1 or not math.isfinite(gain.item()) or gain.item() <= 0:
                raise _MisfitError(f"{gate}.gain must be one positive number, got {gain.tolist()}")
            gains[gate] = gain.item()
    return gains


# --- what is checked before a value is copied -----------------------------------------------------


def _check_names(values: Collection[str], target: _Target, kept: set[str]) -> list[str]:
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
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    matched = sum(name in values for name in wanted)
    summary = f"{matched} of {len(wanted)} names fit {type(target.model).__name__}; {'; '.join(complaints)}"
    raise _MisfitError(summary + _hint(missing, unexpected, target))


def _hint(missing: list[str], unexpected: list[str], target: _Target) -> str:
    """What would have worked, as far as the names tell."""
    if not target.blocks and any(
        f".{SLOT}." in f".{name}" or name.endswith(".spatial.conv.conv.weight") for name in unexpected
    ):
        return ". The file has attention: call cbam.attach(model) first"
    if prefix := _prefix(unexpected, missing):
        return (
            f". The file's names begin with {prefix!r}: load "
            f"{{k.removeprefix({prefix!r}): v for k, v in state_dict.items()}}"
        )
    if prefix := _prefix(missing, unexpected):
        return f". The model's names begin with {prefix!r}: load into model.get_submodule({prefix[:-1]!r})"
    return ""


def _prefix(longer: list[str], shorter: Iterable[str]) -> str:
    """What most of the longer names have before a shorter one."""
    ends = set(shorter)
    for name in longer[:1]:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join(parts[:cut]) + "."
            hits = sum(other.removeprefix(prefix) in ends for other in longer if other.startswith(prefix))
            if 2 * hits > len(longer):
                return prefix
    return ""


def _check_shapes(values: Mapping[str, Tensor], target: _Target) -> None:
    wrong = {name for name, value in values.items() if value.shape != target.tensors[name].shape}
    if not wrong:
        return
    listed = [
        f"{name} is {tuple(values[name].shape)}, the model's {tuple(target.tensors[name].shape)}"
        for name in values
        if name in wrong
    ]
    advice = '. It has other classes: head="reset" keeps the model\'s own' if wrong <= target.head() else ""
    raise _MisfitError(f"{len(wrong)} of other shape: {_some(listed)}{advice}")


def _check_values(values: Mapping[str, Tensor], target: _Target) -> dict[str, Tensor]:
    """The values in the model's dtypes, every one of them finite."""
    odd = [
        f"{name} ({value.dtype})"
        for name, value in values.items()
        if _kind(value) != _kind(target.tensors[name])
    ]
    if odd:
        raise _MisfitError(f"{len(odd)} of another kind of number: {_some(odd)}")
    converted = {name: value.to(target.tensors[name].dtype) for name, value in values.items()}
    broken = [name for name, value in converted.items() if not value.isfinite().all()]
    if broken:
        raise _MisfitError(
            f"{len(broken)} tensors hold NaN or infinity in {converted[broken[0]].dtype}: {_some(broken)}"
        )
    return converted


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _some(names: list[str]) -> str:
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# --- reading files --------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """What the file holds, read without running code from it."""
    try:
        if not path.exists():
            raise CheckpointNotFoundError(f"{path}: no such file")
        if not path.is_file():
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            start = file.read(64)
        size = path.stat().st_size
        if size == 0:
            raise CheckpointError(f"{path}: the file is empty")
        if start[8:9] == b"{" and not start.startswith(b"PK"):
            return _read_safetensors(path, size)
        if start.startswith(b"PK"):
            _check_archive(path, size)
        elif not start.startswith(b"\x80"):
            raise CheckpointError(f"{path}: not a weights file, it starts with {start[:20]!r}{_guess(start)}")
        return _read_torch(path)
    except OSError as error:
        if isinstance(error, CheckpointNotFoundError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _guess(start: bytes) -> str:
    if start.lstrip().startswith(b"<"):
        return ", probably a web page saved by a failed download"
    if start.startswith(b"version https://git-lfs"):
        return ", a Git LFS pointer in place of the file: run git lfs pull"
    return ""


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError.of("reading a safetensors file", "vision") from error
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # the library has one error class for everything, outside OSError
        raise CheckpointError(
            f"{path}: damaged or cut off ({size} bytes, read as safetensors): {error}"
        ) from error


def _check_archive(path: Path, size: int) -> None:
    """Refuse a zip archive that is cut, fails its checksums, or unpacks to more than it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.filename.endswith("/constants.pkl") for member in members):
                raise CheckpointError(f"{path}: a TorchScript program; save its state_dict() instead")
            unpacked = sum(member.file_size for member in members)
            if unpacked > size:
                raise CheckpointError(
                    f"{path}: claims to unpack to {unpacked} bytes out of {size}; torch.save never compresses"
                )
            if not any(member.filename.endswith("/data.pkl") for member in members):
                raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged or cut off ({size} bytes): {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, the checksum of {damaged} is wrong")


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := _unsafe_globals(path, error):
            raise CheckpointError(
                f"{path}: refused, it asks to run {_some(found)}, which plain weights never need. If "
                "you trust it, save the weights alone where it was made: torch.save(model.state_dict(), path)"
            ) from None
        raise CheckpointError(f"{path}: damaged, or not plain weights: {_reason(error)}") from error
    except OSError:
        raise
    except Exception as error:  # torch raises nearly every builtin for a damaged file
        raise CheckpointError(f"{path}: damaged or not plain weights: {_reason(error)}") from error


def _unsafe_globals(path: Path, error: Exception) -> list[str]:
    """What a pickle names that plain weights do not need."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not an archive, or one that cannot be disassembled: the refusal names one
        found = []
    return sorted(found) or re.findall(r"(?:GLOBAL|class|function) ([\w.]+) ", str(error))


def _reason(error: Exception) -> str:
    """The first line of an error, without torch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return text.partition("\n")[0] or type(error).__name__


# --- the way back ---------------------------------------------------------------------------------


def _check_convertible(attention: nn.Module, to: str) -> None:
    if type(attention) is not CBAM:
        raise _MisfitError(
            f"its attention is {type(attention).__name__}, and {to} weights hold cbam.CBAM alone"
        )
    if set(attention.channel.pools) != {"avg", "max"}:
        raise _MisfitError(f"its pools are {attention.channel.pools}, and {to} weights mean avg and max")
    if to == "released" and attention.spatial.kernel_size != 7:
        raise _MisfitError(f"its spatial kernel is {attention.spatial.kernel_size}, the released code's is 7")


def _fold_gains(target: _Target, name: str, state: dict[str, Tensor]) -> None:
    """Move the gains of one block into its affine layer, MLP and 7x7, exactly."""
    block = target.blocks[name]
    slot = _under(name, SLOT)
    gates = (target.gates[f"{slot}.channel"], target.gates[f"{slot}.spatial"])
    channel, spatial = (1.0 if gate.gain is None else gate.gain.item() for gate in gates)
    if channel == spatial == 1:
        return
    affine = affine_before(block)
    names = target.names_of(affine) if affine is not None else []
    if affine is None or len(names) != 1:
        raise _MisfitError(
            f"its gain of {channel * spatial:g} folds only into a normalisation or convolution of its own "
            "right before the attention; save model.state_dict() instead"
        )
    for parameter in ("weight", "bias"):
        if f"{names[0]}.{parameter}" in state:
            _scale(state, f"{names[0]}.{parameter}", channel * spatial)
    _scale(state, f"{slot}.channel.fc1.weight", 1 / (channel * spatial))
    _scale(state, f"{slot}.spatial.conv.weight", 1 / spatial)


def affine_before(block: nn.Module) -> nn.Module | None:
    """The layer with weight and bias whose output is what the attention of `block` gets, if there is one."""
    name = _input_child(block)
    module = block.get_submodule(name) if name else None
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        acts = any(type(child) is not nn.Identity for child in module.children())  # timm's hold an activation
        return module if module.affine and not acts else None
    return module if type(module) is nn.Conv2d else None


def _input_child(block: nn.Module) -> str:
    """The direct child whose output goes into the attention and nowhere else; "" if there is none."""
    route = type(block)._cbam_route  # pyright: ignore
    if route.when == "after":
        return route.child
    if route.when == "output":
        names = [name for name, _ in block.named_children() if name != SLOT]
        return names[-1] if names and type(block).forward is nn.Sequential.forward else ""
    return _producer(trace(block), route)


def _producer(graph, route) -> str:
    """The child call that makes the value a route in the graph takes."""
    if route.when == "before":
        node = next(
            (n.args[0] for n in graph.nodes if n.op == "call_module" and n.target == route.child), None
        )
    else:
        node = next((n for n in graph.nodes if n.name == route.child), None)
    if node is None or node.op != "call_module" or (route.when == "before" and len(node.users) != 1):
        return ""
    return node.target


def _scale(state: dict[str, Tensor], name: str, factor: float) -> None:
    scaled = state[name] * factor
    if math.frexp(factor)[0] != 0.5 or not torch.equal(scaled / factor, state[name]):
        raise _MisfitError(
            f"folding its gain multiplies {name} by {factor:g}, which is not exact in {scaled.dtype}; a gain "
            "must be a power of two; for float16's narrow range, convert copy.deepcopy(model).float()"
        )
    state[name] = scaled


def _renamed(state: dict[str, Tensor], target: _Target, to: str) -> dict[str, Tensor]:
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    new_names = {}
    for block in target.blocks:
        for ours, released, timm in _NAMES:
            theirs = f"{SLOT}.{released}" if to == "released" else f"se.{timm}"
            new_names[_under(block, f"{SLOT}.{ours}")] = _under(block, theirs)
    for name, value in state.items():
        if to == "timm" and name in new_names:
            value = _as_timm(name, value)
        renamed[new_names.get(name, name)] = value
    # torchvision's MNASNet refuses a state dict without the version that is noted there
    renamed._metadata = target.model.state_dict()._metadata  # pyright: ignore
    return renamed


def _as_timm(name: str, value: Tensor) -> Tensor:
    if name.endswith((".fc1.weight", ".fc2.weight")):
        return value[:, :, None, None]
    return value.flip(1) if name.endswith(".spatial.conv.weight") else value
