"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def check_replaceable(path: Path) -> None:
    """Refuse a folder, a device or a pipe, whose place a file would take.

    Raises:
        OSError: it is one.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file; expected a new name or a file to replace")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Write to the file that this yields; it is moved to `path` when the block ends well, and removed otherwise (also after Ctrl-C).

    Raises:
        OSError: `path` is a folder, a device or a pipe: a file would take its place.
    """
    path = Path(path)
    check_replaceable(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
