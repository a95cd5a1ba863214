"""`fastsr bench report F...`: JSON files of runs become a Markdown page, plots, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsr.atomic import atomic_file
from fastsr.bench import results
from fastsr.bench.report import html, markdown, plots


def read(path: str | Path) -> dict[str, Any]:
    """One run's JSON; the steps of a GPU run (`benchmarks/gpu.py`) are runs inside one.

    Raises:
        ValueError: the file is not such a JSON; the message names it and what was expected.
    """
    try:
        report = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if isinstance(report, dict) and isinstance(report.get("steps"), dict):
        found = [step.get("data") for step in report["steps"].values() if isinstance(step, dict)]
        runs = [data for data in found if isinstance(data, dict) and "results" in data]
        if runs:
            return {**runs[0], "results": [row for run in runs for row in run["results"]]}
    if not isinstance(report, dict) or not {"format", "environment", "roofs", "results"} <= report.keys():
        raise ValueError(f"{path} is not a file of `fastsr bench --json`; expected format, environment, roofs and results")
    if report["format"] != results.FORMAT:
        raise ValueError(f"{path} has format {report['format']}; this version reads {results.FORMAT}")
    return report


def write(paths: Sequence[str | Path], folder: str | Path, baseline: str | Path | None = None) -> list[Path]:
    """Write report.md, report.html and the plots into `folder`; the files written.

    Each is written whole or not at all.
    """
    runs = {Path(path).stem: read(path) for path in paths}
    before = None if baseline is None else read(baseline)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(runs)
    text = markdown.page(runs, before, [f"{name}.png" for name in pictures])
    files = {f"{name}.png": data for name, data in pictures.items()}
    files["report.md"] = text.encode()
    files["report.html"] = html.page(text, pictures).encode()
    for name, data in files.items():
        with atomic_file(folder / name) as file:
            file.write(data)
    return [folder / name for name in files]
