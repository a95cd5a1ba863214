"""`fastsr.ops.dense_block`, on every fused backend that can run here, against plain PyTorch with its concatenations."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

import fastsr
from fastsr import ops
from fastsr.kernels.dense_block import reference
from tests.harness import ALL_DTYPES, DEVICE, Case, adversarial_cases, assert_twice_eager, available_backends, laid_out, random_tensor

RUNNERS = available_backends("dense_block")

# (features, growths, negative_slope, res_scale, residual_scale or None for no residual, with biases, save)
BLOCKS = (
    (64, (32, 32, 32, 32), 0.2, 0.2, None, True, "all"),
    (16, (8, 8), 0.2, 0.2, 0.2, True, "input"),
    (3, (5, 1, 7), 0.1, 1.0, 0.5, False, "all"),
    (33, (16,), 0.0, -0.3, None, True, "input"),
    (4, (), 0.2, 0.5, 2.0, True, "all"),
    (32, (32, 16, 8, 4), 1.0, 0.2, 0.2, True, "all"),
)


def parameters(case: Case, features: int, growths: tuple[int, ...], with_biases: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    weights, biases, channels = [], [], features
    for k, outputs in enumerate((*growths, features)):
        weights.append(case.parameter(outputs, channels, 3, 3, key=2 * k))
        biases.append(0.3 * case.parameter(outputs, key=2 * k + 1) if with_biases else None)
        channels += outputs
    return weights, biases


def flat(function, count, options):
    """The op as a function of flat tensors, as the harness calls it."""

    def call(x, residual, *rest):
        return function(x, rest[:count], rest[count:], residual=residual, **options)

    return call


CASES = [
    (Case((case.size[0], block[0], *case.size[2:]), case.dtype, case.layout, case.gradient, case.seed), block)
    for case, block in zip(adversarial_cases(channels=(1, 2)), itertools.cycle(BLOCKS), strict=False)
]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("case", "block"), CASES, ids=[f"{c}-{len(b[1]) + 1}convs-{b[6]}" for c, b in CASES])
def test_output_and_gradients_are_as_good_as_eager(case, block, runner):
    features, growths, slope, res_scale, residual_scale, with_biases, save = block
    weights, biases = parameters(case, features, growths, with_biases)
    residual = None if residual_scale is None else laid_out(random_tensor(case.size, case.dtype, 9), "nchw")
    options = {"negative_slope": slope, "res_scale": res_scale, "residual_scale": 1.0 if residual_scale is None else residual_scale}
    names = ["x", "residual", *(f"weight {k}" for k in range(len(weights))), *(f"bias {k}" for k in range(len(weights)))]
    with runner.active() as backend:
        assert_twice_eager(
            fused=flat(ops.dense_block, len(weights), {**options, "save": save, "backend": backend}),
            eager=flat(reference.dense_block, len(weights), options),
            args=[case.input(), residual, *weights, *biases],
            grad=case.gradient_like,
            names=names,
            case=("dense_block", case, block),
        )


def esrgan_block(dtype: torch.dtype, size: tuple[int, int, int] = (1, 12, 20)) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    case = Case((size[0], 64, *size[1:]), dtype, "channels_last", "plain")
    weights, biases = parameters(case, 64, (32, 32, 32, 32), True)
    return case.input(), weights, biases


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_blocks_chain_through_each_others_workspaces(dtype, runner):
    """`out` is the next workspace's prefix and x the first one's: the same bits as with fresh tensors."""
    x, weights, biases = esrgan_block(dtype)
    with runner.active() as backend, torch.no_grad():
        block = partial(ops.dense_block, weights=weights, biases=biases, backend=backend)
        expected = block(block(x), residual=x, residual_scale=0.2)
        first, second = (random_tensor((1, 192, 12, 20), dtype, i).contiguous(memory_format=torch.channels_last) for i in range(2))
        first[:, :64] = x
        inner = block(first[:, :64], workspace=first, out=second[:, :64])
        assert inner.data_ptr() == second.data_ptr()
        y = block(inner, workspace=second, residual=x, residual_scale=0.2)
    assert torch.equal(y, expected)
    assert torch.equal(first[:, :64], x)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_weights_are_read_in_every_call(runner):
    """An update through `.data`, as EMA trainers make it, escapes version counters; the next output must change."""
    x, weights, biases = esrgan_block(torch.float32)
    with runner.active() as backend, torch.no_grad():
        before = ops.dense_block(x, weights, biases, backend=backend)
        weights[1].data.mul_(1.5)
        after = ops.dense_block(x, weights, biases, backend=backend)
    assert not torch.equal(before, after)
    error = (after - reference.dense_block(x, weights, biases)).abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("save", ["all", "input"])
def test_only_the_gradients_asked_for(save, runner):
    x, weights, biases = esrgan_block(torch.float32)
    with runner.active() as backend:
        for trainable_x, trainable in ((False, True), (True, False), (False, False)):
            x = x.detach().requires_grad_(trainable_x)
            parameters = [t.detach().requires_grad_(trainable or i == 2) for i, t in enumerate((*weights, *biases))]
            y = ops.dense_block(x, parameters[:5], parameters[5:], save=save, backend=backend)
            y.square().sum().backward()
            assert (x.grad is not None) == trainable_x
            assert [p.grad is not None for p in parameters] == [trainable or i == 2 for i in range(10)]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_recomputing_changes_no_bit_and_gradients_repeat(runner):
    x, weights, biases = esrgan_block(torch.float32, (2, 9, 13))
    results = []
    with runner.active() as backend:
        for save in ("all", "input", "all"):
            leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
            y = ops.dense_block(leaves[0], leaves[1:6], leaves[6:], save=save, backend=backend)
            results.append(torch.autograd.grad(y.sin().sum(), leaves))
    for ours, theirs in itertools.chain(zip(results[0], results[1], strict=True), zip(results[0], results[2], strict=True)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.isa], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_no_bit_depends_on_the_thread_count(dtype, runner):
    """Threads have strips of their own and compute the rows between them twice."""
    x, weights, biases = esrgan_block(dtype, (3, 11, 18))
    results, threads = [], torch.get_num_threads()
    with runner.active() as backend:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            try:
                leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
                y = ops.dense_block(leaves[0], leaves[1:6], leaves[6:], backend=backend)
                results.append((y.detach(), *torch.autograd.grad(y.float().sin().sum(), leaves)))
            finally:
                torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.isa], ids=str)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, (2, 7, 131)), (torch.bfloat16, (1, 6, 257))], ids=str)
def test_no_bit_depends_on_the_segments_or_on_the_workspace(dtype, size, runner):
    """A wide picture is walked in segments of columns, without a workspace in rows that are kept: the same bits as of a part of it."""
    x, weights, biases = esrgan_block(dtype, size)
    n, _, h, w = x.shape
    workspace = torch.full((n, weights[-1].shape[1], h, w), torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
    part = slice(w // 2 - 20, w // 2 + 20)
    results, threads = [], torch.get_num_threads()
    with runner.active() as backend, torch.no_grad():
        for count in (1, 3):
            torch.set_num_threads(count)
            try:
                results.append(ops.dense_block(x, weights, biases, residual=x, residual_scale=0.3, backend=backend))
                results.append(ops.dense_block(x, weights, biases, residual=x, residual_scale=0.3, workspace=workspace, backend=backend))
            finally:
                torch.set_num_threads(threads)
        alone = ops.dense_block(x[..., part], weights, biases, residual=x[..., part], residual_scale=0.3, backend=backend)
    assert all(torch.equal(results[0], other) for other in results[1:])
    reach = len(weights)  # columns from a border that see the zeros beyond it
    assert torch.equal(results[0][..., part][..., reach:-reach], alone[..., reach:-reach])


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("save", "channels"), [("all", 192), ("input", 64)])
def test_bytes_saved_for_backward(save, channels, runner):
    """One workspace, or x alone, beside the parameters."""
    x, weights, biases = esrgan_block(torch.float32, (1, 16, 16))
    leaves = [t.requires_grad_() for t in (*weights, *biases)]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with runner.active() as backend, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.dense_block(x * 1.0, leaves[:5], leaves[5:], save=save, backend=backend)
    assert y.requires_grad
    assert sum(size for pointer, size in saved.items() if pointer not in own) == channels * 16 * 16 * 4


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_gradient_penalty_raises(runner):
    x, weights, biases = esrgan_block(torch.float32, (1, 5, 5))
    x.requires_grad_()
    with runner.active() as backend:
        y = ops.dense_block(x, weights, biases, backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()


def test_the_reference_passes_gradcheck_twice():
    case = Case((1, 2, 3, 4), torch.float64, "nchw", "plain")
    weights, biases = parameters(case, 2, (2, 1), True)
    leaves = [t.double().requires_grad_() for t in (case.input(), random_tensor((1, 2, 3, 4), torch.float64, 3), *weights, *biases)]
    f = flat(ops.dense_block, 3, {"residual_scale": 0.5, "backend": "reference"})
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_autocast(runner):
    x, weights, biases = esrgan_block(torch.float32, (1, 6, 7))
    weights = [w.requires_grad_() for w in weights]
    with runner.active() as backend, torch.autocast(DEVICE, torch.bfloat16):
        y = ops.dense_block(x, weights, biases, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in weights)


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "compiled"][:1], ids=str)
def test_opcheck(runner):
    x, weights, biases = esrgan_block(torch.float32, (1, 5, 6))
    workspace, out, scratch, dx = (torch.empty_like(torch.cat([x] * k, 1)) for k in (3, 1, 3, 1))
    gradients = [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases]
    with runner.active():
        torch.library.opcheck(torch.ops.fastsr.dense_block.default, (x, weights, biases, None, workspace, out, 0.2, 0.2, 1.0))
        torch.library.opcheck(torch.ops.fastsr.dense_block_features.default, (x, weights[:-1], biases[:-1], workspace, 0.2))
        for inputs in ((dx, *gradients), (None, *gradients), (dx, [], [])):
            arguments = (x, workspace, weights, scratch, *inputs, 0.2, 0.2, 1.0)
            torch.library.opcheck(torch.ops.fastsr.dense_block_backward.default, arguments)


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_compile(compiler, runner):
    _, weights, biases = esrgan_block(torch.float32)
    weights = [w.requires_grad_() for w in weights]

    def loss(x: Tensor) -> Tensor:
        return ops.dense_block(ops.dense_block(x, weights, biases), weights, biases, residual=x, residual_scale=0.2).square().mean()

    with runner.active():
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)
        for size in (6, 9):
            x = random_tensor((2, 64, size, size + 1), torch.float32, size).requires_grad_()
            for ours, theirs in zip(
                torch.autograd.grad(compiled(x), [x, *weights]), torch.autograd.grad(loss(x), [x, *weights]), strict=True
            ):
                torch.testing.assert_close(ours, theirs)


def test_mistakes_are_named():
    x, weights, biases = esrgan_block(torch.float32, (1, 5, 6))
    call = partial(ops.dense_block, x, weights, biases)
    with pytest.raises(ValueError, match=r"negative_slope is -0.2; expected at least 0"):
        call(negative_slope=-0.2)
    with pytest.raises(ValueError, match=r"save is 'none'; expected 'all' or 'input'"):
        call(save="none")
    with pytest.raises(ValueError, match=r"5 weights and 4 biases"):
        ops.dense_block(x, weights, biases[:4])
    with pytest.raises(ValueError, match=r"weights\[2\] has shape \(32, 96, 3, 3\); expected \(any, 128, 3, 3\)"):
        ops.dense_block(x, [weights[0], weights[1], weights[1], *weights[3:]], biases)
    with pytest.raises(ValueError, match=r"residual has shape \(1, 64, 5, 5\)"):
        call(residual=torch.zeros(1, 64, 5, 5))
    with pytest.raises(ValueError, match=r"workspace has shape \(1, 128, 5, 6\); expected \(1, 192, 5, 6\)"):
        call(workspace=torch.zeros(1, 128, 5, 6))
    with pytest.raises(ValueError, match=r"out has strides"):
        call(out=torch.zeros(1, 64, 5, 6))
    with pytest.raises(ValueError, match=r"workspace is for inference only"):
        ops.dense_block(x.clone().requires_grad_(), weights, biases, workspace=torch.zeros(1, 192, 5, 6))
    with pytest.raises(TypeError, match=r"weights\[0\] has dtype torch.float64"):
        ops.dense_block(x, [weights[0].double(), *weights[1:]], biases)
    with pytest.raises(fastsr.BackendUnavailable, match="float64"):
        ops.dense_block(x.double(), [w.double() for w in weights], [b.double() for b in biases], backend="compiled")
