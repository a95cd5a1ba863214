"""Vector quantisers as the libraries spell them, written anew: what they return, their losses, their state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastsr
from fastsr import ops
from fastsr.fusion.swap import forward_of
from tests.harness import DEVICE, random_tensor


class Embedded(nn.Module):
    """Those with an embedding; `returns` says whose tuple, `legacy` which term has beta."""

    def __init__(self, returns: str = "taming", legacy: bool = True, codes: int = 16, dim: int = 6, beta: float = 0.3) -> None:
        super().__init__()
        self.returns, self.legacy, self.beta = returns, legacy, beta
        self.embedding = nn.Embedding(codes, dim)

    def forward(self, z: Tensor, temp: float | None = None, rescale: bool = False):
        rows = z.permute(0, 2, 3, 1).contiguous()
        flat, codes = rows.view(-1, rows.shape[-1]), self.embedding.weight
        d = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
        indices = d.argmin(1)
        hot = F.one_hot(indices, len(codes)).to(z.dtype)
        q = (hot @ codes).view(rows.shape)
        a, b = (q.detach() - rows).square().mean(), (q - rows.detach()).square().mean()
        loss = a + self.beta * b if self.legacy else b + self.beta * a
        images = (rows + (q - rows).detach()).permute(0, 3, 1, 2).contiguous()
        share = hot.mean(0)
        perplexity = torch.exp(-(share * torch.log(share + 1e-10)).sum())
        if self.returns == "images":
            return images
        if self.returns == "taming":
            return images, loss, (None, None, indices)
        if self.returns == "FeMaSR":
            return images, loss, indices.view(z.shape[0], 1, *z.shape[2:])
        if self.returns == "RestoreFormer":
            return images, loss, (perplexity, hot, indices[:, None], d)
        if self.returns.startswith("zalando"):
            return loss, images, perplexity, hot, *([indices[:, None]] if self.returns.endswith("indices") else [])
        if self.returns == "images and loss":
            return images, loss
        if self.returns == "images, loss and indices":
            return images, loss, indices.view(z.shape[0], *z.shape[2:])
        if self.returns == "sonnet":
            names = ("quantize", "loss", "perplexity", "encodings", "encoding_indices", "distances")
            return dict(zip(names, (images, loss, perplexity, hot, indices.view(z.shape[0], *z.shape[2:]), d), strict=True))
        if self.returns == "CodeFormer":
            scores = torch.exp(-d.gather(1, indices[:, None]) / 10)
            names = ("perplexity", "min_encodings", "min_encoding_indices", "min_encoding_scores", "mean_distance")
            return images, loss, dict(zip(names, (perplexity, hot, indices[:, None], scores, d.mean()), strict=True))
        return images, loss, indices, "something else"


class Rosinality(nn.Module):
    """Moving averages in buffers (D, K)."""

    def __init__(self, dim: int = 6, codes: int = 16, decay: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("embed", torch.randn(dim, codes))
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", self.embed.clone())

    def forward(self, x: Tensor):
        flat = x.reshape(-1, x.shape[-1])
        d = flat.square().sum(1, keepdim=True) - 2 * flat @ self.embed + self.embed.square().sum(0)
        indices = d.argmin(1)
        hot = F.one_hot(indices, self.embed.shape[1]).type(flat.dtype)
        q = F.embedding(indices.view(x.shape[:-1]), self.embed.t())
        if self.training:
            self.cluster_size.data.mul_(self.decay).add_(hot.sum(0), alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(flat.t().detach() @ hot, alpha=1 - self.decay)
            n = self.cluster_size.sum()
            size = (self.cluster_size + self.eps) / (n + self.embed.shape[1] * self.eps) * n
            self.embed.data.copy_(self.embed_avg / size)
        diff = (q.detach() - x).square().mean()
        return x + (q - x).detach(), diff, indices.view(x.shape[:-1])


class Zalando(nn.Module):
    """zalandoresearch's with moving averages; `smooth` is a bug of a copy of it."""

    def __init__(self, codes: int = 16, dim: int = 6, smooth: float = 1.0) -> None:
        super().__init__()
        self._decay, self._epsilon, self._commitment_cost, self.smooth = 0.9, 1e-5, 0.3, smooth
        self._embedding = nn.Embedding(codes, dim)
        self._embedding.weight.data.normal_()
        self.register_buffer("_ema_cluster_size", torch.zeros(codes))
        self._ema_w = nn.Parameter(torch.randn(codes, dim))

    def forward(self, inputs: Tensor):
        rows = inputs.permute(0, 2, 3, 1).contiguous()
        flat, codes = rows.view(-1, rows.shape[-1]), self._embedding.weight
        d = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
        hot = F.one_hot(d.argmin(1), len(codes)).to(flat.dtype)
        q = (hot @ codes).view(rows.shape)
        if self.training:
            size = self._ema_cluster_size * self._decay + (1 - self._decay) * hot.sum(0)
            n = size.sum()
            self._ema_cluster_size = (size + self._epsilon * self.smooth) / (n + len(codes) * self._epsilon) * n
            self._ema_w = nn.Parameter(self._ema_w * self._decay + (1 - self._decay) * (hot.t() @ flat))
            self._embedding.weight = nn.Parameter(self._ema_w / self._ema_cluster_size.unsqueeze(1))
        loss = self._commitment_cost * F.mse_loss(q.detach(), rows)
        q = rows + (q - rows).detach()
        share = hot.mean(0)
        return loss, q.permute(0, 3, 1, 2).contiguous(), torch.exp(-(share * torch.log(share + 1e-10)).sum()), hot


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    leaves = [t for t in tree_leaves(module(x)) if isinstance(t, Tensor)]
    others = [t.sum() for t in leaves[1:2] if t.requires_grad]
    (leaves[0] * random_tensor(leaves[0].shape, torch.float32, 7)).sum().add(sum(others)).backward()
    return [*(t.detach() for t in leaves), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "returns",
    [
        *("images", "taming", "FeMaSR", "RestoreFormer", "CodeFormer", "zalando", "zalando with indices", "images and loss"),
        *("images, loss and indices", "sonnet"),
    ],
)
def test_embedded(returns, legacy):
    torch.manual_seed(0)
    block = Embedded(returns, legacy).to(DEVICE)
    plain = copy.deepcopy(block)
    report = fastsr.fuse_(block)
    assert report.rows[0].fused, report
    assert report.rows[0].kind == "vector quantiser"
    x = random_tensor((2, 6, 5, 7), torch.float32, 1)
    assert forward_of(block).applies(x)
    for ours, theirs in zip(step(block, x), step(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert type(block(x)) is type(plain(x))


def test_images_alone_keep_nothing_for_backward():
    block, x = Embedded("images"), random_tensor((2, 6, 5, 7), torch.float32, 1).requires_grad_()
    assert fastsr.fuse_(block).fused == ("",)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = block(x)
    assert saved == []
    grad = random_tensor(y.shape, torch.float32, 2)
    y.backward(grad)
    assert torch.equal(x.grad, grad)
    assert block.embedding.weight.grad is None


def test_unknown_returns_are_left():
    report = fastsr.fuse_(Embedded("other"))
    assert not report.fused
    assert "it returns a tuple" in report.rows[0].reason


def test_options_at_their_defaults_are_no_options(monkeypatch):
    block = Embedded()
    fastsr.fuse_(block)
    x = random_tensor((1, 6, 3, 3), torch.float32, 1)
    calls = []
    fused = ops.vector_quantize
    monkeypatch.setattr(ops, "vector_quantize", lambda *a, **k: calls.append(1) or fused(*a, **k))
    block(x, temp=None, rescale=False)
    assert calls == [1]
    block(x, rescale=True)
    block(x, None)
    assert calls == [1]


@pytest.mark.parametrize("way", ["whole", "deepcopy"])
def test_moving_averages_move_as_theirs(way):
    torch.manual_seed(0)
    block = Rosinality().to(DEVICE)
    plain = copy.deepcopy(block)
    before = {k: t.clone() for k, t in block.state_dict().items()}
    report = fastsr.fuse_(block)
    assert report.fused == ("",), report
    assert all(torch.equal(t, before[k]) for k, t in block.state_dict().items())
    if way == "deepcopy":
        original, block = block, copy.deepcopy(block)
    for k in range(4):
        x = random_tensor((2, 30, 6), torch.float32, k)
        for m in (block, plain):
            m.train(k < 3)
        for ours, theirs in zip(step(block, x), step(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for key, tensor in plain.state_dict().items():
            torch.testing.assert_close(block.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.equal(block.embed, before["embed"])
    if way == "deepcopy":
        assert all(torch.equal(t, before[k]) for k, t in original.state_dict().items())


def test_zalando_s_averages_move_as_theirs():
    torch.manual_seed(0)
    block = Zalando().to(DEVICE)
    plain = copy.deepcopy(block)
    before = {k: t.clone() for k, t in block.state_dict().items()}
    report = fastsr.fuse_(block)
    assert report.fused == ("",), report
    assert all(torch.equal(t, before[k]) for k, t in block.state_dict().items())
    for k in range(5):
        x = random_tensor((2, 6, 5, 7), torch.float32, k)
        for m in (block, plain):
            m.train(k < 4)
        assert forward_of(block).applies(x)
        for ours, theirs in zip(step(block, x), step(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for key, tensor in plain.state_dict().items():
            torch.testing.assert_close(block.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.equal(block._embedding.weight, before["_embedding.weight"])
    assert [type(p) for p in block.parameters()] == [nn.Parameter] * 2


def test_zalando_s_averages_with_another_rule_are_left():
    report = fastsr.fuse_(Zalando(smooth=1e4))
    assert not report.fused
    assert "state differs" in report.rows[0].reason


def test_a_moving_average_with_another_rule_is_left():
    class Other(Rosinality):
        def forward(self, x):
            y = super().forward(x)
            if self.training:
                self.cluster_size.data.add_(1e-2)
            return y

    report = fastsr.fuse_(Other())
    assert not report.fused
    assert "training step" in report.rows[0].reason
