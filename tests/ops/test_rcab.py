"""`fastsr.ops.rcab`, on every fused backend that can run here, against plain PyTorch that pools the second convolution's output."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from fastsr import ops
from fastsr.kernels.rcab import reference
from tests.harness import Case, adversarial_cases, assert_twice_eager, available_backends

RUNNERS = available_backends("rcab")

NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "down_weight", "down_bias", "up_weight", "up_bias")


def parameters(case: Case, features: int, hidden: int, squeezed: int, biases: bool = True, tail: tuple = ()) -> list[Tensor | None]:
    """All of `NAMES` but x; `tail` ends the shapes of the gate's weights."""
    weights = ((hidden, features, 3, 3), (features, hidden, 3, 3), (squeezed, features, *tail), (features, squeezed, *tail))
    tensors: list[Tensor | None] = []
    for key, shape in enumerate(weights):
        tensors += [case.parameter(*shape, key=2 * key), 0.3 * case.parameter(shape[0], key=2 * key + 1) if biases else None]
    return tensors


# (features, hidden, squeezed, res_scale, with biases, end of gate shapes, save). Gates are wide: the largest error of four values says
# little about either side.
BLOCKS = (
    (64, 64, 16, 1.0, True, (1, 1), "all"),
    (16, 16, 12, 0.1, True, (), "input"),
    (3, 5, 7, -1.5, False, (), "all"),
    (33, 48, 11, 1.0, True, (1, 1), "input"),
    (1, 1, 1, 0.5, True, (), "all"),
    (40, 17, 24, 1.0, False, (1, 1), "all"),
)

CASES = [
    (Case((case.size[0], block[0], *case.size[2:]), case.dtype, case.layout, case.gradient, case.seed + 4), block)
    for case, block in zip(adversarial_cases(channels=(1, 2)), itertools.cycle(BLOCKS), strict=False)
]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("case", "block"), CASES, ids=[f"{c}-{b[1]}-{b[6]}" for c, b in CASES])
def test_output_and_gradients_are_as_good_as_eager(case, block, runner):
    features, hidden, squeezed, res_scale, biases, tail, save = block
    arguments = [case.input(), *parameters(case, features, hidden, squeezed, biases, tail)]
    with runner.active() as backend:
        assert_twice_eager(
            fused=partial(ops.rcab, res_scale=res_scale, save=save, backend=backend),
            eager=partial(reference.rcab, res_scale=res_scale),
            args=arguments,
            grad=case.gradient_like,
            names=NAMES,
        )


def rcan_block(dtype: torch.dtype, size: tuple[int, int, int] = (2, 9, 11)) -> list[Tensor]:
    case = Case((size[0], 64, *size[1:]), dtype, "channels_last", "plain")
    return [case.input(), *parameters(case, 64, 64, 4)]


def test_the_reference_passes_gradcheck_twice():
    case = Case((2, 3, 3, 4), torch.float64, "nchw", "plain")
    leaves = [t.requires_grad_() for t in (case.input(), *parameters(case, 3, 4, 2, tail=(1, 1)))]
    f = partial(ops.rcab, res_scale=0.7, backend="reference")
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_the_reference_is_rcans_block():
    x, w1, b1, w2, b2, dw, db, uw, ub = rcan_block(torch.float64)
    conv = torch.nn.functional.conv2d
    u = conv(conv(x, w1, b1, padding=1).relu(), w2, b2, padding=1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(u, 1)
    s = conv(conv(pooled, dw[..., None, None], db).relu(), uw[..., None, None], ub).sigmoid()
    torch.testing.assert_close(ops.rcab(x, w1, b1, w2, b2, dw, db, uw, ub, res_scale=0.3), x + 0.3 * u * s)


def test_mistakes_are_named():
    arguments = dict(zip(NAMES, rcan_block(torch.float32, (1, 5, 6)), strict=True))

    def call(**changed):
        return ops.rcab(**{**arguments, **changed})

    with pytest.raises(ValueError, match=r"save is 'none'; expected 'all' or 'input'"):
        call(save="none")
    with pytest.raises(ValueError, match=r"x has shape \(1, 64, 0, 6\); expected at least one channel and one pixel"):
        call(x=torch.zeros(1, 64, 0, 6))
    with pytest.raises(ValueError, match=r"weight1 has shape \(64, 64, 1, 1\); expected \(any, 64, 3, 3\)"):
        call(weight1=torch.zeros(64, 64, 1, 1))
    with pytest.raises(ValueError, match=r"weight2 has shape \(64, 32, 3, 3\); expected \(64, 64, 3, 3\)"):
        call(weight2=torch.zeros(64, 32, 3, 3))
    with pytest.raises(ValueError, match=r"bias2 has shape \(1,\); expected \(64\)"):
        call(bias2=torch.zeros(1))
    with pytest.raises(ValueError, match=r"down_weight has shape \(4, 64, 3, 3\); expected \(any, 64, 1, 1\)"):
        call(down_weight=torch.zeros(4, 64, 3, 3))
    with pytest.raises(ValueError, match=r"up_weight has shape \(64,\); expected \(64, 4\)"):
        call(up_weight=torch.zeros(64))
    with pytest.raises(ValueError, match=r"down_bias has shape \(3,\); expected \(4\)"):
        call(down_bias=torch.zeros(3))
    with pytest.raises(TypeError, match=r"weight2 has dtype torch.float64 and x has torch.float32"):
        call(weight2=arguments["weight2"].double())
    with pytest.raises(ValueError, match=r"out has shape \(1, 64, 5, 5\)"):
        call(out=torch.zeros(1, 64, 5, 5))
    with pytest.raises(ValueError, match=r"workspace has strides .* expected channels side by side"):
        call(workspace=torch.zeros(1, 64, 5, 6))
    with pytest.raises(ValueError, match=r"out is for inference only"):
        call(x=arguments["x"].clone().requires_grad_(), out=torch.empty_like(arguments["x"]))
