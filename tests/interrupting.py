"""Processes in the middle of something, and Ctrl-C for them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

PATIENCE = 300.0  # seconds, which only a test that fails needs: a busy machine may take long over a start


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """A process that Ctrl-C reaches even where the tests run in a shell's background, which ignores it and hands that on."""

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen, **options)


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
