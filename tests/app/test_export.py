"""`cbam export`: what it takes a network from, what it calls the file, and what the file then knows."""

import importlib.util
import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cbam
from cbam.app import cli
from cbam.data import cluttered_digits
from cbam.train import checkpoint, evaluate
from cbam.train.recipes import recipe


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def told_in(file) -> dict:
    extra = {"cbam.json": ""}
    torch.export.load(file, extra_files=extra)
    return json.loads(extra["cbam.json"])


def computes(file, model, size) -> bool:
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        found, wanted = torch.export.load(file).module()(x), model.eval()(x)
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def test_a_run_is_exported_with_its_classes_size_and_normalisation(capsys):
    assert cli.main(["train", "digits", "--epochs", "1", "--limit", "40", "--out", "runs/mine"]) == 0
    capsys.readouterr()
    assert cli.main(["export", "runs/mine", "--to", "torch"]) == 0
    assert "weights of runs/mine" in (out := capsys.readouterr().out)
    assert "mine.pt2" in out
    _, val = cluttered_digits()
    told = told_in("mine.pt2")
    assert told["classes"] == list(val.classes)
    assert told["mean"] == pytest.approx(val.mean)
    assert (told["resize"], told["crop"]) == (val.size, val.size)
    newest = max(Path("runs/mine").glob("step-*.ckpt"))
    assert cli.main(["export", str(newest), "--to", "torch", "--out", "again.pt2"]) == 0
    x = torch.randn(1, 3, val.size, val.size)
    one, other = (torch.export.load(file).module()(x) for file in ("mine.pt2", "again.pt2"))
    assert torch.equal(one, other)


def test_a_run_becomes_a_folder_whose_card_tells_how_it_was_trained_and_what_came_out(capsys):
    line = ["train", "digits", "--epochs", "1", "--limit", "40", "--batch-size", "8", "--save-every", "2"]
    assert cli.main([*line, "--seed", "3", "--out", "runs/mine"]) == 0
    assert cli.main(["export", "runs/mine", "--to", "hub", "--licence", "mit"]) == 0
    assert "cbam.from_pretrained('mine')" in capsys.readouterr().out
    card, (_, val) = cbam.hub.card_of("mine"), cluttered_digits()
    measured = evaluate(cbam.from_pretrained("mine"), val.subset(40), device="cpu")
    assert card.results["top-1 error, %"] == pytest.approx(measured.top1)
    assert card.results["validation loss"] == pytest.approx(measured.loss, rel=1e-5)
    assert (card.classes, card.size, card.mean) == (tuple(val.classes), val.size, pytest.approx(val.mean))
    assert (card.data, card.licence) == ("cluttered_digits", "mit")
    told = {"name": "digits", "epochs": 1, "batch_size": 8, "lr": 0.05, "seed": 3}
    assert told.items() <= dict(card.recipe).items()
    assert "1 of 1 epochs, on 40 images" in card.about
    assert f"torch {version('torch')}" in card.about
    assert "EXIF" not in card.about
    assert cli.main(["export", "mine", "--to", "hub"]) == 2
    assert "mine exists" in capsys.readouterr().err


def test_card_and_file_say_how_images_come_to_a_network_trained_on_a_folder(tmp_path):
    random = np.random.default_rng(0)
    for place in (f"{split}/{name}" for split in ("train", "val") for name in "ab"):
        (tmp_path / "pictures" / place).mkdir(parents=True)
        pixels = random.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / place / "0.png")
    line = ["train", "folder", "pictures", "--model", "resnet_tiny", "--epochs", "1", "--size", "56"]
    assert cli.main([*line, "--batch-size", "2", "--no-exif", "--out", "mine"]) == 0
    assert cli.main(["export", "mine", "--to", "hub", "--out", "shared"]) == 0
    assert "as they are stored, not turned as their EXIF says" in cbam.hub.card_of("shared").about
    assert (cbam.hub.card_of("shared").size, cbam.hub.card_of("shared").resize) == (56, 64)
    page = Path("shared/README.md").read_text()
    assert "resized to 64 px on the shorter side and centre-cropped to 56 x 56 px" in page
    assert page.count("shorter side") == page.count("56 x 56") == 1  # and nothing that contradicts it
    for named in ("mine", "shared"):
        assert cli.main(["export", named, "--to", "torch", "--out", f"{named}.pt2"]) == 0
        assert (told_in(f"{named}.pt2")["resize"], told_in(f"{named}.pt2")["crop"]) == (64, 56)
    assert cli.main(["export", "mine", "--to", "torch", "--size", "32", "--out", "small.pt2"]) == 0
    assert "resize" not in told_in("small.pt2")  # nobody has said how to make images of 32


def test_weights_that_were_not_validated_have_no_results():
    line = ["train", "digits", "--epochs", "1", "--limit", "40", "--batch-size", "8", "--save-every", "2"]
    assert cli.main([*line, "--out", "mine"]) == 0
    assert cli.main(["export", "mine/step-00000002.ckpt", "--to", "hub", "--out", "early"]) == 0
    card = cbam.hub.card_of("early")
    assert card.results == {}
    assert "0.4 of 1 epochs" in card.about


def test_a_checkpoint_in_the_folder_of_another_run_does_not_take_that_ones_results():
    line = ["train", "digits", "--epochs", "2", "--limit", "40", "--batch-size", "20"]
    for name, seed in (("mine", "0"), ("other", "1")):
        assert cli.main([*line, "--seed", seed, "--out", name]) == 0
    for copy, lacking in (("settings", "metrics.jsonl"), ("metrics", "config.json")):
        shutil.copytree("other", copy)
        Path(copy, lacking).unlink()
        if lacking == "config.json":
            shutil.copy("other/metrics.jsonl", copy)
        shutil.copy("mine/step-00000004.ckpt", f"{copy}/mine.ckpt")
        shutil.copy("other/metrics.jsonl", copy)
        assert cli.main(["export", f"{copy}/mine.ckpt", "--to", "hub", "--out", f"{copy}-shared"]) == 0
        assert cbam.hub.card_of(f"{copy}-shared").results == {}
    assert cli.main(["export", "mine/step-00000004.ckpt", "--to", "hub", "--out", "shared"]) == 0
    assert cbam.hub.card_of("shared").results


def test_an_option_the_format_lacks_is_refused(capsys):
    assert cli.main(["export", "resnet_tiny", "--to", "hub", "--dynamic"]) == 2
    assert "--to hub does not take --dynamic" in capsys.readouterr().err
    assert cli.main(["export", "resnet_tiny", "--to", "torch", "--licence", "mit"]) == 2
    assert "--to torch does not take --licence" in capsys.readouterr().err


def test_the_run_of_a_detector_is_refused(capsys):
    state = {"config": asdict(recipe("detect/short")), "data": {}, "model": {}, "seen": {}}
    newest = checkpoint.save(Path(), 1, state)
    assert cli.main(["export", str(newest), "--to", "hub"]) == 2
    assert "holds a detector, fasterrcnn:resnet18+cbam" in capsys.readouterr().err


def test_a_weights_file_takes_the_name_of_its_network(capsys):
    model = cbam.build("resnet_tiny+cbam", num_classes=7)
    torch.save(model.state_dict(), "w.pth")
    line = ["export", "w.pth", "--to", "torch", "--size", "32"]
    assert cli.main(line) == 2
    capsys.readouterr()
    assert cli.main([*line, "--model", "resnet_tiny+cbam"]) == 4  # of 7 classes, not of 1000
    assert "for 7 classes: give --num-classes 7\n" in capsys.readouterr().err  # K12
    assert cli.main([*line, "--model", "resnet_tiny+cbam", "--num-classes", "7"]) == 0
    assert computes("w.pt2", model, 32)
    assert told_in("w.pt2")["network"] == "resnet_tiny+cbam"
    assert not {"mean", "std"} & told_in("w.pt2").keys()  # a weights file does not say them
    capsys.readouterr()
    assert cli.main([*line, "--model", "resnet_tiny+cbam", "--num-classes", "7"]) == 2
    assert "w.pt2 exists" in capsys.readouterr().err


def test_the_normalisation_of_a_weights_file_must_be_given(capsys):
    torch.save(cbam.build("timm:test_resnet", num_classes=7).state_dict(), "w.pth")
    line = ["export", "w.pth", "--model", "timm:test_resnet", "--num-classes", "7", "--to", "torch"]
    assert cli.main([*line, "--size", "32"]) == 2  # timm's own weights have another than ImageNet's
    assert (
        "give --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 for timm's weights, --mean 0.485"
        in capsys.readouterr().err
    )
    given = ["--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.1"]
    assert cli.main([*line, "--size", "32", *given]) == 0
    assert told_in("w.pt2")["mean"] == [0.5, 0.4, 0.3]
    assert told_in("w.pt2")["std"] == [0.2, 0.2, 0.1]


def test_a_folder_of_save_pretrained_knows_what_it_is():
    model = cbam.build("resnet_tiny+cbam", num_classes=2)
    card = cbam.hub.Card(classes=("a", "b"), size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    cbam.save_pretrained(model, "garden", network="resnet_tiny+cbam", card=card)
    assert cli.main(["export", "garden", "--to", "torch", "--batch", "2"]) == 0
    assert told_in("garden.pt2") == {
        "network": "resnet_tiny+cbam", "classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip
    assert torch.export.load("garden.pt2").module()(torch.randn(2, 3, 32, 32)).shape == (2, 2)


# C10
def test_ctrl_c_is_130_and_leaves_nothing(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cbam.portable.exporting.agreement", interrupt)
    assert cli.main(["export", "resnet_tiny", "--to", "torch", "--size", "32"]) == 130
    assert list(tmp_path.iterdir()) == []


# C5
def test_a_missing_exporter_is_named_before_any_work(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    assert cli.main(["export", "resnet_tiny", "--to", "onnx"]) == 8
    told = capsys.readouterr().err
    assert "(onnx, onnxscript, onnxruntime missing): pip install 'cbam[export]', or in a checkout" in told
