"""`cbam look --score` and `--gates`: from files with boxes and folders to tables."""

import json
from pathlib import Path

import pytest
import torch

import cbam
from cbam.app.cli import main
from cbam.app.gates import gates
from cbam.app.score import MEASURES, markdown, samples, score, write
from cbam.app.terminal import Lines
from cbam.data import cluttered_digits
from cbam.errors import ConfigError, DataError, OutputError
from cbam.explain import Viewer
from cbam.explain.localisation import box_area, energy

Image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow")
pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")
pytest.importorskip("matplotlib", reason="figures are matplotlib's")
pytest.importorskip("sklearn", reason="the digits and Student's t are scikit-learn's and scipy's")


class Bright(torch.nn.Module):
    """Two classes; the map of the first is where the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Conv2d(3, 1, 1, bias=False)
        torch.nn.init.ones_(self.features.weight)

    def forward(self, x):
        bright = self.features(x).mean((1, 2, 3))
        return torch.stack([bright, -bright], 1)


@pytest.fixture
def boxes(tmp_path):
    """Dark images of 40 x 40 with a bright square each, and a CSV of where it is."""
    lines = ["file,x0,y0,x1,y1,label"]
    for i in range(6):
        x, y = 6 + 2 * i, 20 - 2 * i
        picture = Image.new("RGB", (40, 40))
        picture.paste((255, 255, 255), (x, y, x + 10, y + 8))
        picture.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{x},{y},{x + 10},{y + 8},square")
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    return tmp_path / "boxes.csv"


@pytest.fixture
def viewer():
    return Viewer(
        {"plain": Bright(), "CBAM": Bright()},
        ["square", "other"],
        size=40,
        resized=40,
        mean=(0,) * 3,
        std=(1,) * 3,
    )


def test_a_network_that_looks_at_the_object_scores_so(viewer, boxes):
    results = score(viewer, str(boxes), Lines())
    for name in ("plain", "CBAM"):
        scores = results["scores"][name]
        assert scores["pointing"] == 1
        assert scores["energy"] == pytest.approx(1, abs=1e-4)
        assert scores["iou"] > 0.98
    assert results["class"] == {"of the label": 6, "what plain says": 0}
    assert results["object_share"] == pytest.approx(80 / 1600)
    assert results["scores"]["centre prior"]["energy"] < 0.5
    same = results["differences"]["CBAM against plain"]
    assert all(found["mean"] == 0 and found["word"] == "no difference shown" for found in same.values())
    better = results["differences"]["plain against centre prior"]["energy"]
    assert better["word"] == "better"
    assert better["low"] <= better["mean"] <= better["high"]


def test_the_means_are_those_of_the_values_that_are_kept(viewer, boxes):
    results = score(viewer, str(boxes), Lines())
    assert results["names"] == [f"{i}.png" for i in range(6)]
    for name, kept in results["values"].items():
        for key in MEASURES:
            assert len(kept[key]) == 6
            assert results["scores"][name][key] == pytest.approx(sum(kept[key]) / 6, abs=1e-4)
    assert score(viewer, str(boxes), Lines())["values"] == results["values"]


def test_a_layer_is_that_of_every_network_and_is_written_down(boxes, tmp_path, monkeypatch):
    import cbam.app.score as module

    asked = []
    whole = module.gradcam
    monkeypatch.setattr(module, "gradcam", lambda *a: (asked.append(a[3]), whole(*a))[1])
    nets = {"plain": cbam.build("resnet_tiny", num_classes=2)}
    viewer = Viewer(nets, ["square", "other"], size=32, resized=32)
    found = score(viewer, str(boxes), Lines(), layer="layer1", limit=2)
    assert asked == ["layer1"] * 4  # of two images, the network and the untrained one
    assert (found["layer"], found["what"]) == ("layer1", "Grad-CAM of layer1 on boxes.csv")
    with pytest.raises(ConfigError, match="no layer 'nowhere'"):
        score(viewer, str(boxes), Lines(), layer="nowhere", limit=2)


def test_a_label_that_is_the_name_of_two_classes_is_refused(viewer, boxes):
    twice = Viewer(viewer.networks, ["square", "square"], size=40, resized=40)
    with pytest.raises(ConfigError, match="the label 'square' is the name of several classes: 0, 1"):
        score(twice, str(boxes), Lines(), limit=2)


def test_an_image_with_objects_of_several_labels_is_one_image(viewer, boxes):
    """An interval over its labels, as over images of their own, would be too narrow."""
    one = score(viewer, str(boxes), Lines())
    lines = boxes.read_text().splitlines()
    boxes.write_text("\n".join([*lines, *(f"{i}.png,0,0,5,5,corner" for i in range(6))]))
    both, corner = score(viewer, str(boxes), Lines()), score(viewer, str(boxes), Lines(), label="corner")
    assert (both["pictures"], both["maps"], both["names"]) == (6, 12, one["names"])
    for key in ("pointing", "energy", "deletion", "insertion"):
        a, b, mean = (found["values"]["plain"][key] for found in (one, corner, both))
        assert mean == pytest.approx([(x + y) / 2 for x, y in zip(a, b, strict=True)], abs=1e-4)
    page = markdown(both)
    assert "- 6 images; the object covers" in page
    assert "- one map per label in an image, 12 in all; the value of an image is their mean" in page
    assert "- the map is for the class of the label: 6 maps" in page
    assert "in all" not in markdown(one)
    few = score(viewer, str(boxes), Lines(), limit=3)
    assert few["names"] == ["0.png", "2.png", "4.png"]


def test_the_current_folder_is_reported_by_its_name(viewer, tmp_path, monkeypatch):
    (tmp_path / "cells").mkdir()
    monkeypatch.chdir(tmp_path / "cells")
    Image.new("RGB", (40, 40), "white").save("a.png")
    box = "<xmin>11</xmin><ymin>11</ymin><xmax>20</xmax><ymax>20</ymax>"
    Path("a.xml").write_text(
        "<annotation><filename>a.png</filename><size><width>40</width><height>40</height></size>"
        f"<object><name>square</name><bndbox>{box}</bndbox></object></annotation>"
    )
    assert score(viewer, ".", Lines())["what"] == "Grad-CAM on cells"


def test_the_page_says_what_the_results_say(viewer, boxes):
    results = score(viewer, str(boxes), Lines(), limit=4)
    page = markdown(results)
    assert "- 4 images; the object covers 5.0 % of them on average" in page
    assert "| pointing game, % | 100.0 | 100.0 |" in page
    assert "**CBAM against plain**, paired image by image:" in page


def test_a_box_follows_its_image_into_the_view(tmp_path):
    """A bright object in a wide image, resized and cut: the box in view is where the light is."""
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png")
    picture.paste((255, 255, 255), (40, 12, 61, 33))
    picture.save(tmp_path / "a.png")
    (tmp_path / "b.csv").write_text("file,x0,y0,x1,y1\na.png,40,12,61,33\n")
    wide = Viewer({"plain": Bright()}, ["a", "b"], size=48, resized=56)
    (one,), _ = samples(wide, str(tmp_path / "b.csv"), None, None)
    light = one.image.float().mean(0)[None] / 255
    assert energy(light, one.area[None]).item() > 0.95
    assert (light[0] > 0.5).sum().item() == pytest.approx(one.area.sum().item(), rel=0.1)


def test_a_record_does_not_reveal_the_image_paths(viewer, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    (tmp_path / "b.csv").write_text("file,x0,y0,x1,y1\na.png,20,20,40,40\na.png,5,5,5,5\n")
    results = score(viewer, str(tmp_path / "b.csv"), Lines())
    assert "b.csv" in "".join(results["left_out"])
    assert str(tmp_path) not in json.dumps(results)


def test_an_object_out_of_view_is_left_out_and_counted(tmp_path):
    Image.new("RGB", (100, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.csv").write_text("file,x0,y0,x1,y1,label\na.png,0,0,20,40,out\na.png,40,10,60,30,in\n")
    wide = Viewer({"plain": Bright()}, ["a", "b"], size=40, resized=40)
    (one,), notes = samples(wide, str(tmp_path / "b.csv"), None, None)
    assert one.label == "in"
    assert notes == ["1 object of which less than half is in view"]
    with pytest.raises(DataError, match="no image with its object in view"):
        samples(wide, str(tmp_path / "b.csv"), None, "out")
    with pytest.raises(ConfigError, match="no box with label 'cat'; the labels are in, out"):
        samples(wide, str(tmp_path / "b.csv"), None, "cat")


def test_the_digits_know_their_boxes():
    _, val = cluttered_digits()
    eyes = Viewer({"plain": Bright()}, val.classes, size=val.size, resized=val.size)
    found, notes = samples(eyes, "digits", 5, None)
    assert notes == []
    assert len(found) == 5
    assert torch.equal(found[0].image, val[0]["image"])
    assert torch.equal(found[0].area, box_area([val[0]["box"].tolist()], val.size, val.size))
    with pytest.raises(ConfigError, match="give --size 64"):
        samples(Viewer({"plain": Bright()}, val.classes), "digits", 5, None)


@pytest.fixture
def networks(tmp_path):
    for name in ("resnet_tiny", "resnet_tiny+cbam"):
        torch.save(cbam.build(name, num_classes=2).state_dict(), tmp_path / f"{name}.pt")
    (tmp_path / "classes.txt").write_text("square\nother\n")
    plain, refined = tmp_path / "resnet_tiny.pt", tmp_path / "resnet_tiny+cbam.pt"
    return [
        "--compare", f"plain={plain}", f"cbam={refined}", "--model", "resnet_tiny",
        "--classes", str(tmp_path / "classes.txt"), "--size", "32",
    ]  # fmt: skip


def test_scores_and_gates_are_written_from_the_command_line(networks, boxes, tmp_path, capsys):
    folder = tmp_path / "classes"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            (folder / name / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    out = tmp_path / "out"
    assert main(["look", *networks, "--score", str(boxes), "--gates", str(folder), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "score.md",
        "score.json",
        "gates.md",
        "gates.png",
        "gates.svg",
    }
    record = json.loads((out / "score.json").read_text())
    assert (out / "score.md").read_text() == markdown(record)
    page = (out / "gates.md").read_text()
    assert "cbam, 6 images of 2 classes in classes:" in page
    assert page.count("\n| layer") == 3
    assert "- In short, in this order: next to nothing, a change below 1 %; saturated, more than 50 %" in page
    told = capsys.readouterr().out
    assert "6 images with boxes" in told
    assert "(replaced)" not in told
    assert main(["look", *networks, "--gates", str(folder), "--out", str(out)]) == 0
    assert f"{out / 'gates.md'} (replaced)" in capsys.readouterr().out.splitlines()


def test_a_page_that_cannot_be_written_is_named(tmp_path, viewer, boxes):
    (tmp_path / "out" / "score.md").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write to .*score\.md: Is a directory; give another --out"):
        write(score(viewer, str(boxes), Lines(), limit=2), tmp_path / "out")


def test_gates_that_fail_leave_no_empty_folder(tmp_path, networks):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_text("no image")  # the first is read to see whether there are gates
    assert main(["look", *networks, "--gates", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert not (tmp_path / "out").exists()


def damaged(path: Path) -> Path:
    """The file, cut off in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_a_damaged_image_is_left_out_of_the_gates_and_counted(tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(4):
        Image.effect_noise((64, 64), 90).convert("RGB").save(pictures / f"{i}.png")
    nets = {name: cbam.build("resnet_tiny+cbam", num_classes=2) for name in "ab"}
    viewer = Viewer(nets, ["x", "y"], size=32)
    whole = gates(viewer, str(pictures), out, Lines())[0].read_text()
    damaged(pictures / "0.png")  # the first is read to see whether there are gates
    page = gates(viewer, str(pictures), out, Lines())[0].read_text()
    assert capsys.readouterr().out.count("left out: ") == 1  # for both networks
    assert "left out" not in whole.lower()
    assert "a, 3 images in pictures:" in page
    assert "- Left out: 1 image that cannot be read." in page
    (pictures / "0.png").unlink()
    again = gates(viewer, str(pictures), out, Lines())[0].read_text()
    rows, of_three = ([line for line in text.split("\n") if line[:2] == "| "] for text in (page, again))
    assert rows == of_three
    for i in (1, 2):
        damaged(pictures / f"{i}.png")
    with pytest.raises(DataError, match="1 of 3 images can be read; at least two are needed"):
        gates(viewer, str(pictures), out, Lines())
    damaged(pictures / "3.png")
    with pytest.raises(DataError, match=r"no image can be read \(3 tried\)"):
        gates(viewer, str(pictures), out, Lines())


def test_a_damaged_image_is_left_out_of_the_scores_and_counted(viewer, boxes):
    damaged(boxes.parent / "2.png")
    results = score(viewer, str(boxes), Lines())
    assert results["names"] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    (note,) = results["left_out"]
    assert note.startswith("1 image that cannot be read: 2.png")
    for i in range(6):
        (boxes.parent / f"{i}.png").write_text("no image")
    with pytest.raises(DataError, match="no image with its object in view; left out: 6 images that cannot"):
        score(viewer, str(boxes), Lines())


def test_the_digits_need_networks_of_their_own(viewer, tmp_path, capsys):
    for what in ("--score", "--gates"):
        assert main(["look", what, "digits", "--out", str(tmp_path / "out")]) == 2
        assert "such as a run of `cbam train digits`: give --weights or --compare" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the networks take 40; give --size 64"):
        gates(viewer, "digits", tmp_path / "out", Lines())


def test_gates_need_attention_and_images(viewer, tmp_path):
    with pytest.raises(DataError, match="no images in the folder"):
        gates(viewer, str(tmp_path), tmp_path / "out", Lines())
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="one image cannot show what gates follow"):
        gates(viewer, str(tmp_path), tmp_path / "out", Lines())
    Image.new("RGB", (20, 20)).save(tmp_path / "b.jfif", "JPEG")
    with pytest.raises(ConfigError, match="no gates: plain, CBAM without attention"):
        gates(viewer, str(tmp_path), tmp_path / "out", Lines())
    with pytest.raises(DataError, match="no such folder"):
        gates(viewer, str(tmp_path / "none"), tmp_path / "out", Lines())
    with pytest.raises(DataError, match=r"a\.png is a file: --gates takes a folder of images"):
        gates(viewer, str(tmp_path / "a.png"), tmp_path / "out", Lines())


def test_folders_without_images_are_no_classes_and_a_mixture_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nets = {"a/b": cbam.build("resnet_tiny+cbam"), "a_b": cbam.build("resnet_tiny+cbam")}
    viewer = Viewer(nets, [str(i) for i in range(1000)], size=32)
    for name in ("1.png", "2.jpe"):
        Image.new("RGB", (40, 40)).save(tmp_path / name, "PNG")
    (tmp_path / "notes").mkdir()
    written = gates(viewer, ".", tmp_path / "out", Lines())
    names = {"gates.md", "gates-a_b.png", "gates-a_b.svg", "gates-a_b-2.png", "gates-a_b-2.svg"}
    assert {path.name for path in written} == names
    assert f"a/b, 2 images in {tmp_path.name}:" in (tmp_path / "out" / "gates.md").read_text()
    with pytest.raises(DataError, match=r"images next to folders of images \(out\)"):  # of the first time
        gates(viewer, ".", tmp_path / "other", Lines())
    assert gates(viewer, ".", tmp_path / "out", Lines()) == written  # its figures are none of the images


def test_the_figures_of_an_earlier_look_are_no_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    viewer = Viewer({"cbam": cbam.build("resnet_tiny+cbam")}, [str(i) for i in range(1000)], size=32)
    for name in ("ants", "bees"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (40, 40)).save(tmp_path / name / f"{i}.png")
    for _ in range(2):
        page, *_ = gates(viewer, ".", Path("cbam-look"), Lines())
        assert "4 images of 2 classes" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--score", "digits", "--target", "3"], "--target needs images"),
        (["--gates", "digits", "--layer", "layer1"], "--gates alone draws none"),
        (["--gates", "digits", "--method", "layercam"], "--gates alone draws none"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, told, capsys):
    assert main(["look", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--label", "a"], ["--limit", "3"], ["--gates", "x", "--label", "a"]])
def test_options_of_the_scores_go_with_them(arguments, capsys):
    assert main(["look", "a.png", *arguments]) == 2
    assert "--label needs --score, and --limit needs" in capsys.readouterr().err
