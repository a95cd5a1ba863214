"""Watches for regressions: a few quick cases against the least speed-up over eager channels-last that each has had.

    python benchmarks/watch.py        (make watch)

Prints a warning for every case whose ratio fell below its floor in `benchmarks/floors.json`. Time never makes it fail: a
busy machine is no regression. A wrong answer does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastsr.bench import driver, suite
from fastsr.bench.case import BASELINE

FLOORS = Path(__file__).with_name("floors.json")


def main() -> int:
    floors = json.loads(FLOORS.read_text())
    settings = driver.Settings(
        options=suite.Options("cpu", tuple(floors["dtypes"]), "quick"),
        threads=driver.cores(),
        rounds=3,
        round_seconds=0.15,
        runners=tuple({BASELINE, *(floor["runner"] for floor in floors["cases"].values())}),
        match=tuple(floors["cases"]),
    )
    report = driver.run(suite.select(floors["modules"]), settings)
    rows = {(row["case"], row["runner"]): row for row in report["results"] if row["mode"] in ("", "wall")}
    wrong = 0
    for case, floor in floors["cases"].items():
        row = rows.get((case, floor["runner"]))
        if row is None or row.get("speedup") is None:
            status = "missing" if row is None else f"{row['status']}: {row.get('reason', 'no time of eager channels-last')}"
            wrong += row is not None and row["status"] == "wrong"
            print(f"watch: WARNING {case}: {floor['runner']} {status}")
        elif row["speedup"] < floor["ratio"]:
            print(f"watch: WARNING {case}: {row['speedup']:.2f}x eager channels-last, the floor is {floor['ratio']}x")
        else:
            print(f"watch: {case}: {row['speedup']:.2f}x eager channels-last (floor {floor['ratio']}x)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
