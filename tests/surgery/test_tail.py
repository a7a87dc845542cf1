"""Blocks whose end runs as one operation: which ones, and that they still compute the same."""

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

import cbam
from cbam import ops
from cbam.surgery import attached
from tests.surgery.tails import Branch, network

pytestmark = pytest.mark.usefixtures("kernels")
TAILS = {
    "torchvision/resnet18": 8,
    "torchvision/resnet50": 5,
    "torchvision/resnext50_32x4d": 5,
    "timm/resnet18": 8,
    "timm/resnet26d": 5,
    "timm/seresnet18": 0,  # its own SE stands between the norm and the add
    "timm/resnetv2_50": 0,  # pre-activation
    "torchvision/mobilenet_v2": 0,  # no ReLU after the add
    "timm/resnet50_gn": 0,  # no BatchNorm
    "timm/convnext_atto": 0,
}


@pytest.fixture
def runs(monkeypatch):
    """Whether each run of the fused operator had a norm and a ReLU."""
    counted = []
    run = ops.tail

    def tail(*args, **parts):
        counted.append(bool(parts.get("norm") and parts.get("relu")))
        return run(*args, **parts)

    monkeypatch.setattr(ops, "tail", tail)
    return counted


@pytest.mark.parametrize("name", TAILS)
def test_norm_add_and_relu_at_the_end_run_as_one_operation(name, runs):
    model = network(name).eval()
    cbam.attach(model)
    runs.clear()  # attaching has tried each attention
    model(torch.randn(1, 3, 64, 64))
    assert len(runs) == len(attached(model))
    assert sum(runs) == TAILS[name]
    assert sum("one operation" in str(site) for site in cbam.sites(model)) == TAILS[name]


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet26d"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_step_equals_that_of_the_equation(name, training):
    model = cbam.attach(network(name).double(), start="paper").train(training)
    other, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with ops.using("fused"):
        out = model(x)
    with ops.using("reference"):
        expected = other(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in ((model.parameters, other.parameters), (model.buffers, other.buffers)):
        for a, b in zip(ours(), theirs(), strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


def test_can_be_pickled_copied_and_detached():
    model = network("torchvision/resnet18").eval()
    x = torch.randn(1, 3, 64, 64)
    plain, keys = model(x), list(model.state_dict())
    cbam.attach(model, start="paper")
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    cbam.detach(model)
    assert torch.equal(model(x), plain)
    assert list(model.state_dict()) == keys
    assert type(model.layer1[0]) is resnet.BasicBlock


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "relu", nn.SiLU()),
        lambda block: setattr(block, "relu", nn.Identity()),
        lambda block: setattr(block, "bn2", nn.GroupNorm(2, 64)),
        lambda block: setattr(block, "bn2", nn.Identity()),
        lambda block: block.relu.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    ],
    ids=["silu", "no activation", "group norm", "no norm", "hook"],
)
def test_a_change_to_a_block_after_attaching_takes_effect(change):
    (block,) = cbam.attach(nn.Sequential(resnet.BasicBlock(64, 64)), start="paper").eval()
    x = torch.randn(1, 64, 8, 8)
    change(block)
    with ops.using("reference"):
        expected = block(x)
    out = block(x)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, expected)


class Plain(nn.Module):
    """A block whose subclasses do something unusual between the last norm and the last ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def branch(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Checkpointed(Plain):
    def inner(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x

    def forward(self, x):
        out = checkpoint(self.inner, x, use_reentrant=True) if self.training else self.inner(x)
        return self.relu(out)


class CheckpointedLater(Plain):
    with_cp = False  # as mmcv's blocks have it

    def forward(self, x):
        def inner(x):
            return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x

        again = self.with_cp and x.requires_grad
        return self.relu(checkpoint(inner, x, use_reentrant=True) if again else inner(x))


class Frozen(Plain):
    def forward(self, x):
        with torch.no_grad():
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + x)


class FrozenByACall(Plain):
    def forward(self, x):
        torch.set_grad_enabled(False)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        torch.set_grad_enabled(True)
        return self.relu(out + x)


class Keeps(Plain):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out + x
        self.kept = [out]
        return self.relu(out)


class Penalised(Plain):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x
        y = self.relu(out)
        if self.training:
            self.kept = [out.abs()]
        return y


class ClearsTheShortcut(Plain):
    def forward(self, x):
        shortcut = 2 * x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + shortcut
        shortcut.zero_()
        return self.relu(out)


class ClearsTheMap(Plain):
    def forward(self, x):
        inner = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(inner) + x
        if not self.training:  # in training the norm's backward reads it
            inner.zero_()
        return self.relu(out)


class ByKeyword(Plain):
    def forward(self, x):
        return torch.relu(input=self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Asks(Plain):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x
        return self.relu(out) if not getattr(self, "asks", False) else self.relu(out * (out > 0.1))


class Surrogate(torch.autograd.Function):
    """Straight-through estimator of a quantised network: rounds, and passes the gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(torch.clamp(x, 0, 4) * 4) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class Quantised(nn.Module):
    def forward(self, x):
        return Surrogate.apply(x)


def guided(model):
    """Guided backpropagation: only positive gradients pass."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_full_backward_hook(lambda m, grads, out: (grads[0].clamp(min=0),))


def kept_inputs(model):
    """As overhaul distillation does: keep the value before each ReLU."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda m, args: vars(m).__setitem__("before", args[0]))


def quantised(model):
    for module in model.modules():
        if isinstance(module, Plain):
            module.relu = Quantised()


WAYS = {
    "checkpointed": (Checkpointed, None),
    "checkpointed later": (CheckpointedLater, lambda model: setattr(model[1], "with_cp", True)),
    "frozen": (Frozen, None),
    "frozen by a call": (FrozenByACall, None),
    "kept": (Keeps, None),
    "read again in training": (Penalised, None),
    "shortcut written over": (ClearsTheShortcut, None),
    "the norm's input written over": (ClearsTheMap, None),
    "by keyword": (ByKeyword, None),
    "compared": (Asks, lambda model: setattr(model[1], "asks", True)),
    "guided backpropagation": (resnet.BasicBlock, guided),
    "a kept input of the ReLU": (resnet.BasicBlock, kept_inputs),
    "another activation": (Asks, quantised),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_block_with_an_unusual_tail_trains_as_the_equation_does(way):  # S12 T25
    make, change = WAYS[way]
    torch.manual_seed(0)
    block = make(8, 8) if make is resnet.BasicBlock else make()
    model = cbam.attach(nn.Sequential(nn.Conv2d(3, 8, 3), block).double(), start="paper").train()
    if change:
        change(model)
    other, x = copy.deepcopy(model), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    results = []
    for net, how in ((model, "fused"), (other, "reference")):
        with ops.using(how):
            out = net(x)
            for module in (net[1], net[1].relu):
                for value in [*getattr(module, "kept", []), *vars(module).get("before", torch.empty(0))]:
                    out = out + value.mean()
            (out + 0).square().sum().backward()
        with torch.no_grad(), ops.using(how):
            results.append((out, net.eval()(x)))
    torch.testing.assert_close(results[0], results[1])
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_sync_batchnorm_is_not_fused(runs):  # S12
    model = cbam.attach(network("torchvision/resnet18"), start="paper").eval()
    expected = model(torch.ones(1, 3, 64, 64))
    runs.clear()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(model(torch.ones(1, 3, 64, 64)), expected)
    assert not any(runs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_identity_start_keeps_the_output(dtype, layout):
    model = network("torchvision/resnet18").to(dtype).to(memory_format=layout).eval()
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    x = torch.randn(2, 3, 64, 64).to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = model(x)
        out = cbam.attach(model)(x)
        with ops.using("reference"):
            assert torch.equal(model(x), expected)
    if dtype.itemsize >= 4:  # in evaluation BatchNorm is computed in torch's own order
        assert torch.equal(out, expected)
    else:  # torch rounds after the norm and after the add, the operation once
        scale = expected.abs().max().item()
        torch.testing.assert_close(out, expected, rtol=0, atol=scale * 8 * torch.finfo(dtype).eps)


@pytest.mark.large
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_code_that_changes_the_layout_is_right(training):  # T33
    """inductor computes convolutions in channels_last, and leaves the maps of our operator in it."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Branch(), Branch(), nn.Conv2d(8, 4, 1))
    model = cbam.attach(model, start="paper").train(training)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    other, x = copy.deepcopy(model), torch.randn(2, 3, 20, 18)
    compiled = torch.compile(model, dynamic=False)
    for _ in range(2):
        out, expected = compiled(x), other(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        out.square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item() + 1e-4
            )
    torch._dynamo.reset()
