"""What the steps of `benchmarks/gpu.py` share: a result file that grows, device times, a compiled probe."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastsr.bench import results
from fastsr.bench.statistics import median
from fastsr.bench.steps import NOTHING_TO_DO

NATIVE = Path(__file__).resolve().parent.parent / "native"
CSRC = NATIVE.parent.parent / "csrc"

#: How nvcc compiles a probe. Its kernels may be the library's own, whose headers take torch's for their error messages.
PROBE_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}", f"-I{Path(torch.__file__).parent / 'include'}")


class Result(dict[str, Any]):
    """A step's findings, written to the step's file at every `save`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def save(self, **findings: Any) -> None:
        """Add findings and write everything so far."""
        self.update(findings)
        results.write_json(self._path, dict(self))


def arguments(*positional: str) -> tuple[Result, argparse.Namespace]:
    """Parse `--json F` and the positional words of a step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    for name in positional:
        parser.add_argument(name)
    args = parser.parse_args()
    return Result(args.json), args


def nothing_to_do(reason: str) -> NoReturn:
    """End the step: what it measures does not exist yet, or not here."""
    print(reason, flush=True)
    sys.exit(NOTHING_TO_DO)


def milliseconds(run: Callable[[], Any], repeats: int = 15, warm_up: int = 3, most_seconds: float = 8.0) -> dict[str, Any]:
    """Device time of `run` by events: median and all samples; fewer repeats where one takes long."""
    times: list[float] = []
    for i in range(warm_up + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= warm_up:
            times.append(start.elapsed_time(end))
        if len(times) >= 3 and sum(times) > most_seconds * 1e3:
            break
    return {"ms": median(times), "samples_ms": times}


def hopper_forms() -> Iterator[str]:
    """Two rounds of a loop, "" and " hopper", on a GPU of compute capability 9.0: the second with the kernels that only it can run."""
    for value, name in (("0", ""), ("1", " hopper"))[: 1 + (torch.cuda.get_device_capability() == (9, 0))]:
        os.environ["FASTSR_HOPPER"] = value
        yield name
    os.environ["FASTSR_HOPPER"] = "0"


def build_probe(name: str) -> Path:
    """Compile `benchmarks/native/<name>.cu` for the GPU that is here, into a fresh folder."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    major, minor = torch.cuda.get_device_capability()
    number = f"{major}{minor}{'a' if major >= 9 else ''}"
    program = Path(tempfile.mkdtemp(prefix="fastsr-probe-")) / name
    source = NATIVE / f"{name}.cu"
    command = [nvcc, *PROBE_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-1500:]}")
    return program


def short(error: BaseException) -> str:
    """An exception in one line."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]
