"""What only a GPU can settle about the Triton kernels, the most telling first: benchmarks/gpu.sh.

1. The cells of tests/triton/ without the interpreter, and what it cannot show: streams, graphs, size.
2. Every kernel by itself: microseconds, bytes moved, and the share of the speed of a copy of as many bytes.
3. Host time of an attached block, and batch 1 of a network inside a CUDA graph.
4. `cbam bench`: attention alone, ends of blocks, whole networks, against their peers.
5. `ncu` of every kernel.
6. ResNet50 compiled, against the plain one compiled: minutes of compiling for each.

Rows go to OUT as <step>-<device>.csv as soon as there are any.
"""

import argparse
import copy
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cbam
from cbam.ops import triton_kernels
from cbam.ops.triton_map import Map
from cbam.studies import machine, timing
from cbam.studies.bench import rivals
from cbam.studies.bench.run import _Measure  # its two steps are wanted one by one, as the time allows
from cbam.studies.bench.settings import Bench

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "tests" / "triton" / "cells.py"
STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # channels and side of ResNet50's stages at 224
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
STEPS = ("cells", "kernels", "hosts", "blocks", "networks", "ncu", "compiled")
METRICS = (
    "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,lts__t_sector_hit_rate.pct"
)
# Maps read and written by a pass over the whole tail in training: docs/kernels.md counts them.
MAPS = {"pool": 1, "squeeze": 1, "refine": 3, "reduce_gradient": 4, "weigh": 1, "write": 3}


@dataclass(frozen=True)
class Job:
    """What is to be done, and until when."""

    out: Path
    end: float
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def rounds(self) -> int:
        return 1 if self.dry else 7

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def has_time(self, what: str) -> bool:
        """Whether `what` may begin; said where it may not."""
        if self.left() <= 0:
            print(f"left out, no time: {what}", flush=True)
        return self.left() > 0

    def save(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a step, each with where it was measured."""
        about = machine.describe(self.device)
        where = {"device": about["name"], "torch": torch.__version__, "commit": machine.commit()}
        if rows:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"{name}-{'-'.join(about['name'].split())}.csv"
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0], *(k for k in where if k not in rows[0])])
                writer.writeheader()
                writer.writerows(row | where for row in rows)


# --- 1. correctness --------------------------------------------------------------------------------


def check(job: Job) -> bool:
    """Whether the cells agree with the equation on this device.

    Compiling takes most of the time, so several processes share the cells.
    """
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    chosen = ["-k", "gains or identity"] if job.dry else ["-m", "not large"]
    listed = subprocess.run(
        [*pytest, "--collect-only", str(CELLS), *chosen],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    cells = [line for line in listed.stdout.splitlines() if "::" in line] if not listed.returncode else []
    shares = min(len(cells), 1 if job.dry else max(1, (os.cpu_count() or 2) // 2))
    running = [
        subprocess.Popen([*pytest, *cells[i::shares]], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for i in range(shares)
    ]
    right = bool(cells)
    for process in running:
        output = process.communicate(timeout=max(60.0, job.left()))[0]
        print(output[-4000:] if process.returncode else output.strip().splitlines()[-1], flush=True)
        right = right and process.returncode == 0
    return right


# --- 2. kernels ------------------------------------------------------------------------------------


def tail_step(shape: tuple[int, ...], layout: str, job: Job) -> Callable[[], None]:
    """A forward and a backward of the tail of a residual block in training."""
    C = shape[1]
    hidden = max(1, C // 16)
    maps = torch.randn(3, *shape, device=job.device, dtype=job.dtype)
    x, shortcut, grad = (t.contiguous(memory_format=LAYOUTS[layout]) for t in maps)
    draw = partial(torch.randn, device=job.device)
    norm = [1 + draw(C) / 4, draw(C), None, None]
    weights = [draw(hidden, C) / C**0.5, draw(hidden), draw(C, hidden) / hidden**0.5, draw(C)]
    spatial = [draw(1, 2, 7, 7) / 7, draw(1), draw(1), None, None]
    bn, mlp, where = (True, 1e-5), (True, True, 1.0), (True, 1e-5, 1.0)

    def step() -> None:
        arguments: list[Any] = [x, shortcut, *norm, *bn, *weights, *mlp, *spatial, *where, True, True]
        out, *saved = triton_kernels.tail(*arguments)
        arguments = [grad, x, out, *norm[:2], *bn, *weights, *mlp, *spatial[:3], *where, True]
        arguments += [*saved, True, True]
        triton_kernels.tail_backward(*arguments)

    return step


def recorded(step: Callable[[], None]) -> list[tuple[str, Callable[[], None]]]:
    """The launches of a step, each as something that can be done again on its own buffers."""
    found: list[tuple[str, Callable[[], None]]] = []
    launch = Map.launch

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        again = partial(launch, kernel, programs, *arguments, **constants)
        found.append((getattr(kernel, "fn", kernel).__name__, again))
        again()

    Map.launch = staticmethod(record)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        step()
    finally:
        Map.launch = staticmethod(launch)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def kernels(job: Job) -> list[dict[str, Any]]:
    """A row per kernel, shape and layout."""
    rows = []
    batch, stages = (2, ((5, 3),)) if job.dry else (128, STAGES)
    for layout in LAYOUTS:
        for channels, side in stages:
            shape = (batch, channels, side, side)
            for name, again in recorded(tail_step(shape, layout, job)):
                rows.append(kernel_row(job, name, again, shape, layout))
                print("{kernel:20} {shape:16} {layout} {us:9.1f} us  {share}".format(**rows[-1]), flush=True)
    return rows


def kernel_row(
    job: Job, name: str, again: Callable[[], None], shape: tuple[int, ...], layout: str
) -> dict[str, Any]:
    size = torch.Size(shape).numel() * job.dtype.itemsize
    maps = MAPS.get(name, 0)
    steps: dict[str, timing.Step] = {"kernel": again}
    if maps:
        source, target = torch.empty(2, maps * size // 2, dtype=torch.uint8, device=job.device)
        steps["copy"] = lambda: target.copy_(source)
    timed = timing.in_turns(steps, job.device, rounds=job.rounds, seconds=3)
    us = 1e3 * timed["kernel"].median
    return {
        "kernel": name, "shape": "x".join(map(str, shape)), "layout": layout,
        "dtype": str(job.dtype).removeprefix("torch."), "us": round(us, 2), "maps": maps,
        "bytes": maps * size, "gigabytes_per_second": round(maps * size / us / 1e3, 1) if maps else "",
        "share": round(timed["copy"].median / timed["kernel"].median, 3) if maps else "",
    }  # fmt: skip


# --- 3. host time, and batch 1 ---------------------------------------------------------------------


def hosts(job: Job) -> list[dict[str, Any]]:
    """Microseconds of the host per forward of an attention, and a network's batch 1 in a CUDA graph."""
    rows = []
    x = torch.randn(1, 64, 4, 4, device=job.device)
    for name, module in (("cbam", cbam.CBAM(64)), ("timm", rivals.timm_cbam(64))):
        module = module.to(job.device).train()
        us = 1e6 * submitted(lambda m=module: m(x), 3 if job.dry else 200, job)
        rows.append({"what": "host time of a forward", "arm": name, "us": round(us, 1), "ratio": ""})
    if not job.dry:
        plain = cbam.build("resnet50").to(job.device, job.dtype).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ours = cbam.attach(copy.deepcopy(plain), start="paper").eval()
        arms: dict[str, timing.Step] = {"plain": replayed(plain, job), "cbam": replayed(ours, job)}
        for arm, found in timing.in_turns(arms, job.device).items():
            row = {"what": "resnet50, batch 1, CUDA graph", "arm": arm, "us": round(1e3 * found.median, 1)}
            rows.append(row | {"ratio": round(found.ratio, 4)})
    for row in rows:
        print("{what:32} {arm:6} {us:9.1f} us  {ratio}".format(**row), flush=True)
    return rows


def submitted(step: Callable[[], object], count: int, job: Job) -> float:
    """Seconds that the host needs for a step, the device's work not waited for."""
    step()
    synchronize(job)
    began = time.perf_counter()
    for _ in range(count):
        step()
    took = time.perf_counter() - began
    synchronize(job)
    return took / count


def replayed(model: nn.Module, job: Job) -> Callable[[], None]:
    """A forward of batch 1, captured."""
    x = torch.randn(1, 3, 224, 224, device=job.device, dtype=job.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        model(x)
    return graph.replay


def synchronize(job: Job) -> None:
    if job.device.type == "cuda":
        torch.cuda.synchronize()


# --- 4. blocks and networks ------------------------------------------------------------------------


def bench(job: Job, compiled: bool = False) -> _Measure:
    """What `cbam bench` measures with."""
    batch = 2 if job.dry else 128
    settings = Bench(device=job.device.type, rounds=job.rounds, batch_size=batch, compiled=compiled)
    return _Measure(settings, job.device, job.dtype, batch, partial(print, flush=True))


def blocks(job: Job) -> Iterator[list[dict[str, Any]]]:
    """Attention alone and the end of a block, stage by stage."""
    measure = bench(job)
    for channels, side in ((8, 5),) if job.dry else STAGES:
        if job.has_time(f"blocks of {channels} channels"):
            measure.blocks(channels, side, "NHWC")
            yield measure.rows


def networks(job: Job) -> Iterator[list[dict[str, Any]]]:
    """Whole networks, eager."""
    measure = bench(job)
    names = ("resnet50", "resnet18", "mobilenet_v3_large", "convnext_tiny")
    for name in ("resnet_tiny",) if job.dry else names:
        if job.has_time(name):
            measure.network(name, "NHWC")
            yield measure.rows


def compiled(job: Job) -> Iterator[list[dict[str, Any]]]:
    """ResNet50 again, eager and compiled."""
    measure = bench(job, compiled=not job.dry)
    if job.has_time("resnet50, compiled"):
        measure.network("resnet_tiny" if job.dry else "resnet50", "NHWC")
        yield measure.rows


# --- 5. ncu ----------------------------------------------------------------------------------------


def profiled(job: Job) -> None:
    """One forward and backward under `ncu`, its table beside the others."""
    tool = shutil.which("ncu")
    if tool is None:
        print("left out: ncu is not here")
    if tool is None or not job.has_time("ncu"):
        return
    command = [
        tool, "--csv", "--metrics", METRICS, "--profile-from-start", "off",
        sys.executable, "-m", "benchmarks.gpu", "--once",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(30.0, job.left()))
    name = "-".join(machine.describe(job.device)["name"].split())
    if done.returncode:
        print(f"ncu failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    else:
        table = [line for line in done.stdout.splitlines() if line.startswith('"')]
        (job.out / f"ncu-{name}.csv").write_text("\n".join(table) + "\n", encoding="utf-8")


def once(job: Job) -> None:
    """What `ncu` looks at: the largest stage, after everything is compiled."""
    channels, side = (5, 3) if job.dry else STAGES[0]
    for layout in LAYOUTS:
        step = tail_step((2 if job.dry else 128, channels, side, side), layout, job)
        step()
        synchronize(job)
        if not job.dry:
            torch.cuda.profiler.start()
        step()
        synchronize(job)
        if not job.dry:
            torch.cuda.profiler.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="Settle on a GPU what only a GPU can settle.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry", action="store_true", help="no GPU: the interpreter, sizes that mean nothing")
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="which (default: all)")
    parser.add_argument("--once", action="store_true", help="one forward and backward, for ncu")
    options = parser.parse_args()
    if options.dry != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--dry goes with TRITON_INTERPRET=1, and only with it")
    if not options.dry and not torch.cuda.is_available():
        parser.error("no GPU here: DRY=1 benchmarks/gpu.sh tries the script without one")
    job = Job(options.out, time.monotonic() + 60 * options.minutes, options.dry)
    if options.once:
        once(job)
        return 0
    steps = options.steps or STEPS
    if "cells" in steps and not check(job):
        print("the kernels do not agree with the equation: no time of them means anything", file=sys.stderr)
        return 1
    for name in steps:
        if name in ("kernels", "hosts") and job.has_time(name):
            job.save(name, {"kernels": kernels, "hosts": hosts}[name](job))
        elif name == "ncu":
            profiled(job)
        elif name in ("blocks", "networks", "compiled"):
            for rows in {"blocks": blocks, "networks": networks, "compiled": compiled}[name](job):
                job.save(name, rows)
    return 0 if job.left() > 0 else 75


if __name__ == "__main__":
    sys.exit(main())
