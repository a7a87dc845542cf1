"""The residual tail written out in float64, and cells of it: what the Triton kernels are compared with."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
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
    data: str = "random"  # or "ties", "constant", "zero gamma", "far mean", "nan", "inf", "decided"
    biases: bool = True  # of both norms
    parameters: torch.dtype | None = None  # of the parameters, where it is not the map's
    offset: int = 0  # of the maps in their storage, in values
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

    def narrow(inputs: int) -> float:
        """Logits in the hundreds leave float32 no digits of a gate's gradient."""
        return inputs**0.5 if C > 128 else 1.0

    x, shortcut, grad = normal(N, C, H, W), normal(N, C, H, W), normal(N, C, H, W)
    p: dict[str, Tensor | None] = {
        "gamma": 1 + normal(C), "beta": normal(C), "mean": normal(C) / 2, "var": normal(C).abs() + 0.5,
        "w1": normal(cell.hidden, C) / narrow(C), "b1": normal(cell.hidden),
        "w2": normal(C, cell.hidden) / narrow(cell.hidden), "b2": normal(C),
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
    absent += [] if cell.biases else ["beta", "s_beta"]
    absent += ["mean", "var"] if cell.norm == "batch" else []
    absent += ["s_mean", "s_var"] if cell.spatial == "batch" else []

    case = Case(
        cell, placed(x, cell, device), placed(shortcut, cell, device) if cell.shortcut else None,
        placed(grad, cell, device),
        {n: None if n in absent else p[n].to(cell.parameters or cell.dtype).to(device) for n in NAMES},
    )  # fmt: skip
    if cell.data == "decided" and case.shortcut is not None:
        case.shortcut[undecided(case).to(device)] += 1
    return case


def undecided(case: Case) -> Tensor:
    """Where the ReLU's argument is so near zero that float32 may give it the other sign, and so all of a
    gradient or none: a large map has some such values among its millions."""
    c = case.cell.but(relu=False)
    p = {n: t.cpu().double().requires_grad_() for n, t in case.p.items() if t is not None}
    shortcut = None if case.shortcut is None else case.shortcut.cpu().double()
    return equation(c, case.x.cpu().double(), shortcut, p, {}).detach().abs() < 1e-3


def placed(t: Tensor, cell: Cell, device: str) -> Tensor:
    """`t` in the dtype and layout of a cell, its storage `offset` values from where an allocation begins."""
    N, C, H, W = t.shape
    flat = torch.full((t.numel() + 2 * cell.offset,), float("nan"), dtype=cell.dtype, device=device)
    flat = flat[cell.offset : cell.offset + t.numel()]
    laid = flat.view(N, H, W, C).permute(0, 3, 1, 2) if cell.nhwc else flat.view(N, C, H, W)
    return laid.copy_(t)


def run(tail, case: Case, *, save: bool = True) -> dict[str, Tensor]:
    """What `tail` returns, by name."""
    c, p = case.cell, case.p
    found = tail(
        case.x, case.shortcut, p["gamma"], p["beta"], p["mean"], p["var"], c.norm == "batch", 1e-5,
        p["w1"], p["b1"], p["w2"], p["b2"], "avg" in c.pools, "max" in c.pools, c.gains[0],
        p["kernel"], p["s_gamma"], p["s_beta"], p["s_mean"], p["s_var"], c.spatial == "batch", 1e-5,
        c.gains[1], c.relu, save,
    )  # fmt: skip
    return dict(zip(["out", *SAVED], found, strict=True))


def run_inference(tail_inference, case: Case, norm: list[Tensor | None]) -> Tensor:
    """What `tail_inference` returns; `norm` is one of the shortcut: weight, bias, mean and variance."""
    c, p = case.cell, case.p
    return tail_inference(
        case.x, case.shortcut, *norm, 1e-3, p["gamma"], p["beta"], p["mean"], p["var"], 1e-5,
        p["w1"], p["b1"], p["w2"], p["b2"], "avg" in c.pools, "max" in c.pools, c.gains[0],
        p["kernel"], p["s_gamma"], p["s_beta"], p["s_mean"], p["s_var"], 1e-5, c.gains[1], c.relu,
    )  # fmt: skip


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


def written_out(case: Case) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """The output and every gradient in float64, by plain operations on the same rounded numbers.

    Then what an error of each is measured against: the largest absolute value, and for the two sums over all
    pixels, which cancel, the sum of their absolute terms. On a tiny map the norm of the spatial gate may
    divide by very little, and the kernel's gradient is what is left of terms larger by that factor.
    """
    c = case.cell
    leaves = {
        n: t.detach().cpu().double().contiguous().requires_grad_() for n, t in case.p.items() if t is not None
    }
    x = case.x.detach().cpu().double().contiguous().requires_grad_()
    shortcut = None if case.shortcut is None else case.shortcut.detach().cpu().double().requires_grad_()
    terms: dict[str, Tensor] = {}
    out = equation(c, x, shortcut, leaves, terms)
    out.backward(case.grad.cpu().double())
    found = {n: t.grad for n, t in leaves.items() if t.grad is not None}
    found["dx"] = x.grad
    if shortcut is not None:
        found["g"] = shortcut.grad
    scales = {name: value.abs().max().item() for name, value in (("out", out.detach()), *found.items())}
    scales |= {name: t.grad.abs().sum().item() for name, t in terms.items() if t.grad is not None}
    if "steepness" in terms:
        scales["kernel"] *= max(1.0, terms["steepness"].item())
    return out.detach(), found, scales


def equation(
    c: Cell, x: Tensor, shortcut: Tensor | None, p: dict[str, Tensor], terms: dict[str, Tensor]
) -> Tensor:
    """The tail by its definition; s_gamma and s_beta are expanded over the pixels into `terms`."""
    y, N, C = x, x.shape[0], x.shape[1]
    if c.norm:
        running = (p["mean"], p["var"]) if c.norm == "running" else (None, None)
        running = tuple(None if t is None else t.detach() for t in running)
        y = F.batch_norm(x, *running, p["gamma"], p.get("beta"), training=c.norm == "batch", eps=1e-5)
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
        if c.spatial == "batch" and s.numel() < 16:  # so few values may lie close together
            terms["steepness"] = (s.detach().var(correction=0) + 1e-5).rsqrt()
        s = F.batch_norm(s, *running, training=c.spatial == "batch", eps=1e-5)
        for name in {"s_gamma", "s_beta"} & set(p):
            terms[name] = p[name].expand(s.shape).clone()
            terms[name].retain_grad()
        v = z * (c.gains[1] * torch.sigmoid(terms["s_gamma"] * s + terms.get("s_beta", 0)))
    if shortcut is not None:
        v = v + shortcut
    return F.relu(v) if c.relu else v


@dataclass
class Guarded:
    """Allocates what the launchers ask for: poisoned, and between bands that nothing may write to."""

    band: int = 64
    buffers: list[tuple[Tensor, int]] = field(default_factory=list)

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        poison = float("nan") if dtype.is_floating_point else -(10**6)
        buffer = torch.full((size + 2 * self.band,), poison, dtype=dtype, device=device)
        self.buffers.append((buffer, size))
        return buffer[self.band : self.band + size]

    def check(self) -> None:
        for buffer, size in self.buffers:
            for band in (buffer[: self.band], buffer[self.band + size :]):
                clean = band.isnan() if band.is_floating_point() else band == -(10**6)
                assert clean.all(), f"written outside a buffer of {size} {buffer.dtype}"


@pytest.fixture
def guarded(monkeypatch):
    """Every buffer of the launchers poisoned and guarded; the bands are checked after the test."""
    from cbam.ops.triton_map import Map

    guard = Guarded()

    def empty(self, *shape, dtype=None):
        dtype = dtype or self.acc
        return guard.empty(torch.Size(shape).numel(), dtype, self.x.device).view(shape)

    def alike(self):
        flat = guard.empty(self.x.numel(), self.x.dtype, self.x.device)
        return flat.as_strided(self.x.shape, self.x.stride(), flat.storage_offset())

    monkeypatch.setattr(Map, "empty", empty)
    monkeypatch.setattr(Map, "alike", alike)
    yield guard
    guard.check()


@pytest.fixture
def tails() -> SimpleNamespace:
    """What draws the cells, runs them and computes what they are compared with."""
    return SimpleNamespace(
        Cell=Cell, draw=draw, run=run, run_inference=run_inference, run_backward=run_backward,
        written_out=written_out, placed=placed, undecided=undecided,
    )  # fmt: skip
