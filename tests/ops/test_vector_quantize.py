"""`fastsr.ops.vector_quantize`, on every fused backend that can run here, against plain PyTorch."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastsr
from fastsr import ops
from fastsr.kernels.vector_quantize import compiled, reference
from tests.harness import ALL_DTYPES, DEVICE, Case, Runner, adversarial_cases, assert_close_as_eager, available_backends, random_tensor

RUNNERS = available_backends("vector_quantize")
RUNNERS = [r for r in RUNNERS if r.isa in (None, *{"avx512", "avx2", "portable"})]  # the others run the same kernels
CODES = 11

#: (metric, gradient, with a mask, heads)
OPTIONS = tuple(itertools.product(("euclidean", "cosine"), ("straight_through", "rotation"), (False, True)))
CASES = list(zip(adversarial_cases(channels=(1, 8, 19), dtypes=ALL_DTYPES), itertools.cycle(OPTIONS), strict=False))


def results(x: Tensor, codebook: Tensor, grad: Tensor, dtype: torch.dtype, **options) -> list[Tensor]:
    """All outputs, and the gradients of x and codebook through all three of them that have one."""
    x, codebook = x.detach().to(dtype).requires_grad_(), codebook.detach().to(dtype).requires_grad_()
    out = ops.vector_quantize(x, codebook, return_distance=True, mean_distance=True, **options)
    (0.75 * out.codebook_loss + 0.25 * out.commitment_loss).backward(retain_graph=True)
    out.quantized.backward(grad.to(dtype))
    return [*out, out.scores, out.perplexity, x.grad, codebook.grad]


NAMES = ("quantized", "indices", "codebook_loss", "commitment_loss", "counts", "sums", "distances", "mean_distance")
NAMES = (*NAMES, "scores", "perplexity", "gradient of x", "gradient of the codebook")


def steps(t: Tensor) -> list[int]:
    """Strides of the sizes that have more than one element."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def assert_as_good_as_eager(runner: Runner, x: Tensor, codebook: Tensor, grad: Tensor, **options) -> None:
    with runner.active() as backend:
        ours = results(x, codebook, grad, x.dtype, backend=backend, **options)
    plain = results(x, codebook, grad, x.dtype, backend="reference", **options)
    truth = results(x, codebook, grad, torch.float64, backend="reference", **options)
    for name, o, p, t in zip(NAMES, ours, plain, truth, strict=True):
        assert o.dtype == p.dtype, name
        assert steps(o) == steps(p) or name == "gradient of x", name
        if o.dtype == torch.int64:
            assert torch.equal(o, t), name
        else:
            assert_close_as_eager(name, o, p, t, planes=t.dim() == 4 and t.shape == x.shape)


def assert_case(runner: Runner, case: Case, options: tuple[str, str, bool]) -> None:
    metric, gradient, masked = options
    x, codebook = case.input(), random_tensor((CODES, case.size[1]), case.dtype, 77)
    mask = random_tensor((case.size[2], case.size[3]), torch.float32, 5) > -0.5 if masked else None
    assert_as_good_as_eager(runner, x, codebook, case.gradient_like(x), metric=metric, gradient=gradient, mask=mask, channel_dim=1)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("case", "options"), CASES, ids=[f"{c}-{'-'.join(map(str, o))}" for c, o in CASES])
def test_outputs_and_gradients_are_as_good_as_eager(case, options, runner):
    assert_case(runner, case, options)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2, 7), (2, 7), (4, 1, 2, 7)], ids=str)
def test_heads_have_codebooks_of_their_own(shape, runner):
    x, codebook = random_tensor(shape, torch.float32, 1), random_tensor((2, CODES, 7), torch.float32, 2)
    assert_as_good_as_eager(runner, x, codebook, torch.ones_like(x))
    with runner.active() as backend:
        together = ops.vector_quantize(x, codebook, backend=backend)
        for head in range(2):
            alone = ops.vector_quantize(x[..., head, :], codebook[head], backend=backend)
            assert torch.equal(together.indices[..., head], alone.indices)
            assert torch.equal(together.sums[head], alone.sums)
            assert torch.equal(together.quantized[..., head, :], alone.quantized)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_sizes_beyond_one_task(runner):
    """Many chunks, codes without rows, and one code with most of them."""
    x, codebook = random_tensor((3, 600, 5), torch.float32, 1), random_tensor((300, 5), torch.float32, 2)
    codebook[:250] += 50
    codebook[-1] = 0
    assert_as_good_as_eager(runner, x, codebook, random_tensor(x.shape, x.dtype, 3), gradient="rotation")


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_channels_first_and_last_give_the_same_bits(runner):
    x, codebook = random_tensor((2, 6, 17, 19), torch.float32, 1), random_tensor((CODES, 6), torch.float32, 2)
    with runner.active() as backend:
        first = ops.vector_quantize(x, codebook, channel_dim=1, backend=backend)
        last = ops.vector_quantize(x.permute(0, 2, 3, 1).contiguous(), codebook, backend=backend)
    assert first.quantized.is_contiguous()
    assert torch.equal(first.quantized.permute(0, 2, 3, 1), last.quantized)
    assert torch.equal(first.indices, last.indices)
    assert torch.equal(first.sums, last.sums)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_the_codebook_may_change_before_backward(runner):
    """As an EMA step changes it: the gradients are those of the codebook that forward saw, and nothing notices."""
    x, codebook = random_tensor((50, 6), torch.float32, 1), random_tensor((CODES, 6), torch.float32, 2)
    gradients = []
    with runner.active() as backend:
        for change in (False, True):
            leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()
            out = ops.vector_quantize(*leaves, gradient="rotation", backend=backend)
            if change:
                with torch.no_grad():
                    leaves[1].mul_(-3)
            (out.quantized.sin().sum() + out.codebook_loss + out.commitment_loss).backward()
            gradients.append([leaf.grad for leaf in leaves])
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_saved_for_backward(runner):
    """x and the quantised vectors, indices and mask, and nothing of the codebook's size."""
    x, codebook = random_tensor((500, 8), torch.float32, 1) * 1.0, random_tensor((CODES, 8), torch.float32, 2).requires_grad_()
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with runner.active() as backend, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.vector_quantize(x.requires_grad_(), codebook, mask=torch.ones(500, dtype=torch.bool), backend=backend)
    assert sorted(saved.values()) == [500, 500 * 8, 500 * 8 * 4, 500 * 8 * 4]


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_no_bit_depends_on_the_thread_count(runner):
    x, codebook = random_tensor((2000, 9), torch.float32, 1), random_tensor((40, 9), torch.float32, 2)
    found, threads = [], torch.get_num_threads()
    with runner.active() as backend:
        for count, channel_dim in itertools.product((1, 2, 5), (-1, 1)):
            torch.set_num_threads(count)
            try:
                data = x if channel_dim == -1 else x.view(2, 1000, 9).transpose(1, 2).contiguous()
                found.append((channel_dim, results(data, codebook, data, x.dtype, channel_dim=channel_dim, backend=backend)))
            finally:
                torch.set_num_threads(threads)
    for layout in (-1, 1):
        first, *others = [r for channel_dim, r in found if channel_dim == layout]
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_only_the_gradients_asked_for(runner):
    with runner.active() as backend:
        for needs_x, needs_codebook in ((True, False), (False, True)):
            x = random_tensor((30, 4), torch.float32, 1).requires_grad_(needs_x)
            codebook = random_tensor((CODES, 4), torch.float32, 2).requires_grad_(needs_codebook)
            out = ops.vector_quantize(x, codebook, backend=backend)
            (out.quantized.sum() + out.codebook_loss + out.commitment_loss).backward()
            assert (x.grad is not None, codebook.grad is not None) == (needs_x, needs_codebook)
        x = random_tensor((30, 4), torch.float32, 1).requires_grad_()
        ops.vector_quantize(x, random_tensor((CODES, 4), torch.float32, 2), backend=backend).commitment_loss.backward()
        assert x.grad is not None


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_empty_and_masked_out(runner):
    codebook = random_tensor((CODES, 4), torch.float32, 2).requires_grad_()
    with runner.active() as backend:
        for x, mask in (
            (torch.empty(0, 4), None),
            (torch.empty(2, 0, 4), None),
            (random_tensor((9, 4), torch.float32, 1), torch.zeros(9, dtype=torch.bool)),
        ):
            x = x.to(DEVICE).requires_grad_()
            out = ops.vector_quantize(x, codebook, mask=mask, backend=backend)
            (out.codebook_loss + out.commitment_loss + out.quantized.sum()).backward()
            assert out.codebook_loss == 0
            assert out.counts.sum() == 0
            assert out.perplexity == 1
            assert torch.equal(x.grad, torch.ones_like(x))
            assert not codebook.grad.any()


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
def test_rows_that_are_not_finite_stay_with_themselves(runner):
    """A NaN row takes code 0 and poisons the losses unless it is masked out."""
    x, codebook = random_tensor((20, 4), torch.float32, 1), random_tensor((CODES, 4), torch.float32, 2)
    x[3] = torch.nan
    mask = torch.arange(20) != 3
    with runner.active() as backend:
        assert ops.vector_quantize(x, codebook, backend=backend).codebook_loss.isnan()
        out = ops.vector_quantize(x, codebook, mask=mask, backend=backend)
    assert out.indices[3] == 0
    assert out.codebook_loss.isfinite()
    assert out.sums.isfinite().all()


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_gradient_penalty_raises(runner):
    x = random_tensor((9, 4), torch.float32, 1).requires_grad_()
    with runner.active() as backend:
        loss = ops.vector_quantize(x, random_tensor((CODES, 4), torch.float32, 2), backend=backend).commitment_loss
        (g,) = torch.autograd.grad(loss.square(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()


def test_sums_by_atomics_must_be_asked_for_and_deterministic_mode_forbids_them(monkeypatch):
    on_a_gpu, on_a_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    monkeypatch.delenv("FASTSR_FAST_SUMS", raising=False)
    assert not compiled.fast_sums(on_a_gpu)
    monkeypatch.setenv("FASTSR_FAST_SUMS", "1")
    assert compiled.fast_sums(on_a_gpu)
    assert not compiled.fast_sums(on_a_cpu)
    torch.use_deterministic_algorithms(True)
    try:
        assert not compiled.fast_sums(on_a_gpu)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_the_reference_gradients(gradient):
    """The losses against finite differences; the straight-through paths against their formulas."""
    x = random_tensor((6, 3), torch.float64, 1).requires_grad_()
    codebook = random_tensor((4, 3), torch.float64, 2).requires_grad_()
    call = partial(ops.vector_quantize, gradient=gradient, backend="reference")
    assert torch.autograd.gradcheck(lambda x: call(x, codebook).commitment_loss, x)
    assert torch.autograd.gradcheck(lambda e: call(x, e).codebook_loss, codebook)
    out, g = call(x, codebook), random_tensor((6, 3), torch.float64, 3)
    (dx,) = torch.autograd.grad(out.quantized, x, g)
    if gradient == "straight_through":
        assert torch.equal(dx, g)
        return
    for row in range(6):  # the rotation written as a matrix
        u, v = (t[row].detach() / t[row].detach().norm() for t in (x, out.quantized))
        r = (u + v) / (u + v).norm()
        rotation = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(v, u)
        torch.testing.assert_close(rotation @ u, v)
        scale = out.quantized[row].detach().norm() / x[row].detach().norm()
        torch.testing.assert_close(dx[row], scale * rotation.T @ g[row])


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_float32(dtype, runner):
    x, codebook = random_tensor((40, 6), dtype, 1).requires_grad_(), random_tensor((CODES, 6), torch.float32, 2).requires_grad_()
    with runner.active() as backend:
        with torch.autocast(DEVICE, torch.bfloat16):
            out = ops.vector_quantize(x, codebook, backend=backend)
            assert torch.equal(ops.vq_nearest(x, codebook, backend=backend), out.indices)
        plain = ops.vector_quantize(x.float(), codebook, backend=backend)
    assert out.quantized.dtype == torch.float32
    assert torch.equal(out.quantized, plain.quantized)
    (out.quantized.sum() + out.codebook_loss).backward()
    assert x.grad.dtype == dtype
    assert codebook.grad.dtype == torch.float32


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "compiled"][:1], ids=str)
def test_opcheck(runner):
    x, codebook = random_tensor((3, 2, 5, 4), torch.float32, 1), random_tensor((2, CODES, 5), torch.float32, 2)
    mask = random_tensor((3, 2, 4), torch.float32, 3) > 0
    quantized, indices, loss = torch.empty_like(x), torch.zeros(3, 2, 4, dtype=torch.int64), torch.zeros(())
    counts, sums = torch.zeros(2, CODES, dtype=torch.int64), torch.zeros(2, CODES, 5)
    calls = torch.ops.fastsr
    with runner.active():
        for distances, kept in ((None, None), (torch.zeros(3, 2, 4), mask)):
            arguments = (x, codebook, kept, False, False, quantized, indices, loss, counts, sums, distances)
            torch.library.opcheck(calls.vector_quantize.default, arguments)
        for grad, loss_grad, rotation in ((x, None, True), (None, loss, False), (x, loss, True)):
            torch.library.opcheck(calls.vector_quantize_dx.default, (grad, loss_grad, x, quantized, mask, rotation, torch.empty_like(x)))
        torch.library.opcheck(calls.vector_quantize_dcodebook.default, (loss, x, quantized, indices, mask, False, torch.zeros(2, CODES, 5)))


@pytest.mark.parametrize("runner", RUNNERS[:1], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_compile_without_recompilation(compiler, runner):
    codebook = random_tensor((CODES, 6), torch.float32, 2).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        out = ops.vector_quantize(x, codebook, channel_dim=1, gradient="rotation")
        return out.quantized.sin().sum() + out.codebook_loss + 0.25 * out.commitment_loss + out.perplexity

    torch._dynamo.reset()
    with runner.active(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=True)
        for n, size in ((2, 8), (3, 9), (7, 5)):
            x = random_tensor((n, 6, size, size + 1), torch.float32, size).requires_grad_()
            ours, theirs = (torch.autograd.grad(f(x), [x, codebook]) for f in (compiled, loss))
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


def test_mistakes_are_named():
    x, codebook = torch.zeros(3, 5, 4), torch.zeros(7, 4)
    call = partial(ops.vector_quantize, x, codebook)
    with pytest.raises(ValueError, match=r"gradient is 'none'; expected 'straight_through' or 'rotation'"):
        call(gradient="none")
    with pytest.raises(ValueError, match=r"mask is torch.float32 of shape \(3, 5\)"):
        call(mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"expected torch.bool on cpu that broadcasts to \(3, 5\)"):
        call(mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(AttributeError, match=r"return_distance=True"):
        call().scores  # noqa: B018
    with pytest.raises(fastsr.BackendUnavailable, match="float64"):
        ops.vector_quantize(x.double(), codebook.double(), backend="compiled")


def test_mean_distance_is_that_of_all_pairs():
    x, codebook = random_tensor((30, 2, 5), torch.float64, 1) + 100, random_tensor((2, 7, 5), torch.float64, 2) + 100
    mask = torch.arange(30)[:, None] < 20
    found = reference.mean_distance(x.reshape(30, 2, 5, 1), codebook, mask.expand(30, 2).reshape(30, 2, 1))
    pairs = (x[:20, :, None] - codebook).square().sum(-1)
    torch.testing.assert_close(found, pairs.mean())
