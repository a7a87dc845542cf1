"""Files that somebody broke: mutations of valid ones, and noise. Nothing crashes, hangs, runs or surprises.

Every file either is read or is refused with an error of ours. A file of each kind that would run code if it
were trusted is among the valid ones.
"""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cbam
from cbam.app.config import read_config
from cbam.data import coco, decode, voc
from cbam.errors import CBAMError
from cbam.hub.card import read_config as read_card
from cbam.train import checkpoint
from cbam.train.recipes import Config

FEW, MANY = 50, 1000
SECONDS = 20  # for one file, on a busy machine
MEGABYTES = 1500  # by which the process may grow over all files of a kind
EXTREME = [
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"99999999999999999999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"1e-999",
]


class Runs:
    """Unpickles as a call that makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def mutations(seeds: list[bytes], count: int, chance: random.Random) -> Iterator[bytes]:
    """`count` files: nine in ten are valid ones with one to four changes, the others noise."""
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        if number % 10 == 9:
            start = bytes(data[: chance.choice((0, 4, 16, 64))])
            yield start + chance.randbytes(chance.randrange(2000))
            continue
        for _ in range(chance.randint(1, 4)):
            chance.choice(CHANGES)(data, chance)
        yield bytes(data)


def _place(data: bytearray, chance: random.Random) -> int:
    """Anywhere; half of the time near the start, where headers are."""
    end = len(data) if chance.random() < 0.5 else min(len(data), 400)
    return chance.randrange(end) if end else 0


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[_place(data, chance) :]


def _drop(data: bytearray, chance: random.Random) -> None:
    at = _place(data, chance)
    del data[at : at + chance.randrange(1, 40)]


def _repeat(data: bytearray, chance: random.Random) -> None:
    at = _place(data, chance)
    data[at:at] = data[at : at + chance.randrange(1, 200)] * chance.choice((1, 2, 50))


def _insert(data: bytearray, chance: random.Random) -> None:
    at = _place(data, chance)
    data[at:at] = chance.randbytes(chance.randrange(1, 20))


def _extreme(data: bytearray, chance: random.Random) -> None:
    """A number, if there is one behind the place, becomes one that nobody expects."""
    at = _place(data, chance)
    digits = [i for i in range(at, min(len(data), at + 200)) if chr(data[i]).isdigit()]
    if digits:
        end = digits[0]
        while end < len(data) and chr(data[end]).isdigit():
            end += 1
        data[digits[0] : end] = chance.choice(EXTREME)


def _large(data: bytearray, chance: random.Random) -> None:
    """A length field becomes a huge one."""
    at = _place(data, chance)
    data[at : at + 4] = struct.pack(
        chance.choice("<>") + "I", chance.choice((0, 0x7FFFFFFF, 0xFFFFFFFF, 65536))
    )


CHANGES: list[Callable[[bytearray, random.Random], None]] = [
    _flip,
    _flip,
    _cut,
    _drop,
    _repeat,
    _insert,
    _extreme,
    _large,
]


# --- valid files ---


def pictures() -> list[bytes]:
    chance = np.random.default_rng(0)
    rgb = Image.fromarray(chance.integers(0, 255, (24, 40, 3), np.uint8))
    deep = Image.fromarray(chance.integers(0, 65535, (16, 16), np.uint16))
    found = []
    for image, kind, options in [
        (rgb, "JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {}),
        (deep, "PNG", {}),
        (rgb.convert("P"), "PNG", {"transparency": 3}),
        (rgb, "WEBP", {"lossless": True}),
        (rgb, "BMP", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (deep, "TIFF", {}),
    ]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def weights(mark: Path) -> list[bytes]:
    from safetensors.torch import save

    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    found = [save(state, metadata={"format": "pt"})]
    for content in (
        state,
        {"state_dict": state, "epoch": 3},
        {"a.weight": Runs(mark), "a.bias": state["a.bias"]},
    ):
        for modern in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=modern)
            found.append(buffer.getvalue())
    return [*found, pickle.dumps(Runs(mark)), b"<!DOCTYPE html><html><head><title>404</title></head></html>"]


def json_files() -> list[bytes]:
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 9], "area": 72.0, "iscrowd": 0}
    mask = {"size": [24, 40], "counts": "0Q2b1"}
    told = {
        "info": {"year": 2026},
        "images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 40}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            box | {"segmentation": [[1, 2, 9, 2, 9, 11]]},
            box | {"id": 2, "iscrowd": 1, "segmentation": mask},
            box | {"id": 3, "segmentation": {"size": [24, 40], "counts": [100, 60, 800]}},
        ],
    }
    card = {
        "library_name": "cbam", "format": 1, "name": "resnet18+cbam", "outputs": 2, "dtype": "float32",
        "sha256": "0" * 64, "parameters": 9, "gmac": 0.5,
        "card": {"classes": ["a", "b"], "size": 32, "mean": [0.5], "std": [0.5], "results": {"error": 3.5}},
    }  # fmt: skip
    last = {"file": "step-00000001.ckpt", "sha256": "0" * 64, "bytes": 9}
    return [json.dumps(one, indent=1).encode() for one in (told, card, last)]


def xml_files() -> list[bytes]:
    whole = """<annotation><folder>VOC2007</folder><filename>a.png</filename>
<size><width>40</width><height>24</height><depth>3</depth></size><segmented>0</segmented>
<object><name>cat</name><difficult>0</difficult><truncated>1</truncated>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>17.5</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>24</ymax></bndbox>
<part><name>head</name></part></object></annotation>"""
    entity = f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]>{whole}'
    return [whole.encode(), f'<?xml version="1.0" encoding="utf-8"?>\n{whole}'.encode(), entity.encode()]


def yaml_files(mark: Path) -> list[bytes]:
    plain = (
        "model: resnet_tiny+cbam\nepochs: 3\nlr: 0.05\ncompile: false\n# "
        + "a comment " * 40
        + "\nloggers: [tensorboard]\n"
    )
    tagged = f"model: !!python/object/apply:os.mkdir ['{mark}']\nepochs: 3\n"
    aliases = "a: &a [x, x]\nb: &b [*a, *a]\nepochs: 3\nlr: {rate: [0.1, {b: *b}]}\n"
    return [plain.encode(), tagged.encode(), aliases.encode()]


# --- readers ---


def readers(kind: str, folder: Path) -> tuple[list[bytes], Callable[[bytes], None]]:
    """The valid files of a kind, and what reads one."""
    mark = folder / "mark"
    file = folder / "file"
    Image.new("RGB", (40, 24)).save(folder / "a.png")

    def read_weights(data: bytes) -> None:
        file.write_bytes(data)
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for read in (lambda: cbam.load_weights(model, file), lambda: checkpoint.load(file)):
            try:
                read()
            except CBAMError:
                after = model.state_dict()
                assert all(torch.equal(before[name], after[name]) for name in before)
            else:
                before = {name: value.clone() for name, value in model.state_dict().items()}

    def read_json(data: bytes) -> None:
        file.write_bytes(data)
        (folder / "last.json").write_bytes(data)
        checkpoint.last(folder)
        for read in (lambda: coco(file, folder), lambda: read_card(file)):
            with contextlib.suppress(CBAMError):
                read()

    def read_xml(data: bytes) -> None:
        (folder / "Annotations/a.xml").write_bytes(data)
        voc(folder, "train")

    def read_yaml(data: bytes) -> None:
        file.write_bytes(data)
        read_config(str(file), Config)

    if kind == "xml":
        for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (folder / name).mkdir(parents=True)
        (folder / "ImageSets/Main/train.txt").write_text("a\n")
        Image.new("RGB", (40, 24)).save(folder / "JPEGImages/a.jpg")
    seeds = {
        "image": pictures,
        "checkpoint": lambda: weights(mark),
        "json": json_files,
        "xml": xml_files,
        "yaml": lambda: yaml_files(mark),
    }
    reads = {
        "image": decode,
        "checkpoint": read_weights,
        "json": read_json,
        "xml": read_xml,
        "yaml": read_yaml,
    }
    return seeds[kind](), reads[kind]


class TooSlowError(Exception):
    """A file took longer than SECONDS."""


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*_) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# K1, K2, K3, K5, D1, D3, D8, D21, D30, D32, C4
@pytest.mark.parametrize(
    "count", [FEW, pytest.param(MANY, marks=pytest.mark.large)], ids=lambda count: f"{count} files"
)
@pytest.mark.parametrize("kind", ["image", "checkpoint", "json", "xml", "yaml"])
@pytest.mark.filterwarnings("ignore")  # Pillow and torch warn of what they read; it may stay a warning here
def test_a_broken_file_is_read_or_refused_by_name(kind, count, tmp_path):
    seeds, read = readers(kind, tmp_path)
    chance = random.Random(f"{kind} {count}")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = read_whole = 0
    for number, data in enumerate(mutations(seeds, count, chance)):
        try:
            with limit(SECONDS):
                read(data)
            read_whole += 1
        except CBAMError as error:
            refused += bool(str(error).strip())
        except BaseException as error:  # whatever it is, which file it was has to be told
            raise RuntimeError(f"{kind} {number}: {type(error).__name__}: {error}; {data[:200]!r}") from error
    assert refused + read_whole == count, "an error without words"
    assert not (tmp_path / "mark").exists()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB"
    if count == MANY and kind in ("image", "xml", "yaml"):
        assert 0 < refused < count, "all alike"


def test_the_files_are_valid_before_they_are_broken(tmp_path):
    read_whole = 0
    for kind in ("image", "xml", "yaml"):
        (tmp_path / kind).mkdir()
        seeds, read = readers(kind, tmp_path / kind)
        for data in seeds:
            with contextlib.suppress(CBAMError):
                read(data)
                read_whole += 1
    # all but the XML with an entity, and the YAML with a tag and that with aliases
    assert read_whole == len(pictures()) + 2 + 1
