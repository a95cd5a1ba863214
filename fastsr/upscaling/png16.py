"""PNG with 16 bits a channel and more than one channel, which Pillow reads as 8 bits and does not write.

Source: "Portable Network Graphics (PNG) Specification (Third Edition)", W3C; chapters 5 (chunks) and 9 (filters).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"

#: Colour type -> channels; the others are Pillow's.
CHANNELS = {2: 3, 4: 2, 6: 4}

#: Rows that are filtered at a time when a file is written.
BAND = 128


def matches(head: bytes) -> bool:
    """True for the first 29 bytes of a file that `read` takes: 16 bits, RGB or with alpha, not interlaced."""
    return head[:8] == SIGNATURE and head[12:16] == b"IHDR" and len(head) >= 29 and head[24] == 16 and head[25] in CHANNELS and not head[28]


def read(file: BinaryIO) -> np.ndarray:
    """The pixels (H, W, C) of uint16.

    Raises:
        ValueError: a broken file.
    """
    chunks = _chunks(file)
    name, header = next(chunks)
    if name != b"IHDR" or len(header) != 13:
        raise ValueError("the PNG does not begin with its header")
    w, h, _, colour = struct.unpack(">IIBB", header[:10])
    unit = 2 * CHANNELS[colour]
    size = h * (1 + w * unit)
    inflate = zlib.decompressobj()
    data = bytearray()
    try:
        for name, body in chunks:
            if name == b"IDAT" and len(data) < size:
                data += inflate.decompress(body, size - len(data))
    except zlib.error as error:
        raise ValueError(f"the PNG's pixels are broken: {error}") from error
    if len(data) < size:
        raise ValueError(f"the PNG's pixels end after {len(data)} of {size} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(h, 1 + w * unit)
    pixels = _unfiltered(rows[:, 0], rows[:, 1:].reshape(h, w, unit))
    return pixels.reshape(h, w * unit).view(">u2").astype(np.uint16).reshape(h, w, CHANNELS[colour])


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of each chunk up to the last, which is checked to be there."""
    if file.read(8) != SIGNATURE:
        raise ValueError("no PNG")
    while True:
        head = file.read(8)
        length = int.from_bytes(head[:4], "big")
        body = file.read(length) if len(head) == 8 and length < 1 << 31 else b""
        checksum = file.read(4)
        if len(head) != 8 or len(body) != length or len(checksum) != 4:
            raise ValueError("the PNG is truncated")
        if zlib.crc32(head[4:] + body) != int.from_bytes(checksum, "big"):
            raise ValueError(f"the PNG's chunk {head[4:]!r} has a wrong checksum")
        yield head[4:], body
        if head[4:] == b"IEND":
            return


def _unfiltered(kinds: np.ndarray, filtered: np.ndarray) -> np.ndarray:
    """Undo the filter of each row of (H, W, bytes of a pixel).

    A pixel is predicted from those on its left, above, and above on the left. So the pixels of an antidiagonal depend
    on the two before it alone, and are done at once.
    """
    h, w, unit = filtered.shape
    if kinds.max(initial=0) > 4:
        raise ValueError(f"the PNG has the filter {kinds.max()}; expected 0..4")
    done = np.zeros((h + 1, w + 1, unit), np.uint8)  # a row and a column of zeros in front
    done[1:, 1:] = filtered
    row = (w + 1) * unit
    kinds = kinds[:, None]
    # what each filter adds: a share of a (left), of b (above), of their mean, or Paeth's choice
    sub, up, mean, paeth = (kinds == k for k in (1, 2, 3, 4))
    for t in range(h + w - 1):
        top, bottom = max(0, t - w + 1), min(h, t + 1)

        def diagonal(dy: int, dx: int, top: int = top, bottom: int = bottom, t: int = t) -> np.ndarray:
            start = (top + dy) * row + (t - top + dx) * unit
            return np.ndarray((bottom - top, unit), np.uint8, done, start, (row - unit, 1))

        here = slice(top, bottom)
        a, b, c = (diagonal(*at).astype(np.int16) for at in ((1, 0), (0, 1), (0, 0)))
        far_a, far_b, far_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
        nearest = np.where((far_a <= far_b) & (far_a <= far_c), a, np.where(far_b <= far_c, b, c))
        guess = sub[here] * a + up[here] * b + mean[here] * ((a + b) >> 1) + paeth[here] * nearest
        pixel = diagonal(1, 1)
        pixel += guess.astype(np.uint8)
    return np.ascontiguousarray(done[1:, 1:])


def write(pixels: np.ndarray, file: BinaryIO, icc_profile: bytes | None = None, exif: bytes | None = None) -> None:
    """Write pixels (H, W, C) of uint16, C = 2, 3 or 4."""
    h, w, channels = pixels.shape
    colour = {count: kind for kind, count in CHANNELS.items()}[channels]
    file.write(SIGNATURE)
    _put(file, b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0))
    if icc_profile:
        _put(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile))
    if exif:
        _put(file, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    deflate = zlib.compressobj(6)
    above = np.zeros((1, w, 2 * channels), np.uint8)
    for top in range(0, h, BAND):
        rows = pixels[top : top + BAND].astype(">u2").view(np.uint8).reshape(-1, w, 2 * channels)
        body = deflate.compress(_filtered(rows, above))
        above = rows[-1:]
        if body:
            _put(file, b"IDAT", body)
    _put(file, b"IDAT", deflate.flush())
    _put(file, b"IEND", b"")


def _filtered(rows: np.ndarray, above: np.ndarray) -> bytes:
    """Each row with the filter that leaves the smallest sum of absolute differences, as the specification advises."""
    x = rows.astype(np.int16)
    b = np.concatenate([above, rows[:-1]]).astype(np.int16)
    a, c = (np.concatenate([np.zeros_like(y[:, :1]), y[:, :-1]], 1) for y in (x, b))
    far_a, far_b, far_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = np.where((far_a <= far_b) & (far_a <= far_c), a, np.where(far_b <= far_c, b, c))
    guesses = (np.zeros_like(a), a, b, (a + b) >> 1, nearest)
    tried = np.stack([(x - guess).astype(np.uint8) for guess in guesses])
    cost = np.abs(tried.view(np.int8).astype(np.int16)).sum((2, 3), dtype=np.int64)
    best = cost.argmin(0)
    chosen = tried[best, np.arange(len(rows))].reshape(len(rows), -1)
    return np.concatenate([best.astype(np.uint8)[:, None], chosen], 1).tobytes()


def _put(file: BinaryIO, name: bytes, body: bytes) -> None:
    file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
