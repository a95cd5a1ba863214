"""Vector quantisation in Triton: what follows the search of `vq_nearest/triton.py`, forward and backward; memory-bound.

    gather_kernel    BLOCK_N rows                    quantized = codebook[index]; the sum of |x - quantized|^2 in float64
    torch.sort       rows by code, stable            offsets of each code's rows by a binary search; counts
    sum_kernel       a piece of a code's rows        its sum of x, or of quantized - x, in float64

        sorted rows   | code 0 | code 2                     | code 3 | ...
        pieces        |   0    |   1      |   2      |   3  |   4    | ...     at most `length` rows each, one program and BLOCK_C channels

    join_kernel      a code                          its pieces' sums, in order
    gradient_kernel  BLOCK_N rows                    dx: grad, or grad turned, plus 2 commitment_grad / (M D) (x - quantized)

A tile's last dimension is the one along which memory runs (ROWS_INNER: pixels, as in channels-first pictures; else channels). Nothing is
atomic: bits repeat. Nothing is decided on the host, and N, K, strides and lengths are not specialised: no recompilation. Rows of
all heads are numbered as the elements of `indices`, and their codes through (head * K + code).

Lives in   registers: a tile of each operand, a tile of float64 sums     L2: the codebook; x between gather and sums, where it fits
Moves      forward x twice, quantized and indices once, a code a row; dx grad, x, quantized, dx; dcodebook x and quantized; the sort
           some 60 bytes a row; pieces 16 D bytes each, of which there are at most K + N / length
Limit      DRAM bandwidth, and latency: torch's sort and binary searches are a dozen short kernels

Predicted, H100 at 3.35 TB/s, (65536, 1024, 64) float32, beyond the search: forward 0.010 + 0.080 ms, dx 0.022 ms, dcodebook 0.090 ms.
Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.triton_support import FAMILIES, AotCase, current_device
from fastsr.kernels.vector_quantize.reference import SMALLEST_NORM
from fastsr.kernels.vq_nearest import triton as nearest

NORM = tl.constexpr(SMALLEST_NORM)

#: Values of a tile, and most channels of it.
TILE, MOST_CHANNELS = 1024, 128
#: Sorted rows, or pieces, that are added at a time.
BLOCK_R = 16
#: Fewest rows of a piece; more rows make longer pieces, of which one code then has about 2048 at most.
SHORTEST_PIECE, PIECES = 256, 2048

COUNTS = ("N", "K", "heads", "inner")
X, Q, G, DX = (tuple(f"{name}_{axis}" for axis in ("outer", "head", "channel", "inner")) for name in ("x", "q", "g", "dx"))


@triton.jit
def numbered_offsets(row, heads, inner, s_outer, s_head, s_inner):
    """64-bit offsets of numbered rows of a tensor (outer, heads, channels, inner)."""
    row = row.to(tl.int64)
    return row // inner // heads * s_outer + row // inner % heads * s_head + row % inner * s_inner


@triton.jit
def along(rows, ROWS_INNER: tl.constexpr):
    """A value of each row, to be broadcast over a tile."""
    return rows[None, :] if ROWS_INNER else rows[:, None]


@triton.jit
def across(channels, ROWS_INNER: tl.constexpr):
    """A value of each channel, to be broadcast over a tile."""
    return channels[:, None] if ROWS_INNER else channels[None, :]


@triton.jit
def over_channels(tile, ROWS_INNER: tl.constexpr):
    """A tile's sum for each row."""
    return tl.sum(tile, 0) if ROWS_INNER else tl.sum(tile, 1)


@triton.jit(do_not_specialize=[*COUNTS, *X, *Q])
def gather_kernel(
    x_ptr,
    codebook_ptr,
    indices_ptr,
    mask_ptr,  # or None
    q_ptr,  # out
    losses_ptr,  # out, float64, one a program
    N,
    K,
    heads,
    inner,
    x_outer,
    x_head,
    x_channel,
    x_inner,
    q_outer,
    q_head,
    q_channel,
    q_inner,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS_INNER: tl.constexpr,
):
    """Steps 2 to 4 of `fastsr.ops.vector_quantize`, without the division."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    kept = exists
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + row, mask=exists, other=0) != 0
    code = tl.load(indices_ptr + row, mask=exists, other=0) + (row // inner % heads).to(tl.int64) * K
    x = along(x_ptr + numbered_offsets(row, heads, inner, x_outer, x_head, x_inner), ROWS_INNER)
    q = along(q_ptr + numbered_offsets(row, heads, inner, q_outer, q_head, q_inner), ROWS_INNER)
    e = along(codebook_ptr + code * D, ROWS_INNER)
    loss = tl.zeros((BLOCK_N,), tl.float64)
    for d in range(0, D, BLOCK_D):
        channel = d + tl.arange(0, BLOCK_D)
        c = across(channel.to(tl.int64), ROWS_INNER)
        inside = along(exists, ROWS_INNER) & (c < D)
        value = tl.load(e + c, mask=inside, other=0.0)
        tl.store(q + c * q_channel, value, mask=inside)
        difference = tl.load(x + c * x_channel, mask=inside, other=0.0).to(tl.float32) - value.to(tl.float32)
        difference = tl.where(along(kept, ROWS_INNER), difference, 0.0).to(tl.float64)
        loss += over_channels(difference * difference, ROWS_INNER)
    tl.store(losses_ptr + tl.program_id(0), tl.sum(loss, 0))


@triton.jit(do_not_specialize=["length", "codes", "heads", "inner", *X, *Q])
def sum_kernel(
    x_ptr,
    q_ptr,  # or None
    order_ptr,  # sorted rows
    offsets_ptr,  # where those of each code begin
    first_ptr,  # number of each code's first piece
    code_ptr,  # of each piece; `codes` for those that do not exist
    parts_ptr,  # out (pieces, D) float64
    length,
    codes,
    heads,
    inner,
    x_outer,
    x_head,
    x_channel,
    x_inner,
    q_outer,
    q_head,
    q_channel,
    q_inner,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of x, or of q - x, over the rows of a piece."""
    SLABS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    piece = (tl.program_id(0) // SLABS).to(tl.int64)
    channel = (tl.program_id(0) % SLABS * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    code = tl.load(code_ptr + piece)
    if code < codes:
        begin = tl.load(offsets_ptr + code) + (piece - tl.load(first_ptr + code)) * length
        end = tl.minimum(begin + length, tl.load(offsets_ptr + code + 1))
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
        for at in range(begin, end, BLOCK_R):
            place = at + tl.arange(0, BLOCK_R)
            row = tl.load(order_ptr + place, mask=place < end, other=0)
            inside = (place < end)[:, None] & (channel < D)
            x = x_ptr + numbered_offsets(row, heads, inner, x_outer, x_head, x_inner)[:, None]
            value = tl.load(x + channel * x_channel, mask=inside, other=0.0).to(tl.float32)
            if q_ptr is not None:
                q = q_ptr + numbered_offsets(row, heads, inner, q_outer, q_head, q_inner)[:, None]
                value = tl.load(q + channel * q_channel, mask=inside, other=0.0).to(tl.float32) - value
            total += value.to(tl.float64)
        tl.store(parts_ptr + piece * D + channel, tl.sum(total, 0)[None, :], mask=channel < D)


@triton.jit
def join_kernel(sums_ptr, parts_ptr, first_ptr, factor_ptr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums (codes, D) = factor (1 where it is None) * the sum of each code's pieces."""
    SLABS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    code = (tl.program_id(0) // SLABS).to(tl.int64)
    channel = (tl.program_id(0) % SLABS * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    begin = tl.load(first_ptr + code)
    pieces = (tl.load(first_ptr + code + 1) - begin).to(tl.int32)  # 64-bit loop counters would spill on sm_100
    parts = parts_ptr + begin * D + channel
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for at in range(0, pieces, BLOCK_R):
        piece = (at + tl.arange(0, BLOCK_R))[:, None]
        total += tl.load(parts + piece.to(tl.int64) * D, mask=(piece < pieces) & (channel < D), other=0.0)
    result = tl.sum(total, 0)[None, :]
    if factor_ptr is not None:
        result *= tl.load(factor_ptr)
    tl.store(sums_ptr + code * D + channel, result.to(tl.float32).to(sums_ptr.dtype.element_ty), mask=channel < D)


@triton.jit(do_not_specialize=["N", "heads", "inner", *X, *Q, *G, *DX])
def gradient_kernel(
    dx_ptr,
    g_ptr,  # or None
    x_ptr,
    q_ptr,
    mask_ptr,  # or None
    pull_ptr,  # float32: 2 commitment_grad / (M D), or None
    N,
    heads,
    inner,
    x_outer,
    x_head,
    x_channel,
    x_inner,
    q_outer,
    q_head,
    q_channel,
    q_inner,
    g_outer,
    g_head,
    g_channel,
    g_inner,
    dx_outer,
    dx_head,
    dx_channel,
    dx_inner,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS_INNER: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """Steps 10 and 11 of `fastsr.ops.vector_quantize`, and the gradient of step 4."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    weight = tl.zeros((BLOCK_N,), tl.float32)
    if pull_ptr is not None:
        kept = exists
        if mask_ptr is not None:
            kept = tl.load(mask_ptr + row, mask=exists, other=0) != 0
        weight = tl.where(kept, tl.load(pull_ptr), 0.0)
    weight = along(weight, ROWS_INNER)
    x = along(x_ptr + numbered_offsets(row, heads, inner, x_outer, x_head, x_inner), ROWS_INNER)
    q = along(q_ptr + numbered_offsets(row, heads, inner, q_outer, q_head, q_inner), ROWS_INNER)
    dx = along(dx_ptr + numbered_offsets(row, heads, inner, dx_outer, dx_head, dx_inner), ROWS_INNER)
    rows = along(exists, ROWS_INNER)
    if g_ptr is not None:
        g = along(g_ptr + numbered_offsets(row, heads, inner, g_outer, g_head, g_inner), ROWS_INNER)
    if ROTATION:
        xx = tl.zeros((BLOCK_N,), tl.float64)
        qq = tl.zeros((BLOCK_N,), tl.float64)
        for d in range(0, D, BLOCK_D):
            c = across((d + tl.arange(0, BLOCK_D)).to(tl.int64), ROWS_INNER)
            v = tl.load(x + c * x_channel, mask=rows & (c < D), other=0.0).to(tl.float64)
            w = tl.load(q + c * q_channel, mask=rows & (c < D), other=0.0).to(tl.float64)
            xx += over_channels(v * v, ROWS_INNER)
            qq += over_channels(w * w, ROWS_INNER)
        q_norm = tl.maximum(tl.sqrt(qq), NORM)
        by_x = along(1.0 / tl.maximum(tl.sqrt(xx), NORM), ROWS_INNER)
        by_q = along(1.0 / q_norm, ROWS_INNER)
        scale = along(q_norm, ROWS_INNER) * by_x
        mm = tl.zeros((BLOCK_N,), tl.float64)
        gm = tl.zeros((BLOCK_N,), tl.float64)
        gv = tl.zeros((BLOCK_N,), tl.float64)
        for d in range(0, D, BLOCK_D):
            c = across((d + tl.arange(0, BLOCK_D)).to(tl.int64), ROWS_INNER)
            v = tl.load(q + c * q_channel, mask=rows & (c < D), other=0.0).to(tl.float64) * by_q
            middle = tl.load(x + c * x_channel, mask=rows & (c < D), other=0.0).to(tl.float64) * by_x + v
            grad = tl.load(g + c * g_channel, mask=rows & (c < D), other=0.0).to(tl.float64)
            mm += over_channels(middle * middle, ROWS_INNER)
            gm += over_channels(grad * middle, ROWS_INNER)
            gv += over_channels(grad * v, ROWS_INNER)
        norm = tl.maximum(tl.sqrt(mm), NORM)
        along_middle = along(gm / (norm * norm), ROWS_INNER)
        along_code = along(gv, ROWS_INNER)
    for d in range(0, D, BLOCK_D):
        c = across((d + tl.arange(0, BLOCK_D)).to(tl.int64), ROWS_INNER)
        inside = rows & (c < D)
        v = tl.load(x + c * x_channel, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(q + c * q_channel, mask=inside, other=0.0).to(tl.float32)
        pull = tl.where(weight == 0.0, 0.0, weight * (v - w))  # a row that does not count may hold NaN
        if ROTATION:
            u = v.to(tl.float64) * by_x
            grad = tl.load(g + c * g_channel, mask=inside, other=0.0).to(tl.float64)
            turned = grad - 2.0 * (u + w.to(tl.float64) * by_q) * along_middle + 2.0 * u * along_code
            pull = (scale * turned + pull.to(tl.float64)).to(tl.float32)
        elif g_ptr is not None:
            pull += tl.load(g + c * g_channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + c * dx_channel, pull.to(dx_ptr.dtype.element_ty), mask=inside)


class Sorted(NamedTuple):
    """The rows that count, by code; `values` is M D of the losses, at least 1."""

    order: Tensor  # int64
    offsets: Tensor  # int64 (heads * K + 1,)
    values: Tensor  # int64 scalar


def sort_rows(indices: Tensor, mask: Tensor | None, k: int, d: int) -> Sorted:
    """Rows in ascending order within each code; those that do not count stand behind all."""
    heads = indices.shape[1]
    keys = indices + k * torch.arange(heads, device=indices.device)[:, None]
    if mask is not None:
        keys = torch.where(mask, keys, heads * k)
    keys, order = keys.flatten().to(torch.int32).sort(stable=True)
    offsets = torch.searchsorted(keys, torch.arange(heads * k + 1, dtype=torch.int32, device=keys.device))
    return Sorted(order, offsets, (offsets[-1] * d).clamp_min(1))


def sum_over_codes(sums: Tensor, x: Tensor, q: Tensor | None, rows: Sorted, factor: Tensor | None) -> None:
    """sums (heads, K, D) = factor * the sum of x, or of q - x, over each code's rows."""
    codes, d, n = sums.shape[0] * sums.shape[1], x.shape[2], len(rows.order)
    length = max(SHORTEST_PIECE, triton.next_power_of_2(triton.cdiv(n, PIECES)))
    first = F.pad(((rows.offsets.diff() + length - 1) // length).cumsum(0), (1, 0))
    pieces = torch.arange(codes + n // length, device=x.device)  # at most
    code = torch.searchsorted(first[1:], pieces, right=True)
    parts = x.new_empty((len(pieces), d), dtype=torch.float64)
    blocks = sum_constants(d)
    slabs = triton.cdiv(d, blocks["BLOCK_C"])
    strides = (*x.stride(), *(x if q is None else q).stride())
    sum_kernel[(len(pieces) * slabs,)](
        x, q, rows.order, rows.offsets, first, code, parts, length, codes, x.shape[1], x.shape[3], *strides, **blocks
    )
    join_kernel[(codes * slabs,)](sums, parts, first, factor, **blocks)


def sum_constants(d: int) -> dict[str, int]:
    """Those of `sum_kernel` and `join_kernel`."""
    return {"D": d, "BLOCK_R": BLOCK_R, "BLOCK_C": min(MOST_CHANNELS, triton.next_power_of_2(d))}


def tile_constants(d: int, rows_inner: bool) -> dict[str, Any]:
    """The tile's longer side runs along memory."""
    block_d = min(16 if rows_inner else MOST_CHANNELS, triton.next_power_of_2(d))
    return {"D": d, "BLOCK_N": TILE // max(block_d, 8), "BLOCK_D": block_d, "ROWS_INNER": rows_inner}


def gradient_constants(d: int, rows_inner: bool, rotation: bool) -> dict[str, Any]:
    """Those of `gradient_kernel`; with float64 values of three operands a whole tile would spill."""
    tile = tile_constants(d, rows_inner)
    return tile | {"ROTATION": rotation, "BLOCK_N": tile["BLOCK_N"] // (4 if rotation else 1)}


# Opaque to torch.compile, as vq_nearest's launcher is.
@torch.library.custom_op(
    "fastsr::triton_vector_quantize", mutates_args=("quantized", "indices", "loss", "counts", "sums", "distances")
)
def quantize_into(
    quantized: Tensor,
    indices: Tensor,
    loss: Tensor,
    counts: Tensor,
    sums: Tensor,
    distances: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cosine: bool,
) -> None:
    """As `compiled.quantize_into`."""
    _, heads, d, inner = x.shape
    k, n = codebook.shape[1], indices.numel()
    nearest.search_into(indices, distances, None, x, codebook, cosine)
    tile = tile_constants(d, x.stride(2) != 1)
    programs = triton.cdiv(n, tile["BLOCK_N"])
    losses = x.new_empty(programs, dtype=torch.float64)
    with current_device(x):
        strides = (*x.stride(), *quantized.stride())
        gather_kernel[(programs,)](x, codebook, indices, mask, quantized, losses, n, k, heads, inner, *strides, **tile)
        rows = sort_rows(indices, mask, k, d)
        sum_over_codes(sums, x, None, rows, None)
    counts.copy_(rows.offsets.diff().view_as(counts))
    loss.copy_(losses.sum() / rows.values)


@torch.library.custom_op("fastsr::triton_vector_quantize_dx", mutates_args=("dx",))
def input_gradient_into(
    dx: Tensor, grad: Tensor | None, commitment_grad: Tensor | None, x: Tensor, quantized: Tensor, mask: Tensor | None, rotation: bool
) -> None:
    """As `compiled.input_gradient_into`."""
    _, heads, d, inner = x.shape
    n = x.numel() // d
    pull = None
    if commitment_grad is not None:
        values = max(1, n * d) if mask is None else (mask.sum() * d).clamp_min(1)
        pull = (2 * commitment_grad.double() / values).float()
    tile = gradient_constants(d, x.stride(2) != 1, rotation and grad is not None)
    strides = [stride for t in (x, quantized, x if grad is None else grad, dx) for stride in t.stride()]
    with current_device(x):
        grid = (triton.cdiv(n, tile["BLOCK_N"]),)
        gradient_kernel[grid](dx, grad, x, quantized, mask, pull, n, heads, inner, *strides, **tile)


@torch.library.custom_op("fastsr::triton_vector_quantize_dcodebook", mutates_args=("dcodebook",))
def codebook_gradient_into(
    dcodebook: Tensor, codebook_grad: Tensor, x: Tensor, quantized: Tensor, indices: Tensor, mask: Tensor | None
) -> None:
    """As `compiled.codebook_gradient_into`."""
    with current_device(x):
        rows = sort_rows(indices, mask, dcodebook.shape[1], x.shape[2])
        sum_over_codes(dcodebook, x, quantized, rows, 2 * codebook_grad.double() / rows.values)


for operator in (quantize_into, input_gradient_into, codebook_gradient_into):
    operator.register_fake(lambda *arguments: None)


def aot_cases() -> Iterator[AotCase]:
    """Every kernel with every dtype and in both layouts; in float32 also with several slabs of channels and optional arguments left out."""
    for gpu in FAMILIES:
        for dtype in ("*fp32", "*bf16", "*fp16"):
            for d, rows_inner in ((64, False), (3, True), (300, False))[: 3 if dtype == "*fp32" else 2]:
                yield from aot_kernels(gpu, dtype, d, rows_inner)
        pointers = dict.fromkeys(("dx_ptr", "x_ptr", "q_ptr"), "*fp32") | {"pull_ptr": "*fp32"}
        absent = dict.fromkeys(("g_ptr", "mask_ptr"))
        yield _case("commitment", gpu, gradient_kernel, pointers, gradient_constants(64, False, False) | absent)


def aot_kernels(gpu: str, dtype: str, d: int, rows_inner: bool) -> Iterator[AotCase]:
    """All kernels for D channels in one layout."""
    blocks, pictures, mask = sum_constants(d), {"x_ptr": dtype, "q_ptr": dtype}, {"mask_ptr": "*i1"}
    gathered = {**pictures, "codebook_ptr": dtype, "indices_ptr": "*i64", **mask, "losses_ptr": "*fp64"}
    yield _case("gather", gpu, gather_kernel, gathered, tile_constants(d, rows_inner))
    rows = dict.fromkeys(("order_ptr", "offsets_ptr", "first_ptr", "code_ptr"), "*i64") | {"parts_ptr": "*fp64"}
    yield _case("sums", gpu, sum_kernel, {"x_ptr": dtype, **rows}, {**blocks, "q_ptr": None})
    yield _case("dcodebook", gpu, sum_kernel, {**pictures, **rows}, blocks)
    joined = {"sums_ptr": dtype, "parts_ptr": "*fp64", "first_ptr": "*i64"}
    yield _case("join", gpu, join_kernel, {**joined, "factor_ptr": "*fp64"}, blocks)
    pointers = {**pictures, "g_ptr": dtype, "dx_ptr": dtype, **mask, "pull_ptr": "*fp32"}
    for rotation in (False, True):
        yield _case("rotation" if rotation else "straight", gpu, gradient_kernel, pointers, gradient_constants(d, rows_inner, rotation))


def _case(role: str, gpu: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> AotCase:
    """One specialisation; what is neither a pointer nor a constant is an integer."""
    layout = "" if "ROWS_INNER" not in constants else "-pixels" if constants["ROWS_INNER"] else "-channels"
    name = f"vector_quantize-{role}-{gpu}-{pointers.get('x_ptr', pointers.get('sums_ptr', ''))[1:]}-{constants['D']}{layout}"
    rest = {a: "i32" for a in kernel.arg_names if a not in pointers and a not in constants}
    return AotCase(name, gpu, kernel, pointers | rest, constants, tuple(pointers), {"num_warps": 4})
