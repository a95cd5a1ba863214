"""`fastsr.ops.conv3x3`, on every fused backend that can run here, against plain PyTorch."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

import fastsr
from fastsr import ops
from fastsr.kernels.conv3x3 import reference
from tests.harness import ALL_DTYPES, DEVICE, Case, adversarial_cases, assert_twice_eager, available_backends, laid_out, random_tensor

RUNNERS = available_backends("conv3x3")
NAMES = ("x", "weight", "bias", "residual")

# (activation, negative_slope as the reference takes it, scale, with residual, upsample, pixel_shuffle, with bias)
EPILOGUES = (
    ("none", 1.0, 1.0, False, 1, 1, True),
    ("leaky_relu", 0.2, 1.0, False, 1, 1, True),
    ("relu", 0.0, 1.0, False, 2, 1, True),
    ("none", 1.0, 0.2, True, 1, 1, True),
    ("relu", 0.0, 0.5, True, 1, 2, False),
    ("leaky_relu", 1.5, -0.5, True, 2, 1, True),
    ("none", 1.0, 1.0, False, 1, 3, False),
)


def arguments(case: Case, epilogue: tuple, cout: int) -> tuple[list[Tensor | None], dict, dict]:
    """The tensors, the fused op's options and the reference's options."""
    activation, slope, scale, has_residual, upsample, r, has_bias = epilogue
    n, c, h, w = case.size
    cout = cout * r * r
    residual = None
    if has_residual:
        size = (n, cout // (r * r), h * upsample * r, w * upsample * r)
        residual = laid_out(random_tensor(size, case.dtype, 7), "channel_slice" if case.layout == "nchw" else "nchw")
    tensors = [case.input(), case.parameter(cout, c, 3, 3), case.parameter(cout, key=1) if has_bias else None, residual]
    common = {"scale": scale, "upsample": upsample, "pixel_shuffle": r}
    fused = {**common, "activation": activation, **({"negative_slope": slope} if activation == "leaky_relu" else {})}
    return tensors, fused, {**common, "negative_slope": slope}


def fused_call(x, weight, bias, residual, *, backend, options):
    return ops.conv3x3(x, weight, bias, residual=residual, backend=backend, **options)


CASES = [
    (case, epilogue, cout)
    for case, epilogue, cout in zip(
        adversarial_cases(channels=(1, 3, 64, 33)), itertools.cycle(EPILOGUES), itertools.cycle((32, 3, 64, 1, 20, 5, 6, 2)), strict=False
    )
]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("case", "epilogue", "cout"), CASES, ids=[f"{c}-{e[0]}-{o}" for c, e, o in CASES])
def test_output_and_gradients_are_as_good_as_eager(case, epilogue, cout, runner):
    tensors, options, reference_options = arguments(case, epilogue, cout)
    with runner.active() as backend:
        assert_twice_eager(
            fused=partial(fused_call, backend=backend, options=options),
            eager=partial(reference.conv3x3, **reference_options),
            args=tensors,
            grad=case.gradient_like,
            names=NAMES,
            case=("conv3x3", case, epilogue, cout),
        )


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("cin", "cout"), [(64, 32), (96, 32), (192, 64), (12, 48)])
def test_a_channel_prefix_goes_in_and_a_channel_slice_comes_out(cin, cout, dtype, runner):
    """The dense block's use: the op reads ws[:, :cin] and writes ws[:, cin:cin+cout], and nothing beside it."""
    case = Case((2, cin, 6, 17), dtype, "nchw", "plain")
    workspace = random_tensor((2, cin + cout + 8, 6, 17), dtype, 3).contiguous(memory_format=torch.channels_last)
    before = workspace.clone()
    weight, bias = case.parameter(cout, cin, 3, 3), case.parameter(cout, key=1)
    x, out = workspace[:, :cin], workspace[:, cin : cin + cout]
    with runner.active() as backend, torch.no_grad():
        returned = ops.conv3x3(x, weight, bias, activation="leaky_relu", out=out, backend=backend)
        fresh = ops.conv3x3(before[:, :cin], weight, bias, activation="leaky_relu", backend=backend)
    assert returned is out
    assert torch.equal(out, fresh)
    assert torch.equal(workspace[:, :cin], before[:, :cin])
    assert torch.equal(workspace[:, cin + cout :], before[:, cin + cout :])


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_residual_may_be_the_output(runner):
    case = Case((1, 8, 9, 10), torch.float32, "channels_last", "plain")
    x, weight = case.input(), case.parameter(8, 8, 3, 3)
    residual = random_tensor((1, 8, 9, 10), torch.float32, 5).contiguous(memory_format=torch.channels_last)
    with runner.active() as backend, torch.no_grad():
        expected = ops.conv3x3(x, weight, residual=residual, scale=0.2, backend=backend)
        ops.conv3x3(x, weight, residual=residual, scale=0.2, out=residual, backend=backend)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_nan_and_infinity_spread_as_in_eager(activation, runner):
    x = random_tensor((1, 4, 6, 20), torch.float32, 0)
    x[0, 1, 2, 3], x[0, 2, 4, 15] = torch.nan, torch.inf
    weight = random_tensor((5, 4, 3, 3), torch.float32, 1)
    slope = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2}[activation]
    expected = reference.conv3x3(x, weight, negative_slope=slope)
    with runner.active() as backend:
        y = ops.conv3x3(x, weight, activation=activation, backend=backend)
    assert torch.equal(torch.isnan(y), torch.isnan(expected))
    assert torch.equal(torch.isinf(y), torch.isinf(expected))


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_only_the_gradients_asked_for(runner):
    case = Case((1, 6, 5, 5), torch.float32, "channels_last", "plain")
    for frozen in range(3):
        tensors = [case.input(), case.parameter(7, 6, 3, 3), case.parameter(7, key=1)]
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i != frozen)
        with runner.active() as backend:
            ops.conv3x3(*tensors, activation="relu", backend=backend).sum().backward()
        assert [t.grad is None for t in tensors] == [i == frozen for i in range(3)]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_second_derivative_raises(runner):
    x = random_tensor((1, 3, 5, 5), torch.float32, 0).requires_grad_()
    with runner.active() as backend:
        y = ops.conv3x3(x, random_tensor((3, 3, 3, 3), torch.float32, 1), backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.sum().backward()


def test_the_reference_passes_gradcheck_twice():
    x, weight, bias = (random_tensor(s, torch.float64, i).requires_grad_() for i, s in enumerate([(1, 2, 3, 4), (4, 2, 3, 3), (4,)]))
    f = partial(ops.conv3x3, activation="leaky_relu", scale=0.3, upsample=2, pixel_shuffle=2, backend="reference")
    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_conv2d(dtype, runner):
    x, weight = random_tensor((1, 8, 5, 6), torch.float32, 0), random_tensor((8, 8, 3, 3), torch.float32, 1).requires_grad_()
    with runner.active() as backend, torch.autocast(DEVICE, dtype):
        y = ops.conv3x3(x, weight, residual=x, backend=backend)
        assert y.dtype == torch.nn.functional.conv2d(x, weight, padding=1).dtype == dtype
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "compiled"], ids=str)
def test_opcheck(runner):
    def sample(*shape):
        return random_tensor(shape, torch.float32, 2).contiguous(memory_format=torch.channels_last)

    weight, bias = random_tensor((8, 4, 3, 3), torch.float32, 0), random_tensor((8,), torch.float32, 1)
    x, out, shuffled = sample(2, 4, 5, 6), sample(2, 8, 5, 6), sample(2, 2, 10, 12)
    with runner.active():
        torch.library.opcheck(torch.ops.fastsr.conv3x3.default, (x, weight, bias, None, out, 0.2, 1.0, 1, 1))
        torch.library.opcheck(torch.ops.fastsr.conv3x3.default, (x, weight, None, shuffled.clone(), shuffled, 1.0, 0.5, 1, 2))


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_compile(compiler, runner):
    """One graph, forward and backward, over several sizes without a wrong value."""
    weight = random_tensor((8, 8, 3, 3), torch.float32, 0).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return ops.conv3x3(ops.conv3x3(x, weight, activation="leaky_relu"), weight, residual=x, scale=0.2).square().mean()

    with runner.active():
        compiled = torch.compile(block, fullgraph=True, backend=compiler)
        for size in (6, 9):
            x = random_tensor((2, 8, size, size + 1), torch.float32, size).requires_grad_()
            expected = torch.autograd.grad(block(x), [x, weight])
            for ours, theirs in zip(torch.autograd.grad(compiled(x), [x, weight]), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_mistakes_are_named():
    x, weight = torch.zeros(1, 4, 5, 6), torch.zeros(8, 4, 3, 3)
    with pytest.raises(ValueError, match=r"negative_slope is -0.1; expected at least 0"):
        ops.conv3x3(x, weight, activation="leaky_relu", negative_slope=-0.1)
    with pytest.raises(ValueError, match=r"activation is 'gelu'; expected 'none', 'relu' or 'leaky_relu'"):
        ops.conv3x3(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"weight has shape \(8, 3, 3, 3\); expected \(any, 4, 3, 3\)"):
        ops.conv3x3(x, torch.zeros(8, 3, 3, 3))
    with pytest.raises(ValueError, match=r"bias has shape \(7,\); expected \(8\)"):
        ops.conv3x3(x, weight, torch.zeros(7))
    with pytest.raises(ValueError, match=r"x has shape \(4, 5, 6\)"):
        ops.conv3x3(x[0], weight)
    with pytest.raises(ValueError, match=r"at least one channel and one pixel"):
        ops.conv3x3(torch.zeros(1, 4, 0, 6), weight)
    with pytest.raises(ValueError, match=r"upsample is 3; expected 1 or 2"):
        ops.conv3x3(x, weight, upsample=3)
    with pytest.raises(ValueError, match=r"pixel_shuffle is 3 and weight has 8 output channels"):
        ops.conv3x3(x, weight, pixel_shuffle=3)
    with pytest.raises(ValueError, match=r"residual has shape \(1, 8, 5, 5\)"):
        ops.conv3x3(x, weight, residual=torch.zeros(1, 8, 5, 5))
    with pytest.raises(TypeError, match=r"x has dtype torch.int32"):
        ops.conv3x3(x.int(), weight)
    with pytest.raises(TypeError, match=r"weight has dtype torch.float64 and x has torch.float32"):
        ops.conv3x3(x, weight.double())
    with pytest.raises(ValueError, match=r"out has strides"):
        ops.conv3x3(x, weight, out=torch.zeros(1, 8, 5, 6))
    with pytest.raises(ValueError, match=r"out is for inference only"):
        ops.conv3x3(x, weight.clone().requires_grad_(), out=torch.zeros(1, 8, 5, 6))
    with pytest.raises(ValueError, match=r"backend is 'cudnn'"):
        ops.conv3x3(x, weight, backend="cudnn")


def test_float64_is_the_references_own():
    x, weight = torch.zeros(1, 4, 5, 6).double(), torch.zeros(8, 4, 3, 3).double()
    assert ops.conv3x3(x, weight).dtype == torch.float64
    with pytest.raises(fastsr.BackendUnavailable, match=r"float64 is served by the reference alone"):
        ops.conv3x3(x, weight, backend="compiled")
