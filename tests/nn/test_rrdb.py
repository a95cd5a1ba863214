"""The residual dense block and the RRDB against plain torch.nn."""

from __future__ import annotations

import copy

import pytest
import torch

from fastsr.nn import RRDB, ResidualDenseBlock
from tests.harness import ALL_DTYPES, DEVICE, LAYOUTS, assert_close_as_eager, laid_out, random_tensor
from tests.models.eager_rrdbnet import EagerResidualDenseBlock, EagerRRDB

PAIRS = [(ResidualDenseBlock, EagerResidualDenseBlock), (RRDB, EagerRRDB)]


def pair(kinds, dtype, feat=12, grow=5):
    torch.manual_seed(0)
    ours, eager = kinds[0](feat, grow), kinds[1](feat, grow)
    ours.load_state_dict(eager.state_dict())
    return ours.to(DEVICE, dtype), eager.to(DEVICE, dtype)


@pytest.mark.parametrize("kinds", PAIRS, ids=lambda k: k[0].__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_with_and_without_gradients_as_good_as_eager(kinds, dtype, layout):
    ours, eager = pair(kinds, dtype)
    x = laid_out(random_tensor((2, 12, 5, 7), dtype, 1), layout)
    kept = x.clone()
    with torch.no_grad():
        truth = copy.deepcopy(eager).double()(x.double())
        assert_close_as_eager("inference", ours(x), eager(x), truth)
    assert_close_as_eager("recorded", ours(x).detach(), eager(x).detach(), truth)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kinds", PAIRS, ids=lambda k: k[0].__name__)
def test_gradients_equal_eager_in_float64(kinds):
    ours, eager = pair(kinds, torch.float64)
    results = []
    for module in (ours, eager):
        x = random_tensor((2, 12, 4, 3), torch.float64, 1).requires_grad_()
        module(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_frozen_input_and_frozen_parameters():
    ours, _ = pair(PAIRS[0], torch.float32)
    x = random_tensor((1, 12, 4, 4), torch.float32, 1)
    assert ours(x).requires_grad
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    assert ours(x.requires_grad_()).requires_grad


def test_a_chain_of_blocks_runs_in_one_set_of_buffers():
    blocks = [RRDB(12, 5) for _ in range(3)]
    x = random_tensor((1, 12, 6, 5), torch.float32, 1)
    blocks = [block.to(DEVICE) for block in blocks]
    with torch.no_grad():
        y = x
        for block in blocks:
            y = block(y)
        front, back, skip = blocks[0].scratch(x)
        for buffer in (front, back, skip):
            buffer.fill_(torch.nan)
        front[:, :12] = x
        for block in blocks:
            front, back = block.run_in(front, back, skip)
    assert torch.equal(front[:, :12], y)


def test_initialisation_is_a_tenth_of_kaiming():
    torch.manual_seed(0)
    block = ResidualDenseBlock()
    for k, inputs in enumerate((64, 96, 128, 160, 192), 1):
        conv = getattr(block, f"conv{k}")
        assert conv.weight.std().item() == pytest.approx(0.1 * (2 / (9 * inputs)) ** 0.5, rel=0.03)
        assert not conv.bias.any()


def test_keys_are_basicsrs():
    expected = {f"rdb{j}.conv{k}.{part}" for j in (1, 2, 3) for k in range(1, 6) for part in ("weight", "bias")}
    assert RRDB(4, 2).state_dict().keys() == expected
