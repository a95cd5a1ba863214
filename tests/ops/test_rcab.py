"""`fastsr.ops.rcab`, on every fused backend that can run here, against plain PyTorch that pools the second convolution's output."""

from __future__ import annotations

import functools
import itertools
import statistics
from functools import partial

import pytest
import torch
from torch import Tensor

from fastsr import ops
from fastsr.kernels.rcab import reference
from tests.harness import (
    ALL_DTYPES,
    DEVICE,
    Case,
    adversarial_cases,
    assert_close_as_eager,
    assert_twice_eager,
    available_backends,
    random_tensor,
    relative_error,
    run,
)

RUNNERS = available_backends("rcab")

NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "down_weight", "down_bias", "up_weight", "up_bias")


def parameters(case: Case, features: int, hidden: int, squeezed: int, biases: bool = True, tail: tuple = ()) -> list[Tensor | None]:
    """All of `NAMES` but x; `tail` ends the shapes of the gate's weights."""
    weights = ((hidden, features, 3, 3), (features, hidden, 3, 3), (squeezed, features, *tail), (features, squeezed, *tail))
    tensors: list[Tensor | None] = []
    for key, shape in enumerate(weights):
        tensors += [case.parameter(*shape, key=2 * key), 0.3 * case.parameter(shape[0], key=2 * key + 1) if biases else None]
    return tensors


# (features, hidden, squeezed, res_scale, with biases, end of the gate's shapes, save).
# Gates are wide here: behind RCAN's four squeezed channels, of which ReLU leaves two or three, eager's error in a draw may be a
# tenth of its usual one; see `test_a_squeeze_to_four_channels_is_as_good_as_eager`.
BLOCKS = (
    (64, 64, 16, 1.0, True, (1, 1), "all"),
    (16, 16, 12, 0.1, True, (), "input"),
    (3, 5, 7, -1.5, False, (), "all"),
    (33, 48, 11, 1.0, True, (1, 1), "input"),
    (1, 1, 1, 0.5, True, (), "all"),
    (40, 17, 24, 1.0, False, (1, 1), "all"),
)

CASES = [
    (Case((case.size[0], block[0], *case.size[2:]), case.dtype, case.layout, case.gradient, case.seed), block)
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
            case=("rcab", case, block),
        )


#: The gradients that pass through few squeezed channels.
FEW = ("down_weight", "down_bias", "up_weight")


@functools.cache
def draws(dtype: torch.dtype) -> list[tuple[Case, list[Tensor | None], list[Tensor], list[Tensor]]]:
    """Blocks with RCAN's squeeze; what they give in float64 and in plain PyTorch."""
    made = []
    for seed in range(15):
        case = Case((2, 64, 5, 7), dtype, "channels_last", "plain", seed)
        arguments = [case.input(), *parameters(case, 64, 64, 4)]
        truth, plain = (run(reference.rcab, arguments, case.gradient_like, d) for d in (torch.float64, None))
        made.append((case, arguments, truth, plain))
    return made


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_squeeze_to_four_channels_is_as_good_as_eager(dtype, runner):
    """The rule for the median of fifteen draws.

    Of 32,400 comparisons of single draws with squeezes of 4, 61 missed the rule, all in gradients of `FEW`. In 100 draws of float32 the
    median error of down_bias's gradient is 0.43 of eager's, and two draws miss the rule; eager, judged against the kernels, misses it
    in 28. The largest error of four values, two of which ReLU may have cut, is a matter of luck on either side.
    """
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in FEW}
    with runner.active() as backend:
        for case, arguments, truth, plain in draws(dtype):
            ours = run(partial(ops.rcab, backend=backend), arguments, case.gradient_like, None)
            for name, t, p, o in zip(("output", *NAMES), truth, plain, ours, strict=True):
                if name in FEW:
                    errors[name].append((relative_error(o, t), relative_error(p, t)))
                else:
                    assert_close_as_eager(name, o, p, t, planes=name in ("output", "x"))
    for name, pairs in errors.items():
        fused, eager = (statistics.median(values) for values in zip(*pairs, strict=True))
        assert fused <= 2 * eager + 2 * torch.finfo(dtype).eps, f"gradient of {name}: median {fused:.3e}; eager has {eager:.3e}"


def rcan_block(dtype: torch.dtype, size: tuple[int, int, int] = (2, 9, 11)) -> list[Tensor]:
    case = Case((size[0], 64, *size[1:]), dtype, "channels_last", "plain")
    return [case.input(), *parameters(case, 64, 64, 4)]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_buffers_in_place_and_frozen_weights_change_no_bit(dtype, runner):
    """`out` as x itself and as a channel slice, a given workspace, packed and channels-last weights."""
    x, *rest = rcan_block(dtype)
    lasting = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in rest]
    packed = ops.pack_weights([rest[0], rest[2]], [rest[1], rest[3]])
    with runner.active() as backend, torch.no_grad():
        call = partial(ops.rcab, backend=backend, res_scale=0.5)
        expected = call(x, *rest)
        wide = torch.zeros(2, 96, 9, 11, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
        assert torch.equal(call(x, *rest, out=wide[:, 16:80], workspace=torch.empty_like(x), packed=packed), expected)
        assert not wide[:, :16].any()
        assert not wide[:, 80:].any()
        torch.testing.assert_close(call(x, *lasting), expected)
        own = x.clone(memory_format=torch.preserve_format)
        assert call(own, *rest, out=own) is own
        assert torch.equal(own, expected)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_weights_are_read_in_every_call(runner):
    x, *rest = rcan_block(torch.float32)
    with runner.active() as backend, torch.no_grad():
        before = ops.rcab(x, *rest, backend=backend)
        for changed in (rest[2], rest[4]):  # the second convolution, the squeeze
            changed.data.mul_(1.5)
            after = ops.rcab(x, *rest, backend=backend)
            assert not torch.equal(before, after)
            before = after
    assert (after - reference.rcab(x, *rest)).abs().max() < 1e-4


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("save", ["all", "input"])
def test_only_the_gradients_asked_for(save, runner):
    arguments = rcan_block(torch.float32)
    with runner.active() as backend:
        for wanted in ((0,), (1,), (3, 4), (6,), (8, 0), (2, 7)):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(arguments)]
            ops.rcab(*leaves, save=save, backend=backend).square().sum().backward()
            assert [t.grad is not None for t in leaves] == [i in wanted for i in range(9)]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_repeats_and_recomputes_bit_for_bit(dtype, runner):
    arguments, results = rcan_block(dtype), []
    with runner.active() as backend:
        for save in ("all", "all", "input"):
            leaves = [t.detach().requires_grad_() for t in arguments]
            y = ops.rcab(*leaves, save=save, backend=backend)
            results.append((y.detach(), *torch.autograd.grad(y.float().sin().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.isa], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 11, 18), (1, 40, 5)], ids=str)
def test_no_bit_depends_on_the_thread_count(size, dtype, runner):
    arguments, results, threads = rcan_block(dtype, size), [], torch.get_num_threads()
    with runner.active() as backend:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            try:
                leaves = [t.detach().requires_grad_() for t in arguments]
                y = ops.rcab(*leaves, backend=backend)
                results.append((y.detach(), *torch.autograd.grad(y.float().sin().sum(), leaves)))
            finally:
                torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_an_image_does_not_depend_on_its_neighbours(runner):
    """Pictures are taken a few at a time; the gate is each one's own."""
    x, *rest = rcan_block(torch.float32, (5, 9, 11))
    with runner.active() as backend, torch.no_grad():
        together = ops.rcab(x, *rest, backend=backend)
        alone = torch.cat([ops.rcab(image, *rest, backend=backend) for image in x.split(1)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("save", "channels"), [("all", 128), ("input", 64)])
def test_bytes_saved_for_backward(save, channels, runner):
    """x and r, or x alone, and a few vectors, beside the parameters."""
    x, *rest = rcan_block(torch.float32, (1, 16, 16))
    leaves = [t.requires_grad_() for t in rest]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with runner.active() as backend, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.rcab(x * 1.0, *leaves, save=save, backend=backend)
    assert y.requires_grad
    vectors = 9 * 64 + 2 * 64
    assert sum(size for pointer, size in saved.items() if pointer not in own) == (channels * 16 * 16 + vectors) * 4


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_gradient_penalty_raises(runner):
    x, *rest = rcan_block(torch.float32, (1, 5, 5))
    x.requires_grad_()
    with runner.active() as backend:
        y = ops.rcab(x, *rest, backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_nan_and_infinity_come_through(runner):
    x, *rest = rcan_block(torch.float32)
    x[0, 3, 4, 5] = torch.nan
    with runner.active() as backend, torch.no_grad():
        y = ops.rcab(x, *rest, backend=backend)
    assert y[0].isnan().all()  # by the mean
    torch.testing.assert_close(y[1], reference.rcab(x, *rest)[1])


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_sums_of_large_half_precision_pictures_do_not_overflow(runner):
    """The sum of 40,000 values near 8 is beyond float16."""
    x, *rest = (t.half() for t in rcan_block(torch.float32, (1, 200, 200)))
    rest[1] = rest[1] + 8
    with runner.active() as backend, torch.no_grad():
        y = ops.rcab(x, *rest, backend=backend)
    truth = reference.rcab(*(t.double() for t in (x, *rest)))
    assert ((y.double() - truth).abs().max() / truth.abs().max()) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_autocast(runner):
    x, *rest = rcan_block(torch.float32, (1, 6, 7))
    leaves = [t.requires_grad_() for t in rest]
    with runner.active() as backend, torch.autocast(DEVICE, torch.bfloat16):
        y = ops.rcab(x, *leaves, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "compiled"][:1], ids=str)
def test_opcheck(runner):
    x, w1, b1, w2, b2, dw, db, uw, ub = rcan_block(torch.float32, (2, 5, 6))
    hidden, out, scratch, dx = (torch.empty_like(x) for _ in range(4))
    sums, attention = torch.empty(2, 64, 9, device=DEVICE), torch.empty(2, 2, 64, device=DEVICE)
    with runner.active():
        torch.library.opcheck(torch.ops.fastsr.rcab.default, (x, w1, b1, w2, b2, dw, db, uw, ub, hidden, sums, attention, out, 0.5))
        torch.library.opcheck(torch.ops.fastsr.rcab.default, (x, w1, None, w2, None, dw, None, uw, None, hidden, sums, attention, out, 0.5))
        gradients = [torch.empty_like(t) for t in (w1, b1, w2, b2, dw, db, uw, ub)]
        for wanted_dx, wanted in ((dx, gradients), (None, gradients), (dx, [])):
            arguments = (x, x, hidden, sums, attention, w1, w2, b2, dw, db, uw, scratch, wanted_dx, wanted, 0.5)
            torch.library.opcheck(torch.ops.fastsr.rcab_backward.default, arguments)


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_compile(compiler, runner):
    _, *rest = rcan_block(torch.float32)
    leaves = [t.requires_grad_() for t in rest]

    def loss(x: Tensor) -> Tensor:
        return ops.rcab(ops.rcab(x, *leaves), *leaves, res_scale=0.1).square().mean()

    with runner.active():
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)
        for size in (6, 9):
            x = random_tensor((2, 64, size, size + 1), torch.float32, size).requires_grad_()
            gradients = (torch.autograd.grad(f(x), [x, *leaves]) for f in (compiled, loss))
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_the_reference_passes_gradcheck_twice():
    case = Case((2, 2, 2, 3), torch.float64, "nchw", "plain")
    leaves = [t.requires_grad_() for t in (case.input(), *parameters(case, 2, 2, 2, tail=(1, 1)))]
    f = partial(ops.rcab, res_scale=0.7, backend="reference")
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


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
