"""Pictures from files and into files: by Pillow, and for 16 bits in several channels by `png16` and tifffile."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastsr.atomic import atomic_file
from fastsr.upscaling import png16
from fastsr.upscaling.deep import DeepPicture

#: Formats that hold a photograph, by Pillow's names.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")

#: Settings for formats that lose something by default.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}

#: Modes that a format cannot hold, and what becomes of them.
REPLACED_MODES = {"JPEG": {"RGBA": "RGB", "LA": "L"}, "BMP": {"LA": "L"}}

#: EXIF tags that say how a file's pixels lie, which is no longer true of another file; the first is the orientation.
LAYOUT_TAGS = (0x0112, *range(254, 260), 262, 266, 273, *range(277, 280), 284, 317, 320, *range(322, 326), *range(330, 340), 34675)


class PictureError(ValueError):
    """A file that is no picture that can be read, or a place where none can be written."""


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise PictureError(f"reading and writing pictures needs Pillow ({error}): pip install 'fastsr-torch[demo]'") from error
    return Image


def read_picture(path: str | Path) -> Any:
    """A picture, turned upright by its EXIF orientation; its ICC profile and EXIF stay in `info`.

    Returns:
        A PIL image; for PNG and TIFF with 16 bits a channel and more than one channel a `DeepPicture`. (Interlaced PNG and
        TIFF in a compression that tifffile cannot read come with 8 bits a channel, and a warning.)

    Raises:
        PictureError: no picture, a broken one, or one beyond Pillow's limit against decompression bombs.
        FileNotFoundError: no such file.
    """
    Image = _pillow()
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            exif = image.getexif()
            orientation = exif.get(LAYOUT_TAGS[0], 1)
            picture: Any = _read_deep(Path(path), image)
            if picture is None:
                image.load()
                picture = ImageOps.exif_transpose(image)
            else:
                if profile := image.info.get("icc_profile"):
                    picture.info["icc_profile"] = profile
                picture = picture.upright(orientation)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise PictureError(f"{path}: cannot be read as a picture: {error}") from error
    for tag in LAYOUT_TAGS:
        exif.pop(tag, None)
    picture.info.pop("exif", None)
    if len(exif):
        picture.info["exif"] = exif.tobytes()
    return picture


def _read_deep(path: Path, image: Any) -> DeepPicture | None:
    """The pixels of a file whose 16 bits Pillow would cut to 8; None for every other."""
    if image.format == "PNG":
        with path.open("rb") as file:
            head = file.read(29)
            file.seek(0)
            if png16.matches(head):
                return DeepPicture(png16.read(file))
            if head[24:25] == b"\x10" and head[25] in png16.CHANNELS:
                warnings.warn(f"{path}: 16 bits in an interlaced PNG are read as 8", RuntimeWarning, stacklevel=4)
    elif image.format == "TIFF":
        bits = image.tag_v2.get(258, (8,))
        if len(bits) in (3, 4) and set(bits) == {16}:
            return _read_deep_tiff(path, image)
    return None


def _read_deep_tiff(path: Path, image: Any) -> DeepPicture | None:
    w, h = image.size
    try:
        import tifffile

        pixels = tifffile.imread(path, key=0)
    except (ImportError, KeyError, ValueError) as error:  # ValueError, KeyError: a compression that needs another package
        warnings.warn(f"{path}: its 16 bits are read as 8: {' '.join(str(error).split())}", RuntimeWarning, stacklevel=5)
        return None
    if pixels.shape[1:] == (h, w):  # a plane for each channel
        pixels = pixels.transpose(1, 2, 0)
    return DeepPicture(pixels) if pixels.shape[:2] == (h, w) and pixels.ndim == 3 and pixels.dtype == np.uint16 else None


def write_picture(image: Any, path: str | Path) -> None:
    """Write a PIL image or a `DeepPicture` in the format that the name ends in, with its ICC profile and EXIF.

    16 bits a channel stay in PNG and TIFF and are rounded to 8 elsewhere; what has no alpha is shown on white.
    The file appears whole or not at all: it is written beside its place under another name and then moved there.

    Raises:
        PictureError: an unknown ending, or a picture that the format cannot hold.
        OSError: the file cannot be written.
    """
    _pillow()
    path = Path(path)
    kind = output_format(path)
    with atomic_file(path) as file:
        if isinstance(image, DeepPicture):
            if _write_deep(image, kind, file):
                return
            image = image.to_pil()
        image = _held(image, kind)
        options = dict(SAVE_OPTIONS.get(kind, {}))
        if profile := image.info.get("icc_profile"):
            options["icc_profile"] = profile
        if exif := image.info.get("exif"):
            options["exif"] = exif
        try:
            image.save(file, kind, **options)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            about = f"a picture of {image.width}x{image.height}, mode {image.mode}"
            raise PictureError(f"{path}: {kind} cannot hold {about}: {error}") from error


def _write_deep(picture: DeepPicture, kind: str, file: BinaryIO) -> bool:
    """Write 16 bits a channel (EXIF in PNG alone); False where the format or the packages here cannot."""
    profile = picture.info.get("icc_profile")
    if kind == "PNG":
        png16.write(picture.pixels, file, profile, picture.info.get("exif"))
        return True
    if kind != "TIFF":
        return False
    try:
        import tifffile
    except ImportError as error:
        warnings.warn(f"16 bits are written as 8: TIFF with more needs tifffile ({error})", RuntimeWarning, stacklevel=4)
        return False
    pixels = picture.pixels
    if pixels.shape[2] == 2:  # grey with alpha, which few programs read, as RGBA
        pixels = pixels[:, :, [0, 0, 0, 1]]
    tifffile.imwrite(
        file,
        pixels,
        photometric="rgb",
        planarconfig="contig",
        extrasamples=["unassalpha"] if pixels.shape[2] == 4 else None,
        compression="zlib",
        iccprofile=profile,
        metadata=None,
    )
    return True


def _held(image: Any, kind: str) -> Any:
    """The picture in a mode that the format can hold, where there is one that shows the same."""
    Image = _pillow()
    info = image.info
    if image.mode.startswith("I;16") and kind not in ("PNG", "TIFF"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif mode := REPLACED_MODES.get(kind, {}).get(image.mode):
        ground = Image.new(mode, image.size, "white")
        ground.paste(image.convert(mode), mask=image.getchannel("A"))
        image = ground
    image.info.update(info)
    return image


def output_format(path: str | Path) -> str:
    """Pillow's name of the format in which a file of this name is written.

    Raises:
        PictureError: an unknown ending.
    """
    Image = _pillow()
    Image.init()
    endings = {ending: kind for ending, kind in Image.EXTENSION.items() if kind in FORMATS and kind in Image.SAVE}
    kind = endings.get(Path(path).suffix.lower())
    if kind is None:
        raise PictureError(f"{path}: unknown picture format {Path(path).suffix!r}; expected one of {', '.join(sorted(endings))}")
    return kind


def input_endings() -> frozenset[str]:
    """The endings by which pictures are found in a folder."""
    Image = _pillow()
    Image.init()
    return frozenset(ending for ending, kind in Image.EXTENSION.items() if kind in FORMATS and kind in Image.OPEN)


def picture_size(path: str | Path) -> int:
    """Pixels of a picture by its header; 1 where that cannot be read."""
    Image = _pillow()
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # reported when the picture is read
        return 1
