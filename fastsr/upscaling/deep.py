"""Colour pictures with 16 bits a channel, for which Pillow has no mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: EXIF orientation -> how the pixels are turned upright: mirrored first, then turned left so many times.
_UPRIGHT = {2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1)}


@dataclass
class DeepPicture:
    """Pixels (H, W, C) of uint16, C = 2 grey + alpha, 3 RGB or 4 RGBA; `info` as that of a PIL image ("icc_profile", "exif")."""

    pixels: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def upright(self, orientation: int) -> DeepPicture:
        """The picture turned by an EXIF orientation."""
        mirrored, turns = _UPRIGHT.get(orientation, (False, 0))
        pixels = np.rot90(self.pixels[:, ::-1] if mirrored else self.pixels, turns)
        return DeepPicture(np.ascontiguousarray(pixels), self.info)

    def to_pil(self) -> Any:
        """A PIL image with 8 bits a channel, rounded to nearest."""
        from PIL import Image

        picture = Image.fromarray(((self.pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
        picture.info.update(self.info)
        return picture
