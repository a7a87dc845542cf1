"""From disk to batches: image decoding, image folders, COCO, VOC, cluttered digits, and the loader.

Everything random is a function of (seed, epoch, index) only, so neither the number of workers
nor an interruption changes what a run sees.
"""

from cbam.errors import MissingExtraError

try:
    import numpy  # noqa: F401 - optional for torch, required here
except ImportError as error:
    raise MissingExtraError.of("cbam.data", "vision") from error

from cbam.data.annotated import annotated
from cbam.data.boxed_folder import boxed_folder
from cbam.data.boxes import BoxedImages
from cbam.data.check import check
from cbam.data.coco import coco
from cbam.data.decode import decode
from cbam.data.digits import cluttered_digits
from cbam.data.folder import image_folder
from cbam.data.images import Images, digest_of_names
from cbam.data.loading import ALONE, EpochSampler, Shard, loader
from cbam.data.parquet import picture_set
from cbam.data.resident import Resident
from cbam.data.voc import voc

__all__ = [
    "ALONE",
    "BoxedImages",
    "EpochSampler",
    "Images",
    "Resident",
    "Shard",
    "annotated",
    "boxed_folder",
    "check",
    "cluttered_digits",
    "coco",
    "decode",
    "digest_of_names",
    "image_folder",
    "loader",
    "picture_set",
    "voc",
]
