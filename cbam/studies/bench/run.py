"""`cbam bench`: the gate, then attention, ends of blocks and whole networks, with a row for each."""

import copy
import ctypes
import itertools
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam import ops
from cbam.errors import AttachError, ConfigError
from cbam.models import build
from cbam.nn import CBAM
from cbam.studies import machine
from cbam.studies.bench import gate, rivals
from cbam.studies.bench.settings import Bench
from cbam.studies.timing import NETWORK, Step, Timed, device_only, in_turns
from cbam.surgery import attach
from cbam.surgery.effects import seeded
from cbam.train.fitting import pick_device

STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # channels and side of ResNet50's stages at 224
LINE = (
    "{op:18} {shape:15} {layout} {mode:9} {implementation:18} {ms:9.3f} ms"
    "  {ratio:5.2f} [{low:.2f}, {high:.2f}]{more}"
)


def benchmark(
    settings: Bench, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Check, then measure; every row is passed to `say`, and to `keep`, as soon as it is measured.

    A row has the median milliseconds of an implementation, and the median of its ratios to the first of its
    group (below 1 is faster), with their minimum and maximum. `floor` is the memory traffic in bytes that the
    operation cannot avoid; `bandwidth` is its speed relative to a copy, on a GPU without the launch overhead
    that `ms` includes.

    Raises:
        GateError: the kernels do not compute the equation. ConfigError: no such device or network, or
            `keep_memory` is not available.
    """
    device = pick_device(settings.device)
    if settings.keep_memory:
        _keep_memory()
    networks = ("resnet18",) if settings.quick else settings.networks
    _check_networks(networks)
    dtype = getattr(torch, settings.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    batch = settings.batch_size or (8 if device.type == "cpu" else 128)
    measure = _Measure(settings, device, dtype, batch, say)
    layouts = settings.layouts[:1] if settings.quick else settings.layouts
    rows: list[dict[str, Any]] = []
    with seeded(0, device):
        checked = sum(gate.check(device, kind) for kind in dict.fromkeys((torch.float64, dtype)))
        kernels = "fused kernels" if _has_kernels(device, dtype) else "plain torch operations"
        say(f"{kernels} on {_name(device)}: {checked} results agree with the equation")
        stages = STAGES[2:3] if settings.quick else STAGES
        steps = [measure.blocks(*stage, layout) for layout in layouts for stage in stages]
        steps += [measure.network(name, layout) for name in networks for layout in layouts]
        for row in itertools.chain.from_iterable(steps):
            rows.append(row)
            if keep is not None:
                keep(row)
    return rows


def _check_networks(names: Iterable[str]) -> None:
    """Build every network on the meta device and attach to it, so that a wrong name is reported first.

    Raises:
        ConfigError: no such network, or attention cannot be attached to it.
    """
    for name in names:
        try:
            with torch.device("meta"):
                model = build(name)
            attach(model, attention=CBAM, start="paper")
        except AttachError as error:
            raise ConfigError(f"{name}: {error}") from error


def _name(device: torch.device) -> str:
    """The name of the device, for a CPU with its instruction set, which the name does not determine."""
    name = machine.describe(device)["name"]
    return name if device.type != "cpu" else f"{name} ({torch.backends.cpu.get_cpu_capability()})"


@dataclass
class _Measure:
    """Yields every row as it is measured."""

    settings: Bench
    device: torch.device
    dtype: torch.dtype
    batch: int
    say: Callable[[str], None]

    def blocks(self, channels: int, side: int, layout: str) -> Iterator[dict[str, Any]]:
        """Attention by itself, then the end of a block, at one shape."""
        shape = (self.batch, channels, side, side)
        x, shortcut = (
            torch.randn(shape, device=self.device, dtype=self.dtype).contiguous(
                memory_format=gate.LAYOUTS[layout]
            )
            for _ in range(2)
        )
        size = x.numel() * x.element_size()
        copy_ms = device_only({"copy": lambda: shortcut.copy_(x)}, self.device, rounds=5)["copy"].median
        speed = 2 * size / copy_ms  # bytes per millisecond
        for training in (False, True):
            # Passes over the map that cannot be avoided; docs/kernels.md counts them.
            bare = {name: _map_step(m, (x,), training) for name, m in self._attention(channels, training)}
            floor = (9 if training else 4) * size
            yield from self._time("attention", shape, layout, training, bare, floor, speed)
            ends = {
                name: _map_step(m, (x, shortcut), training) for name, m in self._tails(channels, training)
            }
            floor = (13 if training else 5) * size
            yield from self._time("end of a block", shape, layout, training, ends, floor, speed)

    def _attention(self, channels: int, training: bool) -> Iterator[tuple[str, nn.Module]]:
        ours = CBAM(channels)
        yield "timm", self._ready(rivals.timm_cbam(channels), training)
        yield "released", self._ready(rivals.Released(channels), training)
        if _can_compile(self.device):
            torch._dynamo.reset()  # see `network`
            yield "released, compiled", torch.compile(self._ready(rivals.Released(channels), training))  # type: ignore[misc]
        yield "cbam", self._ready(ours, training)
        yield "cbam, reference", self._ready(_Reference(copy.deepcopy(ours)), training)

    def _tails(self, channels: int, training: bool) -> Iterator[tuple[str, nn.Module]]:
        yield "plain", self._ready(rivals.Tail(channels), training)
        yield "timm", self._ready(rivals.Tail(channels, rivals.timm_cbam(channels)), training)
        yield "cbam", self._ready(rivals.OurTail(channels, CBAM(channels)), training)

    def _ready(self, module: nn.Module, training: bool) -> nn.Module:
        return module.to(self.device, self.dtype).train(training)

    def network(self, name: str, layout: str) -> Iterator[dict[str, Any]]:
        """A whole network without attention, and with each implementation of it."""
        plain = build(name)
        arms = {"plain": plain}
        for arm, attention in (("cbam", CBAM), ("timm", rivals.timm_cbam), ("released", rivals.Released)):
            arms[arm] = attach(copy.deepcopy(plain), attention=attention, start="paper")
        arms["cbam, reference"] = _Reference(copy.deepcopy(arms["cbam"]))
        shape = (self.batch, 3, 224, 224)
        for compiled in (False, True) if self.settings.compiled else (False,):
            for training in (False, True):
                if compiled:  # after eight compilations of one forward, dynamo runs it uncompiled
                    torch._dynamo.reset()
                chosen = {a: m for a, m in arms.items() if not compiled or a in ("plain", "cbam", "timm")}
                images = torch.randn(shape, device=self.device)
                steps = {
                    arm: self._network_step(m, images, layout, training, compiled)
                    for arm, m in chosen.items()
                }
                peaks = {arm: _peak_memory(step, self.device) for arm, step in steps.items()}
                title = f"{name}{', compiled' if compiled else ''}"
                yield from self._time(title, shape, layout, training, steps, 0, 0.0, peaks)

    def _network_step(
        self, model: nn.Module, images: Tensor, layout: str, training: bool, compiled: bool
    ) -> Step:
        memory_format = gate.LAYOUTS[layout]
        model = model.to(self.device).to(memory_format=memory_format).train(training)  # type: ignore[call-overload]
        run: Callable = torch.compile(model, dynamic=False) if compiled else model
        images = images.contiguous(memory_format=memory_format)
        targets = torch.arange(len(images), device=self.device) % 10
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def forward() -> Tensor:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return run(images)

        def train() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward().float(), targets).backward()
            optimizer.step()

        def infer() -> None:
            with torch.no_grad():
                forward()

        return train if training else infer

    def _time(
        self,
        op: str,
        shape: tuple[int, ...],
        layout: str,
        training: bool,
        steps: dict[str, Step],
        floor: int,
        speed: float,
        peaks: dict[str, int | str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        least = 2.0 if floor else NETWORK  # a whole network has no floor
        timed = in_turns(steps, self.device, rounds=self.settings.rounds, least=least)
        ours = timed["cbam"].median
        if floor and self.device.type == "cuda":
            ours = device_only({"cbam": steps["cbam"]}, self.device, rounds=5)["cbam"].median
        for name, found in timed.items():
            row = self._row(op, shape, layout, training, name, found) | {
                "peer": next(iter(steps)),
                "floor": floor or "",
                "bandwidth": round(floor / ours / speed, 3) if floor and name == "cbam" else "",
                "peak_memory": (peaks or {}).get(name, ""),
            }
            speed_text = (
                f"  {100 * row['bandwidth']:.0f} % of a copy's speed" if row["bandwidth"] != "" else ""
            )
            self.say(LINE.format(**row, more=speed_text))
            yield row

    def _row(
        self, op: str, shape: tuple[int, ...], layout: str, training: bool, name: str, found: Timed
    ) -> dict:
        return {
            "op": op,
            "implementation": name,
            "shape": "x".join(map(str, shape)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": layout,
            "mode": "training" if training else "inference",
            "ms": round(found.median, 4),
            "ratio": round(found.ratio, 4),
            "low": round(min(found.ratios), 4),
            "high": round(max(found.ratios), 4),
            "rounds": len(found.ms),
            "kernels": _has_kernels(self.device, self.dtype),
            "threads": torch.get_num_threads(),
            "memory": "kept" if self.settings.keep_memory else "given back",
            "device": _name(self.device),
            "torch": torch.__version__,
            "commit": machine.commit(),
        }


class _Reference(nn.Module):
    """Runs a module with attention computed by the reference implementation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with ops.using("reference"):
            return self.module(x)


def _map_step(module: nn.Module, maps: tuple[Tensor, ...], training: bool) -> Step:
    if not training:

        def infer() -> None:
            with torch.no_grad():
                module(*maps)

        return infer
    leaves = [x.detach().requires_grad_() for x in maps]
    grad = torch.randn_like(maps[0])

    def train() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(*leaves).backward(grad)

    return train


def _keep_memory() -> None:
    """Tell glibc to keep the memory that this process frees.

    Whether glibc returns it to the system depends on the history of the heap; memory that is allocated again
    then costs a page fault every 4 KiB, by chance more in one program than in the next.
    """
    if platform.libc_ver()[0] != "glibc":
        raise ConfigError("keep_memory is a setting of glibc, which is not the C library here: leave it out")
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing outside the heap


def _peak_memory(step: Step, device: torch.device) -> int | str:
    """The peak memory of a step in bytes, beyond what is allocated before it; '' on a CPU."""
    if device.type != "cuda":
        return ""
    step()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return ops.fused(torch.ones(1, 1, 1, 1, device=device, dtype=dtype))


def _can_compile(device: torch.device) -> bool:
    """Whether torch.compile can run on this machine; on a CPU it needs a C++ compiler."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "c++", "clang++"))
