"""Runs cases: a fresh process for each runner, the gate before the clock, and rounds that go round the runners.

All processes of a case stay alive, only one works at a time, and noise of the machine falls on all alike.
A runner that is missing, wrong, too slow or dead is reported with its reason; the others go on.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsr.bench import environment, results, roofs, suite, timing
from fastsr.bench.case import Case
from fastsr.bench.process import WorkerProcess
from fastsr.bench.process import environment as child_environment
from fastsr.bench.statistics import summary


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    options: suite.Options = field(default_factory=suite.Options)
    threads: int | None = None
    rounds: int = 6  # the fewest whose medians' extremes hold the true one with 95%
    round_seconds: float = 0.5
    build_timeout: float = 600.0
    round_timeout: float = 120.0
    runners: tuple[str, ...] = ()  # names to run; empty for all
    match: tuple[str, ...] = ()  # run the cases whose name holds one of these; empty for all
    pages: tuple[str, ...] = ("small",)  # on a CPU: what torch asks for large buffers, one measurement for each
    variables: Mapping[str, str] = field(default_factory=dict)  # set in the workers


Say = Callable[[str], None]

#: What `pages` puts into a worker's environment.
PAGES = {"small": {"THP_MEM_ALLOC_ENABLE": "0"}, "huge": {"THP_MEM_ALLOC_ENABLE": "1"}}


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    modules: Sequence[str],
    settings: Settings,
    say: Say = lambda _: None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure all cases of the modules; `keep` gets the report so far after every case, so that a killed run loses little.

    Its "complete" is True when the last case is done.
    """
    report: dict[str, Any] = {
        "format": results.FORMAT,
        "complete": False,
        "environment": environment.record(settings.threads),
        "settings": {
            **settings.options.record(),
            "threads": settings.threads,
            "rounds": settings.rounds,
            "round_seconds": settings.round_seconds,
            "pages": list(settings.pages),
            "runners": list(settings.runners),
            "match": list(settings.match),
            "variables": dict(settings.variables),
        },
        "roofs": {},
        "results": [],
    }
    device = settings.options.device
    if device == "cuda":
        report["roofs"] = roofs.measure_gpu(settings.options.dtypes)
    for module in modules:
        for case in suite.cases(module, settings.options):
            if settings.match and not any(text in case.name for text in settings.match):
                continue
            say(f"{case.name} on {device}")
            threads = case.threads or settings.threads
            before = roofs.measure_cpu(threads) if device == "cpu" else report["roofs"]
            rows = run_case(module, case, settings, say)
            if device == "cpu":
                # The machine's speed drifts: the roof of a case is the better of two measurements around it.
                before = roofs.better(before, roofs.measure_cpu(threads))
                if threads == settings.threads:
                    report["roofs"] = roofs.better(report["roofs"], before)
            report["results"] += results.rate(rows, before)
            if keep:
                keep(report)
    return {**report, "complete": True}


def run_case(module: str, case: Case, settings: Settings, say: Say = lambda _: None) -> list[dict[str, Any]]:
    """Rows of one case: one for each runner and timing mode, or one that says why there is no time."""
    options, device = settings.options, settings.options.device
    names = [name for name in case.runners if not settings.runners or name in settings.runners]
    left_out = [name for name in case.runners if name not in names]
    opening = {
        "module": module,
        "case": case.name,
        "options": options.record(),
        "threads": settings.threads,
        "round_seconds": settings.round_seconds,
    }
    with tempfile.TemporaryDirectory(prefix="fastsr-bench-") as folder:
        truth = str(Path(folder) / "truth.pt")
        with contextlib.closing(WorkerProcess(_variables(case, settings, "small"))) as preparer:
            answer = preparer.tell("open", settings.build_timeout, **opening)
            if answer["status"] == "ok":
                modes = timing.modes(device, case.bytes)
                rechecks = len(modes) + ("graph" in modes)  # a graph is judged when it is captured, too
                answer = preparer.tell("truth", settings.build_timeout, path=truth, rechecks=rechecks)
        if answer["status"] != "ok":
            failure = {"status": "failed", "reason": f"no truth to compare with: {answer['reason']}"}
            return [_row(case, name, "", failure) for name in names]
        rows = []
        for pages in settings.pages if device == "cpu" else ("small",):
            variables = _variables(case, settings, pages)
            with contextlib.ExitStack() as stack:
                # Started together: importing torch takes seconds.
                workers = {name: stack.enter_context(contextlib.closing(WorkerProcess(variables))) for name in names}
                found = _measure(case, workers, opening, truth, settings, say, modes if pages == "small" else modes[:1])
            if pages == "huge":
                found = [{**row, "mode": f"{row['mode']}, huge pages".removeprefix(", ")} for row in found]
            rows += found
            # Who is missing or wrong is so with any pages.
            names = [name for name in names if any("seconds" in row for row in found if row["runner"] == name)]
        return rows + [_row(case, name, "", {"status": "left out", "reason": "not among the runners asked for"}) for name in left_out]


def _variables(case: Case, settings: Settings, pages: str) -> dict[str, str]:
    asked = PAGES[pages] if case.device == "cpu" else {}
    return child_environment(case.threads or settings.threads, {**settings.variables, **asked})


def _measure(
    case: Case,
    workers: dict[str, WorkerProcess],
    opening: dict[str, Any],
    truth: str,
    settings: Settings,
    say: Say,
    modes: Sequence[str],
) -> list[dict[str, Any]]:
    built: dict[str, dict[str, Any]] = {}
    rows = []
    for name, worker in workers.items():
        answer = worker.tell("open", settings.build_timeout, **opening)
        if answer["status"] == "ok":
            answer = worker.tell("build", settings.build_timeout, runner=name, truth=truth)
        if answer["status"] == "ok":
            built[name] = answer
        else:
            say(f"  {name}: {answer['status']}: {answer['reason']}")
            rows.append(_row(case, name, "", answer))
    for mode in modes:
        if mode == "graph":
            for name in list(built):
                answer = workers[name].tell("capture", settings.build_timeout, truth=truth)
                if answer["status"] != "ok":
                    say(f"  {name}, as a graph: {answer['status']}: {answer['reason']}")
                    rows.append(_row(case, name, mode, answer))
                    del built[name]
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in built}
        order = list(built)
        for number in range(settings.rounds):
            for name in order[number % len(order) :] + order[: number % len(order)] if order else []:
                answer = workers[name].tell(
                    "round", settings.round_timeout, mode=mode, iterations=built[name]["iterations"]
                )
                if answer["status"] == "ok":
                    rounds[name].append(answer)
        for name in list(built):
            answer = workers[name].tell("recheck", settings.round_timeout, truth=truth, mode=mode)
            if answer["status"] != "ok":
                say(f"  {name}: {answer['status']}: {answer['reason']}")
                rows.append(_row(case, name, mode, answer))
                del built[name]
                continue
            rows.append(_row(case, name, mode, {**built[name], **_timed(rounds[name])}))
    return rows


def _timed(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    samples = [answer["samples"] for answer in rounds]
    faults = {kind: sum(answer["faults"][kind] for answer in rounds) / len(rounds) for kind in rounds[0]["faults"]}
    return {"seconds": summary(samples), "samples": samples, "faults": faults}


def _row(case: Case, runner: str, mode: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "suite": case.suite,
        "subject": case.subject,
        "case": case.name,
        "device": case.device,
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "flops": case.flops,
        "bytes": case.bytes,
        "runner": runner,
        "mode": mode,
        **found,
    }
