"""Batches for one process and for several, and loader workers that die or hang (rows D33, D34, R4, R5)."""

import logging
import os
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbam.data import Images, Shard, loader
from cbam.errors import DataError, InputError


class Numbered(Images):
    """Calls `act` with the index of each sample, in the process that loads it."""

    def __init__(self, n: int, act=lambda index: None) -> None:
        super().__init__("numbered", ["a"], [0] * n, size=1)
        self.act = act

    def sample(self, epoch, index):
        import torch

        self.act(index)
        return torch.zeros(3, 1, 1, dtype=torch.uint8), (float("nan"),) * 4


def indices(batches) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60), size=st.integers(1, 4), world=st.integers(1, 4), accumulate=st.integers(1, 3),
    epoch=st.integers(0, 9),
)  # fmt: skip
def test_a_step_has_the_same_images_for_any_number_of_processes(n, size, world, accumulate, epoch):
    # D33, R12
    def epoch_of(shard: Shard) -> list[list[int]]:
        batches = loader(Numbered(n), size * world * accumulate, train=True, seed=3, shard=shard)
        batches.sampler.set_epoch(epoch)
        assert len(batches) == len(indices(batches))
        return indices(batches)

    whole, full = epoch_of(Shard()), size * world * accumulate
    left_out = n > full and n % full == 1  # a single sample, which BatchNorm cannot train on
    assert sum(map(len, whole)) == n - left_out
    shards = [Shard(rank, world, accumulate) for rank in range(world)]
    parts = [epoch_of(shard) for shard in shards]
    assert {len(part) for part in parts} == {len(whole) * accumulate}
    for step, samples in enumerate(whole):
        counted = []
        for number in range(accumulate):
            for shard, part in zip(shards, parts, strict=True):
                batch = part[step * accumulate + number]
                # every process takes part in every step, with two samples if there are as many
                assert len(batch) == size if len(samples) == full else len(batch) >= min(2, len(samples))
                counted += batch[: shard.share(len(samples), number)]
        assert counted == samples


@given(n=st.integers(1, 40), world=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_evaluation_is_shared_without_repeating_an_image(n, world):  # D33
    shards = [Shard(rank, world) for rank in range(world)]
    batches = [b for s in shards for b in indices(loader(Numbered(n), 3, train=False, shard=s))]
    assert sorted(index for batch in batches for index in batch) == list(range(n))


def test_a_step_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(InputError, match=r"batch_size 6 .* 2 processes of 2 batches each; .* multiple of 4"):
        loader(Numbered(9), 6, train=True, shard=Shard(0, 2, 2))


def kill_once(flag, wanted):
    """Kills its process at that sample, once the batches before it have been taken."""

    def act(index):
        if index == wanted and not flag.exists():
            time.sleep(0.5)
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return act


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("place", [5, 11])
def test_a_killed_worker_is_replaced_once_and_no_image_is_repeated(tmp_path, caplog, train, place):
    """R4"""
    baseline = indices(loader(Numbered(12), 2, train=train, seed=1))
    act = kill_once(tmp_path / "flag", baseline[place // 2][place % 2])
    batches = loader(Numbered(12, act), 2, train=train, seed=1, workers=2)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "cbam"):
        assert indices(batches) == baseline
    assert time.monotonic() - began < 20
    assert "died and is restarted" in caplog.text
    (tmp_path / "flag").unlink()
    assert indices(batches) == baseline  # in another epoch, a worker may die again


def test_a_second_killed_worker_is_an_error(caplog):  # R4
    act = lambda index: os.kill(os.getpid(), signal.SIGKILL) if index == 5 else None  # noqa: E731
    with pytest.raises(DataError, match="for the second time"):
        list(loader(Numbered(12, act), 2, train=False, workers=1))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(24, "Too many open files"), "too many open files: raise the limit"),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </t>: No space"),
            "no space in /dev/shm",
        ),
    ],
)
def test_exhausted_resources_of_workers_are_reported_without_a_restart(error, told, caplog):
    def act(index):
        if index == 5:
            raise error

    with pytest.raises(DataError, match=f"^{told}.* or use fewer --workers$"):
        list(loader(Numbered(12, act), 2, train=False, workers=2))
    assert "restarted" not in caplog.text


def test_no_space_to_start_workers_is_reported(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", full)
    with pytest.raises(DataError, match=r"^no space in /dev/shm"):
        list(loader(Numbered(12), 2, train=False, workers=2))


def test_a_hanging_worker_is_named_with_its_images_and_killed(tmp_path):  # R5
    def act(index):
        if index == 5:
            (tmp_path / "pid").write_text(str(os.getpid()))
            time.sleep(600)

    batches = loader(Numbered(12, act), 2, train=False, workers=2, patience=4.0)
    with pytest.raises(DataError) as caught:
        list(batches)
    pid = (tmp_path / "pid").read_text()
    told = f"process {pid} (loader worker 0) delivered nothing for 4 s; it was reading the images 4, 5"
    assert str(caught.value) == told
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
