"""Plans for networks around a quantiser: it is seen once a step, and all that a step leaves behind stays the same."""

from __future__ import annotations

import copy

import pytest
import torch

from fastsr import memory
from fastsr.models import VQVAE, VQVAE2
from tests.harness import DEVICE

SHAPE = (2, 3, 32, 24)
SIZES = {"num_feat": 16, "num_block": 3, "num_res_ch": 8, "codebook_size": 16, "codebook_dim": 4}
NETWORKS = {
    "vqvae": lambda: VQVAE(**SIZES),
    "vqvae, revival": lambda: VQVAE(**SIZES, revive_below=0.5, kmeans_init=True),
    "vqvae, trained codebook": lambda: VQVAE(**SIZES, decay=None, gradient="rotation"),
    "vqvae2": lambda: VQVAE2(**SIZES),
}


def train(model: torch.nn.Module, steps: int = 2) -> list[torch.Tensor]:
    """Losses, codes, and what is left in the parameters and in the codebook's averages."""
    torch.manual_seed(1)
    optimizer, kept = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for step in range(steps):
        x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(step)).to(DEVICE) - 0.5
        out = model(x)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        kept += [out.loss.detach(), out.reconstruction.detach(), *out.indices]
    return [*kept, *(t.detach() for t in model.state_dict().values())]


@pytest.mark.parametrize("policy", ["group", "sqrt"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_the_same_to_the_last_bit(name, policy):
    torch.manual_seed(0)
    model = NETWORKS[name]().to(DEVICE)
    planned = copy.deepcopy(model)
    memory.plan(model, SHAPE, policy=policy).apply(planned)
    for found, expected in zip(train(planned), train(model), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_predictions_hold_and_plans_keep_less(name):
    model, x = NETWORKS[name]().to(DEVICE), torch.rand(SHAPE, device=DEVICE)
    saved = {}
    for policy in ("none", "inputs", "group", "sqrt"):
        plan, planned = memory.plan(model, SHAPE, policy=policy), copy.deepcopy(model)
        plan.apply(planned)
        found = memory.measure(planned, x)
        assert plan.memory.peak == pytest.approx(found.peak, rel=0.05)
        assert plan.memory.saved == pytest.approx(found.saved, rel=0.05)
        saved[policy] = found.saved
    assert max(saved["group"], saved["sqrt"]) < 0.9 * saved["none"]


def test_a_budget_reaches_the_first_step():
    torch.manual_seed(0)
    model = NETWORKS["vqvae"]().to(DEVICE)
    twin = copy.deepcopy(model)
    peak = memory.simulate(model, SHAPE, torch.float32).peak
    with memory.budget(int(0.8 * peak)) as within:
        found = train(model)
    assert within.plan is not None
    assert within.plan.memory.peak <= 0.8 * peak
    assert all(torch.equal(a, b) for a, b in zip(found, train(twin), strict=True))
