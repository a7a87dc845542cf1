"""Blocks whose tail looks fusable and is not, and code that reads a value deferred in it."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbam
from cbam.surgery.route import _output_forward
from tests.surgery.tails import Branch, Shortened, unlike

pytestmark = pytest.mark.usefixtures("kernels")


class AddsToItsInput(Branch):
    """The next block, or one around it, may read the input."""

    def forward(self, x):
        x += self.bn2(self.conv2(self.relu(self.bn1(self.conv1(torch.relu(x))))))
        return torch.relu(x)


class AddsToItsInputByName(Branch):
    def forward(self, x):
        return torch.relu(x.add_(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(torch.relu(x))))))))


class SharesMemory(Branch):
    """A dropout returns its input in evaluation, and the ReLU writes to that."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        h = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.drop(h))
        aux = torch.relu_(h)
        return torch.relu(out + x), aux


class SkipsTheBranch(Branch):
    """Stochastic depth that has computed the branch already."""

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.training and torch.rand(1).item() < 0.5:
            return torch.relu(x)
        return torch.relu(out + x)


class OneNormForBoth(Branch):
    def __init__(self):
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1), self.bn2)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.downsample(x))


class KeepsTheShortcut(Shortened):
    """Keeps the shortcut in a private attribute."""

    def forward(self, x):
        self._identity = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self._identity)


class GivesTheShortcutToAChild(Shortened):
    def forward(self, x):
        self.conv1.identity = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.conv1.identity)


@pytest.mark.parametrize(
    "kind",
    [
        AddsToItsInput,
        AddsToItsInputByName,
        SharesMemory,
        SkipsTheBranch,
        OneNormForBoth,
        KeepsTheShortcut,
        GivesTheShortcutToAChild,
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values_read_outside_the_tail_equal_plain_torch(kind, training):  # T25
    torch.manual_seed(0)
    plain = unlike(nn.Sequential(nn.Conv2d(8, 8, 1), kind()))
    model = cbam.attach(copy.deepcopy(plain))
    results = []
    for net in (plain, model):
        net.train(training)
        torch.manual_seed(1)
        for seed in range(4):
            h = net[0](torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(seed)))
            out = net[1](h)
            total = sum(out) if isinstance(out, tuple) else out
            if kind is not SharesMemory:  # torch itself computes no gradient of it
                (total + h).square().mean().backward()
        buffers = [b for n, b in net.named_buffers() if "cbam" not in n]
        gradients = [p.grad for n, p in net.named_parameters() if "cbam" not in n]
        with torch.no_grad():
            h = net[0](torch.ones(2, 8, 5, 6))
            results.append([net[1](h), h, buffers, gradients])
        for kept in (*vars(net[1]).values(), *vars(net[1].conv1).values()):
            assert type(kept).__name__ not in ("Pending", "Proxy")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Checkpoints(Branch):
    """Checkpoints its norm once `habit` is set."""

    def forward(self, x):
        h = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out = checkpoint(self.bn2, h, use_reentrant=True) if self.habit else self.bn2(h)
        return self.relu(out + x)


def test_a_norm_passed_as_an_argument_is_not_deferred():  # T24
    plain = nn.Sequential(Checkpoints())
    model = cbam.attach(copy.deepcopy(plain))
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    gradients = []
    for net in (plain, model):
        net[0].habit = "now"
        net(x).square().sum().backward()
        gradients.append([p.grad for n, p in net.named_parameters() if "cbam" not in n])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


class Returns(Branch):
    """An argument decides what it returns."""

    def forward(self, x, raw=False):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if raw:
            return {"branch": out, "shortcut": [x]}
        return self.relu(out + x)


def test_a_deferred_value_is_returned_as_a_tensor():
    (block,) = cbam.attach(nn.Sequential(Returns()))
    out = block(torch.randn(2, 8, 5, 6), raw=True)
    assert type(out["branch"]) is torch.Tensor
    assert block.bn2.num_batches_tracked == 1


def test_a_monkeypatched_batch_norm_is_run(monkeypatch):
    (block,) = cbam.attach(nn.Sequential(Branch()), attention=cbam.ChannelAttention).eval()  # has no norm
    x = torch.randn(2, 8, 5, 6)
    for place, name in ((nn.BatchNorm2d, "forward"), (torch.nn.functional, "batch_norm")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *args, **_: torch.full((2, 8, 5, 6), 7.0), raising=False)
            with torch.no_grad():
                torch.testing.assert_close(block(x), torch.relu(x + 7))


def test_a_torch_function_mode_sees_the_functions_of_a_tail():
    class Doubles(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            return 2 * out if func is torch.nn.functional.batch_norm else out

    plain = unlike(Branch()).eval()
    (model,) = cbam.attach(nn.Sequential(copy.deepcopy(plain)))
    x = torch.randn(2, 8, 5, 6)
    with Doubles(), torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    with torch.device("cpu"):  # also a mode, but one that a tail may ignore
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.double(),
        lambda norm: setattr(norm, "running_mean", None),
        lambda norm: setattr(norm, "running_var", torch.ones(5)),
        lambda norm: setattr(norm, "bias", nn.Parameter(torch.ones(1))),
    ],
    ids=["dtype", "no running mean", "length of running_var", "length of bias"],
)
def test_an_invalid_norm_raises_torchs_error(change):  # T6
    plain = Branch().eval()
    model = cbam.attach(nn.Sequential(copy.deepcopy(plain)))
    for norm in (plain.bn2, model[0].bn2):
        change(norm)
    with torch.no_grad(), pytest.raises(Exception) as expected:  # noqa: PT011
        plain(torch.randn(2, 8, 5, 6))
    with torch.no_grad(), pytest.raises(expected.type, match=re.escape(str(expected.value).splitlines()[0])):
        model(torch.randn(2, 8, 5, 6))


class Switches(Branch):
    """Two norms under one name, as in domain adaptation."""

    def __init__(self):
        super().__init__()
        self.other, self.adversarial = nn.BatchNorm2d(8), False

    @property
    def norm(self):
        return getattr(self, "other" if self.adversarial else "bn2")

    def forward(self, x):
        return self.relu(self.norm(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def test_a_property_is_read_in_every_forward():
    plain = unlike(nn.Sequential(Switches())).eval()
    model = cbam.attach(copy.deepcopy(plain))
    x = torch.randn(2, 8, 5, 6)
    for adversarial in (False, True):
        plain[0].adversarial = model[0].adversarial = adversarial
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x))


def test_a_forward_replaced_after_detaching_is_analysed_again():
    class Own(Branch):
        def forward(self, x):
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

    model, x = nn.Sequential(Own()).eval(), torch.randn(2, 8, 5, 6)
    cbam.detach(cbam.attach(model))
    Own.forward = lambda self, x: self.relu(0.5 * self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(cbam.attach(model)(x), expected)


def test_an_attached_forward_keeps_its_signature():
    class Scaled(Branch):
        def forward(self, x, scale=1.0, *, shift=0.5):
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

    expected = inspect.getfullargspec(Scaled.forward)
    assert inspect.getfullargspec(type(cbam.attach(Scaled())).forward) == expected
    assert inspect.getfullargspec(_output_forward(Scaled)) == expected
    model, x = cbam.attach(Branch()).eval(), torch.randn(2, 8, 5, 6)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    torch.testing.assert_close(exported.module()(x), model(x))


def test_sites_around_an_attached_block_are_unchanged():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = AddsToItsInputByName()

        def forward(self, x):
            return x + self.block(1 * x)

    model = Outer()
    before = [(site.default, site.channels) for site in cbam.sites(model)]
    cbam.attach(model, "block")
    assert [(site.default, site.channels) for site in cbam.sites(model)] == before


def in_a_wrapper(forward):
    def run(*args, **kwargs):
        return forward(*args, **kwargs)

    return run


class Callable:
    """An object in place of a forward, whose signature cannot be read."""

    __signature__ = "none"

    def __get__(self, block, owner):
        return self if block is None else lambda x: block.conv1(x)

    def __call__(self, block, x):
        return block.conv1(x)


@pytest.mark.parametrize(
    "forward",
    [
        torch.no_grad()(lambda self, x: self.conv1(x)),
        in_a_wrapper(lambda self, x: self.conv1(x)),
        lambda *args: args[0].conv1(*args[1:]),
        lambda base, settled: base.conv1(settled),
        Callable(),
    ],
    ids=["decorated", "in a function", "starred", "other names", "an object"],
)
def test_attention_on_an_output_works_with_any_forward(forward):
    kind = type("Own", (Branch,), {"forward": forward})
    model, x = nn.Sequential(kind()).eval(), torch.randn(2, 8, 5, 6)
    expected = model[0](x)
    wide = lambda channels: nn.Hardtanh(-1e9, 1e9)  # noqa: E731
    cbam.attach(model, lambda name, _: name == "0", attention=wide, start="paper")
    assert torch.equal(model[0](x), expected)


def test_adding_in_place_to_the_input_is_not_fused():
    for kind in (AddsToItsInput, AddsToItsInputByName):
        assert "one operation" not in str(cbam.sites(kind())[0])
    assert "one operation" in str(cbam.sites(Branch())[0])
