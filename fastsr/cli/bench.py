"""`fastsr bench`: measure the ops and networks here, against plain PyTorch and other peers."""

from __future__ import annotations

import argparse
from typing import Any

from fastsr.bench import command


def add_parser(subparsers: Any) -> None:
    """Add this sub-command."""
    parser = subparsers.add_parser("bench", help="measure ops and networks on this machine", description=__doc__)
    command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run it; the return value is the exit status."""
    return command.run(args)
