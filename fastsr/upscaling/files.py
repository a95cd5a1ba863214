"""Pictures from files and into files, by Pillow."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

#: Formats that hold a photograph, by Pillow's names.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")

#: Settings for formats that lose something by default.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}

#: Modes that a format cannot hold, and what becomes of them.
REPLACED_MODES = {"JPEG": {"RGBA": "RGB", "LA": "L"}}

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
    """A PIL image, turned upright by its EXIF orientation; its ICC profile and EXIF stay in `info`.

    Raises:
        PictureError: no picture, a broken one, or one beyond Pillow's limit against decompression bombs.
        FileNotFoundError: no such file.
    """
    Image = _pillow()
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            exif = image.getexif()
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise PictureError(f"{path}: cannot be read as a picture: {error}") from error
    for tag in LAYOUT_TAGS:
        exif.pop(tag, None)
    upright.info.pop("exif", None)
    if len(exif):
        upright.info["exif"] = exif.tobytes()
    return upright


def write_picture(image: Any, path: str | Path) -> None:
    """Write a PIL image in the format that the name ends in, with its ICC profile and EXIF.

    The file appears whole or not at all: it is written beside its place under another name and then moved there.

    Raises:
        PictureError: an unknown ending, or a picture that the format cannot hold.
        OSError: the file cannot be written.
    """
    Image = _pillow()
    path = Path(path)
    kind = output_format(path)
    mode = REPLACED_MODES.get(kind, {}).get(image.mode)
    options = dict(SAVE_OPTIONS.get(kind, {}))
    if profile := image.info.get("icc_profile"):
        options["icc_profile"] = profile
    if exif := image.info.get("exif"):
        options["exif"] = exif
    if mode is not None:  # what has no alpha is shown on white
        ground = Image.new(mode, image.size, "white")
        ground.paste(image.convert(mode), mask=image.getchannel("A"))
        image = ground
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            try:
                image.save(file, kind, **options)
            except (OSError, ValueError, KeyError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise PictureError(f"{path}: {kind} cannot hold a picture of mode {image.mode}: {error}") from error
        os.replace(partial, path)
    finally:  # also after Ctrl-C
        partial.unlink(missing_ok=True)


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
