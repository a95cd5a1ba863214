"""Pictures in, pictures out: `upscale` for pictures in memory, `read_picture` and `write_picture` for files."""

from fastsr.upscaling.engine import upscale
from fastsr.upscaling.files import PictureError, read_picture, write_picture

__all__ = ["PictureError", "read_picture", "upscale", "write_picture"]
