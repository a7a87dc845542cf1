"""The file formats: how to write a graph, and how to run the file."""

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
LARGEST = 1_900_000_000  # bytes; protocol buffers are limited to 2 GiB
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # by default OpenVINO computes in bfloat16 where it can

Write = Callable[[ExportedProgram, Path, Mapping[str, Any], int | None], None]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        suffixes: of its files; a runtime opens the last one.
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
    by_suffix = {fmt.suffixes[-1]: name for name, fmt in FORMATS.items()}
    if to is None:
        to = by_suffix.get(path.suffix)
    if to not in FORMATS:
        known = ", ".join(f"{name} ({fmt.suffixes[-1]})" for name, fmt in FORMATS.items())
        raise ConfigError(f"no known format in to={to!r} and {path.name}: expected one of {known}")
    fmt = FORMATS[to]
    if path.suffix != fmt.suffixes[-1]:
        raise ConfigError(f"{path}: a file for {to} must end in {fmt.suffixes[-1]}")
    absent = [name for name in fmt.needs if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingExtraError.of(f"export to {to}", "export", absent)
    return to, fmt


# --- torch ---


def _write_torch(program: ExportedProgram, path: Path, about: Mapping[str, Any], opset: int | None) -> None:
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={"cbam.json": json.dumps(dict(about))})
    path.write_bytes(buffer.getvalue())


def _read_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda x: [value for value in tree_flatten(module(x))[0] if isinstance(value, Tensor)]


# --- ONNX ---


def _write_onnx(program: ExportedProgram, path: Path, about: Mapping[str, Any], opset: int | None) -> None:
    proto = _onnx(program, opset)
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    if proto.ByteSize() > LARGEST:
        raise ExportError(
            f"the network takes {proto.ByteSize()} bytes, but an ONNX file can have at most {LARGEST}"
        )
    path.write_bytes(proto.SerializeToString())


def _onnx(program: ExportedProgram, opset: int | None) -> Any:
    try:
        # onnxscript before 0.7 prints what it rewrites
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            written = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=[INPUT], verbose=False
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
        raise ExportError(f"this network needs opset {got.get('')}, it cannot be written in opset {opset}")
    foreign = [f"{n.name} ({n.domain}::{n.op_type})" for n in proto.graph.node if n.domain]
    if foreign or proto.functions:
        raise ExportError(f"the ONNX graph contains non-standard operators: {', '.join(foreign[:5])}")
    _name_free(proto)
    return proto


def _name_free(proto: Any) -> None:
    """Rename the free dimensions, which torch numbers, to batch, height, ..."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    dim_names = ["batch", "", *SIDES[5 - len(dims) :]]
    names = {dim.dim_param: name for dim, name in zip(dims, dim_names, strict=True) if dim.dim_param}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\b[a-z]\d+\b", lambda m: names.get(m[0], m[0]), dim.dim_param)


def _cause(error: BaseException) -> str:
    """The operator or node on which the exporter failed, from its chain of errors."""
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
    options.log_severity_level = 4  # errors are raised anyway
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {INPUT: x.numpy()})]


# --- OpenVINO ---


def _write_openvino(
    program: ExportedProgram, path: Path, about: Mapping[str, Any], opset: int | None
) -> None:
    import openvino  # pyright: ignore[reportMissingImports]

    onnx = path.with_name(f".{path.stem}.onnx")  # deleted with the temporary folder
    _write_onnx(program, onnx, {}, opset)
    try:
        model = openvino.Core().read_model(onnx)
        for key, value in about.items():
            model.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["cbam", key])
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot read this network: {first_line(error, 300)}") from error
    try:
        openvino.save_model(model, path, compress_to_fp16=False)  # the default would halve the precision
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
