"""The benchmark harness: `fastsr bench`, or from Python

    from fastsr.bench import Options, Settings, run, select
    report = run(select(["conv3x3"]), Settings(Options(device="cpu", sizes="quick"), threads=2))
"""

from fastsr.bench.driver import Settings, run
from fastsr.bench.suite import Options, select

__all__ = ["Options", "Settings", "run", "select"]
