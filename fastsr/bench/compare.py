"""Two runs of the same cases: what became faster, what slower, and what the noise does not let one tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsr.bench.statistics import ratio_interval

#: Ratios this close to 1 are called equal however sure they are: another process or another day moves them as much.
NEGLIGIBLE = 0.02

HEADINGS = ("case", "runner", "before ms", "now ms", "before/now", "95% interval", "verdict")

Key = tuple[str, str, str]


def timed(report: Mapping[str, Any]) -> dict[Key, Mapping[str, Any]]:
    """The rows of a report that have a time, by case, runner and mode."""
    return {(row["case"], row["runner"], row["mode"]): row for row in report["results"] if "seconds" in row}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One object for each case, runner and mode that both runs timed.

    `ratio` is the old median over the new one, so that more than 1 is faster now; `interval` its 95% interval. The verdict is
    "faster" or "slower" if the whole interval lies more than 2% on that side of 1, else "same".
    """
    before, found = timed(old), []
    for key, row in timed(new).items():
        if key not in before:
            continue
        ratio = before[key]["seconds"]["median"] / row["seconds"]["median"]
        low, high = ratio_interval(before[key]["samples"], row["samples"])
        verdict = "faster" if low > 1 + NEGLIGIBLE else "slower" if high < 1 / (1 + NEGLIGIBLE) else "same"
        case, runner, mode = key
        found.append({
            "case": case, "runner": runner, "mode": mode, "before": before[key]["seconds"]["median"], "now": row["seconds"]["median"],
            "ratio": ratio, "interval": [low, high], "verdict": verdict,
        })  # fmt: skip
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What else changed between the runs: machine, versions, settings, and roofs more than 5% apart."""
    a, b = old["environment"], new["environment"]
    pairs = {
        "CPU": (a["cpu"]["model"], b["cpu"]["model"]),
        "cores": (a["cpu"]["cores"], b["cpu"]["cores"]),
        "GPU": ((a["gpu"] or {}).get("name"), (b["gpu"] or {}).get("name")),
        "threads": (a["threads"], b["threads"]),
        "huge pages": (a["huge_pages"], b["huge_pages"]),
        "instruction set": (a["native"]["isa"], b["native"]["isa"]),
        "pages": (old["settings"].get("pages"), new["settings"].get("pages")),
        "rounds": (old["settings"].get("rounds"), new["settings"].get("rounds")),
        "variables": (old["settings"]["variables"], new["settings"]["variables"]),
        **{name: (a["packages"].get(name), b["packages"].get(name)) for name in sorted({*a["packages"], *b["packages"]})},
    }
    lines = [f"{name}: {before} before, {now} now" for name, (before, now) in pairs.items() if before != now]
    for name in old["roofs"].keys() & new["roofs"].keys() - {"missing"}:
        before, now = old["roofs"][name]["value"], new["roofs"][name]["value"]
        if before and now and abs(now / before - 1) > 0.05:
            lines.append(f"roof {name}: {before:.0f} before, {now:.0f} {new['roofs'][name]['unit']} now")
    return lines


def cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    low, high = found["interval"]
    return (
        found["case"],
        " ".join(filter(None, (found["runner"], found["mode"]))),
        f"{found['before'] * 1e3:.3f}",
        f"{found['now'] * 1e3:.3f}",
        f"{found['ratio']:.2f}x",
        f"{low:.2f} .. {high:.2f}",
        found["verdict"],
    )
