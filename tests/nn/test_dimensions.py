"""Attention on signals and volumes, against loops over channels and positions, and that on images."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import cbam
from cbam.errors import ConfigError, InputError
from cbam.nn import squeeze_excitation
from cbam.ops import reference, using

SHAPES = {1: (2, 5, 9), 2: (2, 5, 4, 3), 3: (2, 5, 3, 2, 4)}
SMALL = {1: (3, 4, 2), 2: (3, 4, 1, 2), 3: (3, 4, 2, 1, 1)}  # T8: smaller than the kernel
WITHOUT_DIM_2 = [1, 3]


def drawn(module):
    """`module` in float64 with every weight drawn at random, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    return module


def batch(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(module, x):
    """CBAM on single Python numbers, without a convolution, pooling or norm of torch."""
    what, where = module.channel, module.spatial
    (N, C), size = x.shape[:2], x.shape[2:]
    places = list(itertools.product(*map(range, size)))
    z = torch.empty_like(x)
    for n, c in itertools.product(range(N), range(C)):
        logit = 0.0
        for pool in (lambda v: sum(v) / len(v), max):
            described = [pool([x[(n, k, *p)].item() for p in places]) for k in range(C)]
            for h in range(what.fc1.out_features):
                unit = what.fc1.bias[h].item() + sum(
                    what.fc1.weight[h, k].item() * described[k] for k in range(C)
                )
                logit += what.fc2.weight[c, h].item() * max(unit, 0.0)
            logit += what.fc2.bias[c].item()
        for p in places:
            z[(n, c, *p)] = what.gain_value() * x[(n, c, *p)] / (1 + math.exp(-logit))
    logits = torch.zeros(N, *size, dtype=x.dtype)
    k = where.kernel_size
    for n, p in itertools.product(range(N), places):
        for offset in itertools.product(range(k), repeat=len(size)):
            q = tuple(a + o - k // 2 for a, o in zip(p, offset, strict=True))
            if all(0 <= a < s for a, s in zip(q, size, strict=True)):
                pixel = [z[(n, c, *q)].item() for c in range(C)]
                kernel = where.conv.weight[0]
                logits[(n, *p)] += kernel[(0, *offset)] * max(pixel) + kernel[(1, *offset)] * sum(pixel) / C
    if where.bn.training:
        mean, var = logits.mean(), ((logits - logits.mean()) ** 2).mean()
    else:
        mean, var = where.bn.running_mean[0], where.bn.running_var[0]
    normed = (logits - mean) / (var + where.bn.eps).sqrt() * where.bn.weight[0] + where.bn.bias[0]
    return (z * where.gain_value() / (1 + (-normed).exp())[:, None]).detach()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *SMALL.values()], ids=str)
def test_cbam_of_every_dimension_equals_a_scalar_loop(shape, training):  # T8
    module = drawn(cbam.CBAM(shape[1], reduction=2, kernel_size=3, dim=len(shape) - 2)).train(training)
    module.spatial.bn.running_var.fill_(0.3)
    x = batch(shape)
    expected = looped(module, x)
    with using("reference"):
        torch.testing.assert_close(module(x).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
@pytest.mark.parametrize("make", [cbam.CBAM, squeeze_excitation], ids=["cbam", "se"])
def test_the_derivatives_of_signals_and_volumes_are_right(make, dim):  # T26
    module = drawn(make(4, reduction=2, dim=dim)).eval()
    x = batch((2, 4, *(3, 2, 2)[:dim])).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(module, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *p: functional(module, x.detach(), p), tuple(module.parameters()))


def functional(module, x, parameters):
    names = [name for name, _ in module.named_parameters()]
    return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_module_equals_the_equation(dim):
    module = drawn(cbam.CBAM(5, reduction=2, dim=dim)).eval()
    x = batch(SHAPES[dim])
    channel, spatial = module.operands(x)
    expected = reference.tail(x, channel=channel, spatial=spatial)
    with using("reference"):
        torch.testing.assert_close(module(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layer", ["signal", "volume"])
def test_a_signal_equals_an_image_of_width_one_and_an_image_a_volume_of_depth_one(layer):
    low, high = (1, 2) if layer == "signal" else (2, 3)
    small, large = drawn(cbam.CBAM(5, reduction=2, dim=low)), cbam.CBAM(5, reduction=2, dim=high).double()
    state = small.state_dict()
    kernel = torch.zeros_like(large.spatial.conv.weight)
    if layer == "signal":
        kernel[..., 3] = state["spatial.conv.weight"]
    else:
        kernel[:, :, 3] = state["spatial.conv.weight"]
    large.load_state_dict(state | {"spatial.conv.weight": kernel})
    x = batch(SHAPES[low])
    axis = -1 if layer == "signal" else 2
    with using("reference"):
        torch.testing.assert_close(large(x.unsqueeze(axis)).squeeze(axis), small(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_weights_have_the_same_names_in_every_dimension(dim):
    module = cbam.CBAM(32, dim=dim)
    assert list(module.state_dict()) == [
        "channel.fc1.weight",
        "channel.fc1.bias",
        "channel.fc2.weight",
        "channel.fc2.bias",
        "spatial.conv.weight",
        "spatial.bn.weight",
        "spatial.bn.bias",
        "spatial.bn.running_mean",
        "spatial.bn.running_var",
        "spatial.bn.num_batches_tracked",
    ]
    assert module.spatial.conv.weight.shape == (1, 2, *(7,) * dim)
    assert ("dim=" in repr(module)) == (dim != 2)


@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
def test_the_identity_start_returns_exactly_its_input(dim):
    x = torch.randn(SHAPES[dim])
    for module in (cbam.CBAM(5, dim=dim), squeeze_excitation(5, dim=dim)):
        assert torch.equal(module.identity_()(x), x)


@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
def test_an_unbatched_map_equals_a_batch_of_one(dim):  # T4
    module = drawn(cbam.CBAM(5, dim=dim)).eval()
    x = batch(SHAPES[dim])[:1]
    assert torch.equal(module(x[0]), module(x)[0])


@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
def test_the_gradient_of_tied_maxima_goes_to_the_first(dim):  # T21
    x = torch.ones(1, 3, *(2, 2, 2)[:dim], requires_grad=True)
    reference.channel_descriptor(x, ("max",), dim=dim).sum().backward()
    assert x.grad.flatten(2).tolist() == [[[1, *[0] * (2**dim - 1)]] * 3]
    x.grad = None
    reference.spatial_descriptor(x, dim=dim)[:, 0].sum().backward()
    assert x.grad.flatten(2).tolist() == [[[1] * 2**dim, [0] * 2**dim, [0] * 2**dim]]


@pytest.mark.parametrize("pool", ["lp", "lse"])
@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
def test_the_pools_lp_and_lse_cover_all_positions(dim, pool):
    x = batch(SHAPES[dim])
    expected = x.flatten(2).norm(dim=2) if pool == "lp" else x.flatten(2).logsumexp(2)
    torch.testing.assert_close(reference.channel_descriptor(x, (pool,), dim=dim)[:, 0], expected)


def test_a_volume_in_channels_last_keeps_its_layout():  # T14
    module = drawn(cbam.CBAM(5, reduction=2, dim=3)).eval()
    x = batch(SHAPES[3])
    last = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    out = module(last)
    out.sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert last.grad.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(out, module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
def test_can_be_traced_compiled_and_exported(dim):  # T33
    module = drawn(cbam.CBAM(5, reduction=2, dim=dim)).eval()
    x = batch(SHAPES[dim])
    expected = module(x)
    compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x), expected, rtol=1e-12, atol=1e-12)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 4, -1, True, 1.5, 2.0, "2", None])
def test_an_invalid_dim_is_refused(dim):
    for make in (cbam.CBAM, cbam.ChannelAttention, squeeze_excitation):
        with pytest.raises(InputError, match="dim, the number of spatial dimensions, must be 1, 2 or 3"):
            make(8, dim=dim)
    with pytest.raises(InputError, match="must be 1, 2 or 3"):
        cbam.SpatialAttention(dim=dim)


@pytest.mark.parametrize(("built", "given"), [*itertools.permutations((1, 2, 3), 2)])
def test_a_batch_of_another_dim_is_refused_with_the_call_for_it(built, given):  # T5
    x = torch.randn(2, 8, *(6, 5, 4)[:given])
    with pytest.raises(InputError, match=rf"got .*cbam\.CBAM\(channels, dim={given}\) takes \(N, C, "):
        cbam.CBAM(8, dim=built)(x)
    if given not in (built, built - 1):  # to SpatialAttention a map of one dimension less is unbatched
        with pytest.raises(InputError, match=f"dim={given}"):
            cbam.SpatialAttention(dim=built)(x)


@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
def test_using_fused_refuses_signals_and_volumes(dim):
    x = torch.randn(SHAPES[dim])
    with (
        using("fused"),
        pytest.raises(ConfigError, match=f"kernels support only dim=2, and it has dim={dim}"),
    ):
        cbam.CBAM(5, dim=dim)(x)


@pytest.mark.parametrize("dim", WITHOUT_DIM_2)
def test_training_counts_batches_and_refuses_one_value(dim):
    module = cbam.CBAM(5, dim=dim)
    nn.init.ones_(module.spatial.bn.weight)
    module(torch.randn(SHAPES[dim]))
    assert int(module.spatial.bn.num_batches_tracked) == 1
    with pytest.raises(InputError, match="more than 1 value per channel"):  # T7
        module(torch.randn(1, 5, *(1,) * dim))
