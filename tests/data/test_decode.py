import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbam.data import decode
from cbam.data.decode import MAX_BYTES, decode_bytes
from cbam.errors import DataError, InputError

CORNERS = np.zeros((4, 6, 3), np.uint8)
CORNERS[0, 0], CORNERS[0, -1], CORNERS[-1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def chw(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def png_of(width, height, body=b""):
    """A PNG with this size in its header and any body."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_return_the_saved_pixels(encoded, pixels, kind, options):
    array = pixels(13, 17)
    image = decode(encoded(array, kind, **options))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert torch.equal(image, chw(array))


def test_a_jpeg_is_close_to_its_original(encoded, pixels):
    array = pixels(40, 56)
    error = decode(encoded(array, "JPEG", quality=95)).int() - chw(array).int()
    assert error.abs().float().mean() < 3


def test_a_path_and_its_bytes_give_the_same(tmp_path, encoded, pixels):
    data = encoded(pixels(8, 9))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert torch.equal(decode(path), decode(data))
    assert torch.equal(decode(str(path)), decode(data))


def test_a_png_named_jpg_is_read_as_a_png(tmp_path, encoded, pixels):  # D10
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(pixels(8, 9)))
    assert decode(path).shape == (3, 8, 9)


@pytest.mark.parametrize("cut", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_refused_and_named(tmp_path, encoded, kind, cut):  # D1
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(DataError, match=r"cut\.\w+: damaged or unsupported image"):
        decode(path)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_marker_is_read_and_not_rewritten(tmp_path, encoded, pixels, missing):  # D2
    data = encoded(pixels(32, 32), "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(data[:-missing])
    assert torch.equal(decode(path), decode(data))
    assert path.read_bytes() == data[:-missing]


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(1, 3000), progressive=st.booleans())
def test_a_truncated_jpeg_is_refused_or_decoded_whole(cut, progressive):  # D1, D2
    """Never half grey, and never a coarse progressive scan."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", progressive=progressive)
    data = buffer.getvalue()
    try:
        image = decode(data[:-cut])
    except DataError:
        assert cut > 2 or progressive
    else:
        assert torch.equal(image, decode(data))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "empty file"),
        (b"\0" * 5000, "starts with bytes 00 00 00 00"),
        (b"<html><body>404</body></html>", "starts with '<html'"),
        (b"\n<!DOCTYPE html>", "starts with '<!DOCTYPE'"),
        (b"once upon a time", "starts with 'once'"),
        (b"%PDF-1.7\n", "starts with '%PDF-1.7'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "starts with '%!PS-Adobe-3.0'"),
        (b"8BPS\0\1", "starts with '8BPS'"),
        (b"icns\0\0\0\x08", "starts with 'icns'"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused_with_its_first_bytes(tmp_path, data, told):  # D3, D10
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        decode(path)
    assert str(error.value).startswith(f"{path}: not an image ({told}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_every_mode_becomes_rgb(encoded, mode):  # D4
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
    image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(data).tolist() == [[[0, 255], [255, 0]]] * 3


def test_a_cmyk_jpeg_is_not_inverted(encoded):  # D4
    red = Image.new("RGB", (16, 16), (250, 5, 5)).convert("CMYK")
    image = decode(encoded(red, "JPEG"))[:, 8, 8].tolist()
    assert image[0] > 200
    assert max(image[1:]) < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composited_on_white(encoded, mode):  # D4
    """Black: opaque, transparent and half transparent."""
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 255, 0, 128
    image = Image.fromarray(rgba, "RGBA") if mode == "RGBA" else Image.fromarray(rgba).convert(mode)
    data = encoded(image, "TIFF" if mode == "PA" else "PNG")
    assert decode(data)[0, 0].tolist() == pytest.approx([0, 255, 127], abs=1)


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_palette_with_a_transparent_colour_is_composited_on_white(encoded, transparency):  # D4
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF") if isinstance(transparency, int) else ("PNG",):
        assert decode(encoded(image, kind, transparency=transparency))[:, 0].T.tolist() == [
            [10, 20, 30],
            [255] * 3,
        ]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("I;16", 7)])
def test_a_png_with_one_transparent_colour_is_composited_on_white(encoded, mode, key):  # D4, D5
    if mode == "I;16":
        image = Image.fromarray(np.array([[7, 257 * 9]], np.uint16))
    else:
        image = Image.fromarray(np.array([[7, 9]], np.uint8)).convert(mode)
    assert decode(encoded(image, transparency=key)).tolist() == [[[255, 9]]] * 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(encoded, kind):  # D5
    ramp = np.linspace(0, 65535, 256 * 16).round().astype(np.uint16).reshape(64, 64)
    image = decode(encoded(ramp, kind)).float()
    assert abs(image.mean().item() - 127.5) < 0.5
    assert (image.min(), image.max()) == (0, 255)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_a_float_tiff_is_scaled_by_the_range_that_holds_it(encoded, top):  # D5
    ramp = np.linspace(0, top, 64 * 64, dtype=np.float32).reshape(64, 64)
    image = decode(encoded(ramp, "TIFF")).float()
    assert abs(image.mean().item() - 127.5) < 0.5
    assert (image.min(), image.max()) == (0, 255)


def test_32_bit_integers_are_read_as_16_bit_values(encoded):  # D5
    values = np.array([[0, 257, 65535]], np.int32)
    assert decode(encoded(values, "TIFF"))[0].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("value", [-1.0, 1e9, float("nan"), float("inf")])
def test_values_of_unknown_range_are_refused(encoded, value):  # D5
    with pytest.raises(DataError, match="expected 0 to 65535"):
        decode(encoded(np.array([[0.0, value]], np.float32), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_the_exif_orientation_is_applied(encoded, kind, orientation):  # D6
    """The stored pixels are turned the other way, so decoding gives the image."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](CORNERS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(np.ascontiguousarray(stored), kind, exif=exif, **options)
    assert torch.equal(decode(data), chw(CORNERS))


def test_a_jpeg_on_its_side_is_turned_upright(encoded):  # D6
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(np.zeros((32, 64, 3), np.uint8), "JPEG", exif=exif)).shape == (3, 64, 32)


def test_exif_false_returns_the_stored_pixels(encoded):  # D6
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(CORNERS, exif=exif)
    assert torch.equal(decode_bytes(data, "it", exif=False), chw(CORNERS))
    assert not torch.equal(decode_bytes(data, "it"), chw(CORNERS))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_invalid_orientation_changes_nothing(encoded, value):  # D6
    exif = Image.Exif()
    exif[0x0112] = value
    assert torch.equal(decode(encoded(CORNERS, exif=exif)), chw(CORNERS))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_ignored(encoded):  # D6
    assert torch.equal(decode(encoded(CORNERS, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")), chw(CORNERS))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_read_as_its_first_frame(encoded, kind):  # D7
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data)[:, 4, 4].tolist() == [200, 0, 0]


@pytest.mark.parametrize("side", [6400, 10_000, 12_000, 20_000, 100_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_than_40_megapixels_are_refused_before_decoding(side):  # D8, D9
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than 40 megapixels"):
            decode(png_of(side, side, zlib.compress(b"\0" * 1000)))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1)])
def test_the_thinnest_images_are_read(encoded, shape):  # D11
    assert decode(encoded(np.full((*shape, 3), 9, np.uint8))).shape == (3, *shape)


def test_a_missing_file_a_folder_and_a_pipe_are_refused_by_name(tmp_path):
    for path, told in ((tmp_path / "none.jpg", "No such file"), (tmp_path, "directory|regular")):
        with pytest.raises(DataError, match=told) as error:
            decode(path)
        assert str(error.value).startswith(str(path))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
        with pytest.raises(DataError) as error:
            decode(tmp_path / "pipe.jpg")
        assert str(error.value) == f"{tmp_path / 'pipe.jpg'}: not a regular file"


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "long.jpg"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(DataError, match=r"long\.jpg: 536870913 bytes; the limit .* is 536870912"):
        decode(path)


def test_a_damaged_header_is_reported_without_a_memory_address():  # D3
    with pytest.raises(DataError, match=r"damaged or unsupported image \(its header cannot be read\)"):
        decode(b"\x89PNG\r\n\x1a\n and no more of it")


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path):  # D16
    path = tmp_path / "a\nb\x1b[31m.jpg"
    path.write_bytes(b"")
    with pytest.raises(DataError) as error:
        decode(path)
    assert r"a\nb\x1b[31m.jpg: not an image" in str(error.value)
    assert str(error.value).isprintable()


def test_an_undecodable_name_is_escaped(tmp_path):  # D16
    path = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(path, "wb"):  # noqa: PTH123 - the name is bytes
        pass
    with pytest.raises(DataError, match=r"\\udcff\.jpg: not an image"):
        decode(os.fsdecode(path))


def test_arguments_other_than_paths_and_bytes_are_refused():
    with pytest.raises(InputError, match="takes a path or bytes, got int"):
        decode(3)


@settings(max_examples=150, deadline=None)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_an_image_or_a_data_error(data):  # D2
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, kind)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(damaged))
    except DataError as error:
        assert str(error).startswith("the given bytes: ")  # noqa: PT017 - either outcome is right
    else:
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
