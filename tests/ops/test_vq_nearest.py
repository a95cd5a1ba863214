"""`fastsr.ops.vq_nearest`: every index equals the true one, on every backend, instruction set and dtype that can run here."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import fastsr
from fastsr import ops
from tests import vq_cases
from tests.harness import ALL_DTYPES, DEVICE, LAYOUTS, available_backends, laid_out, random_tensor


@pytest.mark.parametrize("dtype", [*ALL_DTYPES, torch.float64], ids=str)
def test_the_reference_equals_argmin_of_the_plain_direct_form(dtype):
    """On data without ties the order of summation cannot matter."""
    for name in ("gaussian", "kmeans", "uniform_init", "offset_1000", "huge", "infinite_codes", "nan_rows", "nan_codes"):
        x, codes = vq_cases.Problem(name, 150, 70, 13, torch.float32).tensors()
        x, codes = x.to(dtype), codes.to(dtype)
        plain = (x.double()[:, None] - codes.double()).square().sum(2)
        indices, distances = ops.vq_nearest(x, codes, return_distance=True, backend="reference")
        assert torch.equal(indices, plain.argmin(1)), name
        torch.testing.assert_close(distances.double(), plain.to(distances.dtype).amin(1).double(), equal_nan=True)


@pytest.mark.parametrize("problem", vq_cases.problems(2000, (*ALL_DTYPES, torch.float64)), ids=str)
def test_the_reference_agrees_with_the_truth_of_the_other_tests(problem):
    search = ops.vq_nearest
    assert problem.first_wrong(lambda x, codes: search(x, codes, metric=problem.metric, backend="reference")) is None


RUNNERS = [r for r in available_backends("vq_nearest") if r.isa in (None, *{"avx512", "avx2", "portable"})]  # others run the same kernels

#: 200,000 rows on the best instruction set, fewer on the others.
ROWS = {r: 200_000 if r == RUNNERS[0] else 20_000 for r in RUNNERS}
PROBLEMS = [(r, p) for r in RUNNERS for p in vq_cases.problems(ROWS[r], ALL_DTYPES)]


@pytest.mark.parametrize(("runner", "problem"), PROBLEMS, ids=[f"{p}-{r}" for r, p in PROBLEMS])
def test_no_index_is_wrong(runner, problem):
    with runner.active() as backend:
        assert problem.first_wrong(lambda x, codes: ops.vq_nearest(x, codes, metric=problem.metric, backend=backend)) is None


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_codebook(dtype, runner):
    x, codes, truth = vq_cases.largest_problem(dtype)
    with runner.active() as backend:
        assert torch.equal(ops.vq_nearest(x, codes, backend=backend), truth)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_pictures_are_read_where_they_lie(metric, layout, runner):
    """In every layout, with images whose pixels no tile divides; indices, distances and counters as the reference has them."""
    codes = random_tensor((70, 19), torch.float32, 3)
    for dtype in ALL_DTYPES:
        x = laid_out(random_tensor((3, 19, 5, 9), dtype, 1), layout)
        counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        with runner.active() as backend:
            call = partial(ops.vq_nearest, x, codes.to(dtype), metric=metric, channel_dim=1, return_distance=True)
            indices, distances = call(backend=backend, rescored=counters)
        expected, exact = call(backend="reference")
        assert torch.equal(indices, expected)
        assert torch.equal(distances, exact)
        assert int(counters.sum()) <= x.shape[0] * 45


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_counters(runner):
    """Rows between two equal codes are compared in float64, rows that are not finite with all codes; ordinary rows are not."""
    codes = torch.eye(64, device=DEVICE)
    x = 0.6 * codes[torch.arange(48) % 64] + 0.01
    x[:10, :2] = 0.5
    x[:10, 2:] = 0
    x[10:13] = torch.inf
    counters = torch.tensor([100, 1000], device=DEVICE)
    with runner.active() as backend:
        indices = ops.vq_nearest(x, codes, rescored=counters, backend=backend)
    assert counters.tolist() == [110, 1003]
    assert indices.tolist() == [0] * 13 + list(range(13, 48))


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_flushing_denormals_changes_nothing(runner):
    problem = vq_cases.Problem("denormals", 200, 100, 24)
    x, codes = problem.tensors()
    truth = vq_cases.true_indices(x, codes)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        with runner.active() as backend:
            indices = ops.vq_nearest(x, codes, backend=backend)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(indices, truth)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 13])
def test_few_rows(rows, runner):
    x, codes = random_tensor((rows, 5), torch.float32, 1), random_tensor((9, 5), torch.float32, 2)
    with runner.active() as backend:
        found = ops.vq_nearest(x, codes, return_distance=True, backend=backend)
    expected = ops.vq_nearest(x, codes, return_distance=True, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_codebooks_of_any_strides(runner):
    x, codes = random_tensor((40, 6), torch.float32, 1), random_tensor((6, 33), torch.float32, 2).t()
    with runner.active() as backend:
        assert torch.equal(ops.vq_nearest(x, codes, backend=backend), ops.vq_nearest(x, codes, backend="reference"))
        one = codes[:1].expand(5, 6)
        assert not ops.vq_nearest(x, one, backend=backend).any()


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "compiled"][:1], ids=str)
def test_opcheck(runner):
    x, codes = random_tensor((3, 2, 5, 4), torch.float32, 1), random_tensor((2, 11, 5), torch.float32, 2)
    indices = torch.zeros(3, 2, 4, dtype=torch.int64)
    with runner.active():
        for distances, rescored in ((None, None), (torch.zeros(3, 2, 4), torch.zeros(2, dtype=torch.int64))):
            torch.library.opcheck(torch.ops.fastsr.vq_nearest.default, (x, codes, False, indices, distances, rescored))


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
def test_fullgraph_compile_without_recompilation(runner):
    codes = random_tensor((11, 6), torch.float32, 2)
    torch._dynamo.reset()
    with runner.active(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(lambda x: ops.vq_nearest(x * 2, codes), fullgraph=True, backend="aot_eager")
        for n in (40, 50, 13):
            x = random_tensor((n, 6), torch.float32, n)
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(compiled(x), ops.vq_nearest(x * 2, codes))


def test_mistakes_are_named():
    x, codes = torch.zeros(3, 5, 4), torch.zeros(7, 4)
    with pytest.raises(ValueError, match=r"metric is 'dot'; expected 'euclidean' or 'cosine'"):
        ops.vq_nearest(x, codes, metric="dot")
    with pytest.raises(ValueError, match=r"x has shape \(3, 5, 4\) with channel_dim 1 and codebook has \(7, 4\); expected .* 4"):
        ops.vq_nearest(x, codes, channel_dim=1)
    with pytest.raises(ValueError, match=r"channel_dim is 3 and x has shape \(3, 5, 4\)"):
        ops.vq_nearest(x, codes, channel_dim=3)
    with pytest.raises(ValueError, match=r"codebook has shape \(0, 4\)"):
        ops.vq_nearest(x, codes[:0])
    with pytest.raises(ValueError, match=r"heads and channels of x to be \(2, 4\)"):
        ops.vq_nearest(x, torch.zeros(2, 7, 4))
    with pytest.raises(ValueError, match=r"rescored is torch.float32 of shape \(2,\)"):
        ops.vq_nearest(x, codes, rescored=torch.zeros(2))
    with pytest.raises(TypeError, match=r"codebook has dtype torch.float64"):
        ops.vq_nearest(x, codes.double())
    with pytest.raises(TypeError, match=r"x has dtype torch.int64"):
        ops.vq_nearest(x.long(), codes.long())
    with pytest.raises(fastsr.BackendUnavailable, match="float64"):
        ops.vq_nearest(x.double(), codes.double(), backend="compiled")
