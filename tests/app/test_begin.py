"""What a training begins with, by command: attention's start, and trained weights that are gone on from."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import cbam
from cbam.app import cli
from cbam.train import checkpoint
from cbam.train.average import average_of

FEW = ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--loggers", "csv"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A folder with an image folder of three classes, and the weights of a network of timm for others."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate("abc"):
            Path("pictures", split, name).mkdir(parents=True)
            for i in range(2):
                pixels = random.integers(0, 90, (36, 32, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(f"pictures/{split}/{name}/{i}.png")


@pytest.fixture
def plain():
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save(model.state_dict(), "plain.pt")
    return model.state_dict()


def first_weights(folder: str) -> dict:
    """The weights of a run of rate 0, as it began."""
    found = checkpoint.newest(Path(folder), print)
    assert found is not None
    return found[1]["model"]


def setting(folder: str, name: str):
    return json.loads(Path(folder, "config.json").read_text())[name]


@pytest.mark.parametrize("recipe", ["folder", "imagenet/finetune"])
def test_a_trained_network_of_timm_is_fine_tuned_with_attention(recipe, plain, capsys):
    line = ["train", recipe, "pictures", "--model", "timm:resnet10t+cbam", "--pretrained", "plain.pt"]
    assert cli.main([*line, *FEW, "--size", "32", "--lr", "0", "--out", "run"]) == 0
    body = [name for name in plain if not name.startswith("fc.")]
    told = (
        f"weights of {Path.cwd()}/plain.pt: {len(body)} tensors loaded; its last layer is left out, as it is "
        "for other classes; attention at 4 places starts as the identity, multiplying by one\n"
    )
    assert told in capsys.readouterr().out
    began = first_weights("run")
    assert all(torch.equal(began[name], plain[name]) for name in body if name.endswith("weight"))
    assert began["fc.weight"].shape == (3, 512)
    assert setting("run", "start") == "identity"


def test_trained_weights_get_a_tenth_of_the_rate_by_default(plain, capsys):
    line = ["train", "folder", "pictures", "--model", "timm:resnet10t", "--pretrained", "plain.pt", *FEW]
    for more, rate, count in (([], 0.005, 1), (["--lr", "0.02"], 0.02, 0)):
        assert cli.main([*line, *more, "--size", "32", "--out", f"run{rate}"]) == 0
        assert capsys.readouterr().out.count("learning rate 0.005, a tenth of the recipe's") == count
        assert setting(f"run{rate}", "lr") == rate
    assert cli.main(["train", "digits", "--limit", "8", *FEW, "--out", "fresh"]) == 0
    assert setting("fresh", "lr") == 0.05


def test_the_recipe_for_trained_weights_needs_them(capsys):
    assert cli.main(["train", "imagenet/finetune", "pictures"]) == 2
    assert "imagenet/finetune needs --pretrained FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "start", "told"),
    [
        ([], "paper", "attention at 3 places initialised as in the paper (--start identity"),
        (["--start", "paper"], "paper", "attention at 3 places initialised as in the paper"),
        (["--start", "identity"], "identity", "attention at 3 places starts as the identity"),
        (["--model", "resnet_tiny"], None, None),
    ],
)
def test_the_start_of_attention_is_chosen_recorded_and_reported(options, start, told, capsys):
    line = ["train", "digits", "--limit", "8", *FEW, "--lr", "0", *options]
    assert cli.main([*line, "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert told in out if told else "attention" not in out
    assert setting("run", "start") == start
    gates = first_weights("run")
    assert ("layer1.0.cbam.channel.gain" in gates) == (start == "identity")  # it is in the state where not 1
    if start:
        assert (gates["layer1.0.cbam.channel.fc2.weight"] == 0).all() == (start == "identity")
        assert cli.main(["export", "run", "--to", "hub", "--out", "shared"]) == 0
        assert cbam.hub.card_of("shared").recipe["attention's start"] == start


def test_an_unknown_start_is_refused(capsys):
    assert cli.main(["train", "digits", "--start", "zero"]) == 2
    assert "start must be paper or identity, got 'zero'" in capsys.readouterr().err


def test_a_run_of_an_earlier_cbam_without_a_start_resumes(capsys):
    line = ["train", "digits", "--limit", "8", *FEW, "--batch-size", "2", "--out", "run"]
    assert cli.main([*line, "--max-time", "0s"]) == 75
    (path,) = Path("run").glob("*.ckpt")
    state = checkpoint.load(path)
    del state["config"]["start"]
    checkpoint.save(Path("run"), 9, state)
    assert cli.main(["train", "digits", "--out", "run", "--resume", "auto", "--start", "identity"]) == 2
    assert "start 'paper' -> 'identity'" in capsys.readouterr().err
    assert cli.main(["train", "digits", "--out", "run", "--resume", "auto", "--start", "paper"]) == 0


def test_a_training_begins_with_a_run_or_a_folder_to_publish(capsys):
    line = ["train", "digits", "--limit", "8", *FEW]
    assert cli.main([*line, "--model", "resnet_tiny", "--ema", "0.9", "--out", "first"]) == 0
    assert cli.main(["export", "first", "--to", "hub", "--out", "shared"]) == 0
    found = checkpoint.newest(Path("first"), print)
    assert found is not None
    average = average_of(found[1])
    for source in ("first", next(Path("first").glob("*.ckpt")).as_posix(), "shared"):
        out = f"from-{Path(source).name}"
        assert cli.main([*line, "--pretrained", source, "--lr", "0", "--out", out]) == 0
        taken = f"{len(average)} tensors loaded; attention at 3 places starts as"
        assert f"weights of {Path.cwd() / source}: {taken}" in capsys.readouterr().out
        assert torch.equal(first_weights(out)["layer1.0.conv1.weight"], average["layer1.0.conv1.weight"])
    assert cli.main([*line, "--pretrained", "from-first", "--out", "on"]) == 0
    assert "attention at 3 places as in the file" in capsys.readouterr().out
    assert cli.main([*line, "--pretrained", "from-first", "--model", "resnet_tiny", "--out", "no"]) == 4
    assert f"cbam: {Path.cwd()}/from-first: " in capsys.readouterr().err


def test_a_comparison_begins_with_a_run_and_takes_its_network(monkeypatch, capsys):
    monkeypatch.setattr("cbam.studies.speed.ROUNDS", 1)
    monkeypatch.setattr("cbam.studies.timing.WARM_UP", 1)
    line = ["train", "folder", "pictures", "--size", "32", *FEW]
    assert cli.main([*line, "--model", "timm:resnet10t", "--out", "plain"]) == 0
    assert cli.main([*line, "--model", "resnet_tiny+cbam", "--out", "refined"]) == 0
    capsys.readouterr()
    line = [
        "compare",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--attention",
        "cbam",
        "--size",
        "32",
        "--device",
        "cpu",
    ]
    assert cli.main([*line, "--pretrained", "refined", "pictures"]) == 2
    assert "refined is of resnet_tiny+cbam, but a comparison needs a plain network" in capsys.readouterr().err
    assert cli.main([*line, "--pretrained", "plain", "pictures"]) == 0
    assert "; timm:resnet10t on " in (out := capsys.readouterr().out)
    assert f"weights of plain: {len(first_weights('plain'))} tensors loaded\n" in out
    recorded = json.loads(Path("cbam-report/results.json").read_text())["config"]
    assert (recorded["model"], recorded["lr"]) == ("timm:resnet10t", 0.005)
