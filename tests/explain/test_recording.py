import copy

import pytest
import torch
from torch import nn

import cbam
from cbam.explain import record
from cbam.nn import squeeze_excitation

BLOCKS = ["stage1", "stage2.0", "stage2.1"]


def state(model):
    """Everything a recording might leave behind."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    return hooks, [sorted(vars(m)) for m in model.modules()]


def test_a_recording_names_every_block_and_holds_its_feature_map_and_gates(build, images):
    model = build()
    with record(model) as recording:
        model(images)
    assert list(recording) == BLOCKS
    step = recording["stage2.1"]
    assert [own.kind for own in step.steps] == ["what", "where"]
    assert all(
        own.after.shape == step.before.shape == step.after.shape == (4, 16, 8, 6) for own in step.steps
    )
    assert step.channel_gate.shape == (4, 16, 1, 1)
    assert step.spatial_gate.shape == (4, 1, 8, 6)
    assert not any(value.requires_grad for value in (step.before, step.channel_gate, step.after))


@pytest.mark.parametrize("training", [False, True])
def test_the_steps_are_exactly_what_the_forward_computed(build, images, training):
    model = build().train(training)
    with record(model) as recording:
        model(images)
    assert list(recording) == BLOCKS
    for step in recording.values():
        what, where = step.steps
        assert torch.equal(what.after, step.before * step.channel_gate)
        assert torch.equal(where.after, what.after * step.spatial_gate)
        assert torch.equal(step.after, where.after)
        assert step.spatial_gate.std() > 0


def test_recording_changes_neither_the_output_nor_the_running_statistics(build, images):
    model = build().train()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images)
    once = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(start)
    with record(model) as recording:
        assert torch.equal(model(images), expected)
    assert recording
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())
    assert int(once["stage1.cbam.spatial.bn.num_batches_tracked"]) == 1


def test_gradients_flow_as_without_a_recording(build, images):
    model = build().train()
    model(images).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with record(model):
        model(images).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_recording_leaves_the_model_unchanged(build, images):
    model = build()
    before = state(model)
    with record(model) as recording:
        assert state(model) != before
        model(images)
    assert state(model) == before
    recording.clear()
    model(images)
    assert recording == {}


def test_an_exception_while_recording_leaves_the_model_unchanged(build, images):  # E7
    model = build()
    before = state(model)
    with pytest.raises(KeyError), record(model):
        raise KeyError("the body")
    with pytest.raises(RuntimeError), record(model):
        model(images[:, :2])
    assert state(model) == before


def test_recordings_nest_and_repeat(build, images):
    model = build()
    before = state(model)
    with record(model) as outer:
        model(images[:1])
        with record(model) as inner:
            model(images[:2])
        assert len(outer["stage1"].before) == len(inner["stage1"].before) == 2
        model(images)
    assert len(outer["stage1"].spatial_gate) == 4
    assert len(inner["stage1"].spatial_gate) == 2
    assert state(model) == before
    with record(model) as again:
        model(images)
    assert torch.equal(again["stage1"].spatial_gate, outer["stage1"].spatial_gate)


def test_channel_only_attention_has_no_spatial_gate(build, images):
    model = build(lambda channels: squeeze_excitation(channels, reduction=4))
    with record(model) as recording:
        model(images)
    assert list(recording) == BLOCKS
    step = recording["stage1"]
    assert step.spatial_gate is None
    assert [own.kind for own in step.steps] == ["what"]
    assert torch.equal(step.after, step.before * step.channel_gate)


def test_spatial_only_attention_has_no_channel_gate(build, images):
    model = build(lambda channels: cbam.SpatialAttention())
    with record(model) as recording:
        model(images)
    step = recording["stage1"]
    assert step.channel_gate is None
    assert [own.kind for own in step.steps] == ["where"]
    assert torch.equal(step.after, step.before * step.spatial_gate)


def test_a_module_on_its_own_is_recorded_too():
    attention = cbam.CBAM(8)
    with record(attention) as recording:
        attention(torch.randn(1, 8, 4, 4))
    assert list(recording) == [""]


def test_attention_that_is_called_by_keyword_is_recorded_too():
    attention, x = cbam.CBAM(8), torch.randn(1, 8, 4, 4)
    with record(attention) as recording:
        attention(x=x)
    assert torch.equal(recording[""].before, x)


def test_attentions_that_share_a_parent_keep_their_full_names():
    model = nn.Sequential(cbam.SpatialAttention(), nn.Sequential(cbam.CBAM(8), cbam.CBAM(8)))
    with record(model) as recording:
        model(torch.randn(1, 8, 4, 4))
    assert list(recording) == ["0", "1.0", "1.1"]


def test_the_middle_of_the_gates_is_1_after_an_identity_start(build, images):
    model = build(lambda channels: cbam.CBAM(channels).identity_())
    with record(model) as recording:
        model(images)
    assert [own.middle for own in recording["stage1"].steps] == [1, 1]


def test_a_recording_in_inference_mode_equals_one_outside(build, images):
    model = build()
    with record(model) as expected:
        model(images)
    with torch.inference_mode(), record(model) as recording:
        model(images)
    assert torch.equal(recording["stage2.1"].after, expected["stage2.1"].after)


def test_a_network_without_attention_gives_an_empty_recording(plain, images):
    with record(plain) as recording:
        plain(images)
    assert recording == {}


def test_models_that_ignore_hooks_are_refused(build):
    with (
        pytest.raises(cbam.CBAMError, match=r"compiled.*before torch\.compile"),
        record(torch.compile(build())),
    ):
        pass
    model = build()
    model.stage1.compile()
    with pytest.raises(cbam.CBAMError, match="compiled"), record(model):
        pass


def test_attached_blocks_are_named_as_attach_names_them(images):
    torchvision = pytest.importorskip("torchvision")
    model = cbam.attach(torchvision.models.resnet18()).eval()
    before = state(model)
    with record(model) as recording:
        model(images)
    assert list(recording) == list(cbam.surgery.attached(model))
    assert torch.equal(recording["layer1.0"].spatial_gate, torch.ones(4, 1, 8, 6))
    assert [own.middle for own in recording["layer1.0"].steps] == [1, 1]
    assert state(model) == before


def test_the_reversed_order_is_recorded_under_its_block(images):
    torchvision = pytest.importorskip("torchvision")

    def where_then_what(channels):
        return nn.Sequential(cbam.SpatialAttention(), cbam.ChannelAttention(channels))

    model = cbam.attach(torchvision.models.resnet18(), attention=where_then_what, start="paper").eval()
    with record(model) as recording:
        model(images)
    step = recording["layer2.1"]
    assert list(recording) == list(cbam.surgery.attached(model))
    assert [own.kind for own in step.steps] == ["where", "what"]
    assert torch.equal(step.steps[0].after, step.before * step.spatial_gate)
    assert torch.equal(step.after, step.before * step.spatial_gate * step.channel_gate)


def test_gates_side_by_side_come_in_turn_and_their_product_is_the_output(images):
    pytest.importorskip("torchvision")
    model = cbam.build("resnet18+cbam-parallel").eval()
    with record(model) as recording:
        model(images)
    step = recording["layer2.1"]
    assert [own.kind for own in step.steps] == ["what", "where"]
    assert torch.equal(step.steps[0].after, step.before * step.channel_gate)
    assert torch.equal(step.steps[1].after, step.after)


NO_GATE = {"gc", "sk"}


def check_recorded(model, images, blocks, name):
    before, expected = state(model), model(images)
    with record(model) as recording:
        assert torch.equal(model(images), expected)
    assert state(model) == before
    assert list(recording) == blocks
    for step in recording.values():
        assert step.before.shape == step.after.shape
        assert (step.steps == ()) == (name in NO_GATE)
        assert all(own.after.shape == step.before.shape for own in step.steps)
        if step.steps:
            assert torch.equal(step.steps[-1].after, step.after)


@pytest.mark.parametrize("name", sorted(cbam.nn.ATTENTION))
def test_every_attention_of_ours_is_recorded_written_by_hand_or_attached(build, images, name):
    check_recorded(build(cbam.nn.ATTENTION[name]), images, BLOCKS, name)
    pytest.importorskip("torchvision")
    model = cbam.build(f"resnet_tiny+{name}").eval()
    check_recorded(model, images, list(cbam.surgery.attached(model)), name)


def test_the_two_steps_of_gam_are_what_and_where(build, images):
    model = build(lambda channels: cbam.nn.GAM(channels).identity_())
    with record(model) as recording:
        model(images)
    assert list(recording) == BLOCKS
    for step in recording.values():
        assert [own.kind for own in step.steps] == ["what", "where"]
        assert [own.middle for own in step.steps] == [1, 1]
        N, C, h, w = step.before.shape
        assert step.channel_gate.shape == (N, C, 1, 1)
        assert torch.equal(step.spatial_gate, step.steps[1].gate.mean(1, keepdim=True))
        assert step.spatial_gate.shape == (N, 1, h, w)


def test_a_copy_made_while_recording_has_attention_of_its_own(build, images):
    model = build()
    with record(model) as recording:
        model(images)
        twin = copy.deepcopy(model)
        before, seen = twin(images), dict(recording)
        for name, parameter in model.named_parameters():
            if ".cbam." in name:
                parameter.data.add_(torch.randn_like(parameter))
        assert torch.equal(twin(images), before)  # the original's weights are not the copy's
        assert all(recording[name] is seen[name] for name in seen)  # nor is the copy recorded
        for name, parameter in twin.named_parameters():
            if ".cbam." in name:
                parameter.data.add_(torch.randn_like(parameter))
        assert not torch.equal(twin(images), before)
    again = copy.deepcopy(twin)
    assert torch.equal(again(images), twin(images))


@pytest.mark.parametrize(("dim", "size"), [(1, (20,)), (2, (6, 5)), (3, (4, 6, 5))])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_1d_and_3d_inputs_are_recorded_in_their_shape(dim, size, batch):
    model = cbam.CBAM(8, dim=dim).eval()
    nn.init.ones_(model.spatial.bn.weight)
    x = torch.randn(*batch, 8, *size)
    with record(model) as recording:
        y = model(x)
    block, N, ones = recording[""], *(batch or (1,)), (1,) * dim
    assert [own.kind for own in block.steps] == ["what", "where"]
    assert torch.equal(block.before, x.view(N, 8, *size))
    assert torch.equal(block.after, y.view(N, 8, *size))
    assert block.channel_gate.shape == (N, 8, *ones)
    assert block.spatial_gate.shape == (N, 1, *size)
    assert torch.equal(block.steps[0].after, block.before * block.channel_gate)
