"""Filling studies: a run with a record is not repeated, an unfinished one leaves none, tables follow."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import cbam
from cbam.errors import ConfigError, DataError
from cbam.studies import filling as filling_file
from cbam.studies import training as training_file
from cbam.studies.conduct import conduct, find_images, prepare
from cbam.studies.records import Records
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import tables
from cbam.train.watch import Silent

ROOT = Path(cbam.__file__).parents[1]
TINY = {"epochs": 1, "limit": 20, "batch_size": 16}
CLEAN = {"commit": "c" * 40, "dirty": False, "source": "s" * 64}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """The code under test counts as a clean commit in any state."""
    monkeypatch.setattr(filling_file, "origin", lambda commit: dict(CLEAN))


class Listener(Silent):
    def __init__(self, stop_at: str = "-", error: type[BaseException] = KeyboardInterrupt) -> None:
        self.lines, self.phases, self.done, self.stop_at, self.error = [], [], 0.0, stop_at, error

    def say(self, line):
        self.lines.append(line)

    def now(self, what):
        self.phases.append(what)

    def advance(self, share):
        self.done += share
        if self.phases and self.phases[-1] == self.stop_at:
            raise self.error("stopped")


def study(out, name="order", watch=None, arms=("se", "channel-spatial"), **changes):
    """Two rows of a study whose runs take a fraction of a second."""
    own = TINY | changes
    pictures = find_images("digits", own)
    return prepare(name, pictures, own, out=str(out), device="cpu", watch=watch, arms=list(arms))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A study of two seeds, filled by one call."""
    out, watch = tmp_path_factory.mktemp("results"), Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling_file, "origin", lambda commit: dict(CLEAN))
        assert conduct(study(out, watch=watch), seeds=2) == 0
    return out, watch


def test_every_run_leaves_one_record_with_all_that_repeating_it_needs(filled):
    out, watch = filled
    records = list(Records(out, "order").all().values())
    assert len(records) == 4
    assert watch.done == pytest.approx(1)
    for record in records:
        assert record["status"] == "complete"
        assert record["config"]["seed"] == record["seed"]
        assert record["commit"] == CLEAN["commit"]
        assert record["dirty"] is False
        assert record["versions"]["torch"]
        assert record["device"]["type"] == "cpu"
        assert record["kernels"] == cbam.ops.fused(torch.ones(1, 1, 1, 1))
        assert record["seconds"] > 0
        assert [entry["epoch"] for entry in record["epochs"]] == [0]
        assert {"train_loss", "val_top1", "val_top5", "val_loss", "lr"} <= record["epochs"][0].keys()
    assert len({json.dumps(record["config"]) for record in records}) == 4


def test_the_folder_has_records_a_table_and_a_figure(filled):
    out, _ = filled
    kinds = sorted(path.suffix for path in (out / "order").iterdir())
    assert kinds == [".json"] * 4 + [".md", ".svg"]
    (table,) = tables(STUDIES["order"], Records(out, "order").all().values())
    assert (out / "order" / f"{table.name}.md").read_text().startswith("# The arrangement of the two gates")
    assert "Partial: 0 of 4 rows" in (out / "order" / f"{table.name}.md").read_text()


def test_runs_with_a_record_are_not_repeated(filled):
    out, _ = filled
    before = {path: path.read_bytes() for path in (out / "order").glob("*.json")}
    watch = Listener()
    assert conduct(study(out, watch=watch), seeds=2) == 0
    assert watch.phases == []
    assert {path: path.read_bytes() for path in (out / "order").glob("*.json")} == before


def test_a_row_that_fails_is_left_out_and_the_others_continue(tmp_path, monkeypatch):
    filling, watch = study(tmp_path, watch=Listener()), Listener()
    filling.watch, run = watch, filling.training.run

    def compiled(config, *rest):
        if config["attention"] == "se":
            raise RuntimeError("no kernel image is available\nfor this device")
        return run(config, *rest)

    monkeypatch.setattr(filling.training, "run", compiled)
    assert filling.fill(2) == 2
    assert [record["arm"] for record in Records(tmp_path, "order").all().values()] == ["channel-spatial"] * 2
    (told,) = (line for line in watch.lines if "failed" in line)  # once, not for every seed
    assert (
        told == "order se seed 0: failed, and its row is left out: RuntimeError: no kernel image is available"
    )
    assert list(filling.failed) == ["se"]


def test_the_same_run_gives_the_same_numbers(filled, tmp_path):
    out, _ = filled
    conduct(study(tmp_path), seeds=1)
    again = Records(tmp_path, "order").all()
    assert again
    for name, record in again.items():
        before = json.loads((out / "order" / name).read_text())
        assert [e["val_loss"] for e in record["epochs"]] == [e["val_loss"] for e in before["epochs"]]
        assert record["config"] == before["config"]


def test_rows_of_one_seed_start_from_the_same_weights(filled):
    out, _ = filled
    from cbam.studies.training import fingerprint, plain

    configs = [run.config for run in study(out).runs(1)]
    assert len({fingerprint(plain(config, 10)) for config in configs}) == 1


def test_runs_of_equal_settings_are_reused_by_another_study(filled, tmp_path):
    out, _ = filled
    shutil.copytree(out / "order", tmp_path / "order")
    watch = Listener()
    assert conduct(study(tmp_path, "peers", watch, ("se", "cbam")), seeds=2) == 0
    assert watch.phases == []
    assert sum("reused from order/" in line for line in watch.lines) == 4
    (table,) = tables(STUDIES["peers"], Records(tmp_path, "peers").all().values())
    assert {name: len(runs) for name, runs in table.runs.items()} == {"se": 2, "cbam": 2}


def test_the_plan_counts_reused_runs_and_they_need_no_budget(filled, tmp_path):
    out, _ = filled
    shutil.copytree(out / "order", tmp_path / "order")
    peers = study(tmp_path, "peers", watch := Listener(), ("plain", "se", "cbam"))
    told = "peers on digits: 0 of 9 runs have a record, 4 are reused from other studies; the other 5 take"
    assert peers.plan(3).startswith(told)
    assert (
        study(tmp_path, "peers", arms=["se"])
        .plan(2)
        .endswith("have a record, 2 are reused from other studies")
    )
    assert conduct(peers, seeds=3, budget=0.0) == 5
    assert len(Records(tmp_path, "peers").all()) == 4
    assert watch.phases == []


@pytest.mark.parametrize(
    ("dirty", "told"), [(False, "1 is reused from other studies; the time"), (True, "; the time")]
)
def test_the_plan_of_several_studies_counts_a_shared_run_once_if_code_is_clean(
    tmp_path, monkeypatch, dirty, told
):
    monkeypatch.setattr(filling_file, "origin", lambda commit: CLEAN | {"dirty": dirty})
    first, second = study(tmp_path), study(tmp_path, "channel", arms=["avg", "max"])
    assert "0 of 2 runs have a record; the time for" in first.plan(1)
    assert told in second.plan(1, [first])
    assert ("reused" in second.plan(1, [first])) != dirty


def test_ctrl_c_leaves_only_whole_records(tmp_path):
    # C10, R18
    label = STUDIES["order"].arms["channel-spatial"].label
    with pytest.raises(KeyboardInterrupt):
        conduct(study(tmp_path, watch=Listener(f"order: {label}, seed 0")), seeds=1)
    names = sorted(path.name for path in (tmp_path / "order").iterdir())
    assert [name.split("-s0-")[0] for name in names if name.endswith(".json")] == ["digits-se"]
    assert not [name for name in names if name.startswith(".")]
    assert conduct(study(tmp_path), seeds=1) == 0
    assert len(Records(tmp_path, "order").all()) == 2


def test_a_budget_abandons_a_run_that_does_not_end_in_time(tmp_path):
    watch = Listener()
    long = study(tmp_path, watch=watch, epochs=50, limit=500)
    assert conduct(long, seeds=1, budget=1.0) == 2
    assert not (tmp_path / "order").exists()
    assert len(watch.phases) == 1
    assert any("abandoned at the time limit" in line for line in watch.lines)


def test_a_budget_starts_no_run_that_would_not_end_in_time(tmp_path, filled):
    shutil.copytree(filled[0] / "order", tmp_path / "order")
    for path in (tmp_path / "order").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 3600.0}))
    watch = Listener()
    assert conduct(study(tmp_path, watch=watch), seeds=3, budget=600.0) == 2
    assert watch.phases == []
    assert "no time is left for another run" in watch.lines


class Clock(Listener):
    """Lets the time run out after `pieces` pieces of work."""

    def __init__(self, monkeypatch, pieces: int) -> None:
        super().__init__()
        self._now, self._left = time.monotonic, pieces
        monkeypatch.setattr(time, "monotonic", lambda: self._now() + (1e6 if self._left < 0 else 0))

    def advance(self, share):
        super().advance(share)
        self._left -= 1


@pytest.mark.parametrize(("name", "arm"), [("order", "se"), ("start", "forked-plain")])
def test_a_long_run_is_saved_at_the_time_limit_and_resumes_to_the_same_end(tmp_path, monkeypatch, name, arm):
    whole = study(tmp_path / "whole", name, arms=[arm], epochs=2)
    conduct(whole, seeds=1)
    (wanted,) = Records(tmp_path / "whole", name).all().values()
    for pieces in (0, 1):
        with monkeypatch.context() as patch:
            watch = Clock(patch, pieces)
            parts = study(tmp_path / "parts", name, watch, arms=[arm], epochs=2, small=False)
            assert conduct(parts, seeds=1, budget=1000.0) == 1
    assert list((tmp_path / "parts" / name / ".unfinished").iterdir())
    assert conduct(study(tmp_path / "parts", name, arms=[arm], epochs=2, small=False), seeds=1) == 0
    (found,) = Records(tmp_path / "parts", name).all().values()
    for one, other in (
        ((found, wanted), (found["start"], wanted["start"])) if name == "start" else ((found, wanted),)
    ):
        losses = [[(e["epoch"], e["val_loss"], e["train_loss"]) for e in r["epochs"]] for r in (one, other)]
        assert losses[0] == losses[1]
    assert not (tmp_path / "parts" / name / ".unfinished").exists()


def test_the_trunk_of_a_fork_is_trained_once_although_the_study_is_stopped(tmp_path, monkeypatch):
    passes = []
    fit = training_file.fit

    def counting(*args, on_step, first_epoch, **rest):
        passes.append([first_epoch, 0])

        def counted(images):
            passes[-1][1] += images
            on_step(images)

        return fit(*args, on_step=counted, first_epoch=first_epoch, **rest)

    monkeypatch.setattr(training_file, "fit", counting)
    arms = ["forked-plain", "forked-identity"]
    stopped = Listener(f"start: {STUDIES['start'].arms['forked-identity'].label}, seed 0")
    with pytest.raises(KeyboardInterrupt):
        conduct(study(tmp_path, "start", stopped, arms=arms, small=False), seeds=1)
    assert len(Records(tmp_path, "start").all()) == 1
    (kept,) = (tmp_path / "start" / ".unfinished").glob("fork-*")
    with Records(tmp_path, "start").claimed(kept.name):  # as a process that continues from it holds it
        assert conduct(study(tmp_path, "start", arms=arms[:1], small=False), seeds=1) == 0
    assert kept.exists()
    assert conduct(study(tmp_path, "start", arms=arms, small=False), seeds=1) == 0
    (_, trunk), (_, first), (_, again), (_, second) = passes
    assert [start for start, _ in passes] == [0, 1, 0, 1]
    assert trunk == first == second == 4 * TINY["limit"]
    assert again == TINY["limit"]  # what was kept is from before the last validation
    plain, identity = sorted(Records(tmp_path, "start").all().values(), key=lambda r: r["arm"], reverse=True)
    assert plain["start"]["sha256"] == identity["start"]["sha256"]
    assert plain["seconds"] > plain["start"]["epochs"][0]["seconds"]
    assert not (tmp_path / "start" / ".unfinished").exists()


def test_checkpoints_of_other_code_are_not_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        parts = study(tmp_path, watch=Clock(patch, 2), arms=["se"], epochs=2, small=False)
        assert conduct(parts, seeds=1, budget=1000.0) == 1
    monkeypatch.setattr(filling_file, "origin", lambda commit: CLEAN | {"source": "other"})
    watch = Listener()
    assert conduct(study(tmp_path, watch=watch, arms=["se"], epochs=2, small=False), seeds=1) == 0
    told = "the checkpoints found are of other settings or other code: they are moved aside"
    assert told in watch.lines
    assert not (tmp_path / "order" / ".unfinished").exists()


def test_checkpoints_of_clean_code_survive_a_run_of_changed_code(tmp_path, monkeypatch):
    def stopped(pieces):
        with monkeypatch.context() as patch:
            parts = study(tmp_path, watch=Clock(patch, pieces), arms=["se"], epochs=2, small=False)
            assert conduct(parts, seeds=1, budget=1000.0) == 1

    stopped(2)
    kept = {path.name for path in (tmp_path / "order" / ".unfinished").rglob("*.ckpt")}
    assert kept
    with monkeypatch.context() as patch:
        dirty = {"commit": "c" * 40, "dirty": True, "source": "d" * 64}
        patch.setattr(filling_file, "origin", lambda commit: dict(dirty))
        assert conduct(study(tmp_path, arms=["se"], epochs=2, small=False), seeds=1) == 0
    assert {path.name for path in (tmp_path / "order" / ".unfinished").rglob("*.ckpt")} == kept
    watch = Listener()
    assert conduct(study(tmp_path, watch=watch, arms=["se"], epochs=2, small=False), seeds=1) == 0
    assert not any("moved aside" in line for line in watch.lines)
    assert not (tmp_path / "order" / ".unfinished").exists()


def test_a_run_that_diverges_has_a_record_that_does_not_count(tmp_path):
    # R1
    assert conduct(study(tmp_path, arms=["se"], lr=1e30, epochs=2), seeds=1) == 0
    (record,) = Records(tmp_path, "order").all().values()
    assert record["status"].startswith("NonFiniteError")
    (table,) = tables(STUDIES["order"], [record])
    assert table.runs == {}
    page = (tmp_path / "order" / f"{table.name}.md").read_text()
    assert "Runs that failed and do not count: se seed 0" in page


def test_runs_of_changed_code_have_their_own_names_and_do_not_count(tmp_path, monkeypatch):
    dirty = {"commit": "c" * 40, "dirty": True, "source": "d" * 64}
    monkeypatch.setattr(filling_file, "origin", lambda commit: dict(dirty))
    assert conduct(study(tmp_path), seeds=1) == 0
    names = list(Records(tmp_path, "order").all())
    assert all(".dirty-dddddddd.json" in name for name in names)
    assert conduct(study(tmp_path), seeds=1) == 0
    monkeypatch.setattr(filling_file, "origin", lambda commit: dict(CLEAN))
    assert len(study(tmp_path).missing(1)) == 2
    (table,) = tables(STUDIES["order"], Records(tmp_path, "order").all().values())
    assert (table.runs, table.changed) == ({}, 2)


def test_forks_continue_from_one_trained_network_per_seed(tmp_path):
    conduct(study(tmp_path, "start", arms=["forked-plain", "forked-identity"]), seeds=1)
    plain, identity = sorted(Records(tmp_path, "start").all().values(), key=lambda r: r["arm"], reverse=True)
    assert plain["arm"] == "forked-plain"
    assert plain["start"] == identity["start"]
    assert [entry["epoch"] for entry in plain["start"]["epochs"]] == [0]
    assert [entry["epoch"] for entry in plain["epochs"]] == [1]
    assert (plain["sites"], identity["sites"]) == (0, 3)
    conduct(study(tmp_path / "b", "start", arms=["forked-identity"]), seeds=1)
    (single,) = Records(tmp_path / "b", "start").all().values()
    assert single["start"]["sha256"] == identity["start"]["sha256"]
    assert single["epochs"][0]["val_loss"] == identity["epochs"][0]["val_loss"]


@pytest.mark.large
def test_two_processes_fill_one_folder_without_repeating_a_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = (
        "study order --arms se channel-spatial --seeds 2 --epochs 1 --limit 20 --batch-size 16 --device cpu"
    )
    command = [sys.executable, "-m", "cbam", *given.split(), "--out", str(tmp_path)]
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert all(process.returncode in (0, 75) for process in both), told
    trained = [
        line for text in told for line in text.splitlines() if "top-1 error" in line and " s" in line[-3:]
    ]
    assert len(trained) == 4, told
    assert len(list((tmp_path / "order").glob("*.json"))) == 4
    assert not list((tmp_path / "order").glob(".*"))


def folder_of_pictures(path, train=8, name="{}.png"):
    """Two classes of random images: `train` of each to train on, half as many to validate."""
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", train // 2)):
        for label in range(2):
            for i in range(count):
                file = path / split / str(label) / name.format(i)
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(0, 256, (32, 32, 3), generator=random, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(file)
    return path


def on_pictures(path, out, name="order", arms=("se",), **changes):
    """A study of one epoch on an image folder."""
    own = {"network": "resnet_tiny", "epochs": 1, "batch_size": 8, "precision": "fp32"} | changes
    pictures = find_images(str(path), own)
    return prepare(name, pictures, own, out=str(out), device="cpu", arms=list(arms))


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A folder of results with a record of a run on a folder named pictures."""
    path = tmp_path_factory.mktemp("flowers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling_file, "origin", lambda commit: dict(CLEAN))
        filling = on_pictures(folder_of_pictures(path / "pictures"), path / "out", "channel", ["avg"])
        assert conduct(filling, seeds=1) == 0
    return path / "out"


@pytest.mark.parametrize("other", [{"train": 6}, {"name": "cat{}.png"}], ids=["fewer", "as-many"])
def test_records_of_other_images_of_the_same_name_are_refused_and_never_reused(tmp_path, flowers, other):
    shutil.copytree(flowers, tmp_path / "out")
    cats = folder_of_pictures(tmp_path / "pictures", **other)
    with pytest.raises(DataError, match="is of other images of the same name"):
        on_pictures(cats, tmp_path / "out", "channel", ["avg"])
    assert conduct(on_pictures(cats, tmp_path / "out"), seeds=1) == 0
    (record,) = Records(tmp_path / "out", "order").all().values()
    assert record["study"] == "order"
    assert record["data"] != json.loads(next((flowers / "channel").glob("*.json")).read_text())["data"]


def test_a_copy_of_the_images_shares_records_and_a_part_of_them_does_not(tmp_path, flowers):
    shutil.copytree(flowers, tmp_path / "out")
    copy = folder_of_pictures(tmp_path / "pictures")
    assert on_pictures(copy, tmp_path / "out", "channel", ["avg"]).missing(1) == []
    assert len(on_pictures(copy, tmp_path / "out", "channel", ["avg"], limit=8).missing(1)) == 1


def test_a_small_image_folder_stays_on_the_device_and_trains_in_bfloat16(tmp_path):
    pictures = find_images(str(folder_of_pictures(tmp_path / "pictures")), {})
    wanted = prepare(
        "order", pictures, {"network": "resnet_tiny", "epochs": 1, "batch_size": 8},
        out=str(tmp_path / "out"), device="cpu", arms=["se"],
    )  # fmt: skip
    assert (wanted.protocol.resident, wanted.protocol.precision, wanted.protocol.size) == (True, "bf16", 32)
    assert wanted.protocol.warmup_epochs == 2
    conduct(wanted, seeds=1)
    (record,) = Records(tmp_path / "out", "order").all().values()
    assert record["config"]["data"] == "pictures"
    assert str(tmp_path) not in json.dumps(record)
    assert record["epochs"][0]["val_top5"] is None


def test_zero_warm_up_gives_the_protocol_without_one(tmp_path):
    cold = prepare(
        "order", find_images("digits", {}), {"warmup_epochs": 0.0}, out=str(tmp_path), device="cpu"
    )
    usual = prepare("order", find_images("digits", {}), {}, out=str(tmp_path), device="cpu")
    assert cold.protocol == usual.protocol


@pytest.mark.parametrize(
    ("name", "changes", "how", "told"),
    [
        ("chanel", {}, {}, "unknown study 'chanel'; did you mean 'channel'"),
        ("order", {"network": "resnt18"}, {}, "unknown network 'resnt18'; nearest"),
        ("order", {"network": "resnet_tiny+cbam"}, {}, "network must be the plain network, got 'resnet_tiny"),
        ("order", {"network": "vgg11"}, {}, "no place for attention"),
        ("order", {}, {"arms": ["cbam"]}, "study order has no row cbam; its rows: se"),
        ("order", {"lr": float("nan")}, {}, "lr must be a finite number"),
        ("order", {"warmup_epochs": -1.0}, {}, "warmup_epochs must be a finite number"),
        ("order", {"precision": "fp8"}, {}, "precision must be one of fp32, bf16"),
        ("order", {"size": 32}, {}, "size applies to image folders only"),
        ("networks", {"network": "resnet18"}, {}, "has its own networks"),
        ("order", {}, {"device": "gpu"}, "device must be auto, cpu or cuda"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused_before_any_work(tmp_path, name, changes, how, told):
    # C6, C12
    how = {"out": str(tmp_path / "out"), "device": "cpu", **how}
    with pytest.raises(ConfigError, match=told):
        prepare(name, find_images("digits", changes), changes, **how)
    assert not (tmp_path / "out").exists()


def test_the_plan_says_what_is_left_and_how_long_it_takes(filled):
    out, _ = filled
    assert study(out).plan(2) == "order on digits: 4 of 4 runs have a record"
    assert "4 of 6 runs have a record; the other 2 take about 0.0 hours" in study(out).plan(3)


def test_the_plan_of_many_seeds_searches_the_records_once_per_row(filled, monkeypatch):
    out, asked, expected = filled[0], [], filling_file.Filling._expected
    monkeypatch.setattr(filling_file.Filling, "_expected", lambda *a: asked.append(a[1].arm) or expected(*a))
    assert "the other 96 take" in study(out).plan(50)
    assert len(asked) == len(set(asked)) == 2
    assert "not known" in study(out, "placement", arms=["plain"]).plan(1)


def test_the_plan_estimates_from_complete_runs_of_the_same_or_similar_settings(tmp_path, filled):
    shutil.copytree(filled[0] / "order", tmp_path / "order")
    paths = sorted((tmp_path / "order").glob("digits-*.json"))

    def change(path, **changes):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    for path in paths:
        change(path, seconds=3600.0 if "-se-" in path.name else 7200.0)
    assert "the other 2 take about 3.0 hours" in study(tmp_path).plan(3)
    assert "the other 2 take about 6.0 hours" in study(tmp_path, epochs=2).plan(1)
    assert "the other 1 take about 1.5 hours" in study(tmp_path, arms=["spatial-channel"]).plan(1)
    assert "is not known" in study(tmp_path, network="resnet18").plan(1)
    for path in paths:
        change(path, status="NonFiniteError: nan")
    assert "is not known" in study(tmp_path).plan(3)
    for path in paths:
        change(path, status="complete", device={"type": "cuda", "name": "another"})
    assert "is not known" in study(tmp_path).plan(3)
