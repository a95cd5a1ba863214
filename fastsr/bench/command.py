"""The arguments of `fastsr bench` and what they do."""

from __future__ import annotations

import argparse
import sys

import torch

from fastsr.bench import compare, driver, results, suite
from fastsr.bench.case import DTYPES
from fastsr.bench.report import read as report_of
from fastsr.bench.report import write as write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-command's arguments."""
    subjects = f"{', '.join(suite.available())}, {', '.join(suite.SUITES)} or all"
    parser.add_argument("what", nargs="*", default=["all"], help=f"{subjects}; or: report F... to turn JSON files into pages and plots")
    parser.add_argument("--quick", action="store_true", help="few small sizes and few rounds: a look, not a result")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if torch sees one")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="may be repeated; default float32, on a GPU bfloat16")
    parser.add_argument("--threads", type=int, help="CPU threads of every runner; default: all cores of this process")
    parser.add_argument("--rounds", type=int, help="rounds in which every runner takes its turn; default 6, quick 3")
    parser.add_argument("--runner", action="append", default=[], help="only this runner; may be repeated")
    parser.add_argument("--case", action="append", default=[], help="only cases whose name holds this text; may be repeated")
    parser.add_argument(
        "--pages",
        choices=(*driver.PAGES, "both"),
        help="what torch asks for large buffers on a CPU, the same for every runner; default both, quick small",
    )
    parser.add_argument("--json", metavar="F", help="write every sample, the roofs and the environment to F")
    parser.add_argument("--baseline", metavar="F", help="compare with an earlier --json file, and say which differences are significant")
    parser.add_argument("--out", metavar="DIR", default="bench-report", help="where `report` writes its pages (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; 0 unless no runner at all could be timed. Or write the report of earlier runs."""
    try:
        if args.what[:1] == ["report"]:
            return _report(args)
        before = None if args.baseline is None else report_of(args.baseline)
    except (OSError, ValueError) as error:
        print(f"fastsr bench: {error}", file=sys.stderr)
        return 2
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("fastsr bench: --device cuda, but torch sees no GPU here", file=sys.stderr)
        return 2
    for name in ("threads", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            print(f"fastsr bench: --{name} is {value}; expected at least 1", file=sys.stderr)
            return 2
    pages = args.pages or ("small" if args.quick else "both")
    dtypes = tuple(dict.fromkeys(args.dtype or (["bfloat16"] if device == "cuda" else ["float32"])))
    settings = driver.Settings(
        options=suite.Options(device, dtypes, "quick" if args.quick else "full"),
        threads=args.threads or (driver.cores() if device == "cpu" else None),
        rounds=args.rounds or (3 if args.quick else 6),
        round_seconds=0.2 if args.quick else 0.5,
        runners=tuple(args.runner),
        match=tuple(args.case),
        pages=tuple(driver.PAGES) if pages == "both" else (pages,),
    )
    try:
        modules = suite.select(args.what)
        known = dict.fromkeys(name for module in modules for case in suite.cases(module, settings.options) for name in case.runners)
        if unknown := [name for name in settings.runners if name not in known]:
            raise ValueError(f"no runner is called {unknown[0]!r}; expected {', '.join(known)}")
        names = [case.name for module in modules for case in suite.cases(module, settings.options)]
        if missing := [text for text in settings.match if not any(text in name for name in names)]:
            raise ValueError(f"no case's name holds {missing[0]!r}; they are: {'; '.join(names)}")
    except ValueError as error:
        print(f"fastsr bench: {error}", file=sys.stderr)
        return 2

    def keep(report: dict[str, object]) -> None:
        if args.json:
            results.write_json(args.json, report)

    report = driver.run(modules, settings, say=lambda line: print(line, file=sys.stderr, flush=True), keep=keep)
    print(results.table(report))
    if before is not None:
        print("\n".join(compare.differences(before, report)))
        print(results.render("against the baseline", compare.HEADINGS, [compare.cells(found) for found in compare.compare(before, report)]))
    return 0 if any("seconds" in row for row in report["results"]) else 1


def _report(args: argparse.Namespace) -> int:
    if len(args.what) < 2:
        raise ValueError("report of no file; expected: fastsr bench report F... [--out DIR] [--baseline F]")
    for path in write_report(args.what[1:], args.out, args.baseline):
        print(path)
    return 0
