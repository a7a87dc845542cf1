"""Which images `cbam eval` scores: all of other folders, the held-out part of the run's own."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cbam
from cbam.app import cli
from cbam.app.detecting import detectors
from cbam.app.networks import viewer
from cbam.app.source import source
from cbam.data.decode import decode
from cbam.data.pictures import centre
from cbam.errors import CheckpointError, ConfigError, DataError
from cbam.train import checkpoint, material, run, score, scoring
from cbam.train.average import average_of
from cbam.train.recipes import Config
from cbam.train.watch import Silent

SETTINGS = {"model": "resnet_tiny", "epochs": 1, "batch_size": 8, "device": "cpu", "loggers": ()}


def classes_in(folder: Path, count: int) -> Path:
    """A folder of two classes with `count` images each."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("bright", "dark")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 100, (40, 48, 3)) + 150 * (1 - label)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder that is split for it: 16 images train, 4 validate. Copy before changing."""
    root = tmp_path_factory.mktemp("trained")
    run("folder", {**SETTINGS, "data": str(classes_in(root / "mine", 10))}, root / "run", Silent())
    return root


@pytest.fixture
def own(trained):
    return trained / "run", trained / "mine"


def told(path: Path, **how) -> str:
    return score(path, device="cpu", **how)[1]


def test_all_of_other_images_are_scored_and_the_line_says_so(own, tmp_path, capsys):
    folder, _ = own
    val = classes_in(tmp_path / "val", 5)
    scored, what = score(folder, data=str(val), device="cpu")
    assert what == f"resnet_tiny on all 10 images of {val}"
    assert len(scored.probabilities) == 10
    assert cli.main(["eval", str(folder), "--device", "cpu", str(val)]) == 0
    assert capsys.readouterr().out.startswith(f"resnet_tiny on all 10 images of {val}: top-1 error ")
    assert told(folder, data=str(val), held_out=True).startswith("resnet_tiny on 2 of the 10 images of ")


def test_one_image_per_class_is_enough_for_scoring(own, tmp_path):
    assert "all 2 images" in told(own[0], data=str(classes_in(tmp_path / "val", 1)))


def test_one_image_per_class_is_enough_when_the_runs_images_are_gone(trained, tmp_path):
    shutil.copytree(trained / "mine", tmp_path / "mine")
    run("folder", {**SETTINGS, "data": str(tmp_path / "mine")}, tmp_path / "run", Silent())
    shutil.rmtree(tmp_path / "mine")
    assert "all 2 images" in told(tmp_path / "run", data=str(classes_in(tmp_path / "val", 1)))


def test_only_the_held_out_part_of_the_runs_own_folder_is_scored(own, tmp_path, monkeypatch):
    folder, pictures = own
    line = f"resnet_tiny on 4 of the 20 images of {pictures}, the held-out part"
    monkeypatch.chdir(pictures.parent)
    assert told(folder) == told(folder, data=str(pictures)) == line
    assert told(folder, data="mine") == line.replace(str(pictures), "mine")  # by another path
    link = tmp_path / "link"
    link.symlink_to(pictures)
    assert "on 4 of the 20" in told(folder, data=str(link))
    copy = shutil.copytree(pictures, tmp_path / "copy")  # as on another machine
    assert "on 4 of the 20" in told(folder, data=str(copy))
    (copy / "dark" / "00.png").rename(copy / "dark" / "other.png")
    assert "on all 20" in told(folder, data=str(copy))


def test_only_the_held_out_part_of_a_moved_folder_is_scored(trained, tmp_path):
    shutil.copytree(trained / "mine", tmp_path / "mine")
    run("folder", {**SETTINGS, "data": str(tmp_path / "mine")}, tmp_path / "run", Silent())
    moved = (tmp_path / "mine").rename(tmp_path / "moved")
    assert "on 4 of the 20" in told(tmp_path / "run", data=str(moved))
    other = classes_in(tmp_path / "other", 9)
    assert "on all 18" in told(tmp_path / "run", data=str(other))


def test_a_run_with_a_limit_is_scored_on_all_of_other_images(trained, tmp_path):
    data = str(trained / "mine")
    run("folder", {**SETTINGS, "data": data, "limit": 2}, tmp_path / "run", Silent())
    assert "on 2 of the 20" in told(tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(trained / "mine", other / "train")
    shutil.copytree(trained / "mine", other / "val")
    assert told(tmp_path / "run", data=str(other)) == "resnet_tiny on 20 validation images of other"


def test_a_runs_own_folder_with_an_image_more_or_less_is_refused(trained, tmp_path):
    # The split depends on the order of the names: training images would be scored.
    shutil.copytree(trained / "mine", tmp_path / "mine")
    run("folder", {**SETTINGS, "data": str(tmp_path / "mine")}, tmp_path / "run", Silent())
    first = tmp_path / "mine" / "dark" / "00.png"
    shutil.copy(first, first.with_name("0.png"))
    with pytest.raises(ConfigError, match="which were held out is no longer known"):
        told(tmp_path / "run")
    assert cli.main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 2
    first.with_name("0.png").unlink()
    assert "on 4 of the 20" in told(tmp_path / "run")


def test_a_runs_own_folder_with_an_image_replaced_is_refused(trained, tmp_path):
    # D19: as many images of the same classes, but another fifth is held out
    shutil.copytree(trained / "mine", tmp_path / "mine")
    run("folder", {**SETTINGS, "data": str(tmp_path / "mine")}, tmp_path / "run", Silent())
    for name in ("bright", "dark"):
        (tmp_path / "mine" / name / "00.png").rename(tmp_path / "mine" / name / "99.png")
    with pytest.raises(ConfigError, match="which were held out is no longer known"):
        told(tmp_path / "run")
    with pytest.raises(ConfigError, match="not those of the run: as many, but some with other names"):
        run("folder", {}, tmp_path / "run", Silent(), resume="auto")
    moved = (tmp_path / "mine").rename(tmp_path / "moved")
    assert "on all 20" in told(tmp_path / "run", data=str(moved))
    found = checkpoint.checkpoints(tmp_path / "run")[0]
    state = checkpoint.load(found)
    del state["data"]["names"], state["schema"]  # as from an earlier cbam, which only counted
    checkpoint.save(tmp_path / "run", state["step"], state)
    assert "on 4 of the 20" in told(tmp_path / "run", data=str(moved))
    run("folder", {"data": str(moved)}, tmp_path / "run", Silent(), resume="auto")


def test_a_weights_file_is_scored_on_all_images_unless_held_out_is_given(own, tmp_path):
    torch.save(cbam.build("resnet_tiny", num_classes=2).state_dict(), tmp_path / "w.pth")
    how = {"model": "resnet_tiny", "data": str(own[1])}
    assert told(tmp_path / "w.pth", **how) == f"resnet_tiny on all 20 images of {own[1]}"
    assert "on 4 of the 20" in told(tmp_path / "w.pth", held_out=True, **how)


def test_scoring_a_published_run_reproduces_the_result_on_its_card(own, tmp_path, monkeypatch):
    folder, pictures = own
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(folder), "--to", "hub", "--out", "shared"]) == 0
    scored, what = score(Path("shared"), data=str(pictures), device="cpu")
    assert what.startswith("shared on 4 of the 20 images of ")
    assert cbam.hub.card_of("shared").results["top-1 error, %"] == pytest.approx(scored.top1)
    moved = shutil.copytree(pictures, tmp_path / "moved")
    assert told(Path("shared"), data=str(moved)).startswith("shared on 4 of the 20 images of ")
    assert told(Path("shared"), data=str(classes_in(tmp_path / "others", 5))).startswith("shared on all 10 ")
    with pytest.MonkeyPatch.context() as patch:  # a card written by hand
        card = dataclasses.replace(cbam.hub.card_of("shared"), pictures={"told": 1})
        patch.setattr(scoring.hub, "card_of", lambda _: card)
        assert told(Path("shared"), data=str(tmp_path / "others")).startswith("shared on all 10 ")
    by_chance = classes_in(tmp_path / "elsewhere" / pictures.name, 5)  # the training images or not?
    with pytest.raises(ConfigError, match="which were held out is no longer known"):
        told(Path("shared"), data=str(by_chance))
    with pytest.raises(ConfigError, match="give DATA"):
        score(Path("shared"), device="cpu")
    with pytest.raises(ConfigError, match="records its own network"):
        told(Path("shared"), data=str(pictures), model="resnet18")


def test_a_published_run_trained_with_exif_off_is_scored_with_exif_off(trained, tmp_path):
    pictures = trained / "mine"
    run("folder", {**SETTINGS, "data": str(pictures), "exif": False}, tmp_path / "run", Silent())
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hub", "--out", str(tmp_path / "shared")]) == 0
    assert not cbam.hub.card_of(tmp_path / "shared").exif
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "evaluation_set", lambda data, size, exif: asked.append(exif))
        with pytest.raises(DataError):
            score(tmp_path / "shared", data=str(tmp_path / "nowhere"), device="cpu")
    assert asked == [False]


def test_images_are_resized_as_the_card_of_a_published_network_says(own, tmp_path):
    """The shorter side gets the length that the card states, not that of cbam's own training."""
    torch.manual_seed(0)
    network = cbam.build("resnet_tiny", num_classes=2)
    seen = {}
    for resize in (None, 34, 60):
        card = cbam.hub.Card(classes=("bright", "dark"), size=32, resize=resize)
        folder = cbam.save_pretrained(network, tmp_path / f"{resize}", network="resnet_tiny", card=card)
        seen[resize] = score(folder, data=str(own[1]), device="cpu")[0].probabilities
    path = own[1] / "bright" / "00.png"
    images = torch.stack([centre(decode(path), 32, resized) for resized in (37, 34, 60)]) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (card.mean, card.std))
    expected = network.eval()((images - mean) / std).softmax(1).detach().double()
    for found, wanted in zip(seen.values(), expected, strict=True):
        assert torch.allclose(found[0], wanted, atol=1e-6)
    _, val = material.pictures(Config("folder", data=str(own[1]), size=32))
    assert val.resized == 37


def test_a_renamed_checkpoint_is_used_like_that_of_its_run(own, tmp_path):
    """By its average, on the held-out part, at the size of its training, in every command."""
    # K17
    _, pictures = own
    how = {**SETTINGS, "data": str(pictures), "ema": 0.5, "size": 40}
    run("folder", how, tmp_path / "run", Silent())
    made = checkpoint.checkpoints(tmp_path / "run")[0]
    best = shutil.copy(made, tmp_path / "best.ckpt")
    assert told(best) == told(made)
    losses = [score(p, device="cpu", size=s)[0].loss for p, s in ((made, None), (best, None), (best, 40))]
    assert losses == losses[:1] * 3
    assert score(best, device="cpu", size=64)[0].loss != losses[0]
    average = average_of(checkpoint.load(made))
    weights = material.weights_from(str(best))
    assert all(torch.equal(weights[name], tensor) for name, tensor in average.items())
    assert material.network_name(str(best)) == "resnet_tiny"
    assert source(str(best), None, None).card.classes == ("bright", "dark")
    assert viewer(None, str(best), [], None, None).classes == ["bright", "dark"]
    with pytest.raises(ConfigError, match="holds a classifier"):
        detectors(None, str(best), [], None, None)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_reported_as_damaged_not_as_lacking_a_name(tmp_path, content):
    # K1, K2
    (tmp_path / "w.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.ckpt: (the file is empty|not a weights file|.*cut)"):
        score(tmp_path / "w.ckpt", device="cpu")
    assert cli.main(["eval", str(tmp_path / "w.ckpt"), "--device", "cpu"]) == 4
