"""What a training step of RCAN and RRDBNet holds in activations under each policy: predicted, measured, and how long it takes.

    python benchmarks/memory_table.py bytes         policy x (predicted, measured) at 2x3x48x48, and bytes for each LR pixel
    python benchmarks/memory_table.py times         seconds of a step for each policy, the policies in turn
    python benchmarks/memory_table.py steps         RCAN within 1 GiB beside RCAN without a plan: losses, gradients to the last bit
    python benchmarks/memory_table.py table         the record as the tables of docs/memory.md

Each part fills its own place in benchmarks/results/memory-cpu.json, with the environment that it ran in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from training import patches, picture_files  # noqa: E402

from fastsr import memory  # noqa: E402
from fastsr.bench import environment  # noqa: E402
from fastsr.bench.results import write_json  # noqa: E402
from fastsr.memory.planning import POLICIES, Planner, Policy  # noqa: E402
from fastsr.memory.sizes import format_bytes  # noqa: E402
from fastsr.models import RCAN, RRDBNet  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "memory-cpu.json"
NETWORKS: dict[str, Callable[[], nn.Module]] = {"RCAN": lambda: RCAN(3, 3), "RRDBNet": lambda: RRDBNet(3, 3)}
SHAPE = (16, 3, 48, 48)
#: Of the table: bytes go with the batch, and so does nearly all of the time.
SMALL = (2, 3, 48, 48)
BUDGET = "1GiB"
#: Slopes are taken between pictures of these sides.
SIDES = (48, 64)


def measured() -> list[dict[str, Any]]:
    """Bytes of a step, predicted and measured."""
    rows = []
    for name, make in NETWORKS.items():
        model, x = make(), torch.rand(SMALL)
        planner = Planner(model, SMALL, torch.float32)
        for policy in POLICIES:
            plan = planner.policy(policy)
            with plan.apply(model):
                found = memory.measure(model, x)
            row = {
                "network": name, "policy": policy, "input": SMALL, "recompute": plan.recompute / plan.step,
                "predicted": {"saved": plan.memory.saved, "peak": plan.memory.peak}, "measured": {"saved": found.saved, "peak": found.peak},
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return rows


def slopes() -> list[dict[str, Any]]:
    """Bytes for each LR pixel: the slope between two sizes, so that what does not grow with the picture drops out."""
    rows = []
    for name, make in NETWORKS.items():
        for dtype in (torch.float32, torch.bfloat16):
            small, large = (Planner(make(), (1, 3, side, side), dtype) for side in SIDES)
            for policy in POLICIES:
                a, b = small.policy(policy).memory, large.policy(policy).memory
                pixels = SIDES[1] ** 2 - SIDES[0] ** 2
                row = {"network": name, "dtype": str(dtype)[6:], "policy": policy}
                rows.append(row | {"saved": (b.saved - a.saved) / pixels, "peak": (b.peak - a.peak) / pixels})
    return rows


def timed(rounds: int) -> list[dict[str, Any]]:
    """Seconds of forward and backward; a round takes each policy once."""
    rows = []
    for name, make in NETWORKS.items():
        model, x = make(), torch.rand(SMALL)
        planner = Planner(model, SMALL, torch.float32)
        plans = {policy: planner.policy(policy) for policy in POLICIES}
        seconds: dict[Policy, list[float]] = {policy: [] for policy in POLICIES}
        model(x).mean().backward()
        for _ in range(rounds):
            for policy, plan in plans.items():
                with plan.apply(model):
                    start = time.perf_counter()
                    model(x).mean().backward()
                    seconds[policy].append(time.perf_counter() - start)
        rows += [{"network": name, "policy": policy, "input": SMALL, "seconds": samples} for policy, samples in seconds.items()]
    return rows


def steps(count: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """The whole RCAN, `count` steps of Adam on patches of photographs; the same steps within the budget and without a plan."""
    args = argparse.Namespace(upscale=4, patch=SHAPE[2], batch=SHAPE[0], seed=0)
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in picture_files(None)]
    pictures = [picture for picture in pictures if min(picture.shape[:2]) >= args.patch * args.upscale]
    torch.manual_seed(0)
    within, free = RCAN(3, 3), RCAN(3, 3)
    free.load_state_dict(within.state_dict())
    plan = memory.plan(within, SHAPE, budget=BUDGET)
    plan.apply(within)
    found = memory.measure(within, patches(pictures, args, 0)[0])
    result: dict[str, Any] = {
        "budget": BUDGET, "plan": str(plan), "predicted_peak": plan.memory.peak, "measured_peak": found.peak,
        "recompute": plan.recompute / plan.step, "input": SHAPE,
        "losses": [], "losses_without_plan": [], "gradients_equal": [], "seconds": [], "seconds_without_plan": [],
    }  # fmt: skip
    runs = [(model, torch.optim.Adam(model.parameters(), lr=1e-4), suffix) for model, suffix in ((within, ""), (free, "_without_plan"))]
    for step in range(count):
        small, large = patches(pictures, args, step)
        for model, optimizer, suffix in runs:
            start = time.perf_counter()
            loss = F.l1_loss(model(small), large)
            optimizer.zero_grad()
            loss.backward()
            result["seconds" + suffix].append(time.perf_counter() - start)
            result["losses" + suffix].append(loss.item())
        pairs = zip(within.parameters(), free.parameters(), strict=True)
        result["gradients_equal"].append(all(torch.equal(a.grad, b.grad) for a, b in pairs if a.requires_grad))
        for _, optimizer, _ in runs:
            optimizer.step()
        print(step, {key: value[-1] for key, value in result.items() if isinstance(value, list)}, flush=True)
        keep(result)


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    seconds = {(row["network"], row["policy"]): statistics.median(row["seconds"]) for row in record.get("times", {}).get("rows", [])}
    heads = ("", "policy", "saved, predicted", "measured", "peak, predicted", "measured", "computed twice", "time")[: 8 if seconds else 7]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in record["bytes"]["rows"]:
        name, policy = row["network"], row["policy"]
        sizes = [format_bytes(row[how][what]) for what in ("saved", "peak") for how in ("predicted", "measured")]
        cells = [name, f"`{policy}`", *sizes, f"{row['recompute']:.1%}"]
        if seconds:
            cells.append(f"{seconds[name, policy] / seconds[name, 'none']:.2f}x")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| KB for each LR pixel | policy | saved, float32 | bfloat16 | peak, float32 | bfloat16 |", "|---|---|---|---|---|---|"]
    by_dtype = {(row["network"], row["policy"], row["dtype"]): row for row in record["bytes"]["slopes"]}
    for name in NETWORKS:
        for policy in POLICIES:
            rows = [by_dtype[name, policy, dtype] for dtype in ("float32", "bfloat16")]
            cells = [name, f"`{policy}`", *(f"{row[what] / 1000:.1f}" for what in ("saved", "peak") for row in rows)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("bytes", "times", "steps", "table"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of times (default: 3)")
    parser.add_argument("--steps", type=int, default=4, help="of training (default: 4)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if args.part == "table":
        print(table(record))
        return
    where = environment.record(args.threads)

    def keep(part: dict[str, Any]) -> None:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}  # another part may have been written meanwhile
        write_json(RECORD, record | {args.part: {"environment": where} | part})

    if args.part == "bytes":
        keep({"rows": measured(), "slopes": slopes()})
    elif args.part == "times":
        keep({"rows": timed(args.rounds)})
    else:
        steps(args.steps, keep)


if __name__ == "__main__":
    main()
