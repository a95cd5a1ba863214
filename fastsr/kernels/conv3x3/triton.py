"""The fused 3x3 convolution as an implicit GEMM in Triton.

    grid.x = images * tile rows * tile columns * ceil(O / BLOCK_N), output channels fastest

          u, the (upsampled) input             taps of the weight              a program's accumulators
          w0-1          w0+TILE_W                 [9, C, O]                     BLOCK_N channels
    h0-1  +-----------------+                 +-------------+                +-------------+
          | . . . . . . . . |   9 shifted     | tap 0       |   tl.dot       | pixel h0,w0 |
          | . +---------+ . |   windows of    |  BLOCK_K x  |  ------->      |             |
          | . | pixels  | . |   TILE_H x      |  BLOCK_N    |   float32      | TILE_H x    |
          | . +---------+ . |   TILE_W pixels |    ...      |                | TILE_W rows |
          | . . . . . . . . |   x BLOCK_K     | tap 8       |                |             |
          +-----------------+                 +-------------+                +-------------+

One loop of 9 * ceil(C / BLOCK_K) steps: each loads a window of x (pixels outside the image read as 0) and a tile of the
weight, and multiplies. The order of summation depends on C alone, never on the image's size or a pixel's place in it.

Lives in   registers: the accumulators    shared memory: num_stages windows and weight tiles    L2: x, read 9 times
Moves      from L2, per step: (BLOCK_M + BLOCK_N) * BLOCK_K elements for 2 * BLOCK_M * BLOCK_N * BLOCK_K operations
           from DRAM: x once plus the halo ((TILE_H + 2)(TILE_W + 2) / BLOCK_M = 1.41 for 8 x 16, mostly L2 hits), y once
Limit      the re-reading of x through L2, below the tensor cores' rate wherever O is small. Operations per L2 byte, 2-byte types:

               BLOCK_M x BLOCK_N    128 x 16    128 x 32    128 x 64    256 x 64    128 x 128
               operations / byte        14.2        25.6        42.7        51.2         64.0

Tiles, for a 64-channel input in bf16 (registers a thread, shared memory, warps that fit on one SM; Triton 3.9; no spills):

                        sm_80                   sm_90                   gfx942
    -> 32   8 x 16      126   40,960   16       88    61,440   12       90    20,480   12
    -> 64   8 x 16      168   49,152   12      124    73,728   12       66    24,576   16
    -> 256  8 x 16      178   65,536    8      138    98,304    8      126    32,768   16

256 pixels for 64 channels would raise operations per byte by a fifth, but spill with 4 warps, and with 8 leave one block on
an SM, whose every step then waits for L2; 128 x 128 with 4 warps takes 250 registers on sm_90 and spills on sm_80. 16 x 16
pixels for 32 channels gain a tenth and halve the programs that small images offer (16 images of 48 x 48: 288 tiles of 128
for 132 SMs). Hence 128 pixels everywhere. The tests compile every line of the table below for every family, free of spills.

Predicted, 64 -> 64 channels, bf16, H100: a quarter to a third of the matrix rate, limited by L2. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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

SIZES = ("H", "W", "x_n", "x_h", "x_w", "out_n", "out_h", "out_w", "residual_n", "residual_h", "residual_w")
OUTER = ("mask_n", "mask_h", "mask_w", "outer_n", "outer_h", "outer_w")


@triton.jit
def pixel_offsets(n, h, w, stride_n, stride_h, stride_w, UNIT: tl.constexpr):
    """64-bit offsets of pixels in a tensor whose strides are given in UNIT elements."""
    return (n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w) * UNIT


@triton.jit
def output_offsets(n, h, w, o, stride_n, stride_h, stride_w, UNIT: tl.constexpr, SHUFFLE: tl.constexpr, CHANNELS: tl.constexpr):
    """64-bit offsets, pixels x channels, in a tensor of the output's shape; channels are ordered as by `shuffle_order`."""
    pixels = pixel_offsets(n, h * SHUFFLE, w * SHUFFLE, stride_n, stride_h, stride_w, UNIT)
    if SHUFFLE == 1:
        return pixels[:, None] + o[None, :]
    place = o // CHANNELS
    shifts = pixel_offsets(n * 0, place // SHUFFLE, place % SHUFFLE, stride_n, stride_h, stride_w, UNIT)
    return pixels[:, None] + (shifts + o % CHANNELS)[None, :]


# Sizes and strides are not specialised: a new image size must not compile anew.
@triton.jit(do_not_specialize=[*SIZES, *OUTER])
def conv3x3_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,  # [9, C, O], both padded with zeros to whole blocks
    bias_ptr,  # this pointer and the next five may be None
    residual_ptr,
    mask_ptr,
    outer_ptr,
    factor_ptr,  # [images, C_OUT] float32
    sums_ptr,  # [tiles, 9, C_OUT] float32
    H,  # of the convolution's output, before PixelShuffle
    W,
    x_n,
    x_h,
    x_w,
    out_n,
    out_h,
    out_w,
    residual_n,
    residual_h,
    residual_w,
    mask_n,
    mask_h,
    mask_w,
    outer_n,
    outer_h,
    outer_w,
    slope,
    scale,
    outer_scale,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none", "relu" or "leaky_relu"
    UPSAMPLE: tl.constexpr,
    SHUFFLE: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    DOT_FLOAT32: tl.constexpr,
):
    """out = outer_scale * (scale * factor * f(conv(x) + bias) + residual) + outer, f an activation or a multiplication by
    mask > 0 ? 1 : slope. sums = those of a tile's pixels of out that each tap of a following 3x3 convolution reads."""
    BLOCK_M: tl.constexpr = TILE_H * TILE_W
    K_STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    N_BLOCKS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N

    tile = tl.program_id(0)
    block = tile % N_BLOCKS
    tile = tile // N_BLOCKS
    tiles_w = tl.cdiv(W, TILE_W)
    tiles_h = tl.cdiv(H, TILE_H)
    n = tile // (tiles_w * tiles_h)
    m = tl.arange(0, BLOCK_M)
    h = (tile // tiles_w) % tiles_h * TILE_H + m // TILE_W
    w = tile % tiles_w * TILE_W + m % TILE_W
    o = block * BLOCK_N + tl.arange(0, BLOCK_N)

    k = tl.arange(0, BLOCK_K)
    centre = pixel_offsets(n, h, w, x_n, x_h, x_w, X_UNIT)
    row: tl.constexpr = N_BLOCKS * BLOCK_N  # of the packed weight
    block_of_taps = k[:, None] * row + o[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(9 * K_STEPS):
        tap = step // K_STEPS
        c = step % K_STEPS * BLOCK_K + k
        down = tap // 3 - 1
        right = tap % 3 - 1
        inside = ((h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W))[:, None]
        if C_IN % BLOCK_K != 0:
            inside = inside & (c < C_IN)[None, :]
        if UPSAMPLE == 1:
            pixels = centre + (x_h.to(tl.int64) * down + x_w.to(tl.int64) * right) * X_UNIT  # one addition for each pixel
        else:
            pixels = pixel_offsets(n, (h + down) // UPSAMPLE, (w + right) // UPSAMPLE, x_n, x_h, x_w, X_UNIT)
        window = tl.load(x_ptr + pixels[:, None] + c[None, :], mask=inside, other=0.0)
        taps = tl.load(weight_ptr + tl.full((), BLOCK_K * row, tl.int64) * step + block_of_taps)
        if DOT_FLOAT32:
            window = window.to(tl.float32)
            taps = taps.to(tl.float32)
        accumulator = tl.dot(window, taps, accumulator, input_precision=PRECISION)

    CHANNELS: tl.constexpr = C_OUT // (SHUFFLE * SHUFFLE)
    stored = ((h < H) & (w < W))[:, None] & (o < C_OUT)[None, :]
    y = accumulator
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=o < C_OUT, other=0.0).to(tl.float32)[None, :]
    if mask_ptr is not None:
        at = output_offsets(n, h, w, o, mask_n, mask_h, mask_w, Y_UNIT, SHUFFLE, CHANNELS)
        # The interpreter compares the bits of bfloat16 as integers, so compare as float32.
        y = tl.where(tl.load(mask_ptr + at, mask=stored, other=0.0).to(tl.float32) > 0, y, y * slope)
    elif ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # keeps NaN, and -inf gives 0
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y > 0, y, y * slope)
    y *= scale
    if factor_ptr is not None:
        y *= tl.load(factor_ptr + n.to(tl.int64) * C_OUT + o, mask=o < C_OUT, other=0.0)[None, :]
    if residual_ptr is not None:
        at = output_offsets(n, h, w, o, residual_n, residual_h, residual_w, Y_UNIT, SHUFFLE, CHANNELS)
        y += tl.load(residual_ptr + at, mask=stored, other=0.0).to(tl.float32)
    y *= outer_scale
    if outer_ptr is not None:
        at = output_offsets(n, h, w, o, outer_n, outer_h, outer_w, Y_UNIT, SHUFFLE, CHANNELS)
        y += tl.load(outer_ptr + at, mask=stored, other=0.0).to(tl.float32)
    at = output_offsets(n, h, w, o, out_n, out_h, out_w, Y_UNIT, SHUFFLE, CHANNELS)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=stored)

    if sums_ptr is not None:
        h0 = tile // tiles_w % tiles_h * TILE_H
        w0 = tile % tiles_w * TILE_W
        y = tl.where(stored, y.to(out_ptr.dtype.element_ty).to(tl.float32), 0.0)  # as the next convolution will read it
        whole = tl.sum(y, 0)
        for tap in range(9):
            # The tap misses a border row or column: that which lies opposite, where it would read the outside.
            missed_h = tl.where(tap < 3, H - 1, tl.where(tap < 6, -1, 0))
            missed_w = tl.where(tap % 3 == 0, W - 1, tl.where(tap % 3 == 1, -1, 0))
            seen = whole
            if ((missed_h >= h0) & (missed_h < h0 + TILE_H)) | ((missed_w >= w0) & (missed_w < w0 + TILE_W)):
                seen = tl.sum(tl.where(((h != missed_h) & (w != missed_w))[:, None], y, 0.0), 0)
            tl.store(sums_ptr + (tile.to(tl.int64) * 9 + tap) * C_OUT + o, seen, mask=o < C_OUT)


@dataclass(frozen=True)
class Config(Schedule):
    """Tile and schedule of one program."""

    tile_h: int
    tile_w: int
    block_n: int
    block_k: int


ANY = 1 << 30

#: (family or vendor, precision) -> lines of (largest O served, tile_h, tile_w, block_n, largest block_k, num_warps, num_stages).
#: The family's own lines win over the vendor's, and the first line that fits serves.
TILES: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = {
    # 3 stages, not 4: two steps in flight cover L2's latency, and a fourth buffer would cost a block per SM.
    # At 16 channels block_k 32: with 64 the sm_80 fp16 kernel spills.
    ("nvidia", "half"): ((16, 8, 16, 16, 32, 4, 3), (32, 8, 16, 32, 64, 4, 3), (64, 8, 16, 64, 64, 4, 3), (ANY, 8, 16, 128, 64, 8, 3)),
    # 8 warps at 64 channels: 4 need up to 254 registers. 2 stages at 16 channels: with 3 Triton 3.6 spills on sm_80.
    ("nvidia", "tf32"): ((16, 8, 16, 16, 32, 4, 2), (32, 8, 16, 32, 32, 4, 3), (64, 8, 16, 64, 32, 8, 3), (ANY, 8, 16, 128, 32, 8, 3)),
    # 64 channels at most: 128 take 255 registers with Triton 3.6 and spill.
    ("sm_80", "tf32"): ((16, 8, 16, 16, 32, 4, 2), (32, 8, 16, 32, 32, 4, 3), (ANY, 8, 16, 64, 32, 8, 3)),
    # FMA units, no tensor cores, so the limit is arithmetic: 2 stages suffice, and a third spills on sm_100.
    ("nvidia", "ieee"): ((16, 8, 16, 16, 16, 4, 3), (32, 8, 16, 32, 16, 4, 3), (ANY, 8, 16, 64, 16, 8, 2)),
    # 64 KB of local memory and 64-wide warps: 2 stages, and 8 warps halve the accumulators of each.
    ("amd", "half"): ((16, 8, 16, 16, 64, 4, 2), (32, 8, 16, 32, 64, 4, 2), (64, 8, 16, 64, 64, 8, 2), (ANY, 8, 16, 128, 64, 8, 2)),
    # float32 matrix cores with exact products.
    ("amd", "ieee"): ((16, 8, 16, 16, 16, 4, 2), (32, 8, 16, 32, 16, 4, 2), (ANY, 8, 16, 64, 16, 4, 2)),
}


def config(gpu: str, mode: str, c: int, o: int) -> Config:
    """The frozen choice for `c` input and `o` output channels; the image's size has no say, so that strips of it give the same values."""
    _, tile_h, tile_w, block_n, block_k, num_warps, num_stages = next(line for line in of_family(TILES, gpu, mode) if o <= line[0])
    # The largest power of two, at least tl.dot's 16, that wastes no channel: 96 takes three steps of 32, not two of 64.
    while block_k > 16 and c % block_k:
        block_k //= 2
    return Config(tile_h, tile_w, block_n, block_k, num_warps=num_warps, num_stages=num_stages)


def pack(weight: Tensor, chosen: Config, shuffle: int, dtype: torch.dtype) -> Tensor:
    """(O, C, 3, 3) as [9, C, O] in `dtype`, with C and O padded by zeros to whole blocks, channels in the order of `shuffle_order`."""
    o, c = weight.shape[:2]
    rows, columns = (triton.cdiv(size, block) * block for size, block in ((c, chosen.block_k), (o, chosen.block_n)))
    packed = (weight.new_empty if (rows, columns) == (c, o) else weight.new_zeros)((9, rows, columns), dtype=dtype)
    packed.view(3, 3, rows, columns)[:, :, :c, :o] = shuffle_order(weight, shuffle).permute(2, 3, 1, 0)
    return packed


def shuffle_order(parameter: Tensor, shuffle: int) -> Tensor:
    """Reorder dimension 0 from PixelShuffle's (channel, i, j) to (i, j, channel)."""
    if shuffle == 1:
        return parameter
    return parameter.unflatten(0, (-1, shuffle * shuffle)).transpose(0, 1).flatten(0, 1)


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    negative_slope: float = 1.0,
    scale: float = 1.0,
    upsample: int = 1,
    pixel_shuffle: int = 1,
    mask: Tensor | None = None,
    outer: Tensor | None = None,
    outer_scale: float = 1.0,
    factors: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Write steps 1-5 of `fastsr.ops.conv3x3` into `out`; x and all tensors of out's shape are pixel-major.

    With `mask`, of out's shape, the activation gives way to its derivative: v where mask > 0, else negative_slope * v.
    What is written is outer_scale * y + outer, `outer` being of out's shape or absent.
    `factors`, (N, O) float32, multiply what `scale` multiplies. `sums`, of the shape that `tap_sums_shape` tells, is filled with
    the sums, for every tile, of the values written that each tap of a following convolution reads.
    """
    n, c, h, w = x.shape
    o = weight.shape[0]
    h, w = h * upsample, w * upsample
    gpu, mode = family(x.device), precision(x)
    chosen = config(gpu, mode, c, o)
    x_unit, y_unit = stride_unit(x), stride_unit(out, residual, mask, outer)
    programs = n * triton.cdiv(h, chosen.tile_h) * triton.cdiv(w, chosen.tile_w) * triton.cdiv(o, chosen.block_n)
    with current_device(x):
        conv3x3_kernel[(programs,)](
            out,
            x,
            pack(weight, chosen, pixel_shuffle, x.dtype),
            None if bias is None else shuffle_order(bias, pixel_shuffle).contiguous(),
            residual,
            mask,
            outer,
            factors,
            sums,
            h,
            w,
            *pixel_strides(x, x_unit),
            *(stride for tensor in (out, residual, mask, outer) for stride in pixel_strides(tensor, y_unit)),
            negative_slope,
            scale,
            outer_scale,
            **constants(chosen, mode, c, o, negative_slope, upsample, pixel_shuffle, x_unit, y_unit),
            **chosen.options(),
        )


def tap_sums_shape(x: Tensor, o: int) -> tuple[int, int, int, int]:
    """(N, tiles of an image, 9, O): the sums that `launch` fills for a convolution of x to `o` channels."""
    n, c, h, w = x.shape
    chosen = config(family(x.device), precision(x), c, o)
    return n, triton.cdiv(h, chosen.tile_h) * triton.cdiv(w, chosen.tile_w), 9, o


def constants(
    chosen: Config, mode: str, c: int, o: int, negative_slope: float, upsample: int, shuffle: int, x_unit: int, y_unit: int
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "C_IN": c,
        "C_OUT": o,
        "ACTIVATION": {1.0: "none", 0.0: "relu"}.get(negative_slope, "leaky_relu"),
        "UPSAMPLE": upsample,
        "SHUFFLE": shuffle,
        "X_UNIT": x_unit,
        "Y_UNIT": y_unit,
        "TILE_H": chosen.tile_h,
        "TILE_W": chosen.tile_w,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "PRECISION": "tf32" if mode == "tf32" else "ieee",
        "DOT_FLOAT32": dots_are_float32(),
    }


# Opaque to torch.compile: Triton's own tracing fails under the interpreter, and re-reads what `launch` decides.
@torch.library.custom_op("fastsr::triton_conv3x3", mutates_args=("out",))
def _conv3x3(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    negative_slope: float,
    scale: float,
    upsample: int,
    pixel_shuffle: int,
) -> None:
    launch(
        out, x, weight, bias, residual, negative_slope=negative_slope, scale=scale, upsample=upsample, pixel_shuffle=pixel_shuffle
    )


@_conv3x3.register_fake
def _(out, x, weight, bias, residual, negative_slope, scale, upsample, pixel_shuffle):  # type: ignore[no-untyped-def]
    return None


def conv3x3_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    negative_slope: float,
    scale: float,
    upsample: int,
    pixel_shuffle: int,
) -> None:
    """Write steps 1-5 of `fastsr.ops.conv3x3` into `out`; x, residual and out are pixel-major."""
    _conv3x3(out, x, weight, bias, residual, negative_slope, scale, upsample, pixel_shuffle)


#: Layers that between them reach every line of the table and every block_k: (C, O, upsample, shuffle, masked and with both skips).
LAYERS = (
    (3, 64, 1, 1, False),
    (64, 32, 1, 1, False),
    (96, 32, 1, 1, True),
    (192, 64, 1, 1, True),
    (64, 64, 2, 1, False),
    (64, 256, 1, 2, False),
    (64, 3, 1, 1, False),
)


def aot_cases() -> Iterator[AotCase]:
    """Every line of the table with every dtype that it serves."""
    for gpu in FAMILIES:
        for mode, dtype in modes(gpu):
            if dtype != "fp32":  # under autocast
                yield aot_case("wide", gpu, mode, dtype, 64, 64, 1, 1, ("residual_ptr",), bias="fp32")
            for c, o, upsample, shuffle, full in LAYERS:
                more = ("residual_ptr", *(("mask_ptr", "outer_ptr") if full else ()))
                yield aot_case("full" if full else "", gpu, mode, dtype, c, o, upsample, shuffle, more)


def aot_case(
    role: str, gpu: str, mode: str, dtype: str, c: int, o: int, upsample: int, shuffle: int, more: Sequence[str], op: str = "conv3x3",
    bias: str | None = None,
) -> AotCase:
    """One layer with a bias and the pointers named in `more`."""
    chosen = config(gpu, mode, c, o)
    pointers = ["out_ptr", "x_ptr", "weight_ptr", "bias_ptr", *more]
    absent = {name: None for name in ("residual_ptr", "mask_ptr", "outer_ptr", "factor_ptr", "sums_ptr") if name not in more}
    # An RGB image's pixels are 3 elements apart, which is no multiple of 16 bytes.
    unit = 4 if dtype == "fp32" else 8
    x_unit, y_unit = (unit if channels % unit == 0 else 1 for channels in (c, o))
    signature = {name: "*fp32" if name in ("factor_ptr", "sums_ptr") else "*" + dtype for name in pointers}
    signature |= {"bias_ptr": "*" + (bias or dtype)}
    signature |= dict.fromkeys((*SIZES, *OUTER), "i32")
    signature |= dict.fromkeys(("slope", "scale", "outer_scale"), "fp32")
    return AotCase(
        name="-".join(filter(None, (op, gpu, mode, dtype, str(c), str(o), role))),
        family=gpu,
        kernel=conv3x3_kernel,
        signature=signature,
        constants=absent | constants(chosen, mode, c, o, 0.2, upsample, shuffle, x_unit, y_unit),
        aligned=tuple(pointers),
        options=chosen.options(),
        instructions=(*instructions(gpu, mode, x_unit > 1), *(("st.global.v4",) if y_unit > 1 and gpu != "gfx942" else ())),
    )
