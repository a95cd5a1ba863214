"""The residual channel attention block in Triton: two convolutions of `conv3x3/triton.py`, and vectors between them.

    forward    x --conv1, ReLU--> r, and for each tile the sums of r that the nine taps of conv2 read
               sums --tap_sums_kernel--> T --weight2--> pooled --gate--> s          vectors of an image: conv2 has not run yet
               r --conv2, * res_scale * s, + x--> y
    backward   grad, r --triton_wgrad.py, one group an image--> partial sums --image_gradient_kernel--> G[n], and ds = <G[n], weight2>
               ds --gate's backward--> e;  G, T --dweight2_kernel--> dweight2
               grad, * res_scale * s + e --> du --flipped conv2, masked by r > 0--> dr --flipped conv1, + grad--> dx;  x, dr --> dweight1

    grid.x = images * 9 taps * blocks of channels   tap_sums_kernel       rows of tiles x channels, the rows added in the end
             images * features                      image_gradient_kernel a row of weight2: its splits added in their order, and its
                                                                          product with the weights in float64, for the terms cancel
             features * blocks of 9 M values        dweight2_kernel       images added in their order

du is written where dx will be, so that the backward needs one scratch picture, dr. (Scaling grad while a convolution loads it would save
its two passes, but turn asynchronous copies into loads through registers.) Images are taken as many at a time as leave the gradients
of single images below GRADIENTS bytes.

Lives in   as conv3x3; the vectors, 9 M + 5 F values an image, in L2
Moves      forward: x twice, r twice, y, and 9 sums a tile of 128 pixels (14% of r in bf16); backward: grad four times, x, r twice, du
           and dr three times, dx
Limit      147,456 FLOP a pixel at 64 channels forward, 294,912 backward, at conv3x3's rate; nine launches forward, some thirty
           backward, of which CUDA graphs hide what the vectors' take

Predicted, 16x64x48x48, bf16, H100: forward 0.05 ms, backward 0.14 ms at a quarter of the matrix rate. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsr.kernels import triton_wgrad
from fastsr.kernels.channel_attention.triton import gate_backward, gate_slope, matrix, scaled
from fastsr.kernels.conv3x3 import triton as conv3x3
from fastsr.kernels.conv3x3.triton import launch
from fastsr.kernels.triton_support import FAMILIES, AotCase, current_device, modes

#: Tiles and channels that one program adds at a time.
TILE_ROWS, SUMMED_CHANNELS = 64, 16
#: Input channels of a weight gradient at a time, and values of all of them.
BLOCK_C, BLOCK = 64, 1024
#: Bytes of weight gradients of single images, with their splits, at a time.
GRADIENTS = 1 << 28


@triton.jit(do_not_specialize=["tiles"])
def tap_sums_kernel(
    sums_ptr,  # [images, CHANNELS, 9] float32
    partial_ptr,  # [images, tiles, 9, CHANNELS] float32
    tiles,
    CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sums = those of an image's tiles, in a fixed order."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tap = tl.program_id(0) // BLOCKS % 9
    n = (tl.program_id(0) // (9 * BLOCKS)).to(tl.int64)
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((TILE_ROWS, BLOCK_C), tl.float32)
    for first in range(0, tiles, TILE_ROWS):
        t = first + tl.arange(0, TILE_ROWS)
        at = ((n * tiles + t) * 9 + tap)[:, None] * CHANNELS + c[None, :]
        total += tl.load(partial_ptr + at, mask=(t < tiles)[:, None] & (c < CHANNELS)[None, :], other=0.0)
    tl.store(sums_ptr + (n * CHANNELS + c) * 9 + tap, tl.sum(total, 0), mask=c < CHANNELS)


@triton.jit(do_not_specialize=["splits", "outputs", "channels"])
def image_gradient_kernel(
    gradient_ptr,  # [images, outputs, channels, 9] float32
    bias_gradient_ptr,  # [images, outputs] float32
    ds_ptr,  # [images, outputs] float32
    partial_ptr,  # [images, splits, 9, outputs, channels] float32
    bias_partial_ptr,  # [images, splits, outputs] float32
    weight_ptr,  # [outputs, channels, 9]
    bias_ptr,  # [outputs], or None
    splits,
    outputs,
    channels,
    scale,
    BLOCK_C: tl.constexpr,
):
    """gradient = the sum of an image's splits, in their order; ds = scale * (<gradient, weight> + bias * the bias's gradient)."""
    n = (tl.program_id(0) // outputs).to(tl.int64)
    o = tl.program_id(0) % outputs
    tap = tl.arange(0, 16)[:, None]  # nine of them, a power of two for Triton
    product = tl.zeros((16, BLOCK_C), tl.float64)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        wanted = (tap < 9) & (c < channels)
        total = tl.zeros((16, BLOCK_C), tl.float32)
        for split in range(splits):
            row = (n * splits + split) * 9 * outputs + o
            total += tl.load(partial_ptr + (row + tap * outputs) * channels + c, mask=wanted, other=0.0)
        at = c * 9 + tap
        w = tl.load(weight_ptr + o * channels * 9 + at, mask=wanted, other=0.0)
        product += total.to(tl.float64) * w.to(tl.float64)
        tl.store(gradient_ptr + (n * outputs + o) * channels * 9 + at, total, mask=wanted)
    of_bias = tl.sum(tl.zeros((1,), tl.float32), 0)
    for split in range(splits):
        of_bias += tl.load(bias_partial_ptr + (n * splits + split) * outputs + o)
    tl.store(bias_gradient_ptr + n * outputs + o, of_bias)
    ds = tl.sum(tl.sum(product, 1), 0)
    if bias_ptr is not None:
        ds += tl.load(bias_ptr + o).to(tl.float64) * of_bias.to(tl.float64)
    tl.store(ds_ptr + n * outputs + o, (ds * scale).to(tl.float32))


@triton.jit(do_not_specialize=["images", "outputs", "length"])
def dweight2_kernel(
    total_ptr,  # [outputs, length] float32
    gradient_ptr,  # [images, outputs, length] float32
    sums_ptr,  # [images, length] float32
    factor_ptr,  # [images, outputs] float32
    shift_ptr,
    images,
    outputs,
    length,
    BLOCK: tl.constexpr,
):
    """total += the sum over images of factor * gradient + shift * sums."""
    blocks = tl.cdiv(length, BLOCK)
    o = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(total_ptr + o * length + i, mask=i < length, other=0.0)
    for image in range(images):
        n = tl.full((), 1, tl.int64) * image
        gradient = tl.load(gradient_ptr + (n * outputs + o) * length + i, mask=i < length, other=0.0)
        sums = tl.load(sums_ptr + n * length + i, mask=i < length, other=0.0)
        total += tl.load(factor_ptr + n * outputs + o) * gradient + tl.load(shift_ptr + n * outputs + o) * sums
    tl.store(total_ptr + o * length + i, total, mask=i < length)


def tap_sums(sums: Tensor, partial: Tensor) -> None:
    """T of the operator's step 5 from the sums of the tiles."""
    n, tiles, _, channels = partial.shape
    tap_sums_kernel[(n * 9 * triton.cdiv(channels, SUMMED_CHANNELS),)](
        sums, partial, tiles, CHANNELS=channels, TILE_ROWS=TILE_ROWS, BLOCK_C=SUMMED_CHANNELS
    )


# Opaque to torch.compile, as conv3x3's launcher is.
@torch.library.custom_op("fastsr::triton_rcab", mutates_args=("out", "hidden", "sums", "attention"))
def forward_into(
    out: Tensor,
    hidden: Tensor,
    sums: Tensor,
    attention: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    res_scale: float,
) -> None:
    """As `compiled.forward_into`."""
    with current_device(x):
        partial = x.new_empty(conv3x3.tap_sums_shape(x, weight1.shape[0]), dtype=torch.float32)
        launch(hidden, x, weight1, bias1, negative_slope=0.0, sums=partial)
        tap_sums(sums, partial)
        means = sums.flatten(1) / (x.shape[2] * x.shape[3])
        pooled = matrix(weight2.contiguous(), bias2, means, "none")
        s = matrix(up_weight, up_bias, matrix(down_weight, down_bias, pooled, "relu"), "sigmoid")
        launch(out, hidden, weight2, bias2, x, scale=res_scale, factors=s)
        attention[0] = pooled
        attention[1] = s


def hidden_into(hidden: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None) -> None:
    """As `compiled.hidden_into`."""
    conv3x3.conv3x3_into(hidden, x, weight1, bias1, None, 0.0, 1.0, 1, 1)


def flipped(weight: Tensor) -> Tensor:
    """The weights of the transposed convolution."""
    return weight.flip(2, 3).transpose(0, 1)


@torch.library.custom_op("fastsr::triton_rcab_backward", mutates_args=("dx", "gradients", "grad_hidden"))
def backward_into(
    dx: Tensor | None,
    gradients: Sequence[Tensor],
    grad_hidden: Tensor,
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    sums: Tensor,
    attention: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    res_scale: float,
) -> None:
    """As `compiled.backward_into`."""
    pixels = x.shape[2] * x.shape[3]
    with current_device(x):
        du = torch.empty_like(grad, memory_format=torch.channels_last) if dx is None else dx
        dweight2 = torch.zeros_like(weight2, dtype=torch.float32)
        products: list[Tensor] = []  # of the gate's parameters, and dbias2
        together = max(1, GRADIENTS // (8 * weight2.numel()))  # G and one split
        for n in range(0, x.shape[0], together):
            some = slice(n, n + together)
            pooled, s = attention[0, some], attention[1, some]
            g, g_bias, ds = image_gradients(grad[some], hidden[some], weight2, bias2, res_scale)
            back, of_some = gate_backward(ds * gate_slope("sigmoid", s), pooled, down_weight, down_bias, up_weight, "relu")
            shifts, factors = back / pixels, res_scale * s
            scaled(du[some], grad[some], None, factors, shifts, 1.0)
            if not gradients:
                continue
            outputs, length = dweight2.shape[0], dweight2[0].numel()
            dweight2_kernel[(outputs * triton.cdiv(length, BLOCK),)](
                dweight2, g, sums[some], factors, shifts, s.shape[0], outputs, length, BLOCK=BLOCK
            )
            of_some.append((factors * g_bias + back).sum(0))
            products = [a + b for a, b in zip(products, of_some, strict=True)] if products else of_some
        launch(grad_hidden, du, flipped(weight2), negative_slope=0.0, mask=hidden)
        if dx is not None:
            launch(dx, grad_hidden, flipped(weight1), residual=grad)
        if gradients:
            partial, of_bias = triton_wgrad.partial_gradients(grad_hidden, x)
            triton_wgrad.reduce(gradients[0], gradients[1], partial, of_bias)
            for gradient, value in zip(gradients[2:], [dweight2, products[-1], *products[:-1]], strict=True):
                gradient.copy_(value.view_as(gradient))


def image_gradients(
    grad: Tensor, hidden: Tensor, weight2: Tensor, bias2: Tensor | None, res_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """G and the sums of grad, for each image, and step 6: ds."""
    partial, bias_partial = triton_wgrad.partial_gradients(grad, hidden, groups=grad.shape[0])
    n, splits, _, outputs, channels = partial.shape
    gradients = partial.new_empty((n, outputs, channels, 9))
    of_bias, ds = (partial.new_empty((n, outputs)) for _ in range(2))
    image_gradient_kernel[(n * outputs,)](
        gradients, of_bias, ds, partial, bias_partial, weight2, bias2, splits, outputs, channels, res_scale, BLOCK_C=BLOCK_C
    )
    return gradients, of_bias, ds


for operator in (forward_into, backward_into):
    operator.register_fake(lambda *arguments: None)


def aot_cases() -> Iterator[AotCase]:
    """RCAN's 64 channels and an odd width, in every role that conv3x3's and the dense block's cases have not."""
    for gpu in FAMILIES:
        for mode, dtype in modes(gpu):
            for channels in (64, 33):
                yield conv3x3.aot_case("sums", gpu, mode, dtype, channels, channels, 1, 1, ("sums_ptr",), op="rcab")
                yield conv3x3.aot_case("gated", gpu, mode, dtype, channels, channels, 1, 1, ("residual_ptr", "factor_ptr"), op="rcab")
            yield triton_wgrad.aot_case("rcab", gpu, mode, dtype, 64, 64, (0,), (64,))
        names = ("gradient_ptr", "bias_gradient_ptr", "ds_ptr", "partial_ptr", "bias_partial_ptr")
        for dtype in ("bf16", "fp16", "fp32"):
            pointers = dict.fromkeys(names, "*fp32") | {"weight_ptr": "*" + dtype, "bias_ptr": "*" + dtype}
            yield _case(f"image-gradients-{gpu}-{dtype}", gpu, image_gradient_kernel, pointers, {"BLOCK_C": BLOCK_C})
        names = ("total_ptr", "gradient_ptr", "sums_ptr", "factor_ptr", "shift_ptr")
        yield _case(f"dweight2-{gpu}", gpu, dweight2_kernel, dict.fromkeys(names, "*fp32"), {"BLOCK": BLOCK})
        constants = {"CHANNELS": 64, "TILE_ROWS": TILE_ROWS, "BLOCK_C": SUMMED_CHANNELS}
        yield _case(f"tap-sums-{gpu}", gpu, tap_sums_kernel, dict.fromkeys(("sums_ptr", "partial_ptr"), "*fp32"), constants)


def _case(name: str, gpu: str, kernel: triton.JITFunction, pointers: dict[str, str], constants: dict[str, int]) -> AotCase:
    """One of the vectors' kernels; what is neither a pointer nor a constant is a factor or an integer."""
    rest = [a for a in kernel.arg_names if a not in pointers and a not in constants]
    signature = pointers | {a: "fp32" if a == "scale" else "i32" for a in rest}
    return AotCase("rcab-" + name, gpu, kernel, signature, constants, tuple(pointers), {})
