"""Save a trained network as a folder, and load it from a folder or a Hugging Face Hub repository.

No code from a folder is run: weights are safetensors only and checked against their SHA-256, and the network
is built by `cbam.build` or by the caller.
"""

import contextlib
import hashlib
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from cbam.errors import (
    CBAMError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    DtypeError,
    InputError,
    MissingExtraError,
    OutputError,
    first_line,
)
from cbam.files import placed
from cbam.hub.card import Card, Network, config, page, read_config
from cbam.hub.remote import downloaded
from cbam.models import build, profile
from cbam.portable.program import settled
from cbam.surgery import load_weights
from cbam.surgery.dialect import Target
from cbam.surgery.weights import Loaded, check_weights

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
)}  # fmt: skip


def save_pretrained(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    network: str = "",
    card: Card | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` as a folder that `from_pretrained` reads, and that can go on the Hugging Face Hub.

    The folder is created if it is missing. `model.safetensors` holds the weights, `config.json` the network's
    name, its card and the SHA-256 of the weights, and `README.md` is the model card.

    Args:
        network: the name for `cbam.build`, such as "resnet50+cbam"; leave it out for a network of your own,
            which must then be passed to `from_pretrained`.
        card: the description of the network.
        overwrite: replace existing files.

    Raises:
        ConfigError: `network` is unknown, or builds a network that differs from `model`; or files exist.
        InputError: the card does not fit the network; or the state dict holds something other than tensors.
        DtypeError: weights of several dtypes, or integers. OutputError: no space or no permission.
        MissingExtraError: safetensors is not installed.
    """
    card = card or Card()
    if not isinstance(card, Card):
        raise InputError(f"card must be a cbam.hub.Card, got {type(card).__name__}")
    target = Target(model)
    outputs = _outputs(target)
    if card.classes and len(card.classes) != outputs:
        raise InputError(f"the card names {len(card.classes)} classes, but the network has {outputs} outputs")
    if network:
        with torch.random.fork_rng([]):  # the network built for comparison draws its weights on the CPU
            _refuse_other_network(target.model, network, outputs, card.size)
    data, dtype = _bytes(target.model), _dtype(target.model)
    parameters = sum(parameter.numel() for parameter in target.model.parameters())
    digest = hashlib.sha256(data).hexdigest()
    made = Network(network, outputs, dtype, digest, parameters, _gmac(target.model, card.size))
    folder = Path(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created: {error.strerror or error}") from error
    texts = {README: page(made, card, folder.resolve().name), CONFIG: config(made, card)}
    targets = (folder / README, folder / WEIGHTS, folder / CONFIG)
    try:
        with placed(*targets, overwrite=overwrite) as part:
            (part / WEIGHTS).write_bytes(data)
            for name, text in texts.items():
                (part / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for created in missing:
                created.rmdir()
        raise
    return folder


def from_pretrained(
    source: str | PathLike[str], *, model: nn.Module | None = None, revision: str | None = None
) -> nn.Module:
    """The network of a folder, or of the repository "org/name" of the Hugging Face Hub, in eval mode.

    The weights are those of the file, bit for bit, in its dtype.

    Args:
        model: the network to load the weights into, if the folder names none that `cbam.build` knows. It is
            left unchanged if they do not fit.
        revision: branch, tag or commit of a repository; only a commit never changes.

    Raises:
        CheckpointNotFoundError: no such folder, repository, revision or file.
        CheckpointError: not reachable, damaged, not safetensors, or it does not fit.
        ConfigError: the folder names no network and `model` is not given; or a folder with a revision.
        MissingExtraError: safetensors or huggingface_hub, or the library of the network, is not installed.
    """
    folder = _locate(source, revision)
    network, _ = read_config(folder / CONFIG)
    weights = folder / WEIGHTS
    _refuse_damage(weights, network.sha256)
    if network.dtype not in _DTYPES:
        raise CheckpointError(f"{folder / CONFIG}: unknown dtype {network.dtype!r:.40}")
    if model is None:
        model = _build(network, weights)
        name = network.name
    else:
        name = "the given network"
        _refuse_missing(check_weights(model, weights), weights, name)  # before the model is changed
    model.to(_DTYPES[network.dtype])
    _refuse_missing(load_weights(model, weights), weights, name)
    return model.eval()


def _refuse_missing(loaded: Loaded, weights: Path, name: str) -> None:
    if loaded.missing:
        raise CheckpointError(f"{weights}: lacks the attention of {name}")


def is_published(path: str | PathLike[str]) -> bool:
    """Whether `path` is a local folder with the files that `save_pretrained` writes."""
    return all((Path(path) / name).is_file() for name in (CONFIG, WEIGHTS))


def card_of(source: str | PathLike[str], *, revision: str | None = None) -> Card:
    """The card of the network in a folder or repository: classes, size, normalisation, ...

    Raises: as `from_pretrained`.
    """
    return read_config(_locate(source, revision) / CONFIG)[1]


def _locate(source: str | PathLike[str], revision: str | None) -> Path:
    """The local folder with the files of `source`."""
    folder = Path(source)
    try:
        is_file, is_folder = folder.is_file(), folder.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(f"{source!s:.80}: {getattr(error, 'strerror', error)}") from error
    if is_file:
        raise CheckpointError(f"{folder}: a file; from_pretrained takes a folder, load_weights takes files")
    if not is_folder:
        folder = downloaded(str(source), (CONFIG, WEIGHTS), revision)
    elif revision is not None:
        raise ConfigError(f"{folder} is a folder, which has no revisions: leave revision out")
    if lacking := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise CheckpointNotFoundError(
            f"{source}: no {', '.join(lacking)}; weights in other files are not read (pickles can run code): "
            "load them with load_weights, and save_pretrained"
        )
    return folder


def _refuse_damage(weights: Path, digest: str) -> None:
    try:
        with weights.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{weights}: cannot be read: {error.strerror or error}") from error
    if start[8:9] != b"{":
        raise CheckpointError(f"{weights}: not safetensors, it starts with {start!r}; it was not loaded")
    if found != digest:
        raise CheckpointError(
            f"{weights}: damaged, or not the file of this config.json: its SHA-256 is not the recorded one"
        )


def _build(network: Network, weights: Path) -> nn.Module:
    """Build the network named in the configuration; raises if it would be larger than its weights."""
    if not network.name:
        raise ConfigError("the folder is of a custom network that cbam.build does not know: give model=")
    try:
        _refuse_larger(network, weights)
        return build(network.name, num_classes=network.outputs)
    except MissingExtraError:
        raise
    except CBAMError as error:
        raise CheckpointError(f"{weights.parent}: cannot build {network.name!r:.80}: {error}") from error


def _refuse_larger(network: Network, weights: Path) -> None:
    """Raise before memory is allocated, so that a name in a file cannot exhaust it."""
    size = weights.stat().st_size
    room = size // _DTYPES[network.dtype].itemsize
    if network.outputs > room:
        raise CheckpointError(f"{network.outputs} classes do not fit into {size} bytes of weights")
    try:
        with torch.device("meta"):
            counted = build(network.name, num_classes=network.outputs)
    except NotImplementedError:
        return  # some constructors read their own weights
    wanted = sum(p.numel() for p in counted.parameters())
    if wanted > room:
        raise CheckpointError(f"{wanted} parameters do not fit into {size} bytes of weights")


def _outputs(target: Target) -> int:
    """The number of classes: the first dimension of the head's weight."""
    sizes = [target.tensors[name].shape[0] for name in target.head() if target.tensors[name].dim() > 1]
    if not sizes:
        raise InputError(f"{type(target.model).__name__} has no linear layer or convolution")
    return sizes[0]


def _refuse_other_network(model: nn.Module, network: str, outputs: int, size: int) -> None:
    """Raise if the name builds a network with other tensors, or one that computes something else."""
    like = next(model.parameters())
    built = build(network, num_classes=outputs).to(like.device, like.dtype)
    has = {name: tuple(value.shape) for name, value in Target(model).tensors.items()}
    wants = {name: tuple(value.shape) for name, value in Target(built).tensors.items()}
    if other := sorted(name for name in has.keys() | wants.keys() if has.get(name) != wants.get(name)):
        raise ConfigError(
            f'network="{network}" builds a network with other tensors (first {other[0]}: '
            f"{wants.get(other[0])}, the model's is {has.get(other[0])})"
        )
    load_weights(built, model.state_dict())
    x = torch.rand(1, 3, size, size).to(like.device, like.dtype)
    with settled(model), settled(built):
        try:
            found, wanted = built(x), model(x)
        except Exception as error:  # networks may raise anything
            raise InputError(
                f"{network} does not take images of {size} px: {first_line(error, 300)}"
            ) from error
    apart = (found - wanted).abs().max() / wanted.abs().max()
    if apart > 0.01:  # reduced precision stays below this; NaN, as from overflow, proves nothing
        raise ConfigError(
            f'network="{network}" builds a network that computes something else from the same weights; leave '
            "network out, and give from_pretrained the model"
        )


def _dtype(model: nn.Module) -> str:
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if len(found) != 1 or not found <= _DTYPES.keys():
        raise DtypeError(f"weights must have one of the dtypes {', '.join(_DTYPES)}, got {', '.join(found)}")
    return found.pop()


def _bytes(model: nn.Module) -> bytes:
    """The weights as safetensors: one tensor per name, even if the network shares tensors."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtraError.of("save_pretrained", "vision") from error
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} of the state dict is a {type(value).__name__}, but safetensors holds only tensors"
            )
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    return save(plain, metadata={"format": "pt"})


def _gmac(model: nn.Module, size: int) -> float | None:
    """10^9 multiply-accumulates per image; None if the network does not take images of that size."""
    try:
        return profile(model, size).gmac
    except Exception:  # custom networks may raise anything
        return None
