"""Networks by name."""

import builtins

import pytest
import torch
from torch import nn

from cbam.errors import AttachError, ConfigError, InputError, MissingExtraError
from cbam.models import ResNetTiny, build, names
from cbam.nn import CBAM, ChannelAttention
from cbam.surgery import attached


def parameters(name):
    """The number of parameters of a network that is never given memory."""
    with torch.device("meta"):
        model = build(name)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("resnet18", 11_689_512),
        ("resnet18+se", 11_778_592),
        ("resnet18+cbam", 11_779_392),
        ("resnet34", 21_797_672),
        ("resnet34+se", 21_958_868),
        ("resnet34+cbam", 21_960_468),
        ("resnet50", 25_557_032),
        ("resnet50+se", 28_088_024),
        ("resnet50+cbam", 28_089_624),
        ("resnext50_32x4d+se", 27_559_896),
        ("resnext50_32x4d+cbam", 27_561_496),
        ("resnet101+cbam", 49_330_172),
    ],
)
def test_parameters_are_the_papers(name, exact):
    """Table 4, counted from the definitions."""
    assert parameters(name) == exact


@pytest.mark.parametrize(
    "name", ["resnet_tiny", "resnet18", "timm:test_resnet", "mobilenet_v2", "tf_efficientnet_lite0"]
)
@pytest.mark.parametrize("attention", ["", "+se", "+cbam"])
def test_a_network_gives_one_logit_per_class(name, attention):
    model = build(name + attention, num_classes=7).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    kind = {"": None, "+se": ChannelAttention, "+cbam": CBAM}[attention]
    assert {type(module) for module in attached(model).values()} == ({kind} if kind else set())


def test_squeeze_and_excitation_pools_by_the_average_alone():
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


def test_every_listed_name_is_found():
    for name in names("resnet1*") + names("*:resnet1*"):
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
def test_no_name_reaches_for_a_download(name):
    """C6"""
    with pytest.raises(ConfigError, match="unknown library"):
        build(name)


@pytest.mark.parametrize("name", ["resnet18+", "resnet18+bam", "resnet18+cbam+se", "resnet18+CBAM", "+"])
def test_an_unknown_attention_is_refused(name):
    """C6"""
    with pytest.raises(ConfigError, match="unknown attention"):
        build(name)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "10", None])
def test_a_senseless_number_of_classes_is_refused(num_classes):
    with pytest.raises(InputError, match="num_classes must be a positive int"):
        build("resnet_tiny", num_classes=num_classes)


def test_arguments_are_checked_at_the_door():
    with pytest.raises(InputError, match="named by a str, got int"):
        build(18)
    with pytest.raises(ConfigError, match='"paper" or "identity", got \'zero\''):
        build("resnet_tiny", start="zero")
    with pytest.raises(AttachError):
        build("vgg11_bn+cbam")


@pytest.mark.parametrize("absent", [{"torchvision"}, {"timm"}, {"torchvision", "timm"}])
def test_an_absent_library_is_named_and_ours_work(absent, monkeypatch):
    """C5"""
    real = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] in absent:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert isinstance(build("resnet_tiny+cbam"), ResNetTiny)
    assert "resnet_tiny" in names()
    for library in absent:
        with pytest.raises(MissingExtraError, match=rf"{library} network.*pip install 'cbam\[vision\]'"):
            build(f"{library}:resnet18")
    if "torchvision" in absent:
        with pytest.raises(MissingExtraError):
            build("resnet18")


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
