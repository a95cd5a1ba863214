"""The plots: speed against each rival, the roofline, and curves along sizes, as PNG files in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastsr.bench.report.rows import Row, best_rival, groups, is_first, is_ours, median, ours, title

Runs = Mapping[str, Mapping[str, Any]]

OURS, RIVALS = "#d1495b", ("#30638e", "#edae49", "#00798c", "#7a5195", "#8d99ae", "#4a4e69", "#2f9e44", "#a0522d")
MOST_BARS = 40
WIDE_RATIO = 5  # beyond, the axis is linear to 2 and logarithmic from there

#: A curve per runner: along which size, of what.
AXES = {
    "pixels": "LR pixels",
    "depth": "3x3 convolutions in the network",
    "k": "codes K",
    "rows": "vectors N",
    "d": "dimensions D",
    "threads": "threads",
    "batch": "images in a batch",
}


def draw(runs: Runs) -> dict[str, bytes]:
    """Name -> PNG, of the plots for which the runs have data; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    pictures: dict[str, bytes] = {}
    if bars := _ratios(runs):
        pictures["ratios"] = bars
    for name, run in runs.items():
        if roofline := _roofline(name, run):
            pictures[f"roofline-{name}"] = roofline
    for axis in AXES:
        along = {name: [row for row in run["results"] if row["sizes"].get("axis") == axis and is_first(row)] for name, run in runs.items()}
        if along := {name: rows for name, rows in along.items() if rows}:
            pictures[f"time-against-{axis}"] = _curves(along, axis, "ms", lambda row: median(row) * 1e3)
            pictures[f"memory-against-{axis}"] = _curves(along, axis, "peak MB", lambda row: max(row["peak_bytes"], 1e3) / 1e6)
    return pictures


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _log_log(axes: Any) -> None:
    """Logarithmic axes that are labelled at round numbers only where they span more than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())


def _ratios(runs: Runs) -> bytes | None:
    """For every case of every run, how many times faster than eager channels-last: ours, and the best of the others. The points of
    curves have plots of their own, unless there is nothing else."""
    curves = all(row["suite"] == "scaling" for run in runs.values() for row in run["results"])
    bars = []
    for name, run in runs.items():
        for key, group in groups(run["results"]).items():
            mine, rival = ours(group), best_rival(group)
            if group[0]["suite"] == "scaling" and not curves:
                continue
            if mine is not None and mine.get("speedup") and rival is not None and rival.get("speedup"):
                label = title(*key) + (f" [{name}]" if len(runs) > 1 else "")
                bars.append((label, mine["speedup"], rival["speedup"], rival["runner"]))
    if not bars:
        return None
    # Of too many the least favourable are shown.
    heading = f"the {MOST_BARS} least favourable of {len(bars)} measurements" if len(bars) > MOST_BARS else ""
    bars = sorted(bars, key=lambda bar: bar[1] / bar[2])[:MOST_BARS]
    figure = _figure(9, 1.2 + 0.42 * len(bars))
    axes = figure.add_subplot()
    for y, (_, mine, rival, name) in enumerate(bars):
        axes.barh(y + 0.19, mine, 0.38, color=OURS, label="fastsr" if y == 0 else None)
        axes.barh(y - 0.19, rival, 0.38, color=RIVALS[0], label="best rival" if y == 0 else None)
        axes.text(rival, y - 0.19, f" {name}", va="center", fontsize=7)
        axes.text(mine, y + 0.19, f" {mine:.2f}x", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    axes.set_xlabel("times faster than eager channels-last")
    if max(bar[1] for bar in bars) > WIDE_RATIO:
        axes.set_xscale("symlog", linthresh=2, linscale=2)
        axes.set_xticks(ticks := [0, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
    axes.set_title(heading, fontsize=9)
    axes.margins(x=0.15, y=0.01)
    axes.legend(fontsize=8, loc="lower right")
    return _png(figure)


def _roofline(name: str, run: Mapping[str, Any]) -> bytes | None:
    """Rate against operations per byte, under the roofs measured in the run; a ring for each runner of each case."""
    roofs, rows = run["roofs"], [row for row in run["results"] if "seconds" in row and row["flops"] and row["bytes"]]
    kinds = [key for key in roofs if key.startswith("arithmetic") and key.split()[1] in {row["dtype"] for row in rows}]
    if not rows or not kinds or not roofs.get("copy", {}).get("value"):
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 3, max(intensities) * 3
    for key, style in zip(kinds, ("-", "--", ":"), strict=False):
        top, copy = roofs[key]["value"], roofs["copy"]["value"]
        ridge = top / copy
        points = sorted({low, min(max(ridge, low), high), high})
        axes.plot(points, [min(top, copy * p) for p in points], "k" + style, linewidth=1, label=f"{key} roof, {top:.0f} GFLOP/s")
    seen: dict[str, str] = {}
    for row in rows:
        runner = row["runner"]
        colour = OURS if is_ours(row) else seen.setdefault(runner, RIVALS[len(seen) % len(RIVALS)])
        label = runner if runner not in axes.get_legend_handles_labels()[1] else None
        marker = "o" if row["dtype"] == "float32" else "s"
        axes.plot(row["flops"] / row["bytes"], row["flops"] / median(row) / 1e9, marker, color=colour, markersize=5, label=label, alpha=0.8)
    _log_log(axes)
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s", title=f"{name} (round: float32, square: other)")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def _curves(along: Mapping[str, Sequence[Row]], axis: str, unit: str, value: Callable[[Row], float]) -> bytes:
    """One panel for each run, subject and dtype, one line for each runner."""
    panels: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = {}
    for name, rows in along.items():
        for row in rows:
            lines = panels.setdefault((row["subject"], row["dtype"], *([f"[{name}]"] if len(along) > 1 else [])), {})
            lines.setdefault(row["runner"], []).append((float(row["sizes"][axis]), value(row)))
    figure = _figure(5.5 * len(panels), 4)
    for place, (heading, lines) in enumerate(sorted(panels.items()), 1):
        axes = figure.add_subplot(1, len(panels), place)
        for number, (runner, points) in enumerate(sorted(lines.items())):
            mine = is_ours({"runner": runner})
            xs, ys = zip(*sorted(points), strict=True)
            colour = OURS if mine and runner == "auto" else RIVALS[number % len(RIVALS)]
            axes.plot(xs, ys, "o-", color=colour, linewidth=2 if mine else 1, markersize=4, label=runner)
        _log_log(axes)
        axes.set(xlabel=AXES[axis], ylabel=unit, title=" ".join(heading))
        axes.legend(fontsize=7)
    return _png(figure)
