"""A bar with the time that is left, on a terminal; silence elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


class Bar:
    """Progress over pictures of different sizes; by rich where it is installed, else one line that is written over."""

    def __init__(self, total: float) -> None:
        self.total, self.done = max(total, 1e-9), 0.0
        self._start, self._shown = time.perf_counter(), 0.0

    @classmethod
    @contextlib.contextmanager
    def open(cls, total: float) -> Iterator[Bar]:
        """The bar, which is gone at the end of the block, however that ends."""
        if not sys.stderr.isatty():
            yield _Silent(total)
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        except ImportError:
            bar = cls(total)
            try:
                yield bar
            finally:
                sys.stderr.write("\r\x1b[K")
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"))
        # whole pictures come in jumps: the speed is that of the last ten minutes
        progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            speed_estimate_period=600,
        )
        with progress:
            yield _Rich(total, progress)

    def step(self, name: str, weight: float, part: float) -> None:
        """`part` (0..1) of a picture is done; pictures count by their `weight`."""
        self._show(name, min(1.0, (self.done + weight * part) / self.total))

    def finish(self, weight: float) -> None:
        """A picture is done, or given up."""
        self.done += weight

    def _show(self, name: str, part: float) -> None:
        now = time.perf_counter()
        if now - self._shown > 0.2 and part > 0:
            self._shown = now
            left = (now - self._start) * (1 - part) / part
            sys.stderr.write(f"\r\x1b[K{part:4.0%}  {int(left) // 60}:{int(left) % 60:02} left  {name}")
            sys.stderr.flush()


class _Silent(Bar):
    def _show(self, name: str, part: float) -> None:
        pass


class _Rich(Bar):
    def __init__(self, total: float, progress: Any) -> None:
        super().__init__(total)
        self._progress, self._task = progress, progress.add_task("", total=1.0)

    def _show(self, name: str, part: float) -> None:
        self._progress.update(self._task, completed=part, description=name)
