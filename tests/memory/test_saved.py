"""What networks keep for backward, in bytes per LR pixel (the slope between two sizes)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsr import memory
from fastsr.memory.planning import Planner
from fastsr.models import RCAN, RRDBNet
from tests.harness import DEVICE, available_backends

#: The bytes are those of the op's contract, whatever the instruction set.
RUNNERS = available_backends("dense_block")[:1]
RCAN_RUNNERS = available_backends("rcab")[:1]


def saved_per_pixel(model: nn.Module, dtype: torch.dtype) -> float:
    small, large = (memory.measure(model, torch.rand(1, 3, side, side, device=DEVICE, dtype=dtype)).saved for side in (6, 10))
    return (large - small) / (10**2 - 6**2)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("dtype", "save", "limit"), [
    (torch.float32, "all", 72_000), (torch.float32, "input", 35_000), (torch.bfloat16, "all", 36_000), (torch.bfloat16, "input", 18_000),
], ids=str)  # fmt: skip
def test_rrdbnet(dtype, save, limit, runner):
    """Eager keeps about 235,000 bytes in float32."""
    model = RRDBNet(3, 3, save=save).to(DEVICE, dtype)
    with runner.active():
        assert 0.5 * limit < saved_per_pixel(model, dtype) <= limit


@pytest.mark.parametrize("runner", RCAN_RUNNERS, ids=str)
@pytest.mark.parametrize(("dtype", "save", "limit"), [
    (torch.float32, "all", 115_000), (torch.float32, "input", 62_000), (torch.bfloat16, "all", 57_500), (torch.bfloat16, "input", 31_000),
], ids=str)  # fmt: skip
def test_rcan(dtype, save, limit, runner):
    """Eager keeps about 162,000 bytes in float32."""
    model = RCAN(3, 3, save=save).to(DEVICE, dtype)
    with runner.active():
        assert 0.5 * limit < saved_per_pixel(model, dtype) <= limit


@pytest.mark.skipif(not RCAN_RUNNERS, reason="needs the native library, or Triton with a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peaks_of_rcan(dtype):
    """Bytes for each LR pixel at the peak of a step; predicted, which another test holds to what is measured."""
    small, large = (Planner(RCAN(3, 3), (1, 3, side, side), dtype) for side in (48, 64))
    for policy, limit in (("inputs", 62_000), ("group", 20_000), ("sqrt", 17_000)):
        slope = (large.policy(policy).memory.peak - small.policy(policy).memory.peak) / (64**2 - 48**2)
        assert slope <= limit * dtype.itemsize / 4, policy
