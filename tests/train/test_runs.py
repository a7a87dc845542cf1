"""Runs in a folder, from recipe to score (rows C7, K7, K19, R13, R21)."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cbam
from cbam.errors import CheckpointError, CheckpointNotFoundError, ConfigError, StoppedError
from cbam.train import Config, checkpoint, material, run, runs, score
from cbam.train.folder import CONFIG, METRICS
from cbam.train.lock import LOCK, _process
from cbam.train.material import network
from cbam.train.recipes import recipe

SMALL = {
    "limit": 24,
    "epochs": 2,
    "batch_size": 8,
    "save_every": 2,
    "log_every": 1,
    "device": "cpu",
    "loggers": (),
}


class Watch:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.done = self.skipped = 0.0

    def say(self, line: str) -> None:
        self.said.append(line)

    now = say

    def advance(self, share: float) -> None:
        self.done += share

    def skip(self, share: float) -> None:
        self.skipped += share
        self.done += share


def digits(folder: Path, *, watch=None, resume=None, max_time=None, override=False, **settings) -> list[dict]:
    """A run of a few steps; when resumed, it gets no settings that it should know."""
    given = settings if resume else {**SMALL, **settings}
    how = {"resume": resume, "max_time": max_time, "override": override}
    return run("digits", given, folder, watch or Watch(), **how)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    digits(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def weights(folder: Path) -> dict:
    found = checkpoint.newest(folder, print)
    assert found is not None
    return found[1]["model"]


def test_a_run_leaves_its_settings_metrics_and_checkpoints(finished):
    names = sorted(path.name for path in finished.iterdir() if path.suffix != ".ckpt")
    assert names == [CONFIG, "last.json", METRICS]
    config = Config(**json.loads((finished / CONFIG).read_text()))
    assert (config.limit, config.epochs, config.model) == (24, 2, "resnet_tiny+cbam")
    assert len(checkpoint.checkpoints(finished)) == 3


def test_a_stopped_run_resumes_with_its_own_settings_to_the_same_weights(finished, tmp_path):
    # R1, R19
    folder, watch = tmp_path / "run", Watch()
    with pytest.raises(StoppedError):
        digits(folder, max_time=1e-3)
    digits(folder, resume="auto", watch=watch)
    ours, theirs = weights(folder), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (folder / METRICS).read_text() == (finished / METRICS).read_text()
    assert (folder / CONFIG).read_text() == (finished / CONFIG).read_text()
    assert watch.said[0].endswith("epoch 0, 1 steps of it done")
    assert watch.done == pytest.approx(1)
    assert 0 < watch.skipped < 0.5


def test_a_new_run_into_the_folder_of_another_is_refused(folder):
    # C7
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigError, match="holds a run: --resume auto continues it"):
        digits(folder)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("left", "told"), [(LOCK, "in use by"), ("step-00000003.ckpt", "began in the meantime")]
)
def test_one_of_two_runs_that_start_at_once_in_a_new_folder_is_refused(tmp_path, monkeypatch, left, told):
    # R21: the other created the folder while this one read its images
    folder, read = tmp_path / "run", runs.pictures

    def slow(config):
        folder.mkdir()
        (folder / left).write_text(json.dumps(_process(os.getppid())))
        return read(config)

    monkeypatch.setattr(runs, "pictures", slow)
    with pytest.raises(ConfigError, match=told):
        digits(folder)
    assert [path.name for path in folder.iterdir()] == [left]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (CONFIG, '{"model_type": "bert"}'),
        (CONFIG, "["),
        (METRICS, '{"loss": 1}\n'),
        ("epochs.csv", "epoch\n"),
    ],
)
def test_files_that_are_not_of_a_run_are_not_overwritten(tmp_path, monkeypatch, name, text):
    # C7, K18
    (tmp_path / name).write_text(text)
    for resume in (None, "auto"):
        with pytest.raises(ConfigError, match=rf"not from a run \({name}\) and .*another --out"):
            digits(tmp_path, resume=resume, **(SMALL if resume else {}))
    folder, read = tmp_path / "run", runs.pictures

    def slow(config):
        shutil.copytree(tmp_path, folder)
        return read(config)

    monkeypatch.setattr(runs, "pictures", slow)
    with pytest.raises(ConfigError, match="not from a run"):
        digits(folder)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, text)]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path):
    # R1
    lines = '{"epoch": 0, "step": 1, "loss": 2}\n{"epoch": 0, "step": 3, "train_loss": 2, "val_loss": 2}\n'
    for name, text in ((CONFIG, '{"recipe": "digits"}'), (METRICS, lines)):
        (tmp_path / name).write_text(text)
    digits(tmp_path, epochs=1)
    assert len((tmp_path / METRICS).read_text().splitlines()) == 4


def test_resume_auto_without_a_checkpoint_starts_a_new_run_and_says_so(tmp_path):
    # K19
    watch = Watch()
    digits(tmp_path / "run", resume="auto", watch=watch, **SMALL)
    assert watch.said[0] == f"no checkpoint in {tmp_path / 'run'}: starting a new run"


def test_resume_from_a_missing_path_is_refused(tmp_path):
    # K19
    with pytest.raises(CheckpointNotFoundError) as caught:
        digits(tmp_path / "run", resume=str(tmp_path / "step-00000001.ckpt"))
    assert caught.value.exit_code == 4
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_in_another_folder_from_a_path(finished, tmp_path):
    oldest = checkpoint.checkpoints(finished)[-1]
    digits(tmp_path / "run", resume=str(oldest))
    assert all(torch.equal(weights(tmp_path / "run")[n], t) for n, t in weights(finished).items())
    with pytest.raises(ConfigError, match="holds the checkpoint"):
        digits(tmp_path / "run", resume=str(oldest))


def test_resume_from_a_folder_uses_its_newest_valid_checkpoint(folder, finished, tmp_path):
    # K19
    newest, older, _ = checkpoint.checkpoints(folder)
    newest.write_bytes(b"")
    watch = Watch()
    digits(tmp_path / "other", resume=str(folder), watch=watch)
    assert any(line.startswith(f"resuming from {older}: ") for line in watch.said)
    digits(folder, resume=str(folder))
    for run_folder in (folder, tmp_path / "other"):
        assert all(torch.equal(weights(run_folder)[n], t) for n, t in weights(finished).items())
    with pytest.raises(ConfigError, match="holds the checkpoint"):
        digits(tmp_path / "other", resume=str(folder))
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint in this folder"):
        digits(tmp_path / "new", resume=str(tmp_path))


def test_a_run_resumes_in_its_own_folder_given_by_another_path(folder, finished, tmp_path):
    # K19
    (tmp_path / "link").symlink_to(folder)
    for named in (tmp_path / "link", tmp_path / "link" / checkpoint.checkpoints(folder)[0].name):
        digits(folder, resume=str(named))
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights(finished).items())


def test_a_folder_with_checkpoints_of_something_else_is_refused(tmp_path):
    # K19: as a study keeps unfinished runs
    checkpoint.save(tmp_path, 3, {"step": 3, "run": "networks", "model": {}})
    for use in (lambda: digits(tmp_path / "new", resume=str(tmp_path)), lambda: score(tmp_path)):
        with pytest.raises(
            CheckpointError, match="not a checkpoint of cbam train, it lacks config, data, seen"
        ):
            use()


def test_fewer_epochs_than_were_begun_are_refused(folder):
    # R13
    with pytest.raises(ConfigError, match="epochs is 1, but 2 have begun already: give 2 or more"):
        digits(folder, resume="auto", override=True, epochs=1)
    assert len(digits(folder, resume="auto", override=True, epochs=2)) == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"step_epochs": 3, "milestones": [4]},
            "step_epochs is for --schedule step, not cosine; milestones is",
        ),
        ({"optimizer": "adamw", "momentum": 0.8}, "momentum is for --optimizer sgd, not adamw"),
        (
            {"model": "resnet_tiny", "start": "paper"},
            "start is for added attention, and resnet_tiny has none",
        ),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(tmp_path, given, told):
    # C3
    with pytest.raises(ConfigError, match=told):
        digits(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_settings_without_effect_are_accepted_if_equal_to_the_recipes(tmp_path, folder):
    """The config.json of a run states all of them."""
    whole = json.loads((folder / CONFIG).read_text())
    given = {name: value for name, value in whole.items() if name not in ("recipe", "devices", "nodes")}
    digits(tmp_path / "again", **given)
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == whole
    digits(tmp_path / "adamw", optimizer="adamw", epochs=1)


def test_time_before_the_first_step_counts_towards_the_limit(tmp_path):
    # R19
    with pytest.raises(StoppedError, match="the time limit after 1 of 3 steps"):
        run("digits", SMALL, tmp_path / "run", Watch(), max_time=3600, began=time.monotonic() - 3550)


def test_damage_falls_back_to_an_older_checkpoint_and_never_to_a_fresh_start(folder, finished):
    # K1, K6
    last, older, oldest = checkpoint.checkpoints(folder)
    watch = Watch()
    last.write_bytes(last.read_bytes()[:-100])
    digits(folder, resume="auto", watch=watch)
    assert f"using {older.name}" in watch.said[0]
    assert all(torch.equal(weights(folder)[n], t) for n, t in weights(finished).items())
    for path in (last, older, oldest):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        digits(folder, resume="auto")


def test_changed_settings_are_refused_on_resume_or_else_reported(folder):
    # R13
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"lr 0\.05 -> 0\.1; seed 0 -> 1; leave them out"):
        digits(folder, resume="auto", lr=0.1, seed=1)
    with pytest.raises(ConfigError, match="recipe 'digits' -> 'folder'"):
        run("folder", {}, folder, Watch(), resume="auto")
    with pytest.raises(ConfigError, match=r"lr 0\.05 -> 0\.1; .* --override to continue"):
        digits(folder, resume="auto", lr=0.1)
    with pytest.raises(ConfigError, match=r"model 'resnet_tiny\+cbam' -> 'resnet_tiny'"):
        digits(folder, resume="auto", model="resnet_tiny", override=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    watch = Watch()
    digits(folder, resume="auto", keep=1, lr=0.05, watch=watch)
    assert "changed: keep 3 -> 1" in watch.said


def test_a_checkpoint_with_unknown_settings_of_a_newer_cbam_is_refused(folder):
    # K20
    path = checkpoint.checkpoints(folder)[0]
    state = checkpoint.load(path)
    checkpoint.save(folder, 7, {**state, "config": {**state["config"], "warp": 9}})
    with pytest.raises(CheckpointError, match=r"does not know \(warp\); upgrade cbam"):
        digits(folder, resume="auto")
    with pytest.raises(CheckpointError, match="does not know"):
        score(folder, device="cpu")


def test_override_resumes_with_another_learning_rate_and_more_epochs(folder):
    # R13
    watch, other = Watch(), {"momentum": 0.8, "weight_decay": 0.01}
    history = digits(
        folder,
        resume="auto",
        override=True,
        lr=0.2,
        epochs=4,
        schedule="step",
        step_epochs=9,
        watch=watch,
        **other,
    )
    (group,) = checkpoint.load(checkpoint.checkpoints(folder)[0])["optimizer"]["param_groups"]
    assert {name: group[name] for name in other} == other
    assert watch.done == pytest.approx(1)
    assert [entry["epoch"] for entry in history] == [0, 1, 2, 3]
    assert [entry["lr"] for entry in history][2:] == [0.2, 0.2]
    assert "changed: lr 0.05 -> 0.2" in watch.said
    assert json.loads((folder / CONFIG).read_text())["epochs"] == 4
    again = digits(folder, resume="auto")  # the changed settings are now its own
    assert again[-1]["lr"] == 0.2


def test_a_run_with_every_setting_resumes_bitwise_the_same_and_its_average_is_scored(tmp_path):
    # R1, R27: the average, the two batches of a step, mixing
    settings = {
        "ema": 0.9, "accumulate": 2, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "precision": "bf16",
        "warmup_epochs": 0.5, "attention_lr": 3.0, "decay_matrices_only": True,
    }  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    history = digits(whole, **settings)
    with pytest.raises(StoppedError):
        digits(cut, max_time=1e-3, **settings)
    digits(cut, resume="auto")
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (cut / METRICS).read_text() == (whole / METRICS).read_text()
    scored, _ = score(cut, device="cpu")
    # The run validated in bfloat16. Without the average the loss is 2.5e-4 away.
    assert scored.loss == pytest.approx(history[-1]["val_loss"], rel=1e-4)
    state = checkpoint.load(checkpoint.checkpoints(cut)[0])
    assert state["average"]["updates"] == 6
    assert not torch.equal(state["average"]["tensors"]["fc.weight"], state["model"]["fc.weight"])


def test_a_run_starts_from_pretrained_weights(tmp_path):
    torch.manual_seed(5)
    plain = cbam.build("resnet_tiny", num_classes=10)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    config = Config("digits", pretrained=str(tmp_path / "plain.pth"))
    image = torch.randn(2, 3, 64, 64)
    model = network(config, 10)
    assert torch.equal(model.eval()(image), plain.eval()(image))  # the identity start
    other = network(config, 7)  # a head for other classes is newly initialised
    assert torch.equal(other.conv1.weight, plain.conv1.weight)
    with pytest.raises(CheckpointNotFoundError):
        digits(tmp_path / "run", pretrained=str(tmp_path / "nowhere.pth"))


def test_score_agrees_with_the_last_epoch(finished):
    entry = json.loads((finished / METRICS).read_text().splitlines()[-1])
    for path in (finished, checkpoint.checkpoints(finished)[0]):
        scored, what = score(path, device="cpu")
        assert scored.top1 == entry["val_top1"]
        assert scored.loss == pytest.approx(entry["val_loss"], rel=1e-5)
        assert what == "resnet_tiny+cbam on 20 validation images of cluttered_digits"


def test_a_published_folder_is_scored_with_the_preprocessing_of_its_card(pictures, tmp_path):
    torch.manual_seed(0)
    network = cbam.build("resnet_tiny+cbam", num_classes=2)
    card = cbam.hub.Card(classes=("bright", "dark"), size=32, mean=(0.2, 0.3, 0.4), std=(0.5,) * 3)
    folder = cbam.save_pretrained(network, tmp_path / "garden", network="resnet_tiny+cbam", card=card)
    scored, what = score(folder, data=str(pictures), device="cpu")
    assert what == "garden on 4 validation images of pictures"
    _, val = material.pictures(Config("folder", data=str(pictures), size=32))
    seen = torch.stack([val[i]["image"] for i in range(4)]) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (card.mean, card.std))
    expected = network.eval()((seen - mean) / std).softmax(1).detach()
    assert torch.allclose(scored.probabilities, expected.double(), atol=1e-6)
    with pytest.raises(ConfigError, match="omit --model"):
        score(folder, data=str(pictures), model="resnet_tiny", device="cpu")
    with pytest.raises(ConfigError, match="give DATA"):
        score(folder, device="cpu")
    other = cbam.hub.Card(classes=("dark", "bright"), size=32)
    turned = cbam.save_pretrained(network, tmp_path / "turned", network="resnet_tiny+cbam", card=other)
    with pytest.raises(ConfigError, match=r"has different classes from .*turned"):
        score(turned, data=str(pictures), device="cpu")
    silent = cbam.save_pretrained(network, tmp_path / "silent", network="resnet_tiny+cbam")
    with pytest.raises(ConfigError, match="does not name the classes"):
        score(silent, data=str(pictures), device="cpu")


def test_weights_for_another_number_of_classes_are_refused_with_both_numbers(pictures, tmp_path):
    """K12"""
    torch.save(cbam.build("resnet_tiny", num_classes=7).state_dict(), tmp_path / "seven.pth")
    message = "for 7 classes: give DATA, with a folder of images for each of them; pictures has 2$"
    with pytest.raises(CheckpointError, match=message):
        score(tmp_path / "seven.pth", data=str(pictures), model="resnet_tiny")


def test_weights_without_settings_need_the_name_of_a_network(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(cbam.build("resnet_tiny", num_classes=10).state_dict(), path)
    with pytest.raises(ConfigError, match="give --model NAME"):
        score(path)
    with pytest.raises(CheckpointNotFoundError):
        score(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint in this folder"):
        score(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """An image folder of two classes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("bright", "dark")):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100, (40, 48, 3)) + 150 * (1 - label)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_is_trained_on_moved_and_evaluated(pictures, tmp_path):
    out = tmp_path / "run"
    settings = {"model": "resnet_tiny", "epochs": 1, "batch_size": 4, "device": "cpu", "loggers": ()}
    with pytest.raises(ConfigError, match="needs DATA"):
        run("folder", settings, out, Watch())
    assert not out.exists()
    run("folder", {**settings, "data": str(pictures)}, out, Watch())
    config = Config(**json.loads((out / CONFIG).read_text()))
    assert (config.data, config.size) == (str(pictures), 32)
    moved = pictures.rename(tmp_path / "moved")
    watch = Watch()
    run("folder", {"data": str(moved)}, out, watch, resume="auto")
    assert any(line.startswith("changed: data") for line in watch.said)
    scored, what = score(out, data=str(moved), device="cpu")
    assert (scored.top5, what) == (None, "resnet_tiny on 4 validation images of moved")
    shutil.copytree(moved / "train" / "dark", moved / "train" / "grey")
    shutil.copytree(moved / "val" / "dark", moved / "val" / "grey")
    with pytest.raises(ConfigError, match="different classes from the run"):
        score(out, data=str(moved), device="cpu")


@pytest.mark.parametrize(("data", "out"), [("train", "train/runs/mine"), (".", "val"), ("train", "train")])
def test_a_run_folder_that_would_become_a_class_of_the_images_is_refused(pictures, data, out):
    settings = {"model": "resnet_tiny", "epochs": 1, "batch_size": 4, "device": "cpu", "loggers": ()}
    settings["data"] = str(pictures / data)
    before = sorted(pictures.rglob("*"))
    with pytest.raises(ConfigError, match=r"among the class folders of .*: give another --out"):
        run("folder", settings, pictures / out, Watch())
    assert sorted(pictures.rglob("*")) == before
    for elsewhere in ("runs", f"{data}/.runs"):
        run("folder", settings, pictures / elsewhere, Watch())
        run("folder", {}, pictures / elsewhere, Watch(), resume="auto")


def test_resuming_into_a_folder_that_would_become_a_class_is_refused(pictures, tmp_path):
    settings = {"model": "resnet_tiny", "epochs": 1, "batch_size": 4, "device": "cpu", "loggers": ()}
    run("folder", {**settings, "data": str(pictures)}, tmp_path / "run", Watch())
    before = sorted(pictures.rglob("*"))
    with pytest.raises(ConfigError, match=r"is among the class folders of .*: give another --out"):
        run("folder", {}, pictures / "train" / "more", Watch(), resume=str(tmp_path / "run"))
    assert sorted(pictures.rglob("*")) == before


def test_rotation_tags_are_ignored_with_exif_off(pictures):
    # D6
    config, exif = Config("folder", data=str(pictures), exif=False), Image.Exif()
    before = material.pictures(config)[1][0]["image"]
    path = pictures / "val" / "bright" / "0.png"
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)
    assert torch.equal(material.pictures(config)[1][0]["image"], before)
    turned = material.pictures(dataclasses.replace(config, exif=True))[1][0]["image"]
    assert not torch.equal(turned, before)
    with pytest.raises(ConfigError, match="exif cannot be turned off"):
        dataclasses.replace(recipe("detect/coco"), exif=False)


def test_resuming_with_other_images_is_refused(pictures, tmp_path):
    # R13
    settings = {"model": "resnet_tiny", "epochs": 1, "batch_size": 4, "device": "cpu", "data": str(pictures)}
    run("folder", settings, tmp_path / "run", Watch())
    (pictures / "train" / "dark" / "0.png").unlink()
    with pytest.raises(ConfigError, match="not those of the run: training 12 -> 11"):
        run("folder", {}, tmp_path / "run", Watch(), resume="auto")


def test_a_config_survives_json():
    config = dataclasses.asdict(Config("digits", limit=3))
    assert Config(**json.loads(json.dumps(config))) == Config("digits", limit=3)
