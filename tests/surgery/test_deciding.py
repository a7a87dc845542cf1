"""Blocks whose forward branches on its input: its shape, whether it needs gradients, other arguments."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbam
from cbam.surgery import attached


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


class Host(nn.Module):
    """A block of eight channels with the parts that the cases below need."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = conv(8), conv(8), nn.ReLU()
        self.norm = nn.BatchNorm2d(8)
        self.layers = nn.ModuleList([conv(8)])
        self.plus = Plus()

    def branch(self, x):
        return self.norm(self.b(self.act(self.a(x))))


class Plus(nn.Module):
    def forward(self, x, y):
        return torch.add(x, y)


class ComparesShapes(Host):
    def forward(self, x):
        y = self.branch(x)
        return self.act(y + x if x.shape == y.shape else y)


class CountsDimensions(Host):
    def forward(self, x):
        if x.dim() == 3:
            x = x[None]
        assert len(x.shape) == 4, "an image"
        return x + self.branch(x)


class CropsTheShortcut(Host):
    """As the units of audio codecs are written, whose convolutions have no padding."""

    def forward(self, x):
        y = self.branch(x)
        spare = (x.shape[-1] - y.shape[-1]) // 2
        if spare > 0:
            x = x[..., spare:-spare]
        return x + y


class Recomputes(Host):
    """As the blocks of OpenMMLab with `with_cp=True`."""

    def forward(self, x):
        def inner(x):
            return self.branch(x) + x

        y = checkpoint(inner, x, use_reentrant=False) if x.requires_grad else inner(x)
        return self.act(y)


class TakesSpareArguments(Host):
    """As the residual blocks of diffusers, which warn about the removed argument `scale`."""

    def forward(self, x, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale") is not None:
            raise TypeError("scale")
        return x + self.branch(x)


class AddsInAChild(Host):
    def forward(self, x):
        return self.act(self.plus(self.branch(x), x))


@pytest.mark.parametrize(
    ("kind", "ends_in_relu"),
    [
        (ComparesShapes, True),
        (CountsDimensions, False),
        (CropsTheShortcut, False),
        (Recomputes, True),
        (TakesSpareArguments, False),
        (AddsInAChild, True),
    ],
)
def test_a_block_that_inspects_its_input_gets_attention_and_keeps_its_output(kind, ends_in_relu):
    block = kind().eval()
    x = torch.randn(2, 8, 9, 7)
    expected = block(x)
    (site,) = cbam.sites(block)
    assert (site.channels, site.why, site.default) == (8, "after norm", True)
    cbam.attach(block)
    assert torch.equal(block(x), expected)
    block.train()(x.clone().requires_grad_()).square().mean().backward()
    assert block.cbam.channel.fc2.weight.grad.abs().sum() > 0
    with torch.no_grad():
        block.cbam.channel.fc2.bias.fill_(-100.0)  # gates shut: only the shortcut is left
    assert torch.equal(block.eval()(x), x.relu() if ends_in_relu else x)
    assert type(cbam.detach(block)) is kind


class BranchesOnValues(Host):
    def forward(self, x):
        return x if x.sum() > 1e9 else x + self.branch(x)


def test_a_block_that_branches_on_values_is_left_out():
    (site,) = cbam.sites(BranchesOnValues())
    assert str(site) == "(the model): left out, cannot be traced: it branches on its input"


class BranchesInTraining(Host):
    """No child can be redirected, and the forward to generate from has two paths."""

    def forward(self, x):
        y = self.layers[0](self.act(self.a(x)))
        if self.training and y.mean() > 1e9:
            y = y * 2
        return x + y


def test_a_block_untraceable_in_training_is_left_out_with_a_reason():
    model = nn.Sequential(BranchesInTraining(), ComparesShapes())
    left_out, taken = cbam.sites(model)
    assert "cannot be traced in training: it branches on its input" in left_out.why
    assert taken.default
    assert list(attached(cbam.attach(model))) == ["1"]


class ListOfLayersOfAnySize(Host):
    def forward(self, x):
        y = self.layers[0](self.act(self.a(x)))
        return x + y if x.shape == y.shape else y


def test_no_forward_is_generated_for_a_branching_block():
    (site,) = cbam.sites(ListOfLayersOfAnySize())
    assert not site.default
    assert "cannot be traced in evaluation: it branches on its input" in site.why


class AddsInAChildAfterAList(Host):
    def forward(self, x):
        return self.plus(self.layers[0](self.act(self.a(x))), x)


def test_no_forward_is_generated_if_a_child_does_the_add():
    (site,) = cbam.sites(AddsInAChildAfterAList())
    assert not site.default
    assert "adds in self.plus, which a generated one would leave out" in site.why


class NamedLikeAnAdd(Host):
    def __init__(self):
        super().__init__()
        self.add = nn.Bilinear(8, 8, 8)

    def forward(self, x):
        return self.add(self.branch(x), x)


def test_a_child_named_add_is_not_an_addition():
    assert cbam.sites(NamedLikeAnAdd()) == []


def test_a_branching_block_gets_no_fused_tail():
    (site,) = cbam.sites(ComparesShapes())
    assert site.route is not None
    assert not site.route.tail
