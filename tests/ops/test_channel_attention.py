"""`fastsr.ops.channel_attention`, on every fused backend that can run here, against plain PyTorch's eleven kernels."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastsr
from fastsr import ops
from fastsr.kernels.channel_attention import reference
from tests.harness import (
    ALL_DTYPES,
    DEVICE,
    LAYOUTS,
    Case,
    adversarial_cases,
    assert_close_as_eager,
    assert_twice_eager,
    available_backends,
    laid_out,
    random_tensor,
)

# The instruction sets beyond AVX-512 have no kernels of their own here.
RUNNERS = [r for r in available_backends("channel_attention") if r.isa in (None, "avx512", "avx2", "portable")]
BACKENDS = ["reference", *dict.fromkeys(r.backend for r in RUNNERS)]

GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "none": lambda v: v}


def arguments(dtype: torch.dtype, size: tuple[int, ...] = (2, 8, 6, 7), squeezed: int | None = 3) -> tuple[Tensor | None, ...]:
    """x, down_weight, down_bias, up_weight, up_bias and residual; without the squeeze for `squeezed=None`."""
    channels, rows = size[1], squeezed or size[1]
    down = None if squeezed is None else random_tensor((rows, channels), dtype, 1)
    down_bias = None if squeezed is None else random_tensor((rows,), dtype, 2)
    up, up_bias = random_tensor((channels, rows), dtype, 3) / rows**0.5, random_tensor((channels,), dtype, 4)
    return random_tensor(size, dtype, 0), down, down_bias, up, up_bias, random_tensor(size, dtype, 5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("gate", GATES)
def test_the_reference_is_the_definition(gate, activation):
    x, down, down_bias, up, up_bias, residual = arguments(torch.float64)
    z = x.mean((2, 3)) @ down.T + down_bias
    z = F.relu(z) if activation == "relu" else F.silu(z)
    s = GATES[gate](z @ up.T + up_bias)
    y = ops.channel_attention(x, down, down_bias, up, up_bias, residual, res_scale=0.3, gate=gate, activation=activation)
    torch.testing.assert_close(y, 0.3 * s[:, :, None, None] * x + residual)


def test_without_squeeze_biases_and_residual():
    x, _, _, up, _, _ = arguments(torch.float64, squeezed=None)
    y = ops.channel_attention(x, None, None, up[:, :, None, None], None, gate="none")
    torch.testing.assert_close(y, x * (x.mean((2, 3)) @ up.T)[:, :, None, None])


@pytest.mark.parametrize("squeezed", [3, None])
def test_the_reference_passes_gradcheck_twice(squeezed):
    args = [t if t is None else t.requires_grad_() for t in arguments(torch.float64, (2, 4, 3, 2), squeezed)]
    f = partial(ops.channel_attention, res_scale=0.5, activation="silu", backend="reference")
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize(("x", "residual"), list(itertools.product((torch.float32, torch.bfloat16), repeat=2)))
def test_dtypes_under_autocast_are_those_of_eager(x, residual):
    args = arguments(torch.float32)
    a, b = args[0].to(x), args[5].to(residual)
    with torch.autocast(DEVICE, torch.bfloat16):
        squeezed = F.relu(F.conv2d(F.adaptive_avg_pool2d(a, 1), args[1][:, :, None, None], args[2]))
        eager = a * torch.sigmoid(F.conv2d(squeezed, args[3][:, :, None, None], args[4])) + b
        y = ops.channel_attention(a, *args[1:5], b)
    assert y.dtype == eager.dtype
    torch.testing.assert_close(y, eager, rtol=0.02, atol=0.05)


# (squeezed channels or None, gate, activation, with biases, res_scale, with residual)
OPTIONS = (
    (4, "sigmoid", "relu", True, 1.0, True),
    (None, "none", "relu", True, 0.5, False),
    (5, "hardsigmoid", "silu", False, -0.3, True),
    (19, "sigmoid", "silu", True, 1.0, False),
    (None, "sigmoid", "relu", False, 1.0, True),
)
CASES = list(zip(adversarial_cases(channels=(1, 3, 64, 180, 263)), itertools.cycle(OPTIONS), itertools.cycle(LAYOUTS[:5]), strict=False))


def flat(function, options, **more):
    """The op as a function of flat tensors, as the harness calls it."""
    _, gate, activation, _, res_scale, _ = options
    return partial(function, gate=gate, activation=activation, res_scale=res_scale, **more)


def drawn(case: Case, options: tuple, residual_layout: str) -> list[Tensor | None]:
    """The arguments of a case; the parameters of 1x1 convolutions where it has biases, else matrices.

    x has a mean: pooling nothing but noise would measure cancellation, in which eager may be luckier."""
    squeezed, _, _, with_biases, _, with_residual = options
    channels, rows, ones = case.size[1], squeezed or case.size[1], (1, 1) if with_biases else ()
    down = None if squeezed is None else case.parameter(rows, channels, *ones, key=0) * 3
    down_bias = 0.3 * case.parameter(rows, key=1) if squeezed is not None and with_biases else None
    up, up_bias = case.parameter(channels, rows, *ones, key=2), 0.3 * case.parameter(channels, key=3) if with_biases else None
    residual = laid_out(random_tensor(case.size, case.dtype, 9), residual_layout) if with_residual else None
    x = laid_out(random_tensor(case.size, case.dtype, case.seed) + 0.5, case.layout)
    return [x, down, down_bias, up, up_bias, residual]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("case", "options", "residual_layout"), CASES, ids=[f"{c}-{o[1]}-{o[2]}-{o[0]}" for c, o, _ in CASES])
def test_output_and_gradients_are_as_good_as_eager(case, options, residual_layout, runner):
    with runner.active() as backend:
        assert_twice_eager(
            fused=flat(ops.channel_attention, options, backend=backend),
            eager=flat(reference.channel_attention, options),
            args=drawn(case, options, residual_layout),
            grad=case.gradient_like,
            names=["x", "down_weight", "down_bias", "up_weight", "up_bias", "residual"],
            case=("channel_attention", case, options, residual_layout),
        )


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "channel_slice", "row_slice", "column_slice"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_images_of_many_strips(dtype, layout, runner):
    """More pixels than a strip has, which threads share; rows that do not lie end to end."""
    case = Case((2, 20, 67, 51), dtype, "nchw", "plain")
    args = drawn(case, OPTIONS[0], "channels_last")
    if layout.endswith("slice") and layout != "channel_slice":
        wide = F.pad(args[0], (2, 3, 1, 1)).contiguous(
            memory_format=torch.channels_last if layout == "row_slice" else torch.contiguous_format
        )
        args[0] = wide[:, :, 1:-1, 2:-3]
    else:
        args[0] = laid_out(args[0], layout)
    with runner.active() as backend:
        assert_twice_eager(
            fused=flat(ops.channel_attention, OPTIONS[0], backend=backend),
            eager=flat(reference.channel_attention, OPTIONS[0]),
            args=args,
            grad=case.gradient_like,
            case=("channel_attention", case, layout),
        )


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_lies_as_x_does(layout, runner):
    args = arguments(torch.float32)
    x = laid_out(args[0], layout)
    with runner.active() as backend:
        y = ops.channel_attention(x, *args[1:], backend=backend)
    dense = torch.empty_like(x).stride() if layout != "expanded" else (336, 1, 56, 8)
    assert y.stride() == dense


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_no_bit_depends_on_the_thread_count_and_gradients_repeat(dtype, runner):
    threads = torch.get_num_threads()
    for size, layout in (((3, 20, 40, 50), "channels_last"), ((1, 5, 211, 190), "nchw"), ((9, 64, 20, 20), "channels_last")):
        args = arguments(dtype, size)
        results = []
        with runner.active() as backend:
            for count in (1, 2, 5, 5):
                torch.set_num_threads(count)
                try:
                    leaves = [laid_out(args[0], layout).detach().requires_grad_(), *(t.detach().requires_grad_() for t in args[1:])]
                    y = ops.channel_attention(*leaves, backend=backend)
                    results.append((y.detach(), *torch.autograd.grad(y.float().sin().sum(), leaves)))
                finally:
                    torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.isa], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_large_outputs_fresh_given_and_in_place_are_the_same(dtype, runner):
    """Written around the cache, to pages that were never touched, and where they were read."""
    args = arguments(dtype, (2, 64, 260, 260))
    again = args = [t if t.dim() < 4 else t.contiguous(memory_format=torch.channels_last) for t in args]
    args = [*args[:5], args[5].clone()]
    with runner.active() as backend, torch.no_grad():
        fresh = ops.channel_attention(*args, backend=backend)
        given = ops.channel_attention(*args, backend=backend, out=torch.zeros_like(args[0]))
        in_place = ops.channel_attention(*args, backend=backend, out=args[5])
    assert torch.equal(fresh, given)
    assert torch.equal(fresh, in_place)
    assert_close_as_eager("output", fresh, *(reference.channel_attention(*(t.to(d) for t in again)) for d in (dtype, torch.float64)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_be_x_or_residual_or_anything_that_can_be_written(layout, backend):
    for alias in (0, 5, None):
        args = arguments(torch.float32)
        expected = ops.channel_attention(*args, backend=backend)
        args = [laid_out(t, layout) if t.dim() == 4 and layout != "expanded" else t for t in args]
        out = laid_out(torch.zeros_like(args[0]), layout if layout != "expanded" else "nchw") if alias is None else args[alias]
        with torch.no_grad():
            assert ops.channel_attention(*args, out=out, backend=backend) is out
        torch.testing.assert_close(out, expected)
    crop = torch.zeros(2, 8, 9, 9)[:, :, 1:7, 1:8]
    with torch.no_grad():
        torch.testing.assert_close(ops.channel_attention(*arguments(torch.float32), out=crop, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_half_pictures_do_not_overflow(backend):
    """A sum of 90,000 values of 400 and more is far beyond float16."""
    x, *rest = arguments(torch.float16, (1, 4, 300, 300), 2)
    x = (x.abs() * 100 + 400).requires_grad_()
    y = ops.channel_attention(x, *rest, backend=backend)
    assert y.isfinite().all()
    if backend != "reference":  # eager sums the gate's gradient in float16
        y.float().sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_go_where_eager_lets_them(bad, runner):
    for options in OPTIONS:
        case = Case((3, 5, 6, 7), torch.float32, "channels_last", "plain", seed=3)
        args = drawn(case, options, "nchw")
        args[0][1, 2, 3, 4] = bad
        with runner.active() as backend:
            ours = flat(ops.channel_attention, options, backend=backend)(*args)
        torch.testing.assert_close(ours, flat(reference.channel_attention, options)(*args), equal_nan=True)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_bytes_saved_for_backward(runner):
    """x, and two vectors of float32, beside the parameters; nothing for the residual alone."""
    args = arguments(torch.bfloat16, (2, 64, 16, 16))
    own = {t.untyped_storage().data_ptr() for t in args[1:5]}
    for trainable, expected in ((args, 2 * 64 * (16 * 16 * 2 + 2 * 4)), (args[5:], 0)):
        saved = {}

        def pack(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        for t in args:
            t.requires_grad_(any(t is other for other in trainable))
        with runner.active() as backend, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ops.channel_attention(*args, backend=backend)
        assert y.requires_grad
        assert sum(size for pointer, size in saved.items() if pointer not in own) == expected


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_only_the_gradients_asked_for(runner):
    args = arguments(torch.float32)
    with runner.active() as backend:
        for wanted in ({0}, {5}, {1, 4}, {3}, {0, 1, 2, 3, 4, 5}):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(args)]
            ops.channel_attention(*leaves, backend=backend).square().sum().backward()
            assert {i for i, t in enumerate(leaves) if t.grad is not None} == wanted


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_gradient_penalty_raises(runner):
    x, *rest = arguments(torch.float32)
    x.requires_grad_()
    with runner.active() as backend:
        y = ops.channel_attention(x, *rest, backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_autocast(runner):
    x, *rest = arguments(torch.float32)
    rest = [t.requires_grad_() for t in rest]
    with runner.active() as backend, torch.autocast(DEVICE, torch.bfloat16):
        y = ops.channel_attention(x.bfloat16(), *rest[:4], rest[4].bfloat16(), backend=backend)
        assert ops.channel_attention(x, *rest, backend=backend).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in rest)


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "compiled"][:1], ids=str)
@pytest.mark.parametrize("squeezed", [3, None])
def test_opcheck(squeezed, runner):
    x, down, down_bias, up, up_bias, residual = arguments(torch.float32, squeezed=squeezed)
    out, dx, vectors = torch.empty_like(x), torch.empty_like(x), [x.new_zeros(x.shape[:2]) for _ in range(2)]
    parameters = (down, down_bias, up, up_bias)
    gradients = [None if p is None else torch.empty_like(p) for p in parameters]
    forward, backward = torch.ops.fastsr.channel_attention.default, torch.ops.fastsr.channel_attention_backward.default
    with runner.active():
        torch.library.opcheck(forward, (x, *parameters, residual, out, *vectors, 0.5, 1, 0))
        torch.library.opcheck(forward, (x, *parameters, None, out, None, None, 0.5, 1, 0))
        for wanted in ((dx, *gradients), (dx, *(None,) * 4), (None, *gradients)):
            torch.library.opcheck(backward, (residual, x, *vectors, *parameters[:3], *wanted, 0.5, 2, 1))


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_compile(compiler, runner):
    _, *parameters, _ = arguments(torch.float32)
    parameters = [p.requires_grad_() for p in parameters]

    def loss(x: Tensor) -> Tensor:
        return ops.channel_attention(ops.channel_attention(x, *parameters), *parameters, x, res_scale=0.5).square().mean()

    def in_place(x: Tensor) -> Tensor:
        y = x + 1
        return ops.channel_attention(y, *parameters, x, out=y)

    with runner.active():
        compiled, compiled_in_place = (torch.compile(f, fullgraph=True, backend=compiler) for f in (loss, in_place))
        for size in (6, 9):
            x = random_tensor((2, 8, size, size + 1), torch.float32, size).requires_grad_()
            for ours, theirs in zip(
                torch.autograd.grad(compiled(x), [x, *parameters]), torch.autograd.grad(loss(x), [x, *parameters]), strict=True
            ):
                torch.testing.assert_close(ours, theirs)
            with torch.no_grad():
                torch.testing.assert_close(compiled_in_place(x), in_place(x))


def test_mistakes_are_named():
    args = x, down, down_bias, up, up_bias, residual = arguments(torch.float32)
    call = partial(ops.channel_attention, *args)
    with pytest.raises(ValueError, match=r"gate is 'tanh'; expected one of 'sigmoid', 'hardsigmoid', 'none'"):
        call(gate="tanh")
    with pytest.raises(ValueError, match=r"activation is 'gelu'; expected one of 'relu', 'silu'"):
        call(activation="gelu")
    with pytest.raises(ValueError, match=r"x has shape \(2, 8, 0, 7\); expected at least one channel and one pixel"):
        ops.channel_attention(x[:, :, :0], *args[1:5])
    with pytest.raises(ValueError, match=r"down_weight has shape \(8, 3\); expected \(any, 8\) = \(R, C\)"):
        ops.channel_attention(x, up, down_bias, up, up_bias)
    with pytest.raises(ValueError, match=r"down_weight has shape \(3, 8, 3, 3\); expected \(any, 8, 1, 1\)"):
        ops.channel_attention(x, torch.zeros(3, 8, 3, 3), down_bias, up, up_bias)
    with pytest.raises(ValueError, match=r"up_weight has shape \(8, 3\); expected \(8, 8\) = \(C, C\)"):
        ops.channel_attention(x, None, None, up, up_bias)
    with pytest.raises(ValueError, match=r"down_bias has shape \(3,\), but there is no down_weight"):
        ops.channel_attention(x, None, down_bias, up, up_bias)
    with pytest.raises(ValueError, match=r"up_bias has shape \(3,\); expected \(8\)"):
        ops.channel_attention(x, down, down_bias, up, down_bias)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 8, 6, 6\); expected \(2, 8, 6, 7\)"):
        ops.channel_attention(*args[:5], residual[..., :6])
    with pytest.raises(ValueError, match=r"out has shape \(1, 8, 6, 7\)"):
        call(out=torch.zeros(1, 8, 6, 7))
    with pytest.raises(ValueError, match=r"out has strides \(0, 42, 7, 1\); an expanded tensor"):
        call(out=torch.zeros(1, 8, 6, 7).expand(2, 8, 6, 7))
    with pytest.raises(ValueError, match=r"out is for inference only"):
        ops.channel_attention(x.clone().requires_grad_(), *args[1:], out=torch.zeros_like(x))
    with pytest.raises(TypeError, match=r"up_weight has dtype torch.float64 and x has torch.float32"):
        ops.channel_attention(x, down, down_bias, up.double(), up_bias)
    with pytest.raises(fastsr.BackendUnavailable, match="float64"):
        ops.channel_attention(*(t.double() for t in args), backend="compiled")
