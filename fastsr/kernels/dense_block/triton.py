"""The dense block in Triton: the convolutions of `conv3x3/triton.py` over one workspace, and the weights' gradients.

Forward and the gradient of x are chains of one kernel. Seen from behind, the weights form one matrix, with a row for each channel
of the gradient workspace and a column for each channel of the workspace; every convolution of either chain is a rectangle of it:

                      x      a1    a2   ...                       stage of the backward that writes g_k = a column strip,
        g_K      [ w_K                       ]                    from the top down to the last convolution that reads a_k
        g_(K-1)  [ w_(K-1)             ]
        ...      [ ...          ]                                 dweight_k = a row strip of this matrix's gradient:
        g_1      [ w_1   ]                                        weight_gradient_kernel makes all of them in one launch

    grid.x = splits of the pixels * ceil(channels / BLOCK_O) * (3 tap rows * ceil(channels / BLOCK_C) + 1 for the biases)

          gradients: TILE_H x TILE_W pixels           activations, shifted by one tap
            BLOCK_O channels                            BLOCK_C channels
           +------------------+   transposed           +------------------+
           | pixels           |   ------ tl.dot -----> | pixels           |   three accumulators BLOCK_O x BLOCK_C, one for
           +------------------+                        +------------------+   each tap of a row, summed over a split's pixels

Blocks right of the staircase return at once. Each split stores its sums; `reduce_kernel` adds the splits in a fixed order.

Lives in   registers (sm_100: tensor memory): three accumulators    shared memory: num_stages tiles of pixels    L2: both workspaces
Moves      from L2, per pixel and program: (BLOCK_O + 3 BLOCK_C) elements for 6 * BLOCK_O * BLOCK_C operations: 48 operations a byte
           of bf16 with 64 x 64 blocks (one tap a program: 32); scratch: about PROGRAMS * 48 KB written and read once
Limit      L2, as for conv3x3. Of a 64 + 4 x 32 block's products 81% are wanted, the rest lies right of the staircase. With blocks of
           128 gradient channels 77 operations a byte, but 65% wanted and twice the registers.

Predicted, 64 + 4 x 32 channels, 16 x 48 x 48, bf16, H100: 0.1 ms, about a fifth of the matrix rate. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.conv3x3.triton import launch, pixel_offsets
from fastsr.kernels.triton_support import (
    FAMILIES,
    AotCase,
    Schedule,
    current_device,
    dots_are_float32,
    family,
    instructions,
    modes,
    of_family,
    pixel_strides,
    precision,
    stride_unit,
)

SIZES = ("H", "W", "tiles", "tiles_per_split", "g_n", "g_h", "g_w", "a_n", "a_h", "a_w")


@triton.jit
def load_pixels(ptr, pixels, channels, inside, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Pixels along one dimension and channels along the other; 0 outside the image and beyond the last channel."""
    if CHANNELS % BLOCK != 0:
        inside = inside & (channels < CHANNELS)
    return tl.load(ptr + (pixels + channels), mask=inside, other=0.0)


@triton.jit
def add_product(total, gradients, activations, PRECISION: tl.constexpr, DOT_FLOAT32: tl.constexpr):
    """total + gradients * activations, in float32."""
    if DOT_FLOAT32:
        gradients = gradients.to(tl.float32)
        activations = activations.to(tl.float32)
    return tl.dot(gradients, activations, total, input_precision=PRECISION)


# Sizes and strides are not specialised: a new image size must not compile anew.
@triton.jit(do_not_specialize=[*SIZES])
def weight_gradient_kernel(
    partial_ptr,  # [splits, 9 taps, CHANNELS of gradients, CHANNELS of activations] float32
    bias_ptr,  # [splits, CHANNELS of gradients] float32
    gradient_ptr,
    activation_ptr,
    H,
    W,
    tiles,
    tiles_per_split,
    g_n,
    g_h,
    g_w,
    a_n,
    a_h,
    a_w,
    CHANNELS: tl.constexpr,  # of either workspace
    ROWS: tl.constexpr,  # of each convolution, the last first: its first gradient channel ...
    PREFIXES: tl.constexpr,  # ... and the number of activation channels that it reads
    G_UNIT: tl.constexpr,
    A_UNIT: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
):
    """partial[split, tap, o, c] = sum over the split's pixels p of gradient[p, o] * activation[p + tap, c]; bias = sum of gradient."""
    PIXELS: tl.constexpr = TILE_H * TILE_W
    O_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_O - 1) // BLOCK_O
    C_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    PARTS: tl.constexpr = 3 * C_BLOCKS + 1

    # Programs that share pixels are neighbours, so that one reads from L2 what another has brought there.
    part = tl.program_id(0) % PARTS
    o_block = tl.program_id(0) // PARTS % O_BLOCKS
    split = tl.program_id(0) // (PARTS * O_BLOCKS)
    tap_row = part // C_BLOCKS  # 3 stands for the biases
    c_block = part % C_BLOCKS
    prefix = CHANNELS
    for k in tl.static_range(1, len(ROWS)):
        prefix = tl.where(o_block * BLOCK_O >= ROWS[k], PREFIXES[k], prefix)
    if c_block * BLOCK_C >= prefix:
        return

    tiles_w = tl.cdiv(W, TILE_W)
    tiles_h = tl.cdiv(H, TILE_H)
    m = tl.arange(0, PIXELS)
    zero = m * 0
    g_tile = pixel_offsets(zero, m // TILE_W, m % TILE_W, g_n, g_h, g_w, G_UNIT)
    a_tile = pixel_offsets(zero, m // TILE_W, m % TILE_W, a_n, a_h, a_w, A_UNIT)
    a_right = a_w.to(tl.int64) * A_UNIT
    # Gradients are loaded transposed, as the product wants them: Triton pipelines that, but no tl.trans.
    o = (o_block * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    c = (c_block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    row = split.to(tl.int64) * CHANNELS

    if tap_row < 3:
        left = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        centre = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        right = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        for tile in range(first, last):
            n = tile // (tiles_w * tiles_h)
            h0 = tile // tiles_w % tiles_h * TILE_H
            w0 = tile % tiles_w * TILE_W
            h = h0 + m // TILE_W
            w = w0 + m % TILE_W
            at = pixel_offsets(n, h0, w0, g_n, g_h, g_w, G_UNIT) + g_tile
            g = load_pixels(gradient_ptr, at[None, :], o, ((h < H) & (w < W))[None, :], CHANNELS, BLOCK_O)
            h += tap_row - 1
            in_rows = (h >= 0) & (h < H)
            at = pixel_offsets(n, h0 + tap_row - 1, w0, a_n, a_h, a_w, A_UNIT) + a_tile
            a = load_pixels(activation_ptr, (at - a_right)[:, None], c, (in_rows & (w >= 1) & (w <= W))[:, None], CHANNELS, BLOCK_C)
            left = add_product(left, g, a, PRECISION, DOT_FLOAT32)
            a = load_pixels(activation_ptr, at[:, None], c, (in_rows & (w < W))[:, None], CHANNELS, BLOCK_C)
            centre = add_product(centre, g, a, PRECISION, DOT_FLOAT32)
            a = load_pixels(activation_ptr, (at + a_right)[:, None], c, (in_rows & (w + 1 < W))[:, None], CHANNELS, BLOCK_C)
            right = add_product(right, g, a, PRECISION, DOT_FLOAT32)
        stored = (o < CHANNELS) & (c < CHANNELS)
        place = partial_ptr + (row * 9 + tap_row * (3 * CHANNELS)) * CHANNELS + (o * CHANNELS + c)
        tl.store(place, left, mask=stored)
        tl.store(place + CHANNELS * CHANNELS, centre, mask=stored)
        tl.store(place + 2 * CHANNELS * CHANNELS, right, mask=stored)
    else:
        total = tl.zeros((BLOCK_O, PIXELS), tl.float32)
        for tile in range(first, last):
            n = tile // (tiles_w * tiles_h)
            h0 = tile // tiles_w % tiles_h * TILE_H
            w0 = tile % tiles_w * TILE_W
            inside = (h0 + m // TILE_W < H) & (w0 + m % TILE_W < W)
            at = pixel_offsets(n, h0, w0, g_n, g_h, g_w, G_UNIT) + g_tile
            total += load_pixels(gradient_ptr, at[None, :], o, inside[None, :], CHANNELS, BLOCK_O).to(tl.float32)
        tl.store(bias_ptr + row + o, tl.sum(total, 1, keep_dims=True), mask=o < CHANNELS)


@triton.jit(do_not_specialize=["row", "channels", "prefix", "splits"])
def reduce_kernel(
    dweight_ptr,  # [outputs, prefix, 3, 3]
    dbias_ptr,  # [outputs]
    partial_ptr,
    bias_ptr,
    row,  # the convolution's first gradient channel
    channels,
    prefix,
    splits,
    scale,
    BLOCK_C: tl.constexpr,
):
    """dweight and dbias of one convolution = scale * the sum over all splits, in their order."""
    blocks = tl.cdiv(prefix, BLOCK_C)
    o = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tap = tl.arange(0, 16)[:, None]  # nine of them, a power of two for Triton
    wanted = (tap < 9) & (c < prefix)
    at = (tap * channels + row + o) * channels + c
    total = tl.zeros((16, BLOCK_C), tl.float32)
    bias = tl.sum(tl.zeros((1,), tl.float32), 0)
    for split in range(splits):
        rows = tl.full((), 1, tl.int64) * split * channels
        total += tl.load(partial_ptr + rows * channels * 9 + at, mask=wanted, other=0.0)
        bias += tl.load(bias_ptr + rows + row + o)
    tl.store(dweight_ptr + (o * prefix + c) * 9 + tap, (total * scale).to(dweight_ptr.dtype.element_ty), mask=wanted)
    tl.store(dbias_ptr + o, (bias * scale).to(dbias_ptr.dtype.element_ty), mask=block == 0)


@dataclass(frozen=True)
class Config(Schedule):
    """Tile and schedule of one program of the weights' gradients."""

    block_o: int
    block_c: int
    tile_h: int
    tile_w: int


#: (family or vendor, precision) -> block_o, block_c, tile_h, tile_w, num_warps, num_stages. The family's own line wins.
TILES: dict[tuple[str, str], Config] = {
    # 8 warps: with 4 the accumulators and a workspace of odd width take 253 registers. 64 pixels a step spill with 4 warps.
    ("nvidia", "half"): Config(64, 64, 2, 16, num_warps=8, num_stages=3),
    # mma.sync holds all operands in registers: 64 x 64 takes 167 with 8 warps, one block on an SM. Half of that takes 136 with 4,
    # three blocks, and wastes 7% right of the staircase instead of 19%, for 38 operations a byte instead of 48.
    ("sm_80", "half"): Config(64, 32, 2, 16, num_warps=4, num_stages=3),
    # wgmma and tcgen05 take float32 with the pixels side by side only, so the copies transpose, 4 bytes at a time: short steps.
    ("nvidia", "tf32"): Config(64, 64, 1, 16, num_warps=8, num_stages=3),
    ("sm_80", "tf32"): Config(64, 32, 2, 16, num_warps=4, num_stages=2),
    # FMA units: 4 x 4 accumulators a thread for each tap; a third stage spills on sm_100.
    ("nvidia", "ieee"): Config(64, 64, 1, 16, num_warps=8, num_stages=2),
    # 64 KB of local memory: 16 KB a step leave room for four blocks.
    ("amd", "half"): Config(64, 64, 2, 16, num_warps=4, num_stages=2),
    ("amd", "ieee"): Config(64, 64, 1, 16, num_warps=4, num_stages=2),
}

#: Programs wanted in a launch: two on each of an H100's 132 SMs. More of them shorten the tail but write more partial sums.
PROGRAMS = 264
#: Tiles of pixels below which another split costs more in partial sums than it gains.
LEAST_TILES = 8
REDUCED_CHANNELS = 64


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
    n, channels, h, w = workspace.shape
    rows, prefixes = staircase(weights)
    gpu, mode = family(workspace.device), precision(workspace)
    chosen = of_family(TILES, gpu, mode)
    g_unit, a_unit = stride_unit(gradients), stride_unit(workspace)
    tiles = n * triton.cdiv(h, chosen.tile_h) * triton.cdiv(w, chosen.tile_w)
    programs = triton.cdiv(channels, chosen.block_o) * (3 * triton.cdiv(channels, chosen.block_c) + 1)
    tiles_per_split = triton.cdiv(tiles, max(1, min(round(PROGRAMS / programs), tiles // LEAST_TILES)))
    splits = triton.cdiv(tiles, tiles_per_split)
    partial = torch.empty((splits, 9, channels, channels), dtype=torch.float32, device=workspace.device)
    bias_partial = torch.empty((splits, channels), dtype=torch.float32, device=workspace.device)
    with current_device(workspace):
        weight_gradient_kernel[(programs * splits,)](
            partial,
            bias_partial,
            gradients,
            workspace,
            h,
            w,
            tiles,
            tiles_per_split,
            *pixel_strides(gradients, g_unit),
            *pixel_strides(workspace, a_unit),
            **constants(chosen, mode, channels, rows, prefixes, g_unit, a_unit),
            **chosen.options(),
        )
        for dweight, dbias, row in zip(reversed(dweights), reversed(dbiases), rows, strict=True):
            outputs, prefix = dweight.shape[:2]
            reduce_kernel[(outputs * triton.cdiv(prefix, REDUCED_CHANNELS),)](
                dweight, dbias, partial, bias_partial, row, channels, prefix, splits, scale, BLOCK_C=REDUCED_CHANNELS
            )


def constants(
    chosen: Config, mode: str, channels: int, rows: tuple[int, ...], prefixes: tuple[int, ...], g_unit: int, a_unit: int
) -> dict[str, Any]:
    """The compile-time arguments of the weights' gradients."""
    return {
        "CHANNELS": channels,
        "ROWS": rows,
        "PREFIXES": prefixes,
        "G_UNIT": g_unit,
        "A_UNIT": a_unit,
        "TILE_H": chosen.tile_h,
        "TILE_W": chosen.tile_w,
        "BLOCK_O": chosen.block_o,
        "BLOCK_C": chosen.block_c,
        "PRECISION": "tf32" if mode == "tf32" else "ieee",
        "DOT_FLOAT32": dots_are_float32(),
    }


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
            yield aot_case(gpu, mode, dtype, 192, (0, 64, 96, 128, 160), (192, 160, 128, 96, 64))
            yield aot_case(gpu, mode, dtype, 49, (0, 33), (49, 33))
        for dtype in ("bf16", "fp16", "fp32"):
            pointers = {"dweight_ptr": "*" + dtype, "dbias_ptr": "*" + dtype, "partial_ptr": "*fp32", "bias_ptr": "*fp32"}
            yield AotCase(
                name=f"dense_block-reduce-{gpu}-{dtype}",
                family=gpu,
                kernel=reduce_kernel,
                signature=pointers | dict.fromkeys(("row", "channels", "prefix", "splits"), "i32") | {"scale": "fp32"},
                constants={"BLOCK_C": REDUCED_CHANNELS},
                aligned=tuple(pointers),
                options={},
            )


def aot_case(gpu: str, mode: str, dtype: str, channels: int, rows: tuple[int, ...], prefixes: tuple[int, ...]) -> AotCase:
    """The weights' gradients of one block."""
    chosen = of_family(TILES, gpu, mode)
    unit = 4 if dtype == "fp32" else 8
    unit = unit if channels % unit == 0 else 1
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*fp32", "gradient_ptr": "*" + dtype, "activation_ptr": "*" + dtype}
    return AotCase(
        name=f"dense_block-{gpu}-{mode}-{dtype}-{channels}",
        family=gpu,
        kernel=weight_gradient_kernel,
        signature=pointers | dict.fromkeys(SIZES, "i32"),
        constants=constants(chosen, mode, channels, rows, prefixes, unit, unit),
        aligned=tuple(pointers),
        options=chosen.options(),
        instructions=instructions(gpu, mode, unit > 1 and (mode != "tf32" or gpu == "sm_80")),
    )
