"""Set-up of every test: fixed seeds, one thread per test process, real data if available."""

import functools
import gc
import os
import random
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
# Full collections over the objects of all imported libraries took a seventh of the time.
gc.set_threshold(20_000, 20, 100)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest test, all cells of the interpreter, first; last, it would keep one process busy."""
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed each test, so that its random numbers do not depend on the tests before it."""
    import numpy

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with imagenette96.zip and bccd.zip, next to the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder shared/data with real images is not next to this checkout")
    return folder


EXACT = ("ops", "nn", "surgery", "models", "explain")


@pytest.fixture(autouse=True)
def _by_the_equation(request):
    """Run the lower floors' tests with the plain equation, for exact bits; kernels have their own tests."""
    if request.path.parent.name not in EXACT or "kernels" in request.fixturenames:
        yield
        return
    from cbam import ops

    with ops.using("reference"):
        yield


@pytest.fixture
def kernels(monkeypatch):
    """Fused kernels on the CPU: the native ones, or if those are not built, a stand-in using the equation."""
    from cbam.ops import cpu, switch

    if cpu.missing():
        _stand_in()
        monkeypatch.setitem(switch._known, torch.device("cpu"), "")


@functools.cache
def _stand_in() -> torch.library.Library:
    """Implement `cbam::tail` and its backward for the CPU with `reference.tail` and autograd."""
    from cbam.ops.reference import Channel, Norm, Spatial, normalised, tail

    def parts(args, mean, var, s_mean, s_var):
        (
            gamma,
            beta,
            batch,
            eps,
            w1,
            b1,
            w2,
            b2,
            avg,
            top,
            gain,
            kernel,
            s_gamma,
            s_beta,
            s_batch,
            s_eps,
            s_gain,
        ) = args
        norm = channel = spatial = None
        if gamma is not None:
            norm = Norm(gamma, beta, None if batch else mean, None if batch else var, batch, 0.0, eps)
        if w1 is not None:
            pools = tuple(p for p, taken in (("avg", avg), ("max", top)) if taken)
            channel = Channel(w1, b1, w2, b2, pools, gain)
        if kernel is not None:
            statistics = (None, None) if s_batch else (s_mean, s_var)
            spatial = Spatial(kernel, Norm(s_gamma, s_beta, *statistics, s_batch, 0.0, s_eps), s_gain)
        return {"norm": norm, "channel": channel, "spatial": spatial}

    def to_x(x, values):
        return [v.to(x.dtype) if isinstance(v, torch.Tensor) else v for v in values]

    def forward(x, shortcut, *args):
        from cbam.ops.library import _fake_forward

        gamma, beta, mean, var, *rest = args[:-2]
        statistics = to_x(x, (mean, var, rest[12], rest[13]))
        given = to_x(x, [gamma, beta, *rest[:12], *rest[14:]])
        made = parts(given, *statistics)
        out = tail(x, shortcut, relu=args[-2], **made)
        saved = [torch.zeros_like(o) for o in _fake_forward(x, shortcut, *args)[1:]]
        y = tail(x, norm=made["norm"], channel=made["channel"])
        if gamma is not None and len(saved[3]):
            batch = rest[0]
            saved[3] = x.mean((0, 2, 3)).to(saved[3].dtype) if batch else mean.to(saved[3].dtype)
            saved[4] = x.var((0, 2, 3), correction=0).to(saved[4].dtype) if batch else var.to(saved[4].dtype)
        if made["spatial"] is not None and len(saved[7]):
            s = torch.nn.functional.conv2d(
                torch.stack((y.amax(1), y.mean(1)), 1), given[11], padding=given[11].shape[-1] // 2
            )
            batch = made["spatial"].norm.batch
            saved[7] = (s.mean() if batch else statistics[2]).double().reshape(1)
            saved[8] = (s.var(correction=0) if batch else statistics[3]).double().reshape(1)
        return out, *(s.clone() for s in saved)

    def backward(grad, x, out, *args):
        *given, relu, _m, _e, _k, mu, v, _gate, _s, s_mu, s_v, need_x, need_shortcut = args
        masked = torch.where(out <= 0, torch.zeros_like(grad), grad) if relu else grad
        with torch.enable_grad():
            leaves = [
                a.to(x.dtype).detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in given
            ]
            x_leaf = x.detach().requires_grad_()
            branch = tail(x_leaf, **parts(leaves, *to_x(x, (mu, v, s_mu, s_v))))
            places = [0, 1, 4, 5, 6, 7, 11, 12, 13]
            wanted = [x_leaf, *(leaves[i] for i in places if leaves[i] is not None)]
            found = iter(torch.autograd.grad(branch, wanted, masked))
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = next(found)
        grads = [x.new_zeros(0, dtype=acc) if leaves[i] is None else next(found).to(acc) for i in places]
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return (
            dx.contiguous(memory_format=layout) if need_x else x.new_zeros(0),
            masked.clone(memory_format=torch.preserve_format) if need_shortcut else x.new_zeros(0),
            *grads,
        )

    def inference(x, shortcut, gamma, beta, mean, var, eps, *args):
        if gamma is not None:
            gamma, beta, mean, var = to_x(x, (gamma, beta, mean, var))
            shortcut = normalised(shortcut, Norm(gamma, beta, mean, var, False, 0.0, eps))
        of_tail = (*args[:4], False, *args[4:17], False, *args[17:], False)
        return forward(x, shortcut, *of_tail)[0]

    def in_place(x, *args):
        x.copy_(inference(x, *args))

    def track(running, new, momenta, count):
        for i, momentum in enumerate(momenta):
            running[2 * i].lerp_(new[2 * i].to(running[2 * i]), momentum)
            unbiased = new[2 * i + 1] * (count / (count - 1))
            running[2 * i + 1].lerp_(unbiased.to(running[2 * i + 1]), momentum)

    library = torch.library.Library("cbam", "IMPL")
    library.impl("tail", forward, "CPU")
    library.impl("tail_inference", inference, "CPU")
    library.impl("tail_", in_place, "CPU")
    library.impl("tail_backward", backward, "CPU")
    library.impl("track_", track, "CPU")
    return library
