"""A model as a chain of places, and what a training step holds at each, by two simulated steps.

    forward    place 0 -> place 1 -> ... -> place n          a place is a block (a module that a plan can treat), or what the
    backward   place 0 <- place 1 <- ... <- place n          model does between two blocks

Blocks are the modules of Sequentials (at any depth) and the modules with a flag `save`; they may stand in anyone's model.
Where two places meet lies one tensor, the *border*; it counts for a place that saves it only if none before it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastsr.memory.checkpointing import all_flags, is_chain, set_up
from fastsr.memory.measuring import backward, fake_model, forward
from fastsr.memory.tracker import Tracker


@dataclass
class Use:
    """Bytes and operations at one place, in one of the two steps: flags at "all", or at "input".

    What lies beside the borders and beside what earlier places saved:
    """

    inside: int = 0  # saved here, without borders
    saves_left: bool = False  # the border before this place is saved here
    saves_right: bool = False  # the border after it
    forward: int = 0  # most bytes alive in forward
    fresh: int = 0  # of these, made at this place
    backward: int = 0  # most bytes alive in backward, what is saved here included
    carried: int = 0  # alive when backward comes to this place: gradients, the output
    forward_flops: int = 0
    flops_at_save: int | None = None  # of these, before the last save; None where nothing is saved
    backward_flops: int = 0


@dataclass
class Place:
    """One place, with the border before it."""

    module: str | None = None  # name of the block's module; None between blocks
    kind: str = ""  # the block's class
    flags: list[tuple[str, str]] = field(default_factory=list)  # (module, flag) that "input" switches here
    border: int = 0  # bytes of the tensor before this place
    same_border: bool = False  # the border after this place is the same storage
    all: Use = field(default_factory=Use)
    input: Use | None = None


@dataclass(frozen=True)
class Link:
    """A module of a Sequential, with the places that it spans."""

    first: int
    stop: int
    fixed: bool  # it must not be run twice: batch statistics are being collected
    random: bool  # it draws random numbers


@dataclass
class Chain:
    """A model's places, and its Sequentials (name -> links), runs of which can be recomputed."""

    places: list[Place]
    sequentials: dict[str, list[Link]]


def read_chain(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype) -> Chain:
    """Simulate a step with all flags at "all", and where there are flags one with all at "input"."""
    with fake_model(model, input_shape, dtype) as (fake, x):
        set_up(fake, set(), {})
        layout = _Layout(fake, x)
    chain = _step(model, input_shape, dtype, False, layout)
    if any(place.flags for place in chain.places):
        for place, other in zip(chain.places, _step(model, input_shape, dtype, True, layout).places, strict=True):
            place.input = other.all if place.flags else None
    return chain


class _Layout:
    """Which modules are blocks: those of running Sequentials that contain no running Sequential, and what has a flag `save`."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        calls: dict[str, int] = {}
        plain: set[str] = set()  # one tensor in, one out

        def count(name: str, args: tuple[object, ...], y: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            if args and isinstance(args[0], Tensor) and isinstance(y, Tensor):
                plain.add(name)

        modules = dict(model.named_modules())
        hooks = [m.register_forward_hook(lambda _, args, y, name=n: count(name, args, y)) for n, m in modules.items()]
        forward(model, x)
        for hook in hooks:
            hook.remove()

        once = {name for name in plain if calls[name] == 1}
        flagged = [name for name, flag in all_flags(model) if flag == "save"]
        hidden = {part for name in flagged for part in modules if part.startswith(f"{name}.")}
        self.sequentials = {
            name: [_join(name, child) for child, _ in m.named_children()] for name, m in modules.items()
            if name in once and name not in hidden and is_chain(m) and len(m) and all(_join(name, c) in once for c, _ in m.named_children())
        }  # fmt: skip
        self.links = {link for links in self.sequentials.values() for link in links}
        within = {outer for name in self.sequentials for outer in (name, *_outside(name))}
        blocks = {link for link in self.links if link not in within or link in flagged}
        blocks |= {name for name in flagged if name in once and not blocks.intersection(_outside(name))}
        self.blocks = {name: [(n, flag) for n, flag in all_flags(model) if flag == "save" and _is_in(n, name)] for name in blocks}
        self.tails = [name for name, flag in all_flags(model) if flag == "save_tail" and calls.get(name) == 1]
        self.kinds = {name: type(modules[name]).__name__ for name in blocks}
        self.fixed = {name for name in self.links if any(isinstance(m, _NormBase) and m.training and m.track_running_stats
                                                         for m in modules[name].modules())}  # fmt: skip


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _is_in(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _outside(name: str) -> list[str]:
    """The names of all modules around `name`, the model itself ("") last."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) - 1, -1, -1)] if name else []


def _step(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, inputs: bool, layout: _Layout) -> Chain:
    with fake_model(model, input_shape, dtype) as (fake, x):
        set_up(fake, set(all_flags(fake)) if inputs else set(), {})
        modules = dict(fake.named_modules())
        tracker = Tracker([*fake.parameters(), *fake.buffers()])
        places, borders, links = [Place()], [tracker.number(x)], {}
        begun: dict[str, tuple[int, int]] = {}

        def next_place(border: Tensor, name: str | None = None) -> None:
            flags = layout.blocks.get(name, []) if name is not None else []
            places.append(Place(name, layout.kinds.get(name, "") if name is not None else "", flags))
            borders.append(tracker.number(border))
            tracker.enter(len(places) - 1)

        def begin(name: str, args: tuple[Tensor, ...]) -> None:
            next_place(args[0], name if name in layout.blocks else None)
            begun[name] = len(places) - 1, tracker.random

        def end(name: str, y: Tensor) -> None:
            first, draws = begun[name]
            links[name] = Link(first, len(places), name in layout.fixed, tracker.random > draws)
            next_place(y)

        for name in layout.links | set(layout.blocks):
            modules[name].register_forward_pre_hook(lambda _, args, name=name: begin(name, args))
            modules[name].register_forward_hook(lambda _, args, y, name=name: end(name, y), prepend=True)
        for name in layout.tails:
            modules[name].register_forward_hook(lambda _, args, y, name=name: places[-1].flags.append((name, "save_tail")))
        with tracker:
            with tracker.watch_saved():
                outputs = forward(fake, x)
            middle = len(tracker.log)
            next_place(outputs[0])  # the loss
            alive, forward_flops = tracker.alive(), dict(tracker.flops)
            backward(outputs)
            tracker.leave_out(p.grad for p in fake.parameters() if p.grad is not None)
    _fill(places, borders, tracker, middle, alive, forward_flops)
    return Chain(places, {name: [links[link] for link in inner] for name, inner in layout.sequentials.items()})


def _fill(
    places: list[Place], borders: list[int | None], tracker: Tracker, middle: int, alive: set[int], forward_flops: dict[int, int]
) -> None:
    """Work out each place's numbers from the log, whose first `middle` entries are the forward's."""
    count = len(places)
    released: dict[int, int] = {number: place for number, change, place in tracker.log[middle:] if change < 0 and number in alive}
    before = [0] * (count + 1)  # bytes that the places before each one saved
    for number, where in released.items():
        before[where + 1] += tracker.bytes([number])
    for p in range(count):
        before[p + 1] += before[p]
    in_forward, in_backward = tracker.peaks(0, middle), tracker.peaks(middle)
    fresh = _fresh(tracker, middle)
    arriving = _arriving(tracker, middle, count)
    for p, place in enumerate(places):
        left, right = borders[p], borders[p + 1] if p + 1 < count else None
        saved = tracker.saved.get(p, set())
        place.border = 0 if left is None else tracker.bytes([left])
        place.same_border = left is not None and left == right
        use = place.all = Use(saves_left=left in saved, saves_right=right in saved, fresh=fresh.get(p, 0))
        mine = {n for n, where in released.items() if where == p}
        use.inside = tracker.bytes(mine - ({left} if use.saves_left else set()) - ({right} if use.saves_right else set()))
        kept = left is not None and released.get(left, count) < p
        use.forward = max(0, in_forward.get(p, 0) - before[p] - (0 if kept else place.border))
        use.backward = max(0, in_backward.get(p, 0) - before[p] - (place.border if use.saves_left and not kept else 0))
        use.carried = max(0, arriving[p] - before[p + 1])
        use.forward_flops, use.flops_at_save = forward_flops.get(p, 0), tracker.flops_at_save.get(p)
        use.backward_flops = tracker.flops.get(p, 0) - use.forward_flops


def _fresh(tracker: Tracker, middle: int) -> dict[int, int]:
    """The most bytes alive at once in forward, at each place, of what was made there."""
    made: dict[int, int] = {}
    live: dict[int, int] = {}
    most: dict[int, int] = {}
    for number, change, place in tracker.log[:middle]:
        if change > 0:
            made[number] = place
        if made[number] == place:
            live[place] = live.get(place, 0) + change * tracker.bytes([number])
            most[place] = max(most.get(place, 0), live[place])
    return most


def _arriving(tracker: Tracker, middle: int, count: int) -> list[int]:
    """The bytes alive when backward comes to each place."""
    arriving = [0] * count
    live, lowest = 0, count
    for when, (number, change, place) in enumerate(tracker.log):
        if when >= middle and place < lowest:
            arriving[place:lowest] = [live] * (lowest - place)
            lowest = place
        live += change * tracker.bytes([number])
    return arriving
