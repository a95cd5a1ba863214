"""The certified nearest-code search in Triton: float32 scores with a bound on their error, float64 where the bound cannot decide.

    search_kernel   grid.x = heads * ceil(N / BLOCK_N)

                       codes, BLOCK_K at a time                         one program: BLOCK_N rows against the whole codebook
                      +--------+--------+----
             BLOCK_N  | scores | scores | ...     min of each 8         kept, BLOCK_N x BLOCK_K / 8: the best group of each
               rows   |        |        |         neighbours  ------->  column over all tiles, its tile, and the next best value
                      +--------+--------+----

                    then s'_1 and B of each row (csrc/common/vq_bound.h): at most two groups within 2 B are named; a row with
                    more, or that is not finite, is put on a list

    decide_kernel   grid.x = heads * ceil(N / DECIDE_N)                 the 8 or 16 codes of each row's groups in float64
    scan_kernel     a fixed number of programs                          the list's rows against every code in float64

Nothing is decided on the host: no synchronisation, safe in CUDA graphs. Distances are summed in the order of `reference.py`, and
without fused multiply-adds, so all backends agree in every bit. N, K and strides are not specialised: no recompilation.

Lives in   registers: BLOCK_N x BLOCK_K scores and three arrays of an eighth of it    shared memory: stages of x and codes
           L2: the codebook in float32, read once by each program; x, read anew for each tile of codes
Moves      2 * BLOCK_N * BLOCK_K * BLOCK_D operations for (BLOCK_N + BLOCK_K) * BLOCK_D * 4 bytes from L2; groups 8 bytes a row
Limit      the rate of float32 fused multiply-adds: products are IEEE, the tensor cores' float16 search is the compiled backend's

predicted, H100, (65536, 1024, 64): 8.6 GFLOP, 0.128 ms at 67 TFLOP/s, 0.3 ms at Triton's usual 40%. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels.triton_support import FAMILIES, AotCase, Schedule, current_device, family, instructions

SIZES = ("N", "K", "inner", "x_outer", "x_head", "x_channel", "x_inner")


@triton.jit
def row_offsets(row, head, inner, x_outer, x_head, x_inner):
    """64-bit offsets of rows of x (outer, heads, channels, inner)."""
    row = row.to(tl.int64)
    return row // inner * x_outer + row % inner * x_inner + tl.cast(head, tl.int64) * x_head


@triton.jit
def fold(lanes, A: tl.constexpr, B: tl.constexpr):
    """(A, B, 8) summed over its lanes in the operator's order."""
    four = tl.sum(tl.reshape(lanes, (A, B, 2, 4)), 2)
    two = tl.sum(tl.reshape(four, (A, B, 2, 2)), 2)
    return tl.sum(two, 2)


@triton.jit
def exact_norms(base, step, mask, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """float64 norms (A, B) of the vectors that begin at `base`; 1 for zero."""
    lane = tl.arange(0, 8)[None, None, :]
    sums = tl.zeros((A, B, 8), tl.float64)
    for d in range(0, D, 8):
        inside = mask[:, :, None] & (d + lane < D)
        v = tl.load(base[:, :, None] + (d + lane).to(tl.int64) * step, mask=inside, other=0.0).to(tl.float64)
        sums += v * v
    norms = tl.sqrt(fold(sums, A, B))
    return tl.where(norms == 0, 1.0, norms)


@triton.jit
def exact_distances(x, x_step, x_mask, e, e_mask, D: tl.constexpr, COSINE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """float64 distances (A, B) of rows that begin at x (A, 1) and contiguous codes that begin at e (A or 1, B)."""
    lane = tl.arange(0, 8)[None, None, :]
    x = tl.broadcast_to(x, (A, B))
    x_mask = tl.broadcast_to(x_mask, (A, B))
    e = tl.broadcast_to(e, (A, B))
    e_mask = tl.broadcast_to(e_mask, (A, B))
    sums = tl.zeros((A, B, 8), tl.float64)
    if COSINE:
        x_norms = exact_norms(x, x_step, x_mask, D, A, B)
        e_norms = exact_norms(e, 1, e_mask, D, A, B)
    for d in range(0, D, 8):
        inside = d + lane < D
        v = tl.load(x[:, :, None] + (d + lane).to(tl.int64) * x_step, mask=x_mask[:, :, None] & inside, other=0.0).to(tl.float64)
        w = tl.load(e[:, :, None] + d + lane, mask=e_mask[:, :, None] & inside, other=0.0).to(tl.float64)
        if COSINE:
            v = v / x_norms[:, :, None]
            w = w / e_norms[:, :, None]
        sums += (v - w) * (v - w)
    return fold(sums, A, B)


@triton.jit(do_not_specialize=SIZES)
def search_kernel(
    x_ptr,
    codes_ptr,  # (heads, K, D) float32, scaled
    halves_ptr,  # (heads, K) float32, |e|^2 / 2 of the scaled codes
    statistics_ptr,  # (heads, 3) float64: what codes were multiplied by, max|e'|, max|e - e'|
    groups_ptr,  # out (heads, N, 2): numbers of the groups to compare, -1 for none
    list_ptr,  # out (heads, N): rows to scan
    lengths_ptr,  # (heads,), zeros
    several_ptr,  # int64 counter, or None
    N,
    K,
    inner,
    x_outer,
    x_head,
    x_channel,
    x_inner,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Steps 1 to 3 of `fastsr.ops.vq_nearest` as far as float32 decides them."""
    OWNERS: tl.constexpr = BLOCK_K // 8
    blocks = tl.cdiv(N, BLOCK_N)
    head = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    channel = tl.arange(0, BLOCK_D)
    x = x_ptr + row_offsets(row, head, inner, x_outer, x_head, x_inner)
    step = tl.cast(x_channel, tl.int64)

    most = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float64)
    finite = exists
    for d in range(0, D, BLOCK_D):
        inside = exists[:, None] & (d + channel < D)[None, :]
        v = tl.load(x[:, None] + (d + channel).to(tl.int64)[None, :] * step, mask=inside, other=0.0).to(tl.float32)
        finite = finite & (tl.min((tl.abs(v) <= 3.4028234e38).to(tl.int32), 1) > 0)
        most = tl.maximum(most, tl.max(tl.abs(v), 1))
        square += tl.sum(v.to(tl.float64) * v.to(tl.float64), 1)
    if COSINE:
        norm = tl.sqrt(square)
        scale = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 1.0).to(tl.float32)
        norm = tl.where(norm > 0, 1.0, 0.0).to(tl.float64)
        ratio = tl.full((BLOCK_N,), 1.0, tl.float64)
        rounding = 2.0**-22  # two roundings, of the factor and of the product
    else:
        # A power of two that brings the row near 1, from the exponent's bits.
        exponent = tl.minimum(tl.maximum((most.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        norm = tl.sqrt(square) * scale.to(tl.float64)
        ratio = scale.to(tl.float64) / tl.load(statistics_ptr + head * 3)
        rounding = 0.0
    code_norm = tl.load(statistics_ptr + head * 3 + 1)
    code_error = tl.load(statistics_ptr + head * 3 + 2)
    ratio32 = ratio.to(tl.float32)

    kept = tl.full((BLOCK_N, OWNERS), float("inf"), tl.float32)
    lost = tl.full((BLOCK_N, OWNERS), float("inf"), tl.float32)
    tiles = tl.zeros((BLOCK_N, OWNERS), tl.int32)
    codes_ptr += tl.cast(head, tl.int64) * K * D
    halves_ptr += tl.cast(head, tl.int64) * K
    for first in range(0, K, BLOCK_K):
        code = first + tl.arange(0, BLOCK_K)
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for d in range(0, D, BLOCK_D):
            inside = (d + channel < D)[None, :]
            v = tl.load(x[:, None] + (d + channel).to(tl.int64)[None, :] * step, mask=exists[:, None] & inside, other=0.0)
            w = tl.load(codes_ptr + code.to(tl.int64)[:, None] * D + (d + channel)[None, :], mask=(code < K)[:, None] & inside, other=0.0)
            products = tl.dot(v.to(tl.float32) * scale[:, None], tl.trans(w), products, input_precision="ieee")
        half = tl.load(halves_ptr + code, mask=code < K, other=float("inf"))
        scores = half[None, :] * ratio32[:, None] - products
        best = tl.min(tl.reshape(scores, (BLOCK_N, OWNERS, 8)), 2)
        lost = tl.minimum(lost, tl.maximum(kept, best))
        tiles = tl.where(best < kept, first // BLOCK_K, tiles)
        kept = tl.minimum(kept, best)

    least = tl.min(kept, 1).to(tl.float64)
    size = tl.abs(least)
    # The terms of csrc/common/vq_bound.h; products in float32 may be rounded before they are added, hence 4 in place of 1, and a
    # scaled value may fall below the normal range.
    bound = rounding * norm * code_norm + norm * code_error + (D + 4) * (1.1 * 2.0**-24) * norm * code_norm + D * 2.0**-145
    bound += 2.0**-23 * (code_norm * code_norm * ratio / 2 + size)
    bound += (D + 4) * 2.0**-53 * (norm * norm / (2 * ratio) + size)
    limit = least + 2.0 * (1 + 2.0**-10) * bound
    certain = finite & (limit < float("inf")) & (ratio32 > 0)
    owner = tl.arange(0, OWNERS)[None, :]
    near = kept.to(tl.float64) <= limit[:, None]
    count = tl.sum(near.to(tl.int32), 1)
    certain = certain & (tl.min(lost, 1).to(tl.float64) > limit) & (count <= 2)
    low = tl.min(tl.where(near, owner, OWNERS), 1)
    high = tl.max(tl.where(near, owner, -1), 1)
    low_group = tl.sum(tl.where(owner == low[:, None], tiles * OWNERS + owner, 0), 1)
    high_group = tl.sum(tl.where(owner == high[:, None], tiles * OWNERS + owner, 0), 1)
    at = tl.cast(head, tl.int64) * N + row
    tl.store(groups_ptr + 2 * at, tl.where(certain, low_group, -1), mask=exists)
    tl.store(groups_ptr + 2 * at + 1, tl.where(certain & (count == 2), high_group, -1), mask=exists)
    listed = exists & (certain == 0)
    place = tl.atomic_add(lengths_ptr + head + tl.zeros((BLOCK_N,), tl.int32), 1, mask=listed)
    tl.store(list_ptr + tl.cast(head, tl.int64) * N + place, row, mask=listed)
    if several_ptr is not None:
        tl.atomic_add(several_ptr, tl.sum((exists & certain & (count == 2)).to(tl.int64)))


@triton.jit(do_not_specialize=[*SIZES, "heads"])
def decide_kernel(
    x_ptr,
    codebook_ptr,
    groups_ptr,
    indices_ptr,  # out (outer, heads, inner)
    distances_ptr,  # out, the same, or None
    N,
    K,
    heads,
    inner,
    x_outer,
    x_head,
    x_channel,
    x_inner,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    DECIDE_N: tl.constexpr,
):
    """The nearest of the codes of one or two groups, for each row that has any."""
    blocks = tl.cdiv(N, DECIDE_N)
    head = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * DECIDE_N + tl.arange(0, DECIDE_N)
    x = (x_ptr + row_offsets(row, head, inner, x_outer, x_head, x_inner))[:, None]
    codebook_ptr += tl.cast(head, tl.int64) * K * D
    at = tl.cast(head, tl.int64) * N + row
    nearest = tl.full((DECIDE_N,), float("inf"), tl.float64)
    index = tl.full((DECIDE_N,), 0x7FFFFFFF, tl.int32)
    for which in range(2):
        group = tl.load(groups_ptr + 2 * at + which, mask=row < N, other=-1)
        # A second group is rare.
        if tl.max(group, 0) >= 0:
            code = group[:, None] * 8 + tl.arange(0, 8)[None, :]
            exists = (group >= 0)[:, None] & (code < K)
            e = codebook_ptr + tl.where(exists, code, 0).to(tl.int64) * D
            step = tl.cast(x_channel, tl.int64)
            distance = exact_distances(x, step, (group >= 0)[:, None], e, exists, D, COSINE, DECIDE_N, 8)
            distance = tl.where(exists, distance, float("inf"))
            least = tl.min(distance, 1)
            winner = tl.min(tl.where((distance == least[:, None]) & exists, code, 0x7FFFFFFF), 1)
            better = (least < nearest) | ((least == nearest) & (winner < index))
            nearest = tl.where(better, least, nearest)
            index = tl.where(better, winner, index)
    decided = tl.load(groups_ptr + 2 * at, mask=row < N, other=-1) >= 0
    place = (row.to(tl.int64) // inner * heads + head) * inner + row.to(tl.int64) % inner
    tl.store(indices_ptr + place, index.to(tl.int64), mask=decided)
    if distances_ptr is not None:
        tl.store(distances_ptr + place, nearest.to(tl.float32), mask=decided)


@triton.jit(do_not_specialize=[*SIZES, "heads"])
def scan_kernel(
    x_ptr,
    codebook_ptr,
    list_ptr,
    lengths_ptr,
    indices_ptr,
    distances_ptr,  # or None
    scanned_ptr,  # int64 counter, or None
    N,
    K,
    heads,
    inner,
    x_outer,
    x_head,
    x_channel,
    x_inner,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    SCAN_K: tl.constexpr,
):
    """Listed rows against every code, one at a time."""
    for head in range(0, heads):
        length = tl.load(lengths_ptr + head)
        if scanned_ptr is not None:
            tl.atomic_add(scanned_ptr, length.to(tl.int64), mask=tl.program_id(0) == 0)
        base = codebook_ptr + tl.cast(head, tl.int64) * K * D
        for i in range(tl.program_id(0), length, tl.num_programs(0)):
            row = tl.load(list_ptr + tl.cast(head, tl.int64) * N + i)
            x = x_ptr + row_offsets(row, head, inner, x_outer, x_head, x_inner) + tl.zeros((1, 1), tl.int64)
            # NaN counts as -1, below every distance.
            nearest = tl.full((), float("inf"), tl.float64)
            index = tl.full((), 0, tl.int32)
            for first in range(0, K, SCAN_K):
                code = first + tl.arange(0, SCAN_K)[None, :]
                e = base + code.to(tl.int64) * D
                everywhere = tl.full((1, 1), 1, tl.int1)
                distance = exact_distances(x, tl.cast(x_channel, tl.int64), everywhere, e, code < K, D, COSINE, 1, SCAN_K)
                key = tl.where(code < K, tl.where(distance != distance, -1.0, distance), float("inf"))
                least = tl.min(tl.min(key, 1), 0)
                winner = tl.min(tl.min(tl.where(key == least, code, 0x7FFFFFFF), 1), 0)
                index = tl.where(least < nearest, winner, index)
                nearest = tl.minimum(nearest, least)
            place = (row.to(tl.int64) // inner * heads + head) * inner + row.to(tl.int64) % inner
            tl.store(indices_ptr + place, index.to(tl.int64))
            if distances_ptr is not None:
                tl.store(distances_ptr + place, tl.where(nearest < 0, float("nan"), nearest).to(tl.float32))


@dataclass(frozen=True)
class Config(Schedule):
    """Tile and schedule of the search."""

    block_n: int
    block_k: int
    block_d: int


#: family -> (block_n, block_k, largest block_d, num_warps, num_stages)
#: With more rows or codes at once the float32 products spill, on one GPU or another.
TILES = {"sm_80": (32, 64, 16, 8, 2), "sm_90": (32, 64, 16, 8, 2), "sm_100": (32, 64, 16, 8, 2), "gfx942": (32, 64, 32, 8, 1)}
DECIDE_N = 8
SCAN_K = 128
SCAN_PROGRAMS = 1024
FLOAT64 = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}  # fused multiply-adds would change bits


def config(gpu: str, d: int) -> Config:
    """The frozen choice for D channels."""
    block_n, block_k, block_d, num_warps, num_stages = TILES[gpu]
    return Config(block_n, block_k, max(16, min(block_d, triton.next_power_of_2(d))), num_warps=num_warps, num_stages=num_stages)


def prepare(codebook: Tensor, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The codes in float32 times a power of two (or of norm 1), their |e|^2 / 2, and the statistics that `search_kernel` reads."""
    wide = codebook.double()
    if cosine:
        norms = wide.square().sum(2, keepdim=True).sqrt()
        scale = wide.new_ones((wide.shape[0], 1, 1))
        exact = wide / torch.where(norms == 0, 1.0, norms)
    else:
        exponents = wide.abs().amax((1, 2), keepdim=True).frexp().exponent
        scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), -exponents)
        exact = wide * scale
    codes = exact.float()
    squares = exact.square().sum(2)
    rounded = codes.double()
    statistics = [
        scale[:, 0, 0],
        torch.maximum(squares, rounded.square().sum(2)).sqrt().amax(1),
        (exact - rounded).square().sum(2).sqrt().amax(1),
    ]
    return codes, (squares / 2).float(), torch.stack(statistics, 1).contiguous()


@torch.library.custom_op("fastsr::triton_vq_nearest", mutates_args=("indices", "distances", "rescored"))
def _vq_nearest(indices: Tensor, distances: Tensor | None, rescored: Tensor | None, x: Tensor, codebook: Tensor, cosine: bool) -> None:
    outer, heads, d, inner = x.shape
    k, n = codebook.shape[1], outer * inner
    codebook = codebook.contiguous()
    chosen = config(family(x.device), d)
    codes, halves, statistics = prepare(codebook, cosine)
    groups = torch.empty((heads, n, 2), dtype=torch.int32, device=x.device)
    listed = torch.empty((heads, n), dtype=torch.int32, device=x.device)
    lengths = torch.zeros(heads, dtype=torch.int32, device=x.device)
    several, scanned = (None, None) if rescored is None else (rescored[:1], rescored[1:])
    sizes = (n, k, inner, x.stride(0), x.stride(1), x.stride(2), x.stride(3))
    of_head = (n, k, heads, *sizes[2:])
    shape = {"D": d, "COSINE": cosine}
    with current_device(x):
        blocks = {"BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "BLOCK_D": chosen.block_d}
        grid = (heads * triton.cdiv(n, chosen.block_n),)
        search_kernel[grid](
            x, codes, halves, statistics, groups, listed, lengths, several, *sizes, **shape, **blocks, **chosen.options()
        )
        grid = (heads * triton.cdiv(n, DECIDE_N),)
        decide_kernel[grid](x, codebook, groups, indices, distances, *of_head, **shape, DECIDE_N=DECIDE_N, **FLOAT64)
        grid = (min(SCAN_PROGRAMS, n),)
        scan_kernel[grid](x, codebook, listed, lengths, indices, distances, scanned, *of_head, **shape, SCAN_K=SCAN_K, **FLOAT64)


@_vq_nearest.register_fake
def _(indices, distances, rescored, x, codebook, cosine):  # type: ignore[no-untyped-def]
    return None


def search_into(indices: Tensor, distances: Tensor | None, rescored: Tensor | None, x: Tensor, codebook: Tensor, cosine: bool) -> None:
    """Fill int64 `indices` (O, H, I) and, where given, float32 `distances` of the same shape, both contiguous; add to `rescored`.

    x is (O, H, D, I) of any strides, the codebook (H, K, D); no size is zero."""
    _vq_nearest(indices, distances, rescored, x, codebook, cosine)


def aot_cases() -> Iterator[AotCase]:
    """Every kernel with every dtype, and with one slab of channels, several, and an odd number."""
    for gpu in FAMILIES:
        for dtype in ("fp32", "bf16", "fp16"):
            for d in (64, 256, 3):
                yield from aot_kernels(gpu, dtype, d, cosine=d == 3)


def aot_kernels(gpu: str, dtype: str, d: int, cosine: bool) -> Iterator[AotCase]:
    """The three kernels for D channels."""
    chosen, shape = config(gpu, d), {"D": d, "COSINE": cosine}
    x, numbers = {"x_ptr": "*" + dtype}, dict.fromkeys(SIZES, "i32")
    book = {**x, "codebook_ptr": "*" + dtype, "indices_ptr": "*i64", "distances_ptr": "*fp32"}
    ints = dict.fromkeys(("groups_ptr", "list_ptr", "lengths_ptr"), "*i32")
    signatures: dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
        "search": (
            search_kernel,
            {**x, "codes_ptr": "*fp32", "halves_ptr": "*fp32", "statistics_ptr": "*fp64", **ints, "several_ptr": "*i64", **numbers},
            {**shape, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "BLOCK_D": chosen.block_d},
            chosen.options(),
            instructions(gpu, "ieee", False),
        ),
        "decide": (
            decide_kernel,
            {**book, "groups_ptr": "*i32", **numbers, "heads": "i32"},
            {**shape, "DECIDE_N": DECIDE_N},
            FLOAT64,
            (),
        ),
        "scan": (
            scan_kernel,
            {**book, "list_ptr": "*i32", "lengths_ptr": "*i32", "scanned_ptr": "*i64", **numbers, "heads": "i32"},
            {**shape, "SCAN_K": SCAN_K},
            FLOAT64,
            (),
        ),
    }
    for name, (kernel, signature, constants, options, wanted) in signatures.items():
        pointers = tuple(key for key, kind in signature.items() if kind.startswith("*"))
        yield AotCase(
            name=f"vq_nearest-{name}-{gpu}-{dtype}-{d}",
            family=gpu,
            kernel=kernel,
            signature=signature,
            constants=constants,
            aligned=pointers,
            options=options,
            instructions=wanted,
        )
