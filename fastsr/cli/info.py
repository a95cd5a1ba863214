"""`fastsr info`: versions, the native library, the GPU, Triton, and which backend `auto` takes for each operator."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

ABOUT = "Tell what is installed here, what the native library was built for, and which backend runs each operator and why."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("info", help="what is installed here, and which backend runs each operator", description=ABOUT)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `fastsr info` tells, as plain JSON."""
    import torch

    from fastsr import _native, backends
    from fastsr._version import __version__
    from fastsr.bench import environment
    from fastsr.weights import KNOWN

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "fastsr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": environment.version_of("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {**environment.cpu(), "threads": torch.get_num_threads(), "huge_pages": environment.huge_pages()},
        "native": {"missing": _native.missing, **_native.build, "isa": _native.cpu_isa()},
        "cuda": {"torch": torch.version.cuda, "hip": torch.version.hip, "gpu": environment.gpu()},
        "triton_state": _triton_state(devices),
        "default_backend": backends.default_backend(),
        "operators": [_choice(op, device, dtype) for op in _operators() for device in devices for dtype in _dtypes()],
        "weights": {name: str(known.path() or known.remedy) for name, known in KNOWN.items()},
    }


def _operators() -> list[str]:
    from fastsr import backends, ops

    assert ops  # importing the operators fills the table
    return sorted(backends.TABLE)


def _dtypes() -> list[Any]:
    import torch

    return [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _triton_state(devices: list[str]) -> str:
    from fastsr import backends

    if missing := backends.triton_missing():
        return missing
    if "cuda" in devices:
        return "runs on the GPU"
    if backends.triton_interpreted():
        return "runs on the CPU in its interpreter, for tests"
    return "installed; no GPU here to run on"


def _choice(op: str, device: str, dtype: Any) -> dict[str, Any]:
    """What `auto` takes; where that depends on the tensors, what it may take first."""
    from fastsr import backends

    rules = backends.considered(op, device, dtype)
    usable = [rule for rule, missing in rules if missing is None]
    return {
        "op": op,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": usable[-1].backend,
        "why": usable[-1].reason,
        "for_some_shapes": [{"backend": rule.backend, "why": rule.reason} for rule in usable[:-1]],
        "cannot_run": [{"backend": rule.backend, "why": missing} for rule, missing in rules if missing is not None],
    }


def text(found: dict[str, Any]) -> str:
    """The same for reading."""
    cpu, native, gpu = found["cpu"], found["native"], found["cuda"]["gpu"]
    versions = f"torch {found['torch']}, triton {found['triton'] or 'missing'}, Python {found['python']}, {found['system']}"
    lines = [
        f"fastsr   {found['fastsr']}, {versions}",
        f"CPU      {cpu['model']}: {cpu['cores']} cores, {cpu['threads']} threads, transparent huge pages {cpu['huge_pages'] or 'unknown'}",
    ]
    if native["missing"]:
        lines.append(f"library  missing: {native['missing']}")
    else:
        cuda = f"CUDA {native['cuda']} ({native.get('cuda_archs')})" if native.get("cuda") else "no CUDA"
        lines += [
            f"library  {native.get('version')}, built by {native.get('compiler')}, {cuda}",
            f"         CPU instruction set in use: {native['isa']}; available: {', '.join(native.get('cpu_isas', ()))}",
        ]
    toolkit = found["cuda"]["torch"] or found["cuda"]["hip"]
    built = f"for CUDA or ROCm {toolkit}" if toolkit else "without CUDA"
    lines += [
        f"GPU      {gpu['name']}, compute capability {gpu['capability']}" if gpu else f"GPU      none (torch was built {built})",
        f"Triton   {found['triton_state']}",
        "",
        f"backends ('auto' stands for {found['default_backend']!r})",
    ]
    width = max(len(row["op"]) for row in found["operators"])
    for row in found["operators"]:
        lines.append(f"  {row['op']:{width}}  {row['device']:4}  {row['dtype']:8}  {row['backend']:9}  {row['why']}")
        lines += [f"  {'':{width}}  for some shapes   {other['backend']:9}  {other['why']}" for other in row["for_some_shapes"]]
    cannot = sorted({(row["device"], other["backend"], other["why"]) for row in found["operators"] for other in row["cannot_run"]})
    lines += [f"  not on {device}: {backend}: {why}" for device, backend, why in cannot]
    lines += ["", "weights", *(f"  {name:24}  {where}" for name, where in found["weights"].items())]
    return "\n".join(lines)
