"""Under autocast the operators take float32 parameters as they are: no cast for each weight, and gradients that nothing rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsr import nn, ops
from fastsr.kernels.conv3x3 import reference as conv3x3
from fastsr.kernels.dense_block import reference as dense_block
from fastsr.kernels.rcab import reference as rcab
from tests.harness import DEVICE, Runner, assert_close_as_eager, available_backends, random_tensor

LOW = (torch.bfloat16, torch.float16)


def weight(*shape: int, key: int) -> Tensor:
    return random_tensor(shape, torch.float32, key) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


def picture(channels: int, key: int = 0) -> Tensor:
    return random_tensor((2, channels, 9, 11), torch.float32, key)


class Op:
    """A function of x and parameters: `ours` with a backend, and `eager`."""

    def __init__(self, ours: Callable[..., Tensor], eager: Callable[..., Tensor], parameters: list[Tensor], channels: int) -> None:
        self.ours, self.eager, self.parameters, self.channels = ours, eager, parameters, channels


def the_convolution() -> Op:
    """Without an activation: at a kink a rounding error decides about a whole gradient, and eager rounds otherwise."""
    options = {"pixel_shuffle": 2}
    return Op(
        lambda x, *p, backend: ops.conv3x3(x, *p, backend=backend, **options),
        lambda x, *p: conv3x3.conv3x3(x, *p, None, negative_slope=1.0, scale=1.0, upsample=1, **options),
        [weight(24, 20, 3, 3, key=1), 0.3 * weight(24, key=2)],
        20,
    )


def the_dense_block() -> Op:
    shapes, channels = [], 20
    for outputs in (12, 8, 20):
        shapes.append((outputs, channels, 3, 3))
        channels += outputs
    parameters = [weight(*s, key=k) for k, s in enumerate(shapes)] + [0.3 * weight(s[0], key=10 + k) for k, s in enumerate(shapes)]
    return Op(
        lambda x, *p, backend: ops.dense_block(x, p[:3], p[3:], backend=backend),
        lambda x, *p: dense_block.dense_block(x, p[:3], p[3:]),
        parameters,
        20,
    )


def the_rcab() -> Op:
    shapes = ((24, 20, 3, 3), (24,), (20, 24, 3, 3), (20,), (5, 20), (5,), (20, 5), (20,))
    parameters = [weight(*s, key=k) for k, s in enumerate(shapes)]
    return Op(
        lambda x, *p, backend: ops.rcab(x, *p, res_scale=0.7, backend=backend),
        lambda x, *p: rcab.rcab(x, *p, res_scale=0.7),
        parameters,
        20,
    )


OPS = {"conv3x3": the_convolution, "dense_block": the_dense_block, "rcab": the_rcab}
RUNS = [pytest.param(name, runner, id=f"{name}-{runner}") for name in OPS for runner in available_backends(name)]


def step(function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """The output and all gradients; under autocast to `dtype` if one is given."""
    x, *leaves = (t.detach().clone().requires_grad_() for t in (x, *parameters))
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        y = function(x, *leaves)
    gradients = torch.autograd.grad(y, [x, *leaves], random_tensor(y.shape, torch.float32, 7).to(y.dtype))
    return [y.detach(), *gradients]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("name", "runner"), RUNS)
def test_output_and_gradients_are_as_good_as_eager(name, runner: Runner, dtype):
    op = OPS[name]()
    x = picture(op.channels).to(dtype)  # eager's skip would widen the output for a float32 x
    truth = step(op.eager, x.double(), [p.double() for p in op.parameters], None)
    plain = step(op.eager, x, op.parameters, dtype)
    with runner.active() as backend:
        ours = step(lambda x, *p: op.ours(x, *p, backend=backend), x, op.parameters, dtype)
    assert ours[0].dtype == plain[0].dtype == dtype
    for i, (mine, eager, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert mine.dtype == (torch.float32 if i > 1 else dtype)
        # A float32 gradient made of 16-bit pictures has their error.
        assert_close_as_eager(f"result {i}", mine.to(dtype), eager.to(dtype), exact, planes=i < 2)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("name", "runner"), [r for r in RUNS if r.values[1].backend == "compiled"])
def test_the_same_bits_as_with_parameters_rounded_before(name, runner: Runner, dtype):
    """And gradients that, rounded, are those of rounded parameters; but they are finer."""
    op = OPS[name]()
    x = picture(op.channels).to(dtype).requires_grad_()
    with runner.active() as backend:

        def run(parameters: list[Tensor], autocast: bool) -> list[Tensor]:
            leaves = [p.detach().clone().requires_grad_() for p in parameters]
            with torch.autocast(DEVICE, dtype, enabled=autocast):
                y = op.ours(x, *leaves, backend=backend)
            return [y, *torch.autograd.grad(y, [x, *leaves], random_tensor(y.shape, dtype, 7))]

        ours, theirs = run(op.parameters, True), run([p.to(dtype) for p in op.parameters], False)
        with torch.no_grad(), torch.autocast(DEVICE, dtype):
            assert torch.equal(op.ours(x, *op.parameters, backend=backend), ours[0])
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.to(dtype), other)
    if name != "conv3x3":  # whose gradients are torch's own
        assert any(not torch.equal(g, g.to(dtype).float()) for g in ours[2:])


class Casts(TorchDispatchMode):
    """Counts copies of 3x3 weights into another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.pictures = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.to.dtype):
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            if source.dim() == 4 and result.dtype != source.dtype:
                if source.shape[2:] == (3, 3):
                    self.weights += 1
                else:
                    self.pictures += 1
        return result


def casts(function: Callable[[], Tensor]) -> tuple[int, int]:
    """Weights cast in the forward, and in the backward."""
    with Casts() as forward, torch.autocast(DEVICE, torch.bfloat16):
        y = function()
    with Casts() as backward:
        y.float().sum().backward()
    return forward.weights, backward.weights


@pytest.mark.parametrize(("name", "runner"), RUNS)
def test_no_weight_is_cast(name, runner: Runner):
    op = OPS[name]()
    leaves = [p.requires_grad_() for p in op.parameters]
    count = sum(p.dim() == 4 for p in leaves)
    assert casts(lambda: op.eager(picture(op.channels).requires_grad_(), *leaves)) == (count, count)  # the count sees eager's
    with runner.active() as backend:
        found = casts(lambda: op.ours(picture(op.channels).requires_grad_(), *leaves, backend=backend))
    # The backward of conv3x3 is torch's own, which wants one dtype.
    assert found == ((0, 2) if name == "conv3x3" else (0, 0))


@pytest.mark.skipif(not available_backends("dense_block"), reason="needs the native library, or Triton with a GPU")
def test_no_weight_of_a_blocks_trunk_is_cast():
    blocks = nn.RRDB(num_feat=8, num_grow_ch=4), nn.RCAB(num_feat=8, squeeze_factor=4)
    for block in blocks:
        block = block.to(DEVICE)
        assert casts(lambda block=block: block(picture(8).requires_grad_())) == (0, 0)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def test_without_autocast_dtypes_must_agree():
    op = the_dense_block()
    with pytest.raises(TypeError, match=r"weights\[0\] has dtype torch.float32 and x has torch.bfloat16"):
        op.ours(picture(20).bfloat16(), *op.parameters, backend="reference")
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(TypeError, match=r"weights\[0\] has dtype torch.float64"):
        op.ours(picture(20), *(p.double() for p in op.parameters), backend="reference")


def test_parameters_of_two_dtypes_are_cast():
    op = the_rcab()
    mixed = [p.bfloat16() if i % 2 else p for i, p in enumerate(op.parameters)]
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, eager = op.ours(picture(20).bfloat16(), *mixed, backend="auto"), op.eager(picture(20).bfloat16(), *mixed)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, eager, atol=0.1, rtol=0.1)
