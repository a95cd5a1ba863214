"""`fastsr models`: the weights that have names, which of them are installed, and how to get the others."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="weights that have names, and how to get them", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def collect() -> list[dict[str, Any]]:
    """Every known name, with its path or None, and how to get it."""
    from fastsr.weights import KNOWN

    return [{"name": k.name, "about": k.about, "path": str(k.path() or "") or None, "get": k.remedy} for k in KNOWN.values()]


def text(found: list[dict[str, Any]]) -> str:
    """The same for reading."""
    lines = []
    for row in found:
        lines.append(f"{row['name']:24}  {row['about']}")
        lines.append(f"{'':24}  {'installed: ' + row['path'] if row['path'] else 'not installed: ' + row['get']}")
    paths = "Any file of an RRDBNet or RCAN is taken by its path too: .pth, .safetensors, and for RRDBNet ncnn's .param and .bin."
    return "\n".join([*lines, "", paths])
