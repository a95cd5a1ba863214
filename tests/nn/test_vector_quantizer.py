"""The gradient-trained quantiser, and what all quantisers share, against plain formulas in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastsr import backends
from fastsr.nn import EMAVectorQuantizer, ResidualVectorQuantizer, VectorQuantizer
from tests.harness import DEVICE, random_tensor

KINDS = [VectorQuantizer, EMAVectorQuantizer]

WHY_NOT = backends.why_not("vector_quantize", "compiled", DEVICE, torch.float32)
COMPILED = pytest.mark.skipif(WHY_NOT is not None, reason=f"no graph of one piece without the compiled operator: {WHY_NOT}")


def images(n=2, c=6, h=4, w=5, dtype=torch.float32, seed=1):
    return random_tensor((n, c, h, w), dtype, seed)


def plain(x, codebook, cosine=False):
    """Quantised rows, indices and the two losses of x (N, D) by the textbook's formulas, differentiable."""
    if cosine:
        x, codebook = F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)
    indices = (x.detach()[:, None] - codebook.detach()).square().sum(-1).argmin(1)
    q = codebook[indices]
    return x + (q - x).detach(), indices, F.mse_loss(q, x.detach()), F.mse_loss(x, q.detach())


@pytest.mark.parametrize("legacy_beta", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_values_and_gradients_of_the_formulas(metric, legacy_beta):
    torch.manual_seed(0)
    module = VectorQuantizer(9, 6, metric=metric, commitment_cost=0.3, legacy_beta=legacy_beta, channel_dim=1).to(DEVICE).double()
    with torch.no_grad():
        module.codebook.normal_()
    codebook = module.codebook.detach().clone().requires_grad_()
    weight = images(dtype=torch.float64, seed=3)
    x, y = (images(dtype=torch.float64).requires_grad_() for _ in range(2))
    found = module(x)
    (found.loss + (found.quantized * weight).mean()).backward()

    rows = y.movedim(1, -1).reshape(-1, 6)
    q, indices, codebook_loss, commitment_loss = plain(rows, codebook, metric == "cosine")
    q = q.view(2, 4, 5, 6).movedim(-1, 1)
    costs = (0.3, 1.0) if legacy_beta else (1.0, 0.3)
    loss = costs[0] * codebook_loss + costs[1] * commitment_loss
    (loss + (q * weight).mean()).backward()

    assert torch.equal(found.indices.flatten(), indices)
    for ours, theirs in (
        (found.quantized, q),
        (found.loss, loss),
        (found.codebook_loss, codebook_loss),
        (found.commitment_loss, commitment_loss),
        (x.grad, y.grad),
        (module.codebook.grad, codebook.grad),
    ):
        torch.testing.assert_close(ours, theirs)
    share = indices.bincount(minlength=9) / len(indices)
    torch.testing.assert_close(found.counts, indices.bincount(minlength=9))
    torch.testing.assert_close(found.perplexity.float(), torch.special.entr(share).sum().exp(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_heads_are_quantizers_side_by_side_in_both_layouts(kind, metric):
    torch.manual_seed(0)
    module = kind(7, 3, num_heads=2, metric=metric, channel_dim=1).to(DEVICE).eval()
    last = kind(7, 3, num_heads=2, metric=metric).to(DEVICE).eval()
    last.load_state_dict(module.state_dict())
    x, mask = images(), images(c=1)[:, 0] > 0
    found, found_last = module(x, mask), last(x.movedim(1, -1), mask)
    assert found.indices.shape == (2, 2, 4, 5)
    assert torch.equal(found.quantized, found_last.quantized.movedim(-1, 1))
    assert torch.equal(found.indices, found_last.indices.movedim(-1, 1))
    losses = []
    for head in range(2):
        single = kind(7, 3, metric=metric, channel_dim=1).to(DEVICE).eval()
        with torch.no_grad():
            single.codebook.copy_(module.codebook[head])
        part = single(x[:, 3 * head : 3 * head + 3], mask)
        assert torch.equal(found.indices[:, head], part.indices)
        assert torch.equal(found.counts[head], part.counts)
        torch.testing.assert_close(found.quantized[:, 3 * head : 3 * head + 3], part.quantized)
        torch.testing.assert_close(found.perplexity[head], part.perplexity)
        losses.append(part.loss)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_encode_and_decode_are_the_parts_of_forward(kind, heads, channel_dim):
    module = kind(7, 6 // heads, num_heads=heads, channel_dim=channel_dim).to(DEVICE).eval()
    for x in (images(), images()[:, :, 0], images()[:, :, 0, 0]):
        x = x if channel_dim == 1 else x.movedim(1, -1)
        found = module(x)
        assert torch.equal(module.encode(x), found.indices)
        assert torch.equal(module.decode(found.indices), found.quantized)
        assert found.quantized.shape == x.shape


def test_masked_rows_have_no_part_in_losses_and_statistics():
    torch.manual_seed(0)
    for module in (VectorQuantizer(5, 6), EMAVectorQuantizer(5, 6, revive_below=1.0)):
        module.to(DEVICE)
        x, mask = random_tensor((8, 9, 6), torch.float32, 1), random_tensor((8, 9), torch.float32, 2) > 0
        other = copy.deepcopy(module)
        poisoned = torch.where(mask[..., None], x, 1e30)
        torch.manual_seed(1)
        found = module(poisoned, mask)
        torch.manual_seed(1)
        kept = other(x[mask])
        for name in ("loss", "codebook_loss", "commitment_loss", "counts", "perplexity"):
            torch.testing.assert_close(getattr(found, name), getattr(kept, name))
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name])


def test_rotation_turns_the_gradient():
    module = VectorQuantizer(5, 6, gradient="rotation").to(DEVICE).double()
    with torch.no_grad():
        module.codebook.normal_()
    x = random_tensor((1, 6), torch.float64, 1).requires_grad_()
    q = module(x).quantized
    # a step along x scales q along itself
    (gradient,) = torch.autograd.grad(q, x, q.detach())
    torch.testing.assert_close(gradient / gradient.norm(), x.detach() / x.detach().norm())
    torch.testing.assert_close(gradient.norm(), q.norm().square() / x.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_search_is_float32_under_autocast(kind, dtype):
    module = kind(64, 8).to(DEVICE)
    if kind is EMAVectorQuantizer:
        module.to(dtype)  # keeps its codebook
    module.eval()
    assert module.codebook.dtype == torch.float32
    x = random_tensor((100, 8), torch.float32, 1).mul_(0.01).to(dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype):
        found = module(x)
        again = module.encode(x)
    found.quantized.sum().backward()
    assert found.quantized.dtype == x.dtype
    assert found.loss.dtype == torch.float32
    assert x.grad.dtype == dtype
    truth = torch.cdist(x.detach().double(), module.codebook.detach().double()).argmin(1)
    assert torch.equal(found.indices, truth)
    assert torch.equal(again, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_keeps_an_ema_codebook_in_float32_at_least(dtype):
    module = EMAVectorQuantizer(4, 3).to(DEVICE)
    with torch.no_grad():
        module.codebook.fill_(1 / 3)
    module.to(dtype)
    expected = torch.promote_types(dtype, torch.float32)
    for name in ("codebook", "cluster_size", "cluster_sum"):
        assert getattr(module, name).dtype == expected
    assert module.codebook[0, 0] == torch.tensor(1 / 3, dtype=torch.float32)  # never rounded
    x = random_tensor((5, 3), dtype, 0)
    assert module(x).quantized.dtype == dtype


@pytest.mark.parametrize("make", [*KINDS, lambda k, d: ResidualVectorQuantizer(2, k, d)], ids=["gradient", "ema", "residual"])
def test_no_rows_at_all(make):
    module = make(5, 4).to(DEVICE)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if "codebook" in name}
    x = torch.empty(0, 7, 4, device=DEVICE, requires_grad=True)
    found = module(x)
    found.loss.backward()
    assert found.loss == 0
    assert found.quantized.shape == x.shape == x.grad.shape
    assert not found.counts.any()
    for name, tensor in before.items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorQuantizer(6, 4, num_heads=2, metric="cosine"),
        lambda: EMAVectorQuantizer(6, 4, num_heads=2, zero_debias=True, revive_below=0.5),
        lambda: ResidualVectorQuantizer(2, 6, 8, kmeans_init=True),
    ],
    ids=["gradient", "ema", "residual"],
)
def test_copies_and_files_go_on_as_the_original(make):
    torch.manual_seed(0)
    module = make().to(DEVICE)
    x = random_tensor((40, 8), torch.float32, 1)
    module(x)
    loaded = make().to(DEVICE)
    loaded.load_state_dict(module.state_dict())
    results = []
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        torch.manual_seed(5)
        found = [twin(x) for _ in range(3)][-1]
        results.append((found.loss, found.indices, *twin.state_dict().values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@COMPILED
@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorQuantizer(6, 4, channel_dim=1, backend="compiled"),
        lambda: EMAVectorQuantizer(6, 4, channel_dim=1, revive_below=0.5, zero_debias=True, backend="compiled"),
        lambda: EMAVectorQuantizer(6, 2, num_heads=2, metric="cosine", channel_dim=1, backend="compiled"),
        lambda: ResidualVectorQuantizer(2, 6, 4, channel_dim=1, backend="compiled"),
    ],
    ids=["gradient", "ema", "heads", "residual"],
)
def test_one_graph_for_every_size(make):
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = make().to(DEVICE)
    eager = copy.deepcopy(module)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=count)
    for n, h in ((2, 5), (3, 7), (4, 6)):
        x = random_tensor((n, 4, h, 3), torch.float32, n)
        torch.manual_seed(1)
        found = compiled(x)
        torch.manual_seed(1)
        expected = eager(x)
        torch.testing.assert_close(tuple(found), tuple(expected))
    assert len(graphs) == 1
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, eager.state_dict()[name])


@COMPILED
def test_inductor_trains():
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = VectorQuantizer(6, 4, backend="compiled").to(DEVICE)
    x, y = (random_tensor((50, 4), torch.float32, 1).requires_grad_() for _ in range(2))
    (module(x).loss + module(x).quantized.square().sum()).backward()
    expected, module.codebook.grad = module.codebook.grad, None
    compiled = torch.compile(module, fullgraph=True)
    (compiled(y).loss + compiled(y).quantized.square().sum()).backward()
    torch.testing.assert_close(module.codebook.grad, expected)
    torch.testing.assert_close(y.grad, x.grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VectorQuantizer(0, 4), "codebook_size is 0"),
        (lambda: VectorQuantizer(4, -1), "codebook_dim is -1"),
        (lambda: VectorQuantizer(4, 4, num_heads=0), "num_heads is 0"),
        (lambda: VectorQuantizer(4, 4, metric="dot"), "metric is 'dot'; expected 'euclidean' or 'cosine'"),
        (lambda: VectorQuantizer(4, 4, gradient="none"), "gradient is 'none'"),
        (lambda: VectorQuantizer(4, 4, channel_dim=2), "channel_dim is 2; expected -1 or 1"),
        (lambda: EMAVectorQuantizer(4, 4, decay=1.0), "decay is 1.0; expected 0 <= decay < 1"),
        (lambda: ResidualVectorQuantizer(0, 4, 4), "num_quantizers is 0"),
        (lambda: ResidualVectorQuantizer(2, 4, 4, metric="cosine"), "expected metric='euclidean'"),
        (lambda: VectorQuantizer(4, 4)(torch.zeros(2, 5)), r"x has shape \(2, 5\); expected \(..., 4\)"),
        (lambda: VectorQuantizer(4, 4, channel_dim=1)(torch.zeros(4)), r"x has shape \(4,\); expected \(N, 4, ...\)"),
        (lambda: EMAVectorQuantizer(4, 2, num_heads=2)(torch.zeros(3, 2)), r"expected \(..., 4\)"),
        (lambda: VectorQuantizer(4, 4)(torch.zeros(2, 4), torch.ones(2)), "mask is torch.float32 of shape"),
        (lambda: VectorQuantizer(4, 4)(torch.zeros(2, 4), torch.ones(3, dtype=torch.bool)), r"expected torch.bool of shape \(2,\)"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64"):
        VectorQuantizer(4, 4)(torch.zeros(2, 4, dtype=torch.int64))
