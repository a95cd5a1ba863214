"""RCAN's residual channel attention block: convolution, ReLU, convolution, channel attention and skip, in two passes.

For an image x[n, c, h, w] of F channels, M hidden channels, zero padding of one pixel and a squeeze of F to R channels:

    1. r = relu(bias1 + weight1 * x);  u = bias2 + weight2 * r                       (3x3 convolutions)
    2. p[n, c] = mean over h, w of u[n, c, h, w]
    3. s[n, c] = sigmoid(up_bias + up_weight . relu(down_bias + down_weight . p))[n, c]
    4. y       = res_scale * s * u + x

The mean of a convolution is the convolution's weights times sums of its input, so p needs r alone, and the second
convolution writes y at once:

    5. p[n, c] = bias2[c] + 1/(HW) * sum over m and the taps k of weight2[c, m, k] * T[n, m, k]
       T[n, m, k] = the sum of r[n, m] over the pixels that tap k reads: all, less a border row and a border column

Backward, with g the gradient of y and G[n] the weight gradient of weight2 for image n alone, taken with g itself:

    6. ds[n, c] = sum over h, w of res_scale * g * u = res_scale * (<G[n, c], weight2[c]> + bias2[c] * sum of g[n, c])
    7. the gradients of step 3 from ds; e[n, c] = dp[n, c] / (HW)
    8. du = res_scale * s * g + e;  dr = (r > 0) * (flipped weight2 * du);  dx = flipped weight1 * dr + g
    9. dweight2 = sum over n of res_scale * s[n] G[n] + e[n] T[n];  dbias2 = sum of du;  dweight1, dbias1 from x and dr

Source: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018, arXiv 1807.02758.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsr import backends
from fastsr.backends import FUSED_DTYPES, Backend, Rule
from fastsr.kernels import checks, gate
from fastsr.kernels.rcab import compiled, reference

backends.register(
    "rcab",
    compiled=("cpu", "cuda"),
    triton=("cpu", "cuda"),
    rules=(
        Rule("compiled", "two passes: the gate is known before the second convolution runs", "cpu", FUSED_DTYPES),
        Rule("compiled", "two passes, the gate known before the second; mma.sync convolutions; not measured yet", "cuda", FUSED_DTYPES),
        Rule("triton", "two passes, the gate known before the second; for ROCm or without nvcc; not measured yet", "cuda", FUSED_DTYPES),
    ),
)


def rcab(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    res_scale: float = 1.0,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    packed: Tensor | None = None,
    save: Literal["all", "input"] = "all",
    backend: Backend = "auto",
) -> Tensor:
    """Run a whole residual channel attention block on `x`.

    Both convolutions have stride 1 and zero padding of one pixel: the identity of step 5 knows no other.

    Args:
        x: (N, F, H, W); float32, float16, bfloat16 or float64; any strides (channels-last costs no copy).
        weight1: (M, F, 3, 3).  bias1: (M,) or None.
        weight2: (F, M, 3, 3).  bias2: (F,) or None.
        down_weight: (R, F) or (R, F, 1, 1), the squeeze.  down_bias: (R,) or None.
        up_weight: (F, R) or (F, R, 1, 1), the excitation.  up_bias: (F,) or None.
        res_scale: scales the gated branch before the skip.
        out: inference only: a channels-last tensor like x, or a channel slice of one; it is written in place and
            returned. It may be x itself, and shares no element with it otherwise, nor with `workspace`.
        workspace: inference only: a channels-last (N, M, H, W) tensor for the hidden channels.
        packed: inference only: `fastsr.ops.pack_weights([weight1, weight2], [bias1, bias2])`; ignored where it does not fit.
        save: "all" keeps the hidden channels for backward; "input" keeps x alone and recomputes the rest.
        backend: "auto", "compiled", "triton" or "reference".

    Returns:
        (N, F, H, W) in x's dtype (autocast's under autocast), channels-last. Under autocast float32 parameters are rounded where they
        are packed or read, and their gradients are not rounded at all.

    Saved for backward: x, r (M values a pixel; not with save="input"), vectors of N*F and N*M float32; and the weights.
    Backward is first-order only (the reference backend differentiates any number of times).

    Raises:
        ValueError: shapes that do not fit together, an `out` or `workspace` that cannot be written in place or is
            given where a gradient is needed.
        TypeError: an unsupported dtype, or dtypes that differ.
        BackendUnavailable: `backend` was named and cannot run here, with the reason and the remedy.
    """
    (x,) = checks.autocast(x)
    parameters = list(checks.autocast_parameters(x, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_bias))
    _check(save, x, *parameters)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    _check_buffers(x, weight1.shape[0], out, workspace, needs_grad)
    run = backends.choose("rcab", backend, x).backend
    if run == "reference":
        parameters = [None if t is None else t.to(x.dtype) for t in parameters]
        y = reference.rcab(x, *parameters, res_scale=res_scale)
        return y if out is None else out.copy_(y)
    if needs_grad:
        return _Rcab.apply(x, res_scale, save, run, *parameters)
    hidden = checks.empty_pixels(x, weight1.shape[0], *x.shape[2:]) if workspace is None else workspace
    out = checks.empty_pixels(x, *x.shape[1:]) if out is None else out
    _forward(out, hidden, *_vectors(hidden, x.shape[1]), x, parameters, res_scale, run, packed)
    return out


def _check(
    save: str,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
) -> None:
    """Check all but the buffers."""
    checks.check_parameters("rcab", x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    checks.check_shape("rcab", "x", x, (None,) * 4, "(N, F, H, W)")
    if min(x.shape[1:]) == 0:
        raise ValueError(f"rcab: x has shape {tuple(x.shape)}; expected at least one channel and one pixel")
    if save not in ("all", "input"):
        raise ValueError(f"rcab: save is {save!r}; expected 'all' or 'input'")
    features = x.shape[1]
    checks.check_shape("rcab", "weight1", weight1, (None, features, 3, 3), "(M, F, 3, 3)")
    hidden = weight1.shape[0]
    if hidden == 0:
        raise ValueError(f"rcab: weight1 has shape {tuple(weight1.shape)}; expected at least one hidden channel")
    checks.check_shape("rcab", "bias1", bias1, (hidden,), "(M,)")
    checks.check_shape("rcab", "weight2", weight2, (features, hidden, 3, 3), "(F, M, 3, 3)")
    checks.check_shape("rcab", "bias2", bias2, (features,), "(F,)")
    gate.check("rcab", x, features, down_weight, down_bias, up_weight, up_bias)


def _check_buffers(x: Tensor, hidden: int, out: Tensor | None, workspace: Tensor | None, needs_grad: bool) -> None:
    for name, buffer, channels in (("out", out, x.shape[1]), ("workspace", workspace, hidden)):
        if buffer is None:
            continue
        if needs_grad:
            raise ValueError(f"rcab: {name} is for inference only; call it under torch.no_grad() or leave {name} away")
        checks.check_dtype("rcab", x, **{name: buffer})
        checks.check_shape("rcab", name, buffer, (x.shape[0], channels, *x.shape[2:]), "x's images and size")
        checks.check_pixel_major("rcab", name, buffer)


def _kernels(run: str) -> ModuleType:
    """The module that runs it."""
    if run == "triton":
        from fastsr.kernels.rcab import triton  # imported late: Triton costs seconds and may be missing

        return triton
    return compiled


def _vectors(hidden: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Empty `sums` (N, M, 9) and `attention` (2, N, F): what the forward leaves beside the pictures, in float32."""
    n, m = hidden.shape[:2]
    return hidden.new_empty((n, m, 9), dtype=torch.float32), hidden.new_empty((2, n, features), dtype=torch.float32)


def _forward(
    out: Tensor,
    hidden: Tensor,
    sums: Tensor,
    attention: Tensor,
    x: Tensor,
    parameters: list[Tensor | None],
    res_scale: float,
    run: str,
    packed: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    weight1, bias1, weight2, *others = parameters
    assert weight2 is not None
    more = (packed,) if run == "compiled" else ()
    others = [None if t is None else t.contiguous() for t in others]
    arguments = (checks.pixel_major(x), weight1, bias1, _dense(weight2), *others)
    _kernels(run).forward_into(out, hidden, sums, attention, *arguments, res_scale, *more)


def _dense(weight: Tensor) -> Tensor:
    """`weight` itself if it is contiguous or channels-last, else a copy."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


class _Rcab(torch.autograd.Function):
    """The one autograd boundary of the compiled and Triton backends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, res_scale: float, save: str, run: str, *parameters: Any) -> Tensor:
        x = checks.pixel_major(x)
        weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_bias = parameters
        hidden = checks.empty_pixels(x, weight1.shape[0], *x.shape[2:])
        sums, attention = _vectors(hidden, x.shape[1])
        y = checks.empty_pixels(x, *x.shape[1:])
        _forward(y, hidden, sums, attention, x, list(parameters), res_scale, run)
        ctx.options = (res_scale, run, up_bias is not None)
        ctx.save_for_backward(
            x, None if save == "input" else hidden, sums, attention, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        res_scale, run, has_up_bias = ctx.options
        x, hidden, sums, attention, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        weights = (weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_weight if has_up_bias else None)
        shapes = (w for w in (weight1, weight2, down_weight, up_weight))
        gradients = [g for w in shapes for g in (torch.empty_like(w, memory_format=torch.contiguous_format), w.new_empty(w.shape[0]))]
        dx = checks.empty_pixels(grad, *grad.shape[1:]) if needs_x else None
        if x.numel() == 0:
            gradients = [g.zero_() for g in gradients]
        else:
            kernels = _kernels(run)
            if hidden is None:
                hidden = checks.empty_pixels(x, weight1.shape[0], *x.shape[2:])
                kernels.hidden_into(hidden, x, weight1, bias1)
            dense = [None if t is None else t.contiguous() for t in (weight2, bias2, down_weight, down_bias, up_weight)]
            wanted = gradients if any(needs) else []
            kernels.backward_into(
                dx, wanted, torch.empty_like(hidden), checks.pixel_major(grad), x, hidden, sums, attention, weight1, *dense, res_scale
            )
        given = [w is not None for w in weights]
        return dx, None, None, None, *(g if need and has else None for g, need, has in zip(gradients, needs, given, strict=True))
