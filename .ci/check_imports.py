"""Imports run downwards only: every package of fastsr may import just the packages named here."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BASE = {"_version", "_native", "backends"}
NETWORKS = {*BASE, "ops", "nn"}

ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "atomic": set(),
    "_native": {"_version"},
    "backends": {"_version", "_native"},
    "kernels": BASE,
    "ops": {"kernels"},
    "nn": {*BASE, "ops"},
    "models": NETWORKS,
    "weights": {*NETWORKS, "models", "atomic"},
    "memory": NETWORKS,
    "graphs": {"backends"},
    "fusion": {*NETWORKS, "kernels", "memory"},
    "upscaling": {*NETWORKS, "models", "weights", "atomic"},
    "bench": {*NETWORKS, "atomic", "kernels", "models", "weights", "memory", "fusion", "graphs", "upscaling"},
    "cli": {*NETWORKS, "models", "weights", "memory", "fusion", "upscaling", "bench"},
}


def imported(tree: ast.AST) -> set[str]:
    """The first-level names below `fastsr` that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastsr.")}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = node.module.split(".")
            if parts == ["fastsr"]:
                names |= {alias.name for alias in node.names}
            elif parts[0] == "fastsr":
                names.add(parts[1])
        elif isinstance(node, ast.ImportFrom) and node.level:
            names.add("a relative import")
    return names


def main() -> int:
    faults = []
    for path in sorted((ROOT / "fastsr").rglob("*.py")):
        parts = path.relative_to(ROOT / "fastsr").with_suffix("").parts
        room = parts[0]
        if room in ("__init__", "__main__"):
            continue
        if room not in ALLOWED:
            faults.append(f"{path.relative_to(ROOT)}: no rule for fastsr.{room} in .ci/check_imports.py")
            continue
        wrong = {n for n in imported(ast.parse(path.read_text())) if n != "__version__"} - ALLOWED[room] - {room}
        faults += [f"{path.relative_to(ROOT)}: fastsr.{room} may not import {name}" for name in sorted(wrong)]
    print("\n".join(faults) if faults else "imports run downwards")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
