"""The Triton kernel of conv3x3 in the interpreter: a short list of what `tests/ops/test_conv3x3.py` asks of it on a GPU,
and what only the kernel itself can show."""

from __future__ import annotations

import itertools
import os
from functools import partial

import pytest
import torch
import triton

from fastsr import ops
from fastsr.kernels.conv3x3 import reference
from fastsr.kernels.conv3x3 import triton as kernels
from tests.harness import ALL_DTYPES, Case, adversarial_cases, assert_close_as_eager, assert_twice_eager, random_tensor
from tests.ops.test_conv3x3 import EPILOGUES, NAMES, arguments, fused_call

IMAGES = ((1, 9), (9, 17), (8, 16), (11, 5), (2, 33))  # narrower than a tile, one more than it, exactly it, ...
#: Every seventh of the shared list: each layout, dtype, size and kind of gradient stays in it.
LIST = [case for case in adversarial_cases(channels=(1, 3, 12, 33, 64), images=IMAGES) if case.size[0]][::7]
CASES = list(zip(LIST, itertools.cycle(EPILOGUES), itertools.cycle((32, 3, 64, 1, 20)), strict=False))


def channels_last(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return random_tensor(shape, dtype, seed).contiguous(memory_format=torch.channels_last)


def test_this_is_the_triton_that_was_asked_for():
    assert triton.__version__ == os.environ.get("EXPECTED_TRITON", triton.__version__)


@pytest.mark.parametrize(("case", "epilogue", "cout"), CASES, ids=[f"{c}-{e[0]}-{o}" for c, e, o in CASES])
def test_output_and_gradients_are_as_good_as_eager(case, epilogue, cout):
    tensors, options, reference_options = arguments(case, epilogue, cout)
    assert_twice_eager(
        fused=partial(fused_call, backend="triton", options=options),
        eager=partial(reference.conv3x3, **reference_options),
        args=tensors,
        grad=case.gradient_like,
        names=NAMES,
    )


@pytest.mark.parametrize(("dtype", "cin", "cout"), [(torch.float32, 12, 33), (torch.bfloat16, 64, 32), (torch.float16, 96, 160)], ids=str)
def test_a_channel_prefix_goes_in_and_a_channel_slice_comes_out(dtype, cin, cout):
    """The dense block's use, in fullgraph too: nothing beside the slice is written."""
    workspace = channels_last(2, cin + cout + 8, 5, 18, dtype=dtype)
    before = workspace.clone()
    case = Case((2, cin, 5, 18), dtype, "channels_last", "plain")
    weight = case.parameter(cout, cin, 3, 3)
    eager = reference.conv3x3(before[:, :cin], weight, negative_slope=0.2)
    truth = reference.conv3x3(before[:, :cin].double(), weight.double(), negative_slope=0.2)

    def step(workspace):
        ops.conv3x3(workspace[:, :cin], weight, activation="leaky_relu", out=workspace[:, cin : cin + cout], backend="triton")
        return workspace[:, cin : cin + cout] * 1.0

    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        workspace.copy_(before)
        with torch.no_grad():
            y = run(workspace)
        assert_close_as_eager("output", y, eager, truth)
        assert torch.equal(y, workspace[:, cin : cin + cout])
        assert torch.equal(workspace[:, :cin], before[:, :cin])
        assert torch.equal(workspace[:, cin + cout :], before[:, cin + cout :])


def test_a_strip_of_an_image_gives_the_same_values():
    """The order of summation does not depend on the image's size or on a pixel's place in it."""
    x, weight = channels_last(1, 33, 20, 18), random_tensor((20, 33, 3, 3), torch.float32, 1)
    whole = ops.conv3x3(x, weight, backend="triton")
    strip = ops.conv3x3(x[:, :, 5:13], weight, backend="triton")
    assert torch.equal(strip[:, :, 1:-1], whole[:, :, 6:12])


def test_offsets_beyond_two_to_the_31():
    """Odd strides of 2^30 + 1 elements between images of x and between rows of out; untouched pages cost no memory."""
    far = 2**30 + 1
    x = torch.empty(2 * far + 8 * 15, dtype=torch.float16).as_strided((3, 8, 3, 5), (far, 1, 40, 8))
    out = torch.empty(2 * far + 8 * 5, dtype=torch.float16).as_strided((1, 8, 3, 5), (0, 1, far, 8))
    x.copy_(random_tensor(x.shape, x.dtype, 0))
    weight = random_tensor((8, 8, 3, 3), torch.float16, 1) / 9
    near = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.conv3x3(x, weight, backend="triton"), ops.conv3x3(near, weight, backend="triton"))
    ops.conv3x3(near[:1], weight, out=out, backend="triton")
    assert torch.equal(out, ops.conv3x3(near[:1], weight, backend="triton"))


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_nan_and_infinity_spread_as_in_eager(activation):
    x = random_tensor((1, 4, 6, 20), torch.float32, 0)
    x[0, 1, 2, 3], x[0, 2, 4, 15], x[0, 0, 4, 9] = torch.nan, torch.inf, -torch.inf
    weight = random_tensor((5, 4, 3, 3), torch.float32, 1)
    slope = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2}[activation]
    y = ops.conv3x3(x, weight, activation=activation, backend="triton")
    expected = reference.conv3x3(x, weight, negative_slope=slope)
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_derivative_mask_and_outer_skip(dtype):
    """What the dense block adds to the epilogue: the activation's derivative by a sign, and the outer skip."""
    x, weight = channels_last(2, 12, 5, 18, dtype=dtype), random_tensor((20, 12, 3, 3), dtype, 1) / 108**0.5
    mask, residual, outer = (channels_last(2, 25, 5, 18, dtype=dtype, seed=s)[:, 3:23] for s in (2, 3, 4))
    mask[0, 0, 0, :3] = torch.tensor([0.0, -0.0, torch.nan])  # none of them is above 0

    def plain(x, weight, residual, outer):
        v = torch.nn.functional.conv2d(x, weight, padding=1)
        return 0.3 * (0.7 * torch.where(mask > 0, v, v * 0.2) + residual) + outer

    y = torch.empty_like(outer, memory_format=torch.channels_last)
    kernels.launch(y, x, weight, None, residual, negative_slope=0.2, scale=0.7, mask=mask, outer=outer, outer_scale=0.3)
    tensors = x, weight, residual, outer
    assert_close_as_eager("output", y, plain(*tensors), plain(*(t.double() for t in tensors)))


def test_opcheck():
    op = torch.ops.fastsr.triton_conv3x3.default
    weight, bias = random_tensor((8, 4, 3, 3), torch.float32, 0), random_tensor((8,), torch.float32, 1)
    torch.library.opcheck(op, (channels_last(2, 8, 5, 6), channels_last(2, 4, 5, 6), weight, bias, None, 0.2, 1.0, 1, 1))
    out, residual = channels_last(2, 2, 20, 24), channels_last(2, 2, 20, 24, seed=1)
    torch.library.opcheck(op, (out, channels_last(2, 4, 5, 6), weight, None, residual, 0.0, 0.5, 2, 2))


def test_fullgraph_compile_with_gradients():
    """One graph, forward and backward, over two sizes."""
    weight = random_tensor((8, 8, 3, 3), torch.float32, 0).requires_grad_()

    def block(x):
        y = ops.conv3x3(x, weight, activation="leaky_relu", backend="triton")
        return ops.conv3x3(y, weight, residual=x, scale=0.2, backend="triton").square().mean()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for size in (6, 9):
        x = random_tensor((2, 8, size, size + 1), torch.float32, size).requires_grad_()
        expected = torch.autograd.grad(block(x), [x, weight])
        for ours, theirs in zip(torch.autograd.grad(compiled(x), [x, weight]), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
