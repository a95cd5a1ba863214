"""What `fastsr.fuse_` gives in other people's networks: docs/fuse.md's table, from benchmarks/results/fuse-cpu.json.

    python benchmarks/fuse_table.py measure     each network in a process of its own; needs their packages (tests/peers/requirements.txt);
                                                names may follow: only those are measured again
    python benchmarks/fuse_table.py             write the table again from the file

Random weights, published widths and depths. The model with its own code and fused run in turns; medians. Memory is that of a training step.
Blocks that `fuse_` would fuse for training alone, or not at all, because they gain nothing are fused by naming the backend, and marked.
"""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "fuse-cpu.json"
PAGE = ROOT / "docs" / "fuse.md"
BEGIN, END = "<!-- table: python benchmarks/fuse_table.py -->", "<!-- end of table -->"

#: Inputs of the table: large enough that time is spent in the blocks, small enough for a laptop.
SHAPES = {
    "ESRGAN x4": (1, 3, 48, 48),
    "ESRGAN+": (1, 3, 48, 48),
    "BasicSR's RRDBNet x4": (1, 3, 48, 48),
    "SwinIR, real-world": (1, 3, 32, 32),
    "HAT": (1, 3, 32, 32),
    "DRCT": (1, 3, 32, 32),
    "GRL": (1, 3, 32, 32),
    "OmniSR": (1, 3, 64, 64),
    "MM-RealSR": (1, 3, 48, 48),
    "SAFMN": (1, 3, 96, 96),
    "RCAN x4": (1, 3, 48, 48),
    "RealCUGAN x2": (1, 3, 128, 128),
    "RestoreFormer's quantiser": (4, 256, 32, 32),
    "CodeFormer's quantiser": (4, 256, 32, 32),
    "FeMaSR's quantiser": (4, 512, 32, 32),
    "squeeze-and-excitation alone": (4, 64, 128, 128),
    "seresnet18": (4, 3, 128, 128),
    "mobilenetv3_small_050": (4, 3, 128, 128),
    "regnety_002": (4, 3, 128, 128),
    "efficientnet_b0": (4, 3, 128, 128),
    "ese_vovnet19b_dw": (4, 3, 128, 128),
    "VectorQuantize": (4, 1024, 256),
    "VQModel": (1, 3, 32, 32),
}


#: How long a mode is measured, about; slow networks take longer.
SECONDS = 4.0


def declare_torchvision() -> Any:
    """What tests/peers/conftest.py does, where torchvision was built for another torch."""
    import torch

    probe = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if not probe.returncode or "does not exist" not in probe.stderr:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def measure_one(package: str, name: str) -> dict[str, Any]:
    """One network, in this process."""
    import torch

    import fastsr
    from fastsr.fusion.costs import IN_TRAINING, NO_GAIN
    from tests.peers.networks import NETWORKS

    library = declare_torchvision()
    torch.set_num_threads(int(os.environ.get("FASTSR_TEST_THREADS", "2")))
    model = NETWORKS[package][name].built("full").eval()
    x = torch.randn(SHAPES[name]).abs()
    for m in model.modules():
        if isinstance(m, torch.nn.Embedding):  # codes as far apart as trained ones: else rounding alone chooses between them
            torch.nn.init.normal_(m.weight)
    report = fastsr.fuse_(model)
    left = {row.kind for row in report.rows if row.reason in (IN_TRAINING, NO_GAIN)}
    if left:
        report = fastsr.fuse_(fastsr.unfuse_(model), backend="compiled")
    kinds = Counter(row.kind for row in report.rows if row.fused)
    found: dict[str, Any] = {"package": package, "name": name, "shape": x.shape, "kinds": kinds, "by_name": sorted(left & {*kinds})}
    for mode in ("inference", "training"):
        model.train(mode == "training").requires_grad_(mode == "training")  # memory is measured where there are gradients
        m = report.measure(x, training=mode == "training", repeats=1)
        repeats = max(2, min(25, int(SECONDS / sum(m.seconds))))  # short ones often: their medians are to tell a few percent
        m = report.measure(x, training=mode == "training", repeats=repeats)
        found[mode] = {"seconds": m.seconds, "repeats": repeats, "difference": m.difference, "scale": m.scale}
        if m.memory is not None:
            found["saved"], found["peak"] = ([getattr(memory, what) for memory in m.memory] for what in ("saved", "peak"))
    del library
    return found


def measure(only: list[str]) -> None:
    """All networks whose package is there, or only some."""
    from fastsr.bench import environment, results
    from tests.peers.networks import NETWORKS

    rows = json.loads(RESULTS.read_text())["rows"] if only else []
    for package, networks in NETWORKS.items():
        for name in networks:
            if name not in SHAPES or (only and name not in only):
                continue
            run = subprocess.run([sys.executable, __file__, "one", package, name], capture_output=True, text=True)
            if run.returncode:
                print(f"{name}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            found, here = json.loads(run.stdout.splitlines()[-1]), environment.record(2)
            found["machine"] = results.machine(here)
            rows = [row for row in rows if row["name"] != name] + [found]
            print(name, found["inference"]["seconds"], found["training"]["seconds"], flush=True)
            rows.sort(key=lambda row: list(SHAPES).index(row["name"]))
            RESULTS.write_text(json.dumps({"environment": here, "rows": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    machines = sorted({row["machine"].split("; ")[0] for row in rows})
    head = "| network | input | fused | forward, ms | training step, ms | saved for backward, MB | largest difference | machine |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" + " (by name)" * (kind in row["by_name"]) for kind, count in row["kinds"].items())
        times = [_change([s * 1e3 for s in row[mode]["seconds"]]) for mode in ("inference", "training")]
        saved = _change([b / 1e6 for b in row["saved"]]) if "saved" in row else ""
        found = row["inference"]
        relative = "not measured" if found["difference"] is None else f"{found['difference'] / max(found['scale'], 1e-30):.0e}"
        shape, letter = "x".join(map(str, row["shape"])), string.ascii_uppercase[machines.index(row["machine"].split("; ")[0])]
        lines.append(f"| {row['name']} | {shape} | {kinds} | {' | '.join(times)} | {saved} | {relative} | {letter} |")
    named = "; ".join(f"{letter}: {machine}" for letter, machine in zip(string.ascii_uppercase, machines, strict=False))
    return "\n".join([*lines, "", f"Machines: {named}."])


def _change(pair: list[float]) -> str:
    before, after = pair
    ratio = f" ({before / after:.2f}x)" if after else ""
    return f"{before:.3g} → {after:.3g}{ratio}"


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measure_one(*sys.argv[2:4])))
        return
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:])
    text, rows = PAGE.read_text(), json.loads(RESULTS.read_text())["rows"]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
