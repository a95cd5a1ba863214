"""A planned model is the same model: numbers, state dict, copies; alone, under AMP, `torch.compile` and DDP, partly frozen."""

from __future__ import annotations

import copy
import os
import pickle
import socket

import pytest
import torch
import torch.multiprocessing as processes
from torch import nn

from fastsr import memory
from fastsr.memory.checkpointing import CheckpointedSequential
from fastsr.models import RRDBNet
from fastsr.nn import freeze
from tests.harness import DEVICE
from tests.memory.networks import NETWORKS, ResBlock

SHAPE = (2, 3, 8, 12)


def step(model: nn.Module, x: torch.Tensor, **autocast) -> list[torch.Tensor]:
    """The output and all gradients of one training step."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, enabled=bool(autocast), **autocast):
        y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture
def x():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_are_the_same_to_the_last_bit(name, x):
    model = NETWORKS[name]().to(DEVICE)
    expected = step(model, x)
    keys = list(model.state_dict())
    for policy in ("inputs", "group", "sqrt"):
        with memory.plan(model, SHAPE, policy=policy).apply(model):
            assert same(step(model, x), expected), policy
            assert list(model.state_dict()) == keys
    assert same(step(model, x), expected)


@pytest.mark.parametrize("name", ["rrdbnet", "rcan"])
@pytest.mark.parametrize("policy", ["inputs", "group", "sqrt"])
def test_under_amp(name, policy, x):
    model = NETWORKS[name]().to(DEVICE)
    expected = step(model, x, dtype=torch.bfloat16)
    with memory.plan(model, SHAPE, policy=policy).apply(model):
        assert same(step(model, x, dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("name", ["rrdbnet", "theirs"])
def test_frozen_parts(name, x):
    model = NETWORKS[name]().to(DEVICE)
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 3 == 0 and k > 20)
    expected = step(model, x)
    with memory.plan(model, SHAPE, policy="sqrt").apply(model):
        assert same(step(model, x), expected)


def test_dropout_repeats(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ResBlock(4, dropout=0.5), ResBlock(4, dropout=0.5)).to(DEVICE)
    torch.manual_seed(0)
    expected = step(model, x)
    with memory.plan(model, SHAPE, policy="group").apply(model):
        torch.manual_seed(0)
        assert same(step(model, x), expected)


@pytest.mark.parametrize("policy", ["inputs", "group"])
def test_copies_and_pickles_are_planned_too_and_undo_puts_back(policy, x):
    model = NETWORKS["rrdbnet"]().to(DEVICE)
    model.body[1].rdb1.save = "input"  # by hand, before
    expected = step(model, x)
    saved = memory.measure(model, x).saved
    applied = memory.plan(model, SHAPE, policy=policy).apply(model)
    planned = memory.measure(model, x).saved
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert memory.measure(other, x).saved == planned
        assert same(step(other, x), expected)
        other.load_state_dict(model.state_dict())
        memory.clear(other)
        assert memory.measure(other, x).saved > saved
    applied.undo()
    applied.undo()
    assert memory.measure(model, x).saved == saved
    assert model.body[1].rdb1.save == "input"
    assert type(model.body) is nn.Sequential
    assert "runs" not in model.body.__dict__


def test_a_plan_may_follow_a_plan(x):
    model = NETWORKS["rcan"]().to(DEVICE)
    first = memory.plan(model, SHAPE, policy="group")
    with first.apply(model):
        again = memory.plan(model, SHAPE, policy="group")
        assert again == first
        with memory.plan(model, SHAPE, policy="none").apply(model):
            assert not any(isinstance(m, CheckpointedSequential) for m in model.modules())
        assert memory.measure(model, x).saved == first.memory.saved


def test_inference_and_evaluation_know_nothing_of_it(x):
    model = NETWORKS["rrdbnet"]().to(DEVICE)
    expected = model(x).detach()
    with memory.plan(model, SHAPE, policy="group").apply(model):
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert torch.equal(model.eval()(x), expected)
        assert torch.equal(freeze(model)(x), expected)


@pytest.mark.parametrize("policy", ["inputs", "sqrt"])
def test_under_compile(policy):
    """One graph; the numbers are those of the compiled model without a plan."""
    x = torch.rand(1, 3, 8, 8, device=DEVICE)
    model = RRDBNet(3, 3, scale=1, unshuffle=1, num_feat=8, num_grow_ch=4, num_block=2).to(DEVICE)
    expected = step(torch.compile(model, fullgraph=True), x)
    torch.compiler.reset()
    with memory.plan(model, x.shape, policy=policy).apply(model):
        found = step(torch.compile(model, fullgraph=True), x)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = NETWORKS["rrdbnet"]()
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(rank))
    expected = step(parallel, x)
    applied = memory.plan(parallel, SHAPE, policy="group").apply(parallel)
    planned = step(parallel, x)
    applied.undo()
    with memory.budget(memory.plan(model, SHAPE, policy="sqrt").memory.peak) as within:
        budgeted = step(parallel, x)
    assert within.plan is not None
    torch.save((same(planned, expected), same(budgeted, expected)), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_under_ddp(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    assert [torch.load(tmp_path / str(rank)) for rank in range(2)] == [(True, True)] * 2


def test_a_budget_plans_at_the_first_step_and_leaves_the_model_as_it_was(x):
    model, aside = NETWORKS["rcan"]().to(DEVICE), nn.Conv2d(3, 3, 1).to(DEVICE).requires_grad_(False)
    expected = step(model, x)
    plain = memory.measure(model, x).peak
    with memory.budget(int(0.8 * plain)) as within:
        aside(x)  # wants no gradient
        with torch.no_grad():
            model(x)
        assert within.plan is None
        for _ in range(2):
            assert same(step(model, x), expected)
        assert within.plan.input_shape == SHAPE
        assert memory.measure(model, x).peak <= 0.8 * plain
    assert memory.measure(model, x).peak == plain
    with pytest.raises(memory.BudgetError, match="the smallest peak is"), memory.budget("1KB"):
        model(x)
    with memory.budget("1GB"):
        pass
    assert same(step(model, x), expected)
