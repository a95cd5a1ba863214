"""Violations of the code search's error bound on hardware."""

from __future__ import annotations

from fastsr import backends
from fastsr.bench.cases.gpu_steps import common

result, _ = common.arguments()
searches = [op for op in backends.TABLE if "search" in op or "nearest" in op]
result.save(ops=searches)
if not searches:
    common.nothing_to_do("no kernel yet: the package has no code search")
raise SystemExit(f"{searches[0]} exists, and this step does not measure it yet")
