"""`cbam export`: what it takes a network from, what it calls the file, and what the file then knows."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import cbam
from cbam.app import cli
from cbam.data import cluttered_digits


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
    newest = max(Path("runs/mine").glob("step-*.ckpt"))
    assert cli.main(["export", str(newest), "--to", "torch", "--out", "again.pt2"]) == 0
    x = torch.randn(1, 3, val.size, val.size)
    one, other = (torch.export.load(file).module()(x) for file in ("mine.pt2", "again.pt2"))
    assert torch.equal(one, other)


def test_a_weights_file_takes_the_name_of_its_network(capsys):
    model = cbam.build("resnet_tiny+cbam", num_classes=7)
    torch.save(model.state_dict(), "w.pth")
    line = ["export", "w.pth", "--to", "torch", "--size", "32"]
    assert cli.main(line) == 2
    assert cli.main([*line, "--model", "resnet_tiny+cbam"]) == 4  # of 7 classes, not of 1000
    assert cli.main([*line, "--model", "resnet_tiny+cbam", "--num-classes", "7"]) == 0
    assert computes("w.pt2", model, 32)
    assert told_in("w.pt2")["network"] == "resnet_tiny+cbam"
    capsys.readouterr()
    assert cli.main([*line, "--model", "resnet_tiny+cbam", "--num-classes", "7"]) == 2
    assert "w.pt2 exists" in capsys.readouterr().err


def test_a_folder_of_save_pretrained_knows_what_it_is():
    model = cbam.build("resnet_tiny+cbam", num_classes=2)
    card = cbam.hub.Card(classes=("a", "b"), size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    cbam.save_pretrained(model, "garden", network="resnet_tiny+cbam", card=card)
    assert cli.main(["export", "garden", "--to", "torch", "--batch", "2"]) == 0
    assert told_in("garden.pt2") == {"classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.25] * 3}
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
    assert "pip install 'cbam[export]' (missing: onnx, onnxscript, onnxruntime)" in capsys.readouterr().err
