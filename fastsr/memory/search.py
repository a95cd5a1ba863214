"""The cheapest way through a chain of places within a peak, and the smallest peak there is: dynamic programming.

At each place stands a choice: keep all, keep the input of its operators (flags at "input"), or begin a *run*, some modules of a
Sequential that keep the run's input alone and are computed once more when backward comes to them; inside a run, too, each place keeps
all or its input. What a choice needs depends on what is before it in two ways only: the bytes held so far, and whether the border
before it is among them. So

    cheapest(budget)   walks forward; its states are (place, border held?), each with all pairs (bytes held, cost) that
                       no other pair beats in both. A choice is dropped where bytes held + its own need exceed the budget.
    smallest()         walks backward: need(place, border held?) = min over choices of max(own need, bytes added + need after).

A run's inside is cheapest as a function of the bytes it may use: pairs (need, cost), from the run's last place backward, for all first
places in one pass. Both searches are exact for what the chain says.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastsr.memory.chain import Chain, Link, Place, Use

#: A Sequential, the first and the last module of a run of it, and the place after the run.
Run = tuple[str, int, int, int]

#: How a run may be computed again: bytes needed beyond its input, cost beside the forward's, for each place flags at "input"?
Inside = tuple[int, int, tuple[bool, ...]]


class Choice(NamedTuple):
    """Of one place (`run` is None): the flags at "input" or not; or of a run."""

    place: int
    input: bool = False
    run: Run | None = None
    inner: tuple[bool, ...] = ()  # for each place of the run: flags at "input"?


@dataclass(frozen=True)
class Allowed:
    """Which choices a search may take."""

    input: bool = True  # flags at "input", outside of runs
    inner_input: bool = True  # and inside
    runs: bool = True


class Step(NamedTuple):
    """What a choice adds to the held bytes and needs beyond those before it."""

    added: int
    right_held: bool
    need: int
    cost: int


def _step(place: Place, use: Use, left_held: bool, extra_cost: int) -> Step:
    left = 0 if left_held else place.border
    kept = left if use.saves_left else 0
    added, right_held = use.inside + kept, use.saves_right
    if place.same_border:
        right_held = left_held or use.saves_left or use.saves_right
        added += left if use.saves_right and not use.saves_left else 0
    need = max(use.forward + left, use.backward + kept)
    return Step(added, right_held, need, extra_cost)


class Search:
    """Searches in one chain."""

    def __init__(self, chain: Chain, allowed: Allowed = Allowed()) -> None:
        self.places, self.allowed = chain.places, allowed
        self.borders = [place.border for place in chain.places] + [0]
        self.starts: dict[int, list[Run]] = {}
        self.flops = [0, *itertools.accumulate(place.all.forward_flops for place in chain.places)]
        if allowed.runs:
            for name, links in chain.sequentials.items():
                for first, last in _runs(links):
                    self.starts.setdefault(links[first].first, []).append((name, first, last, links[last].stop))
        self._inside: dict[int, dict[int, list[Inside]]] = {}

    def _uses(self, p: int, inner: bool = False) -> Iterator[tuple[bool, Use, int]]:
        """(flags at "input"?, its numbers, operations it costs) at one place."""
        place = self.places[p]
        yield False, place.all, 0
        if place.input is not None and (self.allowed.inner_input if inner else self.allowed.input):
            more = place.input.forward_flops + place.input.backward_flops - place.all.forward_flops - place.all.backward_flops
            yield True, place.input, max(0, more)

    def _right_added(self, p: int, use: Use) -> int:
        """The border after a place, where the place saves it."""
        return self.borders[p + 1] if use.saves_right and not self.places[p].same_border else 0

    @functools.cache  # noqa: B019
    def steps(self, p: int, left_held: bool, inner: bool = False) -> list[tuple[bool, Step]]:
        """(flags at "input"?, what that adds and needs) at one place, whose left border is held already or not."""
        steps = []
        for flag, use, cost in self._uses(p, inner):
            step = _step(self.places[p], use, left_held, cost)
            steps.append((flag, step._replace(added=step.added + self._right_added(p, use))))
        return steps

    # Inside a run

    def _inner(self, first: int, stop: int) -> list[Inside]:
        """The ways through a run's places, each costlier and smaller than the one before."""
        if stop not in self._inside:
            self._inside[stop] = self._inside_before(stop)
        return self._inside[stop][first]

    def _inside_before(self, stop: int) -> dict[int, list[Inside]]:
        """`_inner` of all runs that end before place `stop`."""
        arriving = self.places[stop - 1].all.carried
        lowest = min(first for first, runs in self.starts.items() if any(run[3] == stop for run in runs))
        after: dict[bool, list[Inside]] = {held: [(0, 0, ())] for held in (False, True)}
        found = {}
        for p in range(stop - 1, lowest - 1, -1):
            place = self.places[p]
            here = {}
            for held in (False, True):
                options = []
                for flag, step in self.steps(p, held, True):
                    use = place.input if flag and place.input is not None else place.all
                    left = 0 if held else place.border
                    kept = left if use.saves_left else 0
                    need = max(use.fresh + left + arriving, use.backward + kept)
                    options += [(max(need, step.added + n), step.cost + c, (flag, *flags)) for n, c, flags in after[step.right_held]]
                here[held] = _undominated(options)
            after = here
            found[p] = here[True]
        return found

    def _run_steps(self, p: int, left_held: bool) -> Iterator[tuple[Run, int, int, list[Inside]]]:
        """(run, bytes it adds, its need in forward, its insides) of the runs that begin at a place."""
        for run in self.starts.get(p, ()):
            stop = run[3]
            added = 0 if left_held else self.places[p].border
            in_forward = max(self.places[q].all.forward + (self.places[q].border if q > p else 0) for q in range(p, stop))
            yield run, added, added + in_forward, self._inner(p, stop)

    def redone(self, first: int, stop: int) -> int:
        """Operations of a run's second forward, which ends when all that backward wants is there."""
        for p in range(stop - 1, first - 1, -1):
            until = self.places[p].all.flops_at_save
            if until is not None:
                return self.flops[p] - self.flops[first] + until
        return 0

    # The two searches

    def smallest(self) -> int:
        """The smallest peak that any choice has."""
        count = len(self.places)
        need = {(count, False): 0, (count, True): 0}
        for p in range(count - 1, -1, -1):
            for held in (False, True):
                best = [max(step.need, step.added + need[p + 1, step.right_held]) for _, step in self.steps(p, held)]
                for run, added, in_forward, inside in self._run_steps(p, held):
                    best.append(max(in_forward, added + inside[-1][0], added + need[run[3], False]))
                need[p, held] = min(best)
        return need[0, False]

    def cheapest(self, budget: int) -> tuple[int, list[Choice]] | None:
        """(operations computed once more, choices) of the cheapest way whose peak is at most `budget`; None if there is none."""
        count = len(self.places)
        # state -> arrays: bytes held, cost, index of the choice in `trail`
        waiting: dict[tuple[int, bool], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {
            (0, False): [(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, -1))]
        }
        trail: list[tuple[np.ndarray, Choice | None, np.ndarray | None, int]] = []
        for p in range(count):
            for held in (False, True):
                arrays = waiting.pop((p, held), None)
                if arrays is None:
                    continue
                bytes_held, cost, came = _frontier(arrays)
                for flag, step in self.steps(p, held):
                    fits = bytes_held + step.need <= budget
                    if fits.any():
                        self._go(waiting, trail, (p + 1, step.right_held), Choice(p, flag), bytes_held[fits] + step.added,
                                 cost[fits] + step.cost, came[fits], None)  # fmt: skip
                for run, added, in_forward, inside in self._run_steps(p, held):
                    stop = run[3]
                    needs = np.array([n for n, _, _ in reversed(inside)])
                    costs = np.array([c for _, c, _ in reversed(inside)])
                    free = budget - bytes_held
                    which = np.searchsorted(needs, free - added, side="right") - 1
                    fits = (which >= 0) & (free >= in_forward)
                    if fits.any():
                        self._go(waiting, trail, (stop, False), Choice(p, False, run), bytes_held[fits] + added,
                                 cost[fits] + self.redone(p, stop) + costs[which[fits]], came[fits], which[fits])  # fmt: skip
        ends = [_frontier(waiting[count, held]) for held in (False, True) if (count, held) in waiting]
        if not ends:
            return None
        total, at = min((int(cost[-1]), int(came[-1])) for _, cost, came in ends)
        return total, self._walk_back(trail, at)

    @staticmethod
    def _go(waiting, trail, state, choice, bytes_held, cost, came, which) -> None:  # type: ignore[no-untyped-def]
        start = trail[-1][3] + len(trail[-1][0]) if trail else 0
        trail.append((came, choice, which, start))
        waiting.setdefault(state, []).append((bytes_held, cost, np.arange(start, start + len(came))))

    def _walk_back(self, trail: list[tuple[np.ndarray, Choice | None, np.ndarray | None, int]], at: int) -> list[Choice]:
        starts = [entry[3] for entry in trail]
        choices = []
        while at >= 0:
            came, choice, which, start = trail[bisect.bisect_right(starts, at) - 1]
            assert choice is not None
            if which is not None and choice.run is not None:
                inside = self._inner(choice.place, choice.run[3])
                choice = choice._replace(inner=inside[len(inside) - 1 - int(which[at - start])][2])
            choices.append(choice)
            at = int(came[at - start])
        return choices[::-1]


def _runs(links: list[Link]) -> Iterator[tuple[int, int]]:
    """(first, last) of all runs without a fixed module."""
    for first in range(len(links)):
        for last in range(first, len(links)):
            if links[last].fixed:
                break
            yield first, last


def _undominated(options: list[Inside]) -> list[Inside]:
    """Cheapest first; each further one needs fewer bytes."""
    kept: list[Inside] = []
    for option in sorted(options, key=lambda o: (o[1], o[0])):
        if not kept or option[0] < kept[-1][0]:
            kept.append(option)
    return kept


def _frontier(arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs (bytes held, cost) that no other beats: bytes ascending, cost descending."""
    bytes_held, cost, came = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    order = np.lexsort((cost, bytes_held))
    bytes_held, cost, came = bytes_held[order], cost[order], came[order]
    lowest = np.minimum.accumulate(cost)
    keep = np.ones(len(cost), bool)
    keep[1:] = cost[1:] < lowest[:-1]
    return bytes_held[keep], cost[keep], came[keep]
