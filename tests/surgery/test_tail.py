"""Blocks whose end runs as one operation: which ones, and that nothing else about them changes."""

import copy
import inspect
import pickle
import re
import shutil

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

import cbam
from cbam import ops
from cbam.surgery import attached
from cbam.surgery.route import _output_forward

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
SHORT = [2, 1, 1, 1]  # blocks of each stage: the others repeat the second
WIDTHS = {"resnet50": {}, "resnext50_32x4d": {"groups": 32, "width_per_group": 4}}


def network(name):
    """A network of a library; of those with bottlenecks a short one."""
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        short = {"layers": SHORT} if model in ("resnet26d", "resnetv2_50", "resnet50_gn") else {}
        return timm.create_model(model, num_classes=5, **short)
    if model in WIDTHS:
        return resnet.ResNet(resnet.Bottleneck, SHORT, num_classes=5, **WIDTHS[model])
    return torchvision.models.get_model(model, num_classes=5)


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
def test_blocks_that_end_in_norm_add_and_relu_run_that_as_one(name, runs):
    model = network(name).eval()
    cbam.attach(model)
    runs.clear()  # attaching has tried each attention
    model(torch.randn(1, 3, 64, 64))
    assert len(runs) == len(attached(model))
    assert sum(runs) == TAILS[name]
    assert sum("one operation" in str(site) for site in cbam.sites(model)) == TAILS[name]


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet26d"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_step_is_that_of_the_equation(name, training):
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


def test_pickles_copies_and_detaches_as_ever():
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
def test_a_block_changed_after_attaching_computes_what_it_then_says(change):
    (block,) = cbam.attach(nn.Sequential(resnet.BasicBlock(64, 64)), start="paper").eval()
    x = torch.randn(1, 64, 8, 8)
    change(block)
    with ops.using("reference"):
        expected = block(x)
    out = block(x)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, expected)


class Plain(nn.Module):
    """A block of which one `way` leads elsewhere between its last norm and its last ReLU."""

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
    """Of a quantised network: rounds, and passes the gradient."""

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
    """Guided backpropagation: of a gradient, what is positive goes on."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_full_backward_hook(lambda m, grads, out: (grads[0].clamp(min=0),))


def kept_inputs(model):
    """What an overhaul distillation keeps: the value before each ReLU."""
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
def test_a_block_that_leads_elsewhere_before_its_last_relu_trains_as_the_equation_does(way):  # S12 T25
    make, change = WAYS[way]
    torch.manual_seed(0)
    block = make(8, 8) if make is resnet.BasicBlock else make()
    model = cbam.attach(nn.Sequential(nn.Conv2d(3, 8, 3), block).double(), start="paper").train()
    if change:
        change(model)
    other, x = copy.deepcopy(model), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    results = []
    for network, how in ((model, "fused"), (other, "reference")):
        with ops.using(how):
            out = network(x)
            for module in (network[1], network[1].relu):
                for value in [*getattr(module, "kept", []), *vars(module).get("before", torch.empty(0))]:
                    out = out + value.mean()
            (out + 0).square().sum().backward()
        with torch.no_grad(), ops.using(how):
            results.append((out, network.eval()(x)))
    torch.testing.assert_close(results[0], results[1])
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_synchronised_norms_run_by_themselves(runs):  # S12
    model = cbam.attach(network("torchvision/resnet18"), start="paper").eval()
    expected = model(torch.ones(1, 3, 64, 64))
    runs.clear()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(model(torch.ones(1, 3, 64, 64)), expected)
    assert not any(runs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_identity_start_keeps_the_function(dtype, layout):
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
def test_a_compiler_that_turns_the_layout_gets_the_same_function(training):  # T33
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


# --- the memory of the branch ---


class Branch(nn.Module):
    """A block whose forward does with the values inside it what `habit` says."""

    def __init__(self, habit: str = "") -> None:
        super().__init__()
        self.habit, self.kept = habit, []
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        self.kept += look(out, self.habit)
        out = self.bn2(out)
        out += identity
        return self.relu(out)


def look(out, habit):
    """Ways to hold on to a value, none of them an operation that a trace would see."""
    if not habit or type(out) is not torch.Tensor:
        return []
    ways = {
        "the value": lambda: out,
        "a detached one": out.detach,
        "a view": lambda: out[0],
        "its memory": out.untyped_storage,
        "an array": out.numpy,
    }
    return [ways[habit]()]


@pytest.fixture
def overwrites(monkeypatch):
    """Whether each run of the fused operator was allowed to write over its input."""
    said = []
    run = ops.tail
    monkeypatch.setattr(ops, "tail", lambda *a, **p: said.append(p.get("overwrite")) or run(*a, **p))
    return said


def attended(habit=""):
    torch.manual_seed(0)
    (block,) = cbam.attach(nn.Sequential(Branch(habit)), start="paper").eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    block.kept.clear()
    return block


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_without_a_backward_the_result_takes_the_memory_of_the_branch(overwrites, layout, mode):  # T25
    model = attended().to(memory_format=layout)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    expected, given = model(x), x.clone()
    with mode():
        assert torch.equal(model(x), expected)
    assert overwrites[-2:] == [False, True]
    assert torch.equal(x, given)


@pytest.mark.parametrize("habit", ["the value", "a detached one", "a view", "its memory", "an array"])
def test_memory_that_somebody_holds_is_left_alone(overwrites, habit):  # T25
    model, x = attended(habit), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        model(x)
        (kept,) = model.kept
        out = model.conv2(model.relu(model.bn1(model.conv1(x))))
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.empty(0).set_(kept).view_as(out)
    torch.testing.assert_close(torch.as_tensor(kept), out[0] if habit == "a view" else out)
    assert overwrites[-1] is False


@pytest.mark.parametrize("where", ["conv2", "relu", "bn2"])
def test_who_has_a_hook_inside_the_block_sees_what_was_there(overwrites, where):  # S12 T25
    model, seen = attended(), []
    model.relu.inplace = False
    x = torch.randn(2, 8, 5, 5)
    module = getattr(model, where)
    module.register_forward_hook(lambda m, args, out: seen.append((args[0] + 0, out + 0)))
    with torch.no_grad():
        model(x)
    with torch.no_grad(), ops.using("reference"):
        model(x)
    for ours, expected in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        torch.testing.assert_close(ours, expected)
    assert True not in overwrites


def products(model, x):
    """The operators by which a network multiplies maps by gates."""
    with torch.profiler.profile(acc_events=True) as watched:
        model(x)
    names = ("aten::mul", "aten::mul_")
    return [event.name for event in watched.events() if event.name in names]


@pytest.mark.parametrize("attention", ["cbam", "se", cbam.SpatialAttention])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_without_kernels_gates_are_written_over_what_the_norm_gave(layout, attention):  # T25
    made = attention if isinstance(attention, str) else lambda channels: attention()
    (model,) = cbam.attach(nn.Sequential(Branch()), attention=made, start="paper").eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model = model.to(memory_format=layout)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    given = x.clone()
    with ops.using("reference"):
        expected = model(x)
        assert "aten::mul_" not in products(model, x)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
            assert "aten::mul" not in products(model, x)
    assert torch.equal(x, given)


@pytest.mark.parametrize("where", ["bn2", "cbam", "cbam.channel", "cbam.spatial"])
def test_without_kernels_a_hook_sees_what_was_there(where):  # S12 T25
    model, seen = attended(), []
    model.relu.inplace = False
    x = torch.randn(2, 8, 5, 5)
    # The block itself adds to what its attention returns: that is copied. All else must stay as it was seen.
    kept = torch.clone if where == "cbam" else torch.as_tensor
    model.get_submodule(where).register_forward_hook(lambda m, args, out: seen.append((args[0], kept(out))))
    with ops.using("reference"):
        model(x)
        with torch.no_grad():
            model(x)
    (_, before), (_, after) = seen
    assert torch.equal(before, after)
    assert torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("attention", [cbam.CBAM(8), cbam.ChannelAttention(8), cbam.SpatialAttention()])
def test_a_module_by_itself_leaves_its_input_alone(attention):  # T25
    x = torch.randn(2, 8, 9, 7)
    given = x.clone()
    with torch.no_grad(), ops.using("reference"):
        attention.eval()(x)
    assert torch.equal(x, given)


class Keeping(Branch):
    """One that returns what its last convolution gave, too."""

    def forward(self, x):
        branch = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(branch) + x), branch


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("keeps", [False, True], ids=["unread", "read again"])
def test_a_compiler_writes_over_a_branch_that_nobody_reads_again(keeps, layout):  # T25 T33
    pytest.importorskip("cbam_native", reason="cbam-native is not built (it needs a C++ compiler)")
    torch._dynamo.reset()
    torch.manual_seed(0)
    # What a network returns keeps its layout, so something follows the block.
    parts = [Keeping()] if keeps else [Branch(), nn.Conv2d(8, 4, 1)]
    model = cbam.attach(nn.Sequential(*parts), start="paper").eval()
    model = model.to(memory_format=layout)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = model(x)
        with torch._inductor.config.patch(fx_graph_cache=False):
            got, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(got, expected)
    (call,) = [line for line in code.splitlines() if "cbam.tail" in line and "buf" in line]
    written = re.search(r"tail_\.default\((\w+)", call)[1]
    convolution = rf"{written} = extern_kernels\.convolution"
    assert bool(re.search(convolution, code)) is not keeps
    torch._dynamo.reset()


def test_memory_of_another_library_is_left_alone(overwrites):  # T25
    class Borrowed(nn.Module):
        def forward(self, x):
            return torch.from_numpy(array)

    model, x = attended(), torch.randn(2, 8, 5, 5)
    model.conv2 = Borrowed()
    array = x.numpy().copy()
    with torch.no_grad():
        model(x)
    assert (array == x.numpy()).all()
    assert overwrites[-1] is False


def test_memory_that_other_processes_see_is_left_alone(overwrites):  # T25
    class Shared(nn.Module):
        def forward(self, x):
            return x.clone().share_memory_()

    model = attended()
    model.conv2 = Shared()
    with torch.no_grad():
        model(torch.randn(2, 8, 5, 5))
    assert overwrites[-1] is False


def test_inside_a_mode_that_sees_every_call_nothing_is_written_over(overwrites):
    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    model = attended()
    with torch.no_grad(), Watching():
        model(torch.randn(2, 8, 5, 5))
    assert not overwrites[-1]


def test_a_value_that_was_used_up_says_so():
    model = attended()
    with torch.no_grad():
        waiting = model._cbam_call(torch.randn(2, 8, 5, 5))
        torch.relu(waiting + torch.randn(2, 8, 5, 5))
        sum_of_both = model._cbam_call(torch.randn(2, 8, 5, 5)) + torch.randn(2, 8, 5, 5)
        torch.relu(sum_of_both)
        with pytest.raises(RuntimeError, match="read after that ReLU"):
            sum_of_both.tensor()
        assert waiting.shape == (2, 8, 5, 5)


# --- a norm at the end of the shortcut ---


SHORTCUTS = {
    "torchvision/resnet18": 3,
    "torchvision/resnet50": 4,
    "timm/resnet18": 3,
    "timm/resnet26d": 4,  # average pooling, convolution, norm
}


@pytest.fixture
def joined(monkeypatch):
    """Whether each run of the fused operator took the norm of the shortcut with it."""
    said = []
    run = ops.tail
    monkeypatch.setattr(
        ops, "tail", lambda *a, **p: said.append(bool(p.get("shortcut_norm"))) or run(*a, **p)
    )
    return said


def unlike(model):
    """`model` with norms that differ from each other and from the identity."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if value is not None:
                nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.mark.parametrize("name", SHORTCUTS)
def test_in_inference_the_norm_of_a_shortcut_joins(name, joined):  # T25
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


class Shortened(nn.Module):
    """A block with a shortcut of its own, whose forward treats that in one `way`."""

    def __init__(self, way: str = "called", layers: nn.Module | None = None) -> None:
        super().__init__()
        self.way = way
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        own = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.downsample = own if layers is None else layers

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


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


class CallsItTwice(Shortened):
    def forward(self, x):
        identity = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(self.downsample(2 * x))))))
        return self.relu(out + identity)


class OfTheSameName(Shortened):
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
    CallsItTwice: False,
    OfTheSameName: False,
    ShortcutElsewhere: False,
}


def shortened(kind=Shortened, *args):
    torch.manual_seed(0)
    (block,) = unlike(cbam.attach(nn.Sequential(kind(*args)), start="paper")).eval()
    return block


def alike(block, x):
    """What `block` gives in inference by kernels and by the equation."""
    with torch.no_grad():
        got = block(x.clone())
        with ops.using("reference"):
            expected = block(x.clone())
    for ours, theirs in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
        assert type(ours) is torch.Tensor
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kind", JOINING)
def test_a_shortcut_joins_where_the_code_only_calls_it(kind, layout, joined):  # T25
    block = shortened(kind).to(memory_format=layout)
    joined.clear()
    alike(block, torch.randn(2, 8, 9, 7).contiguous(memory_format=layout))
    assert any(joined) is JOINING[kind]


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
def test_other_shortcuts_are_computed_as_they_are(kind, layers, joined):  # T25
    given = shortened(kind, "", LAYERS[layers]())  # at attaching
    changed = shortened(kind)
    changed.downsample = copy.deepcopy(given.downsample)  # afterwards
    joined.clear()
    for block in (given, changed):
        alike(block, torch.randn(2, 8, 5, 5))
    assert not any(joined)


def test_a_shortcut_taken_away_after_attaching_is_the_input():
    block = shortened()
    block.downsample = None
    alike(block, torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize("where", ["downsample", "downsample.0", "downsample.1"])
def test_hooks_in_a_shortcut_fire_and_change_what_it_gives(where, joined):  # S12
    block, seen = shortened(), []
    block.get_submodule(where).register_forward_hook(lambda m, args, out: seen.append(1) or 2 * out)
    joined.clear()
    alike(block, torch.randn(2, 8, 5, 5))
    assert seen == [1, 1]
    assert not any(joined)  # the hook may keep what it saw, and write to it


def test_a_waiting_shortcut_is_the_tensor_it_stands_for():
    block, x = shortened(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        waiting, expected = block._cbam_shortcut(x), block.downsample(x)
        assert waiting.shape == expected.shape
        assert torch.equal(torch.relu(waiting), torch.relu(expected))
        assert torch.equal(waiting + block._cbam_shortcut(x), 2 * expected)
        assert torch.equal(waiting + x, expected + x)
        assert torch.equal(waiting * 2, expected * 2)
    assert torch.equal(block._cbam_shortcut(x), block.downsample(x))  # with gradients it does not wait


def test_a_compiler_takes_the_norm_of_a_shortcut_with_it():  # T33
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


# --- what looks like an end of one operation, and is none ---


class AddsToItsInput(Branch):
    """The block that comes next, or around it, may read the input."""

    def forward(self, x):
        x += self.bn2(self.conv2(self.relu(self.bn1(self.conv1(torch.relu(x))))))
        return torch.relu(x)


class AddsToItsInputByName(Branch):
    def forward(self, x):
        return torch.relu(x.add_(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(torch.relu(x))))))))


class SharesMemory(Branch):
    """A dropout gives in evaluation what it got, and the ReLU writes to that."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        h = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.drop(h))
        aux = torch.relu_(h)
        return torch.relu(out + x), aux


class LeavesItOut(Branch):
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


class KeepsIt(Shortened):
    """For itself, under a name that others are not to use."""

    def forward(self, x):
        self._identity = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self._identity)


class GivesItToAChild(Shortened):
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
        LeavesItOut,
        OneNormForBoth,
        KeepsIt,
        GivesItToAChild,
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_whoever_else_reads_a_value_finds_what_plain_torch_leaves_there(kind, training):  # T25
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
            if kind is not SharesMemory:  # of which torch computes no gradient
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
    """Saves the memory of its norm from when it is told to."""

    def forward(self, x):
        h = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out = checkpoint(self.bn2, h, use_reentrant=True) if self.habit else self.bn2(h)
        return self.relu(out + x)


def test_a_norm_that_is_handed_on_does_not_wait():  # T24
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
    """What it gives is told at the call."""

    def forward(self, x, raw=False):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if raw:
            return {"branch": out, "shortcut": [x]}
        return self.relu(out + x)


def test_what_leaves_a_block_is_a_tensor():
    (block,) = cbam.attach(nn.Sequential(Returns()))
    out = block(torch.randn(2, 8, 5, 6), raw=True)
    assert type(out["branch"]) is torch.Tensor
    assert block.bn2.num_batches_tracked == 1


def test_another_batch_norm_in_place_of_torchs_is_run(monkeypatch):
    (block,) = cbam.attach(nn.Sequential(Branch()), attention=cbam.ChannelAttention).eval()  # has no norm
    x = torch.randn(2, 8, 5, 6)
    for place, name in ((nn.BatchNorm2d, "forward"), (torch.nn.functional, "batch_norm")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *args, **_: torch.full((2, 8, 5, 6), 7.0), raising=False)
            with torch.no_grad():
                torch.testing.assert_close(block(x), torch.relu(x + 7))


def test_a_mode_that_sees_every_function_sees_those_of_a_tail():
    class Doubles(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            return 2 * out if func is torch.nn.functional.batch_norm else out

    plain = unlike(Branch()).eval()
    (model,) = cbam.attach(nn.Sequential(copy.deepcopy(plain)))
    x = torch.randn(2, 8, 5, 6)
    with Doubles(), torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    with torch.device("cpu"):  # a mode as well, and one that no tail has to mind
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.double(),
        lambda norm: setattr(norm, "running_mean", None),
        lambda norm: setattr(norm, "running_var", torch.ones(5)),
        lambda norm: setattr(norm, "bias", nn.Parameter(torch.ones(1))),
    ],
    ids=["its type", "half of its statistics", "their length", "the length of its bias"],
)
def test_a_norm_that_torch_refuses_is_refused(change):  # T6
    plain = Branch().eval()
    model = cbam.attach(nn.Sequential(copy.deepcopy(plain)))
    for norm in (plain.bn2, model[0].bn2):
        change(norm)
    with torch.no_grad(), pytest.raises(Exception) as expected:  # noqa: PT011
        plain(torch.randn(2, 8, 5, 6))
    with torch.no_grad(), pytest.raises(expected.type, match=re.escape(str(expected.value).splitlines()[0])):
        model(torch.randn(2, 8, 5, 6))


class Switches(Branch):
    """Two norms by one name, as domain adaptation has them."""

    def __init__(self):
        super().__init__()
        self.other, self.adversarial = nn.BatchNorm2d(8), False

    @property
    def norm(self):
        return getattr(self, "other" if self.adversarial else "bn2")

    def forward(self, x):
        return self.relu(self.norm(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def test_a_property_is_asked_each_time():
    plain = unlike(nn.Sequential(Switches())).eval()
    model = cbam.attach(copy.deepcopy(plain))
    x = torch.randn(2, 8, 5, 6)
    for adversarial in (False, True):
        plain[0].adversarial = model[0].adversarial = adversarial
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x))


def test_a_forward_that_was_replaced_after_detaching_is_read_anew():
    class Own(Branch):
        def forward(self, x):
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

    model, x = nn.Sequential(Own()).eval(), torch.randn(2, 8, 5, 6)
    cbam.detach(cbam.attach(model))
    Own.forward = lambda self, x: self.relu(0.5 * self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(cbam.attach(model)(x), expected)


def test_a_block_that_is_the_whole_model_keeps_its_parameters():
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


def test_an_attached_block_is_as_nonlinear_as_it_was():
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
