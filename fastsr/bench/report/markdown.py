"""The report as Markdown: what we lose first, then every case with every runner, then what could not be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsr.bench import compare, results
from fastsr.bench.report.rows import Row, groups, losses, median, title
from fastsr.bench.statistics import summary

Runs = Mapping[str, Mapping[str, Any]]

HEADINGS = (
    "runner", "ms", "interval", "outliers", "rate", "of roof", "vs channels-last", "peak MB", "held MB", "faults", "launches",
    "error/allowed",
)  # fmt: skip


def page(runs: Runs, before: Mapping[str, Any] | None, pictures: Sequence[str]) -> str:
    """The whole page; `pictures` are the names of the image files beside it."""
    parts = ["# Benchmarks", "## Where another runner is faster", _losses(runs)]
    if before is not None:
        for name, run in runs.items():
            parts += [f"## {name} against the baseline", _comparison(before, run)]
    if not pictures:
        parts += ["No plots: matplotlib is not installed, or nothing was timed."]
    if pictures:
        parts += ["## Plots", *(f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures)]
    for name, run in runs.items():
        parts += [f"## {name}", _machine(run)]
        for key, group in groups(run["results"]).items():
            parts += [f"### {title(*key)}", table(HEADINGS, [_cells(row) for row in group])]
        if lines := _not_timed(run["results"]):
            parts += [f"### Not timed in {name}", table(("case", "runner", "status", "reason"), lines)]
    return "\n\n".join(parts) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def _machine(run: Mapping[str, Any]) -> str:
    commit = (run["environment"].get("commit") or "unknown")[:10]
    load = run["environment"].get("load")
    remarks = "" if run.get("complete", True) else "; **the run was interrupted**"
    remarks += "" if load is None else f"; load before it {load:.1f}"
    return f"{results.machine(run['environment'])}, commit {commit}; {results.roof_line(run['roofs'])}{remarks}"


def _losses(runs: Runs) -> str:
    names = {id(row): name for name, run in runs.items() for row in run["results"] if "seconds" in row}
    if not names:
        return "Nothing was timed."
    found = losses(group for run in runs.values() for group in groups(run["results"]).values())
    if not found:
        return "In none of the cases below."
    lines = []
    for mine, rival in found:
        case, ratio = title(mine["case"], mine["mode"]), f"{median(rival) / median(mine):.2f}x"
        lines.append((case, names[id(mine)], mine["runner"], ms(mine), rival["runner"], ms(rival), ratio))
    return table(("case", "run", "fastsr", "ms", "rival", "ms", "rival/fastsr"), lines)


def _not_timed(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each runner that has a reason, and one for all that a case was not asked for."""
    lines: list[tuple[str, ...]] = []
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "left out":
            left_out.setdefault(row["case"], []).append(row["runner"])
        elif "seconds" not in row:
            lines.append((row["case"], " ".join(filter(None, (row["runner"], row["mode"]))), row["status"], row["reason"]))
    return lines + [(case, ", ".join(names), "left out", "not among the runners asked for") for case, names in left_out.items()]


def _comparison(before: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    found = compare.compare(before, run)
    changed = "".join(f"- {line}\n" for line in compare.differences(before, run))
    heading = f"What else changed between the runs:\n\n{changed}\n" if changed else ""
    return heading + (table(compare.HEADINGS, [compare.cells(f) for f in found]) if found else "No case is in both runs.")


def ms(row: Row) -> str:
    """The median in milliseconds."""
    return f"{median(row) * 1e3:.3f}"


def _cells(row: Row) -> tuple[str, ...]:
    spread = summary(row["samples"])
    low, high = spread["interval"]
    interval = f"{low * 1e3:.3f} .. {high * 1e3:.3f} ({100 * spread['confidence']:.0f}%)"
    held = "-" if row.get("held_bytes") is None else f"{row['held_bytes'] / 1e6:.0f}"
    strange = ", ".join(f"{o['seconds'] * 1e3:.3f} (round {o['round'] + 1})" for o in spread["outliers"][:3])
    if len(spread["outliers"]) > 3:
        strange += f" and {len(spread['outliers']) - 3} more"
    cells = dict(zip(results.HEADINGS, results.cells(dict(row)), strict=True))
    launches = "-" if row.get("launches") is None else f"{row['launches']}"
    return (
        cells["runner"], cells["ms"], interval, strange or "none", cells["rate"], cells["% of roof"],
        cells["vs channels-last"], cells["peak MB"], held, cells["faults"], launches, cells["error/allowed"],
    )  # fmt: skip
