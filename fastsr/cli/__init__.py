"""The `fastsr` command: `main` finds the sub-command; each lives in a file of its own.

A sub-command's file has `add_parser(subparsers)` and `run(args) -> int`. Only the one that is asked for is imported:
`upscale` sets environment variables that torch reads when it starts.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastsr._version import __version__

COMMANDS = {
    "info": "what is installed here, and which backend runs each operator",
    "upscale": "enlarge pictures",
    "models": "weights that have names, and how to get them",
    "bench": "measure operators and networks on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0 done, 1 an error (one line on stderr), 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fastsr", description="Super-resolution with fused operators.", add_help=True)
    parser.add_argument("--version", action="version", version=f"fastsr {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    asked = words[0] if words and words[0] in COMMANDS else None
    for name, about in COMMANDS.items():
        if name == asked:
            importlib.import_module(f"fastsr.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=about)
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # argparse has printed why
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return importlib.import_module(f"fastsr.cli.{args.command}").run(args)
    except KeyboardInterrupt:
        print("fastsr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastsr info | head`
        sys.stderr.close()
        return 1
    except (OSError, ValueError, RuntimeError, TypeError, FloatingPointError, MemoryError) as error:
        print(f"fastsr: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
