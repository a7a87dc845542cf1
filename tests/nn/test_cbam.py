"""The modules against the authors' released formula, restated here independently."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import cbam
from cbam.errors import InputError
from cbam.nn import squeeze_excitation

SHAPES = [
    (2, 32, 7, 9),
    (3, 16, 13, 17),
    (1, 64, 1, 97),
    (2, 17, 127, 1),
    (4, 3, 5, 5),
    (2, 1, 3, 3),
]  # T8, T10


def released_channel(x, part, names=("avg", "max")):
    """Mc(x) x with the pooling calls of the released code, with the pools of these names."""
    size = x.shape[2:]
    pools = {
        "avg": F.avg_pool2d,
        "max": F.max_pool2d,
        "lp": lambda x, size, stride: F.lp_pool2d(x, 2, size, stride=stride),
        "lse": lambda x, size, stride: torch.logsumexp(x.flatten(2), 2),
    }
    logits = 0
    for pool in names:
        flat = pools[pool](x, size, stride=size).view(x.size(0), -1)
        hidden = F.relu(F.linear(flat, part.fc1.weight, part.fc1.bias))
        logits = logits + F.linear(hidden, part.fc2.weight, part.fc2.bias)
    return x * torch.sigmoid(logits)[:, :, None, None].expand_as(x)


def released_spatial(x, part):
    """Ms(x) x with the pooling calls of the released code; BatchNorm by batch statistics."""
    pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), 1)
    s = F.conv2d(pooled, part.conv.weight, padding=part.kernel_size // 2)
    s = F.batch_norm(s, None, None, part.bn.weight, part.bn.bias, training=True, eps=1e-5)
    return x * torch.sigmoid(s)


def active(module):
    """`module` with no parameter at zero, so that every path carries a gradient."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


def gradients(function, module, x, grad):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    out = function(x)
    out.backward(grad)
    return out.detach(), x.grad, [p.grad.clone() for p in module.parameters()]


def same(a, b):
    """Whether two results of `gradients` are bit-equal."""
    return all(torch.equal(x, y) for x, y in zip([*a[:2], *a[2]], [*b[:2], *b[2]], strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("pools", [("avg", "max"), ("avg",), ("max",)])
def test_output_and_every_gradient_equal_the_released_code(shape, layout, dtype, tolerance, pools):
    # T1, T8, T10, T14, T21: values are rounded to halves, so equal maxima abound and the tie rule is tested.
    module = active(cbam.CBAM(shape[1], reduction=4, pools=pools)).to(dtype)
    x = (
        (torch.randn(shape, dtype=torch.float64) * 2)
        .round()
        .div(2)
        .to(dtype)
        .contiguous(memory_format=layout)
    )
    grad = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)

    def literal(x):
        return released_spatial(released_channel(x.contiguous(), module.channel, pools), module.spatial)

    out, dx, dw = gradients(module, module, x, grad)
    expected, expected_dx, expected_dw = gradients(literal, module, x, grad)
    scale = max(1.0, float(expected_dx.abs().max()))
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx, expected_dx, rtol=tolerance, atol=tolerance * scale * 10)
    for ours, theirs in zip(dw, expected_dw, strict=True):
        bound = tolerance * 100 * max(1.0, float(theirs.abs().max()))  # sums over every pixel of the batch
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=bound)
    assert out.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pools", [("lp",), ("lse",), ("lse", "avg", "lp", "max")])
def test_the_pools_lp_and_lse_equal_the_released_code(shape, pools):
    module = active(cbam.ChannelAttention(shape[1], reduction=4, pools=pools)).double()
    x, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    ours = gradients(module, module, x, grad)
    literal = gradients(lambda x: released_channel(x, module, pools), module, x, grad)
    for a, b in zip([*ours[:2], *ours[2]], [*literal[:2], *literal[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


def test_evaluation_uses_the_running_statistics_of_the_spatial_norm():
    module = active(cbam.CBAM(8)).double()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    module(x)
    bn = module.spatial.bn
    assert (bn.eps, bn.momentum, int(bn.num_batches_tracked)) == (1e-5, 0.01, 1)
    refined = released_channel(x, module.channel)
    pooled = torch.stack((refined.amax(1), refined.mean(1)), 1)
    s = F.conv2d(pooled, module.spatial.conv.weight, padding=3)
    torch.testing.assert_close(bn.running_mean, 0.01 * s.mean((0, 2, 3)))
    s = (s - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias
    torch.testing.assert_close(module.eval()(x), refined * torch.sigmoid(s), rtol=1e-12, atol=1e-12)


def test_fresh_weights_are_those_of_the_released_initialisation():
    module = cbam.CBAM(1024)
    assert not module.spatial.bn.weight.any()
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("bias"))
    fan_out = module.spatial.conv.weight.numel() / 2
    draws = torch.cat([cbam.SpatialAttention().conv.weight.flatten() for _ in range(200)])
    assert draws.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert module.channel.fc1.weight.abs().max() <= 1024**-0.5  # torch's own Linear initialisation


def test_squeeze_excitation_is_channel_attention_with_the_mean():
    module = active(squeeze_excitation(32)).double()
    x = torch.randn(2, 32, 5, 7, dtype=torch.float64)
    hidden = F.relu(module.fc1(x.mean((2, 3))))
    torch.testing.assert_close(module(x), x * torch.sigmoid(module.fc2(hidden))[:, :, None, None])


def test_a_gain_is_in_the_state_dict_only_if_it_is_not_one():
    paper, started = cbam.CBAM(16), cbam.CBAM(16).identity_()
    assert {k for k in started.state_dict() if k not in paper.state_dict()} == {
        "channel.gain",
        "spatial.gain",
    }
    with pytest.raises(RuntimeError, match="gain"):
        paper.load_state_dict(started.state_dict())
    with pytest.raises(RuntimeError, match="gain"):
        started.load_state_dict(paper.state_dict())
    started.reset_parameters()
    paper.load_state_dict(started.state_dict())


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "16"])
@pytest.mark.parametrize("name", ["channels", "reduction"])
def test_counts_must_be_positive_integers(name, value):  # T10
    with pytest.raises(InputError, match=f"{name} must be a positive int"):
        cbam.ChannelAttention(**({"channels": 8} | {name: value}))


@pytest.mark.parametrize("size", [0, 2, 8])
def test_an_even_spatial_kernel_is_refused(size):  # T36
    with pytest.raises(InputError, match=r"odd|positive"):
        cbam.SpatialAttention(kernel_size=size)


@pytest.mark.parametrize(
    "pools", [(), ("avg", "avg"), ("min",), "avg", ("avg", ["max"]), {"avg", "max"}, 1, None]
)
def test_unknown_pools_are_refused(pools):
    with pytest.raises(InputError, match="pools"):
        cbam.ChannelAttention(8, pools=pools)


def test_few_channels_keep_one_hidden_unit_and_log_it(caplog):  # T9
    with caplog.at_level(logging.INFO, "cbam"):
        module = cbam.ChannelAttention(8)
    assert module.fc1.weight.shape == (1, 8)
    assert "one hidden unit" in caplog.text


def test_an_empty_batch_gives_an_empty_batch_and_zero_gradients():  # T11
    module = cbam.CBAM(8)
    before = copy.deepcopy(module.state_dict())
    out = module(torch.zeros(0, 8, 4, 4, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 8, 4, 4)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert torch.equal(module.spatial.bn.running_mean, before["spatial.bn.running_mean"])


def test_strides_and_offsets_do_not_matter():  # T13, T15, T16
    module = active(cbam.CBAM(8)).eval()
    gaps = torch.full((2, 8, 10, 24), float("nan"))
    x = torch.randn(2, 8, 5, 8)
    gaps[:, :, ::2, ::3] = x
    assert torch.equal(module(gaps[:, :, ::2, ::3]), module(x))
    # torch sums a transposed plane in another order, so this one agrees to rounding only.
    torch.testing.assert_close(module(x.transpose(2, 3)), module(x.transpose(2, 3).contiguous()))
    flat = torch.randn(2 * 8 * 40 + 1).half()[1:].view(2, 8, 5, 8)
    assert torch.equal(copy.deepcopy(module).half()(flat), copy.deepcopy(module).half()(flat.clone()))
    row = torch.randn(1, 8, 5, 1).expand(2, 8, 5, 8).requires_grad_()
    module(row).sum().backward()
    assert row.grad is not None


def test_the_output_gradient_may_have_any_strides():  # T13, T15
    module = active(cbam.CBAM(8)).eval()
    x = torch.randn(2, 8, 5, 8)
    gaps = torch.full((2, 8, 10, 24), float("nan"))
    gaps[:, :, ::2, ::3] = 1
    for grad in (torch.ones(1).expand(2, 8, 5, 8), gaps[:, :, ::2, ::3]):
        _, dx, _ = gradients(module, module, x, grad)
        _, expected, _ = gradients(module, module, x, torch.ones(2, 8, 5, 8))
        assert torch.equal(dx, expected)


def test_a_nan_pixel_affects_only_its_own_sample_in_evaluation():  # T17
    module = active(cbam.CBAM(8)).eval()
    x = torch.randn(3, 8, 5, 5)
    clean = module(x)
    x[1, 2, 3, 3] = float("nan")
    out = module(x)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e38, 1e-38, -0.0, 1e-42])
def test_nan_and_inf_appear_where_the_released_formula_has_them(value):  # T18, T19
    module = active(cbam.CBAM(8))
    x = torch.randn(2, 8, 5, 5)
    x[0, 1] = value
    out = module(x)
    expected = released_spatial(released_channel(x, module.channel), module.spatial)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_the_mean_of_large_half_precision_values_does_not_overflow():  # T20
    module = cbam.CBAM(2).half().eval()
    x = torch.full((1, 2, 300, 300), 60000.0).half()
    assert module(x).isfinite().all()
    assert cbam.ops.channel_descriptor(x)[0, 0, 0].item() == 60000


@pytest.mark.parametrize("frozen", ["x", "channel.fc1", "spatial.conv", "channel", "spatial"])
def test_frozen_parts_get_no_gradient_and_others_are_unchanged(frozen):  # T24
    module = active(cbam.CBAM(8)).double().eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    full = {"x": x.grad} | {n: p.grad for n, p in module.named_parameters()}
    thawed = copy.deepcopy(module).requires_grad_(True)
    thawed.zero_grad()
    y = x.detach().clone().requires_grad_(frozen != "x")
    if frozen != "x":
        thawed.get_submodule(frozen).requires_grad_(False)
    thawed(y).sum().backward()
    got = {"x": y.grad} | {n: p.grad for n, p in thawed.named_parameters()}
    for name, expected in full.items():
        if name.startswith(frozen):
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], expected, rtol=1e-12, atol=1e-12)


def test_inference_is_bit_equal_to_evaluation_with_gradients():  # T25
    module = active(cbam.CBAM(8)).eval()
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    out = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), out)
    with torch.inference_mode():
        inferred = module(x)
        assert torch.equal(inferred, out)
    with pytest.raises(RuntimeError, match="nference tensors"):
        module(inferred).sum().backward()


def test_second_derivatives_are_right():  # T26
    module = active(cbam.CBAM(4, reduction=2, kernel_size=3)).double().eval()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=False)
    assert torch.autograd.gradgradcheck(module, (x,), fast_mode=True)


def test_misuse_of_the_autograd_graph_is_an_error():  # T27
    module = cbam.CBAM(8)
    base = torch.randn(2, 8, 5, 5, requires_grad=True)
    x = base * 1
    out = module(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    out = module(base).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_torch_func_transforms_work():  # T28
    module = active(cbam.CBAM(8)).double().eval()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda s: module(s).square().sum()))(x)
    y = x.clone().requires_grad_()
    module(y).square().sum().backward()
    torch.testing.assert_close(per_sample, y.grad)
    # An ensemble: one input for all members, and different weights for each.
    members = [active(cbam.CBAM(8).double()).eval() for _ in range(3)]
    for member in members:
        member.channel = module.channel
    spatial, buffers = torch.func.stack_module_state([member.spatial for member in members])
    named = {f"spatial.{name}": t.detach() for name, t in (spatial | buffers).items()}
    with torch.no_grad():
        of_each = torch.func.vmap(lambda w: torch.func.functional_call(module, w, (x,)))(named)
        torch.testing.assert_close(of_each, torch.stack([member(x) for member in members]))
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(module, (x,), (tangent,))
    _, pullback = torch.func.vjp(module, x)
    cotangent = torch.randn_like(x)
    torch.testing.assert_close((forward * cotangent).sum(), (pullback(cotangent)[0] * tangent).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_eager_products(dtype):  # T29
    module = cbam.CBAM(8).identity_()
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(module(x.to(dtype)), x.to(dtype))
        assert module(x).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(module(x), x)


def test_deterministic_mode_runs_and_is_reproducible():  # T30
    module = active(cbam.CBAM(8))
    x, grad = torch.randn(2, 8, 9, 7), torch.randn(2, 8, 9, 7)
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(module, module, x, grad)
        for _ in range(25):
            again = gradients(module, module, x, grad)
            assert all(
                torch.equal(a, b)
                for a, b in zip([*first[:2], *first[2]], [*again[:2], *again[2]], strict=True)
            )
    finally:
        torch.use_deterministic_algorithms(False)


def test_eight_threads_compute_the_same_as_one():  # T32
    from concurrent.futures import ThreadPoolExecutor

    module = active(cbam.CBAM(8)).eval()
    inputs = [torch.randn(2, 8, 9, 7) for _ in range(32)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]

    def run(x):
        with torch.no_grad():
            return module(x)

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(run, inputs), expected, strict=True))


def test_compiles_as_one_graph_without_one_for_every_size():  # T33
    module = active(cbam.CBAM(8))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in (5, 6, 9, 12, 17):
        x, grad = torch.randn(2, 8, size, size + 1), torch.randn(2, 8, size, size + 1)
        for ours, eager in zip(
            gradients(compiled, module, x, grad), gradients(module, module, x, grad), strict=True
        ):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_can_be_traced_by_fx_and_by_jit(tmp_path):  # S19
    module = active(cbam.CBAM(8)).eval()
    x = torch.randn(2, 8, 6, 7)
    graph = torch.fx.symbolic_trace(nn.Sequential(module))
    assert torch.equal(graph(x), module(x))
    traced = torch.jit.trace(module, x)
    torch.jit.save(traced, tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(x), module(x))
    assert torch.equal(torch.jit.trace(module, x[0])(x[1]), module(x[1]))


def test_can_be_copied_pickled_and_checkpointed(tmp_path):  # T37
    module = active(cbam.CBAM(8)).identity_()
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert list(twin.state_dict()) == list(module.state_dict())
    module = active(cbam.CBAM(8))
    grad = torch.randn(2, 8, 5, 5)
    plain = gradients(module, module, x, grad)
    for reentrant in (True, False):
        kept = gradients(
            lambda x, r=reentrant: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=r),
            module,
            x,
            grad,
        )
        assert same(plain, kept)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_layout_agrees_with_the_formula_in_double(data):  # T38
    N, C = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    H, W = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    if N * H * W == 1:
        return
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    module = active(cbam.CBAM(C, reduction=data.draw(st.integers(1, 20))))
    x = torch.randn(N, C, H, W).contiguous(memory_format=layout)
    double = copy.deepcopy(module).double()
    expected = released_spatial(released_channel(x.double().contiguous(), double.channel), double.spatial)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-3, atol=1e-4)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(cbam.CBAMError, match="fastest"), cbam.ops.using("fastest"):
        pass
