"""One command for a machine with an NVIDIA GPU and no network: build, prove, measure, and write one JSON.

    python benchmarks/gpu.py [--budget-minutes 25] [--only STEP ...] [--json F] [--resume]

It uses the Python, torch and nvcc that are there. Steps run in order of value, each in its own process with a time limit;
what fails, hangs or does not fit into the budget is recorded as such, and the next step runs. The JSON is rewritten after
every step. `--resume` keeps the steps that succeeded in F and runs the others.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STEPS = ROOT / "benchmarks" / "gpu_steps"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
NEEDED = "this command needs a machine with an NVIDIA GPU and a CUDA build of torch"
RIVALS = ("float32", "float32 channels_last", "amp", "amp channels_last", "compile default", "compile max-autotune")


def steps(device: str = "cuda") -> list[Any]:
    """All steps, the most valuable first."""
    from fastsr.bench.steps import JSON, Step

    python = sys.executable
    here = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    cuda_tests = {**here, "FASTSR_TEST_DEVICE": device}

    def script(name: str, title: str, limit: float, file: str, *words: str, **more: Any) -> Step:
        return Step(name, (python, str(STEPS / file), "--json", JSON, *words), limit, title, here, **more)

    def bench(name: str, title: str, limit: float, *words: str) -> Step:
        return Step(name, (python, "-m", "fastsr.bench", "--device", device, "--json", JSON, *words), limit, title, here)

    sanitizer = toolkit_program("compute-sanitizer")
    pytest = (python, "-m", "pytest", "-vv", "--tb=short", "--maxfail=50")
    convolving = [f"tests/ops/test_{op}.py" for op in ("conv3x3", "dense_block", "rcab")]
    triton = ("--runner", "triton", "--runner", "eager channels-last")
    dtypes = ("--dtype", "bfloat16", "--dtype", "float32", "--dtype", "float16")
    build = {**here, "FASTSR_CUDA": "1", "MAX_JOBS": os.environ.get("MAX_JOBS", str(min(16, os.cpu_count() or 1)))}
    ordered = [
        script("environment", "machine, versions, tools", 60, "surroundings.py"),
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 420, "the native library for this GPU", build),
        script("limits", "copy, matrix product, L2 reads, graph nodes, clusters", 150, "limits.py"),
        script("wgmma", "shifted descriptors in a swizzled tile; rate with M = 64", 90, "wgmma.py"),
        script("hopper", "kernels behind FASTSR_HOPPER=1: exact, and how fast", 120, "hopper.py"),
        script("conv", "wgmma's convolutions: exact, which tile, against mma.sync and cuDNN", 330, "conv.py"),
        Step("tests of wgmma", (*pytest, *convolving), 240, "convolutions with FASTSR_HOPPER=1", cuda_tests | {"FASTSR_HOPPER": "1"}),
        script("graphs", "CUDA graph capture and replay, side streams, every op", 120, "graphs.py"),
        script("graphed", "fastsr.cuda_graph on whole networks: exact, and how fast", 120, "graphed.py"),
        Step("tests of graphs", (*pytest, "tests/graphs"), 120, "fastsr.cuda_graph with real graphs", cuda_tests),
        script("attention", "channel attention: two passes, one by clusters, eager", 120, "attention.py"),
        script("sums", "sums over the rows of each code: sorted, by atomics", 90, "sums.py"),
        # Verbose: the last name in the output is the test that hung.
        Step("tests of ops", (*pytest, "tests/ops"), 420, "every op, compiled and Triton, on the GPU", cuda_tests),
        bench("triton", "every Triton kernel: right, and how fast", 300, "ops", "--quick", *triton, *dtypes),
        script("strided_out", "does cudnn_convolution.out keep a strided output", 45, "strided_out.py"),
        script("cudnn", "cuDNN's rate for the 3x3 shapes", 90, "cudnn.py"),
    ]
    ordered += [
        Step(
            f"sanitizer {tool}",
            (sanitizer, "--tool", tool, "--error-exitcode", "99", python, str(STEPS / "every_op.py"), "--json", JSON),
            150,
            f"compute-sanitizer {tool} on every op",
            # Without the caching allocator each tensor is its own allocation, and overruns leave it.
            {**here, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            must_say=("RACECHECK SUMMARY" if tool == "racecheck" else "ERROR SUMMARY", "every op ran"),
        )
        for tool in SANITIZERS
    ]
    ordered.append(bench("benchmarks quick", "every case, few small sizes", 240, "all", "--quick"))
    pairs = [(net, rival) for rival in RIVALS for net in ("rrdbnet", "rcan")]
    eager = [pair for pair in pairs if not pair[1].startswith("compile")]
    ordered += [script(f"rival {net} {rival}", "eager forward and training step", 90, "rivals.py", net, rival) for net, rival in eager]
    ordered.append(bench("benchmarks models", "networks, all sizes", 300, "models"))
    ordered.append(Step("tests of the rest", (*pytest, "tests", "--ignore=tests/ops"), 480, "the rest of the suite on the GPU", cuda_tests))
    ordered.append(bench("benchmarks ops", "ops, all sizes", 600, "ops"))
    compiled = [pair for pair in pairs if pair not in eager]
    ordered += [script(f"rival {net} {rival}", "torch.compile", 420, "rivals.py", net, rival) for net, rival in compiled]
    ordered.append(script("search_bound", "violations of the code search's bound", 60, "search_bound.py"))
    return ordered


def toolkit_program(name: str) -> str:
    """A program of the CUDA toolkit: from the PATH, or beside the nvcc that is there; its bare name if it is nowhere."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(0, str(Path(nvcc).resolve().parent.parent))
    places = [os.environ.get("PATH", ""), *(str(Path(home, folder)) for home in homes if home for folder in ("bin", name))]
    return shutil.which(name, path=os.pathsep.join(places)) or name


def no_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"no GPU can be used here: this Python ({sys.executable}) has no torch ({error})"
    if torch.version.cuda is None:
        return f"no GPU can be used here: torch {torch.__version__} is a build without CUDA; {NEEDED}"
    if not torch.cuda.is_available():
        return f"no GPU is here: torch {torch.__version__} sees none; {NEEDED}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 0 if each of them succeeded or had nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--budget-minutes", type=float, default=25, help="stop starting steps after this time; default 25")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only steps whose name begins with one of these")
    parser.add_argument("--json", metavar="F", type=Path, help="default: benchmarks/results/gpu-<GPU>-<date>.json")
    parser.add_argument("--resume", action="store_true", help="keep the steps that succeeded in --json F, and run the others")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{step.name:36} {step.title}" for step in steps()))
        return 0
    if args.resume and not args.json:
        parser.error("--resume needs --json F")
    if reason := no_gpu():
        print(f"gpu: {reason}", file=sys.stderr)
        return 2

    from fastsr.bench import environment, results
    from fastsr.bench.steps import run_steps

    chosen = [step for step in steps() if not args.only or any(step.name.startswith(word) for word in args.only)]
    if not chosen:
        parser.error(f"no step begins with {' or '.join(args.only)}; there are: {', '.join(step.name for step in steps())}")
    gpu = environment.gpu() or {"name": "gpu"}
    slug = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = args.json or ROOT / "benchmarks" / "results" / f"gpu-{slug}-{stamp}.json"
    report: dict[str, Any] = {"format": results.FORMAT, "environment": environment.record(), "steps": {}}
    if args.resume and path.exists():
        import json

        report["steps"] = json.loads(path.read_text())["steps"]
        chosen = [step for step in chosen if report["steps"].get(step.name, {}).get("status") != "ok"]

    def keep(name: str, record: dict[str, Any]) -> None:
        report["steps"][name] = record
        results.write_json(path, report)

    run_steps(chosen, args.budget_minutes * 60, keep, say=lambda line: print(line, flush=True), folder=ROOT)
    rows = [(name, r["status"], f"{r.get('seconds', 0):.0f}", r.get("reason", "")[:90]) for name, r in report["steps"].items()]
    print(results.render(f"{gpu['name']}: {path}", ("step", "status", "s", "reason"), rows))
    return 0 if all(r["status"] in ("ok", "nothing to do") for r in report["steps"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
