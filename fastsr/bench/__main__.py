"""`python -m fastsr.bench`: the same as `fastsr bench`."""

from __future__ import annotations

import argparse

from fastsr.bench import command

parser = argparse.ArgumentParser(prog="python -m fastsr.bench", description="Measure fastsr against plain PyTorch.")
command.add_arguments(parser)
raise SystemExit(command.run(parser.parse_args()))
