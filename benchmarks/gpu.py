"""Check and measure the Triton kernels on a GPU, the most informative steps first: benchmarks/gpu.sh.

1. The cells of tests/triton/ without the interpreter, and what it cannot test: streams, graphs, large sizes.
2. Every kernel alone: microseconds, bytes moved, and speed relative to a copy of as many bytes.
3. Host time of an attached block, and a network at batch size 1 in a CUDA graph.
4. `cbam bench`: attention alone, ends of blocks and whole networks, against other implementations.
5. A profile of every kernel by `ncu`.
6. ResNet50 compiled, with and without attention; compiling takes minutes for each.

Rows are written to OUT/<step>-<device>.csv as soon as they are measured. The column `gate` tells whether the
cells agreed: if they did not, 4 and 6 are skipped, and the other times are marked unverified. The column `l2`
marks maps that fit into the L2 cache, so that repetitions read the cache and not the memory.
"""

import argparse
import copy
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cbam
from benchmarks.gpu_cells import ROOT, agree, started
from cbam.ops import triton_gradients, triton_kernels
from cbam.ops.triton_map import Kernels
from cbam.studies import machine, timing
from cbam.studies.bench import rivals
from cbam.studies.bench.run import _Measure  # its steps are run one by one, as time allows
from cbam.studies.bench.settings import Bench

STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # channels and side of ResNet50's stages at 224
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
METRICS = (
    "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,lts__t_sector_hit_rate.pct"
)
# Maps that each kernel reads and writes for the whole tail in training, as counted in docs/kernels.md.
MAPS = {"pool": 1, "squeeze": 1, "refine": 3, "reduce_gradient": 4, "weigh": 1, "write": 3}
Rows = Iterator[dict[str, Any]]


@dataclass
class Job:
    """The options and the state of a run."""

    out: Path
    end: float
    dry: bool
    commit: str | None = None  # used if this is not a git checkout
    agreed: bool = False  # whether the cells match the equation
    left_out: list[str] = field(default_factory=list)

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
        """Seconds left."""
        return self.end - time.monotonic()

    def has_time(self, what: str, needs: float = 60) -> bool:
        """Whether there is time for `what`, which takes `needs` seconds; if not, print and record it."""
        if self.left() < needs:
            print(f"skipped, no time: {what}", flush=True)
            self.left_out.append(what)
            return False
        return True

    @cached_property
    def where(self) -> dict[str, Any]:
        """Device, torch version and commit."""
        commit = machine.commit() or self.commit
        name = machine.describe(self.device)["name"]
        return {"device": name, "torch": torch.__version__, "commit": commit}

    def in_l2(self, shape: tuple[int, ...]) -> str:
        """The value of the column `l2` for a map."""
        size = 0 if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size
        return "resident" if torch.Size(shape).numel() * self.dtype.itemsize <= size else ""

    def save(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write all rows of a step so far."""
        about = self.where | {"gate": "passed" if self.agreed else "unverified"}
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{name}-{'-'.join(self.where['device'].split())}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0] | about)
            writer.writeheader()
            writer.writerows(row | about for row in rows)


# --- 2. kernels ------------------------------------------------------------------------------------


def tail_step(shape: tuple[int, ...], layout: str, job: Job) -> Callable[[], None]:
    """A forward and backward pass of the tail of a residual block in training."""
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
        triton_gradients.tail_backward(*arguments)

    return step


def recorded(step: Callable[[], None]) -> list[tuple[str, Callable[[], None]]]:
    """Record the launches of a step as functions that repeat them on the same buffers.

    `convolve` merges in the program that draws the last ticket; `squeeze` leaves the ticket at zero, so it is
    zeroed here.
    """
    found: list[tuple[str, Callable[[], None]]] = []
    launch = Kernels.launch

    def record(alike: Kernels, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        again = partial(launch, alike, kernel, programs, *arguments, **constants)
        name = getattr(kernel, "fn", kernel).__name__
        if name == "convolve":
            ticket = dict(zip(kernel.arg_names, arguments, strict=False))["TICKET"]
            found.append((f"{name}, ticket zeroed", lambda: (ticket.zero_(), again())[1]))
        else:
            found.append((name, again))
        again()

    Kernels.launch = record  # pyright: ignore[reportAttributeAccessIssue]
    try:
        step()
    finally:
        Kernels.launch = launch
    return found


def kernels(job: Job) -> Rows:
    """Yield a row per kernel, shape and layout."""
    batch, stages = (2, ((5, 3),)) if job.dry else (128, STAGES)
    for layout in LAYOUTS:
        for channels, side in stages:
            shape = (batch, channels, side, side)
            if job.has_time(f"kernels of {channels} channels, {layout}", needs=20):
                for name, again in recorded(tail_step(shape, layout, job)):
                    row = kernel_row(job, name, again, shape, layout)
                    print("{kernel:24} {shape:16} {layout} {us:9.1f} us  {share}".format(**row), flush=True)
                    yield row


def kernel_row(
    job: Job, name: str, again: Callable[[], None], shape: tuple[int, ...], layout: str
) -> dict[str, Any]:
    size = torch.Size(shape).numel() * job.dtype.itemsize
    maps = MAPS.get(name, 0)
    steps: dict[str, timing.Step] = {"kernel": again}
    if maps:
        source, target = torch.empty(2, maps * size // 2, dtype=torch.uint8, device=job.device)
        steps["copy"] = lambda: target.copy_(source)
    timed = timing.device_only(steps, job.device, rounds=job.rounds, seconds=3)
    us = 1e3 * timed["kernel"].median
    return {
        "kernel": name, "shape": "x".join(map(str, shape)), "layout": layout,
        "dtype": str(job.dtype).removeprefix("torch."), "us": round(us, 2), "maps": maps,
        "bytes": maps * size, "gigabytes_per_second": round(maps * size / us / 1e3, 1) if maps else "",
        "share": round(timed["copy"].median / timed["kernel"].median, 3) if maps else "",
        "l2": job.in_l2(shape),
    }  # fmt: skip


# --- 3. host time, and batch 1 ---------------------------------------------------------------------


def hosts(job: Job) -> Rows:
    """Host time per forward of an attention module, and a network at batch size 1 in a CUDA graph."""
    for row in _hosts(job) if job.has_time("hosts", needs=40) else ():
        print("{what:32} {arm:6} {us:9.1f} us  {ratio}".format(**row), flush=True)
        yield row


def _hosts(job: Job) -> Rows:
    x = torch.randn(1, 64, 4, 4, device=job.device)
    for name, module in (("cbam", cbam.CBAM(64)), ("timm", rivals.timm_cbam(64))):
        module = module.to(job.device).train()
        us = 1e6 * submitted(lambda m=module: m(x), 3 if job.dry else 200, job)
        yield {"what": "host time of a forward", "arm": name, "us": round(us, 1), "ratio": ""}
    if not job.dry:
        plain = cbam.build("resnet50").to(job.device, job.dtype).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ours = cbam.attach(copy.deepcopy(plain), start="paper").eval()
        arms: dict[str, timing.Step] = {"plain": replayed(plain, job), "cbam": replayed(ours, job)}
        for arm, found in timing.in_turns(arms, job.device, least=timing.NETWORK).items():
            row = {"what": "resnet50, batch 1, CUDA graph", "arm": arm, "us": round(1e3 * found.median, 1)}
            yield row | {"ratio": round(found.ratio, 4)}


def submitted(step: Callable[[], object], count: int, job: Job) -> float:
    """Seconds of host time per step, without waiting for the device."""
    step()
    synchronize(job)
    began = time.perf_counter()
    for _ in range(count):
        step()
    took = time.perf_counter() - began
    synchronize(job)
    return took / count


def replayed(model: nn.Module, job: Job) -> timing.Step:
    """A forward pass at batch size 1, captured in a CUDA graph."""
    x = torch.randn(1, 3, 224, 224, device=job.device, dtype=job.dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    return timing.captured(forward, job.device)


def synchronize(job: Job) -> None:
    if job.device.type == "cuda":
        torch.cuda.synchronize()


# --- 4. blocks and networks ------------------------------------------------------------------------


def bench(job: Job, compiled: bool = False) -> _Measure:
    """The measurement object of `cbam bench`."""
    batch = 2 if job.dry else 128
    settings = Bench(device=job.device.type, rounds=job.rounds, batch_size=batch, compiled=compiled)
    return _Measure(settings, job.device, job.dtype, batch, partial(print, flush=True))


def blocks(job: Job) -> Rows:
    """Attention alone and the end of a block, stage by stage."""
    measure = bench(job)
    for channels, side in ((8, 5),) if job.dry else STAGES:
        if job.has_time(f"blocks of {channels} channels", needs=60):
            for row in measure.blocks(channels, side, "NHWC"):
                yield row | {"l2": job.in_l2((measure.batch, channels, side, side))}


def networks(job: Job) -> Rows:
    """Whole networks, eager."""
    names = ("resnet50", "resnet18", "mobilenet_v3_large", "convnext_tiny")
    for name in ("resnet_tiny",) if job.dry else names:
        if job.has_time(name, needs=90):
            yield from bench(job).network(name, "NHWC")


def compiled(job: Job) -> Rows:
    """ResNet50 again, eager and compiled."""
    if job.has_time("resnet50, compiled", needs=360):
        yield from bench(job, compiled=not job.dry).network("resnet_tiny" if job.dry else "resnet50", "NHWC")


# --- 5. ncu ----------------------------------------------------------------------------------------


def profiled(job: Job) -> Rows:
    """Profile one forward and backward with `ncu`, without locking the clocks of the machine."""
    tool = shutil.which("ncu")
    if tool is None:
        print("skipped: ncu is not installed")
    if tool is None or not job.has_time("ncu", needs=60):
        return
    command = [
        tool, "--csv", "--metrics", METRICS, "--profile-from-start", "off",
        "--clock-control", "none", "--cache-control", "none",
        sys.executable, "-m", "benchmarks.gpu", "--once", *(["--dry"] if job.dry else []),
    ]  # fmt: skip
    with started(command, subprocess.PIPE) as process:
        try:
            output = process.communicate(timeout=job.left())[0]
        except subprocess.TimeoutExpired:
            print("ncu did not finish in time", flush=True)
            job.left_out.append("ncu")
            return
    if process.returncode:
        print(f"ncu failed: {output.strip().splitlines()[-3:]}", flush=True)
    else:
        yield from csv.DictReader(line for line in output.splitlines() if line.startswith('"'))


def once(job: Job) -> None:
    """The work that `ncu` profiles: the largest stage, after a first pass that compiles."""
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


STEPS: dict[str, Callable[[Job], Rows]] = {
    "kernels": kernels, "hosts": hosts, "blocks": blocks, "networks": networks, "ncu": profiled,
    "compiled": compiled,
}  # fmt: skip
GATED = ("blocks", "networks", "compiled")  # ratios, skipped if the cells fail


def run_step(name: str, job: Job) -> None:
    """Run a step, saving after every row."""
    rows = []
    for row in STEPS[name](job):
        rows.append(row)
        job.save(name, rows)


def main() -> int:
    names = ("cells", *STEPS)
    parser = argparse.ArgumentParser(description="Check and measure the Triton kernels on a GPU.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", help="commit of this code, if it is not a git checkout")
    parser.add_argument("--dry", action="store_true", help="no GPU: the interpreter and tiny sizes")
    parser.add_argument(
        "--steps", nargs="+", choices=names, default=names, help="steps to run (default: all)"
    )
    parser.add_argument("--once", action="store_true", help="one forward and backward, for ncu")
    options = parser.parse_args()
    if options.dry != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--dry and TRITON_INTERPRET=1 require each other")
    if not options.dry and not torch.cuda.is_available():
        parser.error("no GPU: to test the script without one, run DRY=1 benchmarks/gpu.sh")
    job = Job(options.out, time.monotonic() + 60 * options.minutes, options.dry, options.commit)
    if options.once:
        once(job)
        return 0
    failed = []
    for name in options.steps:
        if "cells" in failed and name in GATED:
            print(f"skipped, the cells do not agree with the equation: {name}", flush=True)
            continue
        try:
            if name != "cells":
                run_step(name, job)
            else:
                job.agreed = agree(0.6 * job.left(), job.dry)
                failed += [] if job.agreed else [name]
        except Exception:  # the other steps may still work
            traceback.print_exc()
            failed.append(name)
    return 1 if failed else 75 if job.left_out else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child processes too
    sys.exit(main())
