"""The check before any timing: the kernels compute the equation, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam import ops
from cbam.errors import CBAMError
from cbam.nn import CBAM
from cbam.nn.tail import begin

SHAPES = ((2, 32, 7, 9), (3, 17, 13, 17), (2, 16, 1, 31), (2, 64, 28, 28))
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Relative to the largest value of the reference; 16-bit results are rounded once.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3}


class GateError(CBAMError):
    """An implementation does not compute the equation, so its times are meaningless."""


def check(device: torch.device, dtype: torch.dtype) -> int:
    """Compare attention, and the end of a block, with the equation in float64; returns the number of cases.

    Raises:
        GateError: a case is off; the message says which, and by how much.
    """
    checked = 0
    for shape in SHAPES:
        for layout in LAYOUTS:
            for training in (True, False):
                for in_block in (False, True):
                    _check(shape, layout, training, in_block, device, dtype)
                    checked += 1
    return checked


def _check(
    shape, layout: str, training: bool, in_block: bool, device: torch.device, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    norm, attention = nn.BatchNorm2d(shape[1]), CBAM(shape[1], reduction=4)
    with torch.no_grad():
        for p in (*norm.parameters(), *attention.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    modules = nn.ModuleList([norm, attention]).to(device, dtype).train(training)
    inputs = torch.randn(3, *shape, generator=generator).to(device, dtype)
    x, shortcut, grad = (t.contiguous(memory_format=LAYOUTS[layout]) for t in inputs)
    ours = _outcome(modules, x, shortcut, grad, in_block)
    with ops.using("reference"):
        exact = _outcome(modules.double(), x.double(), shortcut.double(), grad.double(), in_block)
    for name, a, b in zip(("output", "gradient"), ours, exact, strict=True):
        off = ((a.double() - b).abs().max() / b.abs().max()).item()
        if not off <= TOLERANCE[dtype]:
            raise GateError(
                f"{'the end of a block' if in_block else 'attention'} at {shape} {layout} {dtype}, "
                f"{'training' if training else 'evaluation'}: the {name} is off by {off:.1e} of its scale"
            )


def _outcome(
    modules: nn.ModuleList, x: Tensor, shortcut: Tensor, grad: Tensor, in_block: bool
) -> tuple[Tensor, Tensor]:
    norm, attention = modules
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = F.relu(begin(norm, attention, leaf) + shortcut) if in_block else attention(leaf)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad
