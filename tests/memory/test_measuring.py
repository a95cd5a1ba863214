"""Predicted bytes are those measured, and what is measured is what the allocator gives out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastsr import memory
from tests.harness import DEVICE
from tests.memory.networks import NETWORKS

POLICIES = ("none", "inputs", "group", "sqrt")


def close(predicted: int, measured: int) -> bool:
    return abs(predicted - measured) <= 0.05 * measured


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_hold_to_five_percent(name, policy):
    """For each network, policy, several shapes and dtypes."""
    model = NETWORKS[name]().to(DEVICE)
    for shape, dtype in (((1, 3, 16, 16), torch.float32), ((3, 3, 8, 20), torch.bfloat16)):
        plan = memory.plan(model, shape, dtype, policy=policy)
        planned = copy.deepcopy(model).to(dtype)
        plan.apply(planned)
        found = memory.measure(planned, torch.rand(shape, device=DEVICE, dtype=dtype))
        assert close(plan.memory.peak, found.peak), (shape, dtype)
        assert close(plan.memory.saved, found.saved), (shape, dtype)
        assert plan.memory.flops == found.flops or DEVICE != "cpu"


@pytest.mark.parametrize("name", ["rrdbnet", "rcan"])
def test_predictions_hold_under_autocast(name):
    model = NETWORKS[name]().to(DEVICE)
    shape = (2, 3, 12, 12)
    with torch.autocast(DEVICE, torch.bfloat16):
        plan = memory.plan(model, shape, policy="inputs")
        with plan.apply(model):
            found = memory.measure(model, torch.rand(shape, device=DEVICE))
    assert close(plan.memory.peak, found.peak)
    assert close(plan.memory.saved, found.saved)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the measure is the allocator's anyway")
@pytest.mark.parametrize("policy", ["none", "group"])
def test_the_tracker_sees_what_the_allocator_gives_out(policy):
    """The profiler's log of every allocation, scratch inside operators included, against the tracker's of storages."""
    model = NETWORKS["rrdbnet"]()
    x = torch.rand(2, 3, 32, 32)
    with memory.plan(model, x.shape, policy=policy).apply(model):
        found = memory.measure(model, x)
        model(x).sum().backward()  # gradients of parameters exist
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
            y = model(x)
            y.backward(torch.ones_like(y))
    live = peak = 0
    events = (e for e in log.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert close(found.peak, peak)


def test_parameters_gradients_and_state_stay():
    model = NETWORKS["rcan"]().to(DEVICE)
    x = torch.rand(1, 3, 8, 8, device=DEVICE)
    model(x).sum().backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    memory.measure(model, x)
    memory.account(model, x.shape)
    for p, (grad, values) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, values)


def test_a_model_of_any_size_is_simulated_without_its_memory():
    found = memory.simulate(NETWORKS["rrdbnet"](), (64, 3, 4096, 4096), torch.float32)
    assert found.peak > 10**12


def test_nothing_to_train_is_an_error():
    model = nn.Conv2d(3, 3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no output asks for a gradient"):
        memory.measure(model, torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="no output asks for a gradient"):
        memory.plan(model, (1, 3, 4, 4), policy="none")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_account_sums_up_to_what_a_step_saves(name):
    model = NETWORKS[name]()
    account = memory.account(model, (1, 3, 16, 16))
    for policy, plan in account.policies.items():
        assert sum(block.saved[policy] for block in account.blocks) == pytest.approx(plan.memory.saved, rel=0.05)
        assert sum(block.recompute[policy] for block in account.blocks) == pytest.approx(plan.recompute, rel=0.02, abs=1000)
    table = str(account)
    assert type(model).__name__ in table
    assert "whole step" in table
    assert "peak" in table
