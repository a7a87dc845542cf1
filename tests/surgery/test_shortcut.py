"""In inference the norm at the end of a shortcut joins the fused tail of its block."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import cbam
from cbam import ops
from tests.surgery.tails import Shortened, network, unlike

pytestmark = pytest.mark.usefixtures("kernels")


SHORTCUTS = {
    "torchvision/resnet18": 3,
    "torchvision/resnet50": 4,
    "timm/resnet18": 3,
    "timm/resnet26d": 4,  # average pooling, convolution, norm
}


@pytest.fixture
def joined(monkeypatch):
    """Whether each run of the fused operator included the norm of the shortcut."""
    said = []
    run = ops.tail
    monkeypatch.setattr(
        ops, "tail", lambda *a, **p: said.append(bool(p.get("shortcut_norm"))) or run(*a, **p)
    )
    return said


@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_norm_of_a_shortcut_joins_only_in_inference(name, joined):  # T25
    model = unlike(cbam.attach(network(name), start="paper")).eval()
    joined.clear()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    assert sum(joined) == 0
    for mode in (torch.no_grad, torch.inference_mode):
        joined.clear()
        with mode():
            torch.testing.assert_close(model(x), expected)
        assert sum(joined) == SHORTCUTS[name]
    model.train()
    joined.clear()
    with torch.no_grad():
        model(x)
    assert sum(joined) == 0


class ShortcutFirst(Shortened):
    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(identity + out)


class WritesOverItsInput(Shortened):
    def forward(self, x):
        x = x + 0
        identity = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(self.relu(x))))))
        return self.relu(out + identity)


class ReadsTheShortcut(Shortened):
    def forward(self, x):
        identity = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + identity), identity.mean()


class IndexesTheShortcut(Shortened):
    def forward(self, x):
        identity = self.downsample[1](self.downsample[0](x)) if len(self.downsample) == 2 else x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + identity)


class HandsTheShortcutOn(Shortened):
    def forward(self, x):
        identity = (lambda layers: layers(x))(self.downsample)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + identity)


class CallsTheShortcutTwice(Shortened):
    def forward(self, x):
        identity = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(self.downsample(2 * x))))))
        return self.relu(out + identity)


class ShortcutOfTheSameName(Shortened):
    def forward(self, x):
        other = nn.Module()
        other.downsample = lambda y: 2 * y
        identity = other.downsample(self.downsample(x))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + identity)


class ShortcutElsewhere(Shortened):
    def short(self, x):
        return self.downsample(x)

    def forward(self, x):
        identity = self.short(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + identity)


JOINING = {
    Shortened: True,
    ShortcutFirst: True,
    WritesOverItsInput: True,
    ReadsTheShortcut: False,
    IndexesTheShortcut: False,
    HandsTheShortcutOn: False,
    CallsTheShortcutTwice: False,
    ShortcutOfTheSameName: False,
    ShortcutElsewhere: False,
}


def shortened(kind=Shortened, *args):
    torch.manual_seed(0)
    (block,) = unlike(cbam.attach(nn.Sequential(kind(*args)), start="paper")).eval()
    return block


def alike(block, x):
    """`block` computes the same in inference by kernels and by the equation."""
    with torch.no_grad():
        got = block(x.clone())
        with ops.using("reference"):
            expected = block(x.clone())
    for ours, theirs in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
        assert type(ours) is torch.Tensor
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kind", JOINING)
def test_a_shortcut_joins_only_if_it_is_simply_called(kind, layout, joined):  # T25
    block = shortened(kind).to(memory_format=layout)
    joined.clear()
    alike(block, torch.randn(2, 8, 9, 7).contiguous(memory_format=layout))
    assert any(joined) is JOINING[kind]


@pytest.mark.parametrize("training", ["bn2", "cbam", "downsample"])
def test_inference_with_one_part_in_training_mode_is_right(training):
    block = shortened()
    block.get_submodule(training).train()
    alike(block, torch.randn(2, 8, 5, 5))


LAYERS = {
    "no convolution": lambda: nn.Sequential(nn.Identity(), nn.BatchNorm2d(8)),
    "a norm alone": lambda: nn.Sequential(nn.BatchNorm2d(8)),
    "nothing": nn.Sequential,
    "no norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 1)),
    "a norm of the batch": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "a norm without weights": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)),
    "another norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)),
    "a module": lambda: nn.Conv2d(8, 8, 1),
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", [Shortened, WritesOverItsInput])
def test_other_shortcuts_do_not_join(kind, layers, joined):  # T25
    given = shortened(kind, "", LAYERS[layers]())  # at attaching
    changed = shortened(kind)
    changed.downsample = copy.deepcopy(given.downsample)  # afterwards
    joined.clear()
    for block in (given, changed):
        alike(block, torch.randn(2, 8, 5, 5))
    assert not any(joined)


def test_a_shortcut_removed_after_attaching_is_the_input():
    block = shortened()
    block.downsample = None
    alike(block, torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize("where", ["downsample", "downsample.0", "downsample.1"])
def test_hooks_in_a_shortcut_run_and_may_change_its_output(where, joined):  # S12
    block, seen = shortened(), []
    block.get_submodule(where).register_forward_hook(lambda m, args, out: seen.append(1) or 2 * out)
    joined.clear()
    alike(block, torch.randn(2, 8, 5, 5))
    assert seen == [1, 1]
    assert not any(joined)  # the hook may keep what it saw, and write to it


def test_a_deferred_shortcut_behaves_like_its_tensor():
    block, x = shortened(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        waiting, expected = block._cbam_shortcut(x), block.downsample(x)
        assert waiting.shape == expected.shape
        assert torch.equal(torch.relu(waiting), torch.relu(expected))
        assert torch.equal(waiting + block._cbam_shortcut(x), 2 * expected)
        assert torch.equal(waiting + x, expected + x)
        assert torch.equal(waiting * 2, expected * 2)
    assert torch.equal(block._cbam_shortcut(x), block.downsample(x))  # with gradients it is not deferred


def test_the_norm_of_a_shortcut_joins_in_compiled_code():  # T33
    torch._dynamo.reset()
    block, x = nn.Sequential(shortened(), nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        expected = block(x)
        with torch._inductor.config.patch(fx_graph_cache=False):
            got, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x)
    torch.testing.assert_close(got, expected)
    assert len(re.findall(r"= extern_kernels\.convolution", code)) == 4
    assert code.count("batch_norm") > 0  # that of bn1
    call = next(line for line in code.splitlines() if "cbam.tail" in line and "buf" in line)
    assert not re.search(r"tail_?\w*\.default\(\w+, \w+, None", call)
    torch._dynamo.reset()
