"""Fused 3x3 convolution: everything that stands around a 3x3 convolution in a restoration network, in its epilogue.

For an image x[n, c, h, w], stride 1 and zero padding of one pixel:

    1. u = x, each pixel repeated `upsample` times along h and w              (nearest neighbour)
    2. v[n, o] = bias[o] + sum over c and the 3x3 taps of weight[o, c] * u[n, c]
    3. a = activation(v)                          none, relu, or leaky_relu: v > 0 ? v : negative_slope * v
    4. b = pixel_shuffle(a, r)                    channel o * r^2 + i * r + j goes to pixel (r*h + i, r*w + j)
    5. y = scale * b + residual

Eager PyTorch writes and reads a full tensor between each two steps; this op reads x once and writes y once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsr import backends
from fastsr.backends import FUSED_DTYPES, Backend, Rule
from fastsr.kernels import checks
from fastsr.kernels.conv3x3 import compiled, reference

Activation = Literal["none", "relu", "leaky_relu"]

backends.register(
    "conv3x3",
    compiled=("cpu", "cuda"),
    triton=("cpu", "cuda"),
    rules=(
        Rule("compiled", "direct convolution in registers, no im2col buffer", "cpu", FUSED_DTYPES),
        Rule("compiled", "mma.sync over halo tiles in shared memory; not measured yet", "cuda", FUSED_DTYPES),
        Rule("triton", "implicit GEMM with the whole epilogue, for ROCm or without nvcc; not measured yet", "cuda", FUSED_DTYPES),
    ),
)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    negative_slope: float = 0.2,
    scale: float = 1.0,
    residual: Tensor | None = None,
    upsample: int = 1,
    pixel_shuffle: int = 1,
    out: Tensor | None = None,
    packed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Convolve `x` with `weight` and apply bias, activation, PixelShuffle, scale and residual in one pass.

    Args:
        x: (N, C, H, W); float32, float16, bfloat16 or float64; any strides. A channels-last tensor or a channel
            slice of one (`workspace[:, :C]`) is read where it lies; other layouts are copied once.
        weight: (O, C, 3, 3).  bias: (O,) or None.
        activation: "none", "relu" or "leaky_relu".
        negative_slope: of "leaky_relu", at least 0 (backward reads the sign of v from the output).
        scale: multiplies the activated values, before the residual is added.
        residual: of the output's shape, or None.
        upsample: 1 or 2: read x as if it were enlarged by nearest neighbour.
        pixel_shuffle: r >= 1; O must be divisible by r^2.
        out: inference only: a channels-last tensor of the output's shape or a channel slice of one, which
            shares no element with x; it is written in place and returned.
        packed: inference only: `fastsr.ops.pack_weights([weight], [bias], pixel_shuffle)`; ignored where it does not fit.
        backend: "auto", "compiled", "triton" or "reference".

    Returns:
        (N, O / r^2, H * upsample * r, W * upsample * r) in x's dtype, channels-last (in autocast's dtype under autocast).

    Saved for backward: x and weight; with an activation also one tensor of the output's size, the output itself
    where its sign tells that of v (no residual, positive scale). Backward is first-order only (the reference
    backend differentiates any number of times).

    Raises:
        ValueError: shapes that do not fit together, a negative slope, an `out` that cannot be written in place
            or is given where a gradient is needed.
        TypeError: an unsupported dtype, or dtypes that differ.
        BackendUnavailable: `backend` was named and cannot run here, with the reason and the remedy.
    """
    x, residual = checks.autocast(x, residual)
    weight, bias = checks.autocast_parameters(x, weight, bias)
    slope = _slope(activation, negative_slope)
    shape = _check(x, weight, bias, residual, upsample, pixel_shuffle)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    if out is not None:
        _check_out(out, x, shape, needs_grad)
    run = backends.choose("conv3x3", backend, x, weight).backend
    if run == "reference":
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = reference.conv3x3(
            x, weight, bias, residual, negative_slope=slope, scale=scale, upsample=upsample, pixel_shuffle=pixel_shuffle
        )
        return y if out is None else out.copy_(y)
    if needs_grad:
        return _Conv3x3.apply(x, weight, bias, residual, slope, scale, upsample, pixel_shuffle, run)
    return _forward(out, shape, x, weight, bias, residual, slope, scale, upsample, pixel_shuffle, run, packed)


def _slope(activation: str, negative_slope: float) -> float:
    """The activation as one number: 1 is none, 0 is ReLU."""
    if activation == "leaky_relu":
        if not negative_slope >= 0:
            raise ValueError(f"conv3x3: negative_slope is {negative_slope}; expected at least 0")
        return float(negative_slope)
    slopes = {"none": 1.0, "relu": 0.0}
    if activation not in slopes:
        raise ValueError(f"conv3x3: activation is {activation!r}; expected 'none', 'relu' or 'leaky_relu'")
    return slopes[activation]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: int, r: int) -> tuple[int, ...]:
    """Check all but `out`; the output's shape."""
    checks.check_dtype("conv3x3", x, residual=residual)
    checks.check_parameters("conv3x3", x, weight=weight, bias=bias)
    checks.check_shape("conv3x3", "x", x, (None,) * 4, "(N, C, H, W)")
    n, c, h, w = x.shape
    if min(c, h, w) == 0:
        raise ValueError(f"conv3x3: x has shape {tuple(x.shape)}; expected at least one channel and one pixel")
    checks.check_shape("conv3x3", "weight", weight, (None, c, 3, 3), "(O, C, 3, 3)")
    o = weight.shape[0]
    checks.check_shape("conv3x3", "bias", bias, (o,), "(O,)")
    if upsample not in (1, 2):
        raise ValueError(f"conv3x3: upsample is {upsample!r}; expected 1 or 2")
    if r < 1 or o == 0 or o % (r * r):
        raise ValueError(f"conv3x3: pixel_shuffle is {r!r} and weight has {o} output channels; expected a positive multiple of its square")
    shape = (n, o // (r * r), h * upsample * r, w * upsample * r)
    checks.check_shape("conv3x3", "residual", residual, shape, "the output's shape")
    return shape


def _check_out(out: Tensor, x: Tensor, shape: tuple[int, ...], needs_grad: bool) -> None:
    if needs_grad:
        raise ValueError("conv3x3: out is for inference only; call it under torch.no_grad() or leave out away")
    checks.check_dtype("conv3x3", x, out=out)
    checks.check_shape("conv3x3", "out", out, shape, "the output's shape")
    checks.check_pixel_major("conv3x3", "out", out)


def _forward(
    out: Tensor | None,
    shape: tuple[int, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    scale: float,
    upsample: int,
    pixel_shuffle: int,
    run: str,
    packed: Tensor | None = None,
) -> Tensor:
    """Run one of the kernels."""
    if out is None:
        out = checks.empty_pixels(x, *shape[1:])
    if out.numel() == 0:
        return out
    x = checks.pixel_major(x)
    residual = None if residual is None else checks.pixel_major(residual)
    options = (x, weight, bias, residual, slope, scale, upsample, pixel_shuffle)
    if run == "triton":
        from fastsr.kernels.conv3x3 import triton  # imported late: Triton costs seconds and may be missing

        triton.conv3x3_into(out, *options)
    else:
        compiled.conv3x3_into(out, *options, packed)
    return out


class _Conv3x3(torch.autograd.Function):
    """The one autograd boundary of the compiled and Triton backends."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        slope: float,
        scale: float,
        upsample: int,
        pixel_shuffle: int,
        run: str,
    ) -> Tensor:
        r = pixel_shuffle
        shape = (x.shape[0], weight.shape[0] // (r * r), x.shape[2] * upsample * r, x.shape[3] * upsample * r)
        ctx.options = (slope, scale, upsample, r, bias is not None, residual is not None)
        # With an activation, backward needs the sign of v. The output tells it unless a residual or a scale hides it.
        hidden = slope != 1.0 and (residual is not None or scale <= 0)
        if hidden:
            active = _forward(None, shape, x, weight, bias, None, slope, 1.0, upsample, r, run)
            y = active * scale if residual is None else torch.add(residual, active, alpha=scale)
        else:
            y = active = _forward(None, shape, x, weight, bias, residual, slope, scale, upsample, r, run)
        ctx.save_for_backward(x, weight, active if slope != 1.0 else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, active = ctx.saved_tensors
        slope, scale, upsample, r, has_bias, has_residual = ctx.options
        grad_residual = grad if has_residual and ctx.needs_input_grad[3] else None
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], has_bias and ctx.needs_input_grad[2]]
        dx = dw = db = None
        if any(needs):
            g = grad if scale == 1.0 else grad * scale
            if slope != 1.0:
                g = torch.where(active > 0, g, g * slope)
            if r != 1:
                g = F.pixel_unshuffle(g, r)
            u = x if upsample == 1 else F.interpolate(x, scale_factor=float(upsample), mode="nearest")
            g = g.contiguous(memory_format=torch.channels_last)
            dx, dw, db = torch.ops.aten.convolution_backward(
                g, u, weight.to(g.dtype), [weight.shape[0]] if has_bias else None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needs
            )
            dw, db = (None if d is None else d.to(weight.dtype) for d in (dw, db))
            if dx is not None and upsample != 1:
                dx = F.avg_pool2d(dx, upsample, divisor_override=1)
        return dx, dw, db, grad_residual, None, None, None, None, None
