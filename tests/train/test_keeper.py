"""A run that is told to stop, or meets a full disk or a loss that is not finite; and how it resumes."""

import csv
import dataclasses
import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from cbam.data import Images
from cbam.errors import CheckpointError, DataError, NonFiniteError, OutputError, StoppedError
from cbam.train import Recipe, checkpoint, fit
from cbam.train.folder import METRICS, epochs
from cbam.train.keeper import NONFINITE, Keeper
from cbam.train.loggers import Loggers, ProgressLine

RECIPE = Recipe(epochs=2, batch_size=4)  # 3 steps per epoch
PARTS = dataclasses.replace(RECIPE, accumulate=2)


class Colours(Images):
    """Images of a single colour, which is the class; records which samples were requested."""

    def __init__(self, n: int) -> None:
        super().__init__("colours", ["r", "g", "b"], [i % 3 for i in range(n)], size=8)
        self.asked: list[tuple[int, int]] = []

    def sample(self, epoch, index):
        self.asked.append((epoch, index))
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        image[self.targets[index]] = 200
        return image, (float("nan"),) * 4


class Watched(nn.Sequential):
    """A small network; `before` is called with the number of every forward pass."""

    def __init__(self, before=lambda passes: None) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip
        self.before, self.passes = before, 0

    def forward(self, input):
        self.passes += 1
        self.before(self.passes)
        return super().forward(input)


def train(folder: Path, model: nn.Module | None = None, images: Images | None = None, recipe=RECIPE, **how):
    found = checkpoint.newest(folder, print)
    how = {"save_every": 2, "log_every": 1, "say": lambda _: None, **how}
    keeper = Keeper(folder, {}, state=found[1] if found else None, **how)
    return fit(
        model or Watched(), images or Colours(12), Colours(6), recipe, seed=0, device="cpu", keeper=keeper
    )


def bits(folder: Path) -> list:
    found = checkpoint.newest(folder, print)
    assert found is not None
    state = found[1]
    momentum = [state["optimizer"]["state"][i]["momentum_buffer"] for i in state["optimizer"]["state"]]
    tensors = [*state["model"].values(), *momentum, state["rng"]["cpu"]]
    return [[t.tolist() for t in tensors], state["schedule"], (folder / METRICS).read_text()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sends(number: int, *, at: int):
    """For `Watched`: send this process the signal in the forward pass `at`."""
    return lambda passes: os.kill(os.getpid(), number) if passes == at else None


@pytest.fixture
def baseline(tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("baseline")
    train(folder)
    return folder


@pytest.fixture
def baseline_parts(tmp_path_factory):
    """The same with each step in two parts."""
    folder = tmp_path_factory.mktemp("baseline_parts")
    train(folder, recipe=PARTS)
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("at", [1, 3, 4], ids=["first step", "epoch end", "validation"])
def test_a_signal_finishes_the_step_saves_and_restores_the_handlers(tmp_path, baseline, number, code, at):
    # R17, R18
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(StoppedError, match=f"stopped by {signal.Signals(number).name}") as caught:
        train(tmp_path, Watched(sends(number, at=at)))
    assert caught.value.exit_code == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    assert found[1]["step"] == min(at, 3)
    train(tmp_path)
    assert bits(tmp_path) == bits(baseline)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_keeps_the_checkpoints(tmp_path, baseline, number):
    # R17, R18
    def twice(passes):
        if passes == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            pytest.fail("the process heard the second signal late")

    with pytest.raises(StoppedError, match="at once") as caught:
        train(tmp_path, Watched(twice))
    assert caught.value.exit_code == 128 + number
    assert files(tmp_path) == ["last.json", METRICS, "step-00000002.ckpt"]
    train(tmp_path)
    assert bits(tmp_path) == bits(baseline)


def test_the_time_limit_stops_with_a_checkpoint_and_ignores_the_wall_clock(tmp_path, baseline, monkeypatch):
    # R19, R20
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    with pytest.raises(StoppedError, match="stopped by the time limit after 1 of 3 steps") as caught:
        train(tmp_path, max_time=1e-3)
    assert caught.value.exit_code == 75
    monkeypatch.undo()
    train(tmp_path, max_time=3600)
    assert bits(tmp_path) == bits(baseline)


def test_a_first_signal_after_the_time_limit_does_not_interrupt_the_save(tmp_path, monkeypatch):
    # R17, R19
    save = checkpoint.save

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(StoppedError, match=r"saved as .*step-00000001\.ckpt"):
        train(tmp_path, max_time=1e-3)
    assert checkpoint.load(tmp_path / "step-00000001.ckpt")["step"] == 1


def test_a_time_limit_reached_in_validation_stops_there(tmp_path, baseline, monkeypatch):
    # R19
    clock = time.monotonic

    def late(passes):
        if passes == 4:
            monkeypatch.setattr(time, "monotonic", lambda: clock() + 7200)

    with pytest.raises(StoppedError, match="stopped by the time limit in the validation of epoch 0"):
        train(tmp_path, Watched(late), max_time=3600)
    monkeypatch.undo()
    train(tmp_path)
    assert bits(tmp_path) == bits(baseline)


def test_a_resumed_run_repeats_and_skips_no_image(tmp_path):
    # R3
    whole, first, second = Colours(12), Colours(12), Colours(12)
    baseline, folder = tmp_path / "baseline", tmp_path / "cut"
    baseline.mkdir()
    folder.mkdir()
    train(baseline, images=whole)
    with pytest.raises(StoppedError):
        train(folder, Watched(sends(signal.SIGTERM, at=2)), first)
    train(folder, images=second)
    assert len(first.asked) == 8
    assert first.asked + second.asked == whole.asked


def test_a_run_in_fp64_resumes_bit_identically(tmp_path):
    # R1
    recipe, whole, cut = dataclasses.replace(RECIPE, precision="fp64"), tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    train(whole, recipe=recipe)
    with pytest.raises(StoppedError):
        train(cut, Watched(sends(signal.SIGTERM, at=2)), recipe=recipe)
    train(cut, recipe=recipe)
    assert bits(cut) == bits(whole)


def test_a_resumed_run_is_the_same_with_workers(tmp_path, baseline):
    # D34
    with pytest.raises(StoppedError):
        train(tmp_path, Watched(sends(signal.SIGINT, at=2)))
    found = checkpoint.newest(tmp_path, print)
    keeper = Keeper(tmp_path, {}, state=found and found[1], save_every=2, log_every=1)
    fit(Watched(), Colours(12), Colours(6), RECIPE, seed=0, device="cpu", keeper=keeper, workers=2)
    assert bits(tmp_path) == bits(baseline)


def test_resuming_a_finished_run_only_validates_again(baseline):
    before = bits(baseline)
    model = Watched()
    history = train(baseline, model)
    assert [entry["epoch"] for entry in history] == [0, 1]
    assert model.passes == 1  # the validation
    assert bits(baseline) == before


def test_a_nonfinite_loss_stops_before_the_step_and_names_the_images(tmp_path):
    # R10
    def poison(passes):
        if passes == 3:
            with torch.no_grad():
                model[5].bias[0] = float("nan")

    model = Watched(poison)
    with pytest.raises(NonFiniteError, match=r"epoch 0, step 2, on the training images \d+, \d+, \d+, \d+;"):
        train(tmp_path, model)
    assert files(tmp_path) == ["last.json", METRICS, NONFINITE, "step-00000002.ckpt"]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2


def nan_at(*passes: int) -> Watched:
    """A network whose output and running statistics become NaN in these forward passes."""

    class Nan(Watched):
        def forward(self, input):
            bad = self.passes + 1 in passes
            return super().forward(input * float("nan") if bad else input)

    return Nan()


def test_a_nonfinite_loss_saves_first_and_the_run_resumes_to_the_same_end(tmp_path, baseline):
    # R10
    said: list[str] = []
    with pytest.raises(NonFiniteError, match="the loss is nan in epoch 0, step 2"):
        train(tmp_path, nan_at(3), save_every=None, say=said.append)
    assert "step-00000002.ckpt" in files(tmp_path)
    pictures = json.loads((tmp_path / NONFINITE).read_text())["pictures"]
    assert len(pictures) == 4
    train(tmp_path)
    assert bits(tmp_path) == bits(baseline)


def test_a_step_with_a_nonfinite_loss_can_be_skipped_without_a_trace(tmp_path):
    # R10
    history = train(tmp_path, nan_at(2), recipe=dataclasses.replace(RECIPE, nonfinite="skip"))
    assert all(entry["train_loss"] < 3 for entry in history)
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in found[1]["model"].values())


def test_a_skipped_step_has_no_loss_and_the_progress_line_says_so(tmp_path):
    # R10
    said: list[str] = []
    loggers = Loggers((), tmp_path, {}, said.append)
    loggers.put("progress", ProgressLine(said.append, 2, every=0.0))
    train(tmp_path, nan_at(2), recipe=dataclasses.replace(RECIPE, nonfinite="skip"), loggers=loggers)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["loss"] is None for line in lines if "loss" in line] == [False, True, *[False] * 4]
    assert [": skipped, " in line for line in said] == [False, True, *[False] * 4]


def test_a_failed_microbatch_loses_no_step_and_counts_no_image_twice(tmp_path, baseline_parts):
    # D15, R10
    class Torn(Colours):
        def sample(self, epoch, index):
            if len(self.asked) == 10:  # in the second part of the third step
                raise DataError("torn")
            return super().sample(epoch, index)

    for name, how in (("torn", {"images": Torn(12)}), ("nan", {"model": nan_at(6)})):
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises((DataError, NonFiniteError), match=r"torn|loss is nan in epoch 0, step 2"):
            train(folder, recipe=PARTS, save_every=None, **how)
        found = checkpoint.newest(folder, print)
        assert found is not None
        assert (found[1]["step"], found[1]["seen"]["sums"][2]) == (2, 8)
        train(folder, recipe=PARTS)
        assert bits(folder) == bits(baseline_parts)


def test_at_most_ten_steps_in_a_row_are_skipped(tmp_path):
    # R10
    recipe = Recipe(epochs=5, batch_size=4, nonfinite="skip")
    with pytest.raises(NonFiniteError, match="the 10 steps before were skipped"):
        train(tmp_path, nan_at(*(n for n in range(2, 40) if n % 4)), recipe=recipe)  # every 4th validates


def test_nonfinite_weights_are_never_saved(tmp_path):
    # K11
    def poison(passes):
        if passes == 5:  # the first after a validation: the step's loss is still finite
            with torch.no_grad():
                model[1].running_mean[0] = float("inf")

    model = Watched(poison)
    with pytest.raises(NonFiniteError, match=r"after step 4 \(1\.running_mean\)"):
        train(tmp_path, model)
    assert files(tmp_path) == ["last.json", METRICS, "step-00000002.ckpt", "step-00000003.ckpt"]


def full_from(step: int, until: int | None = None):
    """For `Watched`: no file may be longer than 2000 bytes from this forward pass on."""

    def limit(passes: int) -> None:
        if passes in (step, until):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if passes == step else hard, hard))

    return limit


@pytest.fixture
def _restore_file_size_limit():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("_restore_file_size_limit")
def test_a_full_disk_keeps_the_old_checkpoints_and_does_not_end_the_run(tmp_path, baseline):
    # K13
    said: list[str] = []
    train(tmp_path, Watched(full_from(3, until=5)), say=said.append)
    assert [line for line in said if "the older ones stay" in line] == [
        f"{tmp_path}: the checkpoint after step 3 cannot be written (File too large); "
        "the older ones stay, training continues"
    ]
    assert bits(tmp_path) == bits(baseline)


@pytest.mark.usefixtures("_restore_file_size_limit")
@pytest.mark.parametrize("until", [8, 99], ids=["disk full until the last step", "disk full to the end"])
def test_a_run_whose_last_weights_are_not_saved_does_not_succeed(tmp_path, baseline, until):
    # K13
    said: list[str] = []
    model = Watched(full_from(6, until=until))  # the passes of the last two steps; the eighth validates
    if until == 8:
        train(tmp_path, model, say=said.append, save_every=None)
        assert bits(tmp_path) == bits(baseline)
        assert [entry["epoch"] for entry in train(tmp_path)] == [0, 1]  # the last one is validated again
        assert epochs(tmp_path) == epochs(baseline)
    else:
        with pytest.raises(OutputError, match="after step 6 cannot be written"):
            train(tmp_path, model, say=said.append, save_every=None)
    assert sum("training continues" in line for line in said) == 1


@pytest.mark.usefixtures("_restore_file_size_limit")
def test_after_a_bad_validation_image_the_weights_are_saved_and_not_their_average(
    tmp_path,
):
    # K13, D1
    class Broken(Colours):
        def sample(self, epoch, index):
            if index == 16:  # in the third batch, which is prefetched while the second is scored
                raise DataError("broken")
            return super().sample(epoch, index)

    recipe = dataclasses.replace(RECIPE, ema=0.9)
    (tmp_path / "baseline").mkdir()
    train(tmp_path / "baseline", recipe=recipe, save_every=None)
    model, keeper = Watched(full_from(3, until=4)), Keeper(tmp_path, {}, say=lambda _: None)
    with pytest.raises(DataError, match="broken"):
        fit(model, Colours(12), Broken(24), recipe, seed=0, device="cpu", keeper=keeper)
    found, baseline = (checkpoint.load(at / "step-00000003.ckpt") for at in (tmp_path, tmp_path / "baseline"))
    for name, value in baseline["model"].items():
        assert torch.equal(found["model"][name], value), name
        assert torch.equal(found["average"]["tensors"][name], baseline["average"]["tensors"][name]), name
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.usefixtures("_restore_file_size_limit")
def test_the_third_failed_save_in_a_row_ends_the_run(tmp_path, baseline):
    # K13
    with pytest.raises(OutputError, match="after step 6 cannot be written") as caught:
        train(tmp_path, Watched(full_from(3)))
    assert caught.value.exit_code == 7
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    assert files(tmp_path) == ["last.json", METRICS, "step-00000002.ckpt"]
    train(tmp_path)
    assert bits(tmp_path) == bits(baseline)


def test_metrics_have_a_line_per_step_and_per_epoch(baseline):
    # R22
    lines = [json.loads(line) for line in (baseline / METRICS).read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines if "loss" in line] == [
        (0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6),
    ]  # fmt: skip
    epochs = [line for line in lines if "val_loss" in line]
    assert [line["epoch"] for line in epochs] == [0, 1]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert epochs[0]["train_loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert lines[0]["lr"] == RECIPE.lr


def test_a_checkpoint_with_other_steps_per_epoch_is_refused(baseline):
    with pytest.raises(CheckpointError, match="has 3 steps per epoch, but this run has 2"):
        train(baseline, images=Colours(8))


def test_an_epoch_with_all_steps_skipped_has_no_training_loss_or_error(tmp_path):
    # R10
    said: list[str] = []
    loggers = Loggers(("csv",), tmp_path, {}, said.append)
    loggers.put("progress", ProgressLine(said.append, 2, every=0.0))
    recipe = dataclasses.replace(RECIPE, nonfinite="skip")
    history = train(tmp_path, nan_at(1, 2, 3), recipe=recipe, loggers=loggers, say=said.append)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert len(epochs(tmp_path)) == 2
    for first, second in (history, [line for line in lines if "train_loss" in line]):
        assert (first["train_loss"], first["train_top1"]) == (None, None)
        assert 0 < second["train_loss"] < 3
    rows = list(csv.DictReader((tmp_path / "epochs.csv").read_text().splitlines()))
    assert [(row["epoch"], row["train_loss"] == "") for row in rows] == [("0", True), ("1", False)]
    assert not any("without" in line for line in said)
    assert sum(line.startswith("epoch 0: skipped, validation loss ") for line in said) == 1


def test_a_run_resumed_in_another_folder_has_the_metrics_of_earlier_epochs(baseline, tmp_path):
    # R22
    state = checkpoint.load(baseline / "step-00000004.ckpt")
    keeper = Keeper(tmp_path, {}, state=state, save_every=2, log_every=1, say=lambda _: None)
    fit(Watched(), Colours(12), Colours(6), RECIPE, seed=0, device="cpu", keeper=keeper)
    assert epochs(tmp_path) == epochs(baseline)
