"""The networks of the paper's tables that the libraries lack, against the libraries' own where they meet."""

import copy
import itertools
import pickle

import pytest
import torch
import torchvision
from torch import nn

from cbam.errors import ConfigError, InputError
from cbam.models import MobileNetV1, build, stride_in_1x1
from cbam.surgery import attached, detach, sites


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def on_meta(name, **options):
    with torch.device("meta"):
        return build(name, **options)


# --- MobileNet V1 ---


def mobilenet(attention="", **options):
    torch.manual_seed(7)
    return build(f"mobilenet_v1_0.35{attention}", num_classes=5, **options).eval()


def test_mobilenet_computes_what_timms_does():
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    theirs = timm.create_model("mobilenetv1_100", act_layer=nn.ReLU, num_classes=9).eval()
    ours = build("mobilenet_v1", num_classes=9).eval()
    tensors = theirs.state_dict()
    assert [tuple(v.shape) for v in tensors.values()] == list(shapes(ours).values())
    ours.load_state_dict(dict(zip(ours.state_dict(), tensors.values(), strict=True)))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x))


def test_mobilenet_ends_in_a_map_of_a_thirty_second():
    model = mobilenet()
    seen = []
    model.blocks.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    assert model(torch.rand(2, 3, 224, 224)).shape == (2, 5)
    assert seen == [(2, int(0.35 * 1024), 7, 7)]


def test_a_mobilenet_carries_its_signal_to_the_end_from_the_start():
    model = build("mobilenet_v1", num_classes=5).eval()
    seen = []
    model.avgpool.register_forward_hook(lambda _, __, out: seen.append(out))
    model(torch.randn(2, 3, 96, 96))
    assert 0.01 < seen[0].std() < 100


def test_attention_follows_every_convolution_of_a_mobilenet():
    model = mobilenet("+cbam")
    convolutions = [
        (name.removesuffix(".conv"), module.out_channels)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and ".cbam." not in name
    ]
    found = {name: part.channels for name, part in attached(model).items()}
    assert found == dict(convolutions)
    assert len(found) == 27
    assert {(site.name, site.channels) for site in sites(model) if site.attached} == set(found.items())
    assert {"stem.cbam.channel.fc1.weight", "blocks.12.pointwise.cbam.spatial.conv.weight"} <= set(
        model.state_dict()
    )


def test_a_mobilenet_starts_at_identity_bit_for_bit_and_gives_attention_back():
    x = torch.randn(2, 3, 64, 64)
    model = mobilenet("+cbam", start="identity")
    plain = mobilenet()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(x), plain(x))
    assert not torch.equal(mobilenet("+cbam")(x), plain(x))
    assert list(detach(model).state_dict()) == list(plain.state_dict())
    assert torch.equal(model(x), plain(x))


def test_every_parameter_of_a_mobilenet_with_attention_learns():
    model = mobilenet("+cbam").train()
    for module in model.modules():  # the released start has the last BatchNorm of each gate at zero
        if isinstance(module, nn.BatchNorm2d) and module.num_features == 1:
            nn.init.ones_(module.weight)
    model(torch.randn(4, 3, 96, 96)).square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in still if ".cbam.channel.fc" not in name], still


@pytest.mark.parametrize(
    ("name", "width"), [("0.7", 0.7), ("1.0", 1.0), ("2", 2.0), ("0.35", 0.35), ("0.05", 0.05)]
)
def test_a_mobilenet_has_the_width_of_its_name(name, width):
    model = on_meta(f"mobilenet_v1_{name}")
    assert model.stem.conv.out_channels == int(width * 32)
    assert model.fc.in_features == int(width * 1024)


@pytest.mark.parametrize("family", ["mobilenet_v1", "wide_resnet18"])
@pytest.mark.parametrize("width", ["0", "0.01", "8.5", "1" + "0" * 400])
def test_an_invalid_width_is_refused(family, width):
    with pytest.raises(InputError, match=r"width of a \w.* must be from 0.05 to 8, got"):
        build(f"{family}_{width}")


def test_a_non_numeric_width_is_refused():
    with pytest.raises(InputError, match="got nan"):
        MobileNetV1(width=float("nan"))


@pytest.mark.parametrize("name", ["mobilenet_v1_", "mobilenet_v1_-1", "mobilenet_v1_x", "wide_resnet18"])
def test_a_misspelt_width_is_an_unknown_network(name):
    """C6"""
    family = name.rpartition("_")[0] if name.startswith("mobile") else name
    with pytest.raises(ConfigError, match=f"unknown network '{name}'; nearest: .*{family[:12]}"):
        build(name)


# --- residual networks ---


def test_a_resnext101_takes_timms_weights_and_computes_the_same():
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    theirs = timm.create_model("resnext101_32x4d", num_classes=3).eval()
    ours = build("resnext101_32x4d", num_classes=3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_resnext101_is_named_as_torchvisions():
    ours, theirs = shapes(on_meta("resnext101_32x4d")), shapes(on_meta("torchvision:resnext101_32x8d"))
    assert list(ours) == list(theirs)
    assert ours["layer1.0.conv2.weight"] == (128, 4, 3, 3)


def test_a_wide_resnet18_of_width_one_is_a_resnet18():
    torch.manual_seed(0)
    wide, plain = build("wide_resnet18_1", num_classes=4).eval(), build("resnet18", num_classes=4).eval()
    assert shapes(wide) == shapes(plain)
    wide.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(wide(x), plain(x))


@pytest.mark.parametrize("width", [1.5, 2.0])
def test_a_wide_resnet18_widens_every_stage_and_leaves_the_stem(width):
    wide, plain = shapes(on_meta(f"wide_resnet18_{width}")), shapes(on_meta("resnet18"))
    assert set(wide) - set(plain) == {name for name in wide if name.startswith("layer1.0.downsample.")}
    assert set(plain) <= set(wide)
    for name, shape in plain.items():
        if name.startswith(("conv1", "bn1")) or not shape:
            assert wide[name] == shape
        elif "bn" in name:
            assert wide[name] == (int(width * shape[0]),)
    assert wide["layer1.0.conv1.weight"] == (int(width * 64), 64, 3, 3)
    assert wide["layer4.1.conv2.weight"] == (int(width * 512), int(width * 512), 3, 3)


def test_a_wide_resnet18_is_initialised_as_torchvision_does():
    torch.manual_seed(0)
    model = build("wide_resnet18_0.5", num_classes=4)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.out_channels >= 64:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


@pytest.mark.parametrize("name", ["wide_resnet18_0.5+cbam", "mobilenet_v1_0.35+cbam"])
def test_a_network_survives_copying_and_pickling(name):
    model = build(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


# --- where the stride is ---


def test_the_stride_is_in_the_3x3_unless_asked():
    for options, expected in (({}, (1, 2)), ({"stride_in": "3x3"}, (1, 2)), ({"stride_in": "1x1"}, (2, 1))):
        model = on_meta("resnet50", **options)
        for block in (model.layer2[0], model.layer3[0], model.layer4[0]):
            assert (block.conv1.stride[0], block.conv2.stride[0]) == expected
        for block in itertools.chain(model.layer1, model.layer2[1:], model.layer3[1:], model.layer4[1:]):
            assert block.conv1.stride == block.conv2.stride == (1, 1)


def test_the_stride_in_the_1x1_is_that_of_the_original_definition():
    """A block written out: 1x1 with the stride, 3x3 without (He et al. 2016), the shortcut as it is."""
    torch.manual_seed(0)
    model = build("resnet50", num_classes=3, stride_in="1x1").eval()
    block = model.layer2[0]
    x = torch.randn(1, 256, 9, 14)
    conv = torch.nn.functional.conv2d
    out = block.bn1(conv(x, block.conv1.weight, stride=2)).relu()
    out = block.bn2(conv(out, block.conv2.weight, padding=1)).relu()
    out = block.bn3(conv(out, block.conv3.weight))
    shortcut = block.downsample[1](conv(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), (out + shortcut).relu())


def test_weights_load_either_way_and_compute_something_else():
    torch.manual_seed(0)
    a = build("resnet50", num_classes=3).eval()
    b = copy.deepcopy(a)
    assert stride_in_1x1(b) == 3
    assert shapes(a) == shapes(b)
    b.load_state_dict(a.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(a(x), b(x))
    assert stride_in_1x1(b) == 0


@pytest.mark.parametrize(
    "name", ["resnext50_32x4d", "resnext101_32x4d", "wide_resnet50_2", "timm:resnet26", "timm:resnetv2_50"]
)
def test_every_bottleneck_network_can_stride_in_the_1x1(name):
    strides = [
        (block.conv1.stride, block.conv2.stride)
        for block in on_meta(name, stride_in="1x1").modules()
        if isinstance(getattr(block, "conv3", None), nn.Conv2d)
    ]
    assert ((2, 2), (1, 1)) in strides
    assert all(second == (1, 1) for _, second in strides)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet34",
        "wide_resnet18_1.5+cbam",
        "mobilenet_v1",
        "mobilenet_v1_0.7+se",
        "resnet_tiny",
        "densenet121",
        "timm:legacy_seresnet50",  # strides in the 1x1 as it is
    ],
)
def test_networks_without_such_a_bottleneck_are_refused_by_name(name):
    """C6"""
    with pytest.raises(ConfigError, match=rf'stride_in="1x1": {name.partition("+")[0]} has no bottleneck'):
        on_meta(name, stride_in="1x1")


@pytest.mark.parametrize("stride_in", ["2x2", "", None, 1])
def test_an_unknown_stride_is_refused(stride_in):
    """C6"""
    with pytest.raises(ConfigError, match='stride_in must be "3x3" or "1x1", got'):
        build("resnet50", stride_in=stride_in)


def test_torchvisions_class_is_used_as_it_is():
    for name in ("resnext101_32x4d", "wide_resnet18_1.5"):
        assert type(on_meta(name)) is torchvision.models.ResNet
