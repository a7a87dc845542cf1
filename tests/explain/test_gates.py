import itertools
import re

import pytest
import torch
from torch import nn

import cbam
from cbam.errors import ConfigError, InputError
from cbam.explain.gates import BlockStatistics, GateStatistics, draw, gate_figure, gate_statistics, gate_table


class Scripted(cbam.ChannelAttention):
    """Channel gates that a test says: a function of the image's first pixel."""

    def __init__(self, gates) -> None:
        super().__init__(4)
        self.gates = gates

    def gate(self, x):
        return self.gates(x[:, 0, 0, 0])[:, :, None, None]


def network(gates) -> nn.Module:
    return nn.Sequential(Scripted(gates))


def run(gates, pictures: torch.Tensor, targets=None) -> BlockStatistics:
    """Statistics of scripted gates; the first pixel of each image is its value in `pictures`."""
    images = pictures[:, None, None, None].expand(-1, 4, 3, 3).float()
    (block,) = gate_statistics(network(gates), [(images, targets)])
    return block


FOUR = torch.tensor([0.2, 0.4, 0.6, 0.8])


def test_gates_that_are_the_same_in_every_image_are_fixed():
    block = run(lambda first: FOUR.expand(len(first), 4), torch.arange(1, 21))
    assert block.what.fixed == pytest.approx(1)
    assert block.what.by_image == pytest.approx(0, abs=1e-6)
    assert block.verdict == "the same channels for every image"
    assert block.what.mean == pytest.approx(0.5)


def test_class_dependent_gates_are_distinguished_from_image_dependent():
    targets = torch.arange(40) % 4
    by_class = run(
        lambda first: FOUR[(first.long() - 1) % 4, None].expand(-1, 4), 1 + torch.arange(40), targets
    )
    assert by_class.what.by_class == pytest.approx(1)
    assert by_class.verdict == "follows the class"
    torch.manual_seed(0)
    own = torch.rand(40)
    by_picture = run(lambda first: own[first.long() - 1, None].expand(-1, 4), 1 + torch.arange(40), targets)
    assert by_picture.what.by_class < 0.1
    assert by_picture.what.by_image > 0.9
    assert by_picture.verdict == "follows the image"
    unknown = run(lambda first: FOUR + own[first.long() - 1, None], 1 + torch.arange(40))
    assert unknown.what.by_class is None
    assert unknown.verdict == "follows the image"


def test_the_variance_classes_explain_is_corrected_for_chance():
    """Of 12 random images in 6 classes, classes seem to explain 5/11 of the variance."""
    shares = []
    for seed in range(200):
        own = torch.rand(12, 4, generator=torch.Generator().manual_seed(seed))
        block = run(lambda first, own=own: own[first.long() - 1], 1 + torch.arange(12), torch.arange(12) % 6)
        shares.append(block.what.by_class)
    assert sum(shares) / len(shares) < 0.15


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_fixed_variance_is_corrected_for_chance(count):
    """The mean of N random images has 1/N of their variance, which is not the same in every image."""
    shares = []
    for seed in range(200):
        own = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
        shares.append(run(lambda first, own=own: own[first.long() - 1], 1 + torch.arange(count)).what.fixed)
    assert sum(shares) / len(shares) < 0.6 / count  # 0.75 / count and more without the correction
    mixed = run(lambda first: FOUR + 0.2 * torch.arange(len(first))[:, None], 1 + torch.arange(count))
    assert mixed.what.fixed + mixed.what.by_image == pytest.approx(1)
    own_variance = 0.04 * torch.arange(float(count)).var(correction=0)
    assert mixed.what.fixed == pytest.approx(float(0.05 / (0.05 + own_variance)), rel=1e-4)


def test_the_parts_of_the_variance_are_a_whole():
    own = torch.rand(30, 4)
    block = run(lambda first: own[first.long() - 1], 1 + torch.arange(30), torch.arange(30) % 3)
    assert block.what.fixed + block.what.by_class + block.what.by_image == pytest.approx(1)


def test_saturated_gates_are_counted():
    values = torch.tensor([0.001, 0.999, 0.5, 0.001])
    block = run(lambda first: values.expand(len(first), 4), torch.arange(1, 5))
    assert block.what.saturated == pytest.approx(0.75)
    assert block.verdict == "saturated"


def test_the_change_is_that_of_the_map():
    block = run(lambda first: torch.full((len(first), 4), 0.9), torch.arange(1, 5))
    assert block.change == pytest.approx(0.1)
    idle = run(lambda first: torch.full((len(first), 4), 0.999), torch.arange(1, 5))
    assert idle.verdict == "next to nothing"


def test_a_fresh_identity_start_does_nothing(images):
    model = cbam.build("resnet_tiny+cbam", start="identity")
    blocks = gate_statistics(model, [(images, None)])
    assert blocks
    for block in blocks:
        assert block.change == 0
        assert block.middle == block.what.mean == block.where.mean == 1
        assert block.verdict == "next to nothing"


def test_batches_do_not_matter_and_the_model_is_left_as_it_was(build, images):
    model = build().train()
    whole = gate_statistics(model, [(images, torch.arange(4) % 2)])
    parts = gate_statistics(model, [(images[i : i + 1], torch.tensor([i % 2])) for i in range(4)])
    for a, b in zip(whole, parts, strict=True):
        assert a.change == pytest.approx(b.change, rel=1e-4)
        for one, two in ((a.what, b.what), (a.where, b.where)):
            assert one.quantiles == pytest.approx(two.quantiles, rel=1e-4)
            assert one.fixed == pytest.approx(two.fixed, rel=1e-3)
        assert a.what.by_class == pytest.approx(b.what.by_class, rel=1e-2, abs=1e-4)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", sorted(cbam.nn.ATTENTION))
def test_every_attention_has_statistics_that_can_be_drawn(name, images, tmp_path):
    model = cbam.build(f"resnet_tiny+{name}")
    blocks = gate_statistics(model, [(images, None)])
    assert len(blocks) == len(cbam.surgery.attached(model))
    assert gate_table(blocks).count("\n") == len(blocks) + 1
    if name == "gam":
        words = "\n".join(
            re.findall(r"<!-- (.*?) -->", gate_figure(blocks, tmp_path / "g.svg").read_text(), re.DOTALL)
        )
        assert all(block.name in words for block in blocks)


@pytest.mark.parametrize(
    ("middle", "words"),
    [(1.0, "dashed: changes nothing"), (0.5, "dashed: middle of the range; 1 changes nothing")],
)
def test_the_dashed_line_of_the_figure_changes_nothing_only_at_one(tmp_path, middle, words):
    gate = GateStatistics(0.5, (0.1, 0.2, 0.5, 0.8, 0.9), 0.25, 0.5, 0.3)
    block = BlockStatistics("layer4.1", 512, 0.123, middle, gate, None)
    drawn = gate_figure([block], tmp_path / "gates.svg").read_text()
    assert re.findall(r"<!-- bars: .*; (dashed: .*) -->", drawn) == [words]


def test_a_network_without_gates_or_no_images_is_refused(plain, build, images):
    with pytest.raises(ConfigError, match="no attention"):
        gate_statistics(plain, [(images, None)])
    with pytest.raises(InputError, match="at least two images are needed"):
        gate_statistics(build(), [])
    with pytest.raises(InputError, match="no blocks"):
        gate_figure([], "gates.png")


@pytest.mark.parametrize("first", [0, 1])
def test_classes_of_some_batches_only_are_refused(build, images, first):
    batches = [(images, torch.arange(4)), (images, None)]
    with pytest.raises(InputError, match="classes must be given for all batches or for none"):
        gate_statistics(build(), [batches[first], batches[1 - first]])


def test_images_of_several_sizes_and_classes_of_other_images_are_refused(build, images):
    with pytest.raises(InputError, match=r"images must have one size, got \(3, 32, 24\) and \(3, 32, 20\)"):
        gate_statistics(build(), [(images, None), (images[..., :20], None)])
    with pytest.raises(InputError, match=r"expected a class for each of 4 images, got \(5,\)"):
        gate_statistics(build(), [(images, torch.arange(5))])


def test_the_table_says_what_the_statistics_say():
    gate = GateStatistics(0.5, (0.1, 0.2, 0.5, 0.8, 0.9), 0.25, 0.5, 0.3)
    block = BlockStatistics("layer4.1", 512, 0.123, 0.5, gate, None)
    last = gate_table([block]).splitlines()[-1]
    assert (
        last
        == "| layer4.1 | 512 | 12.3 | 0.10 to 0.90 | 25.0 | 50 | 30 | 20 | - | - | - | follows the class |"
    )


def test_nearly_equal_gates_get_a_third_digit_but_no_finer_scale():
    gate = GateStatistics(0.4999, (0.4972, 0.4998, 0.4999, 0.5, 0.5001), 0.0, 0.5)
    block = BlockStatistics("layer4.1", 512, 0.5, 0.5, gate, gate)
    assert gate_table([block]).count("| 0.497 to 0.500 |") == 2
    assert len({line.count("|") for line in gate_table([block]).splitlines()}) == 1
    figure = draw([block])
    figure.canvas.draw()
    panels = [figure.axes[i] for i in (1, 3)]
    for panel in panels:
        low, high = panel.get_xlim()
        assert high - low == pytest.approx(0.02)
        boxes = [label.get_window_extent() for label in panel.get_xticklabels() if label.get_visible()]
        shown = [box for box in boxes if panel.bbox.x0 <= (box.x0 + box.x1) / 2 <= panel.bbox.x1]
        assert len(shown) > 1
        assert all(one.x1 < two.x0 for one, two in itertools.pairwise(shown))


@pytest.mark.parametrize(("dim", "size"), [(1, (20,)), (3, (4, 6, 5))])
def test_gates_of_1d_and_3d_inputs_have_statistics_too(dim, size):
    model = nn.Sequential(cbam.CBAM(8, dim=dim))
    (block,) = gate_statistics(model, [(torch.randn(3, 8, *size), None)])
    assert block.channels == 8
    assert block.what is not None
    assert block.where is not None
