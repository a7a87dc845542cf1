"""`cbam data check`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cbam
from cbam.app import terminal
from cbam.app.cli import main


@pytest.fixture
def pictures(tmp_path):
    for shade, own in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (tmp_path / own).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), 60 * shade, np.uint8)).save(tmp_path / own / "0.jpg")
    return tmp_path


def test_a_sound_folder_ends_with_0_and_says_what_was_looked_at(pictures, capsys):
    assert main(["data", "check", str(pictures)]) == 0
    text = f"{pictures}: class folders of images, no faults"
    assert capsys.readouterr().out == f"{text} (--deep decodes every image)\n"
    assert main(["data", "check", str(pictures), "--deep"]) == 0
    assert capsys.readouterr().out == f"{text}\n"


def test_faults_are_printed_and_end_with_3(pictures, capsys):
    file = pictures / "train/b/0.jpg"
    file.write_bytes(file.read_bytes()[:-2])
    assert main(["data", "check", str(pictures)]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(pictures), "--deep"]) == 3
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file}: a JPEG without its end marker")
    assert last == f"{pictures}: class folders of images, 1 fault, 0 of them repaired on reading"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_progress_is_printed_apart_from_the_report(pictures, capsys, monkeypatch, workers):
    (pictures / "train/b/0.jpg").write_bytes(b"")
    assert main(["data", "check", str(pictures), "--deep"]) == 3
    report = capsys.readouterr()
    assert report.err == ""
    monkeypatch.setattr(terminal.Lines, "every", 0.0)
    assert main(["data", "check", str(pictures), "--deep", "--workers", workers]) == 3
    told = capsys.readouterr()
    assert told.out == report.out
    lines = told.err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("[ 25 %")
    assert lines[0].endswith("] 1 image checked")
    assert lines[3].startswith("[100 %")
    assert lines[3].endswith("] 4 images checked")


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_check_and_its_processes_with_a_line(pictures, number):
    large = pictures / "train/b/large.png"
    Image.fromarray(np.zeros((3000, 3000, 3), np.uint8)).save(large)
    for index in range(2000):  # a minute, for two processes
        (pictures / f"train/b/{index}.png").symlink_to(large)
    command = [sys.executable, "-m", "cbam", "data", "check", str(pictures), "--deep", "--workers", "2"]
    with subprocess.Popen(
        command, cwd=Path(cbam.__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as checking:  # fmt: skip
        children = Path(f"/proc/{checking.pid}/task/{checking.pid}/children")
        deadline = time.monotonic() + 60
        while len(own := children.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        os.killpg(checking.pid, number)
        out, err = checking.communicate(timeout=60)
    assert checking.returncode == 128 + number
    assert (out, err) == ("", "cbam: interrupted\n" if number == signal.SIGINT else "cbam: terminated\n")
    assert not [pid for pid in own if Path(f"/proc/{pid}").exists()]


def test_a_missing_folder_or_action_is_a_one_line_error(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "no")]) == 3
    assert capsys.readouterr().err == f"cbam: {tmp_path}/no: no such folder\n"
    assert main(["data", "chek", str(tmp_path)]) == 2
    assert "chek" in capsys.readouterr().err
