"""Millions of rows through the compiled code search, every index compared with the truth of tests/vq_cases.py.

    python benchmarks/soak_vq.py                    10 million rows; --rows N for more; an interrupted run goes on where it was
    python benchmarks/soak_vq.py --eager            the error rates of plain PyTorch's formulas, as the table in the docs

A cycle is some 200,000 rows over all distributions, shapes, dtypes and metrics, from seeds of its own. All go through the best instruction
set; every tenth goes through the others too. The record is written after each cycle.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from fastsr import _native, atomic, ops  # noqa: E402
from fastsr.bench import environment  # noqa: E402
from tests import vq_cases  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "soak-vq-cpu.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (*vq_cases.SHAPES, (8192, 256), (16384, 32), (2048, 512), (8192, 64))
CYCLE_ROWS = 200_000
#: Instruction sets with a search of their own.
ISAS = ("avx512", "avx2", "portable")


def run_cycle(record: dict[str, Any], cycle: int, isa: str) -> None:
    """Search all problems of a cycle on `isa` and add what was found to the record."""
    with _native.use_cpu_isa(isa):
        for problem in vq_cases.problems(CYCLE_ROWS, DTYPES, SHAPES):
            problem = dataclasses.replace(problem, seed=problem.seed + 100_000 * cycle)
            x, codes = problem.tensors()
            counters = torch.zeros(2, dtype=torch.int64)
            torch.set_num_threads(1 + cycle % 3)
            found = ops.vq_nearest(x, codes, metric=problem.metric, rescored=counters, backend="compiled")
            torch.set_num_threads(1)  # the truth is many small steps, which a second thread only holds up on a busy machine
            wrong = int((found != vq_cases.true_indices(x, codes, problem.cosine)).sum())
            if wrong:
                record["failures"].append(f"{isa}, seed {problem.seed}: {problem}: {wrong} wrong")
            kind = record["distributions"].setdefault(
                problem.distribution, dict.fromkeys(("rows", "wrong", "among_candidates", "with_all"), 0)
            )
            for key, value in zip(kind, (problem.n, wrong, *counters.tolist()), strict=True):
                kind[key] += value
            record["rows"][isa] = record["rows"].get(isa, 0) + problem.n
            record["wrong"] += wrong


def soak(rows: int, path: Path) -> int:
    """Run cycles until the best instruction set has seen `rows` rows; 0 if no index was wrong."""
    isas = [isa for isa in ISAS if isa in _native.cpu_isas()]
    record = json.loads(path.read_text()) if path.exists() else {"cycles": 0, "rows": {}, "wrong": 0, "seconds": 0.0}
    record.setdefault("failures", [])
    record.setdefault("distributions", {})
    while record["rows"].get(isas[0], 0) < rows:
        start, cycle = time.monotonic(), record["cycles"]
        for isa in isas if cycle % 10 == 0 else isas[:1]:
            run_cycle(record, cycle, isa)
        record["cycles"] += 1
        record["seconds"] = round(record["seconds"] + time.monotonic() - start, 1)
        record["environment"] = environment.record()
        with atomic.atomic_file(path) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")
        print(f"\rsoak: {record['rows'][isas[0]]:,} rows, {record['wrong']} wrong, {record['seconds']:.0f} s", end="", flush=True)
    print(f"\nsoak: {record['wrong']} wrong indices in {sum(record['rows'].values()):,} rows; {path}")
    print("\n".join(record["failures"][:20]))
    return 1 if record["wrong"] else 0


def eager_table(rows: int = 4096, shape: tuple[int, int] = (1024, 64)) -> None:
    """Print the share of wrong rows of each plain formula, and of ours, as a Markdown table."""
    kinds = ("gaussian", "kmeans", "uniform_init", "offset_10", "offset_1000", "small", "integers", "duplicates", "nan_codes")
    formulas = {**vq_cases.EAGER_FORMULAS, "`fastsr.ops.vq_nearest`": lambda x, codes: ops.vq_nearest(x, codes)}
    print("| dtype | formula | " + " | ".join(kinds) + " |\n|---|---|" + "---|" * len(kinds))
    for dtype in (torch.float32, torch.bfloat16):
        for name, search in formulas.items():
            shares = []
            for kind in kinds:
                x, codes = vq_cases.Problem(kind, rows, *shape, dtype, seed=5).tensors()
                share = (search(x, codes) != vq_cases.true_indices(x, codes)).double().mean().item()
                shares.append("0" if share == 0 else f"{share:.2%}")
            print(f"| {str(dtype)[6:]} | {name} | " + " | ".join(shares) + " |")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="on the best instruction set (default: %(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="JSON to go on with (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="print the table of error rates instead")
    args = parser.parse_args(argv)
    if args.eager:
        eager_table()
        return 0
    if _native.missing:
        print(f"soak: {_native.missing}", file=sys.stderr)
        return 2
    return soak(args.rows, args.record)


if __name__ == "__main__":
    raise SystemExit(main())
