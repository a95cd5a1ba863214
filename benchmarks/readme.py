"""README's table of speeds and its figure, and the full report, all from the committed results.

    python benchmarks/readme.py       (make report)

Reads every `cpu-*.json` and `gpu-*.json` in benchmarks/results/, writes docs/benchmarks/ (report.md, plots), and replaces what stands
between the markers in README.md (a line for each case, its newest run) and in docs/benchmarks.md (what is lost on any machine, in a
machine's newest run of the case). No figure is typed by hand.
"""

from __future__ import annotations

import re
import shutil
import string
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsr.bench import report, results
from fastsr.bench.case import BASELINE
from fastsr.bench.report import markdown
from fastsr.bench.report.rows import Row, best_rival, groups, is_first, losses, median, ours, title

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: make report -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Newest:
    """The newest measurement of a case in a mode on a machine."""

    mine: Row
    group: list[Row]  # all timed rows
    states: dict[str, str]  # why the other runners have no time
    listed: bool  # whether README has a line for it


#: By case, mode and machine; the newest run last.
Found = dict[tuple[str, str, str], Newest]

HEADINGS = ("case", "machine", "fastsr ms", "of roof", "vs eager channels-last", "vs torch.compile", "vs the best other")


def main() -> int:
    folder = ROOT / "benchmarks" / "results"
    files = [path for device in ("cpu", "gpu") for path in sorted(folder.glob(f"{device}-*.json"))]
    runs = [report.read(path) for path in files]
    newest = newest_of(runs)
    pages = {"README.md": block(runs, newest), "docs/benchmarks.md": lost(newest)}
    for name in pages:
        text = (ROOT / name).read_text()
        if text.count(BEGIN) != 1 or text.count(END) != 1:
            print(f"readme: {name} must hold {BEGIN!r} and {END!r} once each", file=sys.stderr)
            return 1
    write_report(files, ROOT / "docs" / "benchmarks")
    for name, found in pages.items():
        between = f"{BEGIN}\n{found}\n{END}"
        text = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _, new=between: new, (ROOT / name).read_text(), flags=re.DOTALL)
        (ROOT / name).write_text(text)
    return 0


def write_report(files: Sequence[Path], target: Path) -> None:
    """The page and its plots into `target`; plots that no file has any more go."""
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        written = {path.name for path in report.write(files, folder)} - {"report.html"}  # `fastsr bench report` makes that one
        for old in target.glob("*.png"):
            if old.name not in written:
                old.unlink()
        for name in written:
            shutil.move(Path(folder) / name, target / name)


def newest_of(runs: Sequence[Mapping[str, Any]]) -> Found:
    """Every case, mode and machine that one of ours was timed in. README lists those of full size in their first mode: small pages, on
    a GPU a cold cache. Losses count in all."""
    found: Found = {}
    for run in sorted(runs, key=lambda run: str(run["environment"]["date"])):
        full = run["settings"].get("sizes", "full") == "full"
        for (case, mode), group in groups(run["results"]).items():
            if (mine := ours(group)) is not None:
                states = {row["runner"]: row["status"] for row in run["results"] if row["case"] == case and "seconds" not in row}
                found.pop((case, mode, machine_of(run)), None)  # the order is that of the runs
                found[case, mode, machine_of(run)] = Newest(mine, group, states, full and mine["suite"] != "scaling" and is_first(mine))
    return found


def machine_of(run: Mapping[str, Any]) -> str:
    """Processor, threads, instruction set and torch."""
    return results.machine(run["environment"]).rsplit(",", 1)[0]


def block(runs: Sequence[Mapping[str, Any]], newest: Found) -> str:
    """What README says: machines, how much is lost, the figure, a line for each case."""
    machines = sorted({machine_of(run) for run in runs})
    letters = {machine: string.ascii_uppercase[i] for i, machine in enumerate(machines)}
    figure = "![times faster than eager channels-last](docs/benchmarks/ratios.png)"
    latest = {case: _line(case, letters[machine], found) for (case, _, machine), found in newest.items() if found.listed}
    lines = [latest[case] for case in sorted(latest)]
    cases = {id(mine) for mine, _ in _losses(newest)}
    said = f"Another runner is faster in {len(cases) or 'none'} of the {len(newest)} measurements"
    where = " ([which](docs/benchmarks.md))." if cases else "."
    named = "; ".join(f"{letter}: {machine}" for machine, letter in letters.items())
    return "\n\n".join([f"*{named}*", said + where, figure, markdown.table(HEADINGS, lines)])


def lost(newest: Found) -> str:
    """The cases in which another runner is faster, the largest loss first."""
    lines = [
        (title(mine["case"], mine["mode"]), markdown.ms(mine), rival["runner"], markdown.ms(rival), f"{median(rival) / median(mine):.2f}x")
        for mine, rival in _losses(newest)
    ]
    if not lines:
        return f"In none of the {len(newest)} committed measurements is another runner faster."
    return markdown.table(("case", "fastsr ms", "faster", "ms", "its time over ours"), lines)


def _losses(newest: Found) -> list[tuple[Row, Row]]:
    return losses(found.group for found in newest.values())


def _line(case: str, machine: str, found: Newest) -> tuple[str, ...]:
    mine, times = found.mine, {row["runner"]: median(row) for row in found.group}
    columns = (BASELINE, "torch.compile")

    def ratio(runner: str) -> str:
        return f"{times[runner] / median(mine):.2f}x" if runner in times else found.states.get(runner, "left out")

    percent = "-" if mine.get("roof") is None else f"{mine['roof']['percent']:.0f}%"
    best = best_rival(row for row in found.group if row["runner"] not in columns)
    peer = "-" if best is None else f"{ratio(best['runner'])} {best['runner']}"
    return (case, machine, markdown.ms(mine), percent, *map(ratio, columns), peer)


if __name__ == "__main__":
    sys.exit(main())
