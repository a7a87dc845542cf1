"""The tail written out with torch operations, and the CPU kernels called through their operators.

The formula takes nothing from the package: it and the kernels are two independent statements of one thing.
"""

import ctypes
import importlib
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
LEVELS = ("portable", "AVX2", "AVX-512")
PARAMETERS = ("gamma", "beta", "w1", "b1", "w2", "b2", "kernel", "s_gamma", "s_beta")
EPS = 1e-5
NO_NORM = (None,) * 4  # weight, bias, mean and variance


@dataclass(frozen=True)
class Case:
    """One setting of everything that the operators distinguish."""

    shape: tuple[int, int, int, int] = (2, 32, 9, 7)
    dtype: torch.dtype = torch.float32
    layout: str = "NCHW"
    norm: str = "batch"  # "batch", "running" or ""
    pools: tuple[str, ...] = ("avg", "max")  # () for no channel gate
    spatial: str = "batch"  # "batch", "running", "plain" without a norm, or ""
    shortcut: bool = True
    relu: bool = True
    gain: float = 1.0
    side: int = 7
    biases: bool = True
    parameters: torch.dtype | None = None  # None: that of x
    data: str = "normal"  # "normal", "ties", "constant", "far" (mean 1000) or "zeros"
    gammas: str = "mixed"  # "mixed", "negative" or "zero"
    seed: int = 0

    def __str__(self) -> str:
        named = {k: v for k, v in self.__dict__.items() if v != type(self).__dataclass_fields__[k].default}
        return " ".join(f"{k}={v}" for k, v in named.items()).replace("torch.", "") or "default"


@dataclass
class Inputs:
    """Tensors by their names in the schema; an absent one is None."""

    x: Tensor
    grad: Tensor
    shortcut: Tensor | None = None
    values: dict[str, Tensor | None] = field(default_factory=dict)


def draw(case: Case) -> Inputs:
    """Random inputs of a case, each already rounded to its type."""
    r = torch.Generator().manual_seed(case.seed + 1)
    C = case.shape[1]
    kind = case.parameters or case.dtype

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=r, dtype=torch.float64) * std + mean).to(kind)

    def feature(std: float = 1.0) -> Tensor:
        t = torch.randn(case.shape, generator=r, dtype=torch.float64) * std
        return t.to(case.dtype).contiguous(memory_format=LAYOUTS[case.layout])

    x = feature()
    if case.data == "ties":
        x = (x * 2).round() / 2
    elif case.data == "constant":
        x = torch.full_like(x, 0.75)
    elif case.data == "far":
        x = x + 1000
    v: dict[str, Tensor | None] = dict.fromkeys((*PARAMETERS, "mean", "var", "s_mean", "s_var"))
    if case.norm:
        v["gamma"], v["beta"] = normal(C), normal(C, std=0.5)
        if case.gammas == "negative":
            v["gamma"] = -v["gamma"].abs()
        elif case.gammas == "zero":
            v["gamma"] = torch.where(
                torch.rand(C, generator=r) < 0.5, torch.zeros_like(v["gamma"]), v["gamma"]
            )
        if case.norm == "running":
            v["mean"], v["var"] = normal(C, std=0.3), normal(C).abs() + 0.5
    if case.pools:
        hidden = max(1, C // 4)
        # Small enough that no gate saturates: its gradient would be the rounding of 1 - Mc.
        v["w1"], v["w2"] = normal(hidden, C, std=C**-0.5), normal(C, hidden, std=0.4 * hidden**-0.5)
        if case.biases:
            v["b1"], v["b2"] = normal(hidden, std=0.1), normal(C, std=0.1)
    if case.spatial:
        v["kernel"] = normal(1, 2, case.side, case.side, std=0.2)
        if case.spatial != "plain":
            v["s_gamma"], v["s_beta"] = normal(1, mean=0.5), normal(1)
        if case.spatial == "running":
            v["s_mean"], v["s_var"] = normal(1), normal(1).abs() + 0.5
    grad, shortcut = feature(), feature() if case.shortcut else None
    if case.data == "zeros":  # exact zeros before the rectifier
        x[:, :, ::2] = 0
        if shortcut is not None:
            shortcut[:, :, ::2] = 0
    return Inputs(x, grad, shortcut, v)


def first_largest(t: Tensor, dim: int) -> Tensor:
    """The maximum, whose gradient goes to the first index; a NaN, if there is one, is the maximum."""
    return t.gather(dim, t.argmax(dim, keepdim=True)).squeeze(dim)


def formula(case: Case, i: Inputs, inner: dict[str, Tensor]) -> Tensor:
    """The tail by torch operations, in the type of its inputs; `inner` gets shat and the logits of Ms."""
    v = i.values
    y = i.x
    if case.norm:
        y = normalised(y, v["gamma"], v["beta"], v["mean"], v["var"], case.norm == "batch")
    z = y
    if case.pools:
        pooled = {"avg": y.mean((2, 3)), "max": first_largest(y.flatten(2), 2)}
        logits = 0
        for pool in case.pools:
            hidden = torch.relu(torch.nn.functional.linear(pooled[pool], v["w1"], v["b1"]))
            logits = logits + torch.nn.functional.linear(hidden, v["w2"], v["b2"])
        z = y * (case.gain * torch.sigmoid(logits))[:, :, None, None]
    out = z
    if case.spatial:
        q = torch.stack((first_largest(z, 1), z.mean(1)), 1)
        s = torch.nn.functional.conv2d(q, v["kernel"], padding=case.side // 2)
        if case.spatial != "plain":
            one, zero = torch.ones_like(v["s_gamma"]), torch.zeros_like(v["s_gamma"])
            shat = normalised(s, one, zero, v["s_mean"], v["s_var"], case.spatial == "batch")
            s = shat * v["s_gamma"] + v["s_beta"]
            inner["shat"], inner["logits"] = shat, s
        out = z * (case.gain * torch.sigmoid(s))
    if i.shortcut is not None:
        out = out + i.shortcut
    if not case.relu:
        return out
    return torch.relu(out) * (out.to(case.dtype) != 0)  # a value that underflows counts as zero


def normalised(t, weight, bias, mean, var, batch: bool) -> Tensor:
    """BatchNorm by its definition, also for one value per channel."""
    if batch:
        var, mean = torch.var_mean(t, (0, 2, 3), correction=0)
    scale = weight / torch.sqrt(var + EPS)
    return (t - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]


@dataclass
class Result:
    """The output and, by name, every gradient.

    `terms`: for the two single sums that cancel strongly, the sum of the absolute values of their terms.
    """

    out: Tensor
    grads: dict[str, Tensor]
    terms: dict[str, float] = field(default_factory=dict)


def by_formula(case: Case, inputs: Inputs, dtype: torch.dtype) -> Result:
    """Output and gradients by autograd, computed in `dtype` from the same numbers."""
    names = [name for name, t in inputs.values.items() if t is not None]
    leaves = {name: inputs.values[name].to(dtype) for name in names}
    leaves |= {"x": inputs.x.to(dtype)}
    if inputs.shortcut is not None:
        leaves["shortcut"] = inputs.shortcut.to(dtype)
    wanted = {n: t.requires_grad_() for n, t in leaves.items() if n in (*PARAMETERS, "x", "shortcut")}
    values = {name: leaves.get(name) for name in inputs.values}
    inner: dict[str, Tensor] = {}
    out = formula(case, Inputs(leaves["x"], inputs.grad, leaves.get("shortcut"), values), inner)
    ends = [*wanted.values(), *inner.values()]
    grads = torch.autograd.grad(out, ends, inputs.grad.to(dtype), allow_unused=True)
    terms = {}
    if inner:
        du = grads[-1]
        terms = {"s_gamma": (du * inner["shat"]).abs().sum().item(), "s_beta": du.abs().sum().item()}
    return Result(out.detach(), dict(zip(wanted, grads, strict=False)), terms)


class Kernels:
    """The operators, called with the settings of a case; and the formula that they are compared with."""

    Case, draw, formula = Case, staticmethod(draw), staticmethod(by_formula)
    layouts = LAYOUTS

    def __init__(self, library: ctypes.CDLL) -> None:
        self._level = library.cbam_native_level
        self.best = self.level(-1)

    def level(self, wanted: int) -> int:
        """Compute with this instruction set (-1: only ask); returns the one in use."""
        return self._level(wanted)

    def forward(self, case: Case, i: Inputs, save: bool) -> tuple[Tensor, ...]:
        v = i.values
        return torch.ops.cbam.tail(
            i.x, i.shortcut,
            v["gamma"], v["beta"], v["mean"], v["var"], case.norm == "batch", EPS,
            v["w1"], v["b1"], v["w2"], v["b2"], "avg" in case.pools, "max" in case.pools, case.gain,
            v["kernel"], v["s_gamma"], v["s_beta"], v["s_mean"], v["s_var"], case.spatial == "batch", EPS,
            case.gain, case.relu, save,
        )  # fmt: skip

    def inference(self, case: Case, i: Inputs, norm=NO_NORM) -> Tensor:
        """The forward with running statistics; `norm` is applied to the shortcut."""
        return torch.ops.cbam.tail_inference(i.x, *self._inference(case, i, norm))

    def in_place(self, case: Case, i: Inputs, x: Tensor | None = None, norm=NO_NORM) -> Tensor:
        """The same in the memory of `x`, or of a copy."""
        x = i.x.clone(memory_format=torch.preserve_format) if x is None else x
        torch.ops.cbam.tail_(x, *self._inference(case, i, norm))
        return x

    def _inference(self, case: Case, i: Inputs, norm) -> tuple:
        v = i.values
        return (
            i.shortcut, *norm, EPS,
            v["gamma"], v["beta"], v["mean"], v["var"], EPS,
            v["w1"], v["b1"], v["w2"], v["b2"], "avg" in case.pools, "max" in case.pools, case.gain,
            v["kernel"], v["s_gamma"], v["s_beta"], v["s_mean"], v["s_var"], EPS, case.gain, case.relu,
        )  # fmt: skip

    def backward(self, case: Case, i: Inputs, saved, need_x: bool = True, need_shortcut: bool = True):
        v = i.values
        return torch.ops.cbam.tail_backward(
            i.grad, i.x, saved[0] if case.relu else None,
            v["gamma"], v["beta"], case.norm == "batch", EPS,
            v["w1"], v["b1"], v["w2"], v["b2"], "avg" in case.pools, "max" in case.pools, case.gain,
            v["kernel"], v["s_gamma"], v["s_beta"], case.spatial == "batch", EPS, case.gain,
            case.relu, *saved[1:], need_x, need_shortcut and case.relu,
        )  # fmt: skip

    def __call__(self, case: Case, inputs: Inputs) -> Result:
        """Output and gradients."""
        with torch.no_grad():
            saved = self.forward(case, inputs, True)
            dx, g, *parameters = self.backward(case, inputs, saved)
        grads = {n: t for n, t in zip(PARAMETERS, parameters, strict=True) if inputs.values[n] is not None}
        grads["x"] = dx
        if inputs.shortcut is not None:
            grads["shortcut"] = g if case.relu else inputs.grad
        return Result(saved[0], grads)


def pytest_addoption(parser) -> None:
    parser.addoption("--kernels", help="a library to test instead of the installed one")


@pytest.fixture(scope="session")
def kernels(request) -> Kernels:
    """The compiled kernels, or a skip that says why there are none."""
    library = request.config.getoption("--kernels", default=None)
    if not library:
        reason = "cbam-native is not built (it needs a C++ compiler)"
        library = pytest.importorskip("cbam_native", reason=reason).library()
    importlib.import_module("cbam.ops.library")  # the schemas
    torch.ops.load_library(library)
    return Kernels(ctypes.CDLL(library))


@pytest.fixture(params=range(3), ids=LEVELS)
def level(request, kernels):
    """Each instruction set in turn."""
    if request.param > kernels.best:
        pytest.skip(f"this machine has no {LEVELS[request.param]}")
    kernels.level(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _best_level_afterwards(request):
    """Restore the level: tests of other folders run in this process too."""
    yield
    if "kernels" in request.fixturenames:
        kernels = request.getfixturevalue("kernels")
        kernels.level(kernels.best)


SHAPES = (
    (40, 8, 1, 1), (2, 17, 1, 1), (2, 1, 13, 17), (3, 3, 7, 7), (2, 17, 13, 17), (1, 64, 127, 1),
    (2, 64, 1, 33), (2, 2048, 7, 7), (1, 40, 31, 37), (3, 130, 5, 5), (1, 24, 70, 90), (5, 16, 14, 14),
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DRAWS = 21


def cells() -> list[tuple[Case, int]]:
    """Every shape, type and layout, each with freshly drawn settings; and the instruction set."""
    r, found = random.Random(5), []
    for shape in SHAPES:
        pixels = shape[2] * shape[3]
        enough = shape[0] * pixels >= 16  # to normalise by statistics of the batch
        for dtype in DTYPES:
            for layout in LAYOUTS:
                for _ in range(DRAWS):
                    case = Case(
                        shape, dtype, layout,
                        norm=r.choice(("batch", "batch", "running", "") if enough else ("running", "")),
                        pools=r.choice(((), ("avg",), ("max",), ("avg", "max"), ("avg", "max"))),
                        # On one pixel only one tap counts, and a norm of the batch undoes its scale.
                        spatial=r.choice(("batch", "batch", "running", "plain", "")[2 * (pixels == 1) :]),
                        shortcut=r.random() < 0.7,
                        relu=r.random() < 0.7,
                        gain=r.choice((1.0, 2.0)),
                        side=r.choice((7, 7, 3, 9)),
                        biases=r.random() < 0.8,
                        parameters=r.choice((None, None, torch.float32, torch.bfloat16)),
                        data=r.choice(("normal", "normal", "normal", "ties", "zeros")),
                        # One channel and gamma = 0 make a constant map, whose norm divides by nothing.
                        gammas=r.choice(("mixed", "mixed", "negative", "zero" if shape[1] > 1 else "mixed")),
                        seed=len(found),
                    )  # fmt: skip
                    found.append((case, r.randrange(3)))
    return found


def pytest_generate_tests(metafunc) -> None:
    """A tenth of the cells in every run, the others marked `large`."""
    if "cell" not in metafunc.fixturenames:
        return
    every = cells()
    small = set(random.Random(1).sample(range(len(every)), len(every) // 10))
    metafunc.parametrize(
        "cell",
        [
            pytest.param(cell, id=f"{place}-{cell[0]}", marks=() if place in small else pytest.mark.large)
            for place, cell in enumerate(every)
        ],
    )
