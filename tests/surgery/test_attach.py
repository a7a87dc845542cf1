"""Attention is attached and detached, and nothing else changes."""

import abc
import copy
import hashlib
import pickle
import re
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import cbam
from cbam.errors import AttachError, ExportError, InputError
from cbam.nn import squeeze_excitation
from cbam.surgery import attached
from tests.surgery.conftest import Block

BLOCKS = ["one", "two", "repeated"]
TRACED = torch.zeros(1, 3, 16, 16)


def fingerprint(model):
    """Everything `attach` must not change, and `detach` must restore."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.cpu().float().numpy().tobytes())
    shape = [(n, type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()]
    grads = [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]
    return digest.hexdigest(), shape, grads


def plain_part(model):
    return {k: v for k, v in model.state_dict().items() if ".cbam." not in k}


def open_gates(model):
    """Change every attention from its start, so that skipping it would show."""
    for part in attached(model).values():
        for p in part.parameters():
            nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", [cbam.CBAM, squeeze_excitation, lambda c: cbam.SpatialAttention()])
def test_an_identity_start_leaves_the_output_bit_equal(net, images, dtype, attention):  # S11, S14
    net, x = net.to(dtype), images.to(dtype)
    expected, keys = net(x), list(net.state_dict())
    assert cbam.attach(net, attention=attention) is net
    assert list(attached(net)) == BLOCKS
    assert torch.equal(net(x), expected)
    assert list(plain_part(net)) == keys
    assert all(p.dtype == dtype for p in net.parameters())
    assert not torch.equal(open_gates(net)(x), expected)


def test_the_paper_start_is_the_released_initialisation(net):
    cbam.attach(net, start="paper")
    for part in attached(net).values():
        assert part.channel.gain is None
        assert part.channel.fc2.weight.any()
        assert not part.spatial.bn.weight.any()


def test_bypassing_gives_the_plain_output_and_is_undone_on_exit(net, images):  # S17
    expected = net(images)
    refined = open_gates(cbam.attach(net))
    attended, before = refined(images), fingerprint(refined)
    with cbam.bypassed(refined) as plain:
        assert plain is refined
        assert torch.equal(plain(images), expected)
        assert list(plain.state_dict()) == list(refined.state_dict())
        with pytest.raises(AttachError, match="nothing to bypass"), cbam.bypassed(refined):
            pass
    with pytest.raises(RuntimeError, match="channels"), cbam.bypassed(refined):
        refined(images[:, :1])
    assert fingerprint(refined) == before
    assert torch.equal(refined(images), attended)


@pytest.mark.parametrize("where", ["one", r"two\.second", "", "stem"])
def test_attention_anywhere_can_be_bypassed(net, images, where):  # S17
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()) if not where else net
    x = torch.randn(2, 3, 9, 9) if not where else images
    if where == "stem":
        net.stem = nn.Sequential(net.stem, nn.ReLU())
    expected = model(x)
    open_gates(cbam.attach(model, where))
    assert not torch.equal(model(x), expected)
    with cbam.bypassed(model):
        model.train().eval()
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)


class _Residual(nn.Sequential):
    """Runs all of its children in turn."""

    def forward(self, x):
        return x + super().forward(x)


def test_a_block_that_iterates_over_its_children_is_bypassed():  # S17
    body = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)
    block, x = _Residual(*body).eval(), torch.randn(2, 8, 9, 9)
    expected = block(x)
    attended = open_gates(cbam.attach(block))(x)
    with cbam.bypassed(block):
        assert torch.equal(block(x), expected)
    assert torch.equal(block(x), attended)
    assert not torch.equal(attended, expected)


def test_detach_restores_outputs_keys_order_hooks_and_classes(net, images):  # S12, S16
    calls = []
    net.one.norm2.register_forward_hook(lambda *a: calls.append("hook"))
    before, expected = fingerprint(net), net(images)
    open_gates(cbam.attach(net))(images)
    assert cbam.detach(net) is net
    assert fingerprint(net) == before
    assert torch.equal(net(images), expected)
    assert len(calls) == 3  # once for every forward above, none for the trials of attach
    assert type(net.one).__name__ == "Block"
    assert "_cbam_route" not in dir(net.one)


def test_attaching_runs_no_hook_and_changes_no_buffer(net):
    net.train()
    for m in net.modules():
        m.register_forward_hook(lambda *a: pytest.fail("a hook ran"))
        m.register_forward_pre_hook(lambda *a: pytest.fail("a hook ran"))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    rng = torch.get_rng_state()
    cbam.sites(net)
    assert torch.equal(torch.get_rng_state(), rng)
    cbam.attach(net)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_plain_and_attached_checkpoints_load(net, images):  # S18
    plain = copy.deepcopy(net)
    open_gates(cbam.attach(net))
    keys = plain.load_state_dict(plain_part(net))
    assert keys.missing_keys == keys.unexpected_keys == []
    twin = cbam.attach(copy.deepcopy(plain))
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(images), net(images))
    late = cbam.attach(type(net)().eval())
    missing = late.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert all(".cbam." in key for key in missing.missing_keys)
    assert torch.equal(late(images), plain(images))


def test_attention_takes_mode_layout_and_device_of_its_block(net):  # S11
    net.train().to(memory_format=torch.channels_last)
    net.one.requires_grad_(False)
    net.two.eval()
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    cbam.attach(net)
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == frozen
    assert [m.training for m in attached(net).values()] == [True, False, True]
    assert net.one.cbam.spatial.conv.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        empty = type(net)()
    cbam.attach(empty)
    assert all(p.is_meta for p in empty.parameters())


def test_every_parameter_gets_a_gradient_and_learns_after_a_few_steps(net, images):  # S20
    cbam.attach(net.train())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(images), torch.tensor([0, 1])).backward()
        assert all(p.grad is not None for p in net.parameters())
        if step == 0:
            assert all(part.channel.fc2.weight.grad.any() for part in attached(net).values())
            assert all(part.spatial.bn.weight.grad.any() for part in attached(net).values())
        optimizer.step()
    assert all(p.grad.any() for part in attached(net).values() for p in part.channel.parameters())
    assert all(part.spatial.conv.weight.grad.any() for part in attached(net).values())


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_a_network_attached_in_inference_mode_can_be_trained(net, images, start):  # S20
    weights = cbam.attach(copy.deepcopy(net)).state_dict()
    with torch.inference_mode():
        cbam.attach(net, start=start)
        cbam.load_weights(net, weights)
    with cbam.ops.using("reference"):
        net.train()(images).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_attention_survives_conversion_to_sync_batchnorm(net, images):
    open_gates(cbam.attach(net))
    expected = net(images)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    assert isinstance(converted.one.norm2, nn.SyncBatchNorm)
    assert torch.equal(converted(images), expected)


def test_copies_and_pickles_are_independent_and_equal(net, images, tmp_path):  # S21
    open_gates(cbam.attach(net))
    expected = net(images)
    torch.save(net, tmp_path / "net.pt")
    twins = [copy.deepcopy(net), torch.load(tmp_path / "net.pt", weights_only=False)]
    twins += [pickle.loads(pickle.dumps(net, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in twins:
        assert torch.equal(twin(images), expected)
        assert twin.one.cbam is not net.one.cbam
        assert isinstance(twin.one, type(net.one).__mro__[1])
        cbam.detach(twin)
    assert torch.equal(net(images), expected)


def test_attention_survives_compile_export_fx_and_jit_trace(net, images, tmp_path):  # S19, T33
    open_gates(cbam.attach(net))
    expected = net(images)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(images), expected)
    assert torch.equal(torch.export.export(net, (images,)).module()(images), expected)
    assert torch.equal(torch.fx.symbolic_trace(net)(images), expected)
    assert torch.equal(torch.jit.trace(net, images)(images), expected)
    state = dict(net.named_parameters()) | dict(net.named_buffers())
    assert torch.equal(torch.func.functional_call(net, state, (images,)), expected)
    torch._dynamo.reset()


def test_a_jit_trace_with_gradients_passes_torchs_check():  # as TensorBoard's add_graph traces
    net = cbam.attach(torchvision.models.resnet18(num_classes=3)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.is_grad_enabled()  # the check traces once more without
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x), rtol=1e-4, atol=1e-5)


def test_compiles_as_one_graph_in_training(net, images):
    open_gates(cbam.attach(net.train()))
    torch._dynamo.reset()
    torch.compile(net, fullgraph=True, backend="aot_eager")(images).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    torch._dynamo.reset()


def test_scripting_is_refused_and_changes_nothing(net):
    cbam.attach(net)
    before = {name: id(module) for name, module in net.named_modules()}
    with pytest.raises(ExportError, match=r"ChannelAttention .* use torch\.jit\.trace"):
        torch.jit.script(net)
    assert {name: id(module) for name, module in net.named_modules()} == before


def test_parametrised_children_keep_their_parametrisation(net, images):  # S12
    parametrizations.weight_norm(net.one.second)
    parametrizations.spectral_norm(net.two.first)
    net.eval()
    expected = net(images)
    cbam.attach(net)
    assert torch.equal(net(images), expected)
    cbam.detach(net)
    assert torch.equal(net(images), expected)


class _Negated(nn.Module):
    def forward(self, x):
        return -x


def test_a_block_parametrised_after_attaching_keeps_its_attention(net, images):  # S12
    net.two.weight = nn.Parameter(torch.ones(1))
    plain = net(images)
    open_gates(cbam.attach(net))
    expected = net(images)
    parametrize.register_parametrization(net.two, "weight", _Negated())
    assert list(attached(net)) == BLOCKS
    assert "two" in [s.name for s in cbam.sites(net) if s.attached]
    with pytest.raises(TypeError, match="derived from a class with attention"):
        net.two.__reduce_ex__(2)
    for out in (cbam.detach, lambda m: cbam.bypassed(m).__enter__()):
        with pytest.raises(
            AttachError, match="class of two was changed after attaching, to ParametrizedBlock"
        ):
            out(net)
    assert torch.equal(net(images), expected)
    parametrize.remove_parametrizations(net.two, "weight")
    assert torch.equal(cbam.detach(net)(images), plain)


def test_a_block_used_twice_has_one_attention(net):  # S1
    cbam.attach(net)
    assert list(attached(net)) == BLOCKS
    assert len({id(p) for p in net.parameters()}) == len(list(net.parameters()))


def test_attaching_twice_is_refused_and_names_the_sites(net):  # S2
    cbam.attach(net)
    before = fingerprint(net)
    with pytest.raises(AttachError, match=r"already attached at one, two, repeated; call cbam.detach"):
        cbam.attach(net)
    assert fingerprint(net) == before


def test_parts_of_a_network_can_have_different_attention(net, images):
    expected = net(images)
    cbam.attach(net, "one")
    cbam.attach(net, r"two|repeated", squeeze_excitation)
    assert [type(m).__name__ for m in attached(net).values()] == ["CBAM"] + ["ChannelAttention"] * 2
    assert torch.equal(net(images), expected)
    with pytest.raises(AttachError, match="already attached at two"):
        cbam.attach(net, "two")


def test_where_may_be_a_predicate(net):
    cbam.attach(net, lambda name, module: name.startswith("t") and hasattr(module, "project"))
    assert list(attached(net)) == ["two"]


def test_where_names_any_module_when_no_residual_block_matches(net, images):
    expected = net(images)
    cbam.attach(net, "stem")
    assert net.stem.cbam.channel.channels == 8
    assert isinstance(net.stem, nn.Conv2d)
    assert torch.equal(net(images), expected)
    assert not torch.equal(open_gates(net)(images), expected)
    assert torch.equal(cbam.detach(net)(images), expected)


def test_attention_after_a_stage_is_the_last_step_of_its_sequential(images):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 1)).eval()
    expected = model(images)
    cbam.attach(model, "0")
    assert list(model[0]._modules) == ["0", "1", "cbam"]
    assert [(s.name, s.attached, s.why) for s in cbam.sites(model)] == [("0", True, "on its output")]
    assert model[0].cbam.channel.channels == 4
    assert torch.equal(model(images), expected)
    assert not torch.equal(open_gates(model)(images), expected)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    assert torch.equal(cbam.detach(model)(images), expected)


class _Concatenates(nn.Sequential):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class _TwoTimes(nn.Conv2d):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


def test_output_channels_of_user_modules_are_observed(images):  # S5
    model = nn.Sequential(_TwoTimes(3, 5, 1), _Concatenates(nn.Conv2d(8, 4, 1)), nn.Conv2d(12, 2, 1)).eval()
    model[1].register_forward_hook(lambda *_: pytest.fail("a user's hook ran"))
    before = fingerprint(model)
    with pytest.raises(AttachError, match="attention after 1 would run 2 times"):
        cbam.attach(model, "1")
    assert fingerprint(model) == before
    model[1]._forward_hooks.clear()
    expected = model(images)
    assert cbam.attach(model, "0")[0].cbam.channel.channels == 8
    assert torch.equal(model(images), expected)


def test_a_forward_assigned_to_the_instance_is_refused(net):
    net.stem.forward = lambda x: F.max_pool2d(x[:, :1].expand(-1, 8, -1, -1), 2)
    with pytest.raises(AttachError, match="stem has a forward assigned to the instance"):
        cbam.attach(net, "stem")


def test_a_slice_of_an_attached_sequential_is_plain(images):  # S22
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))).eval()
    part = cbam.attach(model, "0")[0][:2]
    assert (attached(part), cbam.sites(part)) == ({}, [])
    expected = part(images)
    assert torch.equal(cbam.attach(part, "0")(images), expected)
    assert list(attached(part)) == ["0"]
    whole = nn.Sequential(model[0][:2])
    assert torch.equal(pickle.loads(pickle.dumps(cbam.attach(whole, "0")))(images), expected)
    assert type(cbam.detach(whole)[0]) is nn.Sequential


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (r"layer9\..*", r"where='layer9\\\\\.\.\*' matches no whole module name; nearest: "),  # S3
        ("on", "nearest: one"),
        ("one.norm1", "SyncBatchNorm would drop attention"),
        ("", r"output of the model is not an \(N, C, H, W\) map"),  # S5
        ("head", r"output of head is not an \(N, C, H, W\) map"),  # S5
        (lambda name, module: False, "no whole module name"),
    ],
)
def test_an_invalid_where_is_refused_and_nothing_changes(net, where, words):
    before = fingerprint(net)
    with pytest.raises(AttachError, match=words):
        cbam.attach(net, where)
    assert fingerprint(net) == before


def test_an_invalid_pattern_and_an_unknown_start_are_refused(net):
    with pytest.raises(InputError, match="not a valid regular expression"):
        cbam.attach(net, "(")
    with pytest.raises(InputError, match='"identity" or "paper", got \'zero\''):
        cbam.attach(net, start="zero")


@pytest.mark.parametrize("where", [["one"], ("one",), {"one"}, 1, re.compile(b"one")])
def test_a_where_of_the_wrong_type_is_refused(net, where):
    with pytest.raises(
        InputError, match=r"where must be a regular expression or .*, got .*; join several names"
    ):
        cbam.attach(net, where)


def test_where_may_be_a_compiled_pattern(net):
    assert list(attached(cbam.attach(net, re.compile("on[ae]")))) == ["one"]


def test_attention_on_a_module_without_weights_has_the_models_dtype(images):  # S11
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)).to(torch.bfloat16)
    expected = model(images.bfloat16())
    cbam.attach(model, "1")
    assert torch.equal(model(images.bfloat16()), expected)


def test_attention_passed_as_where_is_reported(net):
    for attention in (cbam.CBAM, cbam.CBAM(8)):
        with pytest.raises(
            InputError, match="the second argument is where, got a module; pass it as attention="
        ):
            cbam.attach(net, attention)
    with pytest.raises(AttachError, match="did you mean attention='eca'"):
        cbam.attach(net, "eca")


def test_networks_without_residual_blocks_are_refused():  # S3, S22
    for model in (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        nn.Linear(3, 3),
        nn.TransformerEncoderLayer(8, 2),
    ):
        with pytest.raises(AttachError, match="no place for attention"):
            cbam.attach(model)


def test_a_cycle_in_the_module_graph_is_handled(net, images):  # S22
    object.__setattr__(net.one, "parent", net)
    net.one._modules["parent"] = net
    expected = net(images)
    cbam.attach(net)
    assert torch.equal(net(images), expected)


def test_an_uninitialised_network_is_refused():  # S22
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
    with pytest.raises(AttachError, match="run the model once, then attach"):
        cbam.attach(model)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda m: nn.DataParallel(m), "DataParallel as the model: attach before wrapping"),  # S8
        (lambda m: nn.Sequential(nn.DataParallel(m)), "DataParallel at '0'"),
        (lambda m: torch.compile(m, backend="eager"), "attach first, then torch.compile"),  # S7
        (lambda m: m.compile(backend="eager") or m, "attach first, then torch.compile"),
        (lambda m: torch.export.export(m.eval(), (TRACED,)).module(), "attach first, then torch.export"),
        (lambda m: torch.jit.trace(m, TRACED), "attach before torch.jit"),  # S6
    ],
)
def test_wrapped_models_are_refused(net, wrap, words):
    with pytest.raises(AttachError, match=words):
        cbam.attach(wrap(net))


def test_the_refusal_of_a_wrapped_model_names_the_call(net):
    wrapped = nn.DataParallel(cbam.attach(net))
    with pytest.raises(AttachError, match="DataParallel as the model: detach before wrapping"):
        cbam.detach(wrapped)
    with pytest.raises(AttachError, match="bypass before wrapping"), cbam.bypassed(wrapped):
        pass


def test_an_fx_graph_is_refused_and_unchanged(net, images):
    traced = torch.fx.symbolic_trace(net)
    expected = traced(images)
    with pytest.raises(AttachError, match=r"the model: a torch.fx graph.*: attach, then trace"):
        cbam.attach(traced)
    with pytest.raises(AttachError, match=r"cannot go into body: a torch.fx graph"):
        cbam.attach(nn.Sequential(OrderedDict(body=traced)), "body")
    traced.recompile()
    assert torch.equal(traced(images), expected)


def test_attaching_works_before_ddp_and_is_refused_after(net, tmp_path):  # S8
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(AttachError, match="DistributedDataParallel as the model"):
            cbam.attach(wrapped)
        assert not attached(net)
        after = nn.parallel.DistributedDataParallel(cbam.attach(net))
        after.train()(torch.randn(2, 3, 16, 16)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_attaching_and_loading_work_before_sharding_and_are_refused_after(net, tmp_path):  # S8
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        state, x = cbam.attach(net).state_dict(), torch.randn(2, 3, 16, 16)
        expected = net.train()(x)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = fully_shard(net, mesh=mesh)
        assert torch.equal(sharded(x), expected)
        sharded(x).sum().backward()
        assert all(p.grad is not None for p in sharded.parameters())
        with pytest.raises(InputError, match=r"is sharded .*: load the weights before sharding"):
            cbam.load_weights(sharded, state)
        with pytest.raises(AttachError, match="attach before wrapping"):
            cbam.attach(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_a_quantised_layer_is_refused(net):  # S10
    class Quantised(nn.Module):
        def weight(self):
            return None

    net.extra = Quantised()
    with pytest.raises(AttachError, match=r"quantised Quantised at 'extra': attach, then quantise"):
        cbam.attach(net)


@pytest.mark.filterwarnings("ignore")  # torch is about to drop its old quantisation
def test_a_dynamically_quantised_layer_is_refused(net):  # S10
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(AttachError, match=r"quantised Linear at 'head': attach, then quantise"):
        cbam.attach(quantised)


@pytest.mark.filterwarnings("ignore")  # torch is about to drop its old quantisation
@pytest.mark.parametrize("name", ["cbam", "se"])
def test_attached_networks_can_be_quantised(net, name):
    cbam.attach(net.eval(), attention=name, start="paper")
    x = torch.randn(2, 3, 9, 9)
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        exact, found = net(x), quantised(x)
    assert not torch.equal(found, exact)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_block_with_an_attribute_cbam_is_refused_and_nothing_changes(net):
    net.two.cbam = "mine"
    before = fingerprint(net)
    with pytest.raises(AttachError, match="two has an attribute 'cbam' of its own"):
        cbam.attach(net)
    assert fingerprint(net) == before


class _Plain(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.conv(x).sigmoid()


class _Liar(_Plain):
    def identity_(self):
        return self


class _Narrow(_Plain):
    def forward(self, x):
        return x[:, :1]


@pytest.mark.parametrize(
    ("attention", "start", "words"),
    [
        (_Plain, "identity", r"needs _Plain.identity_\(\)"),
        (_Liar, "identity", "does not make it return exactly its input"),
        (_Narrow, "paper", r"keep the shape of its input: for \(1, 8, 5, 3\) it returned"),
        (lambda c: 1 / 0, "paper", r"attention\(8\) for one failed: division by zero"),
        (lambda c: "cbam", "paper", "returned a str, expected an nn.Module"),
        (lambda c: cbam.CBAM(c + 1), "paper", "built for 9 channels, got 8"),
    ],
)
def test_attention_that_does_not_fit_is_refused_and_nothing_changes(net, attention, start, words):  # S15
    before = fingerprint(net)
    with pytest.raises(AttachError, match=words):
        cbam.attach(net, attention=attention, start=start)
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ("Eca", "unknown attention 'Eca'; nearest: eca"),
        (7, "got a int"),
        (cbam.CBAM(8), "got a CBAM"),
    ],
)
def test_an_invalid_attention_is_refused_and_nothing_changes(net, attention, words):  # S15
    before = fingerprint(net)
    with pytest.raises(InputError, match=words):
        cbam.attach(net, attention=attention)
    assert fingerprint(net) == before


def test_attention_may_be_a_name_of_the_command_line(net):
    cbam.attach(net, attention="eca")
    assert isinstance(net.one.cbam, cbam.nn.ECA)


class _Registry(abc.ABCMeta):
    known: ClassVar[dict] = {}

    def __init__(cls, name, bases, namespace):
        super().__init__(name, bases, namespace)
        assert cls.__qualname__ not in cls.known
        cls.known[cls.__qualname__] = cls


class _Registered(Block, metaclass=_Registry):
    __slots__ = ("note",)

    def __init_subclass__(cls, *, key):
        raise TypeError("a subclass needs a key")


def test_attaching_adds_nothing_to_a_class_registry():  # S16
    net, x = nn.Sequential(nn.Conv2d(3, 8, 1), _Registered(8, 8)).eval(), torch.randn(1, 3, 7, 5)
    known, expected = dict(_Registry.known), net(x)
    cbam.attach(net)
    assert _Registry.known == known
    assert isinstance(net[1], _Registered)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
    with cbam.bypassed(net):
        assert type(net[1]) is _Registered
    assert type(cbam.detach(net)[1]) is _Registered


def test_a_failure_at_the_last_block_rolls_back(net):  # S15
    before = fingerprint(net)
    made = []

    def third_fails(channels):
        made.append(channels)
        if len(made) == 3:
            raise MemoryError("no more")
        return cbam.CBAM(channels)

    with pytest.raises(AttachError, match="repeated failed: no more"):
        cbam.attach(net, attention=third_fails)
    assert fingerprint(net) == before


def test_foreign_attention_with_identity_starts_bit_equal(net, images):
    class Scale(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(channels, 1, 1))

        def identity_(self):
            nn.init.ones_(self.scale)

        def forward(self, x):
            return x * self.scale

    expected = net(images)
    assert torch.equal(cbam.attach(net, attention=Scale)(images), expected)


def test_the_reversed_order_is_a_sequential(net, images):
    expected = net(images)
    cbam.attach(net, attention=lambda c: nn.Sequential(cbam.SpatialAttention(), cbam.ChannelAttention(c)))
    assert torch.equal(net(images), expected)


@pytest.mark.parametrize("call", [cbam.attach, cbam.detach, cbam.sites])
def test_a_non_module_is_refused(call):
    with pytest.raises(InputError, match=r"expected an nn.Module, got str"):
        call("resnet50")


def test_detaching_a_plain_model_is_refused(net):
    with pytest.raises(AttachError, match="nothing to detach"):
        cbam.detach(net)
