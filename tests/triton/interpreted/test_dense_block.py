"""The Triton backend of the dense block in the interpreter: a short list of what `tests/ops/test_dense_block.py` asks of it on a
GPU, and what only the kernels themselves can show."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastsr.kernels.dense_block import reference
from fastsr.kernels.dense_block import triton as kernels
from fastsr.kernels.dense_block.op import dense_block
from tests.harness import Case, assert_twice_eager, laid_out, random_tensor
from tests.ops.test_dense_block import BLOCKS, flat, parameters

ESRGAN, SMALL, ODD, TWO, ONE, WIDE = BLOCKS
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

#: Sizes with one tile and one split of the pixels, with many, and with a last split that is shorter than the others.
CASES = (
    (ESRGAN, Case((1, 64, 5, 7), BF16, "channels_last", "plain", 0)),
    (ESRGAN, Case((1, 64, 2, 3), F32, "nchw", "permute", 1)),
    # The interpreter rounds to bfloat16 toward zero, where a GPU rounds to nearest: a seed at which no activation changes its sign.
    (SMALL, Case((2, 16, 9, 16), BF16, "channel_slice", "cat", 21)),
    (SMALL, Case((1, 16, 1, 1), F16, "misaligned", "sum", 3)),
    (ODD, Case((1, 3, 14, 65), F32, "permuted", "sum", 4)),
    (ODD, Case((3, 3, 5, 7), F16, "expanded", "permute", 5)),
    (TWO, Case((2, 33, 4, 17), F16, "nchw", "plain", 6)),
    (ONE, Case((2, 4, 12, 31), BF16, "misaligned", "cat", 7)),
    (WIDE, Case((1, 32, 3, 5), F32, "channel_slice", "cat", 8)),
)


@pytest.mark.parametrize(("block", "case"), CASES, ids=[f"{case}-{len(block[1]) + 1}convs-{block[6]}" for block, case in CASES])
def test_output_and_gradients_are_as_good_as_eager(block, case):
    features, growths, slope, res_scale, residual_scale, with_biases, save = block
    weights, biases = parameters(case, features, growths, with_biases)
    residual = None if residual_scale is None else laid_out(random_tensor(case.size, case.dtype, 9), "nchw")
    options = {"negative_slope": slope, "res_scale": res_scale, "residual_scale": 1.0 if residual_scale is None else residual_scale}
    names = ["x", "residual", *(f"weight {k}" for k in range(len(weights))), *(f"bias {k}" for k in range(len(weights)))]
    assert_twice_eager(
        fused=flat(dense_block, len(weights), {**options, "save": save, "backend": "triton"}),
        eager=flat(reference.dense_block, len(weights), options),
        args=[case.input(), residual, *weights, *biases],
        grad=case.gradient_like,
        names=names,
    )


def small_block(dtype: torch.dtype, size: tuple[int, int, int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    case = Case((size[0], 16, *size[1:]), dtype, "channels_last", "plain")
    weights, biases = parameters(case, 16, (8,), True)
    return case.input(), weights, biases


def test_blocks_chain_through_each_others_workspaces():
    """`out` is the next workspace's prefix and x the first one's: the same bits as with fresh tensors, in fullgraph too."""
    x, weights, biases = small_block(BF16, (1, 3, 17))
    block = partial(dense_block, weights=weights, biases=biases, backend="triton")

    def chain(first, second):
        inner = block(first[:, :16], workspace=first, out=second[:, :16])
        return block(inner, workspace=second, residual=first[:, :16], residual_scale=0.2)

    with torch.no_grad():
        expected = block(block(x), residual=x, residual_scale=0.2)
        for run in (chain, torch.compile(chain, fullgraph=True, backend="aot_eager")):
            first, second = (random_tensor((1, 24, 3, 17), BF16, i).contiguous(memory_format=torch.channels_last) for i in range(2))
            first[:, :16] = x
            assert torch.equal(run(first, second), expected)
            assert torch.equal(first[:, :16], x)
            assert torch.equal(second[:, :16], block(x))


def test_only_the_gradients_asked_for():
    x, weights, biases = small_block(F32, (1, 3, 5))
    leaves = [t.clone().requires_grad_() for t in (x, *weights, *biases)]
    expected = torch.autograd.grad(flat(reference.dense_block, 2, {})(leaves[0], None, *leaves[1:]).sum(), leaves)
    for wanted in ({0}, {1, 4}, {2}):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, *weights, *biases))]
        flat(dense_block, 2, {"backend": "triton"})(leaves[0], None, *leaves[1:]).sum().backward()
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected[i])


def test_gradients_repeat_and_read_nothing_unwritten():
    """Deterministic mode fills fresh memory with NaN: scratch right of the staircase must reach no result, nor a split be left out."""
    x, weights, biases = small_block(F16, (3, 7, 18))
    results = []
    for deterministic, save in ((False, "all"), (True, "input")):
        torch.use_deterministic_algorithms(deterministic)
        try:
            leaves = [t.clone().requires_grad_() for t in (x, *weights, *biases)]
            y = dense_block(leaves[0], leaves[1:3], leaves[3:], save=save, backend="triton")
            results.append(torch.autograd.grad(y.sin().sum(), leaves))
        finally:
            torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert torch.isfinite(second).all()
        assert torch.equal(first, second)


def test_offsets_beyond_two_to_the_31():
    """Images of both workspaces 2^30 + 1 elements apart; untouched pages cost no memory."""
    far = 2**30 + 1
    weights = [torch.empty((4, 4, 3, 3), dtype=F16), torch.empty((4, 8, 3, 3), dtype=F16)]
    near = [random_tensor((3, 8, 2, 5), F16, seed).contiguous(memory_format=torch.channels_last) for seed in range(2)]
    apart = [torch.empty(2 * far + 80, dtype=F16).as_strided(near[0].shape, (far, 1, 40, 8)).copy_(t) for t in near]
    results = []
    for gradients, workspace in (near, apart):
        results.append([torch.empty_like(w) for w in weights] + [torch.empty(4, dtype=F16) for _ in weights])
        kernels.weight_gradients(results[-1][:2], results[-1][2:], gradients, workspace, weights, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    x, weights, biases = small_block(F32, (1, 2, 3))
    workspace, out, scratch, dx = (torch.empty_like(torch.cat([x, x[:, :more]], 1)) for more in (8, 0, 8, 0))
    kernels.fill(workspace, x, weights[:-1], biases[:-1], 0.2)
    gradients = [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases]
    ops = torch.ops.fastsr
    torch.library.opcheck(ops.triton_dense_block.default, (out, workspace, x, weights, [biases[0], None], None, 0.2, 0.2, 1.0))
    torch.library.opcheck(ops.triton_dense_block_features.default, (workspace, x, weights[:-1], biases[:-1], 0.2))
    for wanted in ((dx, *gradients), (None, *gradients), (dx, [], [])):
        torch.library.opcheck(ops.triton_dense_block_backward.default, (*wanted, scratch, x, workspace, weights, 0.2, 0.2, 1.0))


def test_fullgraph_compile_with_gradients():
    """One graph, forward and backward, the first block's intermediate values recomputed."""
    x, weights, biases = small_block(F32, (2, 3, 4))
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]

    def loss(x):
        y = dense_block(x, weights, biases, save="input", backend="triton")
        return dense_block(y, weights, biases, residual=x, residual_scale=0.2, backend="triton").square().mean()

    expected = torch.autograd.grad(loss(x), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(x), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
