"""The tail in training: as good as eager, the same bits whichever way it saves, on every backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastsr.kernels.conv3x3 import reference
from fastsr.memory.tracker import Tracker
from fastsr.nn.tail import Step, tail
from tests.harness import DEVICE, LAYOUTS, Case, available_backends

TAILS = {
    "rcan-x4": ([Step(pixel_shuffle=2), Step(pixel_shuffle=2), Step(scale=0.25)], (16, 16, 3)),
    "rcan-x3": ([Step(pixel_shuffle=3), Step(scale=2.0)], (18, 3)),
    "rrdbnet": ([Step(upsample=2, negative_slope=0.2)] * 2 + [Step(negative_slope=0.2), Step()], (4, 4, 4, 3)),
    "last-active": ([Step(), Step(negative_slope=0.0)], (5, 3)),
    "single": ([Step(scale=0.5)], (3,)),
}


def parameters(steps, outputs, case: Case) -> list[torch.Tensor]:
    channels, weights = case.size[1], []
    for k, (step, o) in enumerate(zip(steps, outputs, strict=True)):
        weights.append(case.parameter(o, channels, 3, 3, key=k))
        channels = o // step.pixel_shuffle**2
    return weights + [case.parameter(o, key=10 + k) for k, o in enumerate(outputs)]


def eager(steps, z, *ps):
    for step, weight, bias in zip(steps, ps, ps[len(steps) :], strict=False):
        z = reference.conv3x3(z, weight, bias, None, negative_slope=step.negative_slope, scale=step.scale, upsample=step.upsample,
                              pixel_shuffle=step.pixel_shuffle)  # fmt: skip
    return z


def ours(steps, save, backend, z, *ps):
    return tail(z, steps, ps[: len(steps)], ps[len(steps) :], save=save, backend=backend)


def step(function, args, grad, dtype=None) -> list[torch.Tensor]:
    """The output and all gradients."""
    own = [a.detach().clone().to(dtype).requires_grad_() for a in args] if dtype else [a.detach().clone().requires_grad_() for a in args]
    y = function(*own)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(a.grad for a in own)]


def error(found, truth) -> float:
    """The mean over the output and all gradients of each one's relative error; single values hang on the sign of a v near zero."""
    return sum(((f.double() - t).norm() / t.norm()).item() for f, t in zip(found, truth, strict=True)) / len(truth)


@pytest.mark.parametrize("runner", available_backends("conv3x3")[:1], ids=str)
@pytest.mark.parametrize("name", TAILS)
def test_as_good_as_eager_and_the_same_bits_both_ways(name, runner):
    """Rows in strips (few images) and images in strips (many), whatever the layout of z; twice eager's error at most."""
    steps, outputs = TAILS[name]
    sizes = [(1, 4, 37, 3), (9, 4, 5, 4), (2, 4, 3, 7), (1, 4, 1, 1), (5, 4, 2, 2), (3, 4, 12, 5)]
    for k, (layout, size) in enumerate(zip(LAYOUTS, sizes, strict=True)):
        case = Case(size, (torch.float32, torch.bfloat16)[k % 2], layout, ("plain", "cat", "sum", "permute")[k % 4], k)
        args = [case.input(), *parameters(steps, outputs, case)]
        grad = case.gradient_like(eager(steps, *args))
        with runner.active() as backend:
            kept, again = (step(partial(ours, steps, save, backend), args, grad) for save in ("all", "input"))
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
        truth = step(partial(eager, steps), args, grad, torch.float64)
        assert error(kept, truth) <= 2 * error(step(partial(eager, steps), args, grad), truth) + 2 * torch.finfo(case.dtype).eps


@pytest.mark.parametrize("save", ["all", "input"])
def test_gradients_only_where_they_are_wanted_and_twice_where_kept(save):
    steps, outputs = TAILS["rrdbnet"]
    case = Case((2, 4, 6, 5), torch.float32, "channels_last", "plain")
    args = [case.input(), *parameters(steps, outputs, case)]
    whole = [a.clone().requires_grad_() for a in args]
    ours(steps, save, "auto", *whole).square().sum().backward()
    for k in range(len(args)):
        some = [a.clone().requires_grad_(i == k) for i, a in enumerate(args)]
        y = ours(steps, save, "auto", *some).square().sum()
        y.backward(retain_graph=True)
        assert torch.equal(some[k].grad, whole[k].grad)
        y.backward()
        assert torch.equal(some[k].grad, 2 * whole[k].grad)
        assert all(a.grad is None for i, a in enumerate(some) if i != k)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("save", ["all", "input"])
def test_float64_autocast_empty_and_compiled(save, backend):
    steps, outputs = TAILS["rcan-x4"]
    case = Case((1, 4, 6, 5), torch.float32, "nchw", "plain")
    args = [a.requires_grad_() for a in (case.input(), *parameters(steps, outputs, case))]
    wide = [a.detach().double().requires_grad_() for a in args]
    y = ours(steps, save, backend, *wide)
    assert torch.allclose(y, eager(steps, *wide))
    expected = torch.autograd.grad(y.sum(), wide)
    found = torch.autograd.grad(ours(steps, save, backend, *args).sum(), args)
    compiled = torch.compile(partial(ours, steps, save, backend), fullgraph=True)
    again = torch.autograd.grad(compiled(*args).sum(), args) if backend == "auto" else found
    for e, f, a in zip(expected, found, again, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a, f, rtol=1e-4, atol=1e-4)
    with torch.autocast(DEVICE, torch.bfloat16):
        low = ours(steps, save, backend, *args)
    assert low.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(low.sum(), args))
    empty = torch.zeros(0, 4, 6, 5, device=DEVICE, requires_grad=True)
    y = ours(steps, save, backend, empty, *args[1:])
    assert y.shape == (0, 3, 24, 20)
    for g in torch.autograd.grad(y.sum(), args[1:]):
        assert not g.any()


def test_the_high_resolution_tensors_make_room_for_their_gradients():
    """At x4 one tensor of the result's size and one of a quarter, and a strip of an eighth besides; autograd holds four."""
    steps, _ = TAILS["rcan-x4"]
    z = torch.rand(8, 16, 16, 16, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    ps = [torch.rand(o, 16, 3, 3, device=DEVICE, requires_grad=True) for o in (64, 64, 3)]
    with Tracker([z, *ps]) as tracker:
        y = tail(z, steps, ps, [None] * 3, save="input", backend="auto")
        y.backward(torch.ones_like(y))
        tracker.leave_out(p.grad for p in ps)
    unit = z.numel() * 4
    small = 16 * 3 / 16  # the result, its gradient and that times the last step's scale
    assert max(tracker.peaks().values()) <= (16 + 4 + 4 + 3 * small + 1.5) * unit
