"""The dense block in Triton: the convolutions of `conv3x3/triton.py` over one workspace, and the weights' gradients.

Forward and the gradient of x are chains of one kernel. Seen from behind, the weights form one matrix, with a row for each channel
of the gradient workspace and a column for each channel of the workspace; every convolution of either chain is a rectangle of it:

                      x      a1    a2   ...                       stage of the backward that writes g_k = a column strip,
        g_K      [ w_K                       ]                    from the top down to the last convolution that reads a_k
        g_(K-1)  [ w_(K-1)             ]
        ...      [ ...          ]                                 dweight_k = a row strip of this matrix's gradient:
        g_1      [ w_1   ]                                        `triton_wgrad.py` makes all of them in one launch

Limit      L2, as for conv3x3. Of a 64 + 4 x 32 block's products in the weights' gradients 81% are wanted, the rest lies right of the
           staircase. With blocks of 128 gradient channels 77 operations a byte, but 65% wanted and twice the registers.

Predicted, weights' gradients, 64 + 4 x 32 channels, 16 x 48 x 48, bf16, H100: 0.1 ms, a fifth of the matrix rate. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastsr.kernels import triton_wgrad
from fastsr.kernels.conv3x3.triton import launch
from fastsr.kernels.triton_support import FAMILIES, AotCase, modes


def staircase(weights: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each convolution, the last first: its first row in the gradient workspace, and the columns of the workspace that it reads."""
    rows = accumulate((w.shape[0] for w in reversed(weights[1:])), initial=0)
    return tuple(rows), tuple(w.shape[1] for w in reversed(weights))


def backward_matrix(weights: Sequence[Tensor], rows: Sequence[int], channels: int) -> Tensor:
    """The matrix of the file's head as the weights of transposed convolutions: (column, row, 3, 3); blank right of the staircase."""
    matrix = weights[0].new_empty((channels, channels, 3, 3))
    for weight, row in zip(reversed(weights), rows, strict=True):
        matrix[row : row + weight.shape[0], : weight.shape[1]] = weight
    return matrix.flip(2, 3).transpose(0, 1)


def weight_gradients(
    dweights: Sequence[Tensor], dbiases: Sequence[Tensor], gradients: Tensor, workspace: Tensor, weights: Sequence[Tensor], scale: float
) -> None:
    """Step 7 of `fastsr.ops.dense_block` times `scale`, for all convolutions."""
    rows, prefixes = staircase(weights)
    sums = triton_wgrad.partial_gradients(gradients, workspace, rows, prefixes)
    for dweight, dbias, row in zip(reversed(dweights), reversed(dbiases), rows, strict=True):
        triton_wgrad.reduce(dweight, dbias, *sums, row, scale)


def lies_in(x: Tensor, prefix: Tensor) -> bool:
    """True if x is this very prefix of a workspace."""
    strides = zip(x.shape, x.stride(), prefix.stride(), strict=True)
    return x.data_ptr() == prefix.data_ptr() and all(size == 1 or a == b for size, a, b in strides)


def fill(workspace: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], negative_slope: float) -> None:
    """Step 1 of `fastsr.ops.dense_block`, in place."""
    end = x.shape[1]
    if not lies_in(x, workspace[:, :end]):
        workspace[:, :end].copy_(x)
    for weight, bias in zip(weights, biases, strict=True):
        begin, end = end, end + weight.shape[0]
        launch(workspace[:, begin:end], workspace[:, :begin], weight, bias, negative_slope=negative_slope)


# Opaque to torch.compile, as conv3x3's launcher is.
@torch.library.custom_op("fastsr::triton_dense_block_features", mutates_args=("workspace",))
def features_into(
    workspace: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], negative_slope: float
) -> None:
    """Fill `workspace` alone with [x | a1 | a2 | ...]; `weights` and `biases` are those of all convolutions but the last."""
    fill(workspace, x, weights, biases, negative_slope)


@torch.library.custom_op("fastsr::triton_dense_block", mutates_args=("out", "workspace"))
def forward_into(
    out: Tensor,
    workspace: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    negative_slope: float,
    res_scale: float,
    residual_scale: float,
) -> None:
    """Fill `workspace` with [x | a1 | a2 | ...] and `out` with the block's output; all pixel-major."""
    fill(workspace, x, weights[:-1], biases[:-1], negative_slope)
    skip = workspace[:, : x.shape[1]]
    launch(out, workspace, weights[-1], biases[-1], skip, scale=res_scale, outer=residual, outer_scale=residual_scale)


@torch.library.custom_op("fastsr::triton_dense_block_backward", mutates_args=("dx", "dweights", "dbiases", "grad_workspace"))
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

    Everything is linear in `grad`, so the outer scale multiplies the float32 sums at the end."""
    rows, prefixes = staircase(weights)
    features = prefixes[-1]
    torch.mul(grad, res_scale, out=grad_workspace[:, :features])
    matrix = backward_matrix(weights, rows, workspace.shape[1])
    for row, begin, end in zip(rows[1:], prefixes[1:], prefixes[:-1], strict=True):
        launch(
            grad_workspace[:, row : row + end - begin],
            grad_workspace[:, :row],
            matrix[begin:end, :row],
            negative_slope=negative_slope,
            mask=workspace[:, begin:end],
        )
    if dx is not None:
        launch(dx, grad_workspace, matrix[:features], residual=grad, outer_scale=residual_scale)
    if dweights:
        weight_gradients(dweights, dbiases, grad_workspace, workspace, weights, residual_scale)


for operator in (features_into, forward_into, backward_into):
    operator.register_fake(lambda *arguments: None)


def aot_cases() -> Iterator[AotCase]:
    """ESRGAN's block and one of odd widths, whose pixels no move of 16 bytes fits, for every line of the table."""
    for gpu in FAMILIES:
        for mode, dtype in modes(gpu):
            yield triton_wgrad.aot_case("dense_block", gpu, mode, dtype, 192, 192, (0, 64, 96, 128, 160), (192, 160, 128, 96, 64))
            yield triton_wgrad.aot_case("dense_block", gpu, mode, dtype, 49, 49, (0, 33), (49, 33))
        for dtype in ("bf16", "fp16", "fp32"):
            yield triton_wgrad.aot_reduce("dense_block", gpu, dtype)
