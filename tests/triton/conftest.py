"""The residual tail written out in float64, and cells of it: what the Triton kernels are compared with."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = "gamma beta mean var w1 b1 w2 b2 kernel s_gamma s_beta s_mean s_var".split()
GRADIENTS = "dx g gamma beta w1 b1 w2 b2 kernel s_gamma s_beta".split()
SAVED = "m e k mu v gate s s_mu s_v".split()


@dataclass(frozen=True)
class Cell:
    """One way to call the tail."""

    shape: tuple[int, int, int, int] = (2, 5, 4, 3)
    dtype: torch.dtype = torch.float32
    nhwc: bool = False
    norm: str = "batch"  # of the map: "batch", "running" or "" for none
    pools: str = "avg max"  # of the channel gate, "" for no gate
    spatial: str = "batch"  # norm of the spatial gate, or "" for no gate
    side: int = 3
    shortcut: bool = True
    relu: bool = True
    hidden: int = 2
    gains: tuple[float, float] = (1.0, 1.0)
    data: str = "random"  # or "ties", "constant", "zero gamma", "far mean", "nan", "inf"
    parameters: torch.dtype | None = None  # of the parameters, where it is not the map's
    seed: int = 0

    def but(self, **changes: Any) -> "Cell":
        return replace(self, **changes)


@dataclass
class Case:
    """The tensors of a cell, on a device; `grad` is the gradient of its output."""

    cell: Cell
    x: Tensor
    shortcut: Tensor | None
    grad: Tensor
    p: dict[str, Tensor | None] = field(default_factory=dict)


def draw(cell: Cell, device: str) -> Case:
    """Tensors for a cell; the same numbers on every device."""
    N, C, H, W = cell.shape
    gen = torch.Generator().manual_seed(cell.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, dtype=torch.float64)

    x, shortcut, grad = normal(N, C, H, W), normal(N, C, H, W), normal(N, C, H, W)
    p: dict[str, Tensor | None] = {
        "gamma": 1 + normal(C), "beta": normal(C), "mean": normal(C) / 2, "var": normal(C).abs() + 0.5,
        "w1": normal(cell.hidden, C), "b1": normal(cell.hidden), "w2": normal(C, cell.hidden), "b2": normal(C),
        "kernel": normal(1, 2, cell.side, cell.side) / cell.side, "s_gamma": normal(1), "s_beta": normal(1),
        "s_mean": normal(1), "s_var": normal(1).abs() + 0.5,
    }  # fmt: skip
    if cell.data == "ties":
        x = torch.round(x)
    elif cell.data == "constant":
        x = x[:1, :1, :1, :1].expand(N, C, H, W)
    elif cell.data == "zero gamma":
        p["gamma"] = torch.zeros(C, dtype=torch.float64)
    elif cell.data == "far mean":
        x = x + 1000
    elif cell.data in ("nan", "inf", "-inf"):
        x[0, C // 2, H // 2, W // 2] = float(cell.data)
    absent = [] if cell.norm else ["gamma", "beta", "mean", "var"]
    absent += [] if cell.pools else ["w1", "b1", "w2", "b2"]
    absent += [] if cell.spatial else ["kernel", "s_gamma", "s_beta", "s_mean", "s_var"]
    absent += ["mean", "var"] if cell.norm == "batch" else []
    absent += ["s_mean", "s_var"] if cell.spatial == "batch" else []

    def place(t: Tensor) -> Tensor:
        layout = torch.channels_last if cell.nhwc else torch.contiguous_format
        return t.to(cell.dtype).to(device).contiguous(memory_format=layout)

    return Case(
        cell, place(x), place(shortcut) if cell.shortcut else None, place(grad),
        {n: None if n in absent else p[n].to(cell.parameters or cell.dtype).to(device) for n in NAMES},
    )  # fmt: skip


def run(tail, case: Case, *, save: bool = True) -> dict[str, Tensor]:
    """What `tail` returns, by name."""
    c, p = case.cell, case.p
    found = tail(
        case.x, case.shortcut, p["gamma"], p["beta"], p["mean"], p["var"], c.norm == "batch", 1e-5,
        p["w1"], p["b1"], p["w2"], p["b2"], "avg" in c.pools, "max" in c.pools, c.gains[0],
        p["kernel"], p["s_gamma"], p["s_beta"], p["s_mean"], p["s_var"], c.spatial == "batch", 1e-5, c.gains[1],
        c.relu, save,
    )  # fmt: skip
    return dict(zip(["out", *SAVED], found, strict=True))


def run_backward(
    tail_backward, case: Case, saved: dict[str, Tensor], *, need_x: bool = True, need_shortcut: bool = True
) -> dict[str, Tensor]:
    """What `tail_backward` returns, by name."""
    c, p = case.cell, case.p
    found = tail_backward(
        case.grad, case.x, saved["out"] if c.relu else None, p["gamma"], p["beta"], c.norm == "batch", 1e-5,
        p["w1"], p["b1"], p["w2"], p["b2"], "avg" in c.pools, "max" in c.pools, c.gains[0],
        p["kernel"], p["s_gamma"], p["s_beta"], c.spatial == "batch", 1e-5, c.gains[1], c.relu,
        *(saved[name] for name in SAVED), need_x, need_shortcut,
    )  # fmt: skip
    return dict(zip(GRADIENTS, found, strict=True))


def written_out(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and every gradient in float64, by plain operations on the same rounded numbers."""
    c = case.cell
    leaves = {
        n: t.detach().cpu().double().contiguous().requires_grad_() for n, t in case.p.items() if t is not None
    }
    x = case.x.detach().cpu().double().contiguous().requires_grad_()
    shortcut = None if case.shortcut is None else case.shortcut.detach().cpu().double().requires_grad_()
    out = equation(c, x, shortcut, leaves)
    out.backward(case.grad.cpu().double())
    found = {n: t.grad for n, t in leaves.items() if t.grad is not None}
    found["dx"] = x.grad
    if shortcut is not None:
        found["g"] = shortcut.grad
    return out.detach(), found


def equation(c: Cell, x: Tensor, shortcut: Tensor | None, p: dict[str, Tensor]) -> Tensor:
    """The tail as its definition reads."""
    y, N, C = x, x.shape[0], x.shape[1]
    if c.norm:
        running = (p["mean"], p["var"]) if c.norm == "running" else (None, None)
        running = tuple(None if t is None else t.detach() for t in running)
        y = F.batch_norm(x, *running, p["gamma"], p["beta"], training=c.norm == "batch", eps=1e-5)
    z = y
    if c.pools:
        flat = y.reshape(N, C, -1)
        pools = [flat.mean(2)] if "avg" in c.pools else []
        pools += [flat.max(2)[0]] if "max" in c.pools else []
        logits = sum(F.linear(F.relu(F.linear(t, p["w1"], p["b1"])), p["w2"], p["b2"]) for t in pools)
        z = y * (c.gains[0] * torch.sigmoid(logits))[:, :, None, None]
    v = z
    if c.spatial:
        s = F.conv2d(torch.stack([z.max(1)[0], z.mean(1)], 1), p["kernel"], padding=c.side // 2)
        running = (p["s_mean"], p["s_var"]) if c.spatial == "running" else (None, None)
        running = tuple(None if t is None else t.detach() for t in running)
        s = F.batch_norm(s, *running, p["s_gamma"], p["s_beta"], training=c.spatial == "batch", eps=1e-5)
        v = z * (c.gains[1] * torch.sigmoid(s))
    if shortcut is not None:
        v = v + shortcut
    return F.relu(v) if c.relu else v
