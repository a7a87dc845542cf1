"""The arrangements of tables 1 to 3, against their formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbam.errors import CheckpointError, DtypeError, InputError
from cbam.models import ConvSpatialAttention, Parallel, build
from cbam.models.variants import VARIANTS
from cbam.nn import CBAM, ChannelAttention, SpatialAttention
from cbam.surgery import attached, load_weights

C = 32


def varied(name, channels=C):
    """The arrangement with every parameter and statistic away from its start, in eval mode."""
    torch.manual_seed(5)
    module = VARIANTS[name](channels)
    for tensor in module.state_dict().values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.rand_like(tensor) + 0.1 if tensor.dim() == 1 else torch.randn_like(tensor) / 4)
    return module.eval()


def only(module, kind):
    (found,) = [m for m in module.modules() if isinstance(m, kind)]
    return found


def mlp(attention, v):
    return (
        attention.fc2.weight @ F.relu(attention.fc1.weight @ v + attention.fc1.bias[:, None])
        + attention.fc2.bias[:, None]
    )


def what(attention, x, *pools):
    """Mc, one sample at a time: sigmoid(sum of MLP(pool))."""
    return torch.stack(
        [
            torch.sigmoid(sum(mlp(attention, pool(sample.flatten(1), 1)[:, None]) for pool in pools))
            for sample in x
        ]
    ).unsqueeze(3)


def where(attention, descriptor):
    """Ms: sigmoid(BN(conv(descriptor)))."""
    k = attention.conv.kernel_size[0]
    logits = F.conv2d(descriptor, attention.conv.weight, padding=k // 2)
    bn = attention.bn
    normed = (logits - bn.running_mean) / (bn.running_var + 1e-5).sqrt()
    return torch.sigmoid(normed * bn.weight + bn.bias)


def max_mean(x):
    return torch.stack((x.amax(1), x.mean(1)), 1)


def formula(name, module, x):
    channel = only(module, ChannelAttention)
    if name in ("cbam-avg", "cbam-max", "cbam-channel"):
        pools = {"cbam-avg": (torch.mean,), "cbam-max": (torch.amax,)}.get(name, (torch.mean, torch.amax))
        return x * what(channel, x, *pools)
    spatial = only(module, SpatialAttention)
    both = torch.mean, torch.amax
    if name == "cbam-reversed":
        x = x * where(spatial, max_mean(x))
        return x * what(channel, x, *both)
    if name == "cbam-parallel":
        return x * (what(channel, x, *both) * where(spatial, max_mean(x)))
    x = x * what(channel, x, *both)
    if name == "cbam-k3":
        return x * where(spatial, max_mean(x))
    weights = spatial.descriptor.weight[0, :, 0, 0]
    return x * where(spatial, torch.einsum("nchw,c->nhw", x, weights)[:, None])


def test_there_are_eight_arrangements():
    assert list(VARIANTS) == [
        f"cbam-{name}" for name in ("avg", "max", "channel", "conv3", "conv7", "k3", "reversed", "parallel")
    ]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(7, 9), (1, 13), (2, 2)])
def test_an_arrangement_computes_its_formula(name, size):
    """T8"""
    module = varied(name).double()
    x = torch.randn(3, C, *size, dtype=torch.float64)
    torch.testing.assert_close(module(x), formula(name, module, x))


@pytest.mark.parametrize("name", ["cbam-conv3", "cbam-conv7", "cbam-k3"])
def test_the_kernel_is_the_one_of_the_name(name):
    assert only(varied(name), SpatialAttention).conv.kernel_size == (int(name[-1]),) * 2


@pytest.mark.parametrize("name", VARIANTS)
def test_the_identity_start_is_exact_and_optional(name):
    module = varied(name)
    x = torch.randn(2, C, 6, 5, requires_grad=True)
    assert not torch.equal(module(x), x)
    parts = module if isinstance(module, nn.Sequential) else [module]
    for part in parts:
        part.identity_()
    for mode in (True, False):
        assert torch.equal(module.train(mode)(x), x)
    module.train()(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    for part in parts:
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert not torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_unbatched_map_is_that_of_a_batch_of_one(name):
    """T4"""
    module = varied(name)
    x = torch.randn(C, 6, 5)
    torch.testing.assert_close(module(x), module(x[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_the_formula(name):
    module = varied(name, 4).double()
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    wanted = [x, *module.parameters()]
    ours = torch.autograd.grad(module(x), wanted, grad)
    theirs = torch.autograd.grad(formula(name, module, x), wanted, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_empty_batch_passes(name):
    """T11"""
    assert varied(name)(torch.empty(0, C, 4, 5)).shape == (0, C, 4, 5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_network_starts_at_identity_bit_for_bit(name):
    torch.manual_seed(3)
    plain = build("resnet_tiny").eval()
    torch.manual_seed(3)
    model = build(f"resnet_tiny+{name}", start="identity").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))
    assert len(attached(model)) == 3


def test_weights_of_one_arrangement_are_not_taken_for_those_of_another():
    signatures = {
        name: frozenset((key, tuple(v.shape)) for key, v in module(C).state_dict().items())
        for name, module in {"cbam": CBAM, **VARIANTS}.items()
        if name not in ("cbam-avg", "cbam-max")  # which pools run is not in the weights
    }
    assert len(set(signatures.values())) == len(signatures)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"cbam-avg", "cbam-max"}))
def test_loading_the_weights_of_cbam_into_another_arrangement_is_refused(name):
    """K-rows: nothing silent."""
    model = build(f"resnet_tiny+{name}", num_classes=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="The model is unchanged"):
        load_weights(model, build("resnet_tiny+cbam", num_classes=4).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("start", ["paper", "identity"])
def test_a_saved_network_loads_with_its_gains(name, start):
    a = build(f"resnet_tiny+{name}", num_classes=4, start=start).eval()
    b = build(f"resnet_tiny+{name}", num_classes=4, start="identity").eval()
    load_weights(b, a.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(a(x), b(x))


def test_a_learned_descriptor_starts_open_by_half_and_at_fan_out():
    torch.manual_seed(0)
    module = ConvSpatialAttention(512, kernel_size=7)
    x = torch.randn(2, 512, 5, 5)
    assert torch.equal(module.gate(x), torch.full((2, 1, 5, 5), 0.5))
    assert module.descriptor.weight.std().item() == pytest.approx(2**0.5, rel=0.1)
    assert module.bn.momentum == 0.01
    assert sum(p.numel() for p in module.parameters()) == 512 + 49 + 2


@pytest.mark.parametrize("options", [{"channels": 0}, {"channels": 8, "kernel_size": 4}, {"channels": True}])
def test_invalid_sizes_are_refused(options):
    """T10 T36"""
    with pytest.raises(InputError):
        ConvSpatialAttention(**options)


def test_wrong_maps_are_refused_before_any_work():
    """T2 T5 T6 T7"""
    module = ConvSpatialAttention(8, kernel_size=3)
    with pytest.raises(InputError, match="built for 8 channels, got 4"):
        module(torch.rand(1, 4, 5, 5))
    with pytest.raises(InputError, match="expected a feature map"):
        module.eval()(torch.rand(8, 5))
    with pytest.raises(DtypeError):
        module(torch.ones(1, 8, 5, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="more than 1 value per channel"):
        module.train()(torch.rand(1, 8, 1, 1))
    assert module.eval()(torch.rand(1, 8, 1, 1)).shape == (1, 8, 1, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_arrangement_can_be_traced_and_run_in_bfloat16(name):
    """T33"""
    module = varied(name)
    x = torch.randn(2, C, 6, 5)
    traced = torch.fx.symbolic_trace(module)
    assert torch.equal(traced(x), module(x))
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_product_takes_any_gates():
    torch.manual_seed(0)
    a, b = ChannelAttention(8), ChannelAttention(8)
    x = torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(Parallel(a, b)(x), x * a.gate(x) * b.gate(x))
