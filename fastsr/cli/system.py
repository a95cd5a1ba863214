"""What the command asks of the operating system."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def enable_huge_pages() -> None:
    """Let torch ask for huge pages where the kernel offers them: large buffers then cost far fewer page faults.

    To be called before torch is imported. A value that the user has set stays.
    """
    with contextlib.suppress(OSError):
        if "[never]" not in HUGE_PAGES.read_text():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def peak_memory() -> int:
    """The most bytes that this process has held so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
