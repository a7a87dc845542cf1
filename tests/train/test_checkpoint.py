"""Checkpoint files: damage is detected, and a valid one is never lost (rows K1 to K22)."""

import errno
import os
import random
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

import cbam
from cbam.errors import CheckpointError, CheckpointNotFoundError
from cbam.train import checkpoint


@pytest.fixture
def saved(tmp_path):
    """A folder with two checkpoints, of the steps 5 and 9."""
    for step in (5, 9):
        checkpoint.save(tmp_path, step, {"model": {"weight": torch.arange(12.0) + step}, "step": step})
    return tmp_path


def newest(folder: Path) -> tuple[dict | None, list[str]]:
    said: list[str] = []
    found = checkpoint.newest(folder, said.append)
    return found and found[1], said


def test_a_saved_state_is_loaded_unchanged(tmp_path):
    state = {
        "model": {"w": torch.randn(3, 2)},
        "rng": torch.get_rng_state(),
        "lr": 0.1,
        "history": [None, "ü"],
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 3, state))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert torch.equal(loaded["rng"], state["rng"])
    assert (loaded["lr"], loaded["history"]) == (0.1, [None, "ü"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.json", "step-00000003.ckpt"]


def test_a_checkpoint_can_be_loaded_as_a_weights_file(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    path = checkpoint.save(tmp_path, 1, {"model": model.state_dict()})
    assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], model.weight)
    cbam.load_weights(other, path)
    assert torch.equal(other.weight, model.weight)


def test_a_checkpoint_truncated_at_any_length_is_skipped(saved):
    # K1
    path = saved / "step-00000009.ckpt"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert checkpoint.damage(path), length
    path.write_bytes(whole[: len(whole) * 61 // 100])
    state, said = newest(saved)
    assert state is not None
    assert state["step"] == 5
    assert said == ["step-00000009.ckpt: 61 % of its recorded size; using step-00000005.ckpt (step 5)"]


def test_each_of_a_thousand_flipped_bits_is_detected(saved):
    # K6
    path, draw = saved / "step-00000009.ckpt", random.Random(0)
    whole = path.read_bytes()
    for _ in range(1000):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert checkpoint.damage(path)
    path.write_bytes(whole)
    assert not checkpoint.damage(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "probably a web page"),
        (b"PK\x03\x04", "% of its recorded"),
        (b"PK\x03\x04" + bytes(100_000), "there is no SHA-256 at its end"),  # as a power cut leaves it
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_reported_and_skipped(saved, content, told):
    # K2
    path = saved / "step-00000009.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        checkpoint.load(path)
    state, (said,) = newest(saved)
    assert state is not None
    assert state["step"] == 5
    assert told in said


def test_a_checkpoint_with_a_read_error_is_skipped(saved, monkeypatch):
    # K1
    read = Path.read_bytes

    def failing(path):
        if path.name == "step-00000009.ckpt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    state, said = newest(saved)
    assert state is not None
    assert state["step"] == 5
    assert said == [
        "step-00000009.ckpt: cannot be read: Input/output error; using step-00000005.ckpt (step 5)"
    ]
    with pytest.raises(CheckpointError, match=r"step-00000009\.ckpt: cannot be read: Input/output error"):
        checkpoint.load(saved / "step-00000009.ckpt")


def test_only_damaged_checkpoints_raise_and_an_empty_folder_returns_none(saved, tmp_path_factory):
    # K1, K19
    for path in saved.glob("*.ckpt"):
        path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        newest(saved)
    assert caught.value.exit_code == 4
    assert newest(tmp_path_factory.mktemp("empty")) == (None, [])
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        checkpoint.load(saved / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        checkpoint.load(saved)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_checkpoint_that_asks_to_run_code_is_refused_and_not_skipped(saved, monkeypatch):
    # K3
    monkeypatch.chdir(saved)
    checkpoint.save(saved, 11, {"model": Evil()})
    with pytest.raises(CheckpointError, match="asks to run"):
        newest(saved)
    assert not Path("executed").exists()


def test_a_checkpoint_of_a_newer_version_asks_for_an_upgrade(saved):
    # K20
    checkpoint.save(saved, 11, {"schema": 2})
    with pytest.raises(CheckpointError, match=r"newer cbam \(format 2, known up to 1\); upgrade"):
        newest(saved)


def test_a_full_disk_leaves_existing_files_unchanged(saved):
    # K13
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(saved, 9, {"model": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_file_is_synced_before_its_rename_and_the_folder_after(tmp_path, monkeypatch):
    # K15
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("fsync"), fsync(f)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    checkpoint.write(tmp_path / "a", b"abc")
    assert calls == ["fsync", "rename", "fsync"]
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_a_long_non_ascii_folder_name_works(tmp_path):
    # K17
    folder = tmp_path / ("Läufe 中 " + "x" * 200)
    folder.mkdir()
    checkpoint.save(folder, 1, {"step": 1})
    state, _ = newest(folder)
    assert state is not None
    assert state["step"] == 1


def test_rotation_keeps_the_newest_and_deletes_none_while_the_newest_is_damaged(saved):
    # K22
    newest_path = checkpoint.save(saved, 12, {"step": 12})
    whole = newest_path.read_bytes()
    newest_path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="of its recorded size"):
        checkpoint.rotate(newest_path, 1)
    assert len(checkpoint.checkpoints(saved)) == 3
    newest_path.write_bytes(whole)
    (saved / "step-x.ckpt").write_text("mine")
    checkpoint.rotate(newest_path, 2)
    assert [path.name for path in checkpoint.checkpoints(saved)] == [
        "step-00000012.ckpt",
        "step-00000009.ckpt",
    ]
    assert (saved / "step-x.ckpt").exists()


def test_a_damaged_checkpoint_of_a_later_step_does_not_stop_rotation(saved):
    # K22: the run resumed from before it
    (saved / "step-00000099.ckpt").write_bytes(b"damaged")
    for step in (13, 14):
        checkpoint.rotate(checkpoint.save(saved, step, {"step": step}), 2)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(saved)] == [99, 14, 13]


def test_a_damaged_record_of_the_last_checkpoint_is_ignored(saved):
    for content in ("", "[]", '{"file": 3}', "{"):
        (saved / "last.json").write_text(content)
        assert checkpoint.last(saved) == {}
        state, said = newest(saved)
        assert state is not None
        assert (state["step"], said) == (9, [])


def test_a_checkpoint_counts_as_saved_although_its_record_could_not_be_written(saved, monkeypatch):
    # K13
    whole = checkpoint.write

    def write(path, *arguments):
        if path.name == checkpoint.LAST:
            raise OSError(28, "No space left on device")
        whole(path, *arguments)

    monkeypatch.setattr(checkpoint, "write", write)
    path = checkpoint.save(saved, 12, {"step": 12})
    assert checkpoint.load(path)["step"] == 12
    assert not (saved / checkpoint.LAST).exists()  # it would name an older one
