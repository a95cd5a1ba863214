"""The one error of this package, and the words it is put in."""

from __future__ import annotations

from collections.abc import Iterable


class WeightsError(ValueError):
    """A file of weights is truncated, unsafe or unknown; the message says what was found and what was expected."""


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, each cut to a readable length, and how many there are."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown or "none"
