"""The same cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

Sizes are the quick ones unless FASTSR_BENCH_SIZES=full; FASTSR_BENCH_DEVICE and FASTSR_BENCH_DTYPE choose the rest. All
runners share this one process here, so an allocator or cache that one of them warmed serves the next: the figures to
quote are those of `fastsr bench`, which gives each its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsr
from fastsr.backends import BackendUnavailable
from fastsr.bench import gate, suite
from fastsr.bench.case import Case, Unavailable
from fastsr.bench.report.rows import is_ours

DEVICE = os.environ.get("FASTSR_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
DTYPES = tuple(os.environ.get("FASTSR_BENCH_DTYPE", "float32").split(","))
OPTIONS = suite.Options(DEVICE, DTYPES, os.environ.get("FASTSR_BENCH_SIZES", "quick"))
CASES = [case for module in suite.select(["all"]) for case in suite.cases(module, OPTIONS)]
MOST_ROUNDS = 10


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The gate's file of a case, computed once."""
    folder, known = tmp_path_factory.mktemp("truth"), {}

    def of(case: Case) -> Path:
        if case.name not in known:
            known[case.name] = folder / f"{len(known)}.pt"
            gate.prepare(case, known[case.name])
        return known[case.name]

    return of


@pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"{c.name}-{n}") for c in CASES for n in c.runners])
def test_case(benchmark: Any, truth: Any, case: Case, name: str) -> None:
    """Judge the runner, then time it."""
    runner, dtype = case.runners[name], getattr(torch, case.dtype)
    with fastsr.set_backend("auto"):  # a model's builder sets the process's backend; the next runner must not inherit it
        try:
            call = runner.build(gate.draw_state(case, dtype))
            verdict = gate.judge(case, runner, call, truth(case))
        except (Unavailable, BackendUnavailable) as error:
            pytest.skip(str(error))
        if not verdict.passed and not is_ours({"runner": name}):
            pytest.skip(f"never timed, since wrong: {verdict.reason}")
        assert verdict.passed, verdict.reason
        sets = [gate.draw_for(case, runner, seed) for seed in range(2)]
        turn = 0

        def fresh() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
            nonlocal turn
            turn += 1
            return sets[turn % len(sets)], {}

        def run(*inputs: torch.Tensor) -> None:
            call(*inputs)
            if case.device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark.extra_info.update(gflop=case.flops / 1e9, error=verdict.error, allowed=verdict.allowed)
        benchmark.pedantic(run, setup=fresh, rounds=MOST_ROUNDS, warmup_rounds=2)
