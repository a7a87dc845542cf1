"""Detectors on the engine of classification (rows D27, D33, D34, R1, R3, R10)."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import cbam
from cbam.data import boxed_folder, loader
from cbam.data.loading import Shard
from cbam.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from cbam.models import build
from cbam.surgery import attached
from cbam.train import Config, Recipe, checkpoint, evaluate_detector, fit, material, run, score
from cbam.train.detection import Detection
from cbam.train.detector import load_initial_weights, make_detector
from cbam.train.keeper import Keeper
from cbam.train.material import network, pictures
from cbam.train.recipes import recipe
from cbam.train.runs import _difference
from cbam.train.task import Part

RECIPE = Recipe(epochs=1, batch_size=4, lr=0.02)


def ended(folder: Path, *scenarios: list) -> list:
    """How each scenario of boxes.py ended."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cbam.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("boxes.py"), str(folder)],
        input="".join(json.dumps(scenario) + "\n" for scenario in scenarios),
        capture_output=True, text=True, env=environment, timeout=60 + 60 * len(scenarios), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


KILLS = [[], ["post_step:3", "eval:1"], ["save:half:2", "bwd:1"]]


@pytest.fixture(scope="module")
def ends(shapes_folder):
    """How a few killed runs ended, and the results of one and of two processes."""
    found = ended(shapes_folder, *(["killed", run] for run in KILLS), ["shared", 1], ["shared", 2])
    return found[: len(KILLS)], found[len(KILLS) :]


def test_a_detector_killed_in_an_epoch_ends_bitwise_the_same(ends):
    # R1, R3, D34
    killed, _ = ends
    assert [end["killed"] for end in killed] == [len(run) for run in KILLS]
    assert len({end["digest"] for end in killed}) == 1


@pytest.mark.large
def test_a_detector_killed_at_every_point_ends_bitwise_the_same(shapes_folder):
    # R1, R2, R3, R22
    points = [
        "data",
        "fwd",
        "bwd",
        "pre_step",
        "post_step",
        "save:open",
        "save:pre_rename",
        "save:post_rename",
    ]
    runs = [[f"{point}:{count}"] for point in points for count in (1, 2, 4)] + [
        ["eval:2"],
        ["rotate:1"],
        ["log:3"],
    ]
    baseline, *killed = ended(shapes_folder, *(["killed", run] for run in ([], *runs)))
    assert [run for run, end in zip(runs, killed, strict=True) if end["killed"] != 1] == []
    assert [run for run, end in zip(runs, killed, strict=True) if end["digest"] != baseline["digest"]] == []


def test_every_image_is_scored_once_by_any_number_of_processes(ends):
    # D33: seven images, shared unevenly
    (alone,), two = ends[1]
    assert alone["value"]["pictures"] == list(range(7))
    for process in two:
        assert process["code"] == 0
        assert process["value"]["pictures"] == list(range(7))
        assert process["value"]["scores"] == pytest.approx(alone["value"]["scores"], abs=1e-9)
        assert process["value"]["boxes"] == pytest.approx(alone["value"]["boxes"], abs=1e-3)
    (first, second) = [process["value"] for process in two]
    assert first["finite"]
    assert (first["weights"], first["history"]) == (second["weights"], second["history"])


def test_workers_do_not_change_the_batches(shapes):
    # D34
    train = shapes[0].augmented("ssd")
    alone, two = (list(loader(train, 4, train=True, seed=3, workers=workers)) for workers in (0, 2))
    assert len(alone) == len(two) == 3
    for one, other in zip(alone, two, strict=True):
        assert torch.equal(one["index"], other["index"])
        assert all(torch.equal(a, b) for a, b in zip(one["image"], other["image"], strict=True))
        for a, b in zip(one["target"], other["target"], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_engine_takes_the_steps_of_a_plain_loop(shapes, detector):
    """The same batches, losses and updates, written out: the weights are equal to the last bit."""
    train, val = shapes
    model, other = detector(), detector()
    how = Recipe(epochs=2, batch_size=4, lr=0.02, schedule="constant", weight_decay=1e-3)
    fit(model, train, val, how, seed=4, device="cpu")
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    other.to(memory_format=torch.channels_last).train()
    batches = loader(train, 4, train=True, seed=4)
    for epoch in range(2):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            targets = [{"boxes": t["boxes"], "labels": t["labels"]} for t in batch["target"]]
            losses = other([image / 255 for image in batch["image"]], targets)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_train_and_accumulate(shapes, detector, precision):
    how = Recipe(epochs=1, batch_size=4, lr=0.02, precision=precision, accumulate=2, ema=0.9)
    (entry,) = fit(detector(), *shapes, how, seed=0, device="cpu")
    assert entry["train_loss"] > 0
    assert {"val_ap", "val_ap50", "val_ap75", "val_ap50_11points"} <= entry.keys()


@pytest.mark.parametrize(("parts", "samples"), [(2, 3), (4, 3), (4, 7)])
def test_the_last_step_has_no_microbatch_of_one_image(shapes, parts, samples):
    """Attention on a one-pixel map needs batch statistics, which one image does not give."""
    counts = []

    def network(images, targets):
        counts.append(len(images))
        return {"loss": torch.zeros((), requires_grad=True)}

    train = shapes[0].subset(8 + samples)
    task = Detection(nn.Identity(), train.classes, "voc")
    for rank in range(parts):
        shard = Shard(rank, parts)
        for step, batch in enumerate(loader(train, 8, train=True, shard=shard, seed=0)):
            of = min(8, 8 + samples - 8 * step)
            part = Part(shard.share(of, 0), of, parts, (0, 0, step, 0, rank))
            task.loss(network, batch, part)
    assert len(counts) == 2 * parts
    assert min(counts) == 2


def test_boxes_that_changed_since_the_run_began_are_reported(shapes):
    # R13
    train, val = shapes
    before = material.about(train, val)
    other = copy.copy(train)
    other._labels = train._labels.clone()
    other._labels[0] = 2
    assert _difference(before, material.about(train, val)) == ""
    difference = _difference(before, material.about(other, val))
    assert difference == "different boxes or labels in the training images"
    old = {name: value for name, value in before.items() if "objects" not in name}
    assert _difference(old, material.about(other, val)) == ""


class Poisoned(nn.Module):
    """A detector whose losses are NaN in training, or whose boxes are in evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images, targets=None):
        out = self.model(images, targets)
        if self.training:
            return {name: value * float("nan") for name, value in out.items()}
        return [own | {"boxes": own["boxes"] * float("nan")} for own in out]


def test_a_nan_loss_stops_before_the_step(shapes, detector):
    # R10
    model = Poisoned(detector())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match="loss is nan in epoch 0, step 0"):
        fit(model, *shapes, RECIPE, seed=0, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_nan_boxes_are_refused(shapes, detector):
    # D27
    with pytest.raises(NonFiniteError, match="not finite"):
        evaluate_detector(Poisoned(detector()), shapes[1], device="cpu")


@pytest.mark.parametrize("left", ["difficult ones", "nothing"])
def test_validation_images_without_objects_are_reported_and_do_not_end_the_run(
    make_shapes, detector, tmp_path, left
):
    # D31
    root, said = make_shapes(tmp_path / "voc", train=4, test=2), []
    for path in (root / "Annotations").glob("b*.xml"):
        text = path.read_text()
        difficult = text.replace("<object>", "<object><difficult>1</difficult>")
        path.write_text(difficult if left == "difficult ones" else re.sub("<object>.*</object>", "", text))
    train, val = pictures(Config("detect/short", augment="flip", data=str(root)))
    assert "no validation image has an object to score, so AP is unknown (-)" in val.notes
    for epochs in (1, 2):
        found = checkpoint.newest(tmp_path, print)
        keeper = Keeper(tmp_path, {}, state=found and found[1], say=said.append)
        how = dataclasses.replace(RECIPE, epochs=epochs)
        fit(detector(), train, val, how, seed=0, device="cpu", keeper=keeper)
    assert len(said) == 3  # the first epoch is scored again when the run resumes
    assert all("AP50 -, AP -" in line for line in said)


SMALL = {
    "model": "fasterrcnn:timm:resnet10t", "size": 64, "regions": 16, "epochs": 2, "batch_size": 4, "limit": 6,
    "save_every": 1, "keep": 9, "device": "cpu", "loggers": (),
}  # fmt: skip


class Watch:
    every = 0.0

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def now(self, what: str) -> None: ...

    def advance(self, share: float) -> None: ...

    def skip(self, share: float) -> None: ...


@pytest.mark.large
def test_a_run_of_the_recipe_is_stopped_resumed_and_scored(shapes_folder, tmp_path):
    # R1, R13
    folder, watch = tmp_path / "run", Watch()
    history = run("detect/short", {**SMALL, "data": str(shapes_folder)}, folder, watch)
    assert any("AP50" in line for line in watch.said)
    found = checkpoint.checkpoints(folder)
    whole = checkpoint.load(found[0])
    for path in found[:-1]:
        path.unlink()
    again = run("detect/short", {}, folder, watch, resume="auto")
    assert [e["val_ap"] for e in again] == [e["val_ap"] for e in history]
    resumed = checkpoint.load(checkpoint.checkpoints(folder)[0])
    assert all(torch.equal(resumed["model"][key], whole["model"][key]) for key in whole["model"])
    scored, what = score(folder)
    assert scored.scores["val_ap50"] == history[-1]["val_ap50"]
    assert "6 validation images of voc test" in what
    with pytest.raises(ConfigError, match="augment 'flip' -> 'ssd'"):
        run("detect/short", {"augment": "ssd"}, folder, watch, resume="auto")


TINY = "fasterrcnn:timm:test_resnet+cbam"


@pytest.fixture
def classifier(tmp_path):
    """The weights file of a classifier with updated running statistics."""
    net = build("timm:test_resnet", num_classes=5)
    with torch.no_grad():
        net.train()(torch.rand(4, 3, 64, 64))
    torch.save(net.state_dict(), tmp_path / "classifier.pt")
    return tmp_path / "classifier.pt"


def norms(model: nn.Module) -> Counter[str]:
    """The number of BatchNorms of each type: trainable or frozen."""
    return Counter(type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__)


def test_pretrained_norms_are_frozen_except_attentions(classifier):
    assert recipe("detect/short").freeze_norm
    config = dataclasses.replace(recipe("detect/coco"), model=TINY, pretrained=str(classifier))
    model = network(config, 2)
    frozen = norms(model)
    assert frozen["FrozenBatchNorm2d"] > 0
    assert frozen["BatchNorm2d"] == len(attached(model))
    assert norms(network(config, 2, loaded=True)) == frozen
    free = norms(network(dataclasses.replace(config, pretrained=None), 2))  # nothing is frozen
    assert free == {"BatchNorm2d": frozen.total()}
    assert norms(network(dataclasses.replace(config, freeze_norm=False), 2)) == free


@pytest.mark.large
def test_a_run_with_frozen_norms_is_resumed_scored_and_viewed(shapes_folder, classifier, tmp_path):
    # R1
    from cbam.app.detecting import _load

    folder = tmp_path / "run"
    settings = SMALL | {"model": TINY, "data": str(shapes_folder), "pretrained": str(classifier)}
    history = run("detect/short", settings, folder, Watch())
    found = checkpoint.checkpoints(folder)
    whole = checkpoint.load(found[0])["model"]
    before = torch.load(classifier)
    kept = [key for key in before if "running_" in key]
    assert kept
    assert all(torch.equal(whole[f"backbone.body.network.{key}"], before[key]) for key in kept)
    assert any(key.endswith("num_batches_tracked") for key in whole)  # attention's
    for path in found[:-1]:
        path.unlink()
    assert run("detect/short", {}, folder, Watch(), resume="auto")[-1]["val_ap"] == history[-1]["val_ap"]
    again = checkpoint.load(checkpoint.checkpoints(folder)[0])["model"]
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    scored, _ = score(folder)
    assert scored.scores["val_ap50"] == history[-1]["val_ap50"]
    _, looked, _ = _load("run", folder, None, None, None, False)
    values = looked.state_dict()
    assert all(torch.equal(values[key], whole[key]) for key in whole)


def test_settings_that_a_detector_lacks_are_refused_together():
    with pytest.raises(ConfigError) as error:
        Config("detect/short", mixup=0.2, compile=True, augment="mosaic")
    assert all(f"{name} " in str(error.value) for name in ("mixup", "compile", "augment"))
    with pytest.raises(ConfigError, match=r"regions is for detectors.*; freeze_norm is for detectors"):
        Config("folder", regions=5, freeze_norm=True)
    with pytest.raises(ConfigError, match="300 pixels"):
        make_detector("ssd300:mobilenet_v1", 2, start="paper", size=200, regions=None)
    with pytest.raises(ConfigError, match="regions is for Faster R-CNN, not "):
        make_detector("ssd300:mobilenet_v1", 2, start="paper", size=None, regions=20)


def test_a_detection_recipe_needs_images_with_boxes(tmp_path):
    with pytest.raises(ConfigError, match="needs DATA, a folder of COCO or Pascal VOC"):
        run("detect/short", {}, tmp_path / "run", Watch())
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="no images with boxes in a known layout"):
        run("detect/short", {"data": str(tmp_path / "pictures")}, tmp_path / "run", Watch())


def test_learning_rates_fall_where_those_of_the_reference_do():
    told = recipe("detect/coco").training()
    rates = [told.lr_factor(epoch * 7330, 7330) for epoch in (1, 15, 16, 21, 22, 25)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    steps = recipe("detect/voc").epochs * -(-16551 // 32)
    assert abs(steps - 120_000) < 518


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fasterrcnn:resnet18+cbam", marks=pytest.mark.large),
        pytest.param("fasterrcnn_c4:resnet18+cbam", marks=pytest.mark.large),
        "stairnet300:mobilenet_v1+se",
        pytest.param("ssd300:vgg16", marks=pytest.mark.large),
    ],
)
def test_classifier_weights_load_into_the_backbone_of_a_detector(name, tmp_path):
    inside = name.partition(":")[2]
    network = build(inside if name.startswith("faster") else inside.partition("+")[0], num_classes=7)
    torch.save(network.state_dict(), tmp_path / "classifier.pt")
    model = make_detector(name, 3, start="identity", size=None, regions=None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_initial_weights(model, name, str(tmp_path / "classifier.pt"))
    state = model.state_dict()
    changed = {key for key in state if key in before and not torch.equal(state[key], before[key])}
    if name.startswith("faster"):
        body, theirs = model.get_submodule("backbone.body").state_dict(), network.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in body.items())
        assert any(".cbam." in key for key in body)
        if "c4" in name:
            last = model.get_submodule("roi_heads.box_head").state_dict()
            assert last
            assert all(torch.equal(value, theirs[key]) for key, value in last.items())
        assert not any(key.endswith(".gain") for key in body)
    assert changed
    assert not any(
        key.startswith(("backbone.fpn", "head", "roi_heads.box_predictor", "rpn", "backbone.smooth"))
        for key in changed
    )
    if name == "ssd300:vgg16":
        convolutions = [key for key in changed if key.endswith("weight")]
        assert len(convolutions) == 13
    torch.save(model.state_dict(), tmp_path / "detector.pt")
    other = make_detector(name, 3, start="identity", size=None, regions=None)
    load_initial_weights(other, name, str(tmp_path / "detector.pt"))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn:timm:test_resnet+cbam",
        pytest.param("fasterrcnn_c4:resnet18+se", marks=pytest.mark.large),
    ],
)
def test_attention_missing_from_the_classifier_keeps_the_requested_start(name, start):
    plain = build(name.partition(":")[2].partition("+")[0], num_classes=7).state_dict()
    model = make_detector(name, 3, start=start, size=None, regions=None)
    before = {key: value.clone() for key, value in model.state_dict().items() if ".cbam." in key}
    assert any(key.endswith(".gain") for key in before) == (start == "identity")
    assert load_initial_weights(model, name, plain)[1]
    after = model.state_dict()
    assert {key for key in after if ".cbam." in key} == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    first = next(iter(plain))
    assert any(torch.equal(value, plain[first]) for key, value in after.items() if key.endswith(f".{first}"))


def test_weights_of_neither_classifier_nor_detector_are_refused(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "odd.pt")
    model = make_detector("ssd300:mobilenet_v1", 3, start="paper", size=None, regions=None)
    with pytest.raises(CheckpointError, match="does not fit the whole detector either"):
        load_initial_weights(model, "ssd300:mobilenet_v1", str(tmp_path / "odd.pt"))


def test_an_error_names_the_weights_file_once_per_problem(tmp_path):
    bad, odd = tmp_path / "bad.pt", tmp_path / "odd.pt"
    bad.write_bytes(b"hello")
    torch.save({"weight": torch.ones(3)}, odd)
    single = make_detector("ssd300:mobilenet_v1", 3, start="paper", size=None, regions=None)
    for model, name, path, parts in (
        (single, "ssd300:mobilenet_v1", bad, 1),
        (single, "ssd300:mobilenet_v1", odd, 2),  # the classifier inside it, and the detector
        (build("resnet_tiny"), "resnet_tiny", bad, 1),
        (build("resnet_tiny"), "resnet_tiny", odd, 1),
    ):
        with pytest.raises(CheckpointError) as error:
            load_initial_weights(model, name, str(path))
        assert str(error.value).count(str(path)) == parts


@pytest.mark.large
def test_a_small_faster_rcnn_with_cbam_finds_shapes(make_shapes, detector, tmp_path):
    """Half a minute of one core; the test images are not those it was trained on."""
    train, val = boxed_folder(make_shapes(tmp_path / "voc", train=320, test=40))
    how = Recipe(epochs=16, batch_size=8, optimizer="adamw", lr=0.006, weight_decay=1e-3, warmup_epochs=1)
    history = fit(detector(16), train.augmented("flip"), val, how, seed=0, device="cpu")
    assert history[-1]["val_ap50"] > 95
    assert history[-1]["val_ap"] > 80
