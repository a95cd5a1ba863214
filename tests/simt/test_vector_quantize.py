"""The text of csrc/cuda/vector_quantize.cuh and vq_segments.cuh on the CPU, behind the operator itself: forward and both gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastsr import backends, ops
from fastsr.kernels.vector_quantize import compiled
from tests.harness import ALL_DTYPES, DEVICE, Case, Runner, adversarial_cases, random_tensor
from tests.ops.test_vector_quantize import OPTIONS, assert_as_good_as_eager, assert_case, results
from tests.simt import host
from tests.simt.test_vq_nearest import fours

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")

COMPILED = Runner("compiled")
CODES = 11


class Kernels:
    """Stands in for `compiled`'s three functions."""

    schedule = 0
    fast = False

    @staticmethod
    def _call(name: str, x: Tensor, *arguments: object) -> None:
        getattr(host.module("vector_quantize"), f"{name}_{str(x.dtype)[6:]}")(Kernels.schedule, *arguments)

    @staticmethod
    def _given(t: Tensor | None, x: Tensor) -> tuple[object, ...]:
        return (0, x.shape, x.stride(), False) if t is None else (t.data_ptr(), t.shape, t.stride(), fours(t, 2))

    @classmethod
    def quantize_into(cls, quantized, indices, loss, counts, sums, distances, x, codebook, mask, cosine):  # type: ignore[no-untyped-def]
        for t in (quantized, indices, loss, counts, distances):
            if t is not None:
                t.fill_(-7)
        book = (codebook.data_ptr(), codebook.shape[1], fours(codebook, 2))
        out = (address(t) for t in (indices, loss, counts, sums, distances))
        cls._call("forward", x, cls.fast, cls._given(x, x), *book, address(mask), cosine, cls._given(quantized, x), *out)

    @classmethod
    def input_gradient_into(cls, dx, grad, commitment_grad, x, quantized, mask, rotation):  # type: ignore[no-untyped-def]
        given = [cls._given(t, x) for t in (grad, x, quantized, dx)]
        cls._call("dx", x, given[0], address(commitment_grad), *given[1:3], address(mask), rotation, given[3])

    @classmethod
    def codebook_gradient_into(cls, dcodebook, codebook_grad, x, quantized, indices, mask):  # type: ignore[no-untyped-def]
        given = (cls._given(t, x) for t in (x, quantized))
        to = dcodebook.shape[1], address(dcodebook)
        cls._call("dcodebook", x, cls.fast, address(codebook_grad), *given, address(indices), address(mask), *to)


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> type[Kernels]:
    """In place of the native library, which need not be there."""
    for name in ("quantize_into", "input_gradient_into", "codebook_gradient_into"):
        monkeypatch.setattr(compiled, name, getattr(Kernels, name))
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    monkeypatch.setattr(Kernels, "schedule", 0)
    monkeypatch.setattr(Kernels, "fast", False)
    return Kernels


#: Every layout, dtype and option with each number of channels, in few pixels; 300 channels are several units of each lane.
CASES = adversarial_cases(channels=(1, 8, 19), dtypes=ALL_DTYPES, images=((1, 1), (2, 3), (5, 7)))
CASES += [Case((1, 300, 3, 5), dtype, layout, "plain") for dtype in ALL_DTYPES for layout in ("nchw", "channels_last")]
TURNS = list(zip(CASES, itertools.cycle(OPTIONS), strict=False))


@pytest.mark.parametrize(("case", "options"), TURNS, ids=[f"{c}-{'-'.join(map(str, o))}" for c, o in TURNS])
def test_outputs_and_gradients_are_as_good_as_eager(case, options):
    assert_case(COMPILED, case, options)


#: With every layout and dtype.
FEW = [turn for i, turn in enumerate(TURNS) if (i + i // 3) % 3 == 0]


@pytest.mark.parametrize(("case", "options"), FEW, ids=[f"{c}-{'-'.join(map(str, o))}" for c, o in FEW])
def test_sums_by_atomics_are_as_good_as_eager(case, options, kernels):
    kernels.fast = True
    assert_case(COMPILED, case, options)


def test_sums_by_atomics_of_heads_many_rows_and_one_code(kernels):
    kernels.fast = True
    for rows, codes, depth in ((21, 70, 33), (700, 3, 8), (300, 1, 5)):
        x, codebook = random_tensor((rows, 2, depth), torch.float32, 1), random_tensor((2, codes, depth), torch.float32, 2)
        codebook[:, 2:] += 50
        mask = random_tensor((rows, 2), torch.float32, 4) > -1
        assert_as_good_as_eager(COMPILED, x, codebook, random_tensor(x.shape, x.dtype, 3), mask=mask)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_heads_have_codebooks_of_their_own(gradient):
    x, codebook = random_tensor((21, 3, 33), torch.float32, 1), random_tensor((3, 70, 33), torch.float32, 2)
    assert_as_good_as_eager(COMPILED, x, codebook, random_tensor(x.shape, x.dtype, 3), gradient=gradient)
    picture = x.view(3, 7, 3, 33).permute(0, 2, 3, 1).contiguous()
    first, last = (ops.vector_quantize(t, codebook, channel_dim=c, backend="compiled") for t, c in ((picture, 2), (x, -1)))
    assert torch.equal(first.indices.permute(0, 2, 1).reshape(21, 3), last.indices)
    assert torch.equal(first.sums, last.sums)


@pytest.mark.parametrize(("codes", "rows"), [(1, 400), (300, 400), (5000, 50)])
def test_sizes_beyond_one_chunk_tile_and_scan(codes, rows):
    """Codes without rows, codes with rows in several tiles, and more codes than one step of the scan takes."""
    x, codebook = random_tensor((3, rows, 2), torch.float32, 1), random_tensor((codes, 2), torch.float32, 2)
    codebook[5:-5] += 50  # ten codes share the rows
    assert_as_good_as_eager(COMPILED, x, codebook, random_tensor(x.shape, x.dtype, 3))


def test_rows_of_a_code_are_summed_in_order():
    """In every tile of 64 rows two large ones cancel; a one between them would be lost in float64."""
    x = torch.ones(1024, 1)
    x[::64], x[1::64] = 1e30, -1e30
    out = ops.vector_quantize(x, torch.tensor([[0.0], [3e38]]), backend="compiled")
    assert out.counts.tolist() == [1024, 0]
    assert out.sums.tolist() == [[1024 / 64 * 62], [0]]


def test_duplicate_codes_and_rows_that_are_not_finite():
    x, codes = random_tensor((40, 6), torch.float32, 1), random_tensor((5, 6), torch.float32, 2)
    x[3] = torch.nan
    x[4, 2] = torch.inf
    out = ops.vector_quantize(x, torch.cat([codes, codes, codes]), backend="compiled")
    assert out.codebook_loss.isnan()
    assert out.indices[3] == 0
    assert out.indices.max() < 5
    mask = x.isfinite().all(1)
    x.requires_grad_()
    out = ops.vector_quantize(x, codes, mask=mask, backend="compiled")
    (out.commitment_loss + out.codebook_loss).backward()
    assert x.grad.isfinite().all()
    assert not x.grad[3:5].any()
    assert out.sums.isfinite().all()
    assert out.counts.sum() == 38


def test_nothing_counts():
    x, codebook = random_tensor((9, 4), torch.float32, 1).requires_grad_(), random_tensor((CODES, 4), torch.float32, 2).requires_grad_()
    out = ops.vector_quantize(x, codebook, mask=torch.zeros(9, dtype=torch.bool), backend="compiled")
    (out.codebook_loss + out.commitment_loss + out.quantized.sum()).backward()
    assert out.codebook_loss == 0
    assert not out.counts.any()
    assert not out.sums.any()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not codebook.grad.any()


def test_the_schedule_does_not_change_a_bit(kernels):
    x, codebook = random_tensor((300, 5), torch.float32, 1), random_tensor((7, 5), torch.float32, 2)
    first, *others = [], [], []
    for kernels.schedule, found in enumerate((first, *others)):
        found += results(x, codebook, x.flip(0), x.dtype, gradient="rotation", backend="compiled")
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_the_address_sanitizer_finds_no_overrun():
    """Buffers of exactly the size that the arguments span."""
    script = """
rng = numpy.random.default_rng(0)
at = lambda a: a.ctypes.data
for kind, n, k, d in [("f4", 5, 3, 1), ("f2", 130, 129, 20), ("f4", 70, 40, 70), ("f4", 9, 7, 270)]:
    name = {"f4": "float32", "f2": "float16"}[kind]
    x, codes = rng.standard_normal((n, d)).astype(kind), rng.standard_normal((k, d)).astype(kind)
    quantized, dx, dcodes = numpy.empty_like(x), numpy.empty_like(x), numpy.zeros_like(codes)
    indices, distances, loss, counts = numpy.empty(n, "i8"), numpy.empty(n, "f4"), numpy.empty(1, "f4"), numpy.empty(k, "i8")
    sums, mask = numpy.zeros((k, d), "f4"), rng.random(n) > 0.5
    for vectors in {False, d % 4 == 0}:
        given = lambda t: (at(t), (n, 1, d, 1), (d, d, 1, 1), vectors)
        out = (at(indices), at(loss), at(counts), at(sums), at(distances))
        for fast in (False, True):
            getattr(vector_quantize, "forward_" + name)(0, fast, given(x), at(codes), k, vectors, at(mask), False, given(quantized), *out)
            assert counts.sum() == mask.sum()
            given_rows = given(x), given(quantized), at(indices), at(mask)
            getattr(vector_quantize, "dcodebook_" + name)(0, fast, at(loss), *given_rows, k, at(dcodes))
        for rotation in (False, True):
            getattr(vector_quantize, "dx_" + name)(0, given(x), at(loss), given(x), given(quantized), at(mask), rotation, given(dx))
print("finished")
"""
    done = host.run_alone("vector_quantize", script, host.ADDRESS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "finished" in done.stdout
