"""Compile every Triton kernel ahead of time, without a GPU, and examine the result.

    python -m benchmarks.aot [--all] [--sm 80 90] [--jobs 2] [--verbose]

The launchers run on meta tensors, and each launch is recorded instead of executed. Every distinct
specialisation is then compiled for each architecture, and its PTX and its resources are checked:

- no `max.f32` or `max.f64` that drops NaN, except in the kernels of DROPS_NAN, where it is safe,
- no TF32,
- no local memory, at most 16 bytes of stack, 48 KB of shared memory, and 128 registers, with the exceptions
  in `many_registers`.

Without --all: a block in training in float32, bfloat16 and float64, every form in bfloat16, sm_80 and sm_90.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cbam.ops import triton_gradients, triton_kernels, triton_map

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PROCESSORS = 132
MAX_SHARED, MAX_REGISTERS = 48 * 1024, 128
MAX_STACK = 16  # bytes: ptxas spills a few registers once rather than run a block less per processor

# Kernels in which a maximum may drop NaN: every value that reaches `tl.max` has passed `value > best`, which
# is false for NaN, so none is NaN. A NaN in the map propagates another way.
DROPS_NAN = {
    "pool": "the mean carries NaN to the gate; with only max, an integer flag makes the extremum NaN",
    "squeeze": "the sum over the channels carries NaN to the convolution, at the same pixels",
    "reduce_gradient": "q0 is used only for dw, together with q1, which has the NaN; so does dMs",
}

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A specialisation of a kernel, as the runtime would compile it."""

    kernel: str
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    warps: int
    programs: int = field(compare=False)
    case: str = field(compare=False)


def specialised(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], case: str
) -> Launch:
    """Specialise like the runtime: None and 1 become constants, and divisibility by 16 is recorded."""
    warps = constants.pop("num_warps", 4)
    given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
    signature, fixed, divisible = {}, {}, []
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if value.storage_offset() * value.itemsize % 16 == 0:
                divisible.append(name)
        elif name in kernel.do_not_specialize:
            signature[name] = "i32"
        elif isinstance(value, float) and name not in constants:
            signature[name] = "fp32"
        elif name in constants or value is None or value == 1:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                divisible.append(name)
    return Launch(
        kernel.fn.__name__, kernel.fn.__module__, tuple(signature.items()), tuple(fixed.items()),
        tuple(divisible), warps, programs, case,
    )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A way to call the tail: which parts it has, and which statistics are the batch's."""

    name: str
    norm: str = "batch"
    pools: str = "avg max"
    spatial: str = "batch"
    shortcut: bool = True
    shortcut_norm: bool = False
    save: bool = True
    side: int = 7


FORMS = (
    Form("tail, training"),
    Form("tail, inference", norm="running", spatial="running", save=False),
    Form("tail, frozen", norm="running", spatial="running"),
    Form("block", norm="", shortcut=False),
    Form("block, inference", norm="", spatial="running", shortcut=False, save=False),
    Form("channels", pools="max", spatial=""),
    Form("squeeze and excitation", norm="", pools="avg", spatial="", shortcut=False),
    Form("pixels", norm="", pools="", side=5),
    Form("norm of the shortcut", norm="running", spatial="running", shortcut_norm=True, save=False),
)
SHAPES = (
    (128, 256, 56, 56),
    (128, 2048, 7, 7),
    (8, 1024, 14, 14),
    (2, 24, 14, 14),
    (1, 3, 13, 17),
    (128, 64, 112, 112),
    (1, 64, 8192, 8192),
    (2, 1, 1, 1),
    (1, 7, 1, 1),
)


def launches(
    shape: tuple[int, ...], dtype: torch.dtype, nhwc: bool, form: Form, offset: int = 0
) -> list[Launch]:
    """The launches of a forward and its backward on meta tensors, shifted by `offset` values."""
    N, C, H, W = shape
    found: list[Launch] = []

    def vector(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    def map() -> torch.Tensor:
        t = torch.empty(N * C * H * W + offset, dtype=dtype, device="meta")[offset:]
        return t.view(N, H, W, C).permute(0, 3, 1, 2) if nhwc else t.view(N, C, H, W)

    def record(_: Any, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        case = f"{form.name} {shape} {TYPES[dtype]} {'NHWC' if nhwc else 'NCHW'}"
        found.append(specialised(kernel, programs, arguments, constants, case))

    hidden, relu = max(1, C // 16), form.shortcut
    norm = [vector(C) if form.norm else None for _ in range(4)]
    weights = [vector(hidden, C), vector(hidden), vector(C, hidden), vector(C)] if form.pools else [None] * 4
    spatial = (
        [vector(1, 2, form.side, form.side), *(vector(1) for _ in range(4))] if form.spatial else [None] * 5
    )
    launch, count = triton_map.Kernels.launch, triton_map.processors
    triton_map.Kernels.launch, triton_map.processors = record, lambda device: PROCESSORS  # pyright: ignore
    try:
        x, middle = map(), [*weights, "avg" in form.pools, "max" in form.pools, 1.0]
        bn, where = (form.norm == "batch", 1e-5), (form.spatial == "batch", 1e-5, 1.0)
        shortcut = map() if form.shortcut else None
        arguments: list[Any] = [x, shortcut, *norm, *bn, *middle, *spatial, *where, relu, form.save]
        if form.shortcut_norm:
            arguments = [x, shortcut, *(vector(C) for _ in range(4)), 1e-5, *norm, 1e-5]
            arguments += [*middle, *spatial, 1e-5, 1.0, relu]
            triton_kernels.tail_inference(*arguments)
            return found
        out, *saved = triton_kernels.tail(*arguments)
        if form == FORMS[0]:
            running = [*norm[2:], *spatial[3:]]
            triton_kernels.track(running, [*saved[3:5], *saved[7:]], [0.1, 0.01], N * H * W)  # pyright: ignore
        if form.save:
            arguments = [map(), x, out if relu else None, *norm[:2], *bn, *middle, *spatial[:3], *where]
            arguments += [relu, *saved, True, True]
            triton_gradients.tail_backward(*arguments)
    finally:
        triton_map.Kernels.launch, triton_map.processors = launch, count  # pyright: ignore
    return found


def cases(full: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, bool, Form, int]]:
    """The maps and forms whose launches are compiled."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    kinds = list(itertools.product(dtypes, (False, True)))
    if not full:
        kinds = [*kinds[:4], (torch.float64, True)]
    for dtype, nhwc in kinds:
        yield SHAPES[0], dtype, nhwc, FORMS[0], 0
    for form in FORMS[1:]:
        yield SHAPES[0], torch.bfloat16, True, form, 0
    if full:
        for dtype, nhwc in kinds:
            yield SHAPES[0], dtype, nhwc, FORMS[0], 1
        for nhwc, form, shape in itertools.product((False, True), FORMS[:3], SHAPES[1:]):
            yield shape, torch.bfloat16, nhwc, form, 0
        for nhwc, form in itertools.product((False, True), FORMS[1:]):
            yield SHAPES[0], torch.float32, nhwc, form, 0


@dataclass(frozen=True)
class Result:
    """The outcome of compiling a launch for an architecture."""

    launch: Launch
    sm: int
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    faults: tuple[str, ...] = ()


def compiled(launch: Launch, sm: int) -> Result:
    """Compile a launch and check it."""
    kernel = getattr(sys.modules[launch.module], launch.kernel)
    signature = dict(launch.signature)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(kernel, signature, dict(launch.constants), attributes)
    options = {"num_warps": launch.warps, "num_stages": 2, "enable_fp_fusion": False}
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # any error of the compiler is a result, and does not end the run
        text = f"{type(error).__name__}: {error}".strip().splitlines()
        return Result(launch, sm, faults=(" | ".join(text[:1] + text[-3:]),))
    used = resources(binary.asm["cubin"])
    shared = max(used["SHARED"], binary.metadata.shared)
    result = Result(launch, sm, used["REG"], used["STACK"], used["LOCAL"], shared)
    return replace(result, faults=tuple(faults(result, binary.asm["ptx"])))


def faults(result: Result, ptx: str) -> Iterator[str]:
    """Yield the forbidden properties of a compiled kernel."""
    kernel = result.launch.kernel
    dropping = [line for line in re.findall(r"\b(?:max|min)\.f\w+[^;]*", ptx) if ".NaN" not in line]
    if dropping and kernel not in DROPS_NAN:
        yield f"drops NaN: {dropping[0].strip()}"
    if "tf32" in ptx:
        yield "TF32"
    if result.local or result.stack > MAX_STACK:
        yield f"{result.stack} bytes of stack, {result.local} of spills"
    if result.shared > MAX_SHARED:
        yield f"{result.shared} bytes of shared memory"
    if result.registers > MAX_REGISTERS and not many_registers(result.launch):
        yield f"{result.registers} registers"


def many_registers(launch: Launch) -> bool:
    """Whether a kernel may use more: it works on little data, or cannot use fewer."""
    return (
        launch.kernel == "spatial_gradient"  # unrolled taps; its maps are small, (N, 2, L)
        or (launch.kernel == "squeeze" and "X" not in launch.divisible)  # one address per value
        or (launch.kernel == "refine" and ("Q", None) not in launch.constants)  # with the convolution fused
    )


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the kernel in `cubin`, from the disassembler included in Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time and examine it.")
    parser.add_argument("--all", action="store_true", help="every form, type and architecture")
    parser.add_argument("--verbose", action="store_true", help="print a line for each compiled kernel")
    parser.add_argument("--sm", type=int, nargs="+", help="compute capabilities to compile for")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    found = {launch: None for case in cases(options.all) for launch in launches(*case)}
    targets = options.sm or (ARCHITECTURES if options.all else (80, 90))
    work = [(launch, sm) for launch in found for sm in targets]
    wrong = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for result in pool.map(compiled, *zip(*work, strict=True), chunksize=4):
            wrong += bool(result.faults)
            if result.faults or options.verbose:
                print(line(result), flush=True)
    kernels = len({launch.kernel for launch in found})
    print(
        f"{len(work)} compilations of {kernels} kernels for sm_{', '.join(map(str, targets))}: "
        f"{wrong} with faults"
    )
    sys.exit(wrong > 0)


def line(result: Result) -> str:
    launch = result.launch
    tile = " ".join(f"{k}={v}" for k, v in launch.constants if k in ("BC", "BP", "BN", "BH", "S", "CS"))
    what = "; ".join(result.faults) or f"{result.registers} registers, {result.shared} bytes shared"
    return f"sm_{result.sm:<3} {launch.kernel:19} {launch.warps} warps {tile}  {launch.case}: {what}"


if __name__ == "__main__":
    main()
