"""Where attention belongs, by what a block's forward computes."""

import copy
import math
import pickle
import random
import re
import threading
from collections import deque
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import cbam
from cbam.errors import AttachError
from cbam.surgery import Site, attached


def conv(channels, groups=1):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=groups)


def body(channels):
    return nn.Sequential(conv(channels), nn.BatchNorm2d(channels), nn.ReLU(), conv(channels))


class Host(nn.Module):
    """A block of eight channels with the parts that the cases below need."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(8), conv(8)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.body = body(8)
        self.layers = nn.ModuleList([conv(8), conv(8)])
        self.alpha = nn.Parameter(torch.tensor(0.7))
        self.pool = nn.AdaptiveAvgPool2d(1)


class AfterTheLastChild(Host):
    def forward(self, x):
        return x + self.norm(self.b(self.act(self.a(x))))


class InPlaceAdd(Host):
    def forward(self, x, unused=math.inf):
        y = self.norm(self.b(self.act(self.a(x))))
        y += x
        return self.act(y)


class BeforeDropout(Host):
    def forward(self, x):
        y = self.b(self.act(self.a(x)))
        return x + self.drop(y.permute(0, 2, 3, 1).permute(0, 3, 1, 2))


class Scaled(Host):
    def forward(self, x):
        return torch.add(self.body(x) * self.alpha * 0.5, x)


class Projected(Host):
    def forward(self, x):
        return self.a(x) + self.body(x)


class OptionalShortcut(Host):
    def forward(self, x, shortcut=None):
        if shortcut is None:
            shortcut = x
        return shortcut + self.body(x)


class ThroughAHelper(Host):
    def forward(self, x):
        return self._join(x, self._branch(x))

    def _branch(self, x):
        return self.norm(self.b(self.act(self.a(x))))

    def _join(self, x, y):
        return F.relu(x + y)


class Inherited(AfterTheLastChild):
    pass


class ThroughSuper(AfterTheLastChild):
    def forward(self, x):
        return super().forward(x) * 1.0


class InAClosure(Host):
    def forward(self, x):
        def branch(t):
            return self.norm(self.b(self.act(self.a(t))))

        return x + branch(x)


class NormByAProperty(Host):
    """As the blocks of OpenMMLab are written."""

    def __init__(self):
        super().__init__()
        self.norm_name, self.recompute = "norm", False

    @property
    def last_norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x):
        def inner(x):
            y = self.last_norm(self.b(self.act(self.a(x))))
            y += x
            return y

        if self.recompute and x.requires_grad:
            return checkpoint(inner, x, use_reentrant=False)
        return inner(x)


class FunctionalEnd(Host):
    def forward(self, x):
        return x + F.relu(self.b(self.act(self.a(x))))


class ListOfLayers(Host):
    def forward(self, x):
        return x + self.layers[1](self.act(self.layers[0](x)))


class NameUsedElsewhere(Host):
    def forward(self, x):
        norm = self.norm
        return x + norm(self.b(self.act(self.a(x))))


class GlobalOfTheSameName(Host):
    def forward(self, x):
        return x + body_scale(self.body(x))


def body_scale(x):
    return x * 1


class FunctionsByTheirNames(Host):
    def forward(self, x):
        return x + relu(self.b(self.act(self.a(x)))) * math.sqrt(x.shape[1] / (factorial(3) + 2))


def factorial(n):
    return n if n < 3 else n * factorial(n - 1)


class ReturnsATuple(Host):
    def forward(self, x):
        return x + self.body(x), x


class ReturnsADict(Host):
    def forward(self, x):
        return {"out": x + self.body(x), "x": x}


ATTACHABLE = [
    (AfterTheLastChild, "after norm"),
    (InPlaceAdd, "after norm"),
    (BeforeDropout, "before drop"),
    (Scaled, "after body"),
    (Projected, "after body"),
    (OptionalShortcut, "after body"),
    (ThroughAHelper, "after norm"),
    (Inherited, "after norm"),
    (ThroughSuper, "after norm"),
    (InAClosure, "after norm"),
    (NormByAProperty, "after norm"),
    (FunctionalEnd, "after relu"),
    (ListOfLayers, "after layers_1"),
    (NameUsedElsewhere, "after norm"),
    (GlobalOfTheSameName, "after body"),
    (FunctionsByTheirNames, "after mul"),
    (ReturnsATuple, "after body"),
    (ReturnsADict, "after body"),
]


def first(out):
    if isinstance(out, dict):
        return out["out"]
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(("kind", "why"), ATTACHABLE)
@pytest.mark.parametrize("train", [False, True])
def test_attention_runs_once_at_the_end_of_the_branch(kind, why, train):
    block = kind().train(train)
    block.drop.p = 0.0
    (site,) = cbam.sites(block)
    assert (site.name, site.channels, site.why, site.default) == ("", 8, why, True)
    x = torch.randn(2, 8, 6, 7)
    expected = block(x)
    branches = []
    cbam.attach(block)
    hook = block.cbam.register_forward_hook(lambda m, args, out: branches.append(args[0]))
    out = block(x)
    hook.remove()
    assert torch.equal(first(out), first(expected))
    assert len(branches) == 1
    assert branches[0].shape == x.shape
    twin = pickle.loads(pickle.dumps(block))
    assert torch.equal(first(twin.eval()(x)), first(block.eval()(x)))
    with torch.no_grad():
        block.cbam.channel.fc2.bias.fill_(-100.0)  # gates shut: only the shortcut is left
    shut = first(block(x))
    shortcut = block.a(x) if kind is Projected else x
    assert torch.equal(shut, shortcut if kind not in (InPlaceAdd, ThroughAHelper) else shortcut.relu())
    assert type(cbam.detach(block)) is kind


def test_a_block_that_overwrites_its_input_is_tried_on_fresh_input_each_time():
    class OverItsInput(Host):
        def forward(self, x):
            x *= 1.5
            x += self.norm(self.b(self.act(self.a(x))))
            return x

    block = OverItsInput().eval()
    x = torch.randn(2, 8, 6, 7)
    with torch.no_grad():
        expected = block(x.clone())
        assert cbam.sites(block)[0].why == "after norm"
        assert torch.equal(cbam.attach(block)(x), expected)


def test_dropout_is_not_baked_into_a_generated_forward():
    class Functional(Host):
        def forward(self, x):
            return x + F.relu(F.dropout(self.b(self.act(self.a(x))), 0.5, self.training))

    (site,) = cbam.sites(Functional())
    assert not site.default
    assert "differs between training and evaluation" in site.why


class CountsThenInherits(AfterTheLastChild):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.factor = 1.0

    def forward(self, x):
        self.steps += 1
        return super().forward(x) * self.factor


class InheritsTwice(CountsThenInherits):
    def forward(self, x):
        return super(InheritsTwice, self).forward(x)  # noqa: UP008 - as older code writes it


@pytest.mark.parametrize("kind", [CountsThenInherits, InheritsTwice])
def test_code_around_super_forward_still_runs(kind):  # S14
    block, x = kind().eval(), torch.randn(2, 8, 6, 7)
    (site,) = cbam.sites(block)
    assert (site.why, site.route.when) == ("after norm", "after")
    with torch.no_grad():
        expected = block(x)
        cbam.attach(block)
        assert torch.equal(block(x), expected)
        assert block.steps == 2
        block.factor = 0.0
        assert torch.equal(pickle.loads(pickle.dumps(block))(x), torch.zeros_like(x))
        block.factor = 1.0
        block.cbam.channel.fc2.bias.fill_(-100.0)
        assert torch.equal(block(x), x)
    assert type(cbam.detach(block)) is kind


class ReadsASetting(Host):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return x + F.relu(self.b(self.act(self.a(x)))) * self.scale


class ReadsASettingOfItsClass(ReadsASetting):
    scale = 1.0

    def __init__(self):
        Host.__init__(self)


class ReadsASettingByAProperty(ReadsASetting):
    scale = property(lambda self: self.kept_scale)

    def __init__(self):
        Host.__init__(self)
        self.kept_scale = 1.0


class ReadsASettingByItsName(ReadsASetting):
    def forward(self, x):
        return x + F.relu(self.b(self.act(self.a(x)))) * getattr(self, "scale")  # noqa: B009


class ReadsAConfiguration(Host):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(scale=1.0)

    def forward(self, x):
        return x + F.relu(self.b(self.act(self.a(x)))) * self.config.scale


class FreezesABranch(Host):
    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        return x + F.relu(self.b(self.act(y)))


def frozen(child, x):
    with torch.no_grad():
        return child(x)


class FreezesInAFunction(Host):
    def forward(self, x):
        return x + F.relu(self.b(self.act(frozen(self.a, x))))


class Switch:
    """An object whose methods are not analysed."""

    def __call__(self, child, x):
        return frozen(child, x)


switch = Switch()


class SwitchesInAnObject(Host):
    def forward(self, x):
        return x + F.relu(self.b(self.act(switch(self.a, x))))


def wrapped(forward):
    @wraps(forward)
    def run(self, *args):
        return forward(self, *args)

    return run


class Wrapped(ReadsASetting):
    forward = wrapped(ReadsASetting.forward)


def helped(block, x):
    return block.b(block.act(block.a(x))) * block.scale


class ReadsInAHelper(ReadsASetting):
    def forward(self, x):
        return x + F.relu(helped(self, x))


class ComputesTheName(Host):
    def __init__(self):
        super().__init__()
        self.scale3 = 0.5

    def forward(self, x):
        return x + F.relu(self.b(self.act(self.a(x)))) * getattr(self, f"scale{len(self.a.kernel_size) + 1}")


class ChecksAutocast(Host):
    def forward(self, x):
        y = F.relu(self.b(self.act(self.a(x))))
        return x + (2 * y if torch.is_autocast_enabled("cpu") else y)


class Tries(Host):
    def forward(self, x):
        try:
            return x + F.relu(self.b(self.act(self.a(x))))
        except RuntimeError:
            return x


class ReadsAType(Host):
    def forward(self, x):
        return x + F.relu(self.b(self.act(self.a(x.to(next(self.parameters()).dtype)))))


class KeepsInAChild(Host):
    def forward(self, x):
        self.a.kept = F.relu(self.b(self.act(self.a(x))))
        return x + self.a.kept


class WritesToItsInput(Host):
    def forward(self, x):
        x += F.relu(self.b(self.act(self.a(x))))
        return x


class DropsItself(Host):
    def forward(self, x):
        if self.training and random.random() < 0.0:
            return x
        return x + F.relu(self.b(self.act(self.a(x))))


class Keeps(Host):
    def forward(self, x):
        self.kept = self.b(self.act(self.a(x)))
        return x + F.relu(self.kept)


class TakesASetting(Host):
    def forward(self, x, scale=1.0):
        return x + F.relu(self.b(self.act(self.a(x)))) * scale


class UsesATensorOfItsOwn(Host):
    def forward(self, x):
        return x + F.relu(self.b(self.act(self.a(x))) + torch.ones(8, 1, 1))


class NamesALayerOfAnother(Host):
    """Its norm cannot be redirected by name: the other block has one of the same name."""

    def __init__(self):
        super().__init__()
        self.other, self.twice = Host(), False

    def forward(self, x):
        y, other = self.norm(self.b(self.act(self.a(x)))), self.other
        return x + (other.norm(y) if self.twice else y)


class Counts(CountsThenInherits):
    def forward(self, x):
        self.steps += 1
        return x + F.relu(self.norm(self.b(self.act(self.a(x)))).sigmoid())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ReadsASetting, "reads self.scale, which a generated one would freeze"),
        (ReadsASettingOfItsClass, "reads self.scale"),
        (ReadsASettingByAProperty, "reads self.kept_scale"),
        (ReadsASettingByItsName, "reads self.scale"),
        (ReadsAConfiguration, "reads self.config"),
        (TakesASetting, "has a default for scale, which a generated one would freeze"),
        (UsesATensorOfItsOwn, "uses a tensor that the block does not hold"),
        (FreezesABranch, "enters a `with`, which a generated one would leave out"),
        (FreezesInAFunction, "enters a `with`"),
        (SwitchesInAnObject, "switches gradients or autocast"),
        (Wrapped, "reads self.scale"),
        (ReadsInAHelper, "reads self.scale"),
        (ComputesTheName, "reads self.scale3"),
        (ChecksAutocast, "calls is_autocast_enabled"),
        (Tries, "has a `try`"),
        (ReadsAType, "reads torch.float32 of a tensor"),
        (KeepsInAChild, "changes self.a.kept"),
        (DropsItself, "draws random numbers"),
        (Keeps, "changes self.kept"),
        (NamesALayerOfAnother, "reads self.twice"),
        (Counts, "changes self.steps"),
    ],
)
def test_a_forward_that_cannot_be_generated_faithfully_is_refused(kind, words):  # S14, S16
    (site,) = cbam.sites(kind())
    assert not site.default
    assert words in site.why


def test_a_generated_forward_overwrites_its_input_likewise():
    plain, x = nn.Sequential(WritesToItsInput()).eval(), torch.randn(2, 8, 5, 5)
    model = cbam.attach(copy.deepcopy(plain))
    assert type(model[0])._cbam_route.when == "graph"
    results = []
    for net in (plain, model):
        given = x.clone()
        with torch.no_grad():
            results.append((net(given), given))
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], x)
    assert torch.equal(results[0][0], results[1][0])


HALF = torch.tensor(0.5, dtype=torch.float64)


class AddsATensorOfItsOwn(Host):
    def forward(self, x):
        return x + self.norm(self.b(self.act(self.a(x) + torch.ones(8, 1, 1)))) * HALF


def test_a_tensor_created_in_the_forward_is_no_obstacle():  # S14, S16
    block, x = AddsATensorOfItsOwn().eval(), torch.randn(2, 8, 6, 7)
    before = [*vars(block)]
    with torch.no_grad():
        expected = block(x)
        (site,) = cbam.sites(block)
        assert (site.why, site.default) == ("after norm", True)
        assert torch.equal(cbam.attach(block)(x), expected)
    assert [*vars(cbam.detach(block))] == before
    with torch.device("meta"):
        assert [s.why for s in cbam.sites(AddsATensorOfItsOwn())] == ["after norm"]


class SplitNorm(Host):
    """Trains with a separate norm, as AdvProp does for adversarial images."""

    def __init__(self):
        super().__init__()
        self.aux = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.b(self.act(self.a(x)))
        return x + (self.aux(y) if self.training else self.norm(y))


class StochasticDepth(Host):
    def forward(self, x):
        if self.training and random.random() < 0.8:
            return x
        return x + self.norm(self.b(self.act(self.a(x))))


def test_a_block_with_another_path_in_training_is_refused():  # S20
    (site,) = cbam.sites(SplitNorm())
    assert not site.default
    assert "after norm runs 0 times in training" in site.why


def test_stochastic_depth_still_skips_the_branch():
    block, x = cbam.attach(StochasticDepth()), torch.randn(2, 8, 6, 7)
    assert [s.why for s in cbam.sites(block)] == ["after norm"]
    random.seed(0)
    assert sum(torch.equal(block(x), x) for _ in range(40)) in range(20, 40)


def test_a_block_that_checks_its_class_is_refused():
    class Exact(Host):
        def forward(self, x):
            assert type(self) is Exact, "no Exact"
            return x + self.norm(self.b(F.dropout(self.act(self.a(x)), 0.1, self.training)))

    (site,) = cbam.sites(Exact())
    assert "after norm makes the forward fail: no Exact" in site.why


class ByAStaticMethod(Host):
    def forward(self, x):
        return x + self.branch(self, x)

    @staticmethod
    def branch(block, x):
        return block.norm(block.b(block.act(block.a(x))))


def test_a_static_method_is_not_redirected():
    (site,) = cbam.sites(ByAStaticMethod())
    assert (site.why, site.default, site.route.when) == ("after norm", True, "graph")


class Linear(Host):
    def forward(self, x):
        return F.relu(x + self.norm(self.a(x)))


class Parallel(Host):
    def forward(self, x):
        return self.body(x) + self.b(self.act(self.a(x)))


class Partial(Host):
    def forward(self, x):
        y = self.body(x)
        return torch.cat([x[:, :4] + y[:, :4], y[:, 4:]], 1)


class Cell(Host):
    def forward(self, x):
        return torch.cat([self.a(x) + self.b(x), self.body(x) + self.a(x)], 1)


class Gate(Host):
    def forward(self, x):
        return x + self.b(self.act(self.a(self.pool(x))))


class NHWC(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU()
        self.conv = conv(8, groups=8)

    def forward(self, x):
        y = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.act(self.linear(y))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.act = nn.LayerNorm(8), nn.Conv1d(8, 8, 1), nn.GELU()

    def forward(self, x):
        return x + self.act(self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2))


class TwoAdds(Host):
    def forward(self, x):
        x = x + self.b(self.act(self.a(x)))
        return x + self.body(x)


class SelfAttention(Host):
    def forward(self, x):
        q = self.a(x).flatten(2)
        mixed = torch.softmax(q @ q.transpose(1, 2), -1) @ q
        return x + self.b(mixed.view_as(x))


class DataDependent(Host):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return x + self.body(x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Linear, "linear branch"),
        (Parallel, "parallel sum"),
        (Partial, "partial residual"),
        (Cell, "a cell"),
        (Gate, "broadcast"),
        (NHWC, r"channels-last \(N, H, W, C\)"),
        (Tokens, "tokens|channels-last"),
        (SelfAttention, "multiplies matrices"),
        (DataDependent, "cannot be traced"),
    ],
)
def test_a_block_left_out_is_listed_with_its_reason(kind, words):
    model = nn.Sequential(kind())
    (site,) = cbam.sites(model)
    assert site.name == "0"
    assert not site.default
    assert re.search(words, site.why)
    with pytest.raises(cbam.CBAMError, match="no place for attention"):
        cbam.attach(model)
    assert not attached(model)


def test_a_block_that_adds_nothing_is_not_listed():
    class Concatenates(Host):
        def forward(self, x):
            return torch.cat([x, self.body(x)], 1)

    assert cbam.sites(nn.Sequential(Concatenates())) == []


def test_an_error_without_a_message_is_reported_by_class():
    class Mute(Host):
        def forward(self, x):
            if not isinstance(x, torch.Tensor) or self.a(x).mean() > 0:
                raise ValueError
            return x + self.body(x)

    assert str(*cbam.sites(Mute())) == "(the model): left out, cannot be traced: ValueError"


def test_the_last_of_two_adds_is_taken_and_the_other_listed():
    block = TwoAdds()
    taken, other = sorted(cbam.sites(block), key=lambda s: not s.default)
    assert (taken.why, taken.default) == ("after body", True)
    assert (other.why, other.default) == ("a second add in one block", False)


def test_a_linear_branch_is_taken_if_it_is_named():
    model = nn.Sequential(Linear()).eval()
    x = torch.randn(2, 8, 6, 7)
    expected = model(x)
    cbam.attach(model, "0")
    assert torch.equal(model(x), expected)
    assert list(attached(model)) == ["0"]


def test_a_parallel_sum_is_refused_even_if_it_is_named():
    model = nn.Sequential(Parallel())
    with pytest.raises(cbam.CBAMError, match="cannot go into 0: parallel sum"):
        cbam.attach(model, "0")


def test_a_residual_class_without_its_shortcut_is_listed():
    class Inverted(Host):
        def __init__(self, skip):
            super().__init__()
            self.skip = skip

        def forward(self, x):
            return x + self.body(x) if self.skip else self.body(x)

    first, second = cbam.sites(nn.Sequential(Inverted(True), Inverted(False)))
    assert first.default
    assert (second.name, second.why, second.default) == ("1", "no skip connection", False)


def test_nested_blocks_get_one_attention_each():  # S13
    class Group(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.tail = nn.Sequential(AfterTheLastChild(), InPlaceAdd()), conv(8)

        def forward(self, x):
            return x + self.tail(self.inner(x))

    model, x = Group().eval(), torch.randn(1, 8, 6, 7)
    expected = model(x)
    assert [s.name for s in cbam.sites(model)] == ["", "inner.0", "inner.1"]
    cbam.attach(model)
    assert torch.equal(model(x), expected)
    assert len(attached(model)) == 3


def block_of(dim):
    """A residual block on maps of `dim` spatial dimensions."""
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[
        dim - 1
    ]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = conv(8, 8, 3, padding=1), conv(8, 8, 3, padding=1)
            self.norm, self.act = norm(8), nn.ReLU()

        def forward(self, x):
            return self.act(x + self.norm(self.conv2(self.act(self.conv1(x)))))

    return Block().eval()


@pytest.mark.parametrize(
    "attention", [cbam.CBAM, cbam.nn.squeeze_excitation, partial(cbam.CBAM, kernel_size=3)]
)
def test_signals_images_and_volumes_get_attention_of_their_dimensions(attention):
    for dim in (1, 2, 3):
        model = nn.Sequential(block_of(dim), block_of(dim)).eval()
        x = torch.randn(2, 8, *(6, 5, 4)[:dim])
        expected, keys = model(x), list(model.state_dict())
        assert [s.dims for s in cbam.sites(model)] == [dim + 2] * 2
        cbam.attach(model, attention=attention)
        assert torch.equal(model(x), expected)
        parts = attached(model).values()
        assert len(parts) == 2
        assert all(m.dim == dim for part in parts for m in part.modules() if hasattr(m, "dim"))
        for part in parts:
            part.reset_parameters()
        nn.init.ones_(
            next(p for part in parts for name, p in part.named_parameters() if name.endswith("fc2.bias"))
        )
        assert not torch.equal(model(x), expected)
        cbam.detach(model)
        assert torch.equal(model(x), expected)
        assert list(model.state_dict()) == keys


@pytest.mark.parametrize("dim", [1, 3])
def test_attention_for_images_only_is_refused_in_other_dimensions(dim):
    block = block_of(dim)
    before = {k: v.clone() for k, v in block.state_dict().items()}
    for attention in (lambda channels: cbam.CBAM(channels), cbam.nn.ECA):
        with pytest.raises(cbam.CBAMError, match=f"{dim + 2}-D map"):
            cbam.attach(block, attention=attention)
    assert block.state_dict().keys() == before.keys()


def test_weights_of_signals_have_no_released_form():
    model = cbam.attach(nn.Sequential(block_of(1)))
    with pytest.raises(cbam.CBAMError, match="dim=1, and released weights are for images"):
        cbam.convert_state_dict(model)


def test_a_two_input_block_gets_attention_after_its_last_layer():
    class Conditional(Host):
        def forward(self, x, embedding):
            y = self.act(self.a(x) + embedding[:, :, None, None])
            return x + self.norm(self.b(y))

    block, x, e = Conditional().eval(), torch.randn(2, 8, 6, 7), torch.randn(2, 8)
    expected = block(x, e)
    (site,) = cbam.sites(block)
    assert site.why == "after norm (not run: its forward needs 2 inputs)"
    cbam.attach(block)
    assert torch.equal(block(x, e), expected)
    with torch.no_grad():
        block.cbam.channel.fc2.bias.fill_(-100.0)
    assert torch.equal(block(x, e), x)


def test_a_two_input_block_with_an_instance_forward_is_refused():
    class Conditional(Host):
        def forward(self, x, embedding):
            return x + self.norm(self.b(self.act(self.a(x) + embedding[:, :, None, None])))

    block = Conditional()
    block.forward = partial(Conditional.forward, block)
    (site,) = cbam.sites(block)
    assert site.why == "has a forward assigned to the instance, which cannot be redirected"
    assert not site.default


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_default_dtype_and_device_is_respected(dtype):
    class AddsOne(nn.Module):
        def forward(self, x):
            return x + torch.ones(8, 1, 1)

    block, before = AfterTheLastChild().eval(), torch.get_default_dtype()
    block.act = AddsOne()
    block.norm = nn.GELU()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            (site,) = cbam.sites(block)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)
    assert str(site) == "(the model): free, 8 channels, after norm"


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "how", [nn.utils.weight_norm, partial(prune.l1_unstructured, name="weight", amount=0.5)]
)
def test_pruned_and_weight_normed_blocks_get_attention(how):  # S12
    class EndsInANorm(Host):
        def forward(self, x):
            return x + self.group(self.b(self.act(self.a(x))))

    block, x = EndsInANorm(), torch.randn(2, 8, 6, 7)
    block.group = nn.GroupNorm(2, 8)
    how(block.a)
    expected = block(x)
    assert str(*cbam.sites(block)) == "(the model): free, 8 channels, after group"
    assert torch.equal(cbam.attach(block)(x), expected)
    assert str(*cbam.sites(block)) == "(the model): attached, 8 channels, after group"


def test_an_attached_site_is_marked():
    block = AfterTheLastChild()
    cbam.attach(block)
    (site,) = cbam.sites(block)
    assert (site.attached, site.why) == (True, "after norm")
    assert str(site) == "(the model): attached, 8 channels, after norm"


def test_a_site_of_unknown_width_shows_no_number():
    assert str(Site("stage1", None, "no skip connection")) == "stage1: left out, no skip connection"


def test_hooks_do_not_stop_the_trial_of_a_block():
    block = AfterTheLastChild()
    block.a.register_full_backward_hook(lambda *a: None)
    block.register_forward_pre_hook(lambda m, args, kwargs: None, with_kwargs=True)
    (site,) = cbam.sites(block)
    assert site.default


def test_an_uncopyable_block_gets_attention_after_its_last_layer():
    block = AfterTheLastChild().eval()
    block.lock = threading.Lock()
    (site,) = cbam.sites(block)
    assert site.default
    assert site.why.startswith("after norm (not run: cannot be copied")
    x = torch.randn(1, 8, 6, 7)
    expected = block(x)
    cbam.attach(block)
    assert torch.equal(block(x), expected)
    assert [s.attached for s in cbam.sites(block)] == [True]


class Remembering(Host):
    """Keeps what it computes: in a dict, in a list and as attributes."""

    def __init__(self):
        super().__init__()
        self.seen, self.means, self.last = {}, [], None

    def forward(self, x):
        y = self.norm(self.b(self.act(self.a(x))))
        key = str(x.device)
        if key not in self.seen:
            self.seen[key] = y.mean()
        self.means.append(self.seen[key])
        self.last = self.newest = y
        return x + self.drop(y * self.seen[key].sign().abs())


def test_tracing_leaves_nothing_in_a_blocks_attributes():
    """S16: a cache that a trace had filled would poison the next run (timm's LeViT keeps its biases so)."""
    block, x = Remembering().eval(), torch.randn(1, 8, 6, 7)
    names = list(vars(block))
    kept = block.seen, block.means
    first = [str(s) for s in cbam.sites(block)]
    assert block.seen == {}
    assert block.means == []
    assert block.last is None
    assert list(vars(block)) == names
    assert (block.seen, block.means) == kept
    assert block.seen is kept[0]
    assert [str(s) for s in cbam.sites(block)] == first
    with torch.no_grad():
        expected = block(x)
        cbam.attach(block)
        assert torch.equal(block(x), expected)
    pickle.dumps(cbam.detach(block))


class RememberingInside(Host):
    """Keeps what it computes in a deque, and in a list inside a dict inside a tuple."""

    def __init__(self):
        super().__init__()
        self.recent, self.tables = deque(maxlen=2), ({"means": []},)

    def forward(self, x):
        y = self.norm(self.b(self.act(self.a(x))))
        self.recent.append(y)
        self.tables[0]["means"].append(y.mean())
        return x + y


def test_tracing_leaves_nothing_in_a_blocks_containers():  # S16
    block = RememberingInside().eval()
    block.recent.append("mine")
    means = block.tables[0]["means"]
    assert [s.why for s in cbam.sites(block)] == ["after norm"]
    assert block.recent == deque(["mine"], maxlen=2)
    assert block.tables[0]["means"] is means
    assert means == []


class Counting(Host):
    """Counts in a buffer, and draws random numbers that it does not use."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        torch.rand(()), random.random(), np.random.rand()
        return x + self.norm(self.b(self.act(self.a(x))))


def test_listing_sites_changes_no_buffer_and_no_random_state():  # S16
    net = nn.Sequential(conv(8), Counting())
    buffer = net[1].steps
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    assert [s.why for s in cbam.sites(net)] == ["after norm"]
    with pytest.raises(AttachError, match="pool is not called"):
        cbam.attach(net, "1.pool")
    assert net[1].steps is buffer
    assert buffer == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[2]) == states[1:]


class Appending(nn.Module):
    """Appends what it computes to the list that it is given, as timm's VoVNet does."""

    def __init__(self):
        super().__init__()
        self.conv = body(8)

    def forward(self, x, seen):
        seen.append(self.conv(x))
        return torch.cat(seen, 1)


class GivesAList(Host):
    def __init__(self):
        super().__init__()
        self.middle, self.end = Appending(), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        seen = [x]
        return self.end(self.middle(x, seen)) + seen[0]


class FillsADict(nn.Module):
    def forward(self, x, notes):
        notes["twice"] = x + x
        return x


class GivesADict(Host):
    """Its traced forward passes a dict that cannot be modified."""

    def __init__(self):
        super().__init__()
        self.taker = FillsADict()

    def forward(self, x):
        return x + self.norm(self.b(self.act(self.a(self.taker(x, {"once": x})))))


def test_a_child_may_append_to_a_list_argument():
    block, x = GivesAList().eval(), torch.randn(1, 8, 6, 7)
    (site,) = cbam.sites(block)
    assert (site.why, site.channels, site.default) == ("after end", 8, True)
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(cbam.attach(block)(x), expected)


def test_a_graph_that_does_not_run_is_left_out_with_a_reason():
    (site,) = cbam.sites(GivesADict())
    assert not site.default
    assert site.why.startswith("its traced forward does not run")
