"""What a wrapper tells its user: what was recorded, how often it was replayed, and why a call ran the model's own code."""

from __future__ import annotations

from collections import Counter


class Ledger:
    """Counts of replays and of reasons; both in the order in which they first came up."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()

    def report(self, graphs: int, max_graphs: int) -> str:
        """All of it as text."""
        lines = [f"{graphs} of at most {max_graphs} graphs recorded"]
        lines += [f"  {count} x replayed: {what}" for what, count in self.replays.items()]
        total = sum(self.reasons.values())
        lines += [f"{total} calls ran the model's own code{':' if total else ''}"]
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)


def in_short(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
