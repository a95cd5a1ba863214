"""A worker process seen from outside: told what to do, given a time limit, and survived when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Where the package that is running now lies: a worker imports the same one from any folder.
ROOT = str(Path(__file__).resolve().parents[2])

#: Begins a script for `python -c`: what lies in the current folder is no module of ours.
NOT_FROM_HERE = "import sys; sys.path[:] = [p for p in sys.path if p]; "
_WORKER = NOT_FROM_HERE + "from fastsr.bench.worker import main; raise SystemExit(main(sys.argv[1:]))"


def environment(threads: int | None, extra: Mapping[str, str]) -> dict[str, str]:
    """The variables of a child: this process's own, with the threads fixed and this package importable."""
    variables = {**os.environ, **extra, "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH", "")]))
    if threads:
        variables["OMP_NUM_THREADS"] = variables["MKL_NUM_THREADS"] = str(threads)
    return variables


def stop_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started in a session of its own, and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class WorkerProcess:
    """A fresh Python with `fastsr.bench.worker` in it; every answer has a "status", whatever happens to the process."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        reading, writing = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(writing)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[writing],
            env=dict(variables),
            start_new_session=True,
        )
        os.close(writing)
        self._replies = reading
        self._buffer = b""
        self.failure: dict[str, Any] | None = None

    def tell(self, action: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer: {"status": "ok" | "wrong" | "unavailable" | "failed" | "crashed" | "timeout", ...}."""
        if self.failure:
            return self.failure
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": action, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(timeout)
        except TimeoutError:
            return self._fail("timeout", f"no answer to {action!r} within {timeout:g} s")
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return self._fail("crashed", f"{how} during {action!r}; last words: {self.last_words()!r}")
        answer: dict[str, Any] = json.loads(line)
        if answer["status"] != "ok":
            self.failure = answer
        return answer

    def last_words(self, length: int = 300) -> str:
        """The end of what the process printed."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - length))
        return self._log.read().decode(errors="replace").strip()

    def close(self) -> None:
        """End the process; closing twice does no harm."""
        if self._log.closed:
            return
        stop_group(self._process)
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(OSError):
            os.close(self._replies)
        self._log.close()

    def _fail(self, status: str, reason: str) -> dict[str, Any]:
        self.failure = {"status": status, "reason": reason}
        stop_group(self._process)
        return self.failure

    def _read_line(self, timeout: float) -> bytes:
        until = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(self._replies, 1 << 16)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
