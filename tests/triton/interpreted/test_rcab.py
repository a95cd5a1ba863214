"""The Triton backend of the residual channel attention block in the interpreter: a short list of what `tests/ops/test_rcab.py` asks of
it on a GPU, and what only the kernels themselves can show."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastsr.kernels.conv3x3.triton import launch, tap_sums_shape
from fastsr.kernels.rcab import reference
from fastsr.kernels.rcab import triton as kernels
from fastsr.kernels.rcab.op import rcab
from tests.harness import Case, assert_twice_eager, random_tensor
from tests.ops.test_rcab import BLOCKS, NAMES, parameters

RCAN, SMALL, ODD, WIDE, ONE, NO_BIAS = BLOCKS
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

#: One tile and one split of an image, many, and tiles that reach over the picture.
CASES = (
    (RCAN, Case((2, 64, 9, 17), BF16, "channels_last", "plain", 0)),
    (RCAN, Case((1, 64, 5, 7), F32, "nchw", "permute", 1)),
    (SMALL, Case((3, 16, 1, 1), F16, "misaligned", "sum", 2)),
    (SMALL, Case((2, 16, 1, 33), F32, "channel_slice", "cat", 3)),
    (ODD, Case((2, 3, 17, 1), F32, "permuted", "sum", 4)),
    (ODD, Case((3, 3, 12, 31), F16, "expanded", "permute", 5)),
    (WIDE, Case((2, 33, 9, 16), F16, "nchw", "plain", 6)),
    (ONE, Case((2, 1, 5, 7), BF16, "misaligned", "cat", 7)),
    (NO_BIAS, Case((1, 40, 8, 16), F32, "channels_last", "cat", 8)),
)


@pytest.mark.parametrize(("block", "case"), CASES, ids=[f"{case}-{block[1]}-{block[6]}" for block, case in CASES])
def test_output_and_gradients_are_as_good_as_eager(block, case):
    features, hidden, squeezed, res_scale, biases, tail, save = block
    assert_twice_eager(
        fused=partial(rcab, res_scale=res_scale, save=save, backend="triton"),
        eager=partial(reference.rcab, res_scale=res_scale),
        args=[case.input(), *parameters(case, features, hidden, squeezed, biases, tail)],
        grad=case.gradient_like,
        names=NAMES,
    )


def small_block(dtype: torch.dtype, size: tuple[int, int, int]) -> list[Tensor]:
    case = Case((size[0], 16, *size[1:]), dtype, "channels_last", "plain")
    return [case.input(), *parameters(case, 16, 24, 4)]


@pytest.mark.parametrize("size", [(2, 1, 1), (1, 2, 40), (1, 8, 16), (2, 19, 37), (1, 23, 3)], ids=str)
def test_the_sums_of_each_tap_are_those_of_the_stored_values(size):
    """In whole numbers, where every order of addition gives the same."""
    n, h, w = size
    x = random_tensor((n, 3, h, w), F16, 0).mul(2).round().contiguous(memory_format=torch.channels_last)
    weight = random_tensor((40, 3, 3, 3), F16, 1).round()
    partial_sums, sums = torch.full(tap_sums_shape(x, 40), torch.nan), torch.full((n, 40, 9), torch.nan)
    out = x.new_empty((n, 40, h, w)).contiguous(memory_format=torch.channels_last)
    launch(out, x, weight, negative_slope=0.0, sums=partial_sums)
    kernels.tap_sums(sums, partial_sums)
    seen = torch.nn.functional.unfold(out.float().flatten(0, 1)[:, None], 3, padding=1).unflatten(0, (n, 40))
    assert torch.equal(sums, seen.sum(-1))


def test_only_the_gradients_asked_for():
    arguments = small_block(F32, (1, 3, 5))
    leaves = [t.clone().requires_grad_() for t in arguments]
    expected = torch.autograd.grad(reference.rcab(*leaves).square().sum(), leaves)
    for wanted in ({0}, {1, 4}, {6}, {0, 3}):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(arguments)]
        rcab(*leaves, backend="triton").square().sum().backward()
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected[i])


def test_gradients_repeat_and_read_nothing_unwritten(monkeypatch):
    """Deterministic mode fills fresh memory with NaN; images a few at a time give the same."""
    arguments, results = small_block(F16, (3, 7, 18)), []
    for deterministic, save in ((False, "all"), (True, "input")):
        torch.use_deterministic_algorithms(deterministic)
        try:
            leaves = [t.clone().requires_grad_() for t in arguments]
            results.append(torch.autograd.grad(rcab(*leaves, save=save, backend="triton").sin().sum(), leaves))
        finally:
            torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert torch.isfinite(second).all()
        assert torch.equal(first, second)
    monkeypatch.setattr(kernels, "GRADIENTS", 0)
    one_by_one = torch.autograd.grad(rcab(*leaves, backend="triton").sin().sum(), leaves)
    for ours, together in zip(one_by_one, results[0], strict=True):
        torch.testing.assert_close(ours, together)


def test_out_may_be_x():
    x, *rest = small_block(BF16, (2, 5, 18))
    with torch.no_grad():
        expected = rcab(x, *rest, backend="triton")
        assert torch.equal(rcab(x, *rest, out=x, backend="triton"), expected)


def test_opcheck():
    x, w1, b1, w2, b2, dw, db, uw, ub = small_block(F32, (1, 2, 3))
    hidden, scratch = (torch.empty(1, 24, 2, 3).contiguous(memory_format=torch.channels_last) for _ in range(2))
    out, dx = torch.empty_like(x), torch.empty_like(x)
    sums, attention = torch.empty(1, 24, 9), torch.empty(2, 1, 16)
    forward, backward = torch.ops.fastsr.triton_rcab.default, torch.ops.fastsr.triton_rcab_backward.default
    for biases in ((b1, b2, db, ub), (None,) * 4):
        b, c, d, e = biases
        arguments = (out, hidden, sums, attention, x, w1, b, w2, c, dw, d, uw, e, 0.5)
        torch.library.opcheck(forward, arguments)
        forward(*arguments)
    gradients = [torch.empty_like(t) for t in (w1, b1, w2, b2, dw, db, uw, ub)]
    for wanted in ((dx, gradients), (None, gradients), (dx, [])):
        torch.library.opcheck(backward, (*wanted, scratch, x, x, hidden, sums, attention, w1, w2, b2, dw, db, uw, 0.5))


def test_fullgraph_compile_with_gradients():
    """One graph, forward and backward, the first block's intermediate values recomputed."""
    leaves = [t.requires_grad_() for t in small_block(F32, (2, 3, 4))]

    def loss(x, *rest):
        return rcab(rcab(x, *rest, save="input", backend="triton"), *rest, res_scale=0.1, backend="triton").square().mean()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
