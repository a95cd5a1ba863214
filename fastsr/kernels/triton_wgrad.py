"""Weight and bias gradients of 3x3 convolutions in Triton, for every op that has some.

    grid.x = groups of images * splits of their pixels * ceil(OUTPUTS / BLOCK_O) * (3 tap rows * ceil(CHANNELS / BLOCK_C) + 1 for biases)

          gradients: TILE_H x TILE_W pixels           activations, shifted by one tap
            BLOCK_O channels                            BLOCK_C channels
           +------------------+   transposed           +------------------+
           | pixels           |   ------ tl.dot -----> | pixels           |   three accumulators BLOCK_O x BLOCK_C, one for
           +------------------+                        +------------------+   each tap of a row, summed over a split's pixels

Each split stores its sums, and who called adds the splits of a group in a fixed order. Rows of the gradient may belong to convolutions
that read prefixes of the activations (the dense block's staircase): blocks right of it return at once.

Lives in   registers (sm_100: tensor memory): three accumulators    shared memory: num_stages tiles of pixels    L2: both tensors
Moves      from L2, per pixel and program: (BLOCK_O + 3 BLOCK_C) elements for 6 * BLOCK_O * BLOCK_C operations: 48 operations a byte
           of bf16 with 64 x 64 blocks (one tap a program: 32); scratch: about PROGRAMS * 48 KB written and read once
Limit      L2, as for conv3x3.

Predicted, 64 -> 64 channels, 16 x 48 x 48, bf16, H100: 0.02 ms, a fifth of the matrix rate. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.conv3x3.triton import pixel_offsets
from fastsr.kernels.triton_support import (
    AotCase,
    Schedule,
    current_device,
    dots_are_float32,
    family,
    instructions,
    of_family,
    pixel_strides,
    precision,
    stride_unit,
)

SIZES = ("H", "W", "tiles", "tiles_per_split", "splits", "g_n", "g_h", "g_w", "a_n", "a_h", "a_w")


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
    partial_ptr,  # [groups, splits, 9 taps, OUTPUTS, CHANNELS] float32
    bias_ptr,  # [groups, splits, OUTPUTS] float32
    gradient_ptr,
    activation_ptr,
    H,
    W,
    tiles,  # of a group's images
    tiles_per_split,
    splits,  # of a group
    g_n,
    g_h,
    g_w,
    a_n,
    a_h,
    a_w,
    OUTPUTS: tl.constexpr,  # channels of the gradients
    CHANNELS: tl.constexpr,  # of the activations
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
    O_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
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
    group = split // splits
    first = group * tiles + split % splits * tiles_per_split
    last = tl.minimum(first + tiles_per_split, (group + 1) * tiles)
    row = split.to(tl.int64) * OUTPUTS

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
            g = load_pixels(gradient_ptr, at[None, :], o, ((h < H) & (w < W))[None, :], OUTPUTS, BLOCK_O)
            h += tap_row - 1
            in_rows = (h >= 0) & (h < H)
            at = pixel_offsets(n, h0 + tap_row - 1, w0, a_n, a_h, a_w, A_UNIT) + a_tile
            a = load_pixels(activation_ptr, (at - a_right)[:, None], c, (in_rows & (w >= 1) & (w <= W))[:, None], CHANNELS, BLOCK_C)
            left = add_product(left, g, a, PRECISION, DOT_FLOAT32)
            a = load_pixels(activation_ptr, at[:, None], c, (in_rows & (w < W))[:, None], CHANNELS, BLOCK_C)
            centre = add_product(centre, g, a, PRECISION, DOT_FLOAT32)
            a = load_pixels(activation_ptr, (at + a_right)[:, None], c, (in_rows & (w + 1 < W))[:, None], CHANNELS, BLOCK_C)
            right = add_product(right, g, a, PRECISION, DOT_FLOAT32)
        stored = (o < OUTPUTS) & (c < CHANNELS)
        place = partial_ptr + (row * 9 + tap_row * (3 * OUTPUTS)) * CHANNELS + (o * CHANNELS + c)
        tl.store(place, left, mask=stored)
        tl.store(place + OUTPUTS * CHANNELS, centre, mask=stored)
        tl.store(place + 2 * OUTPUTS * CHANNELS, right, mask=stored)
    else:
        total = tl.zeros((BLOCK_O, PIXELS), tl.float32)
        for tile in range(first, last):
            n = tile // (tiles_w * tiles_h)
            h0 = tile // tiles_w % tiles_h * TILE_H
            w0 = tile % tiles_w * TILE_W
            inside = (h0 + m // TILE_W < H) & (w0 + m % TILE_W < W)
            at = pixel_offsets(n, h0, w0, g_n, g_h, g_w, G_UNIT) + g_tile
            total += load_pixels(gradient_ptr, at[None, :], o, inside[None, :], OUTPUTS, BLOCK_O).to(tl.float32)
        tl.store(bias_ptr + row + o, tl.sum(total, 1, keep_dims=True), mask=o < OUTPUTS)


@triton.jit(do_not_specialize=["row", "outputs", "channels", "prefix", "splits"])
def reduce_kernel(
    dweight_ptr,  # [outputs, prefix, 3, 3]
    dbias_ptr,  # [outputs]
    partial_ptr,
    bias_ptr,
    row,
    outputs,
    channels,
    prefix,
    splits,
    scale,
    BLOCK_C: tl.constexpr,
):
    """dweight and dbias of one convolution, whose gradients begin at channel `row` = scale * the sum over all splits, in their order."""
    blocks = tl.cdiv(prefix, BLOCK_C)
    o = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tap = tl.arange(0, 16)[:, None]  # nine of them, a power of two for Triton
    wanted = (tap < 9) & (c < prefix)
    at = (tap * outputs + row + o) * channels + c
    total = tl.zeros((16, BLOCK_C), tl.float32)
    bias = tl.sum(tl.zeros((1,), tl.float32), 0)
    for split in range(splits):
        rows = tl.full((), 1, tl.int64) * split * outputs
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


def partial_gradients(
    gradients: Tensor, activations: Tensor, rows: tuple[int, ...] = (0,), prefixes: tuple[int, ...] = (), groups: int = 1
) -> tuple[Tensor, Tensor]:
    """The sums of every split: (groups, splits, 9, outputs, channels) and (groups, splits, outputs) float32.

    `groups` divides the images. The convolution whose gradients begin at rows[k] reads the first prefixes[k] channels, or all of them.
    """
    n, channels, h, w = activations.shape
    outputs = gradients.shape[1]
    gpu, mode = family(activations.device), precision(activations)
    chosen = of_family(TILES, gpu, mode)
    g_unit, a_unit = stride_unit(gradients), stride_unit(activations)
    tiles = n // groups * triton.cdiv(h, chosen.tile_h) * triton.cdiv(w, chosen.tile_w)
    programs = triton.cdiv(outputs, chosen.block_o) * (3 * triton.cdiv(channels, chosen.block_c) + 1)
    wanted = round(PROGRAMS / (programs * groups))
    tiles_per_split = triton.cdiv(tiles, max(1, min(wanted, tiles // LEAST_TILES)))
    splits = triton.cdiv(tiles, tiles_per_split)
    partial = torch.empty((groups, splits, 9, outputs, channels), dtype=torch.float32, device=activations.device)
    bias_partial = torch.empty((groups, splits, outputs), dtype=torch.float32, device=activations.device)
    with current_device(activations):
        weight_gradient_kernel[(programs * groups * splits,)](
            partial,
            bias_partial,
            gradients,
            activations,
            h,
            w,
            tiles,
            tiles_per_split,
            splits,
            *pixel_strides(gradients, g_unit),
            *pixel_strides(activations, a_unit),
            **constants(chosen, mode, outputs, channels, rows, prefixes or (channels,), g_unit, a_unit),
            **chosen.options(),
        )
    return partial, bias_partial


def reduce(dweight: Tensor, dbias: Tensor, partial: Tensor, bias_partial: Tensor, row: int = 0, scale: float = 1.0) -> None:
    """`scale` times the gradients of the convolution whose output begins at gradient channel `row`, from the splits of one group."""
    _, splits, _, total, channels = partial.shape
    outputs, prefix = dweight.shape[:2]
    with current_device(partial):
        reduce_kernel[(outputs * triton.cdiv(prefix, REDUCED_CHANNELS),)](
            dweight, dbias, partial, bias_partial, row, total, channels, prefix, splits, scale, BLOCK_C=REDUCED_CHANNELS
        )


def constants(
    chosen: Config, mode: str, outputs: int, channels: int, rows: Sequence[int], prefixes: Sequence[int], g_unit: int, a_unit: int
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "OUTPUTS": outputs,
        "CHANNELS": channels,
        "ROWS": tuple(rows),
        "PREFIXES": tuple(prefixes),
        "G_UNIT": g_unit,
        "A_UNIT": a_unit,
        "TILE_H": chosen.tile_h,
        "TILE_W": chosen.tile_w,
        "BLOCK_O": chosen.block_o,
        "BLOCK_C": chosen.block_c,
        "PRECISION": "tf32" if mode == "tf32" else "ieee",
        "DOT_FLOAT32": dots_are_float32(),
    }


def aot_case(
    op: str, gpu: str, mode: str, dtype: str, outputs: int, channels: int, rows: Sequence[int], prefixes: Sequence[int]
) -> AotCase:
    """The weights' gradients of one op's convolutions."""
    chosen = of_family(TILES, gpu, mode)
    unit = 4 if dtype == "fp32" else 8
    units = [unit if count % unit == 0 else 1 for count in (outputs, channels)]
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*fp32", "gradient_ptr": "*" + dtype, "activation_ptr": "*" + dtype}
    return AotCase(
        name=f"{op}-{gpu}-{mode}-{dtype}-{outputs}-{channels}",
        family=gpu,
        kernel=weight_gradient_kernel,
        signature=pointers | dict.fromkeys(SIZES, "i32"),
        constants=constants(chosen, mode, outputs, channels, rows, prefixes, *units),
        aligned=tuple(pointers),
        options=chosen.options(),
        instructions=instructions(gpu, mode, min(units) > 1 and (mode != "tf32" or gpu == "sm_80")),
    )


def aot_reduce(op: str, gpu: str, dtype: str) -> AotCase:
    """The sum over the splits."""
    pointers = {"dweight_ptr": "*" + dtype, "dbias_ptr": "*" + dtype, "partial_ptr": "*fp32", "bias_ptr": "*fp32"}
    return AotCase(
        name=f"{op}-reduce-{gpu}-{dtype}",
        family=gpu,
        kernel=reduce_kernel,
        signature=pointers | dict.fromkeys(("row", "outputs", "channels", "prefix", "splits"), "i32") | {"scale": "fp32"},
        constants={"BLOCK_C": REDUCED_CHANNELS},
        aligned=tuple(pointers),
        options={},
    )
