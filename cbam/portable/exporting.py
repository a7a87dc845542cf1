"""Write a network as a file that computes the same in another runtime."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbam.errors import ConfigError, ExportError, InputError, first_line
from cbam.files import placed
from cbam.portable.check import Agreement, Run, agreement
from cbam.portable.formats import Format, format_of
from cbam.portable.program import inputs, plain, program, settled, unseen_shapes

SHAPE = (1, 3, 224, 224)
# A graph is valid for axes of length one or for longer ones, never for both.
SMALL_MAP = "; with dynamic, no map may be one pixel high or wide: give a larger size, or leave dynamic out"


@dataclass(frozen=True)
class Exported:
    """A file that computes what the network computes.

    Attributes:
        path: the file that a runtime opens; OpenVINO has the weights next to it, in a .bin.
        format: "torch", "onnx" or "openvino".
        size: of all its files, in bytes.
        agreement: with the network, measured on the file before it was put in place.
    """

    path: Path
    format: str
    size: int
    agreement: Agreement


def export(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    to: str | None = None,
    shape: tuple[int, ...] = SHAPE,
    dynamic: bool = False,
    opset: int | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `model` as a file for torch.export, ONNX or OpenVINO, without any operator of ours.

    The file is read back and compared with the network on three inputs before it is put in place: outputs
    agree to 1e-5 of their largest value, or no file is written. The model itself is not changed. It is
    exported in eval mode, without the wrappers of `torch.compile` and DistributedDataParallel.

    Args:
        path: `.pt2`, `.onnx` or `.xml`; the folder must exist.
        to: "torch", "onnx" or "openvino"; by default according to the suffix of `path`.
        shape: of the float32 input: (N, C, H, W); (N, C, W) for a signal, (N, C, D, H, W) for a volume.
        dynamic: leave all dimensions except C free; the file is then checked at three shapes other than the
            traced one.
        opset: the ONNX opset; by default the exporter's.
        about: metadata for the file: strings, or values that JSON can express, by name.
        overwrite: replace an existing file.

    Raises:
        ExportError: the network cannot be exported, or the file computes something else.
        DtypeError: the weights are not float32, or quantised. ConfigError: an unknown format, or a file that
            exists. InputError: the model refuses the shape, or JSON cannot express `about`.
        NonFiniteError: the network computes NaN.
        OutputError: no space or no permission. MissingExtraError: a package is not installed.
    """
    path = Path(path)
    name, file_format = format_of(to, path)
    _check(shape, opset, about, name)
    network = plain(model)
    targets = [path.with_suffix(suffix) for suffix in file_format.suffixes]
    # The network is on the CPU, but torch loads files onto the default device of the process.
    with placed(*targets, overwrite=overwrite) as part, torch.device("cpu"), settled(network):
        graph = program(network, shape, dynamic=dynamic)
        file_format.write(graph, part / path.name, about or {}, opset)
        checked = inputs(unseen_shapes(shape, dynamic=dynamic))
        read = _read_back(file_format, part / path.name, name)
        found = agreement(network, read, checked, path.name, SMALL_MAP if dynamic else "")
        size = sum((part / target.name).stat().st_size for target in targets)
    return Exported(path, name, size, found)


def _read_back(file_format: Format, path: Path, name: str) -> Run:
    try:
        return file_format.read(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a runtime can raise anything
        raise ExportError(
            f"{name} cannot read the file that was written: {first_line(error, 300)}"
        ) from error


def _check(shape: tuple[int, ...], opset: int | None, about: Mapping[str, Any] | None, name: str) -> None:
    fits = isinstance(shape, Sequence) and 3 <= len(shape) <= 5
    if not fits or any(type(n) is not int or n < 1 for n in shape):
        raise InputError(f"shape must be three to five positive ints, as (N, C, H, W), got {shape!r}")
    if opset is not None and (type(opset) is not int or opset < 1):
        raise ConfigError(f"opset must be a positive int, got {opset!r}")
    if opset is not None and name == "torch":
        raise ConfigError("opset is an ONNX setting; a file for torch has none")
    if not all(isinstance(key, str) for key in about or {}):
        raise InputError(f"the names in about must be strings, got {list(about or {})!r:.80}")
    try:
        json.dumps(dict(about or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"about must contain strings, or values that JSON can express: {error}") from error
