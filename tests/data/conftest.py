import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def _pixels(height, width, seed=0):
    """A smooth image, which JPEG changes little: uint8 (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, seed * 37 % 256)]
    return np.stack(channels, -1).astype(np.uint8)


@pytest.fixture(scope="session")
def pixels():
    return _pixels


@pytest.fixture(scope="session")
def encoded():
    """encoded(array or Image, format, **save options) -> the bytes of the file."""

    def encode(image, kind="PNG", **options):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def make_folder(tmp_path, encoded):
    """make_folder({"cat": 3, "dog": 4}, inside="train") writes images cat/0.jpg, ...; returns the root."""

    def make(counts, inside="", side=32, ending="jpg"):
        for label, (name, count) in enumerate(counts.items()):
            own = tmp_path / "pictures" / inside / name
            own.mkdir(parents=True)
            for i in range(count):
                data = encoded(_pixels(side, side + 8, seed=100 * len(inside) + 10 * label + i), "JPEG")
                (own / f"{i}.{ending}").write_bytes(data)
        return tmp_path / "pictures"

    return make


@pytest.fixture(scope="session")
def digits():
    from cbam.data import cluttered_digits

    return cluttered_digits()


@pytest.fixture(scope="session")
def imagenette(tmp_path_factory):
    """Real photographs, unpacked; the test is skipped if the archive is missing."""
    import zipfile

    archive = Path(__file__).parents[2] / "../shared/data/imagenette96.zip"
    if not archive.is_file():
        pytest.skip("imagenette96.zip is not next to the repository")
    root = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(archive) as file:
        file.extractall(root, file.namelist()[::10])
    return root
