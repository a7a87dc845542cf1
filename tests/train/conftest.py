"""Small tasks that train in seconds: digits, and images with a disc and a square to find."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cbam
from cbam.data import boxed_folder, cluttered_digits

_XML = """<annotation><size><width>{side}</width><height>{side}</height></size>{objects}</annotation>
"""
_BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
_OBJECT = f"<object><name>{{}}</name>{_BOX}</object>"


def write_shapes(root: Path, *, train: int = 12, test: int = 7, side: int = 64) -> Path:
    """A folder like VOC's: one or two shapes of 16 to 28 pixels on noise, none in every fifth image."""
    from torchvision.io import write_png

    random = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    names = {"trainval": [f"a{i}" for i in range(train)], "test": [f"b{i}" for i in range(test)]}
    y, x = np.mgrid[:side, :side]
    for split, own in names.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(own) + "\n")
        for number, name in enumerate(own):
            pixels = random.integers(90, 150, (3, side, side))
            objects = []
            for place in range(0 if number % 5 == 4 else 1 + number % 2):
                size = int(random.integers(16, 29))
                left = int(random.integers(0, side // 2 - size + 1)) + place * side // 2
                top = int(random.integers(0, side - size + 1))
                disc = bool(random.integers(2))
                if disc:
                    middle = (left + size / 2 - 0.5, top + size / 2 - 0.5)
                    inside = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 <= (size / 2) ** 2
                else:
                    inside = (x >= left) & (x < left + size) & (y >= top) & (y < top + size)
                pixels[:, inside] = np.array([[230], [60], [40]]) if random.integers(2) else 245
                kind = "disc" if disc else "square"
                objects.append(_OBJECT.format(kind, left + 1, top + 1, left + size, top + size))
            write_png(torch.from_numpy(pixels.astype(np.uint8)), str(root / "JPEGImages" / f"{name}.png"))
            text = _XML.format(side=side, objects="".join(objects))
            (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


def small_detector(width: int = 8, *, side: int = 64) -> nn.Module:
    """torchvision's Faster R-CNN over a few convolutions with CBAM, for two classes."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    def step(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    torch.manual_seed(0)
    body = nn.Sequential(
        *step(3, width),
        *step(width, 2 * width),
        cbam.CBAM(2 * width),
        nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
    )
    body.out_channels = 2 * width  # type: ignore[assignment]
    return FasterRCNN(
        body,
        rpn_anchor_generator=AnchorGenerator(((16, 22, 28),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=TwoMLPHead(50 * width, 4 * width),
        box_predictor=FastRCNNPredictor(4 * width, 3),
        min_size=side, max_size=side, box_batch_size_per_image=32, rpn_batch_size_per_image=64,
        rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=50,
    )  # fmt: skip


@pytest.fixture(scope="session")
def digits():
    """40 or so training and validation images each, all ten classes."""
    return tuple(images.subset(40) for images in cluttered_digits())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return cbam.build("resnet_tiny", num_classes=10)


@pytest.fixture(scope="session")
def make_shapes():
    """`write_shapes`."""
    return write_shapes


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """Ten training images (those with a shape) and seven to test on, in VOC's form."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "voc")


@pytest.fixture(scope="session")
def shapes(shapes_folder):
    """Its training set, flipped at random, and its test set."""
    train, val = boxed_folder(shapes_folder)
    return train.augmented("flip"), val


@pytest.fixture
def detector():
    """`small_detector`."""
    return small_detector
