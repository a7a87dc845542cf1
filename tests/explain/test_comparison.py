import dataclasses
import re
import sys

import pytest
import torch

import cbam
from cbam.errors import ConfigError, InputError, MissingExtraError, OutputError
from cbam.explain import Row, compare_rows, comparison_figure, energy_inside, gradcam, record

pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")
pytest.importorskip("matplotlib", reason="figures are matplotlib's")

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def rows(build, plain, images):
    shown = (images.sigmoid() * 255).byte()
    boxes = torch.tensor([[2, 3, 20, 30], [torch.nan] * 4, [0.5, 0.5, 10, 10], [0, 0, 24, 32]])
    return compare_rows(plain, build(), images, shown, torch.tensor([0, 1, 2, 4]), CLASSES, boxes)


def synthetic(**changes) -> Row:
    """A row of ramps, with a feature map of 4 x 4."""
    ramp, small = torch.linspace(0, 1, 64).view(8, 8), torch.linspace(0, 2, 16).view(4, 4)
    row = Row("ant", ramp.expand(3, 8, 8), ramp, ramp.T, 0.25, 0.5)
    features = {"before": small, "after": (("what", small / 2), ("where", small)), "spatial_gate": small}
    return dataclasses.replace(row, **(features | {"block": "layer4.1", "middle": 1.0} | changes))


def svg_text(path) -> str:
    """The words of a figure: matplotlib's SVG keeps each as a comment beside its outlines."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text(), flags=re.DOTALL))


def test_rows_hold_what_the_single_functions_give(rows, build, plain, images):
    torch.manual_seed(0)
    assert [row.label for row in rows] == ["ant", "bee", "cat", "eel"]
    assert rows[1].box is None
    assert rows[2].box == (0.5, 0.5, 10, 10)
    target = torch.tensor([0, 1, 2, 4])
    for i, row in enumerate(rows):
        assert torch.equal(row.plain_map, gradcam(plain, images, target)[i])
        assert row.plain_probability == pytest.approx(plain(images).softmax(1)[i, target[i]].item())
        assert row.block == "stage2.1"
        assert row.before.shape == row.spatial_gate.shape == (8, 6)


def test_feature_maps_are_means_of_absolute_values(build, plain, images):
    refined = build()
    (row,) = compare_rows(
        plain, refined, images[:1], images[:1].sigmoid(), torch.tensor([3]), CLASSES, block="stage1"
    )
    with record(refined) as recording:
        refined(images[:1])
    step = recording["stage1"]
    assert row.block == "stage1"
    torch.testing.assert_close(row.before, step.before[0].abs().mean(0))
    assert [kind for kind, _ in row.after] == ["what", "where"]
    for (_, shown), own in zip(row.after, step.steps, strict=True):
        torch.testing.assert_close(shown, own.after[0].abs().mean(0))
    assert torch.equal(row.spatial_gate, step.spatial_gate[0, 0])


def test_comparing_leaves_both_networks_as_they_were(build, plain, images):
    models = plain.train(), build().train()
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in models]
    compare_rows(*models, images, images.sigmoid(), torch.zeros(4, dtype=torch.long), CLASSES)
    for model, state in zip(models, before, strict=True):
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_step_of_a_missing_gate_is_left_out(build, plain, images):
    for attention, kind in ((cbam.ChannelAttention, "what"), (lambda _: cbam.SpatialAttention(), "where")):
        (row,) = compare_rows(
            plain, build(attention), images[:1], images[:1].sigmoid(), torch.tensor([0]), CLASSES
        )
        assert [name for name, _ in row.after] == [kind]
        assert (row.spatial_gate is None) == (kind == "what")


def test_the_columns_follow_the_order_of_the_block(images, tmp_path):
    models = [cbam.build(name, num_classes=5) for name in ("resnet_tiny", "resnet_tiny+cbam-reversed")]
    rows = compare_rows(*models, images[:1], images[:1].sigmoid(), torch.tensor([0]), CLASSES)
    assert [kind for kind, _ in rows[0].after] == ["where", "what"]
    words = svg_text(comparison_figure(rows, tmp_path / "look.svg"))
    assert words.index("before") < words.index("after where") < words.index("after what")


def test_attention_of_others_gives_rows_without_feature_maps(plain, images):
    rows = compare_rows(plain, plain, images, images.sigmoid(), torch.tensor([0, 1, 2, 3]), CLASSES)
    assert all(row.before is None and row.spatial_gate is None for row in rows)
    assert torch.equal(rows[0].plain_map, rows[0].refined_map)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"block": "stage9"},
            ConfigError,
            "block 'stage9' has no attention; blocks with attention: stage1, stage2.0",
        ),
        ({"targets": torch.tensor([0])}, InputError, "4 targets"),
        ({"targets": torch.tensor([0, 1, 2, 5])}, InputError, r"0\.\.4"),
        ({"classes": ["a", "b"]}, InputError, r"0\.\.1"),
        ({"boxes": torch.zeros(3, 4)}, InputError, "4 boxes"),
        ({"shown": torch.zeros(2, 3, 8, 8)}, InputError, "4 images"),
        (
            {"shown": torch.zeros(4, 3, 8, 8)},
            InputError,
            r"`shown` must be as large as the images, \(32, 24\)",
        ),
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, InputError, "normalised float"),
    ],
)
def test_mismatched_networks_and_images_are_refused(build, plain, images, changes, error, message):
    given = {
        "images": images,
        "shown": images.sigmoid(),
        "targets": torch.tensor([0, 1, 2, 3]),
        "classes": CLASSES,
        "boxes": None,
    }
    with pytest.raises(error, match=message):
        compare_rows(plain, build(), **(given | changes))


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_a_figure_is_written_in_the_form_its_name_asks_for(tmp_path, ending):
    path = comparison_figure([synthetic()], tmp_path / f"look{ending}")
    assert path == tmp_path / f"look{ending}"
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_figure_says_class_probability_share_in_the_box_and_block(tmp_path):
    row = synthetic(box=(0.0, 0.0, 4.0, 8.0), plain_probability=0.034, refined_probability=0.997)
    words = svg_text(comparison_figure([row], tmp_path / "look.svg"))
    shares = [
        energy_inside(m[None], torch.tensor([row.box])).item() for m in (row.plain_map, row.refined_map)
    ]
    for expected in (
        "ant",
        "p = 0.03",
        "p = 1.00",
        "layer4.1",
        "after what",
        "after where",
        "spatial gate",
        "CBAM",
    ):
        assert expected in words
    for share in shares:
        assert f"{100 * share:.0f} % in box" in words
    assert shares[0] != shares[1]


def test_images_of_any_shape_keep_it_and_feature_maps_take_theirs():
    from cbam.explain.figure import _draw

    wide, tall = torch.rand(8, 16), torch.rand(16, 8)
    rows = [
        synthetic(image=wide.expand(3, 8, 16), plain_map=wide, refined_map=wide),
        synthetic(image=tall.expand(3, 16, 8), plain_map=tall, refined_map=tall),
    ]
    figure = _draw(rows, "CBAM")
    figure.canvas.draw()
    drawn = [ax.get_window_extent() for ax in figure.axes if ax.images]
    assert len(drawn) == 14
    for r, aspect in enumerate((0.5, 2.0)):
        for box in drawn[7 * r : 7 * r + 7]:
            assert box.height / box.width == pytest.approx(aspect, rel=1e-3)
            assert box.width == pytest.approx(drawn[0].width, rel=1e-3)


def test_columns_that_no_row_has_are_left_out(tmp_path):
    channel_only = synthetic(spatial_gate=None)
    words = svg_text(comparison_figure([channel_only], tmp_path / "se.svg", refined="SE"))
    assert "spatial gate" not in words
    assert "after what" in words
    assert "with SE" in words
    nothing = synthetic(before=None, after=(), spatial_gate=None)
    words = svg_text(comparison_figure([nothing], tmp_path / "bare.svg"))
    assert "after" not in words
    assert "Grad-CAM" in words


@pytest.mark.parametrize(
    ("missing", "changes", "cells_left"),
    [
        ("what", {"after": (("where", torch.ones(4, 4)),)}, 6),
        ("where", {"after": (("what", torch.ones(4, 4)),)}, 6),
        ("spatial_gate", {"spatial_gate": None}, 6),
        ("all of it", {"before": None, "after": (), "spatial_gate": None}, 3),
    ],
)
def test_every_colour_bar_lies_under_the_columns_that_it_explains(missing, changes, cells_left):
    from cbam.explain.figure import _draw

    figure = _draw([synthetic(**changes)], "CBAM")
    figure.canvas.draw()
    cells = [ax.get_window_extent() for ax in figure.axes if ax.images]
    bars = {
        ax.get_xlabel(): ax.get_window_extent()
        for ax in figure.axes
        if ax.get_xlabel().startswith(("evidence", "mean over", "factor"))
    }
    assert len(cells) == cells_left
    assert len(bars) == {"spatial_gate": 2, "all of it": 1}.get(missing, 3)
    groups = {"evidence for the true class": cells[1:3]}
    if missing != "all of it":
        last = None if missing == "spatial_gate" else -1
        groups["mean over channels of |activation|"] = cells[3:last]
    if "factor" in bars:
        groups["factor"] = cells[-1:]
    for title, group in groups.items():
        assert bars[title].x0 == pytest.approx(group[0].x0)
        assert bars[title].x1 == pytest.approx(group[-1].x1)


def test_every_word_lies_inside_the_page_and_apart_from_the_others(rows):
    """Looked at as a reader would: nothing cut, nothing printed over something else."""
    from cbam.explain.figure import _draw

    long = dataclasses.replace(
        rows[0], label="a class name that is far too long for any margin of a page", middle=1.0
    )
    figure = _draw([long, *rows[1:], synthetic(label="")], "attention with a name that is too long")
    figure.canvas.draw()
    page = figure.bbox
    found = figure.findobj(lambda artist: getattr(artist, "get_text", lambda: "")().strip() != "")
    boxes = [(text.get_text(), text.get_window_extent()) for text in found if text.get_visible()]
    assert len(boxes) > 30
    for word, box in boxes:
        assert page.x0 <= box.x0, word
        assert box.x1 <= page.x1, word
        assert page.y0 <= box.y0, word
        assert box.y1 <= page.y1, word
    for i, (word, box) in enumerate(boxes):
        for other, its in boxes[i + 1 :]:
            assert not box.overlaps(its), (word, other)


def test_the_gates_share_one_scale_around_the_gate_that_changes_nothing():
    from cbam.explain.figure import _gate_scale

    gate = torch.tensor([[0.8, 1.1]])
    middle, reach = _gate_scale([synthetic(spatial_gate=gate), synthetic(spatial_gate=gate.clamp(1))])
    assert middle == 1
    assert reach == pytest.approx(0.2)
    assert _gate_scale([synthetic(spatial_gate=torch.ones(2, 2))]) == (1, 0.01)
    assert _gate_scale([synthetic(spatial_gate=torch.full((2, 2), 0.4), middle=0.5)]) == pytest.approx(
        (0.5, 0.1)
    )


def test_the_same_rows_give_the_same_bytes_and_no_global_state_changes(tmp_path, rows):
    import matplotlib

    settings = dict(matplotlib.rcParams)
    pyplot_was_there = "matplotlib.pyplot" in sys.modules
    rows = rows[:1]
    for ending in (".png", ".svg"):
        first = comparison_figure(rows, tmp_path / f"a{ending}").read_bytes()
        assert comparison_figure(rows, tmp_path / f"b{ending}").read_bytes() == first
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_was_there


def test_class_names_are_drawn_as_they_are(tmp_path):
    names = ["$x", "a$b$c", "under_score^2", "<b>&", ""]
    words = svg_text(comparison_figure([synthetic(label=name) for name in names], tmp_path / "names.svg"))
    for name in ("$x", "a$b$c", "under_score^2"):
        assert name in words


def test_empty_maps_and_grey_or_wide_images_are_drawn(tmp_path):
    ramp = torch.linspace(0, 255, 128).view(1, 8, 16).byte()
    zero = torch.zeros(8, 16)
    row = synthetic(
        image=ramp, plain_map=zero, refined_map=zero, before=0 * torch.ones(4, 8), box=(0.0, 0, 4, 4)
    )
    assert "empty map" in svg_text(comparison_figure([row, synthetic()], tmp_path / "wide.svg"))


def test_undrawable_input_is_refused_and_nothing_is_written(tmp_path):
    for rows, name, error, message in (
        ([synthetic()], "look.jpg", ConfigError, r"\.png, \.svg, \.pdf; got 'look\.jpg'"),
        ([synthetic()], "look", ConfigError, "got 'look'"),
        ([], "look.png", InputError, "no rows"),
        ([synthetic(plain_map=torch.zeros(4, 4))], "look.png", InputError, "plain_map must be as large"),
        ([synthetic(image=torch.zeros(4, 8, 8))], "look.png", InputError, "image must be"),
    ):
        with pytest.raises(error, match=message):
            comparison_figure(rows, tmp_path / name)
    with pytest.raises(OutputError, match=r"cannot write to .*missing.look.png: No such file"):
        comparison_figure([synthetic()], tmp_path / "missing" / "look.png")
    assert list(tmp_path.iterdir()) == []


def test_an_old_figure_is_kept_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = comparison_figure([synthetic()], tmp_path / "look.png")
    old = path.read_bytes()
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        comparison_figure([synthetic(), synthetic()], path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["look.png"]


def test_a_missing_matplotlib_is_named_with_its_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cbam\[explain\]'"):
        comparison_figure([synthetic()], tmp_path / "look.png")


def test_an_attached_network_is_compared_with_the_one_it_came_from(tmp_path, images):
    """The main job's image, over `cbam.attach`: at the identity start both halves agree."""
    import copy

    torchvision = pytest.importorskip("torchvision")
    plain = torchvision.models.resnet18(num_classes=5).eval()
    refined = cbam.attach(copy.deepcopy(plain))
    pictures = torch.rand(2, 3, 64, 64)
    rows = compare_rows(plain, refined, pictures - 0.5, pictures, torch.tensor([0, 1]), CLASSES)
    assert rows[0].block == "layer4.1"
    assert rows[0].middle == 1
    for row in rows:
        assert torch.equal(row.spatial_gate, torch.ones(2, 2))
        assert torch.equal(row.before, dict(row.after)["where"])
        assert row.plain_probability == row.refined_probability
        torch.testing.assert_close(row.plain_map, row.refined_map)
    comparison_figure(rows, tmp_path / "look.png")
