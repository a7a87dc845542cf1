"""The file formats: how a graph is written, and how the file is run."""

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from cbam.errors import ConfigError, ExportError, MissingExtraError, OutputError, first_line
from cbam.portable.check import Run
from cbam.portable.program import quiet

INPUT = "x"
SIDES = ("depth", "height", "width")
LARGEST = 1_900_000_000  # bytes; the limit of protocol buffers is 2 GiB
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # without it OpenVINO computes in bfloat16 where it can

Write = Callable[[ExportedProgram, Path, Mapping[str, Any], int | None], None]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        suffixes: of its files; the last is the one that a runtime opens.
        needs: packages required to write and to check.
        write: (program, path of the last file, metadata for it, opset).
        read: path of the last file -> a function that runs it on the CPU in float32.
    """

    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Write
    read: Callable[[Path], Run]


def format_of(to: str | None, path: Path) -> tuple[str, Format]:
    """The format by name, or by the suffix of `path`.

    Raises:
        ConfigError: neither is known, or they differ. MissingExtraError: its packages are not installed.
    """
    by_suffix = {made.suffixes[-1]: name for name, made in FORMATS.items()}
    if to is None:
        to = by_suffix.get(path.suffix)
    if to not in FORMATS:
        known = ", ".join(f"{name} ({made.suffixes[-1]})" for name, made in FORMATS.items())
        raise ConfigError(f"to={to!r}, {path.name}: expected one of {known}")
    made = FORMATS[to]
    if path.suffix != made.suffixes[-1]:
        raise ConfigError(f"{path}: a file for {to} ends in {made.suffixes[-1]}")
    absent = [name for name in made.needs if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingExtraError.of(f"export to {to}", "export", absent)
    return to, made


# --- torch ---


def _write_torch(made: ExportedProgram, path: Path, about: Mapping[str, Any], opset: int | None) -> None:
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(made, buffer, extra_files={"cbam.json": json.dumps(dict(about))})
    path.write_bytes(buffer.getvalue())


def _read_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda x: [value for value in tree_flatten(module(x))[0] if isinstance(value, Tensor)]


# --- ONNX ---


def _write_onnx(made: ExportedProgram, path: Path, about: Mapping[str, Any], opset: int | None) -> None:
    proto = _onnx(made, opset)
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    if proto.ByteSize() > LARGEST:
        raise ExportError(f"the network takes {proto.ByteSize()} bytes, and one ONNX file {LARGEST} at most")
    path.write_bytes(proto.SerializeToString())


def _onnx(made: ExportedProgram, opset: int | None) -> Any:
    try:
        # onnxscript before 0.7 prints what it rewrote
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            written = torch.onnx.export(
                made, dynamo=True, opset_version=opset, input_names=[INPUT], verbose=False
            )
        proto = written.model_proto  # pyright: ignore[reportOptionalMemberAccess]
    except ImportError as error:
        raise ExportError(
            f"onnxscript does not fit torch {torch.__version__} ({error}): pip install --upgrade onnxscript"
        ) from error
    except Exception as error:
        raise ExportError(f"ONNX cannot express this network: {_cause(error)}") from error
    got = {entry.domain: entry.version for entry in proto.opset_import}
    if opset is not None and got.get("") != opset:
        raise ExportError(f"this network needs opset {got.get('')}, and cannot be written in opset {opset}")
    foreign = [f"{n.name} ({n.domain}::{n.op_type})" for n in proto.graph.node if n.domain]
    if foreign or proto.functions:
        raise ExportError(f"the ONNX graph holds operators that are not standard: {', '.join(foreign[:5])}")
    _name_free(proto)
    return proto


def _name_free(proto: Any) -> None:
    """Name the free dimensions batch, height, ...: torch numbers them."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    called = ["batch", "", *SIDES[5 - len(dims) :]]
    names = {dim.dim_param: name for dim, name in zip(dims, called, strict=True) if dim.dim_param}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\b[a-z]\d+\b", lambda m: names.get(m[0], m[0]), dim.dim_param)


def _cause(error: BaseException) -> str:
    """The operator or node that the exporter failed on, from the chain of its errors."""
    texts, seen = [], error
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    for text in reversed(texts):
        if found := re.search(r"No ONNX function found for [^\n]*|Error when translating node [^\n]*", text):
            return found[0][:300]
    return first_line(error, 300)


def _read_onnx(path: Path) -> Run:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {INPUT: x.numpy()})]


# --- OpenVINO ---


def _write_openvino(made: ExportedProgram, path: Path, about: Mapping[str, Any], opset: int | None) -> None:
    import openvino  # pyright: ignore[reportMissingImports]

    onnx = path.with_name(f".{path.stem}.onnx")  # goes with the folder, which is a temporary one
    _write_onnx(made, onnx, {}, opset)
    try:
        model = openvino.Core().read_model(onnx)
        for key, value in about.items():
            model.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["cbam", key])
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot read this network: {first_line(error, 300)}") from error
    try:
        openvino.save_model(model, path, compress_to_fp16=False)  # or it would halve the weights' precision
    except RuntimeError as error:
        raise OutputError(f"{path.name} cannot be written: {first_line(error, 300)}") from error


def _read_openvino(path: Path) -> Run:
    import openvino  # pyright: ignore[reportMissingImports]

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", PRECISION | threads)
    return lambda x: [torch.from_numpy(value.copy()) for value in compiled(x.numpy()).values()]


FORMATS = {
    "torch": Format((".pt2",), (), _write_torch, _read_torch),
    "onnx": Format((".onnx",), ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "openvino": Format((".bin", ".xml"), ("onnx", "onnxscript", "openvino"), _write_openvino, _read_openvino),
}
