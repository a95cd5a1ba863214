"""What a dialect's file holds: a renaming to and from this package's own names, and the words that messages need."""

from __future__ import annotations

import re
from typing import Protocol

from torch import Tensor

Renaming = tuple[tuple[re.Pattern[str], str], ...]


class Dialect(Protocol):
    """A module in a family's folder."""

    NAME: str  # for `fastsr.save`
    ABOUT: str  # who writes it
    EXPECTED: str  # its keys

    def matches(self, state: dict[str, Tensor]) -> bool:
        """True if these keys are the dialect's."""

    def to_own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors by this package's names."""

    def from_own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The other way."""


def renamed(state: dict[str, Tensor], names: Renaming) -> dict[str, Tensor]:
    """At most one of the patterns matches at the start of a key; keys that none matches stay."""
    found = {}
    for key, tensor in state.items():
        for pattern, replacement in names:
            if pattern.match(key):
                key = pattern.sub(replacement, key, count=1)
                break
        found[key] = tensor
    return found
