"""The arguments of `fastsr bench` and what they do."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastsr.bench import compare, driver, environment, results, suite
from fastsr.bench.case import DTYPES
from fastsr.bench.report import read as report_of
from fastsr.bench.report import write as write_report

#: With more processes than this at work for each core, times are those of a shared machine.
BUSY = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-command's arguments."""
    subjects = ", ".join(dict.fromkeys((*suite.available(), *suite.SUITES)))
    help_on_subjects = f"{subjects} or all; or: report F... to turn JSON files into pages and plots"
    parser.add_argument("what", nargs="*", default=["all"], help=help_on_subjects)
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
    help_on_json = "write every sample, the roofs and the environment to F; until all is measured to F.partial"
    parser.add_argument("--json", metavar="F", help=help_on_json)
    parser.add_argument("--baseline", metavar="F", help="compare with an earlier --json file, and say which differences are significant")
    parser.add_argument("--out", metavar="DIR", default="bench-report", help="where `report` writes its pages (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; 0 unless no runner at all could be timed. Or write the report of earlier runs."""
    try:
        if args.what[:1] == ["report"]:
            return _report(args)
        before = None if args.baseline is None else report_of(args.baseline)
        settings = _settings(args)
        modules = _modules(args, settings)
        target = None if args.json is None else results.Target(args.json)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        print(f"fastsr bench: {error}", file=sys.stderr)
        return 2
    if (load := environment.load()) is not None and load > BUSY * driver.cores():
        print(f"fastsr bench: other work is going on (load {load:.1f}); the times will be those of a shared machine", file=sys.stderr)
    report: dict[str, Any] = {}

    def keep(so_far: dict[str, Any]) -> None:
        report.update(so_far)
        if target:
            target.keep(so_far)

    try:
        with _terminated_like_interrupted():
            keep(driver.run(modules, settings, say=lambda line: print(line, file=sys.stderr, flush=True), keep=keep))
    except KeyboardInterrupt:
        if report:
            print(results.table(report))
            if target:
                print(f"fastsr bench: what was measured is in {target.partial}", file=sys.stderr)
        raise
    if target:
        target.finish()
    print(results.table(report))
    if before is not None:
        print("\n".join(compare.differences(before, report)))
        if found := compare.compare(before, report):
            print(results.render("against the baseline", compare.HEADINGS, [compare.cells(pair) for pair in found]))
        else:
            print(f"no case, runner and mode was timed both here and in {args.baseline}")
    return 0 if any("seconds" in row for row in report["results"]) else 1


def _settings(args: argparse.Namespace) -> driver.Settings:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU here")
    for name in ("threads", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    pages = args.pages or ("small" if args.quick else "both")
    dtypes = tuple(dict.fromkeys(args.dtype or (["bfloat16"] if device == "cuda" else ["float32"])))
    return driver.Settings(
        options=suite.Options(device, dtypes, "quick" if args.quick else "full"),
        threads=args.threads or (driver.cores() if device == "cpu" else None),
        rounds=args.rounds or (3 if args.quick else 6),
        round_seconds=0.2 if args.quick else 0.5,
        runners=tuple(args.runner),
        match=tuple(args.case),
        pages=tuple(driver.PAGES) if pages == "both" else (pages,),
    )


def _modules(args: argparse.Namespace, settings: driver.Settings) -> list[str]:
    modules = suite.select(args.what)
    cases = [case for module in modules for case in suite.cases(module, settings.options)]
    known = dict.fromkeys(name for case in cases for name in case.runners)
    if unknown := [name for name in settings.runners if name not in known]:
        raise ValueError(f"no runner is called {unknown[0]!r}; expected {', '.join(map(repr, known))}")
    if missing := [text for text in settings.match if not any(text in case.name for case in cases)]:
        raise ValueError(f"no case's name holds {missing[0]!r}; they are: {'; '.join(case.name for case in cases)}")
    return modules


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Inside, SIGTERM ends the run as Ctrl-C does: workers and temporary files go."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(args: argparse.Namespace) -> int:
    if len(args.what) < 2:
        raise ValueError("report of no file; expected: fastsr bench report F... [--out DIR] [--baseline F]")
    for path in write_report(args.what[1:], args.out, args.baseline):
        print(path)
    if not any(Path(args.out).glob("*.png")):
        print("fastsr bench: no plots; pip install matplotlib to have them", file=sys.stderr)
    return 0
