"""An image file -> a uint8 RGB tensor. Every oddity of image files is met here, once.

- The orientation that EXIF states is applied, unless pixels are wanted as they are stored.
- Grey, palette, 1-bit and CMYK images become RGB; transparency is composed on white (BACKGROUND).
- 16-bit values are divided by 257 (65535 / 257 = 255), not clipped. 32-bit integers are taken as 16-bit
  values. Floats state no scale: they are taken as 0..1, 0..255 or 0..65535, the first that holds them all.
- Of an animation the first frame is taken.
- An image above MAX_PIXELS, or of a format that is not in FORMATS, is refused before it is decoded.
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
MAX_BYTES = 1 << 29  # 40 MP of four 16-bit channels, stored plainly, are 320 MB
MAX_TEXT = 1 << 32  # COCO's largest file of annotations is 0.5 GB
BACKGROUND = (255, 255, 255)

_SIGNATURES = re.compile(
    rb"\xff\xd8\xff(?P<JPEG>)|\x89PNG\r\n\x1a\n(?P<PNG>)|RIFF....WEBP(?P<WEBP>)|BM(?P<BMP>)"
    rb"|GIF8[79]a(?P<GIF>)|(II[*+]\x00|MM\x00[*+])(?P<TIFF>)",
    re.DOTALL,
)
_TEXT = re.compile(rb"[!-=?-~]{3,16}")  # the first word, or the opening of a tag

_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112
_TURNS = {  # EXIF orientation -> the name of Pillow's transposition that undoes it
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
    """Height and width in pixels, as stored; whether more frames follow the first."""

    height: int
    width: int
    animated: bool


def decode(source: str | os.PathLike | bytes) -> Tensor:
    """The image in a file, or in the bytes of one -> uint8 (3, H, W) in RGB.

    Raises:
        DataError: no such file, not an image, a format that is not in FORMATS, damaged, cut off, or more
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
    except (OSError, ValueError) as error:  # a ValueError is a zero byte in the name
        raise DataError(f"{shown(source)}: {getattr(error, 'strerror', None) or error}") from error
    return decode_bytes(data, shown(source)).contiguous()


def read(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; what the disk says is an OSError."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NONBLOCK", 0)  # a named pipe would wait for its writer
    with os.fdopen(os.open(path, flags), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise DataError(f"{shown(path)}: not a regular file")
        if state.st_size > limit:
            raise DataError(f"{shown(path)}: {state.st_size} bytes; files like it are read up to {limit}")
        return file.read()


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, a byte order mark left out; what is wrong with it is a DataError."""
    try:
        return read(path, MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: byte {error.start} is no UTF-8 text") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from error


def decode_bytes(data: bytes, where: str, *, exif: bool = True) -> Tensor:
    """The bytes of an image file -> uint8 (3, H, W), a pixel's channels side by side in memory.

    `where` begins the message of a DataError. Without `exif` no turn is applied (but to a TIFF, which Pillow
    turns itself).
    """
    return decode_turned(data, where, exif=exif)[0]


def decode_turned(data: bytes, where: str, *, exif: bool = True) -> tuple[Tensor, int]:
    """As `decode_bytes`, and the turn that the image got, 1 to 8 as EXIF counts; 1 for none."""
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
    except Exception as error:  # damaged bytes surface as whatever the decoder tripped over
        picture = _decode_without_end(data, where, exif)
        if picture is not None:
            return picture
        unknown = isinstance(error, UnidentifiedImageError)  # its text shows an address in memory
        reason = "its header cannot be read" if unknown else str(error) or type(error).__name__
        raise DataError(f"{where}: damaged or unsupported image ({reason})") from error


def header_of(path: str | os.PathLike | io.BytesIO) -> Header | None:
    """What the header says; None where it cannot be read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("reading images", "vision") from error
    try:
        with Image.open(path, formats=FORMATS) as image:
            several = getattr(image, "is_animated", False)
            animated = (
                several and image.format != "MPO"
            )  # a phone's JPEG with a preview or a depth map beside it
            height, width = image.height, image.width
            if image.format == "TIFF":  # Pillow turns its size as EXIF says
                width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]  # pyright: ignore
            return Header(height, width, animated)
    except Exception:  # the reader of the image itself says what is wrong with it
        return None


def orientation(data: bytes) -> int:
    """The turn, 1 to 8 as EXIF counts, that `decode_bytes` gives the image in these bytes; 1 for none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _turn(image)
    except Exception:  # the reader of the image itself says what is wrong with it
        return 1


def not_an_image(head: bytes) -> str | None:
    """What is wrong with a file that starts with `head` (16 bytes suffice), None if it may be an image."""
    if not head:
        return "not an image (empty file)"
    if _SIGNATURES.match(head):
        return None
    text = _TEXT.match(head.lstrip())
    start = repr(text.group().decode()) if text else "bytes " + head[:8].hex(" ")
    return f"not an image (starts with {start}); read are {', '.join(FORMATS)}"


def shown(path: str | os.PathLike | bytes) -> str:
    """A file name as one printable line: line breaks and undecodable bytes are escaped."""
    name = os.fsdecode(path)
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _decode(data: bytes, where: str, exif: bool) -> tuple[Tensor, int]:
    """The image, and how it was turned."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_pixels(image, where)
        done = _turn(image) if image.format == "TIFF" else 1  # Pillow turns it as it loads it
        image.load()
        picture, turn = _to_rgb(image), _turn(image) if exif else 1
        if turn != 1:
            picture = picture.transpose(Image.Transpose[_TURNS[turn]])
        return _to_tensor(picture), done if turn == 1 else turn


def _decode_without_end(data: bytes, where: str, exif: bool) -> tuple[Tensor, int] | None:
    """A JPEG that lacks nothing but the two bytes of its end marker; None for any other.

    Nor for a progressive one, which shows an image, if a coarse one, after any of its scans. Given a
    marker the decoder makes up grey for what is missing. So it is asked twice, once with noise before the
    marker: the images are equal only if neither the grey nor the noise was needed.
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
    """More than 8 bits a value -> uint8 (H, W)."""
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
    """The turn that is left to do, as EXIF counts; Pillow has turned a TIFF that is loaded."""
    try:
        said = image.getexif().get(_ORIENTATION, 1)
        return said if said in _TURNS else 1
    except Exception:  # a damaged EXIF block states no orientation; the image itself may be sound
        return 1


def _to_tensor(picture: "Image.Image") -> Tensor:
    # A view: the crop that follows is faster so, and the image need not be copied.
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
