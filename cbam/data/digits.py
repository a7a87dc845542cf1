"""Cluttered digits: real handwritten digits at a random position among pieces of others, with their box.

The task of Mnih et al. (2014, arXiv 1406.6247, "cluttered translated MNIST") on the 1,797 digits of
8x8 pixels that scikit-learn includes (UCI, Alpaydin and Kaynak 1998), so that nothing is downloaded.

In every sample the digit is enlarged to a side of 20 to 32 pixels and placed on a black square of 64 x 64.
Ten pieces of 9 x 9 pixels, cut from digits of other classes enlarged in the same way, lie anywhere.
The brighter pixel wins where they overlap.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cbam.data.images import MAX_SEED, Images, check_int, draws
from cbam.errors import MissingExtraError

NAME = "cluttered_digits"
SIDE = 64
SMALLEST, LARGEST = 20, 32
PIECES, PIECE = 10, 9
TRAIN_DIGITS = 1437
COMPOSITIONS = 3
INK = 64  # pixels brighter than this, of 255, belong to the digit

_SIZES = range(SMALLEST, LARGEST + 1)


def cluttered_digits(seed: int = 0) -> tuple[Images, Images]:
    """The training and the validation set: uint8 (3, 64, 64), 10 classes, with boxes.

    The first 1,437 digits are for training, recomposed in every epoch; the last 360 are for validation, in
    three fixed compositions each (1,080 samples). The sets share no digits, clutter included.
    The box is tight around the digit's ink: x0 y0 x1 y1 in pixels, ends exclusive.
    """
    seed = check_int("seed", seed, 0, MAX_SEED)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError.of("the cluttered digits", "train") from error
    digits, labels = load_digits(return_X_y=True)
    pixels = np.asarray(digits, dtype=np.float32).reshape(-1, 8, 8) * (255 / 16)
    labels = np.asarray(labels)
    train = _Digits(pixels[:TRAIN_DIGITS], labels[:TRAIN_DIGITS], seed, fixed=False)
    val = _Digits(pixels[TRAIN_DIGITS:], labels[TRAIN_DIGITS:], seed, fixed=True)
    values = torch.stack([train[i]["image"][0] for i in range(0, len(train), 3)]) / 255
    for images in (train, val):
        images.mean, images.std = (values.mean().item(),) * 3, (values.std().item(),) * 3
    return train, val


class _Digits(Images):
    """One split; `fixed` if its compositions are the same in every epoch."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, base_seed: int, *, fixed: bool) -> None:
        self._repeats = COMPOSITIONS if fixed else 1
        super().__init__(
            NAME,
            [str(digit) for digit in range(10)],
            np.repeat(labels, self._repeats).tolist(),
            size=SIDE,
            has_boxes=True,
        )
        self._pixels, self._fixed, self._base_seed = pixels, fixed, base_seed
        self._others = [np.flatnonzero(labels != label) for label in range(10)]
        self._enlarge = _enlargements()

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        if self._fixed:
            random = draws("fixed composition", self._base_seed, index)
        else:
            random = draws("composition", self._base_seed, self.seed, epoch, index)
        canvas = np.zeros((SIDE, SIDE), dtype=np.float32)
        self._add_clutter(canvas, self.targets[index], random)
        box = self._add_digit(canvas, index // self._repeats, random)
        grey = torch.from_numpy(np.rint(canvas).astype(np.uint8))
        return grey.expand(3, SIDE, SIDE).contiguous(), box

    def _add_digit(self, canvas: np.ndarray, digit: int, random: np.random.Generator) -> tuple[int, ...]:
        """Draw the digit with a random size and position; return the box of its ink."""
        u = random.random(3)
        size = _below(u[0], len(_SIZES))
        side = SMALLEST + int(size)
        y, x = _below(u[1:], SIDE - side + 1).tolist()
        rows = self._enlarge[size, :side]
        enlarged = rows @ self._pixels[digit] @ rows.T
        place = canvas[y : y + side, x : x + side]
        np.maximum(place, enlarged, out=place)
        ink = enlarged > INK
        (top, bottom), (left, right) = _ends(ink.any(1)), _ends(ink.any(0))
        return x + left, y + top, x + right, y + bottom

    def _add_clutter(self, canvas: np.ndarray, label: int, random: np.random.Generator) -> None:
        """Draw pieces of digits of classes other than `label`."""
        u = random.random((6, PIECES))
        others = self._others[label]
        digits = self._pixels[others[_below(u[0], len(others))]]
        sizes = _below(u[1], len(_SIZES))
        starts = _below(u[2:4], sizes + (SMALLEST - PIECE + 1))[..., None] + np.arange(PIECE)
        rows, columns = self._enlarge[sizes[:, None], starts]
        pieces = rows @ digits @ columns.transpose(0, 2, 1)
        places = _below(u[4:6], SIDE - PIECE + 1).T.tolist()
        for piece, (y, x) in zip(pieces, places, strict=True):
            place = canvas[y : y + PIECE, x : x + PIECE]
            np.maximum(place, piece, out=place)


def _below(uniform: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Map uniform numbers in [0, 1) to integers from 0 to bound - 1."""
    return (uniform * bound).astype(np.int64)


def _ends(mask: np.ndarray) -> tuple[int, int]:
    """First true position, and last true position + 1."""
    where = np.flatnonzero(mask)
    return int(where[0]), int(where[-1]) + 1


def _enlargements() -> np.ndarray:
    """(sizes, LARGEST, 8): the first `side` rows R of each enlarge an 8x8 image x bilinearly, R x R'."""
    matrices = np.zeros((len(_SIZES), LARGEST, 8), dtype=np.float32)
    for matrix, side in zip(matrices, _SIZES, strict=True):
        enlarged = F.interpolate(torch.eye(8)[None], size=side, mode="linear", align_corners=False)
        matrix[:side] = enlarged[0].numpy().T
    return matrices
