"""In inference the result of a block overwrites its branch, where nothing else can observe that."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import cbam
from cbam import ops
from tests.surgery.tails import Branch, attended

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def overwrites(monkeypatch):
    """Whether each run of the fused operator was allowed to write over its input."""
    said = []
    run = ops.tail
    monkeypatch.setattr(ops, "tail", lambda *a, **p: said.append(p.get("overwrite")) or run(*a, **p))
    return said


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_without_gradients_the_result_overwrites_the_branch(overwrites, layout, mode):  # T25
    model = attended().to(memory_format=layout)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    expected, given = model(x), x.clone()
    with mode():
        assert torch.equal(model(x), expected)
    assert overwrites[-2:] == [False, True]
    assert torch.equal(x, given)


@pytest.mark.parametrize("habit", ["the value", "a detached one", "a view", "its memory", "an array"])
def test_memory_still_referenced_is_not_overwritten(overwrites, habit):  # T25
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
def test_a_hook_inside_the_block_sees_unmodified_values(overwrites, where):  # S12 T25
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
def test_without_kernels_gates_overwrite_the_norms_output(layout, attention):  # T25
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
def test_without_kernels_a_hook_sees_unmodified_values(where):  # S12 T25
    model, seen = attended(), []
    model.relu.inplace = False
    x = torch.randn(2, 8, 5, 5)
    # The block itself adds to what its attention returns: that is copied. All else must stay unchanged.
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
def test_a_standalone_module_leaves_its_input_unchanged(attention):  # T25
    x = torch.randn(2, 8, 9, 7)
    given = x.clone()
    with torch.no_grad(), ops.using("reference"):
        attention.eval()(x)
    assert torch.equal(x, given)


class Keeping(Branch):
    """Also returns the output of its last convolution."""

    def forward(self, x):
        branch = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(branch) + x), branch


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("keeps", [False, True], ids=["unread", "read again"])
def test_compiled_code_overwrites_a_branch_only_if_unread(keeps, layout):  # T25 T33
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


def test_memory_of_a_numpy_array_is_not_overwritten(overwrites):  # T25
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


def test_shared_memory_is_not_overwritten(overwrites):  # T25
    class Shared(nn.Module):
        def forward(self, x):
            return x.clone().share_memory_()

    model = attended()
    model.conv2 = Shared()
    with torch.no_grad():
        model(torch.randn(2, 8, 5, 5))
    assert overwrites[-1] is False


def test_nothing_is_overwritten_inside_a_torch_function_mode(overwrites):
    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    model = attended()
    with torch.no_grad(), Watching():
        model(torch.randn(2, 8, 5, 5))
    assert not overwrites[-1]


def test_reading_a_consumed_value_is_an_error():
    model = attended()
    with torch.no_grad():
        waiting = model._cbam_call(torch.randn(2, 8, 5, 5))
        torch.relu(waiting + torch.randn(2, 8, 5, 5))
        sum_of_both = model._cbam_call(torch.randn(2, 8, 5, 5)) + torch.randn(2, 8, 5, 5)
        torch.relu(sum_of_both)
        with pytest.raises(RuntimeError, match="read after that ReLU"):
            sum_of_both.tensor()
        assert waiting.shape == (2, 8, 5, 5)
