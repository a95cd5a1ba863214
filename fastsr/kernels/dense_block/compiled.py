"""The calls into the native library (csrc/cpu/dense_block.cpp, csrc/cuda/dense_block.cu), with their fake twins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsr import _native
from fastsr.kernels.precision import takes_tf32


def forward_into(
    out: Tensor,
    workspace: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    negative_slope: float,
    res_scale: float,
    residual_scale: float,
    packed: Tensor | None = None,
) -> None:
    """Fill `workspace` with [x | a1 | a2 | ...] and `out` with the block's output; all pixel-major.

    Nothing is copied where x already is the workspace's channel prefix. On a CPU there need be no workspace: then each thread keeps
    only the rows that are still read."""
    torch.ops.fastsr.dense_block(
        x, weights, biases, residual, workspace, out, negative_slope, res_scale, residual_scale, packed, takes_tf32(x)
    )


def features_into(
    workspace: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], negative_slope: float
) -> None:
    """Fill `workspace` alone; `weights` and `biases` are those of all convolutions but the last."""
    torch.ops.fastsr.dense_block_features(x, weights, biases, workspace, negative_slope, takes_tf32(x))


def backward_into(
    dx: Tensor | None,
    dweights: Sequence[Tensor],
    dbiases: Sequence[Tensor],
    grad_workspace: Tensor,
    grad: Tensor,
    workspace: Tensor,
    weights: Sequence[Tensor],
    negative_slope: float,
    res_scale: float,
    residual_scale: float,
) -> None:
    """Fill the gradients of x, weights and biases from that of the output; `dx` may be None, the lists may be empty.

    `grad_workspace` has the workspace's shape and is scratch: [g_last | g_(last-1) | ... | g_1]."""
    torch.ops.fastsr.dense_block_backward(
        grad, workspace, weights, grad_workspace, dx, dweights, dbiases, negative_slope, res_scale, residual_scale, takes_tf32(grad)
    )


if _native.offers("dense_block", "dense_block_features", "dense_block_backward"):

    @torch.library.register_fake("fastsr::dense_block")
    def _(x, weights, biases, residual, workspace, out, negative_slope, res_scale, residual_scale, packed=None, tf32=False):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("fastsr::dense_block_features")
    def _(x, weights, biases, workspace, negative_slope, tf32=False):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("fastsr::dense_block_backward")
    def _(grad, workspace, weights, grad_workspace, dx, dweights, dbiases, negative_slope, res_scale, residual_scale, tf32=False):  # type: ignore[no-untyped-def]
        return None
