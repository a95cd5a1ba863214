"""The weight-gradient engine of the CPU, through a dense block of one convolution: its segments' borders, and its threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsr import _native, ops
from tests.harness import ALL_DTYPES, available_backends

RUNNERS = [r for r in available_backends("dense_block", "cpu") if r.backend == "compiled"]

# One pixel; one column; odd widths around a tile of 32 pixels; rows longer than a segment (160 and 254 columns); several segments of
# rows. Channels below, at and above a vector, a block, a task's outputs (64) and a task's inputs (96).
SIZES = ((2, 1, 1, 1), (1, 32, 200, 1), (3, 70, 7, 31), (1, 33, 3, 161), (1, 100, 2, 257), (2, 17, 31, 49), (1, 64, 30, 20), (2, 3, 1, 5))


def gradients(x: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    weight = torch.zeros(channels, channels, 3, 3, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(channels, dtype=x.dtype, requires_grad=True)
    ops.dense_block(x, [weight], [bias], res_scale=0.5, backend=backend).backward(grad)
    return weight.grad, bias.grad


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_segment_counts_once(size, runner, dtype):
    n, channels, h, w = size
    generator = torch.Generator().manual_seed(channels)
    x, grad = (torch.randn(n, h, w, channels, generator=generator).to(dtype).permute(0, 3, 1, 2) for _ in range(2))
    shape = (channels, channels, 3, 3)
    truth = 0.5 * torch.nn.grad.conv2d_weight(x.double(), shape, grad.double(), padding=1)
    truth_bias = 0.5 * grad.double().sum((0, 2, 3))
    eager = error(0.5 * torch.nn.grad.conv2d_weight(x, shape, grad, padding=1), truth)
    eager_bias = error(0.5 * grad.sum((0, 2, 3)), truth_bias)
    with runner.active() as backend:
        weight, bias = gradients(x, grad, backend)
    assert error(weight, truth) <= 2 * eager + 2 * torch.finfo(dtype).eps
    assert error(bias, truth_bias) <= 2 * eager_bias + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    x, grad = (torch.randn(2, 13, 50, 70).to(dtype).permute(0, 3, 1, 2) for _ in range(2))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            with _native.use_cpu_isa(isa):
                results.append(gradients(x, grad, "compiled"))
    finally:
        torch.set_num_threads(threads)
    for weight, bias in results[1:]:
        assert torch.equal(weight, results[0][0])
        assert torch.equal(bias, results[0][1])
