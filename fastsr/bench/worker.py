"""The process of one runner: builds it, puts it through the gate, and times a round whenever it is told to.

Commands arrive on standard input and answers leave on the file descriptor that its argument names, one JSON object a line each.
Standard output and error are the runner's own and belong to its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastsr.backends import BackendUnavailable
from fastsr.bench import gate, suite, timing
from fastsr.bench.case import Call, Case, Inputs, Tensor, Unavailable

#: Input sets are drawn until they hold more than this (or twice a GPU's L2), within these numbers of sets.
ROTATED_BYTES = 64 << 20
FEWEST_SETS, MOST_SETS = 2, 8
MOST_ITERATIONS = 100


class Fresh:
    """New numbers for any set at the price of a copy: the drawn ones, each time shifted cyclically by another amount.

    Images move along height and width, rows among themselves: both stay what they were drawn as. No shift comes twice before all
    have come, and they jump, so that neighbours have little in common. On a CPU numpy copies, in this thread alone: torch's own
    threads would go on spinning, and hold up runners that have other threads.
    """

    def __init__(self, drawn: Inputs) -> None:
        self._drawn, self._count = [_raw(t) for t in drawn], 0

    def renew(self, *sets: Inputs) -> None:
        """Put new numbers into the tensors of each set."""
        for inputs in sets:
            self._count += 1
            torch.autograd.graph.increment_version(inputs)  # numpy's writing is not seen otherwise
            for mine, drawn in zip(map(_raw, inputs), self._drawn, strict=True):
                dims = (2, 3) if mine.ndim == 4 else (0,)[: mine.ndim]
                shift_into(mine, drawn, list(zip(dims, shift([mine.shape[d] for d in dims], self._count), strict=True)))


def _raw(t: Tensor) -> Any:
    """The same memory as an array of numpy's, which has no bfloat16; of a GPU as it is."""
    if t.device.type != "cpu":
        return t
    return (t.view(torch.int16) if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


def shift(sizes: list[int], number: int) -> list[int]:
    """The shift with this number along dimensions of these sizes: a walk through all of them in steps of 0.6 of the whole."""
    total = max(math.prod(sizes), 1)
    step = next(s for s in range(max(1, int(0.6 * total)), total + 2) if math.gcd(s, total) == 1)
    place, found = number * step % total, []
    for size in reversed(sizes):
        found.append(place % max(size, 1))
        place //= max(size, 1)
    return found[::-1]


def shift_into(to: Any, source: Any, shifts: list[tuple[int, int]]) -> None:
    """`to` = source rolled by (dimension, amount), tensors or arrays, without a temporary that would change what the allocator has."""
    if not shifts:
        to[...] = source
        return
    (dim, by), *rest = shifts
    kept = source.shape[dim] - by
    for start, first, length in ((by, 0, kept), (0, kept, by)):
        place, origin = ((slice(None),) * dim + (slice(begin, begin + length),) for begin in (start, first))
        shift_into(to[place], source[origin], rest)


class Worker:
    """One case and one runner."""

    def __init__(self, module: str, case: str, options: dict[str, Any], threads: int | None, round_seconds: float) -> None:
        self.case: Case = suite.find(module, case, suite.Options(**{**options, "dtypes": tuple(options["dtypes"])}))
        if threads := self.case.threads or threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True  # as trainers set it; without a GPU it does nothing
        self.round_seconds = round_seconds
        self.call: Call | None = None
        self.sets: list[Inputs] = []
        self.graph: timing.Graph | None = None
        self.rounds = self.rechecks = 0

    def truth(self, path: str, rechecks: int) -> dict[str, Any]:
        """Compute what the gate compares with, before the clock and in so many judgements after it."""
        gate.prepare(self.case, Path(path), (*gate.SEEDS, *(gate.seed_after(n) for n in range(rechecks))))
        return {}

    def build(self, runner: str, truth: str) -> dict[str, Any]:
        """Build the runner, judge it, draw its inputs, warm up, and say how long a call takes."""
        self.runner = self.case.runners[runner]
        dtype = getattr(torch, self.case.dtype)
        before, start = timing.held_memory(self.case.device), time.perf_counter()
        self.call = self.runner.build(gate.draw_state(self.case, dtype))
        verdict = gate.judge(self.case, self.runner, self.call, Path(truth))
        built = time.perf_counter() - start
        held = timing.held_memory(self.case.device) - before
        if not verdict.passed:
            return {"status": "wrong", "reason": verdict.reason, "gate": verdict.record()}
        self.sets = self._draw_sets()
        peak = timing.peak_memory(lambda: self._run(self.sets[0]), self.case.device)
        launches = timing.launches(lambda: self._run(self.sets[0]), self.case.device)
        seconds = self._estimate()
        return {
            "status": "ok",
            "gate": verdict.record(),
            "build_seconds": built,
            "held_bytes": max(0, held),
            "peak_bytes": peak,
            "launches": launches,
            "input_sets": len(self.sets),
            "iterations": self._iterations(seconds),
        }

    def round(self, mode: str, iterations: int) -> dict[str, Any]:
        """Time one round on fresh numbers, after a call that is not timed: other runners had the machine in between."""
        assert self.call is not None
        fresh = Fresh(self._draw(1000 + self.rounds))
        self.rounds += 1
        self._run(self.sets[0])
        fresh.renew(*self.sets)
        samples: list[float]
        sets = self.sets[:1] if mode == "warm" else self.sets
        with timing.page_faults() as faults:
            if mode == "graph":
                assert self.graph is not None
                replays = max(1, iterations // len(self.sets))  # a replay is a call for every set
                samples = self.graph.times(replays, functools.partial(fresh.renew, *self.sets))
            elif self.case.device == "cpu":
                samples = timing.wall(self.call, sets, iterations, fresh.renew, cold=mode == "cold")
            else:
                samples = timing.events(self.call, sets, iterations, fresh.renew, cold=mode == "cold")
        if self.case.device == "cuda":
            torch.cuda.empty_cache()  # the other runners' processes share the GPU's memory
        return {"status": "ok", "samples": samples, "faults": {name: count / iterations for name, count in faults.items()}}

    def capture(self, truth: str) -> dict[str, Any]:
        """Capture the calls in a CUDA graph, and judge what its replay answers."""
        assert self.call is not None
        self.graph = timing.Graph(self.call, self.sets)
        return self.recheck(truth, "graph")

    def recheck(self, truth: str, mode: str) -> dict[str, Any]:
        """Judge again after timing, in the timed storages and on numbers that this process has not seen: a runner that answers
        from memory of earlier calls fails here."""
        assert self.call is not None
        call = self.call
        if mode == "graph":
            graph = self.graph
            assert graph is not None
            order = {inputs[0].data_ptr(): index for index, inputs in enumerate(self.sets)}

            def call(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
                graph.replay()
                return graph.answers[order[inputs[0].data_ptr()]]

        verdict = gate.judge(self.case, self.runner, call, Path(truth), (gate.seed_after(self.rechecks),), self.sets)
        self.rechecks += 1
        return {"status": "ok" if verdict.passed else "wrong", "reason": verdict.reason, "gate": verdict.record()}

    def _draw_sets(self) -> list[Inputs]:
        wanted = ROTATED_BYTES
        if self.case.device == "cuda":
            wanted = 2 * timing.l2_bytes()
        sets = [self._draw(0)]
        size = sum(t.numel() * t.element_size() for t in sets[0])
        count = min(MOST_SETS, max(FEWEST_SETS, -(-wanted // max(size, 1))))
        return sets + [self._draw(seed) for seed in range(1, count)]

    def _draw(self, seed: int) -> Inputs:
        return gate.draw_for(self.case, self.runner, seed)

    def _run(self, inputs: Inputs) -> None:
        assert self.call is not None
        self.call(*inputs)
        if self.case.device == "cuda":
            torch.cuda.synchronize()

    def _estimate(self) -> float:
        """Seconds of a call, from the last of a few."""
        seconds, start = 0.0, time.perf_counter()
        for i in range(10):
            before = time.perf_counter()
            self._run(self.sets[i % len(self.sets)])
            seconds = time.perf_counter() - before
            if time.perf_counter() - start > self.round_seconds:
                break
        return seconds

    def _iterations(self, seconds: float) -> int:
        return int(min(MOST_ITERATIONS, max(1, self.round_seconds / max(seconds, 1e-7))))


def end_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies, however it dies: no worker goes on measuring for nobody."""
    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def main(argv: list[str]) -> int:
    """Serve commands until standard input ends."""
    end_with_parent()
    reply_to = os.fdopen(int(argv[0]), "w", buffering=1)
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        answer: dict[str, Any]
        try:
            if action == "open":
                worker = Worker(**command)
                answer = {}
            else:
                method: Callable[..., dict[str, Any]] = getattr(worker, action)
                answer = method(**command)
        except (Unavailable, BackendUnavailable) as error:
            answer = {"status": "unavailable", "reason": str(error)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            text = str(error).strip().split("\n")[0]
            answer = {"status": "failed", "reason": f"{type(error).__name__}: {text}"}
        gc.collect()
        reply_to.write(json.dumps({"status": "ok", **answer}) + "\n")
    return 0
