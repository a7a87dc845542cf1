"""Networks by name."""

import builtins

import pytest
import torch
from torch import nn

from cbam.errors import AttachError, ConfigError, InputError, MissingExtraError
from cbam.models import MobileNetV1, ResNetTiny, attentions, build, names
from cbam.models.variants import VARIANTS
from cbam.nn import ATTENTION, CBAM, ChannelAttention
from cbam.surgery import attached


@pytest.mark.parametrize(
    "name", ["resnet_tiny", "resnet18", "timm:test_resnet", "mobilenet_v2", "tf_efficientnet_lite0"]
)
@pytest.mark.parametrize("attention", ["", "+se", "+cbam"])
def test_a_network_gives_one_logit_per_class(name, attention):
    model = build(name + attention, num_classes=7).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    kind = {"": None, "+se": ChannelAttention, "+cbam": CBAM}[attention]
    assert {type(module) for module in attached(model).values()} == ({kind} if kind else set())


def test_squeeze_and_excitation_pools_only_by_average():
    assert all(module.pools == ("avg",) for module in attached(build("resnet_tiny+se")).values())


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_the_start_is_the_attentions(start):
    torch.manual_seed(3)
    plain = build("resnet_tiny").eval()
    torch.manual_seed(3)
    model = build("resnet_tiny+cbam", start=start).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x)) == (start == "identity")
    assert model.layer1[0].cbam.channel.gain == (2 if start == "identity" else None)


def test_torchvision_wins_a_name_that_timm_has_too():
    assert type(build("resnet18")).__module__.startswith("torchvision.")
    assert type(build("torchvision:resnet18")).__module__.startswith("torchvision.")
    assert type(build("timm:resnet18")).__module__.startswith("timm.")
    assert isinstance(build("cbam:resnet_tiny"), ResNetTiny)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_train_on_one_output(name):
    model = build(name, num_classes=3).train()
    assert isinstance(model(torch.rand(2, 3, 96, 96)), torch.Tensor)


def test_names_lists_every_library_and_marks_the_shadowed():
    every = names()
    assert every == sorted(set(every))
    assert {"resnet_tiny", "resnet18", "timm:resnet18", "mobilenet_v2", "tf_efficientnet_lite0"} <= set(every)
    assert "timm:tf_efficientnet_lite0" not in every
    assert names("resnet18") == [name for name in every if "resnet18" in name]
    assert names("resnet1*") == [name for name in every if name.startswith("resnet1")]
    assert names("no such network") == []
    assert not any(name.startswith(("quantized", "fasterrcnn", "fcn")) for name in every)


def test_names_lists_the_networks_of_the_papers_tables():
    tables = "resnet18 resnet34 resnet50 resnet101 wide_resnet18_1.5 wide_resnet18_2.0 resnext50_32x4d"
    ours = "resnext101_32x4d mobilenet_v1 mobilenet_v1_0.7"
    assert {*tables.split(), *ours.split(), "timm:resnext101_32x4d"} <= set(names())
    assert "cbam:resnext101_32x4d" not in names()
    assert isinstance(build("cbam:mobilenet_v1_0.1"), MobileNetV1)


def test_every_listed_name_is_found():
    for name in names("resnet1*") + names("*:resnet1*") + names("mobilenet_v1*") + names("*wide_resnet18*"):
        with torch.device("meta"):
            assert isinstance(build(name, num_classes=2), nn.Module)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet51", "resnet50"),
        ("ResNet50", "resnet50"),
        ("timm:resnet51+cbam", "resnet50"),
        ("torchvision:tf_efficientnet_lite0", "efficientnet_b0"),
        ("resnettiny", "resnet_tiny"),
        ("", "nearest"),
        ("../../etc/passwd", "nearest"),
    ],
)
def test_an_unknown_network_is_refused_with_the_nearest_three(name, nearest):
    """C6"""
    with pytest.raises(ConfigError, match=r"unknown network .*; nearest: \S+, \S+, \S+$") as caught:
        build(name)
    assert nearest in str(caught.value)


@pytest.mark.parametrize(
    "name", ["hf_hub:timm/resnet18", "hf-hub:a/b", "local-dir:/tmp", "https://a/b", "resnet:18"]
)
def test_no_name_triggers_a_download(name):
    """C6"""
    with pytest.raises(ConfigError, match="unknown library"):
        build(name)


@pytest.mark.parametrize("name", ["resnet18+", "resnet18+bamm", "resnet18+cbam+se", "resnet18+CBAM", "+"])
def test_an_unknown_attention_is_refused_with_the_known_ones(name):
    """C6"""
    with pytest.raises(ConfigError, match=r"unknown attention .*; expected one of bam, cbam, cbam-avg, "):
        build(name)


@pytest.mark.parametrize("attention", attentions())
def test_every_attention_goes_into_a_network_by_name_and_learns(attention):
    torch.manual_seed(0)
    model = build(f"resnet_tiny+{attention}", num_classes=3)
    assert len(attached(model)) == 3
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3)


NO_IDENTITY = {"simam", "sk"}  # a gate without weights, and a choice between two convolutions


@pytest.mark.parametrize("attention", sorted(set(attentions()) - NO_IDENTITY))
def test_an_identity_start_is_exact(attention):
    torch.manual_seed(3)
    plain = build("resnet_tiny", num_classes=3).eval()
    model = build(f"resnet_tiny+{attention}", num_classes=3, start="identity").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("attention", sorted(NO_IDENTITY))
def test_an_identity_start_that_does_not_exist_is_refused(attention):
    with pytest.raises(AttachError, match=r'start="identity" needs \w+\.identity_\(\)'):
        build(f"resnet_tiny+{attention}", start="identity")


@pytest.mark.parametrize("name", ["mobilenet_v2+eca", "timm:test_resnet+coordatt", "resnet18+bam"])
def test_any_attention_goes_into_any_library(name):
    model = build(name, num_classes=3).eval()
    assert attached(model)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_attentions_are_those_of_the_modules_and_of_the_papers_tables():
    assert attentions() == sorted({*ATTENTION, *VARIANTS})
    assert {"se", "cbam", "cbam-avg", "cbam-parallel"} <= set(attentions())
    assert ATTENTION.keys().isdisjoint(VARIANTS)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "10", None])
def test_an_invalid_number_of_classes_is_refused(num_classes):
    with pytest.raises(InputError, match="num_classes must be a positive int"):
        build("resnet_tiny", num_classes=num_classes)


def test_arguments_are_checked_on_entry():
    with pytest.raises(InputError, match="name of a network must be a str, got int"):
        build(18)
    with pytest.raises(ConfigError, match='"paper" or "identity", got \'zero\''):
        build("resnet_tiny", start="zero")
    with pytest.raises(AttachError, match=r'pass where=... to cbam.attach\(cbam.build\("vgg11_bn"\), ...\)$'):
        build("vgg11_bn+cbam")


@pytest.mark.parametrize("absent", [{"torchvision"}, {"timm"}, {"torchvision", "timm"}])
def test_a_missing_library_is_named_and_our_networks_still_build(absent, monkeypatch):
    """C5"""
    real = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] in absent:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert isinstance(build("resnet_tiny+cbam"), ResNetTiny)
    assert isinstance(build("mobilenet_v1_0.1+se"), MobileNetV1)
    assert {"resnet_tiny", "mobilenet_v1"} <= set(names())
    assert ("wide_resnet18_1.5" in names()) == ("torchvision" not in absent)
    for library in absent:
        with pytest.raises(MissingExtraError, match=rf"{library} network.*pip install 'cbam\[vision\]'"):
            build(f"{library}:resnet18")
    if "torchvision" in absent:
        for name in ("resnet18", "wide_resnet18_1.5", "cbam:resnext101_32x4d"):
            with pytest.raises(MissingExtraError):
                build(name)


def test_resnet_tiny_ends_in_a_map_of_8_by_8():
    model = build("resnet_tiny", num_classes=10)
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 10)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [name for name, _ in model.named_children()][-2:] == ["avgpool", "fc"]
    assert {
        "conv1.weight",
        "bn1.weight",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "fc.bias",
    } <= set(model.state_dict())


def test_resnet_tiny_learns():
    torch.manual_seed(0)
    model = build("resnet_tiny+cbam", num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = torch.rand(16, 3, 32, 32)
    y = torch.arange(16) % 2
    x[y == 1, 0, :16] += 0.5
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
