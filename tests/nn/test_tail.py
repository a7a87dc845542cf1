"""Attention by fused kernels against the equation: when they run, and that nothing else changes."""

import copy
import hashlib
import pickle
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbam
from cbam import ops
from cbam.errors import ConfigError, InputError
from cbam.nn.tail import Pending, begin
from cbam.ops import library, switch

pytestmark = pytest.mark.usefixtures("kernels")
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
MODULES = {
    "cbam": partial(cbam.CBAM, 6, reduction=2),
    "what": partial(cbam.ChannelAttention, 6, reduction=2),
    "squeeze": partial(cbam.ChannelAttention, 6, reduction=2, pools=("avg",)),
    "where": partial(cbam.SpatialAttention, kernel_size=3),
}


@pytest.fixture(params=MODULES)
def attention(request):
    module = MODULES[request.param]().double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


@pytest.fixture
def runs(monkeypatch):
    """How often the fused operator ran."""
    counted = []
    run = ops.tail
    monkeypatch.setattr(ops, "tail", lambda *args, **parts: counted.append(1) or run(*args, **parts))
    return counted


def outcome(module, function, *inputs):
    """Output, gradients of inputs and parameters, and buffers after a training step."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(module, *leaves)
    grad = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    out.backward(grad)
    grads = [x.grad for x in leaves] + [p.grad for p in module.parameters()]
    return [out.detach(), *grads, *(b.clone() for b in module.buffers())]


def both_ways(module, function, *inputs):
    """The same step by the kernels and by the equation."""
    other = copy.deepcopy(module)
    with ops.using("fused"):
        fused = outcome(module, function, *inputs)
    with ops.using("reference"):
        return fused, outcome(other, function, *inputs)


def call(module, x):
    return module(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_outputs_gradients_and_statistics_equal_the_equation(attention, layout, training):  # T14
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    fused, expected = both_ways(attention.train(training), call, x)
    torch.testing.assert_close(fused, expected, **DOUBLE)
    assert fused[0].is_contiguous(memory_format=layout)
    assert fused[1].is_contiguous(memory_format=layout)


def test_weights_in_channels_last_compute_the_same(attention):  # T14
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = outcome(attention, call, x)
    attention.zero_grad()
    attention.to(memory_format=torch.channels_last)
    torch.testing.assert_close(outcome(attention, call, x)[:2], expected[:2], **DOUBLE)


def test_an_unbatched_map_equals_a_batch_of_one(attention):  # T4
    x = torch.randn(6, 5, 7, dtype=torch.float64)
    with ops.using("fused"):
        assert torch.equal(attention.eval()(x), attention(x[None])[0])


def test_a_changed_gain_takes_effect():
    module, x = cbam.CBAM(6).double().eval(), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    with ops.using("fused"):
        assert torch.equal(module.identity_()(x), x)
        module.channel.gain.fill_(4)
        torch.testing.assert_close(module(x), 2 * x)
        assert torch.equal(copy.deepcopy(module)(x), module(x))
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
        module.load_state_dict(cbam.CBAM(6).double().identity_().state_dict())
        assert torch.equal(module(x), x)


def test_running_statistics_follow_torch_with_and_without_a_momentum():
    for momentum in (0.3, None):
        module = cbam.SpatialAttention(kernel_size=3)
        module.bn.momentum = momentum
        module.double().conv.weight.data.normal_()
        for _ in range(3):
            x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
            fused, expected = both_ways(module, call, x)
            torch.testing.assert_close(fused, expected, **DOUBLE)
            module.zero_grad()
        assert module.bn.num_batches_tracked == 3
    module.bn.track_running_stats = (
        False  # set on an existing norm: it uses those of the batch, and keeps none
    )
    torch.testing.assert_close(*both_ways(module, call, x), **DOUBLE)


def test_second_derivatives_of_a_module_are_right(attention):  # T26
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        attention.train(training)
        with ops.using("fused"):
            assert torch.autograd.gradcheck(attention, (x,), nondet_tol=0)
            assert torch.autograd.gradgradcheck(attention, (x,), nondet_tol=0)


def test_second_derivatives_of_a_whole_tail_are_right():  # T26
    norm, attention = nn.BatchNorm2d(6).double(), cbam.CBAM(6, reduction=2).double()
    for p in (*norm.parameters(), *attention.parameters()):
        nn.init.normal_(p)
    x, shortcut = torch.randn(2, 1, 6, 3, 2, dtype=torch.float64).requires_grad_().unbind()

    def end(x, shortcut):
        return F.relu(begin(norm, attention, x) + shortcut)

    with ops.using("fused"):
        assert torch.autograd.gradcheck(end, (x, shortcut), nondet_tol=0)
        assert torch.autograd.gradgradcheck(end, (x, shortcut), nondet_tol=0)


def test_only_requested_gradients_are_computed(attention):  # T24
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    attention.requires_grad_(False)
    with ops.using("fused"):
        assert not attention(x).requires_grad
        for p in list(attention.parameters())[:1]:
            p.requires_grad_()
            attention(x).sum().backward()
            assert p.grad is not None
        frozen = list(attention.parameters())[1:]
        assert all(p.grad is None for p in frozen)
        x.requires_grad_()
        attention.requires_grad_(False)
        attention(x).sum().backward()
        assert x.grad is not None


def test_misuse_of_the_autograd_graph_is_an_error(attention):  # T27
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    with ops.using("fused"):
        doubled = 2 * x
        out = attention(doubled)
        doubled.add_(1)
        with pytest.raises(RuntimeError, match="inplace"):
            out.sum().backward()
        out = attention(x).sum()
        out.backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()


def test_strides_do_not_matter(attention):  # T13, T15
    base = torch.randn(2, 6, 8, 9, dtype=torch.float64)
    views = [base[:, :, 1:7, 2:8], base.transpose(2, 3), base[:, :, ::2], base[:1].expand(2, -1, -1, -1)]
    with ops.using("fused"):
        for x in views:
            dense = x.contiguous()
            torch.testing.assert_close(outcome(attention, call, x)[:2], outcome(attention, call, dense)[:2])
        x = dense.requires_grad_()
        attention(x).sum().backward()  # a gradient of stride 0
        spread = x.grad.clone()
        x.grad = None
        attention(x).backward(torch.ones_like(x))
        assert torch.equal(x.grad, spread)


@pytest.mark.parametrize("reason", ["export", "hook", "shadow", "empty", "subclass", "transform"])
def test_unsupported_input_runs_by_the_equation_and_is_refused_by_fused(attention, runs, reason):
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    attention.eval()
    for part in attention.modules():
        if reason == "hook" and not list(part.children()):
            part.register_forward_hook(lambda *_: None)
        if reason == "shadow" and hasattr(part, "gate"):
            part.gate = part.gate
    if reason == "empty":  # T11
        x = x[:0]
    if reason == "subclass":  # T33
        x = x.as_subclass(type("Mine", (torch.Tensor,), {}))
    function = {
        "export": lambda x: torch.jit.trace(attention, x, check_trace=False)(x),
        "transform": lambda x: torch.func.vmap(attention)(x[None])[0],  # T28
    }.get(reason, attention)
    with ops.using("reference"):
        expected = attention(x)
    torch.testing.assert_close(function(x), expected)
    assert not runs
    with ops.using("fused"), pytest.raises(ConfigError, match='using\\("fused"\\): '):
        function(x)


def test_missing_kernels_are_logged_once(monkeypatch, caplog):  # T35
    monkeypatch.setattr(switch, "_known", {})
    monkeypatch.setattr(switch.cpu, "missing", lambda: "they were not built")
    module, x = cbam.CBAM(6), torch.randn(2, 6, 4, 4)
    for _ in range(3):
        module(x)
    messages = [r.message for r in caplog.records if "not built" in r.message]
    assert messages == ["attention runs as plain torch operations on cpu: they were not built"]


def test_a_gpu_that_is_too_old_is_reported_before_a_kernel_runs(monkeypatch):  # T35
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    obstacle = switch._missing(torch.device("cuda", 0))
    assert obstacle == "the kernels need compute capability 7.0, and this GPU has 6.1"


def test_kernels_are_not_loaded_during_graph_capture(monkeypatch):  # T35
    gpu, tried = torch.device("cuda", 0), []
    monkeypatch.setattr(switch, "_known", {})
    monkeypatch.setattr(switch, "_missing", lambda device: tried.append(device) or "")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "run the module once first" in switch._device_obstacle(gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert switch._device_obstacle(gpu) == ""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert switch._device_obstacle(gpu) == ""
    assert tried == [gpu]


@pytest.mark.parametrize("operators", [{}, {"OPERATORS": switch.cpu.OPERATORS + 1}])
def test_kernels_of_another_version_are_not_used(monkeypatch, operators):  # T35
    other = SimpleNamespace(library=lambda: "kernels.so", **operators)
    monkeypatch.setitem(sys.modules, "cbam_native", other)
    assert "kernels.so was built for another version of cbam: reinstall cbam-native" in switch.cpu.missing()


def test_an_empty_cbam_native_folder_is_reported(monkeypatch):  # T35
    monkeypatch.setitem(sys.modules, "cbam_native", SimpleNamespace())
    assert "cbam_native is not the companion package of cbam" in switch.cpu.missing()


def test_changed_schemas_need_a_new_version():  # T35
    schemas = " ".join((library._FORWARD, library._INFERENCE, library._BACKWARD, library._TRACK))
    assert (switch.cpu.OPERATORS, hashlib.sha256(schemas.encode()).hexdigest()[:12]) == (1, "1bc52587e5b4")


def test_using_ends_with_its_block(runs):
    module, x = cbam.CBAM(6).eval(), torch.randn(2, 6, 4, 4)
    with ops.using("reference"):
        module(x)
        with ops.using("fused"):
            module(x)
        module(x)
    assert len(runs) == 1
    with pytest.raises(InputError), ops.using("reference"):
        module(x[:, :2])
    module(x)
    assert len(runs) == 2


def test_a_tensor_of_a_wrong_shape_is_refused():  # T6, T7
    with ops.using("fused"):
        with pytest.raises(InputError, match="built for 6 channels, got 4"):
            cbam.CBAM(6)(torch.zeros(2, 4, 3, 3))
        with pytest.raises(InputError, match="more than 1 value"):
            cbam.CBAM(6)(torch.zeros(1, 6, 1, 1))


@pytest.mark.parametrize("elsewhere", ["norm", "attention.channel.fc1", "attention.spatial.bn"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_parameter_on_another_device_is_refused_before_a_kernel_reads_it(elsewhere, training):  # T31
    parts = nn.ModuleDict({"norm": nn.BatchNorm2d(6), "attention": cbam.CBAM(6)}).train(training)
    parts.get_submodule(elsewhere).to("meta")
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(InputError, match=r"x is on cpu, .* on meta"):
            torch.relu(begin(parts["norm"], parts["attention"], torch.randn(2, 6, 4, 5)))


def test_in_place_kernels_refuse_parameters_on_another_device():  # T31
    x, gamma = torch.randn(2, 6, 4, 5), torch.ones(6, device="meta")
    norm = ops.Norm(gamma, gamma, gamma, gamma, False, 0.1, 1e-5)
    with torch.no_grad(), pytest.raises(InputError, match=r"x is on cpu, .* on meta"):
        ops.tail(x, norm=norm, overwrite=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_the_operators_pass_torchs_opcheck():  # T34
    x = torch.randn(2, 6, 4, 5)
    attention = cbam.CBAM(6, reduction=2)
    norm = nn.BatchNorm2d(6)
    for training in (True, False):
        channel, spatial = attention.train(training).operands(x)
        args = library._Args(
            x.clone().requires_grad_(), torch.randn_like(x).requires_grad_(),
            *(norm.weight, norm.bias, norm.running_mean, norm.running_var, training, 1e-5),
            *channel[:4], True, True, 1.0,
            spatial.kernel, *spatial.norm[:5], 1e-5, 2.0, True, True,
        )  # fmt: skip
        # One tolerance: batch statistics of a few values amplify the last bit.
        torch.library.opcheck(torch.ops.cbam.tail.default, tuple(args), rtol=1e-3, atol=1e-4)
        if not training:
            with torch.no_grad():
                given = (
                    x.clone(), torch.randn_like(x),
                    norm.weight, norm.bias, norm.running_mean, norm.running_var, 1e-5, *args[2:6], 1e-5,
                    *args[8:15], *args[15:20], 1e-5, 2.0, True,
                )  # fmt: skip
                given = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
                torch.library.opcheck(
                    torch.ops.cbam.tail_inference.default, tuple(given), rtol=1e-3, atol=1e-4
                )
                torch.library.opcheck(torch.ops.cbam.tail_.default, tuple(given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lacking", ["nothing", "norm", "what", "where"])
def test_the_fake_kernel_returns_the_real_shapes(lacking):  # T34
    x, attention, norm = torch.randn(2, 6, 4, 5), cbam.CBAM(6, reduction=2), nn.BatchNorm2d(6)
    for training, save in ((True, True), (True, False), (False, True), (False, False)):
        channel, spatial = attention.train(training).operands(x)
        args = [
            x, None, norm.weight, norm.bias, norm.running_mean, norm.running_var, training, 1e-5,
            *channel[:4], True, True, 1.0, spatial.kernel, *spatial.norm[:5], 1e-5, 2.0, True, save,
        ]  # fmt: skip
        empty = {"nothing": [], "norm": range(2, 6), "what": range(8, 12), "where": range(15, 20)}[lacking]
        for i in empty:
            args[i] = None
        args[6], args[20] = training and lacking != "norm", training and lacking != "where"
        with torch.no_grad():
            real, fake = torch.ops.cbam.tail(*args), library._fake_forward(*args)
        assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


# --- the end of a residual block ---


class Block(nn.Module):
    """A residual block's end, written in the way `style` says."""

    def __init__(self, style: str, channels: int = 6) -> None:
        super().__init__()
        self.style = style
        self.norm = nn.BatchNorm2d(channels)
        self.attention = cbam.CBAM(channels, reduction=2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x, shortcut):
        out = begin(self.norm, self.attention, x)
        if self.style == "in place":
            out += shortcut
            return self.act(out)
        if self.style == "swapped":
            return F.relu(shortcut + out)
        if self.style == "torch.add":
            return torch.relu(torch.add(out, shortcut))
        if self.style == "method":
            return out.add(shortcut).relu()
        if self.style == "other activation":
            return F.silu(out + shortcut)
        if self.style == "scaled":
            return F.relu(0.5 * out + shortcut)
        if self.style == "broadcast":
            return F.relu(out + shortcut[:, :1])
        if self.style == "twice the shortcut":
            return torch.relu(torch.add(out, shortcut, alpha=2))
        if self.style == "used twice":
            return F.relu(out + shortcut) + out.sigmoid()
        return self.act(out) + shortcut  # "no add"


STYLES = ["in place", "swapped", "torch.add", "method", "no add"]
STYLES += ["other activation", "scaled", "broadcast", "twice the shortcut", "used twice"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("style", STYLES)
def test_the_end_of_a_block_equals_its_operations(style, training, runs):
    if style == "used twice" and training:
        pytest.skip("begin() is for values that are used once")
    block = Block(style).double().train(training)
    for p in block.parameters():
        nn.init.normal_(p)
    x, shortcut = torch.randn(2, 2, 6, 5, 4, dtype=torch.float64).unbind()
    fused, expected = both_ways(block, Block.forward, x, shortcut)
    torch.testing.assert_close(fused, expected, **DOUBLE)
    assert len(runs) == (2 if style == "used twice" else 1)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("watched", ["norm", "attention", "attention.spatial"])
def test_hooks_of_the_user_run_once(watched, kind):  # S12
    block, seen = Block("torch.add"), []  # torch itself refuses to write over what a backward hook saw
    getattr(block.get_submodule(watched), f"register_{kind}")(lambda *_: seen.append(1))
    x, shortcut = torch.randn(2, 2, 6, 4, 4).unbind()
    block(x.requires_grad_(), shortcut).sum().backward()
    assert seen == [1]


class Half(cbam.CBAM):
    def forward(self, x):
        return 0.5 * super().forward(x)


def halved(module):
    forward = module.forward
    module.forward = lambda x: 0.5 * forward(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("own", ["class", "attention", "attention.channel", "attention.spatial.conv", "norm"])
def test_a_forward_replaced_by_the_user_is_called(own, training):  # S12
    torch.manual_seed(0)
    block = Block("in place").double()
    for p in block.parameters():
        nn.init.normal_(p)
    if own == "class":
        block.attention.__class__ = Half
    else:
        halved(block.get_submodule(own))
    block.train(training)
    x, shortcut = torch.randn(2, 2, 6, 5, 4, dtype=torch.float64).unbind()
    with ops.using("reference"):
        expected = F.relu(block.attention(block.norm(x)) + shortcut)
    torch.testing.assert_close(block(x, shortcut), expected, **DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(block(x, shortcut), expected, **DOUBLE)


def test_another_norm_runs_separately(runs):
    block = Block("in place")
    block.norm = nn.GroupNorm(2, 6)
    x, shortcut = torch.randn(2, 2, 6, 4, 4).unbind()
    out = block.eval()(x, shortcut)
    assert len(runs) == 1  # the attention, on its own
    torch.testing.assert_close(out, F.relu(block.attention(block.norm(x)) + shortcut))


def test_one_value_per_channel_raises_torchs_error():  # T7
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Block("in place")(*torch.randn(2, 1, 6, 1, 1).unbind())


def test_a_pending_value_behaves_like_a_tensor():
    block = Block("in place").eval()
    x = torch.randn(2, 6, 4, 4)
    waiting = begin(block.norm, block.attention, x)
    assert isinstance(waiting, Pending)
    expected = block.attention(block.norm(x))
    torch.testing.assert_close(torch.cat([waiting, waiting]), torch.cat([expected, expected]))
    torch.testing.assert_close(waiting * 2, expected * 2)
    torch.testing.assert_close(F.conv2d(waiting, torch.ones(1, 6, 1, 1)), expected.sum(1, keepdim=True))
    assert waiting.shape == x.shape
    assert waiting.tensor() is waiting.tensor()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_as_one_graph_that_has_the_operator(training):  # T33
    torch._dynamo.reset()
    block = Block("in place").train(training)
    block.attention.identity_()
    inputs = torch.randn(2, 2, 6, 5, 4).unbind()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with ops.using("fused"):
        expected = copy.deepcopy(block)(*inputs)
        out = torch.compile(block, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(out, expected)
    assert ["cbam.tail" in str(n.target) for g in graphs for n in g.graph.nodes].count(True) == 1
    torch._dynamo.reset()


def test_gpu_kernels_get_one_layout_for_all_maps(monkeypatch):  # T13 T33
    got = []
    recording = SimpleNamespace(tail=lambda *a: got.append(a), tail_backward=lambda *a: got.append(a))
    for module in ("cbam.ops.triton_kernels", "cbam.ops.triton_gradients"):
        monkeypatch.setitem(sys.modules, module, recording)
        monkeypatch.setattr(module, recording, raising=False)
    nhwc = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    nchw, gaps = torch.randn(2, 6, 5, 4), torch.randn(2, 6, 5, 8)[..., :4]
    by_columns = torch.randn(6, 3).T
    library._on_cuda(nhwc, nchw, by_columns, None, 1.0)
    library._backward_on_cuda(nhwc, gaps, nchw, by_columns, True)
    (x, shortcut, w, *rest), (grad, x_of_gaps, out, w_again, flag) = got
    assert x is nhwc
    assert shortcut.stride() == nhwc.stride()
    assert shortcut.equal(nchw)
    assert (rest, flag) == ([None, 1.0], True)
    assert all(t.is_contiguous() for t in (w, grad, x_of_gaps, out, w_again))
    assert x_of_gaps.equal(gaps)


def test_gpu_kernels_refuse_parameters_on_another_device(monkeypatch):  # T31
    module = "cbam.ops.triton_kernels"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(tail=None, tail_inference=None))
    x, w = torch.randn(2, 6, 5, 4), torch.ones(6, device="meta")
    for run in (library._on_cuda, library._inference_on_cuda):
        with pytest.raises(InputError, match=r"x is on cpu, .* on meta"):
            run(x, None, None, w, 1.0)


def test_gpu_kernels_update_strided_running_statistics(monkeypatch):
    def track(running, new, momenta, count):
        assert all(t.is_contiguous() for t in (*running, *new))
        for old, batch in zip(running, new, strict=True):
            old.copy_(batch)

    module = "cbam.ops.triton_kernels"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(track=track))
    monkeypatch.setattr(module, SimpleNamespace(track=track), raising=False)
    table = torch.zeros(3, 4)  # its columns, of which two are running statistics
    new = torch.arange(1.0, 7).view(3, 2).unbind(1)
    library._track_on_cuda([table[:, 0], table[:, 2]], [*new], [0.1], 60)
    assert table.equal(torch.tensor([[1.0, 0, 2, 0], [3, 0, 4, 0], [5, 0, 6, 0]]))


def test_an_exported_graph_has_no_custom_operator():  # E1
    block = Block("in place").eval()
    inputs = torch.randn(2, 2, 6, 5, 4).unbind()
    with torch.no_grad():
        program = torch.export.export(block, inputs)
    assert not [n for n in program.graph.nodes if "cbam." in str(n.target)]
    torch.testing.assert_close(program.module()(*inputs), block(*inputs))


def test_checkpointing_is_bit_equal():  # T37
    block = Block("in place").eval()
    x, shortcut = torch.randn(2, 2, 6, 5, 4).unbind()
    results = []
    for wrap in (Block.forward, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        wrap(block, leaf, shortcut).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "change",
    [
        {"padding_mode": "circular"},
        {"dilation": 3, "padding": 9},
        {"bias": True},
        {"kernel_size": (3, 7), "padding": (1, 3)},
        {"kernel_size": 5, "padding": (2, 2), "stride": 1, "dilation": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["another convolution", "changed in place"])
def test_a_changed_spatial_convolution_takes_effect(change, way):
    module = cbam.CBAM(6, reduction=2).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    options = {"kernel_size": 7, "padding": 3, "bias": False} | change
    made = nn.Conv2d(2, 1, **options).double()
    if way == "another convolution":
        module.spatial.conv = made
    else:  # as a segmentation library does to every convolution
        module.spatial.conv.__dict__.update({k: vars(made)[k] for k in vars(made) if not k.startswith("_p")})
        module.spatial.conv._reversed_padding_repeated_twice = made._reversed_padding_repeated_twice
        module.spatial.conv.weight, module.spatial.conv.bias = made.weight, made.bias
    x = torch.randn(2, 6, 9, 8, dtype=torch.double, requires_grad=True)
    for training in (True, False):  # batch statistics cancel a bias
        module.train(training)
        with ops.using("reference"):
            expected = module(x)
        torch.testing.assert_close(module(x), expected, **DOUBLE)


@pytest.mark.parametrize("compiling", [False, True])
def test_no_kernel_runs_inside_a_forward_mode_derivative(monkeypatch, kernels, compiling):  # T33
    # Only `fused` is asked: torch 2.15 itself compiles such derivatives only in part, and fails in others.
    x, seen = torch.randn(2, 6, 5, 4), []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)

    def look(x):
        seen.append(ops.fused(x))
        return x

    torch.func.jvp(look, (x,), (x,))
    look(x)
    assert seen == [False, True]


def test_a_gradient_penalty_under_autocast_runs_and_is_right():  # T26 T29
    def penalty(how):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), cbam.CBAM(6, reduction=2), nn.AdaptiveAvgPool2d(1))
        x = torch.randn(2, 3, 8, 8)
        with ops.using(how):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).square().sum()
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            norm = torch.stack([g.float().norm() for g in gradients]).norm()
            norm.backward()
        return norm.detach(), model[0].weight.grad

    (norm, grad), (expected, true) = penalty("fused"), penalty("reference")
    torch.testing.assert_close(norm, expected, rtol=0.03, atol=0)
    assert (grad - true).norm() < 0.1 * true.norm()


class Quantised(torch.Tensor):
    """Weights in int8, as quantisation libraries keep them in a plain nn.Linear."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.numbers.float() * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].numbers, args[0].scale)
        raise NotImplementedError(str(func))


def test_weights_of_a_tensor_subclass_run_as_plain_operations():
    module, x = cbam.CBAM(6, reduction=2).eval(), torch.randn(2, 6, 8, 8)
    expected = module(x)
    for layer in (module.channel.fc1, module.channel.fc2):
        scale = layer.weight.detach().abs().max() / 127
        numbers = (layer.weight.detach() / scale).round().to(torch.int8)
        layer.weight = nn.Parameter(Quantised(numbers, scale), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=0.05, atol=0.05)


def test_a_norm_without_running_statistics_needs_more_than_one_value():  # T7
    norm, x = nn.BatchNorm2d(6, track_running_stats=False).eval(), torch.randn(1, 6, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        F.relu(begin(norm, cbam.ChannelAttention(6).eval(), x) + x)
    module = cbam.CBAM(6).eval()
    module.spatial.bn = nn.BatchNorm2d(1, track_running_stats=False)
    for how in ("fused", "reference"):
        with pytest.raises(InputError, match="more than 1 value"), ops.using(how):
            module.eval()(x)


def test_overlapping_using_blocks_in_two_threads_leave_no_choice():
    entered, left = threading.Event(), threading.Event()

    def first():
        with ops.using("reference"):
            entered.wait(10)
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    while switch._choice != "reference":
        time.sleep(0.001)
    with ops.using("fused"):
        entered.set()
        left.wait(10)
        assert switch._choice == "fused"
    thread.join()
    assert switch._choice == ""


def test_the_reason_for_the_equation_is_logged_once(monkeypatch, caplog):  # T35
    caplog.set_level("INFO", "cbam")
    monkeypatch.setattr(switch, "_logged", set())
    module, x = cbam.CBAM(6), torch.randn(2, 6, 4, 4)
    module.spatial.register_forward_hook(lambda *_: None)
    caplog.clear()
    for _ in range(3):
        module(x)
    assert [r.message for r in caplog.records] == [
        "attention runs as plain torch operations: its parts have hooks"
    ]


@pytest.mark.parametrize("gain", [0, -1, float("nan"), float("inf")])
def test_an_invalid_gain_is_refused(gain):
    with pytest.raises(InputError, match="a gain must be a positive number"):
        cbam.ChannelAttention(6).set_gain(gain)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.load_state_dict(module.state_dict()),
        lambda module: module.load_state_dict(module.state_dict(), assign=True),
        lambda module: cbam.load_weights(module, module.state_dict()),
        lambda module: module.double(),
    ],
    ids=["loaded", "assigned", "weights", "converted"],
)
def test_loaded_or_converted_weights_compile_as_one_graph(change):  # T33
    module = cbam.CBAM(6).identity_().eval()
    change(module)
    x = torch.randn(2, 6, 4, 4).to(module.channel.fc1.weight)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), x)
    torch._dynamo.reset()


def test_compiled_code_uses_a_gain_assigned_by_hand():  # T33
    module = cbam.CBAM(6).identity_().eval()
    x = torch.randn(2, 6, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        for gain in (2.0, 4.0, 6.0):
            module.channel.gain = torch.tensor(gain)
            torch.testing.assert_close(compiled(x), x * (gain / 2))
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["fused", "reference"])
def test_a_gain_set_in_inference_mode_is_read(how):
    x = torch.randn(2, 6, 4, 4)
    outside = cbam.CBAM(6).identity_().eval()
    with torch.inference_mode(), ops.using(how):
        inside = cbam.CBAM(6).identity_().eval()
        assert torch.equal(inside(x), x)
        for module in (copy.deepcopy(inside), inside.double(), outside.double()):
            same = x.to(module.channel.fc1.weight)
            assert torch.equal(module(same), same)
        module.channel.gain.fill_(1)
        assert not torch.equal(module(same), same)
