"""`fastsr.ops.channel_attention`, on every fused backend that can run here, against plain PyTorch's eleven kernels."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastsr
from fastsr import ops
from tests.harness import DEVICE, random_tensor

GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "none": lambda v: v}


def arguments(dtype: torch.dtype, size: tuple[int, ...] = (2, 8, 6, 7), squeezed: int | None = 3) -> tuple[Tensor | None, ...]:
    """x, down_weight, down_bias, up_weight, up_bias and residual; without the squeeze for `squeezed=None`."""
    channels, rows = size[1], squeezed or size[1]
    down = None if squeezed is None else random_tensor((rows, channels), dtype, 1)
    down_bias = None if squeezed is None else random_tensor((rows,), dtype, 2)
    up, up_bias = random_tensor((channels, rows), dtype, 3) / rows**0.5, random_tensor((channels,), dtype, 4)
    return random_tensor(size, dtype, 0), down, down_bias, up, up_bias, random_tensor(size, dtype, 5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("gate", GATES)
def test_the_reference_is_the_definition(gate, activation):
    x, down, down_bias, up, up_bias, residual = arguments(torch.float64)
    z = x.mean((2, 3)) @ down.T + down_bias
    z = F.relu(z) if activation == "relu" else F.silu(z)
    s = GATES[gate](z @ up.T + up_bias)
    y = ops.channel_attention(x, down, down_bias, up, up_bias, residual, res_scale=0.3, gate=gate, activation=activation)
    torch.testing.assert_close(y, 0.3 * s[:, :, None, None] * x + residual)


def test_without_squeeze_biases_and_residual():
    x, _, _, up, _, _ = arguments(torch.float64, squeezed=None)
    y = ops.channel_attention(x, None, None, up[:, :, None, None], None, gate="none")
    torch.testing.assert_close(y, x * (x.mean((2, 3)) @ up.T)[:, :, None, None])


@pytest.mark.parametrize("squeezed", [3, None])
def test_the_reference_passes_gradcheck_twice(squeezed):
    args = [t if t is None else t.requires_grad_() for t in arguments(torch.float64, (2, 4, 3, 2), squeezed)]
    f = partial(ops.channel_attention, res_scale=0.5, activation="silu", backend="reference")
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize(("x", "residual"), list(itertools.product((torch.float32, torch.bfloat16), repeat=2)))
def test_dtypes_under_autocast_are_those_of_eager(x, residual):
    args = arguments(torch.float32)
    a, b = args[0].to(x), args[5].to(residual)
    with torch.autocast(DEVICE, torch.bfloat16):
        squeezed = F.relu(F.conv2d(F.adaptive_avg_pool2d(a, 1), args[1][:, :, None, None], args[2]))
        eager = a * torch.sigmoid(F.conv2d(squeezed, args[3][:, :, None, None], args[4])) + b
        y = ops.channel_attention(a, *args[1:5], b)
    assert y.dtype == eager.dtype
    torch.testing.assert_close(y, eager, rtol=0.02, atol=0.05)


def test_huge_half_pictures_do_not_overflow():
    x, *rest = arguments(torch.float16, (1, 4, 300, 300), 2)
    y = ops.channel_attention(x.abs() * 100 + 400, *rest)
    assert y.isfinite().all()


def test_out_may_be_x_or_residual():
    for alias in (0, 5, None):
        args = arguments(torch.float32)
        expected = ops.channel_attention(*args)
        out = torch.empty_like(args[0]) if alias is None else args[alias]
        with torch.no_grad():
            assert ops.channel_attention(*args, out=out) is out
        assert torch.equal(out, expected)


def test_mistakes_are_named():
    args = x, down, down_bias, up, up_bias, residual = arguments(torch.float32)
    call = partial(ops.channel_attention, *args)
    with pytest.raises(ValueError, match=r"gate is 'tanh'; expected one of 'sigmoid', 'hardsigmoid', 'none'"):
        call(gate="tanh")
    with pytest.raises(ValueError, match=r"activation is 'gelu'; expected one of 'relu', 'silu'"):
        call(activation="gelu")
    with pytest.raises(ValueError, match=r"x has shape \(2, 8, 0, 7\); expected at least one channel and one pixel"):
        ops.channel_attention(x[:, :, :0], *args[1:5])
    with pytest.raises(ValueError, match=r"down_weight has shape \(8, 3\); expected \(any, 8\) = \(R, C\)"):
        ops.channel_attention(x, up, down_bias, up, up_bias)
    with pytest.raises(ValueError, match=r"down_weight has shape \(3, 8, 3, 3\); expected \(any, 8, 1, 1\)"):
        ops.channel_attention(x, torch.zeros(3, 8, 3, 3), down_bias, up, up_bias)
    with pytest.raises(ValueError, match=r"up_weight has shape \(8, 3\); expected \(8, 8\) = \(C, C\)"):
        ops.channel_attention(x, None, None, up, up_bias)
    with pytest.raises(ValueError, match=r"down_bias has shape \(3,\), but there is no down_weight"):
        ops.channel_attention(x, None, down_bias, up, up_bias)
    with pytest.raises(ValueError, match=r"up_bias has shape \(3,\); expected \(8\)"):
        ops.channel_attention(x, down, down_bias, up, down_bias)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 8, 6, 6\); expected \(2, 8, 6, 7\)"):
        ops.channel_attention(*args[:5], residual[..., :6])
    with pytest.raises(ValueError, match=r"out has shape \(1, 8, 6, 7\)"):
        call(out=torch.zeros(1, 8, 6, 7))
    with pytest.raises(ValueError, match=r"out has strides \(0, 42, 7, 1\); an expanded tensor"):
        call(out=torch.zeros(1, 8, 6, 7).expand(2, 8, 6, 7))
    with pytest.raises(ValueError, match=r"out is for inference only"):
        ops.channel_attention(x.clone().requires_grad_(), *args[1:], out=torch.zeros_like(x))
    with pytest.raises(TypeError, match=r"up_weight has dtype torch.float64 and x has torch.float32"):
        ops.channel_attention(x, down, down_bias, up.double(), up_bias)
    with pytest.raises(fastsr.BackendUnavailable, match="float64"):
        ops.channel_attention(*(t.double() for t in args), backend="compiled")
