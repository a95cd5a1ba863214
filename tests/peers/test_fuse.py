"""`fuse_` inside networks that no one here wrote: the blocks that it should know are fused, outputs and gradients stay."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastsr
from fastsr.fusion.costs import IN_TRAINING
from fastsr.weights import KNOWN
from tests.harness import random_tensor
from tests.peers.networks import ATTENTION, NETWORKS, Network

CASES = [(package, name) for package, networks in NETWORKS.items() for name in networks]


@pytest.fixture
def network(request, torchvision_imports) -> Network:
    package, name = request.param
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; `make peers` installs it and runs this")
    return NETWORKS[package][name]


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients, in the model's mode."""
    torch.manual_seed(1)
    model.zero_grad()
    outputs = [t for t in tree_leaves(model(x.clone())) if isinstance(t, Tensor)]
    if outputs[0].requires_grad:
        (outputs[0].float() * random_tensor(outputs[0].shape, torch.float32, 5)).sum().backward()
    return [*(t.detach().float() for t in outputs), *(p.grad for p in model.parameters() if p.grad is not None)]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The root mean square of |t - truth| / |truth| over the tensors."""
    squares = [
        ((t.double() - u.double()).norm() / u.double().norm().clamp_min(1e-12)).item() ** 2 for t, u in zip(found, truth, strict=True)
    ]
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize("network", CASES, indirect=True, ids=lambda case: case[1])
def test_fused_networks_agree(network):
    model = network.built().eval()
    plain, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    report = fastsr.fuse_(model)
    assert {row.kind for row in report.rows if row.reason == IN_TRAINING} <= {ATTENTION, "CAB"}, report
    report = fastsr.fuse_(fastsr.unfuse_(model), backend="compiled")  # in inference too
    assert network.kinds <= {row.kind for row in report.rows if row.fused}, report
    assert not network.left or any(network.left in row.reason for row in report.rows), report
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    x = random_tensor(network.shape, torch.float32, 0).abs()
    for training in (False, True):
        truth = results(copy.deepcopy(plain).train(training).double(), x.double())
        ours, theirs = (results(m.train(training), x) for m in (model, plain))
        assert len(ours) == len(theirs)
        assert error(ours, truth) <= 2 * error(theirs, truth) + 1e-5, report
    plain.load_state_dict(model.state_dict())
    fastsr.unfuse_(model)
    ours, theirs = (results(m.eval(), x) for m in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_published_weights(torchvision_imports, tmp_path):
    """Real weights that a package ships, in spandrel's network, on a photograph's scale of values."""
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed; `make peers` installs it and runs this")
    if KNOWN["realesrgan-x4plus-anime"].path() is None:
        pytest.skip(f"the weights are not installed: {KNOWN['realesrgan-x4plus-anime'].remedy}")
    fastsr.save(fastsr.load("realesrgan-x4plus-anime"), tmp_path / "model.pth", "basicsr")
    model = spandrel.ModelLoader().load_from_file(tmp_path / "model.pth").model.eval()
    x = random_tensor((1, 3, 24, 20), torch.float32, 0).sigmoid()
    with torch.no_grad():
        before = model(x)
        report = fastsr.fuse_(model)
        assert len([row for row in report.rows if row.fused and row.kind == "RRDB"]) == 6
        assert (model(x) - before).abs().max() < 1e-4
