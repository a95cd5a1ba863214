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
from pathlib import Path
from typing import Any

from fastsr.bench import report, results
from fastsr.bench.report import markdown
from fastsr.bench.report.rows import Row, best_rival, groups, losses, median, ours, title

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: make report -->", "<!-- end of figures -->"

#: Of a case and mode on a machine the newest row of ours, and all timed rows beside it; the newest run last.
Newest = dict[tuple[str, str, str], tuple[Row, list[Row]]]

HEADINGS = ("case", "machine", "fastsr ms", "of roof", "vs eager channels-last", "vs torch.compile", "vs the best library")


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


def newest_of(runs: Sequence[Mapping[str, Any]]) -> Newest:
    """Every case, mode and machine that one of ours was timed in."""
    found: Newest = {}
    for run in sorted(runs, key=lambda run: str(run["environment"]["date"])):
        for (case, mode), group in groups(run["results"]).items():
            if (mine := ours(group)) is not None:
                found.pop((case, mode, machine_of(run)), None)  # the order is that of the runs
                found[case, mode, machine_of(run)] = (mine, group)
    return found


def machine_of(run: Mapping[str, Any]) -> str:
    """Processor, threads, instruction set and torch."""
    return results.machine(run["environment"]).rsplit(",", 1)[0]


def block(runs: Sequence[Mapping[str, Any]], newest: Newest) -> str:
    """What README says: machines, how much is lost, the figure, a line for each case."""
    machines = sorted({machine_of(run) for run in runs})
    letters = {machine: string.ascii_uppercase[i] for i, machine in enumerate(machines)}
    figure = "![times faster than eager channels-last](docs/benchmarks/ratios.png)"
    # A line for each case: its newest run, small pages, on a GPU a cold cache. Losses count in all modes.
    latest = {case: _line(case, letters[machine], *rows) for (case, mode, machine), rows in newest.items() if mode in ("wall", "cold")}
    lines = [latest[case] for case in sorted(latest)]
    cases = {id(mine) for mine, _ in _losses(newest)}
    said = f"Another runner is faster in {len(cases) or 'none'} of the {len(newest)} measurements"
    where = " ([which](docs/benchmarks.md))." if cases else "."
    named = "; ".join(f"{letter}: {machine}" for machine, letter in letters.items())
    return "\n\n".join([f"*{named}*", said + where, figure, markdown.table(HEADINGS, lines)])


def lost(newest: Newest) -> str:
    """The cases in which another runner is faster, the largest loss first."""
    lines = [
        (title(mine["case"], mine["mode"]), markdown.ms(mine), rival["runner"], markdown.ms(rival), f"{median(rival) / median(mine):.2f}x")
        for mine, rival in _losses(newest)
    ]
    if not lines:
        return f"In none of the {len(newest)} committed measurements is another runner faster."
    return markdown.table(("case", "fastsr ms", "faster", "ms", "its time over ours"), lines)


def _losses(newest: Newest) -> list[tuple[Row, Row]]:
    return losses(group for _, group in newest.values())


def _line(case: str, machine: str, mine: Row, group: Sequence[Row]) -> tuple[str, ...]:
    times = {row["runner"]: median(row) for row in group}
    others = [row for row in group if not row["runner"].startswith(("eager", "torch.compile"))]
    best = best_rival(others)

    def ratio(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds / median(mine):.2f}x"

    percent = "-" if mine.get("roof") is None else f"{mine['roof']['percent']:.0f}%"
    peer = "-" if best is None else f"{ratio(median(best))} {best['runner']}"
    return (case, machine, markdown.ms(mine), percent, ratio(times.get("eager channels-last")), ratio(times.get("torch.compile")), peer)


if __name__ == "__main__":
    sys.exit(main())
