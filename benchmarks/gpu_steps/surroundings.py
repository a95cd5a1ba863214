"""Versions and tools of the machine, and how idle its GPU is."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

from fastsr.bench import environment
from fastsr.bench.cases.gpu_steps import common


def first_lines(*command: str) -> str:
    """What a command prints, or why it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    return (done.stdout + done.stderr).strip()[:2000]


result, _ = common.arguments()
result.save(environment=environment.record())
result.save(
    tools={name: shutil.which(name) for name in ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "g++", "ninja")},
    modules={name: importlib.util.find_spec(name) is not None for name in ("triton", "pybind11", "pytest", "rich", "hypothesis", "ninja")},
)
result.save(nvcc=first_lines("nvcc", "--version"), sanitizer=first_lines("compute-sanitizer", "--version"))
clocks = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,utilization.gpu,clocks_event_reasons.active"
result.save(state=first_lines("nvidia-smi", f"--query-gpu={clocks}", "--format=csv"))
