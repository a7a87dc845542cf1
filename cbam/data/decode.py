"""Decode an image file to a uint8 RGB tensor. All oddities of image files are handled here.

- The EXIF orientation is applied, unless the pixels are wanted as stored.
- Grey, palette, 1-bit and CMYK images become RGB; transparency is composed on white (BACKGROUND).
- 16-bit values are divided by 257 (65535 / 257 = 255), not clipped. 32-bit integers are treated as 16-bit
  values. Floats have no defined scale: the first range of 0..1, 0..255, 0..65535 that holds all is assumed.
- Only the first frame of an animation is read.
- An image above MAX_PIXELS, or in a format that is not in FORMATS, is refused before it is decoded.
"""

import io
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cbam.errors import DataError, InputError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 40_000_000
MAX_BYTES = 1 << 29  # 40 MP of four 16-bit channels, uncompressed, are 320 MB
MAX_TEXT = 1 << 32  # COCO's largest annotation file has 0.5 GB
BACKGROUND = (255, 255, 255)

_SIGNATURES = re.compile(
    rb"\xff\xd8\xff(?P<JPEG>)|\x89PNG\r\n\x1a\n(?P<PNG>)|RIFF....WEBP(?P<WEBP>)|BM(?P<BMP>)"
    rb"|GIF8[79]a(?P<GIF>)|(II[*+]\x00|MM\x00[*+])(?P<TIFF>)",
    re.DOTALL,
)
_TEXT = re.compile(rb"[!-=?-~]{3,16}")  # the first word, or the opening of a tag

_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112
_TURNS = {  # EXIF orientation -> name of Pillow's transposition that undoes it
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True)
class Header:
    """Height and width in pixels, as stored, and whether there is more than one frame."""

    height: int
    width: int
    animated: bool


def decode(source: str | os.PathLike | bytes) -> Tensor:
    """Decode an image, given as a path or as the bytes of its file, to RGB: uint8 (3, H, W).

    Raises:
        DataError: no such file, not an image, a format that is not in FORMATS, damaged, truncated, or more
            than MAX_PIXELS. The message starts with the path.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_bytes(bytes(source), "the given bytes").contiguous()
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"decode takes a path or bytes, got {type(source).__name__}")
    try:
        data = read(source)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{shown(source)}: {getattr(error, 'strerror', None) or error}") from error
    return decode_bytes(data, shown(source)).contiguous()


def read(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes; errors of the disk are raised as OSError."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NONBLOCK", 0)  # opening a named pipe would wait for a writer
    with os.fdopen(os.open(path, flags), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise DataError(f"{shown(path)}: not a regular file")
        if state.st_size > limit:
            raise DataError(f"{shown(path)}: {state.st_size} bytes; the limit for such files is {limit}")
        return file.read()


def read_text(path: str | os.PathLike) -> str:
    """Read a UTF-8 file without its byte order mark; any fault is a DataError."""
    try:
        return read(path, MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: byte {error.start} is not UTF-8") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from error


def decode_bytes(data: bytes, where: str, *, exif: bool = True) -> Tensor:
    """Decode the bytes of an image file to uint8 (3, H, W), with the memory layout (H, W, 3).

    The message of a DataError starts with `where`. Without `exif` the orientation is not applied, except to
    a TIFF, which Pillow turns itself.
    """
    return decode_turned(data, where, exif=exif)[0]


def decode_turned(data: bytes, where: str, *, exif: bool = True) -> tuple[Tensor, int]:
    """As `decode_bytes`, with the EXIF orientation that was applied, 1 to 8; 1 for none."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError.of("reading images", "vision") from error
    fault = not_an_image(data)
    if fault:
        raise DataError(f"{where}: {fault}")
    try:
        return _decode(data, where, exif)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{where}: an image of more than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:  # decoders raise errors of many types for damaged bytes
        picture = _decode_without_end(data, where, exif)
        if picture is not None:
            return picture
        unknown = isinstance(error, UnidentifiedImageError)  # its text is a memory address
        reason = "its header cannot be read" if unknown else str(error) or type(error).__name__
        raise DataError(f"{where}: damaged or unsupported image ({reason})") from error


def header_of(path: str | os.PathLike | io.BytesIO) -> Header | None:
    """Read the header; None if it cannot be read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("reading images", "vision") from error
    try:
        with Image.open(path, formats=FORMATS) as image:
            several = getattr(image, "is_animated", False)
            # MPO is a phone's JPEG that also holds a preview or a depth map.
            animated = several and image.format != "MPO"
            height, width = image.height, image.width
            if image.format == "TIFF":  # Pillow swaps its size if EXIF says so
                width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]  # pyright: ignore
            return Header(height, width, animated)
    except Exception:  # decoding the image reports the fault
        return None


def orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8, that `decode_bytes` applies to the image in these bytes; 1 for none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _turn(image)
    except Exception:  # decoding the image reports the fault
        return 1


def not_an_image(head: bytes) -> str | None:
    """Why a file that starts with `head` (16 bytes suffice) is not an image; None if it may be one."""
    if not head:
        return "not an image (empty file)"
    if _SIGNATURES.match(head):
        return None
    text = _TEXT.match(head.lstrip())
    start = repr(text.group().decode()) if text else "bytes " + head[:8].hex(" ")
    return f"not an image (starts with {start}); supported: {', '.join(FORMATS)}"


def shown(path: str | os.PathLike | bytes) -> str:
    """A file name as one printable line, with line breaks and undecodable bytes escaped."""
    name = os.fsdecode(path)
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _decode(data: bytes, where: str, exif: bool) -> tuple[Tensor, int]:
    """The image, and the EXIF orientation that was applied."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_pixels(image, where)
        done = _turn(image) if image.format == "TIFF" else 1  # Pillow applies it when loading
        image.load()
        picture, turn = _to_rgb(image), _turn(image) if exif else 1
        if turn != 1:
            picture = picture.transpose(Image.Transpose[_TURNS[turn]])
        return _to_tensor(picture), done if turn == 1 else turn


def _decode_without_end(data: bytes, where: str, exif: bool) -> tuple[Tensor, int] | None:
    """Decode a JPEG that lacks only the two bytes of its end marker; None for any other.

    Also None for a progressive one, which gives a coarse image after any of its scans. If a marker is
    appended, the decoder fills missing data with grey. So the file is decoded twice, once with noise before
    the marker: the images are equal only if neither grey nor noise was used.
    """
    from PIL import Image

    data = data.removesuffix(b"\xff")  # the first byte of the marker
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.info.get("progressive"):
                return None
        ends = (b"\xff\xd9", b"\xa5\x3c\x96" * 99 + b"\xff\xd9")
        first, second = (_decode(data + end, where, exif) for end in ends)
    except Exception:
        return None
    return first if torch.equal(first[0], second[0]) else None


def _check_pixels(image: "Image.Image", where: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{where}: {image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels"
        )


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_deep_grey(image)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, BACKGROUND)
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: "Image.Image") -> np.ndarray:
    """Convert an image with more than 8 bits per value to uint8 (H, W)."""
    values = np.asarray(image).astype(np.float32)  # exact to 2^24
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"values from {low:g} to {high:g}; expected 0 to 65535")
    factor = 1 / 257
    if image.mode == "F":
        factor = 255.0 if high <= 1 else 1.0 if high <= 255 else factor
    grey = np.rint(values * factor).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = BACKGROUND[0]
    return grey


def _turn(image: "Image.Image") -> int:
    """The EXIF orientation still to be applied; Pillow has done so for a loaded TIFF."""
    try:
        tag = image.getexif().get(_ORIENTATION, 1)
        return tag if tag in _TURNS else 1
    except Exception:  # damaged EXIF data; the image itself may be sound
        return 1


def _to_tensor(picture: "Image.Image") -> Tensor:
    # A view saves a copy, and the crop that follows is faster in this layout.
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
