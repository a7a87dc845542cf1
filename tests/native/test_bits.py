"""What must be bit-equal, and what must not be touched: identity, threads, masks, memory."""

import copy
import ctypes
import mmap
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

LAYOUT_NAMES = ["NCHW", "NHWC"]


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of `t`, as integers."""
    return t.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


# --- identity ---


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize(
    "shape", [(2, 64, 14, 14), (3, 17, 13, 17), (1, 3, 1, 1), (2, 256, 7, 7), (1, 5, 127, 1)]
)
def test_gates_of_one_are_bit_equal_to_torchs_batchnorm(kernels, level, shape, layout):
    """In eval mode, where a gate at its identity start is exactly 1: as torch's BatchNorm, add and ReLU.

    On a machine without fused multiply-add torch and the portable kernels need not round alike.
    """
    if level == 0 and kernels.best > 0:
        pytest.skip("torch uses fused multiply-add here, the portable kernels do not")
    case = kernels.Case(shape, layout=layout, norm="running", spatial="running", gain=2.0, data="normal")
    inputs = kernels.draw(case)
    for name in ("w2", "b2", "s_gamma", "s_beta"):
        inputs.values[name] = torch.zeros_like(inputs.values[name])
    bn, other = nn.BatchNorm2d(shape[1]).eval(), nn.BatchNorm2d(shape[1]).eval()
    with torch.no_grad():
        for parameter, name in ((bn.weight, "gamma"), (bn.bias, "beta"), (bn.running_mean, "mean")):
            parameter.copy_(inputs.values[name])
        bn.running_var.copy_(inputs.values["var"])
        norm = [other.weight, other.bias, other.running_mean, other.running_var]
        for value in norm:
            value.copy_(torch.rand(shape[1], generator=torch.Generator().manual_seed(1)))
        expected = torch.relu(bn(inputs.x) + inputs.shortcut)
        with_norm = torch.relu(bn(inputs.x) + other(inputs.shortcut))
        out = kernels.forward(case, inputs, False)[0]
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(kernels.inference(case, inputs)), bits(expected))
    assert torch.equal(bits(kernels.inference(case, inputs, norm)), bits(with_norm))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_gates_of_one_without_a_norm_return_the_input(kernels, level, layout, dtype):
    case = kernels.Case((2, 24, 9, 11), dtype, layout, norm="", shortcut=False, relu=False, gain=2.0)
    inputs = kernels.draw(case)
    for name in ("w2", "b2", "s_gamma", "s_beta"):
        inputs.values[name] = torch.zeros_like(inputs.values[name])
    assert torch.equal(kernels.forward(case, inputs, True)[0], inputs.x)


# --- reproducibility ---


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize(
    ("shape", "mode"),
    list(product([(1, 40, 33, 37), (5, 24, 9, 7), (8, 64, 17, 16), (2, 600, 7, 7)], ["batch", "running"])),
)
def test_the_number_of_threads_changes_no_bit(kernels, shape, layout, mode):  # T30 T32
    case = kernels.Case(shape, layout=layout, norm=mode, spatial=mode)
    inputs = kernels.draw(case)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(kernels(case, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(bits(other.out), bits(results[0].out))
        for name, value in other.grads.items():
            assert torch.equal(bits(value), bits(results[0].grads[name])), name


def test_a_sample_does_not_depend_on_its_batch(kernels, level):
    """In eval mode: one sample by itself, and in a batch of five."""
    for layout in kernels.layouts:
        case = kernels.Case((5, 24, 15, 13), layout=layout, norm="running", spatial="running")
        inputs = kernels.draw(case)
        whole = kernels.forward(case, inputs, False)[0]
        alone = copy.copy(inputs)
        alone.x, alone.shortcut = inputs.x[2:3], inputs.shortcut[2:3]
        assert torch.equal(kernels.forward(case, alone, False)[0], whole[2:3])


def test_repeated_runs_are_bit_equal(kernels):  # T30
    case = kernels.Case((3, 40, 19, 17))
    inputs = kernels.draw(case)
    first = kernels(case, inputs)
    for _ in range(250):
        again = kernels(case, inputs)
        assert torch.equal(again.out, first.out)
        assert all(torch.equal(again.grads[name], first.grads[name]) for name in first.grads)


# --- NaN and infinities ---

ODD = {
    "nan": lambda x: x[0, 2, 3, 4].fill_(float("nan")),
    "inf": lambda x: x[0, 2, 3, 4].fill_(float("inf")),
    "-inf": lambda x: x[0, 2, 3, 4].fill_(float("-inf")),
    "first": lambda x: x[0, 0, 0, 0].fill_(float("inf")),
    "both": lambda x: x[0, 2, 3, 3:5].copy_(torch.tensor([float("inf"), float("-inf")])),
    "plane": lambda x: x[0, 2].fill_(float("-inf")),
    "all": lambda x: x.fill_(float("-inf")),
    "nan plane": lambda x: x[1, 1].fill_(float("nan")),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("pools", [(), ("avg",), ("max",), ("avg", "max")], ids="-".join)
@pytest.mark.parametrize(
    ("norm", "spatial"), [("", "running"), ("running", "plain"), ("batch", "batch"), ("running", "")]
)
def test_nan_and_infinity_spread_as_in_eager(kernels, odd, layout, pools, norm, spatial):  # T17 T18
    case = kernels.Case((3, 6, 9, 21), layout=layout, norm=norm, spatial=spatial, pools=pools, gain=2.0)
    inputs = kernels.draw(case)
    ODD[odd](inputs.x)
    got, eager = kernels(case, inputs), kernels.formula(case, inputs, torch.float32)
    pairs = {"out": (got.out, eager.out)} | {n: (got.grads[n], eager.grads[n]) for n in eager.grads}
    for name, (ours, theirs) in pairs.items():
        # Gamma's gradient is summed by parts: with an infinity, they may differ in sign, and add up to NaN.
        masks = (torch.isfinite,) if name == "gamma" else (torch.isnan, torch.isposinf, torch.isneginf)
        for mask in masks:
            assert torch.equal(mask(ours), mask(theirs)), f"{mask.__name__} of {name}"


# --- memory ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [(2, 33, 7, 5), (1, 3, 1, 19), (3, 70, 3, 3)])
def test_nothing_outside_the_tensors_is_read_or_written(kernels, level, shape, layout, dtype):  # T13 T16
    """Inputs lie at odd addresses between NaN; they keep their bits, and no NaN comes out."""
    case = kernels.Case(shape, dtype, layout)
    inputs = kernels.draw(case)
    plain = kernels(case, inputs)
    bands = []

    def surrounded(t):
        if t is None:
            return None
        band = torch.full((t.numel() + 67,), float("nan"), dtype=t.dtype)
        inside = band[33 : 33 + t.numel()].as_strided(t.shape, t.stride(), band.storage_offset() + 33)
        inside.copy_(t)
        bands.append((band, bits(band)))
        return inside

    placed = copy.copy(inputs)
    placed.x, placed.grad, placed.shortcut = map(surrounded, (inputs.x, inputs.grad, inputs.shortcut))
    placed.values = {name: surrounded(value) for name, value in inputs.values.items()}
    got = kernels(case, placed)
    assert torch.equal(got.out, plain.out)
    assert all(torch.equal(got.grads[name], plain.grads[name]) for name in plain.grads)
    assert all(torch.equal(bits(band), before) for band, before in bands)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_operands_of_other_layouts_are_accepted(kernels, layout):  # T13 T33
    """Every map but x in the other layout, every matrix column-major; and an x with gaps between its rows."""
    case = kernels.Case((2, 32, 9, 7), layout=layout)
    inputs = kernels.draw(case)
    plain = kernels(case, inputs)
    other = kernels.layouts[LAYOUT_NAMES[layout == "NCHW"]]
    turned = copy.copy(inputs)
    turned.grad, turned.shortcut = (t.contiguous(memory_format=other) for t in (inputs.grad, inputs.shortcut))
    turned.values = dict(inputs.values)
    for name in ("w1", "w2"):
        turned.values[name] = inputs.values[name].T.contiguous().T
    turned.values["kernel"] = inputs.values["kernel"].contiguous(memory_format=torch.channels_last)
    gaps = torch.full((2, 32, 9, 16), float("nan"))
    gaps[..., :7] = inputs.x
    for x in (inputs.x, gaps[..., :7]):
        turned.x = x
        with torch.no_grad():
            saved = kernels.forward(case, turned, True)
            torch.testing.assert_close(saved[0], plain.out)
            saved = (saved[0].contiguous(memory_format=other), *saved[1:])
            dx, g, *_, dkernel, _, _ = kernels.backward(case, turned, saved)
        if x is inputs.x:
            assert saved[0].equal(plain.out)
            assert dx.equal(plain.grads["x"])
            assert g.equal(plain.grads["shortcut"])
            assert dkernel.equal(plain.grads["kernel"])
        torch.testing.assert_close(dx, plain.grads["x"])
        torch.testing.assert_close(dkernel, plain.grads["kernel"])


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_maps_of_any_layout_are_overwritten(kernels, layout):  # T13 T33
    case = kernels.Case((2, 32, 9, 7), layout=layout, norm="running", spatial="running")
    inputs = kernels.draw(case)
    expected = kernels.forward(case, inputs, False)[0]
    gaps = torch.full((2, 32, 9, 16), float("nan"))
    gaps[..., :7] = inputs.x
    turned = inputs.x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    for x in (gaps[..., :7], turned):
        given = kernels.inference(case, replace(inputs, x=x))
        assert given.is_contiguous() or given.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(given, expected)
        kernels.in_place(case, inputs, x)
        torch.testing.assert_close(x, expected)
    assert gaps[..., 7:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [(1, 33, 7, 5), (1, 3, 1, 19), (2, 70, 3, 3)])
def test_a_map_at_the_end_of_readable_memory_is_read_safely(kernels, level, shape, layout, dtype):  # T16
    """The last element of x lies before a page that must not be touched."""
    case = kernels.Case(shape, dtype, layout)
    inputs = kernels.draw(case)
    size, page = inputs.x.numel() * inputs.x.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    area = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
    try:
        raw = (ctypes.c_char * size).from_address(address + room - size)
        x = torch.frombuffer(raw, dtype=dtype).as_strided(inputs.x.shape, inputs.x.stride())
        plain = kernels(case, inputs)
        x.copy_(inputs.x)
        inputs.x = x
        got = kernels(case, inputs)
        assert torch.equal(got.out, plain.out)
        assert torch.equal(got.grads["x"], plain.grads["x"])
    finally:
        libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 3)


BEYOND = """
    import ctypes, mmap, os, sys
    import torch, cbam_native
    from cbam.ops import library

    torch.ops.load_library(cbam_native.library())
    C, H, W = 64, 256, 256
    N, size = 2**31 // (C * H * W) + 2, C * H * W * 2
    # Every sample is the same memory, so that 4 GiB of map take 8 MiB.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file = os.memfd_create("sample")
    os.ftruncate(file, size)
    area = libc.mmap(None, N * size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for n in range(N):
        assert libc.mmap(area + n * size, size, 3, mmap.MAP_SHARED | 0x10, file, 0) == area + n * size
    x = torch.frombuffer((ctypes.c_char * (N * size)).from_address(area), dtype=torch.bfloat16)
    x = x.view(N, C, H, W) if sys.argv[1] == "NCHW" else x.view(N, H, W, C).permute(0, 3, 1, 2)
    torch.manual_seed(0)
    x[0] = torch.randn(C, H, W)
    w1, w2, kernel = torch.randn(4, C) / 8, torch.randn(C, 4) / 2, torch.randn(1, 2, 7, 7) / 5
    norm, mlp = (None, None), (w1, None, w2, None, True, True, 1.0)
    where = (kernel, torch.ones(1), torch.ones(1)), (torch.zeros(1), torch.ones(1)), (False, 1e-5, 1.0)

    def run(x, save):
        return torch.ops.cbam.tail(
            x, None, *norm, *norm, False, 0.0, *mlp, *where[0], *where[1], *where[2], True, save
        )

    alone = run(x[:1], True)
    out = run(x, False)[0]
    assert all(torch.equal(out[n], alone[0][0]) for n in (0, 1, N // 2, N - 1))
    del out
    saved = [t.expand(N, *t.shape[1:]).contiguous() if t.dim() > 1 else t for t in alone]
    def back(x, saved):
        return torch.ops.cbam.tail_backward(
            x, x, None, *norm, False, 0.0, *mlp, *where[0], *where[2], False, *saved[1:], False, False
        )

    whole, one = back(x, saved), back(x[:1], alone)
    for ours, theirs in zip(whole[4:], one[4:]):
        if theirs.numel() == 0:
            continue  # of an absent bias
        torch.testing.assert_close(ours, theirs * N, rtol=1e-4, atol=1e-4 * float(theirs.abs().max() * N))
"""


@pytest.mark.large
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_offsets_beyond_31_bits_are_right(kernels, layout):  # T22
    free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20
    if free < 8:
        pytest.skip(f"needs 8 GiB of free memory, {free:.0f} are there")
    command = [sys.executable, "-c", textwrap.dedent(BEYOND), layout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
