"""The process of one runner: builds it, puts it through the gate, and times a round whenever it is told to.

    python -m fastsr.bench.worker REPLY_FD

Commands arrive on standard input and answers leave on the given file descriptor, one JSON object a line each.
Standard output and error are the runner's own and belong to its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
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


class Worker:
    """One case and one runner."""

    def __init__(self, module: str, case: str, options: dict[str, Any], threads: int | None, round_seconds: float) -> None:
        self.case: Case = suite.find(module, case, suite.Options(**{**options, "dtypes": tuple(options["dtypes"])}))
        if threads := self.case.threads or threads:
            torch.set_num_threads(threads)
        self.round_seconds = round_seconds
        self.call: Call | None = None
        self.sets: list[Inputs] = []
        self.graph: timing.Graph | None = None

    def truth(self, path: str) -> dict[str, Any]:
        """Compute what the gate compares with."""
        gate.prepare(self.case, Path(path))
        return {}

    def build(self, runner: str, truth: str) -> dict[str, Any]:
        """Build the runner, judge it, draw its inputs, warm up, and say how long a call takes."""
        self.runner = self.case.runners[runner]
        dtype = getattr(torch, self.case.dtype)
        start = time.perf_counter()
        self.call = self.runner.build(gate.draw_state(self.case, dtype))
        verdict = gate.judge(self.case, self.call, Path(truth), channels_last=self.runner.channels_last)
        built = time.perf_counter() - start
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
            "peak_bytes": peak,
            "launches": launches,
            "input_sets": len(self.sets),
            "iterations": self._iterations(seconds),
        }

    def round(self, number: int, mode: str, iterations: int) -> dict[str, Any]:
        """Time one round on fresh numbers."""
        assert self.call is not None
        self._redraw(number)
        samples: list[float]
        if iterations > 1:
            self._run(self.sets[0])
        with timing.page_faults() as faults:
            if mode == "graph":
                assert self.graph is not None
                samples = self.graph.times(max(1, iterations // len(self.sets)))  # a replay is a call for every set
            elif self.case.device == "cpu":
                samples = timing.wall(self.call, self.sets if mode == "wall" else self.sets[:1], iterations)
            else:
                samples = timing.events(self.call, self.sets, iterations, cold=mode == "cold")
        if self.case.device == "cuda":
            torch.cuda.empty_cache()  # the other runners' processes share the GPU's memory
        return {"status": "ok", "samples": samples, "faults": {name: count / iterations for name, count in faults.items()}}

    def capture(self, truth: str) -> dict[str, Any]:
        """Capture the calls in a CUDA graph, and judge what its replay answers."""
        assert self.call is not None
        self.graph = timing.Graph(self.call, self.sets)
        return self.recheck(truth, "graph")

    def recheck(self, truth: str, mode: str) -> dict[str, Any]:
        """Judge again after timing, in the timed storages: a runner that answers from memory of earlier calls fails here."""
        assert self.call is not None
        call = self.call
        if mode == "graph":
            graph = self.graph
            assert graph is not None
            order = {inputs[0].data_ptr(): index for index, inputs in enumerate(self.sets)}

            def call(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
                graph.replay()
                return graph.answers[order[inputs[0].data_ptr()]]

        verdict = gate.judge(self.case, call, Path(truth), self.sets, self.runner.channels_last)
        # Whoever keeps an old answer must not find the judged numbers here next time.
        for number in range(len(self.sets)):
            self._redraw(2000 + number)
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
        return gate.draw_inputs(self.case, seed, getattr(torch, self.case.dtype), self.runner.channels_last)

    def _redraw(self, number: int) -> None:
        """Put new numbers into one of the sets: no two rounds see the same inputs."""
        for mine, drawn in zip(self.sets[number % len(self.sets)], self._draw(1000 + number), strict=True):
            mine.copy_(drawn)

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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
