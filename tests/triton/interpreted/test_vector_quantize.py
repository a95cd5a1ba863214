"""The Triton backend of vector quantisation in the interpreter: a short list of what `tests/ops/test_vector_quantize.py` asks of it on a
GPU, and what only the kernels themselves can show."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastsr.kernels.vector_quantize import triton as kernels
from fastsr.kernels.vector_quantize.op import vector_quantize
from tests.harness import ALL_DTYPES, Case, Runner, adversarial_cases, random_tensor
from tests.ops.test_vector_quantize import CODES, OPTIONS, assert_as_good_as_eager, assert_case, results

TRITON = Runner("triton")

#: Every third of the list, so that every layout meets every dtype; and channels of more than one tile, in both layouts.
ALL = adversarial_cases(channels=(1, 8, 19), dtypes=ALL_DTYPES, images=((1, 1), (2, 3), (5, 7)))
CASES = [case for i, case in enumerate(ALL) if (i + i // 3) % 3 == 0]
CASES += [Case((1, 300, 2, 3), torch.float32, layout, "plain") for layout in ("nchw", "channels_last")]
TURNS = list(zip(CASES, itertools.cycle(OPTIONS), strict=False))


@pytest.mark.parametrize(("case", "options"), TURNS, ids=[f"{c}-{'-'.join(map(str, o))}" for c, o in TURNS])
def test_outputs_and_gradients_are_as_good_as_eager(case, options):
    assert_case(TRITON, case, options)


def test_heads_have_codebooks_of_their_own():
    x, codebook = random_tensor((3, 7, 2, 5), torch.float32, 1), random_tensor((2, 30, 5), torch.float32, 2)
    assert_as_good_as_eager(TRITON, x, codebook, torch.ones_like(x), gradient="rotation")
    first, last = (vector_quantize(t, codebook, channel_dim=c, backend="triton") for t, c in ((x.movedim(1, -1).contiguous(), -2), (x, -1)))
    assert torch.equal(first.indices.movedim(-1, 1), last.indices)
    assert torch.equal(first.sums, last.sums)


@pytest.mark.parametrize("codes", [1, 40])
def test_codes_of_many_pieces_and_of_none(codes):
    x, codebook = random_tensor((900, 3), torch.float32, 1), random_tensor((codes, 3), torch.float32, 2)
    codebook[2:-1] += 50
    assert_as_good_as_eager(TRITON, x, codebook, random_tensor(x.shape, x.dtype, 3))


def test_rows_that_are_not_finite_and_masks():
    x, codebook = random_tensor((30, 6), torch.float32, 1), random_tensor((5, 6), torch.float32, 2)
    x[3], x[4, 2] = torch.nan, torch.inf
    out = vector_quantize(x, torch.cat([codebook, codebook]), backend="triton")
    assert out.codebook_loss.isnan()
    assert out.indices[3] == 0
    assert out.indices.max() < 5
    leaves = x.clone().requires_grad_(), codebook.requires_grad_()
    for mask in (x.isfinite().all(1), torch.zeros(30, dtype=torch.bool)):
        out = vector_quantize(*leaves, mask=mask, backend="triton")
        dx, dcodebook = torch.autograd.grad(out.codebook_loss + out.commitment_loss, leaves)
        assert dx.isfinite().all()
        assert not dx[~mask].any()
        assert dcodebook.isfinite().all()
        assert out.counts.sum() == mask.sum()
        assert bool(out.codebook_loss == 0) == (not mask.any())
    assert not vector_quantize(torch.empty(0, 6), codebook, backend="triton").sums.any()


def test_results_repeat():
    x, codebook = random_tensor((500, 4), torch.float32, 1), random_tensor((CODES, 4), torch.float32, 2)
    first, second = (results(x, codebook, x, x.dtype, gradient="rotation", backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_two_to_the_31():
    """Pictures 2^30 + 1 elements apart; untouched pages cost no memory."""
    near, codebook = random_tensor((3, 8, 2, 5), torch.float16, 0), random_tensor((4, 8), torch.float16, 1)
    far = torch.empty(2 * (2**30 + 1) + 80, dtype=torch.float16).as_strided(near.shape, (2**30 + 1, 10, 5, 1)).copy_(near)
    ours, theirs = (vector_quantize(x, codebook, channel_dim=1, backend="triton") for x in (far, near))
    assert all(torch.equal(a, b) for a, b in zip(ours[:6], theirs[:6], strict=True))


def test_fullgraph_compile_with_gradients():
    leaves = random_tensor((2, 6, 3, 4), torch.float32, 1).requires_grad_(), random_tensor((CODES, 6), torch.float32, 2).requires_grad_()

    def loss(x, codebook):
        out = vector_quantize(x, codebook, channel_dim=1, gradient="rotation", backend="triton")
        return out.quantized.sin().sum() + out.codebook_loss + 0.25 * out.commitment_loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_opcheck():
    x, codebook = random_tensor((3, 2, 5, 4), torch.float32, 1), random_tensor((2, CODES, 5), torch.float32, 2)
    mask = random_tensor((3, 2, 4), torch.float32, 3) > 0
    quantized, indices, loss = torch.empty_like(x), torch.zeros(3, 2, 4, dtype=torch.int64), torch.zeros(())
    counts, sums = torch.zeros(2, CODES, dtype=torch.int64), torch.zeros(2, CODES, 5)
    for distances, kept in ((None, None), (torch.zeros(3, 2, 4), mask)):
        torch.library.opcheck(kernels.quantize_into, (quantized, indices, loss, counts, sums, distances, x, codebook, kept, False))
    for grad, loss_grad, rotation in ((x, None, True), (None, loss, False), (x, loss, True)):
        torch.library.opcheck(kernels.input_gradient_into, (torch.empty_like(x), grad, loss_grad, x, quantized, mask, rotation))
    torch.library.opcheck(kernels.codebook_gradient_into, (torch.zeros(2, CODES, 5), loss, x, quantized, indices, mask))
