"""A feature map as the Triton kernels see it: its extents, its plan, its buffers; and how a kernel starts."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from cbam.ops.triton_plan import INTERPRETED, Plan, Tile, plan


class Norm(NamedTuple):
    """BatchNorm of the map, (C,), or of the convolution's output, (1,): gamma is None where there is none."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None


ABSENT = Norm(None, None, None, None)


def bias(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The bias of a norm; zeros where it has a weight alone."""
    return torch.zeros_like(weight) if weight is not None and bias is None else bias


class Kernels:
    """The kernels that one call of an operator starts, as compiled for its arguments.

    Triton compiles for the types, the alignment and the sizes of what a kernel is given. It asks for all of
    them at each start, which takes several times as long as starting. Calls that are alike share these (see
    `kernels_for`), and ask once.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}

    def launch(
        self, kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, **constants: Any
    ) -> None:
        """Start `programs` of a kernel on the current stream; only `tl.fma` fuses a product with a sum.

        No call starts a kernel twice, and what it is given here follows from what the call was given.
        """
        compiled = self._compiled.get(kernel.fn)
        if compiled is None:
            self._compiled[kernel.fn] = kernel[(programs,)](
                *arguments, num_warps=num_warps, num_stages=2, enable_fp_fusion=False, **constants
            )  # fmt: skip
        else:  # constants are compiled in, but have their places
            compiled[programs, 1, 1](*arguments, *constants.values())


def kernels_for(*arguments: Any) -> Kernels:
    """The kernels of all calls with arguments like these: of such types and sizes, and as aligned."""
    return _kernels(*map(_likeness, arguments))


@lru_cache(maxsize=4096)
def _kernels(*_: Any) -> Kernels:
    return Kernels()


def _likeness(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.numel(), value.data_ptr() % 16
    return value


@dataclass(frozen=True)
class Map:
    """A feature map and how it is worked on: what every step of a pass over it needs."""

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
        """The map `x` of a call of an operator with these arguments besides."""
        N, C, H, W = x.shape
        nhwc = not x.is_contiguous()
        assert not nhwc or x.is_contiguous(memory_format=torch.channels_last), "x must be dense"
        count = processors(x.device)
        worked = plan(N, C, H * W, nhwc, x.itemsize, count)
        acc, kind = (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)
        constants = {"ACC": kind, "NHWC": nhwc, "UNIT": worked.unit}
        alike = kernels_for(x.device, *x.shape, nhwc, x, *arguments)
        return cls(N, C, H * W, W, worked, x, acc, count, constants, alike)

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
        """An output that does not exist."""
        return self.empty(0, dtype=dtype)


@lru_cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a device; the CPU, where kernels are interpreted, counts as a small one."""
    if device.type == "cpu":
        return INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> AbstractContextManager:
    """Make `device` the current one; nothing to do where it is, or where kernels are interpreted."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
