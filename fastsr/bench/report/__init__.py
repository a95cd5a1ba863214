"""`fastsr bench report F...`: JSON files of runs become a Markdown page, plots, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsr.atomic import atomic_file
from fastsr.bench import results
from fastsr.bench.report import html, markdown, plots
from fastsr.bench.report.rows import is_timed

#: What pages and comparisons read of a run, and of each kind of row: names and types.
RUN: Mapping[str, Any] = {
    "environment": {
        "date": str,
        "cpu": {"model": str, "cores": int},
        "packages": dict,
        "threads": int,
        "native": {"isa": (str, type(None)), "missing": (str, type(None))},
        "gpu": (dict, type(None)),
        "huge_pages": (str, type(None)),
    },
    "settings": {"variables": dict},
    "roofs": dict,
    "results": list,
}
ROW: Mapping[str, Any] = {
    "suite": str, "subject": str, "case": str, "device": str, "dtype": str, "mode": str, "runner": str, "status": str,
    "sizes": dict, "flops": (int, float), "bytes": (int, float),
}  # fmt: skip
TIMED: Mapping[str, Any] = {
    "seconds": {"median": (int, float), "q1": (int, float), "q3": (int, float)},
    "samples": list, "gate": {"error": (int, float), "allowed": (int, float)}, "peak_bytes": int,
    "faults": {"minor": (int, float), "major": (int, float)}, "gflops": (int, float), "gbytes": (int, float),
    "roof": (dict, type(None)), "speedup": (int, float, type(None)),
}  # fmt: skip


def read(path: str | Path) -> dict[str, Any]:
    """One run's JSON; the steps of a GPU run (`benchmarks/gpu.py`) are runs inside one.

    Raises:
        ValueError: the file is not such a JSON; the message names it, what is wrong in it and what was expected.
    """
    try:
        report = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if isinstance(report, dict) and isinstance(report.get("steps"), dict):
        found = [step.get("data") for step in report["steps"].values() if isinstance(step, dict)]
        runs = [data for data in found if isinstance(data, dict) and "results" in data]
        for run in runs:
            _check(path, run)
        if runs:
            return {**runs[0], "results": [row for run in runs for row in run["results"]]}
    _check(path, report)
    assert isinstance(report, dict)
    return report


def _check(path: str | Path, report: Any) -> None:
    if not isinstance(report, dict) or not {"format", *RUN} <= report.keys():
        raise ValueError(f"{path} is not a file of `fastsr bench --json`; expected format, {', '.join(RUN)}")
    if report["format"] != results.FORMAT:
        raise ValueError(f"{path} has format {report['format']}; this version reads {results.FORMAT}")
    wrong = _wrong(report, RUN, "")
    if not wrong and "missing" not in report["roofs"]:
        shape = {"value": (int, float), "unit": str, "how": str}
        wrong = next(filter(None, (_wrong(roof, shape, f"roofs.{name}") for name, roof in report["roofs"].items())), "")
    for number, row in enumerate(() if wrong else report["results"]):
        where = f"results[{number}]"
        wrong = wrong or _wrong(row, ROW, where)
        if not wrong and "seconds" in row:
            wrong = _wrong(row, TIMED, where)
            if not wrong and not (is_timed(row) and row["seconds"]["median"] > 0):
                wrong = f"{where}.samples holds no samples"
        if not wrong and "seconds" not in row:
            wrong = _wrong(row, {"reason": str}, where)
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}")


def _wrong(value: Any, shape: Any, where: str) -> str:
    """The first place that is not of this shape, with what is there; empty if there is none."""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{where or 'the file'} is {value!r:.40}; expected an object"
        found = (_wrong(value.get(key, _MISSING), inner, f"{where}.{key}".lstrip(".")) for key, inner in shape.items())
        return next(filter(None, found), "")
    if value is _MISSING:
        return f"{where} is missing"
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return ""
    return f"{where} is {value!r:.40}; expected {' or '.join(kind.__name__ for kind in kinds)}"


_MISSING = object()


def write(paths: Sequence[str | Path], folder: str | Path, baseline: str | Path | None = None) -> list[Path]:
    """Write report.md, report.html and the plots into `folder`; the files written.

    Each is written whole or not at all.
    """
    runs = {name: read(path) for name, path in named(paths).items()}
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


def named(paths: Sequence[str | Path]) -> dict[str, Path]:
    """A name for each file: its stem, with as many of its folders before it as tell it from the others; a file given twice counts once."""
    files = list(dict.fromkeys(Path(path).resolve() for path in paths))
    names = {}
    for file in files:
        depth = 1
        while depth < len(file.parts) - 1 and sum(_tail(file, depth) == _tail(other, depth) for other in files) > 1:
            depth += 1
        names[_tail(file, depth)] = file
    return names


def _tail(file: Path, depth: int) -> str:
    return "-".join((*file.parts[1:-1], file.name.removesuffix(".partial").removesuffix(".json"))[-depth:])
