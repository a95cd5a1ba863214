"""Who holds how many bytes, when: a log of every storage that operators make, from its first tensor to its last.

Works on real tensors and on fake ones alike, so that what is predicted and what is measured are counted by the same code.
Scratch inside an operator (a kernel's thread-local buffers, oneDNN's reorders) is no tensor and is not seen.
"""

from __future__ import annotations

import bisect
import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsr.memory.flops import flops_of

#: Operators whose result is another copy of their first argument.
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}


class Tracker(TorchDispatchMode):
    """Logs allocation and release of the storages made inside its `with` block; counts floating-point operations too.

    Attributes:
        sizes: bytes of each storage, by the number that it was given.
        log: (storage, +1 or -1, place) in the order of events; `place` is what `place` was then.
        flops: floating-point operations at each place.
        saved: the storages that autograd saved at each place, see `watch_saved`.
        flops_at_save: the operations at each place before the last such moment.
        random: how many operators drew random numbers.
        place: where the program is now, see `enter`.
    """

    def __init__(self, ours: Iterable[Tensor] = ()) -> None:
        """`ours`: parameters and buffers, which are no activations; neither are copies of them."""
        super().__init__()
        self.sizes: list[int] = []
        self.log: list[tuple[int, int, int]] = []
        self.flops: dict[int, int] = {}
        self.place = 0
        self.saved: dict[int, set[int]] = {}
        self.flops_at_save: dict[int, int] = {}
        self.random = 0
        self._left_out: set[int] = set()
        self._copied_from: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # address of a living storage -> its number
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._marks: list[int] = []
        self._places: list[int] = []
        self._probe = torch.zeros(1, requires_grad=True)  # a node made from it tells how many were made before
        self._ours = {self._probe.untyped_storage()._cdata} | {t.untyped_storage()._cdata for t in ours}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._follow()
        self.flops[self.place] = self.flops.get(self.place, 0) + flops_of(func, args, result)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random += 1
        source = args[0] if func in _COPIES else None
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._see(t, source)
        return result

    def _see(self, t: Tensor, source: Tensor | None) -> None:
        storage = t.untyped_storage()
        address = storage._cdata
        if address in self._numbers or address in self._ours or storage.nbytes() == 0:
            return
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.log.append((number, 1, self.place))
        self._numbers[address] = number
        self._watched[number] = weakref.ref(storage, lambda _: self._release(number, address))
        if source is not None:
            came_from = source.untyped_storage()._cdata
            if came_from in self._ours or self._numbers.get(came_from) in self._left_out:
                self._left_out.add(number)
            elif came_from in self._numbers:
                self._copied_from[number] = self._numbers[came_from]

    def _release(self, number: int, address: int) -> None:
        self.log.append((number, -1, self.place))
        del self._watched[number]
        if self._numbers.get(address) == number:
            del self._numbers[address]

    def enter(self, place: int) -> None:
        """From here on forward works at `place`; the backward of what it makes there is counted there too."""
        self._marks.append(self._probe.view_as(self._probe).grad_fn._sequence_nr())  # type: ignore[union-attr]
        self._places.append(self.place)
        self.place = place

    def _follow(self) -> None:
        """In backward, the place where the running node was made in forward."""
        node = torch._C._current_autograd_node() if self._marks else None
        if node is not None and (number := node._sequence_nr()) <= self._marks[-1]:
            self.place = self._places[bisect.bisect_left(self._marks, number)]

    @contextlib.contextmanager
    def watch_saved(self) -> Iterator[None]:
        """In here, every storage that autograd saves is noted in `saved`, at its place."""

        def pack(t: Tensor) -> Tensor:
            number = self.number(t)
            if number is not None:
                self.saved.setdefault(self.place, set()).add(number)
                self.flops_at_save[self.place] = self.flops.get(self.place, 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield

    def held(self, ends: Iterable[Tensor]) -> set[int]:
        """What autograd holds after forward: all that is alive, but an end (the input, an output) only where it was saved as well."""
        saved: set[int] = set().union(*self.saved.values())
        return self.alive() - ({self.number(t) for t in ends} - saved)

    def number(self, t: Tensor) -> int | None:
        """The number of t's storage; None if it was not made in here."""
        return self._numbers.get(t.untyped_storage()._cdata)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These storages, and what was copied into them, are no activations (the parameters' gradients)."""
        for t in tensors:
            number = self.number(t)
            while number is not None:
                self._left_out.add(number)
                number = self._copied_from.get(number)

    def alive(self) -> set[int]:
        """The activations that are alive now."""
        return set(self._watched) - self._left_out

    def bytes(self, storages: Iterable[int]) -> int:
        return sum(self.sizes[number] for number in set(storages) - self._left_out)

    def peaks(self, start: int = 0, stop: int | None = None) -> dict[int, int]:
        """The most activation bytes alive at each place, over a part of the log."""
        live = 0
        most: dict[int, int] = {}
        for when, (number, change, place) in enumerate(self.log[:stop]):
            if number not in self._left_out:
                live += change * self.sizes[number]
            if when >= start:
                most[place] = max(most.get(place, 0), live)
        return most
