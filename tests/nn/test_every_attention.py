"""What holds for every attention module."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbam
from cbam.errors import AttachError, DtypeError, InputError
from cbam.nn import ATTENTION, BAM, SCSE

MAKE = dict(ATTENTION) | {
    "scse-max": lambda channels: SCSE(channels, combine="max"),
    "bam-product": lambda channels: BAM(channels, combine="product"),
    "channel-lp-lse": lambda channels: cbam.ChannelAttention(channels, pools=("lp", "lse")),
}
WITHOUT_IDENTITY = {"sk", "simam"}
PAIRED = {"bam", "bam-product", "sk"}  # a BatchNorm over samples only: training needs two
RELU_AFTER_A_LAYER = {
    "cbam",
    "se",
    "channel",
    "scse",
    "bam",
    "sk",
    "gam",
    "scse-max",
    "bam-product",
    "channel-lp-lse",
}
FREE = {"spatial"}  # takes any number of channels
every = pytest.mark.parametrize("name", MAKE)
startable = pytest.mark.parametrize("name", sorted(set(MAKE) - WITHOUT_IDENTITY))

# The layers that an identity start leaves at zero, and that the first gradient must reach.
LAST = {
    "cbam": ["channel.fc2.weight", "channel.fc2.bias", "spatial.bn.weight", "spatial.bn.bias"],
    "se": ["fc2.weight", "fc2.bias"],
    "channel": ["fc2.weight", "fc2.bias"],
    "channel-lp-lse": ["fc2.weight", "fc2.bias"],
    "spatial": ["bn.weight", "bn.bias"],
    "eca": ["conv.weight"],
    "scse": ["fc2.weight", "fc2.bias", "conv.weight", "conv.bias"],
    "scse-max": ["fc2.weight", "fc2.bias", "conv.weight", "conv.bias"],
    "bam": ["channel.3.weight", "channel.3.bias", "spatial.9.weight", "spatial.9.bias"],
    "bam-product": ["spatial.9.weight", "spatial.9.bias"],
    "gc": ["fc2.weight", "fc2.bias"],
    "coordatt": ["conv_h.weight", "conv_h.bias", "conv_w.weight", "conv_w.bias"],
    "triplet": [f"{plane}.bn.{name}" for plane in ("hw", "cw", "hc") for name in ("weight", "bias")],
    "gct": ["gamma", "beta"],
    "gam": ["channel.fc2.weight", "channel.fc2.bias", "spatial.bn2.weight", "spatial.bn2.bias"],
    "ema": ["conv3.weight", "conv3.bias", "norm.weight", "norm.bias"],
}


def active(module):
    """`module` with no parameter at zero, so that every path carries a gradient."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module


def gradients(function, module, x, grad):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    out = function(x)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


class Block(nn.Module):
    """A residual block as in ResNet."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        width = channels * stride
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Conv2d(channels, width, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut)


def residual_net() -> nn.Sequential:
    """Two stages of 16 and 32 channels and a classifier."""
    stem = nn.Conv2d(3, 16, 3, padding=1)
    return nn.Sequential(
        stem, Block(16, 1), Block(16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )


@startable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [True, False])
def test_the_identity_start_returns_exactly_its_input(name, dtype, train):  # T1
    x = torch.randn(2, 48, 6, 5).to(dtype)
    module = active(MAKE[name](48)).identity_()
    assert torch.equal(copy.deepcopy(module).to(dtype).train(train)(x), x)
    through_half = copy.deepcopy(module).bfloat16().to(dtype).train(train)
    assert torch.equal(through_half(x), x)  # what the start needs is exact in every precision


@startable
def test_gradients_reach_the_last_layers_at_the_identity_start_and_all_weights_later(name):
    module = active(MAKE[name](64)).identity_()
    x = torch.randn(8, 64, 6, 6)
    goal = x * (1 + x.mean((2, 3), keepdim=True) + x[:, :1]).sigmoid() * 3
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        F.mse_loss(module(x), goal).backward()
        moving = {n for n, p in module.named_parameters() if p.grad.any()}
        if step == 0:
            assert set(LAST[name]) <= moving
        optimizer.step()
    # A softmax ignores what is added to all of its logits: that gradient is zero up to rounding.
    idle = {"conv.bias"} if name == "gc" else set()
    assert moving | idle == {n for n, _ in module.named_parameters()}


@startable
def test_resetting_ends_the_identity_start(name):
    module = MAKE[name](48)
    keys = list(module.state_dict())
    module.identity_().reset_parameters()
    assert list(module.state_dict()) == keys
    one, other = (dict(MAKE[name](48).named_parameters()) for _ in range(2))
    for n, p in module.named_parameters():
        if torch.equal(one[n], other[n]):  # a constant
            assert torch.equal(p, one[n]), n
        elif p.numel() > 8:
            assert p.detach().std().item() == pytest.approx(one[n].detach().std().item(), rel=0.7), n


@pytest.mark.parametrize("name", sorted(WITHOUT_IDENTITY))
def test_attention_without_identity_is_refused_unless_it_starts_as_the_paper(name):
    model = residual_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AttachError, match=rf"{type(MAKE[name](8)).__name__}.*identity_"):
        cbam.attach(model, attention=ATTENTION[name])
    assert list(model.state_dict()) == list(before)
    cbam.attach(model, attention=ATTENTION[name], start="paper")
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


@startable
def test_an_attached_network_starts_bit_equal_and_trains(name):
    model = residual_net()
    x = torch.randn(4, 3, 9, 11)
    before, plain = copy.deepcopy(model.state_dict()), [model.train()(x), model.eval()(x)]
    model.load_state_dict(before)
    cbam.attach(model, attention=MAKE[name])
    assert sum(site.attached for site in cbam.sites(model)) == 2
    assert torch.equal(model.train()(x), plain[0])
    assert torch.equal(model.eval()(x), plain[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model.train()(x), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    cbam.detach(model)
    assert list(model.state_dict()) == list(before)


@every
@pytest.mark.parametrize("channels", [1, 3, 17, 48])
def test_any_size_works_and_keeps_its_shape(name, channels):  # T8, T10
    module = active(MAKE[name](channels))
    for size in ((1, 1), (1, 7), (13, 17), (97, 1)):
        for train in (True, False):
            out = module.train(train)(torch.randn(2, channels, *size))
            assert out.shape == (2, channels, *size)
            assert out.isfinite().all()


@every
def test_an_unbatched_map_equals_a_batch_of_one(name):  # T4
    module = active(MAKE[name](24)).eval()
    x = torch.randn(24, 5, 6)
    assert torch.equal(module(x), module(x[None])[0])


@every
def test_an_empty_batch_gives_an_empty_batch_and_zero_gradients(name):  # T11
    module = MAKE[name](24)
    out = module(torch.zeros(0, 24, 4, 4, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 24, 4, 4)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@every
def test_one_value_per_channel_is_refused_in_training(name):  # T7
    module = MAKE[name](24)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(1, 24, 4, 4) if name in PAIRED else torch.randn(1, 24, 1, 1)
    if name in PAIRED | {"cbam", "spatial", "triplet", "gam"}:
        with pytest.raises(InputError, match=r"Expected more than 1 value per channel.*use eval\(\)"):
            module(x)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.eval()(x).isfinite().all()


@every
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 8, 4, 4, dtype=torch.int64), DtypeError, r"int64; call x.float\(\)"),  # T2
        (torch.zeros(2, 8, 4, 4, dtype=torch.bool), DtypeError, "bool"),
        (torch.zeros(2, 8, 4, 4, dtype=torch.complex64), DtypeError, "complex64"),
        (
            torch.zeros(2, 8, 4, 4).to(torch.float8_e4m3fn),
            DtypeError,
            "needs a float16, bfloat16.*float8",
        ),  # T3
        (torch.zeros(8, 8), InputError, r"\(N, C, H, W\) or \(C, H, W\), got shape \(8, 8\)"),  # T5
        (torch.zeros(1, 8, 2, 2, 2), InputError, "got shape"),
        (torch.zeros(2, 4, 4, 4), InputError, "built for 8 channels, got 4"),  # T6
        (torch.zeros(2, 8, 4), InputError, "built for 8 channels, got 2"),
        (torch.zeros(2, 8, 0, 3), InputError, "at least 1"),  # T12
        (torch.zeros(2, 8, 4, 4, device="meta"), InputError, "x is on meta, the weights are on cpu"),  # T31
        (torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16), DtypeError, "autocast"),  # T1
        (torch.zeros(2, 8, 4, 4).numpy(), InputError, "expected a torch.Tensor, got ndarray"),
        (None, InputError, "expected a torch.Tensor, got NoneType"),
    ],
    ids="int bool complex float8 2-D 5-D channels 3-D empty device dtype array None".split(),
)
def test_invalid_input_is_refused(name, x, error, words):
    if (name in FREE and "built for" in words) or (
        name == "simam" and words in ("autocast", "x is on meta, the weights are on cpu")
    ):
        assert MAKE[name](8)(x).shape == x.shape  # no weights to match
        return
    with pytest.raises(error, match=words):
        MAKE[name](8)(x)


@every
def test_another_dtype_is_refused_on_the_meta_device_too(name):  # T1
    if name == "simam":
        pytest.skip("no weights to match")
    with torch.device("meta"), pytest.raises(DtypeError, match="autocast"):
        MAKE[name](8).half()(torch.zeros(2, 8, 4, 4))


@pytest.mark.parametrize("name", sorted(set(MAKE) - FREE))
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "16"])
def test_channels_must_be_a_positive_int(name, value):  # T10
    with pytest.raises(InputError, match="channels must be a positive int"):
        MAKE[name](value)


@every
def test_a_nan_pixel_affects_only_its_own_sample_in_evaluation(name):  # T17
    module = active(MAKE[name](8)).eval()
    x = torch.randn(3, 8, 5, 5)
    clean = module(x)
    x[1, 2, 3, 3] = float("nan")
    out = module(x)
    assert out[1].isnan().any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@every
def test_strides_do_not_matter(name):  # T13, T15
    module = active(MAKE[name](8)).eval()
    x, gaps = torch.randn(2, 8, 5, 8), torch.full((2, 8, 10, 24), float("nan"))
    gaps[:, :, ::2, ::3] = x
    torch.testing.assert_close(module(gaps[:, :, ::2, ::3]), module(x))
    row = torch.randn(1, 8, 5, 1).expand(2, 8, 5, 8)
    torch.testing.assert_close(module(row), module(row.contiguous()))
    grad = torch.ones(1).expand(2, 8, 5, 8)
    for ours, same in zip(
        gradients(module, module, x, grad), gradients(module, module, x, grad.contiguous()), strict=True
    ):
        torch.testing.assert_close(ours, same)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_and_keeps_dtype_and_layout(name, dtype):  # T1, T14
    module = active(MAKE[name](16)).eval()
    x = torch.randn(2, 16, 6, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    half = copy.deepcopy(module).to(dtype)
    out = half(x.requires_grad_())
    out.sum().backward()
    assert (out.dtype, x.grad.dtype) == (dtype, dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(half).double()(x.double())
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_either_dtype(name, dtype):  # T29
    module = MAKE[name](16)
    if name not in WITHOUT_IDENTITY:
        module.identity_()
    x = torch.randn(2, 16, 5, 5)
    with torch.autocast("cpu", dtype=dtype):
        low, full = module(x.to(dtype)), module(x)
    assert low.dtype == dtype
    assert full.dtype == (dtype if name == "sk" else torch.float32)
    if name not in WITHOUT_IDENTITY:
        assert torch.equal(low, x.to(dtype))
        assert torch.equal(full, x)


@every
def test_compiles_as_one_graph(name):  # T33
    module = active(MAKE[name](8))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, grad = torch.randn(2, 8, 6, 7), torch.randn(2, 8, 6, 7)
    for ours, eager in zip(
        gradients(compiled, module, x, grad), gradients(module, module, x, grad), strict=True
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@every
def test_exports_with_dynamic_sizes_and_no_custom_operator(name):  # T33, E1, E2
    module = active(MAKE[name](8)).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        module, (torch.randn(2, 8, 6, 7),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    assert not any("cbam" in str(n.target) for n in program.graph.nodes if n.op == "call_function")
    for size in ((1, 8, 5, 5), (3, 8, 12, 4)):
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), module(x))


@every
@pytest.mark.parametrize("started", [False, True])
def test_can_be_traced_by_fx_and_by_jit(name, started):  # S19
    module = active(MAKE[name](8)).eval()
    if started and name not in WITHOUT_IDENTITY:
        module = active(module.identity_())
    x = torch.randn(2, 8, 6, 7)
    graph = torch.fx.symbolic_trace(nn.Sequential(module))
    assert torch.equal(graph(x), module(x))
    assert torch.equal(graph(x[0]), module(x[0]))
    with pytest.raises(DtypeError):
        graph(x.long())
    traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x), module(x))


@every
@pytest.mark.filterwarnings("ignore")  # torch is about to drop its old quantisation
def test_layers_can_be_fused_for_quantising(name):  # S19
    from torch.ao.quantization.quantize_fx import fuse_fx

    module, x = active(MAKE[name](8)).eval(), torch.randn(2, 8, 6, 7)
    fused = fuse_fx(nn.Sequential(copy.deepcopy(module)))
    torch.testing.assert_close(fused(x), module(x))
    merged = any("intrinsic" in type(layer).__module__ for layer in fused.modules())
    assert merged == (name in RELU_AFTER_A_LAYER)


@every
@pytest.mark.parametrize("started", [False, True])
def test_can_be_copied_pickled_and_loaded(name, started):  # T37
    module = active(MAKE[name](8))
    if started and name not in WITHOUT_IDENTITY:
        module = active(module.identity_())
    x = torch.randn(2, 8, 5, 5)
    module(x)
    module.eval()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert list(twin.state_dict()) == list(module.state_dict())
    other = MAKE[name](8).eval()
    if started and name not in WITHOUT_IDENTITY:
        other.identity_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@every
def test_a_module_built_on_meta_can_be_loaded(name):  # T37
    source = active(MAKE[name](8)).eval()
    with torch.device("meta"):
        empty = MAKE[name](8)
        if name not in WITHOUT_IDENTITY:
            empty.identity_()
            source = active(source.identity_())
    empty.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(empty.eval()(x), source(x))


def offloaded(layer, own, away):
    """A forward with weights only while it runs, as with accelerate's `cpu_offload`."""
    forward = layer.forward

    def loading(*args, **kwargs):
        layer._parameters.update(own)
        try:
            return forward(*args, **kwargs)
        finally:
            layer._parameters.update(away)

    return loading


# EMA calls the function of its norm, since torch's module refuses a plane of one pixel.
@pytest.mark.parametrize("name", sorted(set(MAKE) - {"ema"}))
def test_weights_may_be_offloaded_between_calls(name):
    module = active(MAKE[name](8)).eval()
    x = torch.randn(2, 8, 5, 5)
    expected = module(x)
    for layer in module.modules():
        if own := {name: p for name, p in layer._parameters.items() if p is not None}:
            away = {name: nn.Parameter(p.to("meta")) for name, p in own.items()}
            layer.forward = offloaded(layer, own, away)
            layer._parameters.update(away)
    torch.testing.assert_close(module(x), expected)


@every
def test_torch_func_transforms_work(name):  # T28
    module = active(MAKE[name](8)).double().eval()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda s: module(s).square().sum()))(x)
    y = x.clone().requires_grad_()
    module(y).square().sum().backward()
    torch.testing.assert_close(per_sample, y.grad)


@every
def test_repr_and_docstring_are_complete(name):
    module = MAKE[name](8)
    assert "8" in repr(module) or name in FREE
    # The docstring is the card's source: one line, a formula, its source, its arguments, its shape.
    doc = type(module).__doc__ or ""
    if type(module).__module__ != "cbam.nn.cbam":
        assert "F' = " in doc or "F'  = " in doc
        assert "Elsewhere:" in doc
        for section in ("Reference:", "Args:", "Shape:"):
            assert section in doc, section
    assert doc.splitlines()[0].endswith(".")
