"""Pictures in, pictures out: `upscale` for pictures in memory, `read_picture` and `write_picture` for files."""

from fastsr.upscaling.deep import DeepPicture
from fastsr.upscaling.engine import Upscaler, upscale, upscale_many
from fastsr.upscaling.files import PictureError, read_picture, write_picture

__all__ = ["DeepPicture", "PictureError", "Upscaler", "read_picture", "upscale", "upscale_many", "write_picture"]
