"""Channel attention: scale every channel by a gate computed from its global average, then add a skip.

For an image x[n, c, h, w] and a squeeze of C channels to R:

    1. p[n, c] = mean over h, w of x[n, c, h, w]                           in float32, whatever x is
    2. z[n, r] = activation(down_bias[r] + sum over c of down_weight[r, c] * p[n, c])       or z = p without down_weight
    3. s[n, c] = gate(up_bias[c] + sum over r of up_weight[c, r] * z[n, r])
    4. y = res_scale * s * x + residual

`activation` is relu or silu; `gate` is sigmoid, hardsigmoid (v -> clamp(v / 6 + 1/2, 0, 1)) or none. This is RCAN's CALayer, the
squeeze-and-excitation of many networks, the attention of HAT's CAB, and, without down_weight and gate, that of NAFNet.
The backward reads grad and x once for a sum, and grad once more, with g = grad and v, u the arguments of gate and activation:

    5. ds[n, c] = res_scale * sum over h, w of g * x;  dv = ds * gate'(v);  dz = up_weight^T dv;  du = dz * activation'(u)
    6. dx = res_scale * s * g + (down_weight^T du) / (H * W);  dresidual = g
    7. dup_weight[c, r] = sum over n of dv[n, c] * z[n, r];  dup_bias = sum of dv;  likewise ddown_weight from du and p

Eager PyTorch reads or writes tensors of x's size six times and more, in eleven kernels; this op does so four times in two passes.

Sources: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", 2018, arXiv 1807.02758;
Hu et al., "Squeeze-and-Excitation Networks", 2017, arXiv 1709.01507; Chen et al., "Simple Baselines for Image Restoration"
(NAFNet), 2022, arXiv 2204.04676.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsr import backends
from fastsr.backends import FUSED_DTYPES, Backend, Rule
from fastsr.kernels import checks
from fastsr.kernels.channel_attention import compiled, reference
from fastsr.kernels.gate import Activation, Gate
from fastsr.kernels.gate import check as check_gate

backends.register(
    "channel_attention",
    compiled=("cpu", "cuda"),
    triton=("cpu", "cuda"),
    rules=(
        Rule("compiled", "two passes over memory in place of eager's eleven kernels", "cpu", FUSED_DTYPES),
        Rule("compiled", "two passes over memory, the second from L2 where it can; not measured yet", "cuda", FUSED_DTYPES),
        Rule("triton", "two passes over memory, for ROCm or without nvcc; not measured yet", "cuda", FUSED_DTYPES),
    ),
)


def channel_attention(
    x: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    res_scale: float = 1.0,
    gate: Gate = "sigmoid",
    activation: Activation = "relu",
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Gate the channels of `x` and add `residual`.

    Args:
        x: (N, C, H, W); float32, float16, bfloat16 or float64; any strides. Channels-last tensors, channel slices of
            them and tensors of contiguous planes (NCHW) are read where they lie; other layouts are copied once.
        down_weight: (R, C) or (R, C, 1, 1), the squeeze; None for none, then R = C.  down_bias: (R,) or None.
        up_weight: (C, R) or (C, R, 1, 1), the excitation.  up_bias: (C,) or None.
        residual: of x's shape, or None for no skip.
        res_scale: scales the gated branch before the skip.
        gate: "sigmoid", "hardsigmoid" or "none".
        activation: of the squeezed vector, "relu" or "silu"; unused without down_weight.
        out: inference only: a tensor of x's shape which is written in place and returned. It may be x or residual
            itself, else it shares no element with them.
        backend: "auto", "compiled", "triton" or "reference".

    Returns:
        (N, C, H, W) in x's dtype and memory format. Under autocast x, the parameters and residual may differ in dtype:
        the parameters are cast as those of `conv2d`, and the output has the dtype to which x, residual and autocast's
        dtype promote, as in eager PyTorch: bfloat16 stays bfloat16, and a float32 x or residual gives float32.

    Saved for backward: x, p and s (N * C values of float32 each), and the parameters; nothing where residual alone needs a
    gradient. Backward is first-order only (the reference backend differentiates any number of times).

    Raises:
        ValueError: shapes that do not fit together, an unknown gate or activation, a down_bias without a
            down_weight, an `out` that cannot be written in place or is given where a gradient is needed.
        TypeError: an unsupported dtype, or dtypes that differ.
        BackendUnavailable: `backend` was named and cannot run here, with the reason and the remedy.
    """
    x, residual, down_weight, down_bias, up_weight, up_bias = _autocast(x, residual, down_weight, down_bias, up_weight, up_bias)
    _check(x, residual)
    check_gate("channel_attention", x, x.shape[1], down_weight, down_bias, up_weight, up_bias, gate, activation)
    tensors = (x, down_weight, down_bias, up_weight, up_bias, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if out is not None:
        _check_out(out, x, needs_grad)
    run = backends.choose("channel_attention", backend, x).backend
    if run == "reference":
        y = reference.channel_attention(*tensors, res_scale=res_scale, gate=gate, activation=activation)
        return y if out is None else out.copy_(y)
    parameters = [p if p is None else p.contiguous() for p in (down_weight, down_bias, up_weight, up_bias)]
    options = _Options(res_scale, gate, activation, run)
    if needs_grad:
        return _ChannelAttention.apply(x, residual, *parameters, options)
    return _forward(out, None, None, x, residual, parameters, options)


def _autocast(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> tuple[Any, ...]:
    """Under autocast: all tensors in the dtype that eager's result would have. The gate is no less exact for that."""
    device = x.device.type
    low = (torch.float32, torch.bfloat16, torch.float16)
    tensors = (x, residual, *parameters)
    if not backends.autocasts(device) or x.dtype not in low:
        return tensors
    dtype = torch.promote_types(x.dtype, torch.get_autocast_dtype(device))
    if residual is not None and residual.dtype in low:
        dtype = torch.promote_types(dtype, residual.dtype)
    return tuple(t.to(dtype) if t is not None and t.dtype in low else t for t in tensors)


def _check(x: Tensor, residual: Tensor | None) -> None:
    checks.check_dtype("channel_attention", x, residual=residual)
    checks.check_shape("channel_attention", "x", x, (None,) * 4, "(N, C, H, W)")
    if min(x.shape[1:]) == 0:
        raise ValueError(f"channel_attention: x has shape {tuple(x.shape)}; expected at least one channel and one pixel")
    checks.check_shape("channel_attention", "residual", residual, x.shape, "x's shape")


def _check_out(out: Tensor, x: Tensor, needs_grad: bool) -> None:
    if needs_grad:
        raise ValueError("channel_attention: out is for inference only; call it under torch.no_grad() or leave out away")
    checks.check_dtype("channel_attention", x, out=out)
    checks.check_shape("channel_attention", "out", out, x.shape, "x's shape")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"channel_attention: out has strides {out.stride()}; an expanded tensor cannot be written in place")


class _Options(NamedTuple):
    res_scale: float
    gate: str
    activation: str
    run: str

    def kernels(self) -> ModuleType:
        """The module that runs it."""
        if self.run == "triton":
            from fastsr.kernels.channel_attention import triton  # imported late: Triton costs seconds and may be missing

            return triton
        return compiled


def _forward(
    out: Tensor | None,
    pooled: Tensor | None,
    gates: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Any],
    options: _Options,
) -> Tensor:
    """Run one of the kernels, in `out` where it is given."""
    given = out
    if out is None or not (checks.is_pixel_major(out) or checks.is_planar(out)):
        x, residual = checks.in_one_layout(x, residual)
        out = checks.empty_in_layout(x)
    else:
        out, x, residual = checks.in_one_layout(out, x, residual)
    options.kernels().forward_into(out, pooled, gates, x, residual, *parameters, *options[:3])
    return out if given is None or given is out else given.copy_(out)


class _ChannelAttention(torch.autograd.Function):
    """The one autograd boundary of the compiled and Triton backends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        *parameters, options = rest
        ctx.options, ctx.has_residual = options, residual is not None
        pooled = gates = None
        if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[2:]):
            pooled, gates = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
            ctx.save_for_backward(x, pooled, gates, *parameters)
        return _forward(None, pooled, gates, x, residual, parameters, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_residual, *needs = ctx.needs_input_grad[:6]
        dresidual = grad if ctx.has_residual and needs_residual else None
        if not ctx.saved_tensors:
            return None, dresidual, *(None,) * 5
        x, pooled, gates, *parameters = ctx.saved_tensors
        x, grad = checks.in_one_layout(x, grad)
        dx = checks.empty_in_layout(x) if needs_x else None
        wanted = any(needs)
        gradients = [torch.empty_like(p) if wanted and p is not None else None for p in parameters]
        down_weight, down_bias, up_weight, _ = parameters
        ctx.options.kernels().backward_into(dx, gradients, grad, x, pooled, gates, down_weight, down_bias, up_weight, *ctx.options[:3])
        return dx, dresidual, *(g if need else None for g, need in zip(gradients, needs, strict=True)), None
