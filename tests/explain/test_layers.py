import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbam
from cbam.errors import InputError
from cbam.explain import gradcam
from cbam.explain.layers import LayerSpec, default_layer

pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")


def test_the_default_layer_is_the_last_block_output_of_the_trunk(build, images):
    assert default_layer(build(), images).name == "stage2"
    torchvision = pytest.importorskip("torchvision")
    picture = torch.randn(1, 3, 64, 64)
    assert default_layer(torchvision.models.resnet18(), picture).name == "layer4"
    assert (
        default_layer(torchvision.models.resnet18(), picture[..., :32, :32]).name == "layer3"
    )  # layer4 gives one pixel
    assert default_layer(torchvision.models.vgg11(), picture).name == "features"
    assert default_layer(torchvision.models.mobilenet_v3_small(), picture).name == "features"


@pytest.mark.parametrize("size", [(1, 200), (16, 128), (128, 16), (33, 31)])
def test_a_map_of_a_single_row_or_column_is_a_map(size):
    """An image twice as high as 16 pixels still has one row of 32."""
    model = pytest.importorskip("torchvision").models.resnet18().eval()
    picture = torch.randn(1, 3, *size)
    assert default_layer(model, picture) == LayerSpec("layer4")
    assert torch.equal(gradcam(model, picture, 0), gradcam(model, picture, 0, "layer4"))


def test_the_default_layer_of_timm_networks_is_the_end_of_their_trunk():
    timm = pytest.importorskip("timm")
    picture = torch.randn(1, 3, 64, 64)
    assert default_layer(timm.create_model("resnet10t"), picture).name == "layer4"
    assert default_layer(timm.create_model("test_convnext"), picture).name in (
        "stages",
        "norm_pre",
        "stages.3",
    )
    assert default_layer(timm.create_model("test_efficientnet"), picture).name.startswith(
        ("bn2", "conv_head")
    )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_default_layer_and_its_maps_are_those_of_the_plain_network_after_attaching(name):
    torchvision = pytest.importorskip("torchvision")
    model, picture = torchvision.models.get_model(name).eval(), torch.rand(1, 3, 64, 64)
    layer, maps = default_layer(model, picture).name, gradcam(model, picture, 7)
    cbam.attach(model)
    assert default_layer(model, picture).name == layer
    assert torch.equal(gradcam(model, picture, 7), maps)


class Tokens(nn.Module):
    """A small ViT: patches, attention in which `keys` gives (N, heads, T, dim), the mean of the tokens."""

    def __init__(self, size=None) -> None:
        super().__init__()
        self.patches, self.size = nn.Conv2d(3, 8, 4, stride=4), size
        self.keys, self.weights = nn.LayerNorm(4), nn.Identity()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        if self.size not in (None, tuple(x.shape[2:])):
            raise ValueError(f"takes {self.size} alone")
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        heads = tokens.unflatten(2, (2, 4)).transpose(1, 2)
        weights = self.weights((heads @ self.keys(heads).transpose(2, 3)).softmax(3))
        return self.head(self.norm((weights @ heads).transpose(1, 2).flatten(2)).mean(1))


@pytest.mark.parametrize("size", [None, (32, 24)])
def test_heads_and_tokens_of_a_transformer_are_no_map(images, size):
    model = Tokens(size).eval()
    with pytest.raises(InputError, match=r"continues with tokens .*'norm' returns \(1, 48, 8\).*'patches'"):
        gradcam(model, images)
    for layer in ("keys", "weights"):
        with pytest.raises(InputError, match=f"'{layer}' must return a feature map .* got shape"):
            gradcam(model, images, 0, layer)
    assert gradcam(model, images, 0, "patches").shape == (4, 32, 24)


class ChannelsLast(nn.Module):
    """A trunk that gives (N, h, w, C), as that of Swin does."""

    def __init__(self, size=None) -> None:
        super().__init__()
        self.down, self.size = nn.Conv2d(3, 8, 4, stride=4), size
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        if self.size not in (None, tuple(x.shape[2:])):
            raise ValueError(f"takes {self.size} alone")
        return self.head(self.norm(self.down(x).permute(0, 2, 3, 1)).relu_().mean((1, 2)))


@pytest.mark.parametrize("size", [None, (32, 24)])
@pytest.mark.parametrize("layer", [None, "norm"])
def test_a_map_whose_channels_come_last_is_weighed_over_its_channels(images, size, layer):
    model = ChannelsLast(size).eval()
    assert default_layer(model, images[:1]) == LayerSpec("norm", channels_last=True)
    features = model.norm(model.down(images).permute(0, 2, 3, 1)).detach().requires_grad_()
    scores = model.head(features.relu().mean((1, 2)))
    (gradient,) = torch.autograd.grad(scores[:, 3].sum(), features)
    raw = (gradient.mean((1, 2), keepdim=True) * features).sum(3).relu().detach()
    unit = torch.stack([(one - one.min()) / (one.max() - one.min()) for one in raw])
    expected = F.interpolate(unit[:, None], (32, 24), mode="bilinear")[:, 0]
    torch.testing.assert_close(gradcam(model, images, 3, layer), expected)
    assert gradcam(model, images, 3, layer, "scorecam").shape == (4, 32, 24)


def test_a_model_that_brings_images_to_a_size_of_its_own_is_explained(build, images):
    net = build()
    model = nn.Sequential(nn.Upsample((48, 48)), net)
    assert default_layer(model, images[:1]).name == "1.stage2"
    larger = F.interpolate(images, (48, 48))
    raw = gradcam(net, larger, 0)
    assert gradcam(model, images, 0).shape == (4, 32, 24)
    assert (F.interpolate(raw[:, None], (32, 24))[:, 0] - gradcam(model, images, 0)).abs().mean() < 0.05
