"""`fastsr.ops.vq_nearest`: every index equals the true one, on every backend, instruction set and dtype that can run here."""

from __future__ import annotations

import pytest
import torch

from fastsr import ops
from tests import vq_cases
from tests.harness import ALL_DTYPES


@pytest.mark.parametrize("dtype", (*ALL_DTYPES, torch.float64), ids=str)
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
