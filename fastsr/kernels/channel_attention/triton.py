"""Channel attention in Triton: sums over pixels, the gate, and a scaled copy, forward and backward.

    grid.x = images * parts of the channels * chunks of the pixels

          channels   BLOCK_C
        pixels +------------------+
         p0    |                  |   pixel-major tensors: a row of channels is one piece of memory, BLOCK_C takes them all
         p0+1  |    BLOCK_P x     |   where they are few. Planar tensors (NCHW): the same tile, few channels wide and long
          ...  |     BLOCK_C      |   in pixels. Every stride is an argument; the tile's longer side runs along memory.
               +------------------+

`sum_kernel` writes a sum per chunk and channel, `join_kernel` adds the chunks in their order, `matrix_kernel` runs the gate's small
matrices a few rows a program, and `scale_kernel` writes the output. Nothing is atomic, so results repeat bit for bit.

Lives in   registers: a tile, and BLOCK_C sums or factors     L2: x's second reading, if the batch fits
Moves      forward x twice, residual, out; backward g twice, x, dx; sums are 1/4096 of that
Limit      DRAM bandwidth: an operation or two per value

Predicted, 16x64x256x256 bf16 with residual, H100 at 3.0 TB/s: 0.18 ms. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels import checks
from fastsr.kernels.triton_support import FAMILIES, AotCase, current_device

#: Values of a tile, and most channels of it.
TILE, MOST_CHANNELS = 4096, 128
#: Values of a chunk that one program sums.
CHUNK = 1 << 16
WARPS = 8
#: Channels of a row of the gate's matrices that are read at a time.
BLOCK = 128


@triton.jit
def tile_offsets(n, part, pixels, s_n, s_c, s_h, s_w, W, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Element offsets of pixels (rows) and channels (columns) of an image, in 64 bits, and the channels; strides are in UNIT elements."""
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    image = n.to(tl.int64) * s_n * UNIT
    if CHANNELS_LAST:
        at = image + ((pixels // W).to(tl.int64) * s_h + (pixels % W).to(tl.int64) * s_w) * UNIT
        offsets = at[:, None] + c[None, :]
    else:
        offsets = (image + c.to(tl.int64) * s_c * UNIT)[None, :] + pixels[:, None]
    return offsets, c


@triton.jit(do_not_specialize=["size", "W", "chunks", "x_n", "x_c", "x_h", "x_w", "g_n", "g_c", "g_h", "g_w"])
def sum_kernel(
    partial_ptr,  # [images, chunks, CHANNELS] float32
    x_ptr,
    g_ptr,
    size,  # pixels of an image, in UNIT of them where they lie side by side
    W,
    chunks,
    x_n,
    x_c,
    x_h,
    x_w,
    g_n,
    g_c,
    g_h,
    g_w,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """partial = the sum of x, or with PRODUCT of x * g, over the pixels of a chunk."""
    PARTS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) % PARTS
    image_chunk = tl.program_id(0) // PARTS
    n = image_chunk // chunks
    begin = image_chunk % chunks * CHUNK
    pixels = size if CHANNELS_LAST else size * UNIT
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p0 in range(begin, tl.minimum(begin + CHUNK, pixels), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        at, c = tile_offsets(n, part, p, x_n, x_c, x_h, x_w, W, UNIT, BLOCK_C, CHANNELS_LAST)
        inside = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
        values = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if PRODUCT:
            at, c = tile_offsets(n, part, p, g_n, g_c, g_h, g_w, W, UNIT, BLOCK_C, CHANNELS_LAST)
            values *= tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += values
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(partial_ptr + image_chunk.to(tl.int64) * CHANNELS + c, tl.sum(total, 0), mask=c < CHANNELS)


@triton.jit(do_not_specialize=["size", "W", "chunks", "x_n", "x_c", "x_h", "x_w", "r_n", "r_c", "r_h", "r_w", "o_n", "o_c", "o_h", "o_w"])
def scale_kernel(
    out_ptr,
    x_ptr,
    r_ptr,
    factor_ptr,  # [images, CHANNELS] float32
    shift_ptr,
    scale,
    size,
    W,
    chunks,
    x_n,
    x_c,
    x_h,
    x_w,
    r_n,
    r_c,
    r_h,
    r_w,
    o_n,
    o_c,
    o_h,
    o_w,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """out = scale * factor * x + residual + shift."""
    PARTS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) % PARTS
    image_chunk = tl.program_id(0) // PARTS
    n = image_chunk // chunks
    # Backwards: the chunks summed last are the likeliest to be in L2 still.
    begin = (chunks - 1 - image_chunk % chunks) * CHUNK
    pixels = size if CHANNELS_LAST else size * UNIT
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    row = n.to(tl.int64) * CHANNELS
    factor = (scale * tl.load(factor_ptr + row + c, mask=c < CHANNELS, other=0.0))[None, :]
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + row + c, mask=c < CHANNELS, other=0.0)[None, :]
    for p0 in range(begin, tl.minimum(begin + CHUNK, pixels), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
        at, _ = tile_offsets(n, part, p, x_n, x_c, x_h, x_w, W, UNIT, BLOCK_C, CHANNELS_LAST)
        y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
        if HAS_SHIFT:
            y += shift
        if HAS_RESIDUAL:
            at, _ = tile_offsets(n, part, p, r_n, r_c, r_h, r_w, W, UNIT, BLOCK_C, CHANNELS_LAST)
            y += tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at, _ = tile_offsets(n, part, p, o_n, o_c, o_h, o_w, W, UNIT, BLOCK_C, CHANNELS_LAST)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def join_kernel(to_ptr, partial_ptr, chunks, scale, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """to = scale * the sum of an image's chunks, in their order."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(chunks):
        total += tl.load(partial_ptr + (n * chunks + i) * CHANNELS + c, mask=c < CHANNELS, other=0.0)
    tl.store(to_ptr + n * CHANNELS + c, total * scale, mask=c < CHANNELS)


@triton.jit
def matrix_kernel(
    y_ptr,  # [images, ROWS] float32
    w_ptr,  # [ROWS, COLUMNS], or with TRANSPOSED [COLUMNS, ROWS]
    bias_ptr,
    x_ptr,  # [images, COLUMNS] float32
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = function(w x + bias), a block of rows of an image a program."""
    BLOCKS: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    r = tl.program_id(0) % BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for c0 in range(0, COLUMNS, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        at = c[None, :] * ROWS + r[:, None] if TRANSPOSED else r[:, None] * COLUMNS + c[None, :]
        w = tl.load(w_ptr + at, mask=(r < ROWS)[:, None] & (c < COLUMNS)[None, :], other=0.0).to(tl.float32)
        total += w * tl.load(x_ptr + n * COLUMNS + c, mask=c < COLUMNS, other=0.0)[None, :]
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + r, mask=r < ROWS, other=0.0).to(tl.float32)
    # Comparisons keep a NaN.
    if FUNCTION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif FUNCTION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif FUNCTION == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-y))
    elif FUNCTION == "hardsigmoid":
        y = (y + 3.0) * (1.0 / 6.0)
        y = tl.where(y < 0.0, 0.0, tl.where(y > 1.0, 1.0, y))
    tl.store(y_ptr + n * ROWS + r, y, mask=r < ROWS)


def tile(*pictures: Tensor) -> tuple[dict[str, Any], list[int]]:
    """The tile for the pictures' channels and layout as constants, and the strides of all."""
    last = all(checks.is_pixel_major(t) for t in pictures)
    along = (0, 2, 3) if last else (0, 1)
    unit = 16 // pictures[0].element_size()
    _, channels, h, w = pictures[0].shape
    if any(t.shape[d] > 1 and t.stride(d) % unit for t in pictures for d in along) or (not last and h * w % unit):
        unit = 1
    # The strides that the layout fixes are not read.
    strides = [t.stride(d) // unit if d in along and t.shape[d] > 1 else 0 for t in pictures for d in range(4)]
    return tile_constants(channels, last, unit), strides


def tile_constants(channels: int, last: bool, unit: int) -> dict[str, Any]:
    """Many channels and few pixels, or the other way round: the tile's longer side runs along memory."""
    block_c = min(MOST_CHANNELS if last else 4, triton.next_power_of_2(channels))
    return {
        "CHANNELS": channels,
        "BLOCK_P": TILE // block_c,
        "BLOCK_C": block_c,
        "CHANNELS_LAST": last,
        "UNIT": unit,
        "CHUNK": CHUNK // block_c,
    }


def sum_constants(constants: dict[str, Any], product: bool) -> dict[str, Any]:
    """Those of `sum_kernel`; a product holds two tiles and the sums, for which a whole tile would spill (Triton 3.6, sm_100)."""
    return constants | {"PRODUCT": product, "BLOCK_P": constants["BLOCK_P"] // (2 if product else 1)}


def grid_of(x: Tensor, constants: dict[str, Any]) -> tuple[tuple[int], tuple[int, int, int]]:
    """One program for each image, part of the channels and chunk; and the kernels' size, W and chunks."""
    n, channels, h, w = x.shape
    chunks = triton.cdiv(h * w, constants["CHUNK"])
    size = h * w if constants["CHANNELS_LAST"] else h * w // constants["UNIT"]
    return (n * chunks * triton.cdiv(channels, constants["BLOCK_C"]),), (size, w, chunks)


def sums(x: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """scale * the sums over pixels of x, or of x * g: (N, C) float32."""
    other = x if g is None else g
    constants, strides = tile(x, other)
    grid, sizes = grid_of(x, constants)
    (n, channels), chunks = x.shape[:2], sizes[2]
    partial, total = x.new_empty((n, chunks, channels), dtype=torch.float32), x.new_empty((n, channels), dtype=torch.float32)
    sum_kernel[grid](partial, x, other, *sizes, *strides, num_warps=WARPS, **sum_constants(constants, g is not None))
    blocks = triton.cdiv(channels, BLOCK)
    join_kernel[(n * blocks,)](total, partial, chunks, scale, CHANNELS=channels, BLOCK_C=BLOCK)
    return total


def scaled(out: Tensor, x: Tensor, residual: Tensor | None, factors: Tensor, shifts: Tensor | None, scale: float) -> None:
    """out = scale * factors * x + residual or shifts."""
    r = x if residual is None else residual
    constants, strides = tile(x, r, out)
    grid, sizes = grid_of(x, constants)
    scale_kernel[grid](
        out,
        x,
        r,
        factors,
        factors if shifts is None else shifts,
        scale,
        *sizes,
        *strides,
        HAS_RESIDUAL=residual is not None,
        HAS_SHIFT=shifts is not None,
        num_warps=WARPS,
        **constants,
    )


def matrix(w: Tensor, bias: Tensor | None, x: Tensor, function: str, transposed: bool = False) -> Tensor:
    """function(w x + bias) for every image's vector."""
    rows, columns = (w.numel() // w.shape[0], w.shape[0]) if transposed else (w.shape[0], w.numel() // w.shape[0])
    y = x.new_empty((x.shape[0], rows))
    constants = matrix_constants(rows, columns)
    matrix_kernel[(x.shape[0] * triton.cdiv(rows, constants["BLOCK_R"]),)](
        y, w, w if bias is None else bias, x, HAS_BIAS=bias is not None, TRANSPOSED=transposed, FUNCTION=function, **constants
    )
    return y


def matrix_constants(rows: int, columns: int) -> dict[str, int]:
    """Sizes and blocks of a small matrix."""
    return {"ROWS": rows, "COLUMNS": columns, "BLOCK_R": 16, "BLOCK_C": min(BLOCK, triton.next_power_of_2(columns))}


# Opaque to torch.compile, as conv3x3's launcher is.
@torch.library.custom_op("fastsr::triton_channel_attention", mutates_args=("out", "pooled", "gates"))
def forward_into(
    out: Tensor,
    pooled: Tensor | None,
    gates: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    res_scale: float,
    gate: str,
    activation: str,
) -> None:
    """As `compiled.forward_into`."""
    if x.numel() == 0:
        return
    with current_device(x):
        p = sums(x, None, 1.0 / (x.shape[2] * x.shape[3]))
        z = p if down_weight is None else matrix(down_weight, down_bias, p, activation)
        s = matrix(up_weight, up_bias, z, gate)
        scaled(out, x, residual, s, None, res_scale)
        if pooled is not None and gates is not None:
            pooled.copy_(p)
            gates.copy_(s)


@torch.library.custom_op("fastsr::triton_channel_attention_backward", mutates_args=("dx", "gradients"))
def backward_of_all(
    dx: Tensor | None,
    gradients: Sequence[Tensor],
    has_down_bias: bool,
    grad: Tensor,
    x: Tensor,
    pooled: Tensor,
    gates: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    res_scale: float,
    gate: str,
    activation: str,
) -> None:
    """As `compiled.backward_into`, but for the absent gradients, which are left out of the list."""
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    with current_device(x):
        dv = sums(x, grad, res_scale) * gate_slope(gate, gates)
        back, products = gate_backward(dv, pooled, down_weight, down_bias, up_weight, activation)
        if down_weight is not None and not has_down_bias:
            del products[1]
        if dx is not None:
            scaled(dx, grad, None, gates, back / (x.shape[2] * x.shape[3]), res_scale)
        for gradient, value in zip(gradients, products, strict=False):
            gradient.copy_(value.view_as(gradient))


def gate_backward(
    dv: Tensor, pooled: Tensor, down_weight: Tensor | None, down_bias: Tensor | None, up_weight: Tensor, activation: str
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the pooled vectors from that of the gate's argument, and those of weight and bias of squeeze and excitation."""
    back = matrix(up_weight, None, dv, "none", transposed=True)
    if down_weight is None:
        return back, [dv.T @ pooled, dv.sum(0)]
    u = matrix(down_weight, down_bias, pooled, "none")
    sigmoid = torch.sigmoid(u)
    z = torch.relu(u) if activation == "relu" else u * sigmoid
    du = back * (torch.where(u <= 0.0, 0.0, 1.0) if activation == "relu" else sigmoid * (1.0 + u * (1.0 - sigmoid)))
    back = matrix(down_weight, None, du, "none", transposed=True)
    return back, [du.T @ pooled, du.sum(0), dv.T @ z, dv.sum(0)]


def gate_slope(gate: str, s: Tensor) -> Tensor:
    """The gate's derivative from its value."""
    if gate == "sigmoid":
        return s * (1.0 - s)
    return torch.ones_like(s) if gate == "none" else torch.where((s <= 0.0) | (s >= 1.0), 0.0, 1.0 / 6.0)


def backward_into(dx: Tensor | None, gradients: Sequence[Tensor | None], *arguments: Any) -> None:
    """As `compiled.backward_into`."""
    backward_of_all(dx, [g for g in gradients if g is not None], gradients[1] is not None, *arguments)


for operator in (forward_into, backward_of_all):
    operator.register_fake(lambda *arguments: None)


def aot_cases() -> Iterator[AotCase]:
    """RCAN's 64 channels and HAT's 180, both layouts, every dtype and role of each kernel."""
    for gpu in FAMILIES:
        for dtype in ("bf16", "fp16", "fp32"):
            for channels, last in ((64, True), (180, True), (64, False)):
                unit = 4 if dtype == "fp32" else 8
                constants = tile_constants(channels, last, unit if channels % unit == 0 else 1)
                wide = () if gpu.startswith("gfx") or constants["UNIT"] == 1 else ("ld.global.v4.b32",)
                name = f"{gpu}-{dtype}-{channels}-{'pixels' if last else 'planes'}"
                for backward in (False, True):
                    role = "backward" if backward else "forward"
                    pointers = {"partial_ptr": "*fp32", "x_ptr": "*" + dtype, "g_ptr": "*" + dtype}
                    yield _case(f"sum-{role}-{name}", gpu, sum_kernel, pointers, sum_constants(constants, backward), WARPS, wide)
                    pointers = {f"{p}_ptr": "*" + dtype for p in ("out", "x", "r")} | {"factor_ptr": "*fp32", "shift_ptr": "*fp32"}
                    more = {"HAS_RESIDUAL": not backward, "HAS_SHIFT": backward}
                    yield _case(f"scale-{role}-{name}", gpu, scale_kernel, pointers, constants | more, WARPS, wide)
            pointers = {"y_ptr": "*fp32", "w_ptr": "*" + dtype, "bias_ptr": "*" + dtype, "x_ptr": "*fp32"}
            for function, transposed, sizes in (("silu", False, (11, 180)), ("hardsigmoid", False, (180, 11)), ("none", True, (180, 11))):
                constants = matrix_constants(*sizes) | {"HAS_BIAS": not transposed, "TRANSPOSED": transposed, "FUNCTION": function}
                yield _case(f"matrix-{function}-{gpu}-{dtype}", gpu, matrix_kernel, pointers, constants, 4)
        pointers = {"to_ptr": "*fp32", "partial_ptr": "*fp32"}
        yield _case(f"join-{gpu}", gpu, join_kernel, pointers, {"CHANNELS": 180, "BLOCK_C": BLOCK}, 4)


def _case(
    name: str, gpu: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, instructions: tuple[str, ...] = ()
) -> AotCase:
    """One specialisation; what is neither a pointer nor a constant is a factor or an integer."""
    rest = [a for a in kernel.arg_names if a not in pointers and a not in constants]
    signature = pointers | {a: "fp32" if a == "scale" else "i32" for a in rest}
    return AotCase(f"channel_attention-{name}", gpu, kernel, signature, constants, tuple(pointers), {"num_warps": warps}, instructions)
