"""Networks of scale 2 and 1 without pixel-unshuffle, and the dense blocks of ESRGAN+."""

from __future__ import annotations

import copy

import pytest
import torch

from fastsr.models import RRDBNet
from fastsr.nn import ResidualDenseBlockPlus
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager, random_tensor
from tests.models.eager_rrdbnet import EagerResidualDenseBlock, EagerRRDBNet
from tests.models.test_rrdbnet import RUNNERS, SMALL


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("scale", "unshuffle", "steps"), [(1, 1, 0), (2, 1, 1), (4, 2, 3), (1, 2, 1), (4, None, 2), (1, None, 2)])
def test_float64_equals_eager(scale, unshuffle, steps, plus):
    torch.manual_seed(0)
    ours = RRDBNet(3, 3, scale, **SMALL, unshuffle=unshuffle, plus=plus).to(DEVICE, torch.float64)
    eager = EagerRRDBNet(3, 3, scale, **SMALL, unshuffle=unshuffle, plus=plus).to(DEVICE, torch.float64)
    eager.load_state_dict(ours.state_dict())
    assert ours.num_up == steps
    x = random_tensor((2, 3, 8, 4), torch.float64, 1)
    with torch.no_grad():
        expected = eager(x)
        assert expected.shape == (2, 3, 8 * scale, 4 * scale)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def plus_pair(dtype: torch.dtype) -> tuple[ResidualDenseBlockPlus, EagerResidualDenseBlock]:
    torch.manual_seed(0)
    ours, eager = ResidualDenseBlockPlus(12, 5), EagerResidualDenseBlock(12, 5, plus=True)
    ours.load_state_dict(eager.state_dict())
    return ours.to(DEVICE, dtype), eager.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUNNERS)
def test_the_block_of_esrgan_plus_is_as_good_as_eager(backend, dtype):
    ours, eager = plus_pair(dtype)
    ours.backend = backend
    x = random_tensor((2, 12, 5, 7), dtype, 1)
    with torch.no_grad():
        truth = copy.deepcopy(eager).double()(x.double())
        assert_close_as_eager("inference", ours(x), eager(x), truth)
    assert_close_as_eager("recorded", ours(x).detach(), eager(x).detach(), truth)


def test_the_block_of_esrgan_plus_has_eagers_gradients():
    ours, eager = plus_pair(torch.float64)
    results = []
    for module in (ours, eager):
        x = random_tensor((2, 12, 4, 3), torch.float64, 1).requires_grad_()
        module(x).square().sum().backward()
        results.append([x.grad, *(p.grad for _, p in sorted(module.named_parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_an_unshuffle_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="unshuffle is 3; expected 1, 2, 4"):
        RRDBNet(3, 3, unshuffle=3)
