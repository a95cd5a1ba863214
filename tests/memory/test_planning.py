"""Plans are the cheapest that fit: against all plans that there are, on chains small enough to try them all."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fastsr import memory
from fastsr.memory.checkpointing import checkpoint_runs
from fastsr.memory.measuring import fake_model, track
from fastsr.memory.planning import Planner
from fastsr.memory.sizes import format_bytes, parse_bytes
from fastsr.models import RRDBNet
from fastsr.nn import ResidualDenseBlock
from tests.memory.networks import NETWORKS, ResBlock

SHAPE = (1, 3, 12, 12)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


SMALL = {
    "plain": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12), nn.GELU(), nn.Conv2d(12, 3, 1)),
    "blocks": lambda: nn.Sequential(conv(3, 6), *(nn.Sequential(conv(6, 6), nn.Tanh()) for _ in range(2)), nn.Conv2d(6, 30, 1)),
    "dense": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), *(ResidualDenseBlock(16, grow) for grow in (8, 24, 4))),
    "mixed": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), ResidualDenseBlock(8, 8), nn.GELU(), ResidualDenseBlock(8, 4), nn.Sigmoid()),
}


def all_runs(count: int):
    """Every set of runs without overlap in a chain."""
    if count == 0:
        yield ()
        return
    for runs in all_runs(count - 1):
        yield runs
    for first in range(count):
        for runs in all_runs(first):
            yield (*runs, (first, count, False))


def every_step(model: nn.Module):
    """(peak, operations) of a step under every combination of flags and of runs in all Sequentials of leaf modules and in the outermost."""
    chains = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Sequential)]
    blocks = [n for n, m in model.named_modules() if isinstance(m, ResidualDenseBlock)]
    for flags in itertools.product((False, True), repeat=len(blocks)):
        for runs in itertools.product(*(list(all_runs(len(m))) for _, m in chains)):
            chosen = dict(zip((n for n, _ in chains), runs, strict=True))
            covered = [k for first, stop, _ in chosen.get("", ()) for k in range(first, stop)]
            if any(chosen[name] for name, _ in chains if name and int(name.split(".")[0]) in covered):
                continue  # runs inside of runs are not among our plans
            with fake_model(model, SHAPE, torch.float32) as (fake, x):
                for name, on in zip(blocks, flags, strict=True):
                    fake.get_submodule(name).save = "input" if on else "all"
                for name, cuts in chosen.items():
                    checkpoint_runs(fake.get_submodule(name), cuts)
                step = track(fake, x)
            yield step.peak, step.flops


@pytest.mark.parametrize("name", SMALL)
def test_no_other_plan_is_cheaper(name):
    model = SMALL[name]()
    steps = list(every_step(model))
    planner, smallest = Planner(model, SHAPE, torch.float32), min(peak for peak, _ in steps)
    for budget in {peak for peak, _ in steps} | {10**9}:
        plan = planner.within(budget)
        assert plan.memory.peak <= budget
        assert plan.memory.flops == min(flops for peak, flops in steps if peak <= budget)
    with pytest.raises(memory.BudgetError) as caught:
        memory.plan(model, SHAPE, budget=smallest - 1)
    assert caught.value.smallest == smallest
    assert str(smallest) in str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_budgets_are_kept_and_a_larger_one_costs_no_more(name):
    model = NETWORKS[name]()
    planner = Planner(model, SHAPE, torch.float32)
    nothing = planner.none.memory.peak
    with pytest.raises(memory.BudgetError) as caught:
        planner.within(1)
    smallest = caught.value.smallest
    costs = []
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        budget = int(smallest + part * (nothing - smallest))
        plan = planner.within(budget)
        assert plan.memory.peak <= budget
        costs.append(plan.recompute)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_a_module_that_runs_twice_and_batch_statistics_are_left_alone():
    """The first belongs to no one place of the chain; the second would be collected twice."""
    shared = ResBlock(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), shared, *(ResBlock(4, norm=True) for _ in range(3)))
    assert memory.plan(model, SHAPE, policy="group").runs == ()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *(ResBlock(4, norm=True) for _ in range(3)), *(ResBlock(4) for _ in range(3)))
    plan = memory.plan(model, SHAPE, policy="group")
    assert plan.runs == (("", tuple((k, k + 1, False) for k in (4, 5, 6))),)
    assert memory.plan(model.eval(), SHAPE, policy="group").runs == (("", tuple((k, k + 1, False) for k in range(1, 7))),)


def test_random_modules_keep_the_generators_state():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ResBlock(4, dropout=0.5), ResBlock(4))
    assert memory.plan(model, SHAPE, policy="group").runs == (("", ((1, 2, True), (2, 3, False))),)


def test_a_plan_says_what_it_costs_and_what_it_is_not_made_for():
    model = NETWORKS["rrdbnet"]()
    plan = memory.plan(model, SHAPE, policy="inputs")
    assert len(plan.flags) == 13  # four times three dense blocks, and the tail
    assert "13 blocks keep their input" in str(plan)
    assert 0 < plan.recompute < plan.step
    with pytest.raises(ValueError, match=r"RRDBNet has no module 'body\.2\.rdb1' with a flag 'save'"):
        plan.apply(RRDBNet(3, 3, num_block=2))
    runs = memory.plan(model, SHAPE, policy="group")
    with pytest.raises(ValueError, match="has no Sequential 'body' of 4 modules"):
        runs.apply(RRDBNet(3, 3, num_block=2))
    with pytest.raises(ValueError, match="Linear has no flag 'save_tail'; expected the model of the plan"):
        runs.apply(nn.Linear(1, 1))


@pytest.mark.parametrize(("size", "expected"), [
    ("2GiB", 2**31), ("500MB", 500_000_000), (" 1.5 kib ", 1536), ("7", 7), (123, 123), ("1e3", None), ("", None), ("-1MB", None),
    (0, None), ("2 GiBit", None), ("0GB", None), (-5, None), ("7B", 7),
])  # fmt: skip
def test_sizes(size, expected):
    if expected is None:
        with pytest.raises(ValueError, match="expected a number of bytes above zero"):
            parse_bytes(size)
    else:
        assert parse_bytes(size) == expected


def test_what_is_no_budget():
    for size in (1.5, None, True, b"2GiB"):
        with pytest.raises(TypeError, match="expected a number of bytes"):
            parse_bytes(size)
    model = NETWORKS["plain-chain"]()
    with pytest.raises(ValueError, match="expected exactly one of them"):
        memory.plan(model, SHAPE)
    with pytest.raises(ValueError, match="expected exactly one of them"):
        memory.plan(model, SHAPE, budget=10, policy="none")
    with pytest.raises(ValueError, match="policy is 'half'"):
        memory.plan(model, SHAPE, policy="half")
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536, 2**30, 2**42)] == ["0 B", "1023 B", "1 KiB", "1.5 KiB", "1 GiB", "4 TiB"]
