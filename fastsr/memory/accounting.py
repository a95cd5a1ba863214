"""What each block of a model keeps for backward under each policy, and what it costs to compute it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from fastsr.memory.chain import Chain
from fastsr.memory.planning import POLICIES, Plan, Planner, Policy, unwrapped
from fastsr.memory.search import Choice, Search
from fastsr.memory.sizes import format_bytes, format_flops


@dataclass(frozen=True)
class Block:
    """One block, or what the model does between two of them (`module` is None). Dictionaries go by policy.

    Attributes:
        module: its name in the model.
        kind: its class.
        flops: operations of its forward.
        saved: bytes that autograd holds because of it after forward; a run's input is its first block's.
        recompute: operations of it that backward repeats.
    """

    module: str | None
    kind: str
    flops: int
    saved: dict[str, int]
    recompute: dict[str, int]


@dataclass(frozen=True)
class Account:
    """Blocks in the order in which they run, and the whole step under each policy. Prints as a table."""

    model: str
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]
    policies: dict[Policy, Plan]

    def __str__(self) -> str:
        rows = [["", "saved: " + POLICIES[0], *POLICIES[1:], "recompute: " + POLICIES[1], *POLICIES[2:]]]
        for (where, kind), same in groupby(self.blocks, key=_likeness):
            blocks = list(same)
            name = f"{where} ({len(blocks)} x {kind})" if kind else where
            saved = [format_bytes(sum(b.saved[p] for b in blocks)) for p in POLICIES]
            rows.append([name, *saved, *(format_flops(sum(b.recompute[p] for b in blocks)) for p in POLICIES[1:])])
        whole = [self.policies[p] for p in POLICIES]
        rows.append(["whole step", *(format_bytes(p.memory.saved) for p in whole), *(f"{p.recompute / p.step:.1%}" for p in whole[1:])])
        rows.append(["peak", *(format_bytes(p.memory.peak) for p in whole), *("" for _ in whole[1:])])
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
        return "\n".join([f"{self.model} on {self.input_shape}, {str(self.dtype)[6:]}", *lines])


def account(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Account:
    """Predict, from shapes alone, what a training step of `model` keeps under each policy of `plan`.

    Args:
        model: any module of one tensor; it is simulated, not run.
        input_shape: of its input, batch included.
        dtype: of the input and the parameters.

    Returns:
        The blocks and the whole step, as data; `print` shows a table.
    """
    model = unwrapped(model)
    planner = Planner(model, input_shape, dtype)
    plans = {policy: planner.policy(policy) for policy in POLICIES}
    spent = {policy: _spent(planner.chain, planner.choices(policy)) for policy in POLICIES}
    blocks = tuple(
        Block(
            place.module, place.kind, place.all.forward_flops, {p: spent[p][k][0] for p in POLICIES}, {p: spent[p][k][1] for p in POLICIES}
        )
        for k, place in enumerate(planner.chain.places)
        if place.module is not None or any(spent[p][k] != (0, 0) for p in POLICIES)
    )
    return Account(type(model).__name__, tuple(input_shape), dtype, blocks, plans)


def _spent(chain: Chain, choices: list[Choice]) -> list[tuple[int, int]]:
    """(bytes saved, operations repeated) at each place."""
    search, chosen = Search(chain), {choice.place: choice for choice in choices}
    spent: list[tuple[int, int]] = []
    held = False
    while (p := len(spent)) < len(chain.places):
        choice = chosen.get(p, Choice(p))
        if choice.run is None:
            step = dict(search.steps(p, held))[choice.input]
            spent.append((step.added, step.cost))
            held = step.right_held
            continue
        stop, held_before = choice.run[3], held
        for q in range(p, stop):
            again = search.redone(p, stop) if q == stop - 1 else search.redone(p, q + 1)
            before = sum(flops for _, flops in spent[p:])
            spent.append((chain.places[p].border if q == p and not held_before else 0, max(0, again - before)))
        held = False
    return spent


def _likeness(block: Block) -> tuple[str, str]:
    """Neighbours that agree in this share a row: the blocks of one Sequential."""
    if block.module is None:
        return "between blocks", ""
    parent, _, last = block.module.rpartition(".")
    return (f"{parent}.*" if last.isdigit() else block.module), block.kind
