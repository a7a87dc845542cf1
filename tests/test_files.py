"""Atomic files: complete or absent on the disk at every moment."""

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from cbam.errors import ConfigError, OutputError
from cbam.files import placed


def write(part: Path, **contents: str) -> None:
    for name, content in contents.items():
        (part / name).write_text(content)


def contents_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# K15
def test_contents_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, Path.replace

    def fsync(handle):
        done.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        sync(handle)

    def rename(path, target):
        done.append(f"rename {Path(target).name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    with placed(tmp_path / "a", tmp_path / "b") as part:
        write(part, a="1", b="2")
        assert [path.name for path in tmp_path.iterdir()] == [part.name]
    assert done == ["sync a", "sync b", "rename a", "rename b", f"sync {tmp_path.name}"]
    assert contents_of(tmp_path) == {"a": "1", "b": "2"}


# K14
@pytest.mark.parametrize("survived", [0, 1])
def test_old_and_new_files_are_never_mixed(survived, tmp_path, monkeypatch):
    write(tmp_path, weights="old", graph="old")
    replace, renamed = Path.replace, []

    def fail(path, target):
        if len(renamed) == survived:
            raise KeyboardInterrupt
        renamed.append(target)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with (
        pytest.raises(KeyboardInterrupt),
        placed(tmp_path / "weights", tmp_path / "graph", overwrite=True) as part,
    ):
        write(part, weights="new", graph="new")
    assert "graph" not in contents_of(tmp_path)  # what readers open first


def test_a_failure_leaves_the_old_file(tmp_path):
    write(tmp_path, a="old")

    def half() -> None:
        with placed(tmp_path / "a", overwrite=True) as part:
            write(part, a="new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert contents_of(tmp_path) == {"a": "old"}


# C7, K16
def test_existing_and_impossible_paths_are_refused(tmp_path):
    write(tmp_path, a="old")
    (tmp_path / "folder").mkdir()
    for target in ("a", "folder"):
        with pytest.raises(ConfigError, match=f"{target} exists"), placed(tmp_path / target):
            pytest.fail("work was done")
    with pytest.raises(ConfigError, match="folder exists"), placed(tmp_path / "folder", overwrite=True):
        pytest.fail("work was done")
    for target in ("gone/a", "a/below", "x" * 300):
        with pytest.raises(OutputError, match="cannot be written"), placed(tmp_path / target) as part:
            write(part, **{Path(target).name: "new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


# K13
def test_a_full_disk_is_reported(tmp_path):
    def full() -> None:
        with placed(tmp_path / "a") as part:
            write(part, a="new")
            Path("/dev/full").write_text("x" * 100_000)

    with pytest.raises(OutputError, match="No space left"):
        full()
    assert contents_of(tmp_path) == {}


# K17
@pytest.mark.parametrize("name", ["größe 重み 🐻", "n" * 250])
def test_unusual_names_are_kept(name, tmp_path):
    with placed(tmp_path / name) as part:
        (part / name).write_text("1")
    assert contents_of(tmp_path) == {name: "1"}


@pytest.mark.parametrize(("number", "is_an_error"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_failed_folder_sync_is_an_error_unless_folders_cannot_be_synced(
    tmp_path, monkeypatch, number, is_an_error
):
    sync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    expectation = pytest.raises(OutputError) if is_an_error else contextlib.nullcontext()
    with expectation, placed(tmp_path / "a") as part:
        (part / "a").write_text("text")
    assert (tmp_path / "a").read_text() == "text"
