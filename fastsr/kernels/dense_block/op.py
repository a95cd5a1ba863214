"""The residual dense block of ESRGAN without a concatenation: every convolution reads a prefix of one workspace.

For x[n, c, h, w] and K convolutions 3x3 with zero padding of one pixel, C = F + sum of the growths:

    1. a_0 = x;  a_k = leaky_relu(bias_k + weight_k * [a_0 | ... | a_(k-1)])         for k = 1 .. K-1
    2. y = res_scale * (bias_K + weight_K * [a_0 | ... | a_(K-1)]) + x
    3. y = residual_scale * y + residual                                             where a residual is given

One channels-last workspace holds [a_0 | ... | a_(K-1)]; a convolution reads its prefix and writes its slice.
The backward is a dense block as well, over gradients, with g_k that of the k-th convolution's output before its activation:

    4. g_K = res_scale * residual_scale * grad
    5. g_k = leaky_relu'(a_k) * (flipped weights of all later convolutions, at a_k's channels, * [g_K | ... | g_(k+1)])
    6. dx  = flipped weights of all convolutions, at x's channels, * [g_K | ... | g_1] + residual_scale * grad
    7. dweight_k = sum over images and pixels of g_k * the shifted prefix;  dbias_k = sum of g_k;  dresidual = grad

The sign of a_k is that of its argument, so the workspace is all that backward needs.

Source: Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", 2018, arXiv 1809.00219.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsr import backends
from fastsr.backends import FUSED_DTYPES, Backend, Rule
from fastsr.kernels import checks
from fastsr.kernels.dense_block import compiled, reference

backends.register(
    "dense_block",
    compiled=("cpu", "cuda"),
    triton=("cpu", "cuda"),
    rules=(
        Rule("compiled", "one workspace, no concatenation, no im2col buffer", "cpu", FUSED_DTYPES),
        Rule("compiled", "one workspace, no concatenation, mma.sync convolutions; not measured yet", "cuda", FUSED_DTYPES),
        Rule("triton", "one workspace, no concatenation, for ROCm or without nvcc; not measured yet", "cuda", FUSED_DTYPES),
    ),
)


def dense_block(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    negative_slope: float = 0.2,
    res_scale: float = 0.2,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    packed: Tensor | None = None,
    save: Literal["all", "input"] = "all",
    backend: Backend = "auto",
) -> Tensor:
    """Run a whole residual dense block on `x`.

    Args:
        x: (N, F, H, W); float32, float16, bfloat16 or float64; any strides (channels-last costs no copy).
        weights: K >= 1 tensors (G_k, F + G_1 + ... + G_(k-1), 3, 3); the last has G_K = F.
        biases: K tensors (G_k,), each may be None.
        negative_slope: of the LeakyReLU, at least 0 (backward reads its argument's sign from its output).
        res_scale: scales the last convolution before the block's own skip.
        residual: like x, the outer skip (the RRDB's, in its third block), or None.
        residual_scale: scales the block's output before the outer skip; used only with a residual.
        out: inference only: a channels-last tensor like x, or a channel slice of one, e.g. the prefix of the next
            block's workspace; it shares no element with x or `workspace`. It is written in place and returned.
        workspace: inference only: a channels-last (N, C, H, W) tensor to work in. Where x is its channel prefix
            (`x = workspace[:, :F]`) nothing is copied. On a CPU the compiled backend is faster without: it then keeps a few rows
            in its caches, and none of the C - F grown channels passes through memory.
        packed: inference only: `fastsr.ops.pack_weights(weights, biases)`; ignored where it does not fit.
        save: "all" keeps the workspace for backward; "input" keeps x alone and recomputes the rest.
        backend: "auto", "compiled", "triton" or "reference".

    Returns:
        (N, F, H, W) in x's dtype (autocast's under autocast), channels-last. Under autocast float32 weights are rounded where they are
        packed, and their gradients are not rounded at all.

    Saved for backward: the workspace, C values a pixel, with save="all"; x, F values a pixel, with "input"; and the weights.
    Backward is first-order only (the reference backend differentiates any number of times).

    Raises:
        ValueError: shapes that do not fit together, a negative slope, an `out` or `workspace` that cannot be
            written in place or is given where a gradient is needed.
        TypeError: an unsupported dtype, or dtypes that differ.
        BackendUnavailable: `backend` was named and cannot run here, with the reason and the remedy.
    """
    count = len(weights)
    if len(biases) != count or count == 0:
        raise ValueError(f"dense_block: {count} weights and {len(biases)} biases; expected as many of each, at least one")
    x, residual = checks.autocast(x, residual)
    parameters = checks.autocast_parameters(x, *weights, *biases)
    weights, biases = parameters[:count], parameters[count:]
    channels = _check(x, weights, biases, residual, negative_slope, save)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *parameters))
    _check_buffers(x, channels, out, workspace, needs_grad)
    if residual is None:
        residual_scale = 1.0
    run = backends.choose("dense_block", backend, x).backend
    if run == "reference":
        cast: list[Any] = [None if t is None else t.to(x.dtype) for t in parameters]
        y = reference.dense_block(
            x, cast[:count], cast[count:], residual, negative_slope=negative_slope, res_scale=res_scale, residual_scale=residual_scale
        )
        return y if out is None else out.copy_(y)
    scales = (negative_slope, res_scale, residual_scale)
    if needs_grad:
        return _DenseBlock.apply(x, residual, scales, save, run, *weights, *biases)
    if workspace is None and not (run == "compiled" and x.device.type == "cpu"):  # which keeps a few rows in its caches instead
        workspace = checks.empty_pixels(x, channels, *x.shape[2:])
    if out is None:
        out = checks.empty_pixels(x, *x.shape[1:])
    return _forward(out, workspace, x, weights, biases, residual, scales, run, packed)


def _check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None, negative_slope: float, save: str
) -> int:
    """Check all but the buffers; the workspace's channel count."""
    checks.check_dtype("dense_block", x, residual=residual)
    checks.check_shape("dense_block", "x", x, (None,) * 4, "(N, F, H, W)")
    if min(x.shape[1:]) == 0:
        raise ValueError(f"dense_block: x has shape {tuple(x.shape)}; expected at least one channel and one pixel")
    if not negative_slope >= 0:
        raise ValueError(f"dense_block: negative_slope is {negative_slope}; expected at least 0 (backward reads the sign of the output)")
    if save not in ("all", "input"):
        raise ValueError(f"dense_block: save is {save!r}; expected 'all' or 'input'")
    channels = x.shape[1]
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
        last = k == len(weights)
        checks.check_parameters("dense_block", x, **{f"weights[{k - 1}]": weight, f"biases[{k - 1}]": bias})
        outputs = x.shape[1] if last else None
        checks.check_shape("dense_block", f"weights[{k - 1}]", weight, (outputs, channels, 3, 3), "(growth, channels so far, 3, 3)")
        checks.check_shape("dense_block", f"biases[{k - 1}]", bias, (weight.shape[0],), "(growth,)")
        channels += 0 if last else weight.shape[0]
    checks.check_shape("dense_block", "residual", residual, x.shape, "x's shape")
    return channels


def _check_buffers(x: Tensor, channels: int, out: Tensor | None, workspace: Tensor | None, needs_grad: bool) -> None:
    n, _, h, w = x.shape
    for name, buffer, shape in (("out", out, x.shape), ("workspace", workspace, (n, channels, h, w))):
        if buffer is None:
            continue
        if needs_grad:
            raise ValueError(f"dense_block: {name} is for inference only; call it under torch.no_grad() or leave {name} away")
        checks.check_dtype("dense_block", x, **{name: buffer})
        checks.check_shape("dense_block", name, buffer, shape, "(N, F, H, W)" if name == "out" else "(N, all channels, H, W)")
        checks.check_pixel_major("dense_block", name, buffer)


def _kernels(run: str) -> ModuleType:
    if run == "triton":
        from fastsr.kernels.dense_block import triton  # imported late: Triton costs seconds and may be missing

        return triton
    return compiled


def _forward(
    out: Tensor,
    workspace: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    scales: tuple[float, float, float],
    run: str,
    packed: Tensor | None = None,
) -> Tensor:
    if out.numel():
        residual = None if residual is None else checks.pixel_major(residual)
        more = (packed,) if run == "compiled" else ()
        _kernels(run).forward_into(out, workspace, checks.pixel_major(x), weights, biases, residual, *scales, *more)
    return out


class _DenseBlock(torch.autograd.Function):
    """The one autograd boundary of the compiled and Triton backends."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scales: tuple[float, float, float], save: str, run: str, *parameters: Any
    ) -> Tensor:
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        x = checks.pixel_major(x)
        channels = weights[-1].shape[1]
        workspace = checks.empty_pixels(x, channels, *x.shape[2:])
        y = _forward(checks.empty_pixels(x, *x.shape[1:]), workspace, x, weights, biases, residual, scales, run)
        ctx.options = (scales, save, run, residual is not None, [b is not None for b in biases])
        kept_biases = biases if save == "input" else ()
        ctx.save_for_backward(x if save == "input" else workspace, *weights, *kept_biases)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scales, save, run, has_residual, has_bias = ctx.options
        count = len(has_bias)
        kept, *parameters = ctx.saved_tensors
        weights = parameters[:count]
        needs_x, needs_residual, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5:]
        need_parameters = any(needs)
        dresidual = grad if has_residual and needs_residual else None
        dx, dweights, dbiases = None, [], []
        if needs_x or need_parameters:
            shape = (kept.shape[0], weights[-1].shape[1], *kept.shape[2:])
            if kept.numel() == 0:
                dx = torch.zeros_like(grad) if needs_x else None
                dweights = [torch.zeros_like(w) for w in weights]
                dbiases = [w.new_zeros(w.shape[0]) for w in weights]
            else:
                kernels = _kernels(run)
                workspace = kept
                if save == "input":
                    workspace = checks.empty_pixels(kept, *shape[1:])
                    kernels.features_into(workspace, kept, weights[:-1], parameters[count : 2 * count - 1], scales[0])
                grad = checks.pixel_major(grad)
                dx = checks.empty_pixels(grad, *grad.shape[1:]) if needs_x else None
                if need_parameters:
                    dweights = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
                    dbiases = [w.new_empty(w.shape[0]) for w in weights]
                kernels.backward_into(dx, dweights, dbiases, torch.empty_like(workspace), grad, workspace, weights, *scales)
        wanted = [*dweights, *(b if has else None for b, has in zip(dbiases, has_bias, strict=False))] or [None] * len(needs)
        gradients = [g if need else None for g, need in zip(wanted, needs, strict=True)]
        return dx, dresidual, None, None, None, *gradients
