"""Reading and writing pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

import fastsr
from fastsr.upscaling import PictureError, read_picture, write_picture
from fastsr.upscaling.compare import side_by_side
from tests.upscaling.test_upscale import Nearest, pixels

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif", ".tiff", ".bmp", ".PNG"])
def test_a_picture_goes_out_and_comes_back(tmp_path, ending):
    picture = Image.fromarray(np.full((6, 5, 3), (200, 40, 90), np.uint8))
    write_picture(picture, tmp_path / f"a{ending}")
    found = read_picture(tmp_path / f"a{ending}")
    assert np.abs(np.asarray(found.convert("RGB")).astype(int) - np.asarray(picture).astype(int)).max() <= 4
    assert [p.name for p in tmp_path.iterdir()] == [f"a{ending}"]


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
def test_profile_and_exif_survive_and_orientation_is_applied(tmp_path, ending):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"  # turned by 90 degrees
    Image.fromarray(pixels(4, 6, 3)).save(tmp_path / f"a{ending}", icc_profile=PROFILE, exif=exif.tobytes())
    picture = read_picture(tmp_path / f"a{ending}")
    assert picture.size == (4, 6)
    result = fastsr.upscale(Nearest(), picture)
    write_picture(result, tmp_path / f"b{ending}")
    with Image.open(tmp_path / f"b{ending}") as found:
        assert found.size == (8, 12)
        assert found.info["icc_profile"] == PROFILE
        assert found.getexif()[0x010F] == "a maker"
        assert found.getexif().get(0x0112, 1) == 1


def test_sixteen_bits_of_grey_survive(tmp_path):
    array = pixels(4, 6, dtype=np.uint16)
    write_picture(Image.fromarray(array), tmp_path / "a.png")
    result = fastsr.upscale(Nearest(), read_picture(tmp_path / "a.png"))
    write_picture(result, tmp_path / "b.png")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "b.png")).astype(int), array.repeat(2, 0).repeat(2, 1))


def test_jpeg_shows_transparency_on_white(tmp_path):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    write_picture(picture, tmp_path / "a.jpg")
    assert np.asarray(read_picture(tmp_path / "a.jpg")).min() >= 250


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def interrupted(self, file, *_args, **_options):
        file.write(b"half a pict")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_picture(Image.new("RGB", (4, 4)), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"before"


def test_errors_name_the_file(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    buffer = io.BytesIO()
    Image.fromarray(pixels(40, 40, 3)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    for name in ("text.png", "cut.png"):
        with pytest.raises(PictureError, match=name):
            read_picture(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match=r"'\.xyz'; expected one of .*\.png"):
        write_picture(Image.new("RGB", (2, 2)), tmp_path / "a.xyz")
    with pytest.raises(PictureError, match="cannot hold"):
        write_picture(Image.fromarray(np.zeros((2, 2), np.float32)), tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError):
        write_picture(Image.new("RGB", (2, 2)), tmp_path / "nowhere" / "a.png")
    assert not list(tmp_path.glob(".*"))


def test_side_by_side_shows_both_pictures():
    small = Image.fromarray(pixels(10, 12, 3))
    large = Image.fromarray(np.full((40, 48, 3), (255, 0, 0), np.uint8))
    sheet = np.asarray(side_by_side(small, large, zoom=(0, 0, 24, 20)))
    assert sheet.shape[1] == 2 * 48 + 36
    assert (sheet == (255, 0, 0)).all(2).sum() >= 40 * 48 * 2  # the picture and its zoom, equally large
    bicubic = np.asarray(small.resize((48, 40), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(sheet[46 + 4 : 46 + 16, 12 + 28 : 12 + 48], bicubic[4:16, 28:48])


def test_a_bad_pixel_count_is_refused(tmp_path, monkeypatch):
    write_picture(Image.new("L", (200, 200)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match="decompression bomb"):
        read_picture(tmp_path / "a.png")
