"""Moving averages, revival and k-means of `EMAVectorQuantizer`, step by step against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsr.nn import EMAVectorQuantizer, ResidualVectorQuantizer, kmeans
from fastsr.nn.codebook import draw_rows
from tests.harness import DEVICE, random_tensor


def is_a_row_of(codes, rows):
    """(K,) bool: equal bits."""
    return (codes[:, None] == rows).all(-1).any(1)


def batches(count, rows=50, dim=4, dtype=torch.float64):
    return [random_tensor((rows, dim), dtype, seed) + seed / 4 for seed in range(count)]


@pytest.mark.parametrize("zero_debias", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("decay", [0.0, 0.8, 0.99])
def test_each_step_is_the_formula(decay, metric, zero_debias):
    k, eps = 6, 1e-3
    torch.manual_seed(0)
    module = EMAVectorQuantizer(k, 4, decay=decay, eps=eps, metric=metric, zero_debias=zero_debias, commitment_cost=0.4).to(DEVICE).double()
    codebook = module.codebook.clone()
    size = torch.zeros(k) if zero_debias else torch.ones(k)
    size = size.to(codebook)
    total = torch.zeros_like(codebook) if zero_debias else codebook.clone()
    for t, x in enumerate(batches(5), 1):
        rows = F.normalize(x, dim=-1) if metric == "cosine" else x
        indices = (rows[:, None] - codebook).square().sum(-1).argmin(1)
        one_hot = F.one_hot(indices, k).double()
        expected = codebook[indices]
        found = module(x)
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.quantized, expected)  # the codes before the step
        torch.testing.assert_close(found.loss, 0.4 * F.mse_loss(rows, expected))

        size = decay * size + (1 - decay) * one_hot.sum(0)
        total = decay * total + (1 - decay) * one_hot.T @ rows
        weight = 1 - decay**t if zero_debias else 1.0
        n = size.sum() / weight
        smoothed = (size / weight + eps) / (n + k * eps) * n
        codebook = total / weight / smoothed[:, None]
        if metric == "cosine":
            codebook = F.normalize(codebook, dim=-1)
        torch.testing.assert_close(module.cluster_size, size)
        torch.testing.assert_close(module.cluster_sum, total)
        torch.testing.assert_close(module.codebook, codebook)
        assert module.steps == t


def test_evaluation_changes_nothing_and_the_codebook_has_no_gradient():
    module = EMAVectorQuantizer(6, 4, revive_below=2.0).to(DEVICE).double().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(batches(1)[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not list(module.parameters())


def test_the_step_between_forward_and_backward_does_not_reach_the_gradient():
    module = EMAVectorQuantizer(6, 4, decay=0.1, gradient="rotation").to(DEVICE).double()
    frozen = EMAVectorQuantizer(6, 4, decay=0.1, gradient="rotation").to(DEVICE).double().eval()
    frozen.load_state_dict(module.state_dict())
    x, y = (batches(1)[0].requires_grad_() for _ in range(2))
    for one, rows in ((module, x), (frozen, y)):
        found = one(rows)
        (found.loss + found.quantized.pow(3).mean()).backward()
    assert not torch.equal(module.codebook, frozen.codebook)
    assert torch.equal(x.grad, y.grad)


def test_an_overflowing_batch_does_not_poison_the_averages():
    module = EMAVectorQuantizer(6, 4).to(DEVICE)
    x = batches(1, dtype=torch.float32)[0]
    module(x)
    x[3] = torch.inf
    x[7, 2] = torch.nan
    module(x)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    found = module(batches(1, dtype=torch.float32)[0])
    assert found.loss.isfinite()


def test_no_rows_for_ever_keeps_the_codebook():
    module = EMAVectorQuantizer(6, 4, zero_debias=True, revive_below=1.0).to(DEVICE)
    before = module.codebook.clone()
    module(torch.empty(0, 4, device=DEVICE))
    assert torch.equal(module.codebook, before)


@pytest.mark.parametrize("zero_debias", [False, True])
@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("heads", [1, 2])
def test_dead_codes_restart_at_rows_of_the_batch(heads, channel_dim, zero_debias):
    module = EMAVectorQuantizer(
        16, 2, num_heads=heads, channel_dim=channel_dim, decay=0.5, zero_debias=zero_debias, revive_below=1.0, eps=1e-5
    ).to(DEVICE)
    with torch.no_grad():
        module.codebook.add_(100)  # nobody's neighbours but one code's
    x = random_tensor((3, 2 * heads, 5, 4), torch.float32, 1)
    rows = x.movedim(1, -1).reshape(-1, heads, 2)
    x = x if channel_dim == 1 else x.movedim(1, -1)
    first = module(x)
    counts = first.counts.view(heads, -1)
    size = module.cluster_size.view(heads, -1)
    codebook = module.codebook.view(heads, 16, 2)
    share = 0.5 if zero_debias else 1.0
    for head in range(heads):
        average = 0.5 * counts[head] + (0.0 if zero_debias else 0.5)
        dead = average < share
        assert dead.any()
        assert not dead.all()
        restarted = codebook[head][dead]
        assert is_a_row_of(restarted, rows[:, head]).all()
        assert len(restarted.unique(dim=0)) == len(restarted)  # distinct rows
        assert (size[head][dead] == share).all()
        torch.testing.assert_close(module.cluster_sum.view(heads, 16, 2)[head][dead], restarted * share)
    assert module(x).perplexity.min() > first.perplexity.max()


def test_revival_repeats_under_a_seed():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        module = EMAVectorQuantizer(16, 3, revive_below=2.5).to(DEVICE)
        torch.manual_seed(seed)
        module(random_tensor((90, 3), torch.float32, 1))
        results.append(module.codebook)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_revival_never_draws_a_masked_row():
    x = random_tensor((6, 7, 3), torch.float32, 1)
    mask = random_tensor((6, 7), torch.float32, 2) > 0.3
    module = EMAVectorQuantizer(32, 3, revive_below=1.5).to(DEVICE)
    module(torch.where(mask[..., None], x, 7.0), mask)
    # more codes are dead than rows count: each of these is taken once
    assert is_a_row_of(x[mask], module.codebook).all()
    assert is_a_row_of(module.codebook, x[mask]).sum() == mask.sum() < 32


@pytest.mark.parametrize("wanted_share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "masked"), [(1, False), (20, False), (500, False), (500, True)])
def test_drawn_rows_are_distinct_and_cover_the_batch(rows, masked, wanted_share):
    torch.manual_seed(0)
    x = torch.arange(rows * 2.0, device=DEVICE).view(rows, 2, 1)  # row n of head h is 2 n + h
    valid = torch.rand(rows, device=DEVICE) < 0.3 if masked else None
    total = rows if valid is None else int(valid.sum())
    seen = torch.zeros(rows)
    for _ in range(40):
        wanted = torch.rand(2, 60, device=DEVICE) <= wanted_share
        drawn, found = draw_rows(x, valid, wanted, sync=False)
        assert not (found & ~wanted).any()
        for head in range(2):
            taken = ((drawn[head][found[head], 0] - head) / 2).long()
            assert len(taken) == min(int(wanted[head].sum()), total)
            assert len(taken.unique()) == len(taken)
            assert valid is None or valid[taken].all()
            seen[taken.cpu()] += 1
    if wanted_share == 1.0 and not masked:
        assert (seen > 0).all() or rows > 60
        assert (seen.view(-1, 5).sum(1) > 0).all() if rows % 5 == 0 else True


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_is_lloyds(cosine):
    rows = random_tensor((200, 2, 3), torch.float64, 1)
    rows = F.normalize(rows, dim=-1) if cosine else rows
    torch.manual_seed(0)
    start, none = kmeans(rows, 5, 0, cosine=cosine)
    assert not none.any()
    torch.manual_seed(0)
    found, counts = kmeans(rows, 5, 4, cosine=cosine)
    for head in range(2):
        centres = start[head]
        for _ in range(4):
            nearest = torch.cdist(rows[:, head], centres).argmin(1)
            means = torch.stack([rows[nearest == k, head].mean(0) for k in range(5)])
            centres = F.normalize(means, dim=-1) if cosine else means
        torch.testing.assert_close(found[head], centres)
        assert torch.equal(counts[head], nearest.bincount(minlength=5))


def test_kmeans_of_fewer_rows_than_centres():
    rows = random_tensor((3, 1, 2), torch.float32, 1)
    centres, counts = kmeans(rows, 7, 5)
    assert counts.sum() == 3
    assert is_a_row_of(centres[0], rows[:, 0]).all()


@pytest.mark.parametrize("zero_debias", [False, True])
def test_kmeans_initialisation(zero_debias):
    modes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]], device=DEVICE)
    x = (modes[torch.arange(400, device=DEVICE) % 4] + 0.1 * random_tensor((400, 2), torch.float32, 1)).requires_grad_()
    best = torch.inf
    for seed in range(5):  # Lloyd's may start badly
        torch.manual_seed(seed)
        module = EMAVectorQuantizer(4, 2, kmeans_init=True, zero_debias=zero_debias).to(DEVICE)
        module.eval()(x)
        assert module.steps == -1  # evaluation does not initialise
        module.train()
        found = module(x)
        assert module.steps == 1 + zero_debias
        best = min(best, found.commitment_loss.item())
        torch.testing.assert_close(module.codebook, module.cluster_sum / module.cluster_size[:, None], rtol=1e-3, atol=1e-3)
    assert best < 0.02
    before = module.codebook.clone()
    module(x)
    torch.testing.assert_close(module.codebook, before, rtol=0.05, atol=0.05)  # not once more
    other = EMAVectorQuantizer(4, 2, kmeans_init=True, zero_debias=zero_debias).to(DEVICE)
    other.load_state_dict(module.state_dict())
    other(x)
    torch.testing.assert_close(other.codebook, before, rtol=0.05, atol=0.05)  # nor after loading


def test_initialise_beforehand():
    module = EMAVectorQuantizer(4, 2, kmeans_init=True, channel_dim=1).to(DEVICE)
    x = random_tensor((2, 2, 5, 5), torch.float32, 1)
    module.initialise(x)
    assert module.steps == 0
    assert module(x).perplexity > 2


def test_residual_stages_quantise_what_is_left():
    torch.manual_seed(0)
    module = ResidualVectorQuantizer(3, 8, 4, kmeans_init=True).to(DEVICE).double()
    x = batches(1)[0].requires_grad_()
    module(x)  # initialises
    module.eval()
    found = module(x)
    rest, losses = x.detach(), []
    total = torch.zeros_like(rest)
    for stage, indices in zip(module.stages, found.indices.unbind(-1), strict=True):
        assert torch.equal(torch.cdist(rest, stage.codebook).argmin(1), indices)
        q = stage.codebook[indices]
        losses.append(F.mse_loss(rest, q))
        rest, total = rest - q, total + q
    torch.testing.assert_close(found.quantized, total)
    torch.testing.assert_close(found.commitment_loss, torch.stack(losses))
    torch.testing.assert_close(found.loss, 0.25 * torch.stack(losses).sum())
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(module.encode(x), found.indices)
    torch.testing.assert_close(module.decode(found.indices), total)
    torch.testing.assert_close(module.decode(found.indices[:, :1]), module.stages[0].codebook[found.indices[:, 0]])


@pytest.mark.parametrize("decay", [None, 0.99])
def test_the_straight_through_gradient_of_a_residual_quantizer_comes_once(decay):
    module = ResidualVectorQuantizer(3, 8, 4, decay=decay).to(DEVICE)
    x = random_tensor((20, 4), torch.float32, 1).requires_grad_()
    weight = random_tensor((20, 4), torch.float32, 2)
    found = module(x)
    (found.quantized * weight).sum().backward(retain_graph=True)
    assert torch.equal(x.grad, weight)
    x.grad = None
    found.loss.backward()
    expected = 0
    for stage in range(3):
        rest = x.detach() - sum(module.stages[s].decode(found.indices[:, s]) for s in range(stage)) if decay is None else None
        if rest is not None:
            expected = expected + 0.25 * 2 / 80 * (rest - module.stages[stage].decode(found.indices[:, stage]))
    if decay is None:
        torch.testing.assert_close(x.grad, expected.detach())
        assert all(s.codebook.grad is not None for s in module.stages)
