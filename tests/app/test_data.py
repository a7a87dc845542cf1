"""`cbam data check`."""

import numpy as np
import pytest
from PIL import Image

from cbam.app.cli import main


@pytest.fixture
def pictures(tmp_path):
    for shade, own in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (tmp_path / own).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), 60 * shade, np.uint8)).save(tmp_path / own / "0.jpg")
    return tmp_path


def test_a_sound_folder_ends_with_0_and_says_what_was_looked_at(pictures, capsys):
    assert main(["data", "check", str(pictures)]) == 0
    text = f"{pictures}: class folders of pictures, no faults"
    assert capsys.readouterr().out == f"{text} (--deep decodes every picture)\n"
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
    assert last == f"{pictures}: class folders of pictures, 1 fault, 0 of them repaired when it is read"


def test_no_folder_and_no_action_are_one_line(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "no")]) == 3
    assert capsys.readouterr().err == f"cbam: {tmp_path}/no: no such folder\n"
    assert main(["data", "chek", str(tmp_path)]) == 2
    assert "chek" in capsys.readouterr().err
