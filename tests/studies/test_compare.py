"""The whole comparison, at a size that takes seconds."""

import json
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image

import cbam
from cbam.data import cluttered_digits
from cbam.errors import CheckpointError, ConfigError, DataError
from cbam.studies import Settings, compare
from cbam.studies.compare import Silent
from cbam.studies.conduct import find_images, prepare
from cbam.studies.folder import DRAWING, PAGE, PICTURE, REPORT, RESULTS, ReportFolder
from cbam.studies.page import page
from cbam.studies.report import markdown, summary
from cbam.studies.settings import NO_IDENTITY
from cbam.train import evaluate

SMALL = {"epochs": 1, "limit": 20, "batch_size": 16, "device": "cpu"}


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr("cbam.studies.speed.ROUNDS", 2)
    monkeypatch.setattr("cbam.studies.timing.WARM_UP", 1)


class Listener(Silent):
    """Records what a comparison reports; raises `error` at the phase `stop_at`."""

    def __init__(self, stop_at: str = "-", error: type[BaseException] = KeyboardInterrupt) -> None:
        self.lines, self.phases, self.done, self.stop_at, self.error = [], [], 0.0, stop_at, error

    def say(self, line):
        self.lines.append(line)

    def now(self, what):
        self.phases.append(what)
        if what == self.stop_at:
            raise self.error("stopped")

    def advance(self, share):
        self.done += share


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison on the digits: folder, results, listener."""
    path, watch = tmp_path_factory.mktemp("report"), Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cbam.studies.speed.ROUNDS", 2)
        results = compare(Settings(**SMALL, seeds=2), ReportFolder(path), watch=watch)
    return path, results, watch


def test_a_comparison_writes_only_its_report(finished):
    path, results, _ = finished
    assert sorted(file.name for file in path.iterdir()) == sorted((RESULTS, REPORT, PAGE, PICTURE, DRAWING))
    assert json.loads((path / RESULTS).read_text()) == json.loads(json.dumps(results))
    with Image.open(path / PICTURE) as picture:
        assert picture.width > 500


def test_the_report_can_be_recomputed_from_the_results_file(finished):
    path, _, _ = finished
    results = json.loads((path / RESULTS).read_text())
    assert (path / REPORT).read_text() == markdown(results, PICTURE)
    assert (path / PAGE).read_text() == page(results, (path / PICTURE).read_bytes())


def test_every_arm_of_every_seed_is_recorded_with_its_epochs(finished):
    _, results, _ = finished
    assert results["status"] == "complete"
    assert [(run["seed"], run["arm"]) for run in results["runs"]] == [
        (seed, arm) for seed in (0, 1) for arm in ("plain", "se", "cbam")
    ]
    assert [[e["epoch"] for e in start["history"]] for start in results["starts"]] == [[0], [0]]
    for run in results["runs"]:
        assert [entry["epoch"] for entry in run["history"]] == [1]
        assert run["history"][-1]["val_top1"] == run["top1"]
        assert 0 <= run["energy_inside"] <= 100
        assert 0 <= run["top5"] <= run["top1"] <= 100


def test_the_identity_start_is_checked_on_real_images_and_reported(finished):
    _, results, watch = finished
    checks = [run["identity"] for run in results["runs"] if run["arm"] != "plain"]
    assert checks == [{"pictures": 16, "bit_equal": True, "largest_difference": 0.0}] * 4
    assert sum("CBAM attached at 3 places, logits on 16" in line for line in watch.lines) == 2
    assert sum("bit-identical before and after" in line for line in watch.lines) == 4


def test_costs_are_counted_and_timed_side_by_side(finished):
    _, results, _ = finished
    counts = [sum(p.numel() for p in cbam.build(name, num_classes=10).parameters()) for name in
              ("resnet_tiny", "resnet_tiny+se", "resnet_tiny+cbam")]  # fmt: skip
    assert [arm["parameters"] for arm in results["arms"]] == counts
    assert [arm["sites"] for arm in results["arms"]] == [0, 3, 3]
    assert all(len(times["train"]) == len(times["inference"]) == 2 for times in results["timing"].values())
    assert summary(results)["cbam"]["train"]["ratio"] > 0


def test_the_progress_ends_at_one(finished):
    _, _, watch = finished
    assert watch.done == pytest.approx(1)


def test_versions_settings_and_device_are_recorded(finished):
    _, results, _ = finished
    assert results["versions"]["torch"] == metadata.version("torch")
    assert results["config"]["epochs"] == 1
    assert results["recipes"]["start"] == results["recipes"]["arms"]
    assert results["device"]["type"] == "cpu"
    assert results["data"]["mean"] == pytest.approx([results["data"]["mean"][0]] * 3)


def test_the_same_comparison_gives_the_same_numbers(finished, tmp_path):
    _, results, _ = finished
    again = compare(Settings(**SMALL, seeds=1, attention=("se",)), ReportFolder(tmp_path))
    assert {run["arm"] for run in again["runs"]} == {"plain", "se"}
    for run in again["runs"]:
        (before,) = [r for r in results["runs"] if (r["seed"], r["arm"]) == (run["seed"], run["arm"])]
        assert [run[key] for key in ("top1", "loss", "energy_inside")] == [
            before[key] for key in ("top1", "loss", "energy_inside")
        ]


def test_ctrl_c_reports_the_finished_runs(tmp_path):
    # C10, R18
    with pytest.raises(KeyboardInterrupt):
        compare(
            Settings(**SMALL, attention=("cbam",)), ReportFolder(tmp_path), watch=Listener("seed 1: plain")
        )
    results = json.loads((tmp_path / RESULTS).read_text())
    assert results["status"] == "interrupted"
    assert [(run["seed"], run["arm"]) for run in results["runs"]] == [(0, "plain"), (0, "cbam")]
    assert "did not finish" in (tmp_path / PAGE).read_text()
    assert (tmp_path / PICTURE).exists()


def test_an_error_half_way_reports_the_finished_runs(tmp_path):
    # D15, R24
    watch = Listener("seed 0: CBAM", DataError)
    with pytest.raises(DataError, match="stopped"):
        compare(Settings(**SMALL), ReportFolder(tmp_path), watch=watch)
    results = json.loads((tmp_path / RESULTS).read_text())
    assert results["status"] == "DataError: stopped"
    assert [run["arm"] for run in results["runs"]] == ["plain", "se"]
    assert not (tmp_path / PICTURE).exists()
    assert "against plain" in (tmp_path / REPORT).read_text()


def test_a_validation_image_that_cannot_be_read_stops_the_comparison(tmp_path):
    # D1, D3
    data = folder_of_pictures(tmp_path / "data")
    (data / "val" / "class1" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    settings = Settings(data=str(data), model="resnet_tiny", **{**SMALL, "limit": None})
    with pytest.raises(DataError, match=r"1\.png"):
        compare(settings, ReportFolder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_anything_is_finished_leaves_nothing(tmp_path):
    # C10
    with pytest.raises(KeyboardInterrupt):
        compare(Settings(**SMALL), ReportFolder(tmp_path / "out"), watch=Listener("seed 0: plain"))
    assert list(tmp_path.iterdir()) == []


def test_saved_weights_load_into_the_network_they_came_from(tmp_path):
    settings = Settings(**SMALL, seeds=1, attention=("cbam",), from_scratch=True, save_weights=True)
    results = compare(settings, ReportFolder(tmp_path))
    _, val = (images.subset(20) for images in cluttered_digits())
    for run, name in zip(results["runs"], ("resnet_tiny", "resnet_tiny+cbam"), strict=True):
        model = cbam.build(name, num_classes=10)
        cbam.load_weights(model, tmp_path / f"{run['arm']}-seed0.cbam.safetensors")
        assert evaluate(model, val, device="cpu").loss == pytest.approx(run["loss"], rel=1e-5)
    ReportFolder(tmp_path, overwrite=True).write(REPORT, "new")
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]


def test_from_scratch_has_no_common_start_and_no_identity_check(tmp_path):
    results = compare(
        Settings(**SMALL, seeds=1, attention=("cbam",), from_scratch=True), ReportFolder(tmp_path)
    )
    assert results["starts"] == []
    assert list(results["recipes"]) == ["arms"]
    assert [run["history"][0]["epoch"] for run in results["runs"]] == [0, 0]
    assert [run["identity"] for run in results["runs"]] == [None, None]
    assert "trained from scratch" in (tmp_path / REPORT).read_text()


def test_attention_without_an_identity_start_is_compared_from_scratch(tmp_path):
    results = compare(Settings(**SMALL, seeds=1, attention=NO_IDENTITY, from_scratch=True), tmp_path / "out")
    assert results["status"] == "complete"
    assert [arm["name"] for arm in results["arms"]] == ["plain", *NO_IDENTITY]


def folder_of_pictures(root, classes=3):
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label in range(classes):
            for i in range(count):
                path = root / split / f"class{label}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 60, (32, 32, 3)) + 60 * np.eye(3, dtype=int)[label % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def test_pretrained_weights_for_other_classes_start_a_comparison_on_a_folder(tmp_path):
    weights = tmp_path / "plain.pth"
    torch.save(cbam.build("resnet_tiny", num_classes=10).state_dict(), weights)
    watch, out = Listener(), tmp_path / "out"
    settings = Settings(
        data=str(folder_of_pictures(tmp_path / "data")), model="resnet_tiny", attention=("cbam",), seeds=1,
        pretrained=str(weights), **{**SMALL, "limit": None, "batch_size": 9},
    )  # fmt: skip
    results = compare(settings, ReportFolder(out), watch=watch)
    assert any("last layer is left out" in line for line in watch.lines)
    assert results["config"]["lr"] == 0.005
    assert results["starts"] == []
    assert results["data"]["classes"] == ["class0", "class1", "class2"]
    assert all(run["top5"] is None and run["energy_inside"] is None for run in results["runs"])
    assert results["runs"][1]["identity"]["bit_equal"]


def test_mismatched_weights_are_refused_before_any_work(tmp_path):
    # K8
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    watch = Listener()
    with pytest.raises(CheckpointError):
        compare(
            Settings(**SMALL, pretrained=str(tmp_path / "other.pth")),
            ReportFolder(tmp_path / "out"),
            watch=watch,
        )
    assert watch.phases == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_network_is_answered_with_the_nearest_names(tmp_path):
    # C6
    with pytest.raises(ConfigError, match="unknown network 'resnt18'; nearest: resnet18"):
        compare(Settings(**SMALL, model="resnt18"), ReportFolder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_folder_may_be_a_path_and_is_checked_before_any_work(tmp_path):
    # C7
    (tmp_path / "thesis.tex").write_text("old")
    with pytest.raises(ConfigError, match="is not empty"):
        compare(Settings(**SMALL), str(tmp_path))
    compare(Settings(**SMALL, attention=("se",), seeds=1), tmp_path / "out")
    assert (tmp_path / "out" / PAGE).exists()


def test_a_report_among_the_classes_is_refused_before_any_work(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (40 * i, 9, 9)).save(tmp_path / name / f"{i}.png")
    settings = Settings(**SMALL, data=str(tmp_path))
    with pytest.raises(ConfigError, match=r"is among the class folders of .*: give another --out"):
        compare(settings, tmp_path / "report")
    with pytest.raises(ConfigError, match=r"is among the class folders of .*: give another --out"):
        prepare("channel", find_images(str(tmp_path), {}), {}, out=str(tmp_path / "results"))
    assert {path.name for path in tmp_path.iterdir()} == {"ant", "bee"}
