"""Ctrl-C for a process that is in the middle of something."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

PATIENCE = 300.0  # seconds, which only a test that fails needs: a busy machine may take long over a start


def interrupt(process: subprocess.Popen[str], when: Callable[[], object]) -> tuple[str, str]:
    """Ctrl-C as soon as `when()` holds; what the process wrote to its two pipes by its end."""
    until = time.monotonic() + PATIENCE
    while not when() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
