"""Things that are built once for all processes of a test run."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def one_process_at_a_time(target: Path) -> Iterator[None]:
    """Of several processes that want `target`, the first builds it in the block while the others wait, and then find it there."""
    with target.with_name(f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the end of the process ends it too
        yield
