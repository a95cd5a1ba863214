"""The Triton code search in the interpreter: exact indices over everything that breaks code searches, in every dtype and layout."""

from __future__ import annotations

import pytest
import torch

from fastsr.kernels.vq_nearest import reference
from fastsr.kernels.vq_nearest.op import vq_nearest
from tests.harness import ALL_DTYPES
from tests.vq_cases import DISTRIBUTIONS, Problem, problems

#: Where few rows are scanned in full, which the interpreter does one by one, many take part.
ORDINARY = ("gaussian", "kmeans", "uniform_init", "offset_10")
SHAPES = ((100, 3), (1, 1), (33, 17), (130, 24), (2, 40), (65, 1), (16, 9), (64, 64))
SMALL = ((100, 3), (1, 1), (33, 17), (2, 40), (65, 1), (16, 9))
MANY = [Problem(name, 2400, *SHAPES[i], seed=i) for i, name in enumerate(ORDINARY * 2)]
#: The interpreter turns denormal bfloat16 values into others.
FEW = [p for p in problems(1000, ALL_DTYPES, SMALL) if (p.distribution, p.dtype) != ("denormals", torch.bfloat16)]


def search(problem: Problem):  # type: ignore[no-untyped-def]
    return lambda x, codes: vq_nearest(x, codes, metric=problem.metric, backend="triton")


@pytest.mark.parametrize("problem", [*MANY, *FEW], ids=str)
def test_every_index_is_the_true_one(problem):
    assert not problem.first_wrong(search(problem))


def test_every_distribution_takes_part():
    assert {p.distribution for p in (*MANY, *FEW)} == set(DISTRIBUTIONS)
    assert sum(p.n for p in (*MANY, *FEW)) >= 20_000


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_heads_layouts_and_the_references_distances(metric):
    generator = torch.Generator().manual_seed(0)
    book = torch.randn((3, 70, 20), generator=generator)
    base = torch.randn((2, 3, 20, 5, 3), generator=generator)
    for x in (base, base.transpose(2, 4).contiguous().transpose(2, 4), base[..., :1].expand(2, 3, 20, 5, 4), base[..., ::2]):
        indices, distances = vq_nearest(x, book, metric=metric, channel_dim=2, return_distance=True, backend="triton")
        rows = x.reshape(2, 3, 20, -1)
        expected = reference.search(rows, book, metric == "cosine")
        assert torch.equal(indices.flatten(2), expected[0])
        assert torch.equal(distances.flatten(2), expected[1].float())


def test_counts_what_was_compared_in_float64():
    x, codes = Problem("gaussian", 40, 64, 8).tensors()
    x[3] = torch.nan
    rescored = torch.zeros(2, dtype=torch.int64)
    vq_nearest(x, codes, rescored=rescored, backend="triton")
    assert rescored.tolist()[1] == 1
    vq_nearest(x, torch.cat([codes[:32], codes[:32]]), rescored=rescored, backend="triton")
    assert rescored.tolist() == [39, 2]


def test_fullgraph_compile():
    x, codes = Problem("gaussian", 12, 20, 6).tensors()
    run = torch.compile(lambda x: vq_nearest(x, codes, backend="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x), vq_nearest(x, codes, backend="reference"))


def test_opcheck():
    x, codes = Problem("gaussian", 12, 20, 6).tensors()
    indices, distances, rescored = torch.empty((1, 1, 12), dtype=torch.int64), torch.empty((1, 1, 12)), torch.zeros(2, dtype=torch.int64)
    vq_nearest(x, codes, backend="triton")
    for wanted in ((indices, distances, rescored), (indices, None, None)):
        torch.library.opcheck(torch.ops.fastsr.triton_vq_nearest.default, (*wanted, x.t()[None, None], codes[None], False))
