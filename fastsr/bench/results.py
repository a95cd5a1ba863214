"""Rates, the table, and the JSON file."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsr.atomic import atomic_file, check_replaceable
from fastsr.bench.case import BASELINE

#: The version of the JSON's layout.
FORMAT = 1

HEADINGS = ("runner", "mode", "ms", "quartiles", "rate", "% of roof", "vs channels-last", "peak MB", "faults", "error/allowed")


def rate(rows: list[dict[str, Any]], roofs: dict[str, Any]) -> list[dict[str, Any]]:
    """Add to each timed row its rate, its share of the roof that binds it, and its speed relative to eager channels-last.

    The least time a case can take is the larger of flops / (arithmetic roof) and bytes / (copy roof); the copy roof is that of
    memory, but of the L2 caches where they hold a warm case's bytes. The share of the roof is that time over the median.
    """
    baselines = {row["mode"]: row["seconds"]["median"] for row in rows if row["runner"] == BASELINE and "seconds" in row}
    for row in rows:
        if "seconds" not in row:
            continue
        seconds = row["seconds"]["median"]
        cached = row["mode"].startswith("warm") and row["bytes"] <= roofs.get("copy in L2", {}).get("bytes", 0)
        work = {f"arithmetic {row['dtype']}": row["flops"], "copy in L2" if cached else "copy": row["bytes"]}
        # With one of the two unknown, nobody knows which of them binds.
        times = {name: amount / (roofs[name]["value"] * 1e9) for name, amount in work.items()} if work.keys() <= roofs.keys() else {}
        bound = max(times, key=lambda name: times[name], default=None)
        row["gflops"], row["gbytes"] = row["flops"] / seconds / 1e9, row["bytes"] / seconds / 1e9
        row["roof"] = None if bound is None else {"name": bound, **roofs[bound], "percent": 100 * times[bound] / seconds}
        row["speedup"] = baselines[row["mode"]] / seconds if row["mode"] in baselines else None
    return rows


class Target:
    """The JSON file of a run: what has been measured is kept beside it, and takes its place when the run is complete.

    Raises:
        OSError: nothing can be written there; noticed before anything is measured.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not path:
            raise OSError("--json is ''; expected a new name or a file to replace")
        check_replaceable(self.path)
        self.partial = partial_of(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise OSError(f"--json is {path!r}, but {self.path.parent} is not writable")

    def keep(self, report: Any) -> None:
        """Write what there is so far."""
        write_json(self.partial, report)

    def finish(self) -> None:
        """What was kept last is the result."""
        os.replace(self.partial, self.path)


def partial_of(path: Path) -> Path:
    """Where a run that is not complete keeps what it has for `path`."""
    return path.with_name(path.name + ".partial")


def write_json(path: str | Path, report: Any) -> None:
    """Write all or nothing: a reader never sees half a file, and an interrupted write leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(json.dumps(_finite(report), indent=1, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table as text."""
    if "seconds" not in row:
        return (row["runner"], row["mode"], row["status"], row["reason"], "", "", "", "", "", "")
    s, roof = row["seconds"], row["roof"]
    by_copy = roof is not None and roof["name"].startswith("copy")
    gate = row["gate"]
    return (
        row["runner"],
        row["mode"],
        f"{s['median'] * 1e3:.3f}",
        f"{s['q1'] * 1e3:.3f} .. {s['q3'] * 1e3:.3f}",
        f"{row['gbytes']:.1f} GB/s" if by_copy else f"{row['gflops']:.1f} GFLOP/s",
        f"{roof['percent']:.0f}%" if roof else "not measured",
        f"{row['speedup']:.2f}x" if row["speedup"] else "-",
        f"{row['peak_bytes'] / 1e6:.1f}",
        f"{row['faults']['minor']:.0f}+{row['faults']['major']:.0f}",
        f"{gate['error']:.1e}/{gate['allowed']:.1e}",
    )


def table(report: dict[str, Any]) -> str:
    """The whole report for a terminal: with rich if it is installed, else in plain text."""
    head = [machine(report["environment"]), roof_line(report["roofs"])]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["results"]:
        groups.setdefault(row["case"], []).append(row)
    blocks = [_block(name, rows) for name, rows in groups.items()]
    return "\n".join([*head, *blocks])


def _block(name: str, rows: list[dict[str, Any]]) -> str:
    timed = sorted((row for row in rows if "seconds" in row), key=lambda row: (row["mode"], row["seconds"]["median"]))
    others = [row for row in rows if "seconds" not in row and row["status"] != "left out"]
    notes = "".join(f"  {' '.join(filter(None, (row['runner'], row['mode'])))}: {row['status']}: {row['reason']}\n" for row in others)
    if not timed:
        return f"{name}\n{notes}"
    return render(name, HEADINGS, [cells(row) for row in timed]) + notes


def render(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A titled table, the first two columns to the left and numbers to the right."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        columns = [headings, *rows]
        widths = [max(len(line[i]) for line in columns) for i in range(len(headings))]
        padded = [[c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))] for line in columns]
        return "\n".join([title, *("  ".join(line).rstrip() for line in padded)]) + "\n"
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
    for line in rows:
        drawn.add_row(*line)
    out = io.StringIO()
    # Cut-off figures would be worse than lines that a narrow terminal wraps.
    Console(file=out, width=1000, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def machine(environment: Mapping[str, Any]) -> str:
    """One line on the machine and the versions."""
    cpu, gpu = environment["cpu"], environment["gpu"]
    where = f"{gpu['name']}, " if gpu else ""
    native = environment["native"]
    isa = native["isa"] or f"no native library ({native['missing']})"
    return (
        f"{where}{cpu['model']}, {cpu['cores']} cores, {environment['threads']} threads, kernels: {isa}; "
        f"torch {environment['packages'].get('torch')}, huge pages: {environment['huge_pages']}, {environment['date']}"
    )


def roof_line(roofs: Mapping[str, Any]) -> str:
    """One line on the roofs."""
    if "missing" in roofs:
        return f"roofs: not measured ({roofs['missing']})"
    return "roofs: " + ", ".join(f"{name} {r['value']:.0f} {r['unit']} ({r['how']})" for name, r in roofs.items() if r.get("value"))
