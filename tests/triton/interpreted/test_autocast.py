"""The Triton backend with float32 parameters under autocast: what `tests/ops/test_autocast.py` asks of every backend."""

from __future__ import annotations

import pytest
import torch

from tests.harness import Runner
from tests.ops import test_autocast as autocast

TRITON = Runner("triton")


@pytest.mark.parametrize("dtype", autocast.LOW, ids=str)
@pytest.mark.parametrize("name", autocast.OPS)
def test_output_and_gradients(name, dtype):
    autocast.test_output_and_gradients_are_as_good_as_eager(name, TRITON, dtype)


@pytest.mark.parametrize("name", autocast.OPS)
def test_no_weight_is_cast(name):
    autocast.test_no_weight_is_cast(name, TRITON)


@pytest.mark.parametrize("dtype", autocast.LOW, ids=str)
@pytest.mark.parametrize("name", ["conv3x3", "dense_block"])
def test_weights_are_rounded_while_they_are_packed(name, dtype):
    """The same bits as with weights rounded before, where the biases need no rounding."""
    op = autocast.OPS[name]()
    parameters = [p if p.dim() == 4 else p.to(dtype).float() for p in op.parameters]
    x = autocast.picture(op.channels).to(dtype)
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            ours = op.ours(x, *parameters, backend="triton")
        assert torch.equal(ours, op.ours(x, *(p.to(dtype) for p in parameters), backend="triton"))
