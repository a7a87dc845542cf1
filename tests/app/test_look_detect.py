"""`cbam look --detect`: from detectors in files and images to figures on the disk."""

import pytest
import torch

from cbam.app.cli import main
from cbam.app.detecting import DetectRequest, detectors, look_for_objects
from cbam.errors import CheckpointError, ConfigError, DataError, OutputError
from cbam.models import build, detector

Image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow")
pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")
pytest.importorskip("matplotlib", reason="figures are matplotlib's")

PLAIN, REFINED = "stairnet300:mobilenet_v1", "stairnet300:mobilenet_v1+cbam"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of two untrained detectors, names of three classes, and an image."""
    folder = tmp_path_factory.mktemp("detectors")
    for name, file in ((PLAIN, "plain.pt"), (REFINED, "cbam.pt")):
        torch.manual_seed(0)
        torch.save(detector(name, num_classes=3, start="identity").state_dict(), folder / file)
    torch.save(build("resnet_tiny", num_classes=3).state_dict(), folder / "classifier.pt")
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    Image.linear_gradient("L").convert("RGB").resize((120, 90)).save(folder / "photo.png")
    (folder / "bad.png").write_text("<html>no image")
    Image.new("L", (3000, 1)).save(folder / "narrow.png")
    (folder / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 30), (90 * i, 40, 200)).save(folder / "pictures" / f"{i}.png")
    return folder


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    return tmp_path / "out"


PAIR = ["--model", PLAIN, "--compare", "plain=plain.pt", "cbam=cbam.pt", "--classes", "classes.txt"]
LOW = ["--threshold", "0.2"]  # untrained: four classes, a quarter each


def test_two_detectors_are_drawn_side_by_side(here, capsys):
    assert main(["look", "--detect", "photo.png", *PAIR, *LOW, "--box", "2", "--out", str(here)]) == 0
    out = capsys.readouterr().out
    assert f"plain: {PLAIN}, weights of plain.pt" in out
    assert f"cbam: {REFINED}, weights of cbam.pt" in out
    assert "photo.png: plain finds " in out
    assert "; cbam finds " in out
    assert {path.name for path in here.iterdir()} == {"detect.png", "detect.svg"}
    with Image.open(here / "detect.png") as figure:
        assert figure.width > 1300
    assert out.splitlines()[-2:] == [str(here / "detect.png"), str(here / "detect.svg")]
    (here / "detect-2.png").write_text("of an earlier look")
    assert main(["look", "--detect", "photo.png", *PAIR, *LOW, "--out", str(here)]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"{here / 'detect.png'} (replaced)",
        f"{here / 'detect.svg'} (replaced)",
        f"left from an earlier run in {here}: detect-2.png",
    ]


def test_attention_at_the_identity_finds_the_same(here):
    eyes = detectors(PLAIN, None, ["plain=plain.pt", "cbam=cbam.pt"], "classes.txt", None)
    from cbam.data import decode
    from cbam.explain import detect

    plain, refined = detect(eyes, decode("photo.png"), threshold=0.2).finds
    assert len(plain.boxes) > 0
    assert torch.equal(plain.boxes, refined.boxes)
    assert torch.equal(plain.heat, refined.heat)


def test_a_folder_is_read_and_unreadable_images_are_reported(here, folder, capsys):  # D3 D11
    code = main(["look", "--detect", "pictures", "bad.png", *PAIR[:2], "--weights", "plain.pt",
                 "--classes", "classes.txt", *LOW, "--out", str(here)])  # fmt: skip
    told = capsys.readouterr()
    assert code == 3
    assert "pictures/0.png: detector finds " in told.out
    assert "left out: " in told.out
    assert "bad.png: not an image (starts with '<html" in told.out
    assert "1 of 3 images left out" in told.err
    assert (here / "detect.png").exists()


def test_more_images_than_fit_one_figure_make_several(here, monkeypatch):
    import cbam.app.detecting as module

    drawn = []
    monkeypatch.setattr(module, "detection_figure", lambda rows, path: (drawn.append(len(rows)), path)[1])
    monkeypatch.setattr(module, "detect", lambda *a, **k: type("Row", (), {"finds": ()})())
    from pathlib import Path

    eyes = detectors(PLAIN, "plain.pt", [], "classes.txt", None)
    told = look_for_objects(eyes, DetectRequest([Path("photo.png")] * 8, here), lambda _: None)
    assert drawn == [6, 6, 2, 2]
    assert [path.name for path in told.figures] == [
        "detect-1.png", "detect-1.svg", "detect-2.png", "detect-2.svg",
    ]  # fmt: skip


def test_nothing_is_drawn_until_an_image_has_the_box(here, monkeypatch):
    import cbam.app.detecting as module

    drawn, boxes = [], iter([1] * 7 + [3] + [1] * 7)
    monkeypatch.setattr(module, "detection_figure", lambda rows, path: (drawn.append(path.stem), path)[1])
    one = type("One", (), {"network": "", "labels": (), "scores": ()})

    def found(*_, **__):
        only = one()
        only.boxes = range(next(boxes))
        return type("Row", (), {"finds": (only,)})()

    monkeypatch.setattr(module, "detect", found)
    from pathlib import Path

    eyes = detectors(PLAIN, "plain.pt", [], "classes.txt", None)
    look_for_objects(eyes, DetectRequest([Path("photo.png")] * 8, here, box=3), lambda _: None)
    assert drawn == ["detect-1", "detect-1", "detect-2", "detect-2"]
    with pytest.raises(ConfigError, match="--box 3: no image has more than 1 boxes"):
        look_for_objects(eyes, DetectRequest([Path("photo.png")] * 7, here, box=3), lambda _: None)
    assert len(drawn) == 4


def test_the_size_is_the_shorter_side_of_what_is_seen(here, tmp_path):
    name = "retinanet:timm:test_resnet"
    torch.save(detector(name, num_classes=3).state_dict(), tmp_path / "net.pt")
    eyes = detectors(name, str(tmp_path / "net.pt"), [], "classes.txt", 96)
    transform = eyes.networks["detector"].transform
    assert (transform.min_size, transform.max_size) == ((96,), 160)


def test_a_run_knows_its_detector_its_size_and_its_classes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pytorch_lightning", reason="training is Lightning's")
    monkeypatch.chdir(tmp_path)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / part).mkdir(parents=True)
    box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (64, 64), (200, 40, 40)).save(f"voc/JPEGImages/{name}.jpg")
        thing = f"<object><name>square</name>{box}</object>"
        (tmp_path / "voc" / "Annotations" / f"{name}.xml").write_text(f"<annotation>{thing}</annotation>")
    for split in ("train", "val"):
        (tmp_path / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text("a\nb\nc\nd\n")
    settings = [
        "--model",
        "fasterrcnn:timm:test_resnet+cbam",
        "--size",
        "64",
        "--regions",
        "8",
        "--epochs",
        "1",
    ]
    assert main(["train", "detect/short", "voc", *settings, "--batch-size", "2", "--device", "cpu",
                 "--out", "run"]) == 0  # fmt: skip
    capsys.readouterr()
    picture = "voc/JPEGImages/a.jpg"
    assert main(["look", "--detect", picture, "--weights", "run", "--threshold", "0", "--out", "out"]) == 0
    assert "detector: fasterrcnn:timm:test_resnet+cbam, weights of run" in capsys.readouterr().out
    eyes = detectors(None, "run", [], None, None)
    assert eyes.classes == ["square"]
    (tmp_path / "two.txt").write_text("square\nround\n")
    with pytest.raises(ConfigError, match="--classes has 2 names, but the number of classes in run is 1"):
        detectors(None, "run", [], "two.txt", None)
    assert eyes.networks["detector"].transform.min_size == (64,)
    assert eyes.networks["detector"].rpn.post_nms_top_n() == 16
    assert main(["look", picture, "--weights", "run"]) == 2
    assert (
        "run holds a detector, fasterrcnn:timm:test_resnet+cbam; expected a classifier"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["photo.png"], 2, "--detect needs a trained detector"),
        ([], 2, "needs images"),
        (["none.png", *PAIR], 3, "none.png: no such file"),
        (["photo.png", *PAIR, "--weights", "plain.pt"], 2, "not both"),
        (["photo.png", *PAIR[:-2]], 2, "plain.pt does not name its classes: give --classes FILE"),
        (["photo.png", "--weights", "plain.pt"], 2, "plain.pt does not name its detector"),
        (["photo.png", "--weights", "none.pt", "--model", PLAIN], 4, "none.pt: no such file"),
        (["photo.png", *PAIR, "--size", "200"], 2, "takes images of 300 pixels: leave the size out"),
        (["photo.png", *PAIR, "--box", "0"], 2, "whole number above 0"),
        (["photo.png", *PAIR, "--threshold", "1.5"], 2, "a number from 0 to 1"),
        (["photo.png", *PAIR, "--target", "ant"], 2, "choose an object with --box"),
        (["photo.png", *PAIR, "--score", "digits"], 2, "--detect excludes --score"),
        (["photo.png", *PAIR, "--method", "scorecam", *LOW], 2, "scorecam needs the scores of a classifier"),
        (["photo.png", *PAIR, "--layer", "nowhere", *LOW], 2, "no layer 'nowhere'"),
        (["bad.png", *PAIR], 3, "no image can be read (1 tried)"),
        (["photo.png", *PAIR, "--box", "7"], 2, "no image has more than 0 boxes"),
        (["photo.png", "--model", PLAIN, "--weights", "classifier.pt", *PAIR[-2:]], 4, "class"),
        (["photo.png", "--model", "resnet50", "--weights", "plain.pt", "--classes", "classes.txt"], 2,
         "unknown detector 'resnet50'"),
        (["photo.png", *PAIR[:3], "a=plain.pt", "a=plain.pt", *PAIR[-2:]], 2, "needs a different name"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_an_exit_code(here, capsys, arguments, code, message):  # C1 C3
    assert main(["look", "--detect", *arguments, "--out", str(here)]) == code
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not here.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "2"], "--box and --threshold need --detect"),
        (["--model", PLAIN, "--weights", "plain.pt"], f"{PLAIN} is a detector: give --detect"),
    ],
)
def test_detectors_need_detect(here, capsys, arguments, message):
    assert main(["look", "photo.png", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_output_is_reported_before_any_work(here, folder):
    from pathlib import Path

    eyes = detectors(PLAIN, "plain.pt", [], "classes.txt", None)
    with pytest.raises(OutputError, match="cannot write to"):
        look_for_objects(eyes, DetectRequest([Path("photo.png")], folder / "bad.png" / "out"), lambda _: None)
    with pytest.raises(DataError, match="no images in"):
        look_for_objects(eyes, DetectRequest([here.parent], here), lambda _: None)


def test_a_look_that_fails_leaves_no_empty_folder(here):
    assert main(["look", "--detect", "bad.png", *PAIR[:2], "--weights", "plain.pt",
                 "--classes", "classes.txt", "--out", str(here)]) == 3  # fmt: skip
    assert not here.exists()


def test_classes_and_weights_must_fit(here, tmp_path):
    (tmp_path / "two.txt").write_text("ant\nbee\n")
    with pytest.raises(CheckpointError, match="--classes has 2 names: is that right"):
        detectors(PLAIN, "plain.pt", [], str(tmp_path / "two.txt"), None)
    with pytest.raises(ConfigError, match="NAME=FILE"):
        detectors(PLAIN, None, ["plain.pt"], "classes.txt", None)
