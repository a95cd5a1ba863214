"""What the pages and plots ask of a report's rows: who is ours, who is the best of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastsr.backends import BACKENDS

Row = Mapping[str, Any]


def is_ours(row: Row) -> bool:
    """A runner of this package: a backend's name, or one with a remark after a comma ("auto, given buffers")."""
    return row["runner"].split(",")[0] in BACKENDS


def is_plain(row: Row) -> bool:
    """Eager PyTorch in any layout or precision, and this package's own plain PyTorch."""
    return row["runner"].startswith("eager") or row["runner"].split(",")[0] == "reference"


def is_timed(row: Row) -> bool:
    """Has samples: rounds, each a list of seconds, one of them at least not empty."""
    rounds = row.get("samples")
    good = isinstance(rounds, list) and all(isinstance(r, list) and all(isinstance(s, (int, float)) for s in r) for r in rounds)
    return good and any(rounds or [])


def is_first(row: Row) -> bool:
    """Timed in the first of its case's modes: fresh inputs and small pages, on a GPU a cold cache."""
    return "seconds" in row and row["mode"] == ("cold" if row["device"] == "cuda" else "wall")


def median(row: Row) -> float:
    """Seconds."""
    return float(row["seconds"]["median"])


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The timed rows of one run by case and mode, fastest first; rows of two runs are no rivals of each other."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            found.setdefault((row["case"], row["mode"]), []).append(row)
    return {key: sorted(group, key=median) for key, group in found.items()}


def ours(group: Iterable[Row]) -> Row | None:
    """What a user gets without asking for anything: "auto", else the fastest of ours."""
    mine = [row for row in group if is_ours(row) and not is_plain(row)]
    return min(mine, key=lambda row: (row["runner"] != "auto", median(row)), default=None)


def best_rival(group: Iterable[Row]) -> Row | None:
    """The fastest runner that is not this package's."""
    return min((row for row in group if not is_ours(row)), key=median, default=None)


def losses(found: Iterable[Iterable[Row]]) -> list[tuple[Row, Row]]:
    """(ours, rival) for every rival that is faster in one of the groups, the largest loss first."""
    pairs = []
    for group in found:
        mine = ours(group)
        pairs += [(mine, row) for row in group if mine is not None and not is_ours(row) and median(row) < median(mine)]
    return sorted(pairs, key=lambda pair: median(pair[1]) / median(pair[0]))


def title(case: str, mode: str) -> str:
    """What a plot or a heading calls a group."""
    return case if mode in ("", "wall") else f"{case}, {mode}"
