"""A list of commands, each in a process of its own with a time limit; a failure or a hang is recorded, and the next one runs.

The report is kept after every step, so that whatever ends the run leaves what it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsr.bench.process import stop_group
from fastsr.bench.results import partial_of

#: In a step's command this word becomes the path of the JSON file that the step may write.
JSON = "{json}"

#: Exit status by which a step says that what it measures does not exist yet or not here; its last line says why.
NOTHING_TO_DO = 77

#: A step that has less than this many seconds left is not started.
LEAST = 5.0


@dataclass(frozen=True)
class Step:
    """One command. `must_say` are words without which its output does not count as success."""

    name: str
    command: tuple[str, ...]
    limit: float  # seconds
    title: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    must_say: tuple[str, ...] = ()


def run_step(step: Step, limit: float, folder: Path | None = None, tail: int = 4000) -> dict[str, Any]:
    """Run a step; {"status": "ok" | "failed" | "crashed" | "timeout" | "nothing to do", "seconds", "exit_code", "tail", "data"}."""
    with tempfile.TemporaryDirectory(prefix="fastsr-step-") as temporary, tempfile.TemporaryFile() as log:
        out = Path(temporary) / "step.json"
        command = [word.replace(JSON, str(out)) for word in step.command]
        start = time.monotonic()
        record: dict[str, Any] = {"title": step.title, "command": " ".join(step.command), "limit": limit}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, **step.variables},
                start_new_session=True,
            )
        except OSError as error:
            reason = f"{command[0]} does not start: {error}"
            return {**record, "status": "failed", "reason": reason, "seconds": 0.0, "exit_code": None, "tail": ""}
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop_group(process)  # children that outlive the step would disturb the next
        record |= {"seconds": round(time.monotonic() - start, 2), "exit_code": code}
        log.seek(0)
        text = log.read().decode(errors="replace")
        lines = text.strip().splitlines()
        if code is None:
            record |= {"status": "timeout", "reason": f"not done after {limit:.0f} s"}
        elif code == NOTHING_TO_DO:
            record |= {"status": "nothing to do", "reason": lines[-1] if lines else ""}
        elif code < 0:
            record |= {"status": "crashed", "reason": f"signal {-code}"}
        elif code > 0:
            record |= {"status": "failed", "reason": f"exit status {code}: {lines[-1] if lines else 'no output'}"}
        elif missing := [words for words in step.must_say if words not in text]:
            record |= {"status": "failed", "reason": f"exit status 0, but the output lacks {missing[0]!r}"}
        else:
            record["status"] = "ok"
        record["tail"] = text[-tail:]
        # Whatever a step wrote before it died is kept.
        if written := next((path for path in (out, partial_of(out)) if path.exists()), None):
            try:
                record["data"] = json.loads(written.read_text())
            except ValueError as error:
                record["data_error"] = str(error)
        return record


def run_steps(
    steps: Sequence[Step],
    budget: float,
    keep: Callable[[str, dict[str, Any]], None],
    say: Callable[[str], None] = print,
    folder: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the steps in order within `budget` seconds; `keep(name, record)` is called before and after each."""
    until = clock() + budget
    for step in steps:
        left = until - clock()
        if left < LEAST:
            keep(step.name, {"title": step.title, "status": "skipped", "reason": f"the budget of {budget / 60:.0f} minutes is spent"})
            continue
        keep(step.name, {"title": step.title, "status": "running", "reason": "the run ended during this step"})
        record = run_step(step, min(step.limit, left), folder)
        keep(step.name, record)
        say(f"{step.name}: {record['status']} ({record['seconds']:.0f} s){': ' + record['reason'] if 'reason' in record else ''}")
