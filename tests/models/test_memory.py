"""What the networks keep for backward, in bytes per LR pixel: distinct storages seen by saved-tensor hooks, parameters left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsr.models import RCAN, RRDBNet
from tests.harness import DEVICE, available_backends

#: The bytes are those of the op's contract, whatever the instruction set.
RUNNERS = available_backends("dense_block")[:1]
RCAN_RUNNERS = available_backends("rcab")[:1]


def saved_bytes(model: torch.nn.Module, side: int, dtype: torch.dtype) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, tuple[Tensor, int]] = {}  # the tensors are kept, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (t, storage.nbytes())
        return t

    x = torch.rand(1, 3, side, side, device=DEVICE, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(size for _, size in saved.values())


def bytes_per_pixel(model: torch.nn.Module, dtype: torch.dtype) -> float:
    small, large = (saved_bytes(model, side, dtype) for side in (6, 10))
    return (large - small) / (10**2 - 6**2)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("dtype", "save", "limit"), [
    (torch.float32, "all", 72_000), (torch.float32, "input", 35_000), (torch.bfloat16, "all", 36_000), (torch.bfloat16, "input", 18_000),
], ids=str)  # fmt: skip
def test_bytes_saved_per_pixel(dtype, save, limit, runner):
    """Eager keeps about 235,000 bytes in float32."""
    model = RRDBNet(3, 3, save=save).to(DEVICE, dtype)
    with runner.active():
        assert 0.5 * limit < bytes_per_pixel(model, dtype) <= limit


@pytest.mark.parametrize("runner", RCAN_RUNNERS, ids=str)
@pytest.mark.parametrize(("dtype", "save", "limit"), [
    (torch.float32, "all", 115_000), (torch.float32, "input", 62_000), (torch.bfloat16, "all", 57_500), (torch.bfloat16, "input", 31_000),
], ids=str)  # fmt: skip
def test_bytes_that_rcan_saves_per_pixel(dtype, save, limit, runner):
    """Eager keeps about 162,000 bytes in float32."""
    model = RCAN(3, 3, save=save).to(DEVICE, dtype)
    with runner.active():
        assert 0.5 * limit < bytes_per_pixel(model, dtype) <= limit
