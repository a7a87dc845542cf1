"""Every other attention module against its formula, restated here independently."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbam
from cbam.nn import (
    ATTENTION,
    BAM,
    ECA,
    EMA,
    GAM,
    GCT,
    SCSE,
    CoordAttention,
    GlobalContext,
    SelectiveKernel,
    SimAM,
    TripletAttention,
    squeeze_excitation,
)

SHAPES = [(2, 32, 7, 9), (3, 17, 13, 5), (2, 3, 1, 7), (4, 64, 1, 1), (2, 1, 5, 5)]  # T8, T10


def normalised(x, bn):
    """BatchNorm written out: by the statistics of the batch in training, by the running ones otherwise."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    variance, mean = bn.running_var.view(shape), bn.running_mean.view(shape)
    if bn.training:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + bn.eps) * bn.weight.view(shape) + bn.bias.view(shape)


def affine(x, layer):
    """A linear layer, or a 1x1 convolution, on the channels of (N, C, ...)."""
    out = torch.einsum("nc...,dc->nd...", x, layer.weight.flatten(1))
    return out if layer.bias is None else out + layer.bias.view([1, -1] + [1] * (x.dim() - 2))


def eca(x, m):
    means = F.adaptive_avg_pool2d(x, 1).flatten(1)
    neighbours = F.pad(means, (m.kernel_size // 2,) * 2).unfold(1, m.kernel_size, 1)
    return x * torch.sigmoid(neighbours @ m.conv.weight.flatten())[:, :, None, None]


def scse(x, m):
    hidden = affine(F.adaptive_avg_pool2d(x, 1).flatten(1), m.fc1).clamp(min=0)
    what = x * torch.sigmoid(affine(hidden, m.fc2))[:, :, None, None].expand_as(x)
    where = x * torch.sigmoid(affine(x, m.conv)).expand_as(x)
    return what + where if m.combine == "sum" else torch.stack((what, where)).amax(0)


def bam(x, m):
    first, norm, _, last = m.channel
    what = affine(F.relu(normalised(affine(x.mean((2, 3)), first), norm)), last)
    reduce, norm0, _, conv1, norm1, _, conv2, norm2, _, final = m.spatial
    where = F.relu(normalised(affine(x, reduce), norm0))
    for conv, norm in ((conv1, norm1), (conv2, norm2)):
        spread = F.conv2d(F.pad(where, (m.dilation,) * 4), conv.weight, conv.bias, dilation=m.dilation)
        where = F.relu(normalised(spread, norm))
    where = affine(where, final).expand_as(x)
    what = what[:, :, None, None].expand_as(x)
    return x + x * torch.sigmoid(what + where if m.combine == "sum" else what * where)


def global_context(x, m):
    out = []
    for sample in x:
        pixels = sample.flatten(1)  # (C, HW)
        scores = torch.exp(m.conv.weight.flatten() @ pixels + m.conv.bias)
        context = (pixels * (scores / scores.sum())).sum(1)
        hidden = F.linear(context, m.fc1.weight, m.fc1.bias)
        hidden = (hidden - hidden.mean()) / torch.sqrt(hidden.var(correction=0) + 1e-5)
        hidden = F.relu(hidden * m.norm.weight + m.norm.bias)
        out.append(sample + F.linear(hidden, m.fc2.weight, m.fc2.bias)[:, None, None])
    return torch.stack(out)


def coordinate(x, m):
    H, W = x.shape[2:]
    rows, columns = F.adaptive_avg_pool2d(x, (H, 1))[..., 0], F.adaptive_avg_pool2d(x, (1, W))[:, :, 0]
    hidden = normalised(affine(torch.cat((rows, columns), 2), m.conv), m.bn)
    hidden = hidden * F.relu6(hidden + 3) / 6
    high, wide = hidden.split((H, W), 2)
    gates = [torch.sigmoid(affine(part, conv)) for part, conv in ((high, m.conv_h), (wide, m.conv_w))]
    return torch.einsum("nchw,nch,ncw->nchw", x, *gates)


def simam(x, m):
    squares = (x - x.mean((2, 3), keepdim=True)).pow(2)
    n = max(1, x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(squares / (4 * (squares.sum((2, 3), keepdim=True) / n + 1e-4)) + 0.5)


def triplet(x, m):
    def refined(x, plane):
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), 1)
        logits = F.conv2d(pooled, plane.conv.weight, padding=plane.conv.kernel_size[0] // 2)
        return x * torch.sigmoid(normalised(logits, plane.bn))

    high = refined(x.permute(0, 2, 1, 3).contiguous(), m.cw).permute(0, 2, 1, 3)
    wide = refined(x.permute(0, 3, 2, 1).contiguous(), m.hc).permute(0, 3, 2, 1)
    return 1 / 3 * (refined(x, m.hw) + high + wide)


def gct(x, m):
    s = m.alpha * (x.pow(2).sum((2, 3)) + 1e-5).pow(0.5)
    hat = s * math.sqrt(x.shape[1]) / torch.sqrt(s.pow(2).sum(1, keepdim=True) + 1e-5 * x.shape[1])
    return torch.einsum("nchw,nc->nchw", x, 1 + torch.tanh(m.gamma * hat + m.beta))


def selective_kernel(x, m):
    features = []
    for (conv, norm, _), dilation in ((m.near, 1), (m.far, 2)):
        parts = zip(x.chunk(m.groups, 1), conv.weight.chunk(m.groups), strict=True)
        out = torch.cat([F.conv2d(p, w, padding=dilation, dilation=dilation) for p, w in parts], 1)
        features.append(F.relu(normalised(out, norm)))
    z = F.relu(normalised(affine(sum(features).mean((2, 3)), m.fc1), m.bn))
    a, b = affine(z, m.fc2).chunk(2, 1)
    share = (1 / (1 + torch.exp(b - a)))[:, :, None, None]
    return share * features[0] + (1 - share) * features[1]


def gam(x, m):
    first, second = m.channel.fc1, m.channel.fc2
    pixels = x.permute(0, 2, 3, 1)  # a linear layer at every pixel
    hidden = F.relu(F.linear(pixels, first.weight.flatten(1), first.bias))
    x = x * torch.sigmoid(F.linear(hidden, second.weight.flatten(1), second.bias)).permute(0, 3, 1, 2)
    p, s = m.kernel_size // 2, m.spatial
    hidden = F.relu(normalised(F.conv2d(x, s.conv1.weight, s.conv1.bias, padding=p), s.bn1))
    return x * torch.sigmoid(normalised(F.conv2d(hidden, s.conv2.weight, s.conv2.bias, padding=p), s.bn2))


def ema(x, m):
    out = []
    for part in x.chunk(m.groups, 1):
        high = torch.sigmoid(affine(part.mean(3), m.conv1))
        wide = torch.sigmoid(affine(part.mean(2), m.conv1))
        gated = torch.einsum("nchw,nch,ncw->nchw", part, high, wide)
        spread, mean = torch.var_mean(gated, (2, 3), correction=0, keepdim=True)
        one = (gated - mean) / torch.sqrt(spread + 1e-5)
        one = one * m.norm.weight.view(-1, 1, 1) + m.norm.bias.view(-1, 1, 1)
        three = F.conv2d(part, m.conv3.weight, m.conv3.bias, padding=1)
        weights = [F.softmax(F.adaptive_avg_pool2d(t, 1).flatten(1), 1) for t in (one, three)]
        logits = torch.einsum("nc,nchw->nhw", weights[0], three) + torch.einsum(
            "nc,nchw->nhw", weights[1], one
        )
        out.append(part * torch.sigmoid(logits)[:, None])
    return torch.cat(out, 1)


PEERS = {
    "eca": (ECA, eca),
    "eca-9": (lambda c: ECA(c, kernel_size=9), eca),
    "scse": (SCSE, scse),
    "scse-max": (lambda c: SCSE(c, combine="max"), scse),
    "bam": (lambda c: BAM(c, reduction=4), bam),
    "bam-product": (lambda c: BAM(c, reduction=8, dilation=2, combine="product"), bam),
    "gc": (lambda c: GlobalContext(c, reduction=4), global_context),
    "coordatt": (CoordAttention, coordinate),
    "simam": (SimAM, simam),
    "triplet": (TripletAttention, triplet),
    "triplet-3": (lambda c: TripletAttention(c, kernel_size=3), triplet),
    "gct": (GCT, gct),
    "sk": (SelectiveKernel, selective_kernel),
    "gam": (GAM, gam),
    "gam-3": (lambda c: GAM(c, kernel_size=3), gam),
    "ema": (EMA, ema),
    "ema-4": (lambda c: EMA(c, groups=4), ema),
}
peers = pytest.mark.parametrize(("make", "formula"), PEERS.values(), ids=PEERS)


def active(module):
    """`module` in double, with no parameter at zero, so that every path carries a gradient."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module.double()


def gradients(function, module, x, grad):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    out = function(x)
    out.backward(grad)
    return out.detach(), x.grad, [p.grad.clone() for p in module.parameters()]


@peers
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_output_and_every_gradient_equal_the_formula(make, formula, shape, layout):  # T1, T8, T10, T14
    module = active(make(shape[1]))
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    grad = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    out, dx, dw = gradients(module, module, x, grad)
    expected, expected_dx, expected_dw = gradients(lambda x: formula(x.contiguous(), module), module, x, grad)
    assert out.is_contiguous(memory_format=layout)
    for ours, theirs in zip((out, dx, *dw), (expected, expected_dx, *expected_dw), strict=True):
        # One part in 10^12 of the largest value: BatchNorm of a nearly constant channel amplifies rounding.
        bound = 1e-12 * max(1.0, float(theirs.abs().max()), float(expected_dx.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=bound)


@peers
def test_evaluation_uses_running_statistics(make, formula):
    module = active(make(8))
    for _ in range(3):
        module(torch.randn(4, 8, 6, 5, dtype=torch.float64) + 1)
    x = torch.randn(1, 8, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(module.eval()(x), formula(x, module), rtol=1e-12, atol=1e-12)


@peers
def test_derivatives_are_right(make, formula):  # T26
    module = active(make(4))
    if not isinstance(module, SelectiveKernel):  # at the kinks of its ReLUs finite differences fail
        module.eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=False)
    assert torch.autograd.gradgradcheck(module, (x,), fast_mode=True)


@pytest.mark.parametrize("name", ["eca", "scse", "scse-max", "coordatt", "triplet", "ema"])
def test_a_gain_multiplies_the_gate(name):
    module = active(PEERS[name][0](8))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    plain = module(x)
    for gate in module.modules():
        if hasattr(gate, "set_gain"):
            gate.set_gain(3)
    torch.testing.assert_close(module(x), 3 * plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [cbam.ChannelAttention, ECA, SCSE, lambda _: cbam.SpatialAttention()])
def test_a_gain_that_is_not_one_is_printed(make):
    module = make(32)
    assert "gain" not in repr(module)
    module.set_gain(2)
    assert ", gain=2)" in repr(module).replace("\n", " ") or ", gain=2\n" in repr(module)
    assert "gain" not in repr(module.to("meta"))


def test_the_gain_of_bam_divides_its_shortcut():
    module = active(BAM(8))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    plain = module(x)
    module.set_gain(4)
    torch.testing.assert_close(module(x), plain - x * 3 / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "k"),
    [(1, 1), (8, 3), (16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7), (1000, 5)],
)
def test_the_kernel_of_eca_grows_with_the_logarithm_of_the_channels(channels, k):
    assert ECA(channels).conv.weight.shape == (1, 1, k)
    exact = (math.log2(channels) + 1) / 2
    assert abs(k - exact) == min(abs(odd - exact) for odd in range(1, 12, 2))


def test_initial_weights_are_those_of_the_released_codes():
    assert not any(p.any() for p in GlobalContext(64).fc2.parameters())
    assert not GlobalContext(64).conv.bias.any()
    mask = torch.cat([GlobalContext(64).conv.weight.flatten() for _ in range(50)])
    assert mask.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)  # fan-in kaiming
    gct = GCT(8)
    assert (gct.alpha == 1).all()
    assert not gct.gamma.any()
    assert not gct.beta.any()
    for plane in TripletAttention(8).children():
        assert (plane.bn.weight.item(), plane.bn.bias.item(), plane.bn.momentum) == (1, 0, 0.01)
    draws = torch.cat(
        [plane.conv.weight.flatten() for _ in range(30) for plane in TripletAttention(8).children()]
    )
    assert draws.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.1)  # fan-out kaiming
    assert EMA(64).norm.eps == BAM(64).channel[1].eps == 1e-5


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_bam_after_three_stages_of_resnet50_has_the_published_parameters():
    added = sum(count(BAM(channels)) for channels in (256, 512, 1024))
    assert round((25_557_032 + added) / 1e6, 2) == 25.92  # BAM paper, table of ImageNet results


def test_selective_kernels_in_resnext50_have_the_published_parameters():
    added = 0
    for width, blocks in ((128, 3), (256, 4), (512, 6), (1024, 3)):
        replaced = nn.Sequential(nn.Conv2d(width, width, 3, groups=32, bias=False), nn.BatchNorm2d(width))
        added += blocks * (count(SelectiveKernel(width)) - count(replaced))
    assert round((25_028_904 + added) / 1e6, 1) == 27.5  # SKNet-50 in the paper


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (ECA(2048), 7),
        (SimAM(64), 0),
        (TripletAttention(64), 300),
        (GCT(64), 192),
        (EMA(256), 10 * 8 * 8 + 4 * 8),
        (GAM(256), 2 * 49 * 256 * 64 + 2 * 256 * 64 + 2 * (64 + 256) + 2 * (64 + 256)),
        (SCSE(64), 2 * 64 * 32 + 32 + 64 + 65),
        (CoordAttention(64), 64 * 8 + 8 + 16 + 2 * (8 * 64 + 64)),
        (CoordAttention(512), 512 * 16 + 16 + 32 + 2 * (16 * 512 + 512)),
    ],
)
def test_parameters_are_as_many_as_the_layers_of_the_papers(module, parameters):
    assert count(module) == parameters


@pytest.mark.parametrize("channels", [1, 3, 7, 17, 20, 24, 96, 130])
@pytest.mark.parametrize("make", [EMA, SelectiveKernel])
def test_groups_are_the_largest_divisor_up_to_the_default(make, channels):
    groups = make(channels).groups
    assert channels % groups == 0
    assert not any(channels % more == 0 for more in range(groups + 1, 33))


def test_another_number_of_groups_is_logged(caplog):
    with caplog.at_level("INFO", "cbam"):
        EMA(20)
    assert "20 channels: using groups=20 instead of 32" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [GCT, SimAM])
def test_sums_of_squares_do_not_overflow_in_half_precision(make, dtype):  # T20
    module = make(8).to(dtype)
    if isinstance(module, GCT):
        nn.init.ones_(module.gamma)
    x = (torch.randn(1, 8, 112, 112) * 40).to(dtype)
    exact = make(8).double()
    exact.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x).double(), exact(x.double()), rtol=0.02, atol=0.02)


def test_a_channel_of_zeros_has_finite_gradients():
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    module = GCT(4)
    nn.init.ones_(module.gamma)
    module(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def loaded(theirs, ours, names):
    """Copy our weights into another library's module, by their names in our order."""
    state = theirs.state_dict()
    for name, value in zip(names, ours, strict=True):
        state[name].copy_(value.detach().view_as(state[name]))
    return theirs.double()


def test_timms_modules_compute_the_same():
    layers = pytest.importorskip("timm.layers")
    x = torch.randn(3, 64, 6, 5, dtype=torch.float64)
    se, sk = active(squeeze_excitation(64)), active(SelectiveKernel(64))
    eca, gc = active(ECA(64)), active(GlobalContext(64))
    mlp = [f"mlp_add.{name}" for name in ("fc1.weight", "fc1.bias", "norm.weight", "norm.bias")]
    paths = [f"paths.{i}.{name}" for i in (0, 1) for name in ("conv.weight", "bn.weight", "bn.bias")]
    attn = [f"attn.{name}" for name in ("fc_reduce.weight", "bn.weight", "bn.bias", "fc_select.weight")]
    selective = layers.SelectiveKernel(64, groups=32, rd_channels=32, split_input=False)
    global_context = layers.GlobalContext(64, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16)
    assert global_context.mlp_add is not None
    global_context.mlp_add.norm.eps = 1e-5
    pairs = [
        (se, layers.SEModule(64, rd_channels=4), ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
        (eca, layers.EcaModule(64), ["conv.weight"]),
        (
            gc,
            global_context,
            ["conv_attn.weight", "conv_attn.bias", *mlp, "mlp_add.fc2.weight", "mlp_add.fc2.bias"],
        ),
        (sk, selective, [*paths, *attn]),
    ]
    for ours, theirs, names in pairs:
        same = loaded(theirs, ours.parameters(), names)
        torch.testing.assert_close(ours(x), same(x), rtol=1e-12, atol=1e-12, msg=type(ours).__name__)


def test_timms_coordinate_attention_computes_the_same():
    layers = pytest.importorskip("timm.layers.coord_attn", reason="timm 1.0.22 has none")
    x, coord = torch.randn(3, 64, 6, 5, dtype=torch.float64), active(CoordAttention(64))
    convs = [f"{conv}.{name}" for conv in ("conv_h", "conv_w") for name in ("weight", "bias")]
    names = ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", *convs]
    same = loaded(layers.CoordAttn(64, rd_channels=8, bias=True), coord.parameters(), names)
    torch.testing.assert_close(coord(x), same(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SCSE(8, combine="mean"), "combine must be 'sum' or 'max', got 'mean'"),
        (lambda: BAM(8, combine="max"), "combine must be 'sum' or 'product'"),
        (lambda: BAM(8, dilation=0), "dilation must be a positive int"),
        (lambda: BAM(8, reduction=-1), "reduction must be a positive int"),
        (lambda: GlobalContext(8, reduction=0), "reduction must be a positive int"),
        (lambda: CoordAttention(8, reduction=1.5), "reduction must be a positive int"),  # pyright: ignore
        (lambda: SCSE(8, reduction=True), "reduction must be a positive int"),
        (lambda: GAM(8, reduction=0), "reduction must be a positive int"),
        (lambda: GAM(8, kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: ECA(8, kernel_size=2), "kernel_size must be odd, got 2"),
        (lambda: TripletAttention(8, kernel_size=6), "kernel_size must be odd"),  # T36
        (lambda: EMA(8, groups=0), "groups must be a positive int"),
        (lambda: SelectiveKernel(8, groups=0), "groups must be a positive int"),
        (lambda: SelectiveKernel(8, minimum=0), "minimum must be a positive int"),
        (lambda: SimAM(8, regularization=0), "regularization must be a positive number, got 0"),
        (lambda: SimAM(8, regularization=float("nan")), "regularization must be a positive number"),
    ],
)
def test_an_invalid_argument_is_refused(make, words):
    with pytest.raises(cbam.errors.InputError, match=words):
        make()


def test_every_module_has_its_formula_in_a_test():
    own = {"cbam", "se", "channel", "spatial"}  # tests/nn/test_cbam.py
    assert set(ATTENTION) - own == {name.partition("-")[0] for name in PEERS}
