"""16 bits a channel in colour: PNG by this package's own reader and writer, TIFF by tifffile."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import fastsr
from fastsr.upscaling import DeepPicture, PictureError, png16, read_picture, write_picture
from tests.upscaling.test_files import PROFILE
from tests.upscaling.test_upscale import Nearest, doubled, pixels


def smooth(h: int, w: int, channels: int) -> np.ndarray:
    """Neighbours are alike, so that every filter wins somewhere."""
    steps = np.random.default_rng(0).integers(-300, 300, (h, w, channels))
    return (np.cumsum(np.cumsum(steps, 0), 1) + 30000).astype(np.uint16)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_every_bit_survives(tmp_path, ending, channels):
    picture = DeepPicture(pixels(7, 5, channels, dtype=np.uint16), {"icc_profile": PROFILE})
    write_picture(picture, tmp_path / f"a.{ending}")
    found = read_picture(tmp_path / f"a.{ending}")
    assert isinstance(found, DeepPicture)
    expected = picture.pixels[:, :, [0, 0, 0, 1]] if (channels, ending) == (2, "tif") else picture.pixels
    np.testing.assert_array_equal(found.pixels, expected)
    assert found.info["icc_profile"] == PROFILE
    result = fastsr.upscale(Nearest(), found)
    assert (type(result), result.size, result.info["icc_profile"]) == (DeepPicture, (10, 14), PROFILE)
    colours = slice(None) if channels == 3 else slice(-1)
    np.testing.assert_array_equal(result.pixels[..., colours], doubled(expected)[..., colours])


def filtered_png(x: np.ndarray, kinds: list[int]) -> bytes:
    """A PNG whose rows have these filters in turn, written value by value as the specification puts it."""
    h, w, channels = x.shape
    unit, raw = 2 * channels, x.astype(">u2").tobytes()
    row = w * unit
    body = b""
    for y in range(h):
        kind = kinds[y % len(kinds)]
        body += bytes([kind])
        for i in range(row):
            a = raw[y * row + i - unit] if i >= unit else 0
            b = raw[(y - 1) * row + i] if y else 0
            c = raw[(y - 1) * row + i - unit] if y and i >= unit else 0
            paeth = min((a, b, c), key=lambda value, p=a + b - c: abs(p - value))
            body += bytes([(raw[y * row + i] - (0, a, b, (a + b) // 2, paeth)[kind]) % 256])
    file = io.BytesIO()
    file.write(png16.SIGNATURE)
    png16._put(file, b"IHDR", struct.pack(">IIBBBBB", w, h, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0))
    data = zlib.compress(body)
    for part in (data[:50], data[50:]):
        png16._put(file, b"IDAT", part)
    png16._put(file, b"IEND", b"")
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (11, 6), (6, 11)], ids=str)
@pytest.mark.parametrize("kinds", [[0], [1], [2], [3], [4], [4, 0, 3, 1, 2]], ids=str)
def test_every_filter_is_undone(size, kinds):
    x = smooth(*size, 3)
    data = filtered_png(x, kinds)
    np.testing.assert_array_equal(png16.read(io.BytesIO(data)), x)
    eight = np.asarray(Image.open(io.BytesIO(data)))  # Pillow agrees that this is such a file
    assert np.abs(eight.astype(int) - (x >> 8)).max() <= 1


@pytest.mark.parametrize("size", [(300, 5), (5, 300)], ids=str)
def test_pillow_reads_what_is_written(tmp_path, size):
    x = smooth(*size, 3)
    write_picture(DeepPicture(x), tmp_path / "a.png")
    assert np.abs(np.asarray(Image.open(tmp_path / "a.png")).astype(int) - (x >> 8)).max() <= 1
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png").pixels, x)
    assert (tmp_path / "a.png").stat().st_size < x.nbytes * 0.95, "filters and compression"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_as_pillow_does(tmp_path, orientation):
    small = pixels(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a maker"
    Image.fromarray(small).save(tmp_path / "eight.png", exif=exif.tobytes())
    with (tmp_path / "deep.png").open("wb") as file:
        png16.write(small.astype(np.uint16) * 257, file, exif=exif.tobytes())
    expected, found = read_picture(tmp_path / "eight.png"), read_picture(tmp_path / "deep.png")
    np.testing.assert_array_equal(found.pixels, np.asarray(expected).astype(np.uint16) * 257)
    write_picture(found, tmp_path / "again.png")
    with Image.open(tmp_path / "again.png") as again:
        assert again.getexif()[0x010F] == "a maker"
        assert 0x0112 not in again.getexif()


@pytest.mark.parametrize(("ending", "error"), [("jpg", 4), ("webp", 40), ("bmp", 0)])
def test_formats_with_eight_bits_get_them_rounded(tmp_path, ending, error):
    x = np.full((8, 8, 3), (0, 40000, 65535), np.uint16)
    write_picture(DeepPicture(x), tmp_path / f"a.{ending}")
    found = np.asarray(read_picture(tmp_path / f"a.{ending}").convert("RGB")).astype(int)
    assert np.abs(found - (0, 156, 255)).max() <= error
    grey = Image.fromarray(np.full((8, 8), 40000, np.uint16))
    write_picture(grey, tmp_path / f"g.{ending}")
    assert np.abs(np.asarray(read_picture(tmp_path / f"g.{ending}").convert("L")).astype(int) - 156).max() <= error


def test_broken_files_are_named(tmp_path):
    whole = filtered_png(smooth(20, 20, 3), [4])
    for cut in (*range(34, len(whole), len(whole) // 9), len(whole) - 4):
        (tmp_path / "cut.png").write_bytes(whole[:cut])
        with pytest.raises(PictureError, match=r"cut\.png: cannot be read"):
            read_picture(tmp_path / "cut.png")
    for at in (60, len(whole) // 2, len(whole) - 20):
        changed = bytearray(whole)
        changed[at] ^= 1
        (tmp_path / "bad.png").write_bytes(changed)
        with pytest.raises(PictureError, match=r"bad\.png: cannot be read"):
            read_picture(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="filter 5"):
        png16._unfiltered(np.array([5], np.uint8), np.zeros((1, 2, 6), np.uint8))


def test_interlaced_and_foreign_compression_fall_back_with_a_warning(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="needs the package tifffile")
    data = bytearray(filtered_png(smooth(3, 3, 3), [0]))
    data[28] = 1
    assert not png16.matches(bytes(data[:29]))
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        Image.fromarray(pixels(4, 4, 3)).save(tmp_path / "eight.tif", compression="tiff_lzw")
        assert read_picture(tmp_path / "eight.tif").mode == "RGB"
    tifffile.imwrite(tmp_path / "planes.tif", smooth(4, 5, 3).transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_picture(tmp_path / "planes.tif").pixels, smooth(4, 5, 3))
