import re
import time

import pytest
import torch

import cbam
from cbam.errors import ConfigError, DtypeError, InputError, OutputError
from cbam.explain import Viewer, gradcam, look, look_figure, page, record, stages_figure
from cbam.explain.looking import class_index, stages
from cbam.explain.pair import view
from cbam.explain.stages import over_picture, top_channels, where_middle, where_reach

pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")
pytest.importorskip("matplotlib", reason="figures are matplotlib's")

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def viewer(plain, build):
    return Viewer({"plain": plain, "CBAM": build()}, CLASSES, size=32, resized=36)


@pytest.fixture
def picture():
    return torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8)


def svg_text(path) -> str:
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text(), flags=re.DOTALL))


def test_a_look_holds_what_the_single_functions_give(viewer, picture):
    seen = look(viewer, picture, "photo", target=3)
    assert torch.equal(seen.image, viewer.view(picture))
    assert seen.image.shape == (3, 32, 32)
    images = viewer.normalised(seen.image)[None]
    for glance in seen.glances:
        model = viewer.networks[glance.network]
        scores = model(images)[0].softmax(0)
        assert torch.equal(glance.heat, gradcam(model, images, 3)[0])
        assert glance.probability == pytest.approx(scores[3].item())
        assert glance.best == CLASSES[scores.argmax()]
    with record(viewer.networks["CBAM"]) as recording:
        viewer.networks["CBAM"](images)
    assert list(seen.blocks) == ["CBAM"]
    for name, block in seen.blocks["CBAM"].items():
        assert torch.equal(block.spatial_gate, recording[name].spatial_gate)


def test_every_network_is_asked_for_what_the_first_one_says(viewer, picture):
    seen = look(viewer, picture)
    first, second = seen.glances
    assert seen.target == first.best
    assert first.probability == first.best_probability
    images = viewer.normalised(seen.image)[None]
    assert torch.equal(second.heat, gradcam(viewer.networks["CBAM"], images, CLASSES.index(first.best))[0])


def test_looking_leaves_the_networks_as_they_were(viewer, picture):  # E7
    before = {k: v.clone() for m in viewer.networks.values() for k, v in m.state_dict().items()}
    again = [look(viewer, picture) for _ in range(2)]
    for model in viewer.networks.values():
        assert not any(m._forward_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
    after = {k: v for m in viewer.networks.values() for k, v in m.state_dict().items()}
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    for one, two in zip(again[0].glances, again[1].glances, strict=True):
        assert torch.equal(one.heat, two.heat)


def test_the_last_block_of_each_size_stands_for_its_stage(viewer, picture):
    blocks = look(viewer, picture).blocks["CBAM"]
    assert list(blocks) == ["stage1", "stage2.0", "stage2.1"]
    assert list(stages(blocks)) == ["stage1", "stage2.1"]


def test_the_top_channels_are_those_with_the_largest_and_the_smallest_gates(viewer, picture):
    block = look(viewer, picture).blocks["CBAM"]["stage2.1"]
    raised, lowered = top_channels(block, 2)
    gates = block.channel_gate[0, :, 0, 0]
    assert [c.index for c in raised] == gates.argsort(descending=True)[:2].tolist()
    assert [c.index for c in lowered] == gates.argsort()[:2].tolist()
    assert raised[0].gate == pytest.approx(gates.max().item())
    assert torch.equal(raised[0].map, block.before[0, raised[0].index].abs())


def test_the_spatial_gates_share_one_scale(viewer, picture):
    blocks = stages(look(viewer, picture).blocks["CBAM"])
    assert {where_middle(block) for block in blocks.values()} == {0.5}
    reach = where_reach(list(blocks.values()))
    assert reach == pytest.approx(max((b.spatial_gate - 0.5).abs().max().item() for b in blocks.values()))


def test_a_view_is_the_middle_of_the_resized_image():
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    picture = (torch.rand(3, 20, 30).cumsum(2) * 8).byte()
    large = torch.nn.functional.interpolate(picture[None], (200, 300), mode="bicubic")[0]
    ours = view(large, 224, 256).float()
    theirs = tv.center_crop(tv.resize(large, [256], interpolation=3, antialias=True), [224, 224]).float()
    assert (ours - theirs).abs().mean() < 0.5  # of 255; the long side is not resized to a whole number


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (2, 3), (3000, 2000)])
def test_a_view_has_its_size_for_any_image(size):  # D11
    assert view(torch.full((3, *size), 7, dtype=torch.uint8)).unique().tolist() == [7]


def test_an_invalid_image_or_class_is_refused(viewer, picture):
    for bad in (picture.float(), picture[:1], picture[None], picture[:, :0]):
        with pytest.raises(InputError, match="an image must be uint8"):
            look(viewer, bad)
    with pytest.raises(InputError, match=r"0\.\.4"):
        look(viewer, picture, target=5)
    few = Viewer(viewer.networks, CLASSES[:3], size=32, resized=36)
    with pytest.raises(ConfigError, match="plain has 5 classes, but there are 3 class names"):
        look(few, picture)


def test_naming_all_classes_equals_naming_each():
    few = Viewer({}, ["crane", "x", "crane"])
    assert few.all_called() == [few.called(i) for i in range(3)] == ["crane (0)", "x", "crane (2)"]
    began = time.process_time()
    assert len(Viewer({}, [f"class {i}" for i in range(20_000)]).all_called()) == 20_000
    assert time.process_time() - began < 1


def test_a_class_is_named_by_number_or_by_name():
    assert class_index(CLASSES, "2") == class_index(CLASSES, "Cat") == 2
    with pytest.raises(ConfigError, match=r"no class 'cot'; did you mean cat\?"):
        class_index(CLASSES, "cot")
    with pytest.raises(ConfigError, match="no class '5'; give a class name or 0 to 4"):
        class_index(CLASSES, "5")
    with pytest.raises(ConfigError, match="no class '99999"):
        class_index(CLASSES, "9" * 5000)  # more digits than int() takes


def test_an_ambiguous_class_is_refused():
    assert class_index(["Cardigan", "x", "cardigan"], "cardigan") == 2
    assert class_index(["1", "10", "2"], "10") == 1
    with pytest.raises(ConfigError, match=r"'1' is ambiguous: give '1 \(0\)' or '10 \(1\)'"):
        class_index(["1", "10", "2"], "1")
    assert class_index(["1", "10", "2"], "10 (1)") == 1
    assert class_index(["0", "1"], "1") == 1
    cranes = ["dog", "crane", "cat", "crane"]
    with pytest.raises(ConfigError, match=r"'crane' is ambiguous: give 'crane \(1\)' or 'crane \(3\)'"):
        class_index(cranes, "crane")
    assert class_index(cranes, "crane (3)") == class_index(cranes, "3") == 3
    with pytest.raises(ConfigError, match="is ambiguous"):
        class_index(["Ant", "ANT"], "ant")


def test_classes_with_the_same_name_are_distinguished_by_number(viewer, picture):
    twice = Viewer(viewer.networks, ["crane", "crane", "cat", "dog", "dog"], size=32, resized=36)
    seen = look(twice, picture, target=1)
    assert (seen.target, seen.index) == ("crane (1)", 1)
    for glance in seen.glances:
        assert glance.best == twice.called(glance.best_index)


def test_a_view_of_any_size_is_as_large_as_it_says(viewer):
    large = torch.zeros(3, 500, 600, dtype=torch.uint8)
    for size, resized in ((384, 439), (32, 37), (224, 256)):
        eyes = Viewer(viewer.networks, CLASSES, size=size)
        assert (eyes.side, tuple(eyes.view(large).shape)) == (resized, (3, size, size))
    with pytest.raises(InputError, match="cannot crop 64 pixels from an image resized to 40"):
        Viewer(viewer.networks, CLASSES, size=64, resized=40)


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_both_figures_are_written_in_the_form_that_their_name_asks_for(viewer, picture, tmp_path, ending):
    seen = look(viewer, picture, "photo")
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    for path in (
        look_figure([seen], tmp_path / f"look{ending}"),
        stages_figure(seen, tmp_path / f"stages{ending}"),
    ):
        assert path.read_bytes().startswith(start)


def test_the_figure_says_the_class_and_its_probability_for_each_network(viewer, picture, tmp_path):
    seen = look(viewer, picture, "photo.jpg", target=0, method="layercam")
    words = svg_text(look_figure([seen], tmp_path / "look.svg"))
    assert "ant" in words
    assert "photo.jpg" in words
    assert "LayerCAM\nCBAM" in words
    for glance in seen.glances:
        assert f"p = {glance.probability:.2f}" in words
        assert (f"{glance.best_probability:.2f} {glance.best}" in words) == (glance.best != "ant")


def test_the_stages_say_every_gate_that_they_show(viewer, picture, tmp_path):
    seen = look(viewer, picture, "photo.jpg")
    words = svg_text(stages_figure(seen, tmp_path / "stages.svg"))
    for name, block in stages(seen.blocks["CBAM"]).items():
        assert name in words
        assert f"{block.spatial_gate.min():.2f} to {block.spatial_gate.max():.2f}" in words
        for channel in [c for side in top_channels(block) for c in side]:
            gate = page.factor(channel.gate, channel.reach)
            assert f"no. {channel.index}: × {gate}" in words


def test_gates_near_their_middle_are_shown_with_a_third_digit(viewer, picture, tmp_path):
    for module in viewer.networks["CBAM"].modules():
        if isinstance(module, cbam.SpatialAttention):
            torch.nn.init.constant_(module.bn.weight, 0.002)
        if isinstance(module, cbam.nn.ChannelAttention):
            torch.nn.init.normal_(module.fc2.weight, std=0.001)
    seen = look(viewer, picture, "photo.jpg")
    words = svg_text(stages_figure(seen, tmp_path / "stages.svg"))
    block = stages(seen.blocks["CBAM"])["stage2.1"]
    assert f"{block.spatial_gate.min():.3f} to {block.spatial_gate.max():.3f}" in words
    assert f"× {top_channels(block)[0][0].gate:.3f}" in words
    for end in ("0.490", "0.510"):
        assert end in words


def identity(channels: int) -> torch.nn.Module:
    attention = cbam.CBAM(channels).identity_()
    torch.nn.init.normal_(attention.channel.fc2.bias)  # so that there are gates above 1 and below
    return attention


@pytest.mark.parametrize(("attention", "neutral"), [(cbam.CBAM, False), (identity, True)])
def test_the_middle_of_the_scale_changes_nothing_only_where_it_is_one(
    build, picture, tmp_path, attention, neutral
):
    net = Viewer({"CBAM": build(attention)}, CLASSES, size=32, resized=36)
    words = svg_text(stages_figure(look(net, picture), tmp_path / "stages.svg"))
    assert ("dashed: changes nothing" in words) == neutral
    assert ("dashed: middle of the range;\n1 changes nothing" in words) == (not neutral)
    assert ("channels raised most" in words) == neutral
    assert ("channels kept most" in words) == (not neutral)
    assert ("\n1.00\n" in words) == neutral
    assert ("\n0.500\n" in words) == (not neutral)  # gates that are near it


def mixed(viewer):
    """The late stage at the identity, the early one as in the paper."""
    net = viewer.networks["CBAM"]
    for block in net.stage2:
        block.cbam.identity_()
    return Viewer({"CBAM": net}, CLASSES, size=32, resized=36)


def test_neutral_gates_are_white_next_to_gates_of_another_range(viewer, picture, tmp_path):
    seen = look(mixed(viewer), picture, "photo.jpg")
    early, late = stages(seen.blocks["CBAM"]).values()
    assert (where_middle(early), where_middle(late)) == (0.5, 1)
    reach = where_reach([early, late])
    assert reach == pytest.approx((early.spatial_gate - 0.5).abs().max().item())
    drawn = over_picture(seen.image, late.spatial_gate[0, 0], (where_middle(late), reach), opacity=1)
    assert drawn.min() > 0.95
    words = svg_text(stages_figure(seen, tmp_path / "stages.svg"))
    assert "channels with the largest gates" in words
    assert "raised" not in words
    for line in ("white: 0.5", "white: 1", f"-{reach:.2f}\n0.00\n{reach:.2f}", "factor, from white"):
        assert line in words


@pytest.mark.parametrize("kind", ["mixed", "rows", "sheet", "stages", "disagreeing", "alone", "six"])
def test_no_text_is_cut_off_or_overlaps(viewer, plain, picture, kind):
    from cbam.explain import sheet
    from cbam.explain import stages as gates

    long = "a file with a name that is too long for any margin.jpeg"
    if kind == "alone":
        viewer = Viewer({"plain": plain}, CLASSES, size=32, resized=36)
    if kind == "mixed":
        viewer = mixed(viewer)
    if kind == "six":
        viewer = Viewer({f"network {i}": plain for i in range(6)}, CLASSES, size=32, resized=36)
    apart = kind in ("disagreeing", "six")
    method = "gradcam++" if kind == "six" else "gradcam"
    looks = [look(viewer, picture, long, target=i if apart else None, method=method) for i in range(5)]
    if kind in ("stages", "mixed"):
        figure = gates.draw(looks[0])
    else:
        figure = sheet.draw(looks, 2 if kind == "sheet" else 1)
    figure.canvas.draw()
    page = figure.bbox
    found = figure.findobj(lambda artist: getattr(artist, "get_text", lambda: "")().strip() != "")
    boxes = [(text.get_text(), text.get_window_extent()) for text in found if text.get_visible()]
    assert len(boxes) > 15
    for word, box in boxes:
        assert page.x0 - 0.5 <= box.x0, word
        assert box.x1 <= page.x1 + 0.5, word
        assert page.y0 - 0.5 <= box.y0, word
        assert box.y1 <= page.y1 + 0.5, word
    for i, (word, box) in enumerate(boxes):
        for other, its in boxes[i + 1 :]:
            assert not box.overlaps(its), (word, other)


def test_the_stages_have_no_columns_for_gates_that_no_block_has(build, picture, tmp_path):
    for attention, there, absent in (
        (lambda _: cbam.nn.SpatialAttention(), {"where:\nspatial gate", "factor"}, {"|activation|"}),
        (cbam.nn.ChannelAttention, {"|activation|"}, {"where:\nspatial gate", "factor"}),
    ):
        net = Viewer({"net": build(attention)}, CLASSES, size=32, resized=36)
        words = svg_text(stages_figure(look(net, picture), tmp_path / "stages.svg"))
        assert all(word in words for word in there)
        assert not any(word in words for word in absent)
        assert ("channels " in words) == ("|activation|" in there)


def test_the_colour_scale_of_a_map_starts_at_its_minimum(viewer, picture, tmp_path):
    words = svg_text(look_figure([look(viewer, picture)], tmp_path / "look.svg")).split("\n")
    assert "least" in words
    assert "0" not in words


def test_a_map_that_says_nothing_is_called_empty(viewer, picture, tmp_path):
    torch.nn.init.zeros_(viewer.networks["plain"].head.weight)
    words = svg_text(look_figure([look(viewer, picture)], tmp_path / "look.svg")).split("\n")
    assert sum("empty map" in line for line in words) == 1


def test_names_with_a_common_prefix_are_distinguished_by_their_ends():
    names = [f"ILSVRC2012_val_0000{i}.JPEG" for i in range(2890, 2910)]
    short = [page.truncate_middle(name, 1.04) for name in names]
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= int(1.04 / page.CHARACTER_WIDTH)
    assert short[0] == "ILSVRC201\N{HORIZONTAL ELLIPSIS}890.JPEG"
    assert page.truncate_middle("cat.png", 1.04) == "cat.png"


def test_a_name_with_glyphs_the_font_lacks_gives_no_warning(viewer, picture, tmp_path):
    assert look_figure([look(viewer, picture, "\u732b.jpg")], tmp_path / "look.png").is_file()


def test_channels_count_as_raised_only_by_gates_above_1(build, picture, tmp_path):
    net = Viewer({"SimAM": build(cbam.nn.SimAM)}, CLASSES, size=32, resized=36)
    words = svg_text(stages_figure(look(net, picture), tmp_path / "stages.svg"))
    assert "channels kept most" in words
    assert "raised" not in words
    assert page.describe_channels([1.2, 1.1], [0.8]) == ("raised most", "lowered most")
    assert page.describe_channels([1.2], [1.1]) == ("raised most", "raised least")
    assert page.describe_channels([1.2, 0.9], [0.9, 1.1]) == (
        "with the largest gates",
        "with the smallest gates",
    )
    assert page.describe_channels([1.0], [1.0]) == ("with the largest gates", "with the smallest gates")


@pytest.mark.parametrize("name", ["gc", "sk"])
def test_attention_without_gates_has_nothing_to_draw(build, picture, tmp_path, name):
    net = Viewer({name: build(cbam.nn.ATTENTION[name])}, CLASSES, size=32, resized=36)
    seen = look(net, picture)
    assert seen.blocks == {}
    for network in (None, name):
        with pytest.raises(InputError, match=f"no gates to show of {network or 'any network'}"):
            stages_figure(seen, tmp_path / "stages.svg", network=network)


def test_an_unwritable_path_is_named(viewer, picture, tmp_path):
    seen = look(viewer, picture)
    (tmp_path / "look.png").mkdir()
    for path, told in ((tmp_path / "none" / "a.png", "No such file"), (tmp_path / "look.png", "directory")):
        with pytest.raises(OutputError, match=re.escape(f"cannot write to {path}: ") + f".*{told}"):
            look_figure([seen], path)
        with pytest.raises(OutputError, match="cannot write to"):
            stages_figure(seen, path)
    assert [path.name for path in tmp_path.iterdir()] == ["look.png"]


def test_a_dtype_mismatch_of_model_and_images_is_reported(viewer, plain, picture, images):
    half = plain.bfloat16()
    for call in (
        lambda: gradcam(half, images),
        lambda: look(Viewer({"plain": half}, CLASSES, size=32, resized=36), picture),
    ):
        with pytest.raises(
            DtypeError, match=r"images are torch\.float32, the model's weights torch\.bfloat16: "
        ):
            call()
    with torch.autocast("cpu"):
        assert gradcam(viewer.networks["CBAM"], images).shape == (4, 32, 24)


def test_a_device_mismatch_of_network_and_images_is_reported(plain, picture):
    elsewhere = Viewer({"plain": plain.to("meta")}, CLASSES, size=32, resized=36)
    with pytest.raises(InputError, match="images are on cpu, the model on meta; move one of them"):
        look(elsewhere, picture)


def test_undrawable_input_is_refused(viewer, picture, plain, tmp_path):
    alone = look(Viewer({"plain": plain}, CLASSES, size=32, resized=36), picture)
    with pytest.raises(InputError, match="no gates to show of any network"):
        stages_figure(alone, tmp_path / "stages.png")
    with pytest.raises(InputError, match="different networks"):
        look_figure([alone, look(viewer, picture)], tmp_path / "look.png")
    with pytest.raises(InputError, match="no image"):
        look_figure([], tmp_path / "look.png")
    with pytest.raises(ConfigError, match=r"got 'look\.jpg'"):
        look_figure([alone], tmp_path / "look.jpg")
    assert list(tmp_path.iterdir()) == []
    look_figure([alone], tmp_path / "look.png")
