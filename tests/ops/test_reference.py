"""The equations, each against a library call or a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cbam.errors import DtypeError, InputError
from cbam.ops import channel_descriptor, rescale, spatial_descriptor

LITERAL = {
    "avg": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "max": lambda x: F.max_pool2d(x, x.shape[2:]).flatten(1),
    "lp": lambda x: F.lp_pool2d(x, 2, x.shape[2:]).flatten(1),
    "lse": lambda x: torch.log(torch.exp(x).sum((2, 3))),
}
SHAPES = [(2, 5, 7, 9), (3, 4, 1, 1), (1, 2, 1, 97), (2, 3, 13, 1)]  # T8


def derivative(function, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(x)
    weights = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pools", [("avg",), ("max",), ("lp",), ("lse",), ("lse", "max", "lp", "avg")])
def test_every_pool_and_its_gradient_equal_the_library_call(shape, layout, pools):  # T14
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    ours = derivative(lambda x: channel_descriptor(x, pools), x)
    literal = derivative(lambda x: torch.stack([LITERAL[p](x) for p in pools], 1), x.contiguous())
    for a, b in zip(ours, literal, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours[0].shape == (shape[0], len(pools), shape[1])


@pytest.mark.parametrize("pool", ["lp", "lse"])
def test_second_derivatives_of_the_pools_are_right(pool):  # T26
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: channel_descriptor(x, (pool,)), (x,))
    assert torch.autograd.gradgradcheck(lambda x: channel_descriptor(x, (pool,)), (x,))


def test_the_lp_pool_of_zeros_has_a_zero_gradient():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    channel_descriptor(x, ("lp",)).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("value", [800.0, -800.0, 6e4])
def test_the_lse_pool_does_not_overflow(value):
    x = torch.full((1, 1, 4, 4), value)
    expected = value + torch.tensor(16.0).log()
    torch.testing.assert_close(channel_descriptor(x, ("lse",)).squeeze(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", ["lp", "lse"])
def test_half_precision_is_accumulated_in_float32(pool, dtype):  # T20
    x = torch.full((1, 2, 300, 300), 3.0).to(dtype)
    exact = channel_descriptor(x.double(), (pool,))
    out = channel_descriptor(x, (pool,))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=4e-3, atol=0)


def test_the_gradient_of_tied_maxima_goes_to_the_first():  # T21
    x = torch.ones(1, 3, 2, 2, requires_grad=True)
    channel_descriptor(x, ("max",)).sum().backward()
    assert x.grad.flatten(2).tolist() == [[[1, 0, 0, 0]] * 3]
    x.grad = None
    spatial_descriptor(x)[:, 0].sum().backward()
    assert x.grad.flatten(2).tolist() == [[[1] * 4, [0] * 4, [0] * 4]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("descriptor", [channel_descriptor, spatial_descriptor])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 17, 1, 1), (3, 1, 9, 2), (2, 40, 7, 7)], ids=str)
def test_descriptor_gradients_go_to_the_first_maximum_and_the_mean(shape, layout, descriptor, dtype):  # T21
    values = torch.randint(-2, 3, shape)  # with many ties
    x = values.to(dtype).contiguous(memory_format=layout).requires_grad_()
    out = descriptor(x)
    weights = torch.randint(-4, 5, out.shape).to(dtype)
    out.backward(weights)
    dims = (2, 3) if descriptor is channel_descriptor else (1,)
    on_max = weights[:, 1 if descriptor is channel_descriptor else 0].double()
    on_mean = weights[:, 0 if descriptor is channel_descriptor else 1].double()
    flat = values.flatten(2)
    dim = 2 if descriptor is channel_descriptor else 1
    first = torch.zeros(flat.shape, dtype=torch.float64)
    first.scatter_(dim, flat.argmax(dim, keepdim=True), on_max.reshape(flat.shape[0], -1).unsqueeze(dim))
    count = math.prod(shape[d] for d in dims)
    spread = (on_mean / count).reshape(flat.shape[0], -1).unsqueeze(dim).expand_as(flat)
    expected = (first + spread).reshape(shape)
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(x.grad.double(), expected, rtol=rtol, atol=rtol)
    assert x.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_first_of_several_nan_is_the_maximum(layout):  # T21
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1, 0, 1] = x[0, 1, 1, 1] = x[0, 2, 0, 1] = math.nan
    x = x.contiguous(memory_format=layout).requires_grad_()
    channel_descriptor(x, ("max",)).sum().backward()
    assert x.grad.flatten(2).tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]]
    x.grad = None
    spatial_descriptor(x)[:, 0].sum().backward()
    assert x.grad.flatten(2).tolist() == [[[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]]


def test_the_gradient_can_be_traced_without_values():
    def gradient(x):
        return torch.autograd.grad(spatial_descriptor(x).square().sum(), x)[0]

    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.testing.assert_close(make_fx(gradient)(x)(x), gradient(x))
    with FakeTensorMode():
        assert gradient(torch.randn(2, 3, 4, 5, requires_grad=True)).shape == x.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_spatial_descriptor_is_the_maximum_then_the_mean(shape):
    x = torch.randn(shape, dtype=torch.float64)
    literal = torch.stack([torch.stack((max_of(s), sum(s) / len(s))) for s in x])
    torch.testing.assert_close(spatial_descriptor(x), literal, rtol=1e-12, atol=1e-12)


def max_of(planes):
    top = planes[0]
    for plane in planes[1:]:
        top = torch.maximum(top, plane)
    return top


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 1, 4, 5), (2, 3, 4, 5)])
def test_rescale_multiplies_and_keeps_the_dimensions_of_its_input(shape):
    x, gate = torch.randn(2, 3, 4, 5), torch.randn(shape)
    assert torch.equal(rescale(x, gate), x * gate.expand_as(x))
    assert torch.equal(rescale(x[0], gate[:1]), (x[:1] * gate[:1])[0])


@pytest.mark.parametrize("function", [channel_descriptor, spatial_descriptor])
def test_a_non_feature_map_is_refused(function):  # T2, T3, T5, T12
    with pytest.raises(DtypeError, match="int64"):
        function(torch.zeros(1, 2, 3, 3, dtype=torch.int64))
    with pytest.raises(DtypeError, match="float8"):
        function(torch.zeros(1, 2, 3, 3).to(torch.float8_e5m2))
    with pytest.raises(InputError, match=r"got shape \(2, 3\)"):
        function(torch.zeros(2, 3))
    with pytest.raises(InputError, match="at least 1"):
        function(torch.zeros(1, 0, 3, 3))
