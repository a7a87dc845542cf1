"""A feature map as the Triton kernels see it: its extents, its plan, its buffers; and launching a kernel."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from cbam.ops.triton_plan import INTERPRETED, Plan, Tile, plan


class Norm(NamedTuple):
    """BatchNorm of the map, (C,), or of the convolution's output, (1,): gamma is None if there is none."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None


ABSENT = Norm(None, None, None, None)


def bias(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The bias of a norm; zeros if it has only a weight."""
    return torch.zeros_like(weight) if weight is not None and bias is None else bias


class Kernels:
    """The kernels that one call of an operator launches, as compiled for its arguments.

    Triton specialises kernels on the types, alignment and sizes of their arguments, and checks all of these
    at each launch, which takes several times as long as the launch. Calls with similar arguments share
    compiled kernels (see `kernels_for`), and skip the checks.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}

    def launch(
        self, kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, **constants: Any
    ) -> None:
        """Launch `programs` of a kernel on the current stream; only `tl.fma` fuses a product with a sum.

        No call launches a kernel twice, and the arguments here follow from those of the call.
        """
        compiled = self._compiled.get(kernel.fn)
        if compiled is None:
            self._compiled[kernel.fn] = kernel[(programs,)](
                *arguments, num_warps=num_warps, num_stages=2, enable_fp_fusion=False, **constants
            )  # fmt: skip
        else:  # constants are compiled in, but still have positions
            compiled[programs, 1, 1](*arguments, *constants.values())


def kernels_for(*arguments: Any) -> Kernels:
    """The kernels of all calls with arguments of the same types, sizes and alignments as these."""
    return _kernels(*map(_signature, arguments))


@lru_cache(maxsize=4096)
def _kernels(*_: Any) -> Kernels:
    return Kernels()


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.numel(), value.data_ptr() % 16
    return value


@dataclass(frozen=True)
class Map:
    """A feature map and how it is processed: what every step of a pass over it needs."""

    N: int
    C: int
    L: int
    W: int
    plan: Plan
    x: Tensor
    acc: torch.dtype
    processors: int
    constants: dict[str, Any]
    kernels: Kernels

    @classmethod
    def of(cls, x: Tensor, *arguments: Any) -> "Map":
        """The map `x` of an operator call with these other arguments."""
        N, C, H, W = x.shape
        nhwc = not x.is_contiguous()
        assert not nhwc or x.is_contiguous(memory_format=torch.channels_last), "x must be dense"
        count = processors(x.device)
        chosen = plan(N, C, H * W, nhwc, x.itemsize, count)
        acc, kind = (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)
        constants = {"ACC": kind, "NHWC": nhwc, "UNIT": chosen.unit}
        alike = kernels_for(x.device, *x.shape, nhwc, x, *arguments)
        return cls(N, C, H * W, W, chosen, x, acc, count, constants, alike)

    @property
    def extents(self) -> tuple[int, int, int]:
        """N, C, L as the passes take them: the contiguous extent in multiples of `unit`."""
        nhwc, unit = self.plan.nhwc, self.plan.unit
        return self.N, self.C // (unit if nhwc else 1), self.L // (1 if nhwc else unit)

    def sweep(self, kernel: Any, tile: Tile, *arguments: Any, **constants: Any) -> None:
        """Launch a pass: its own arguments, then the extents and the steps of a program."""
        wide = tile.pixels * self.C if self.plan.nhwc else tile.channels * self.L
        self.kernels.launch(
            kernel, tile.programs, *arguments, *self.extents, tile.steps,
            BC=tile.channels, BP=tile.pixels, WIDE=wide >= 1 << 31, num_warps=tile.warps,
            EVEN=self.C % tile.channels == 0 and self.L % tile.pixels == 0,
            **self.constants, **constants,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.acc, device=self.x.device)

    def alike(self) -> Tensor:
        """A map of the same shape, type and layout."""
        return torch.empty_like(self.x)

    def absent(self, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor for an absent output."""
        return self.empty(0, dtype=dtype)


@lru_cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a device; the CPU, where kernels are interpreted, counts as a small one."""
    if device.type == "cpu":
        return INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> AbstractContextManager:
    """Make `device` the current one, unless it is already, or kernels are interpreted on the CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
