"""README's table of speeds and its figure, and the full report, all from the committed results.

    python benchmarks/readme.py       (make report)

Reads `benchmarks/results/cpu*.json` and any GPU run, writes docs/benchmarks/ (report.md, plots), and replaces what stands between
the two markers in README.md. No figure is typed by hand.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastsr.bench import report, results
from fastsr.bench.report import markdown
from fastsr.bench.report.rows import best_rival, groups, median, ours

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: make report -->", "<!-- end of figures -->"
HEADINGS = ("case", "fastsr ms", "of roof", "vs eager channels-last", "vs torch.compile", "vs the best other")


def main() -> int:
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json")) + sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    runs = {path.stem: report.read(path) for path in files}
    with tempfile.TemporaryDirectory() as folder:
        report.write(files, folder)
        target = ROOT / "docs" / "benchmarks"
        target.mkdir(exist_ok=True)
        for old in target.glob("*.png"):
            old.unlink()
        for path in Path(folder).iterdir():
            if path.suffix != ".html":  # whoever wants the page makes it with `fastsr bench report`
                shutil.move(path, target / path.name)
    readme = ROOT / "README.md"
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"readme: README.md must hold {BEGIN!r} and {END!r} once each", file=sys.stderr)
        return 1
    between = f"{BEGIN}\n{_table(runs)}\n{END}"
    readme.write_text(re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: between, text, flags=re.DOTALL))
    return 0


def _table(runs: dict[str, dict[str, Any]]) -> str:
    machines = sorted({results.machine(run["environment"]).rsplit(",", 1)[0] for run in runs.values()})
    found = {}
    for run in runs.values():
        for (case, mode), group in groups(run["results"]).items():
            if mode in ("wall", "cold") and (mine := ours(group)) is not None:
                found[case] = (mine, group)
    lines = [_line(case, mine, group) for case, (mine, group) in sorted(found.items())]
    return "\n".join(["*" + "; ".join(machines) + "*", "", markdown.table(HEADINGS, lines)])


def _line(case: str, mine: Any, group: list[Any]) -> tuple[str, ...]:
    times = {row["runner"]: median(row) for row in group}
    others = [row for row in group if not row["runner"].startswith(("eager", "torch.compile"))]
    best = best_rival(others)

    def ratio(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds / median(mine):.2f}x"

    percent = "-" if mine.get("roof") is None else f"{mine['roof']['percent']:.0f}%"
    peer = "-" if best is None else f"{ratio(median(best))} {best['runner']}"
    return (case, markdown.ms(mine), percent, ratio(times.get("eager channels-last")), ratio(times.get("torch.compile")), peer)


if __name__ == "__main__":
    sys.exit(main())
