"""Plans: which blocks of a model keep what, chosen so that a training step fits into a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, get_args

import torch
from torch import nn

from fastsr.memory.chain import Chain, read_chain
from fastsr.memory.checkpointing import CheckpointedSequential, Run, all_flags, flags_of, is_chain, set_up
from fastsr.memory.measuring import Memory, fake_model, track
from fastsr.memory.search import Allowed, Choice, Search
from fastsr.memory.sizes import format_bytes, format_flops, parse_bytes

Policy = Literal["none", "inputs", "group", "sqrt"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class BudgetError(ValueError):
    """No plan fits into the budget; `smallest` is the smallest peak that a plan has, in bytes."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class Plan:
    """What to change in a model, and what that gives.

    Attributes:
        flags: (module, flag) of those that are set to "input"; all others of the model are set to "all".
        runs: (Sequential, its runs): modules `first` to `stop - 1` keep the run's input only and are computed again in backward.
        memory: predicted bytes saved and peak, and operations of a step.
        recompute: operations that a step does twice because of the plan.
        step: operations of a step without a plan.
    """

    flags: tuple[tuple[str, str], ...]
    runs: tuple[tuple[str, tuple[Run, ...]], ...]
    memory: Memory
    recompute: int
    step: int
    input_shape: tuple[int, ...]
    dtype: torch.dtype

    def apply(self, model: nn.Module) -> Applied:
        """Change `model`, which has the structure of the one that was planned for; parameters and state dict stay as they are.

        Returns:
            A handle: `.undo()` puts everything back; so does leaving it as a context manager.

        Raises:
            ValueError: the model has other modules than the plan speaks of.
        """
        model = unwrapped(model)
        modules = dict(model.named_modules())
        for name, flag in self.flags:
            if flag not in flags_of(modules.get(name, model)):
                where = f"no module {name!r} with a flag {flag!r}" if name else f"no flag {flag!r}"
                raise ValueError(f"{type(model).__name__} has {where}; expected the model of the plan")
        for name, runs in self.runs:
            chain = modules.get(name)
            if chain is None or not is_chain(chain) or len(chain) < runs[-1][1]:  # type: ignore[arg-type]
                raise ValueError(
                    f"{type(model).__name__} has no Sequential {name!r} of {runs[-1][1]} modules; expected the model of the plan"
                )
        handle = Applied(model)
        set_up(model, {*self.flags}, dict(self.runs))
        return handle

    def __str__(self) -> str:
        blocks = sum(stop - first for _, runs in self.runs for first, stop, _ in runs)
        runs = sum(len(runs) for _, runs in self.runs)
        share = f", {self.recompute / self.step:.1%} of the step" if self.step else ""
        return (
            f"peak {format_bytes(self.memory.peak)}, saved {format_bytes(self.memory.saved)}; {len(self.flags)} blocks keep their input, "
            f"{blocks} modules run again in {runs} runs; recomputes {format_flops(self.recompute)}{share}"
        )


class Applied:
    """A plan at work in a model."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._model: nn.Module | None = model
        self._flags = {(name, flag) for name, flag in all_flags(model) if getattr(modules[name], flag) == "input"}
        self._runs = {name: m.runs for name, m in modules.items() if isinstance(m, CheckpointedSequential)}

    def undo(self) -> None:
        """Put the model back as it was before; a second call does nothing."""
        if self._model is not None:
            set_up(self._model, self._flags, self._runs)
        self._model = None

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def clear(model: nn.Module) -> None:
    """Take every plan out of a model, also out of a copy of a planned one: all that is wanted in backward is kept."""
    set_up(unwrapped(model), set(), {})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP or `torch.compile`."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    budget: int | str | None = None,
    *,
    policy: Policy | None = None,
) -> Plan:
    """Choose what the blocks of `model` keep for backward.

    With a `budget`, the mix that computes least twice among all whose peak is at most the budget: for each block all or its input, and
    for each run of blocks its input alone. With a `policy`:

        none      everything is kept
        inputs    every block keeps its input
        group     every module of the outermost Sequentials (RCAN's groups, RRDBNet's RRDBs) keeps its input
        sqrt      runs of blocks keep their input, cut such that the peak is smallest; no block runs twice more (Chen et al., 2016)

    The model is simulated, not run: it and the random state stay as they are. Under an active autocast that is simulated, too.

    Args:
        model: any module of one tensor; bare, or in DDP or `torch.compile`.
        input_shape: of its input in a training step, batch included.
        dtype: of the input and the parameters.
        budget: the peak, in bytes or like "2GiB".
        policy: one of the above, instead of a budget.

    Raises:
        BudgetError: no plan's peak is that small; it names the smallest.
        ValueError: neither or both of `budget` and `policy` are given, or one that does not exist; nothing to train.

    Source of the run's idea: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174.
    """
    if (budget is None) == (policy is None):
        raise ValueError(f"budget is {budget!r} and policy {policy!r}; expected exactly one of them")
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; expected one of {', '.join(map(repr, POLICIES))}")
    limit = None if budget is None else parse_bytes(budget)
    planner = Planner(unwrapped(model), input_shape, dtype)
    if policy is not None:
        return planner.policy(policy)
    assert limit is not None
    return planner.within(limit)


class Planner:
    """Makes plans for one model and one input shape; the simulated steps are made once."""

    def __init__(self, model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype) -> None:
        self.model, self.input_shape, self.dtype = model, tuple(input_shape), dtype
        self.chain: Chain = read_chain(model, self.input_shape, dtype)
        self.none = self._plan([])

    def _plan(self, choices: list[Choice]) -> Plan:
        """The plan of these choices, simulated."""
        flags: list[tuple[str, str]] = []
        runs: dict[str, list[Run]] = {}
        for choice in choices:
            if choice.input:
                flags += self.chain.places[choice.place].flags
            if choice.run is not None:
                name, first, last, _ = choice.run
                random = any(link.random for link in self.chain.sequentials[name][first : last + 1])
                runs.setdefault(name, []).append((first, last + 1, random))
                for place, on in zip(self.chain.places[choice.place :], choice.inner, strict=False):
                    flags += place.flags if on else []
        draft = Plan(tuple(flags), tuple((n, tuple(r)) for n, r in runs.items()), Memory(0, 0, 0), 0, 0, self.input_shape, self.dtype)
        with fake_model(self.model, self.input_shape, self.dtype) as (fake, x):
            draft.apply(fake)
            memory = track(fake, x)
        step = memory.flops if not choices else self.none.memory.flops
        return replace(draft, memory=memory, recompute=max(0, memory.flops - step), step=step)

    def policy(self, policy: Policy) -> Plan:
        return self.none if policy == "none" else self._plan(self.choices(policy))

    def choices(self, policy: Policy) -> list[Choice]:
        """What a policy chooses, in order, beside "all" at every other place."""
        if policy == "none":
            return []
        places, sequentials = self.chain.places, self.chain.sequentials
        if policy == "sqrt":
            search = Search(self.chain, Allowed(inner_input=False))
            best = search.cheapest(search.smallest())
            assert best is not None
            return best[1]
        names = list(sequentials)
        if policy == "group":
            names = [n for n in names if not any(n != outer and (not outer or n.startswith(f"{outer}.")) for outer in names)]
        runs = []
        for name in names:
            for k, link in enumerate(sequentials[name]):
                block, place = link.stop == link.first + 1, places[link.first]
                # a lone module that saves nothing but the tensors around it gains nothing
                useful = bool(place.all.inside) if block else policy == "group"
                if useful and not link.fixed and (policy == "group" or place.input is None):
                    runs.append(Choice(link.first, False, (name, k, k, link.stop)))
        covered = {p for run in runs for p in range(run.place, run.run[3])}  # type: ignore[index]
        flags = [Choice(p, True) for p, place in enumerate(places) if place.input is not None and p not in covered]
        return sorted(flags + runs)

    def within(self, budget: int) -> Plan:
        """The cheapest plan whose simulated peak is within the budget."""
        if self.none.memory.peak <= budget:
            return self.none
        search = Search(self.chain)
        best: Plan | None = None
        target, tried = budget, set()
        # The chain's sums may differ a little from a whole step: aim by the difference that the step shows
        for _ in range(4):
            found = search.cheapest(max(target, search.smallest()))
            assert found is not None
            made = self._plan(found[1])
            if made.memory.peak <= budget and (best is None or made.memory.flops < best.memory.flops):
                best = made
            tried.add(target)
            target += budget - made.memory.peak if made.memory.peak > budget else 0
            if target in tried:
                break
        if best is None:
            smallest = made.memory.peak
            raise BudgetError(
                f"no plan for {type(self.model).__name__} on {self.input_shape} fits into {format_bytes(budget)} ({budget} bytes); "
                f"the smallest peak is {format_bytes(smallest)} ({smallest} bytes)", smallest,
            )  # fmt: skip
        return best
