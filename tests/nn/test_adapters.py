"""The stand-ins for other libraries' quantisers against those libraries' formulas, written out plainly in float64.

`tests/peers` compares with the packages themselves, where they can be installed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsr.nn import adapters
from tests.harness import DEVICE, random_tensor

K, D, BETA = 11, 6, 0.3


def image(seed=1):
    return random_tensor((2, D, 3, 4), torch.float64, seed)


class Textbook(nn.Module):
    """The quantiser that taming-transformers, diffusers, CodeFormer, RestoreFormer and FeMaSR share, with its matrices."""

    def __init__(self, legacy: bool) -> None:
        super().__init__()
        self.legacy = legacy
        self.embedding = nn.Embedding(K, D)

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).reshape(-1, D)
        d = (rows[:, None] - self.embedding.weight).square().sum(-1)
        indices = d.argmin(1)
        q = self.embedding(indices).view(z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        to_encoder, to_codebook = (q.detach() - z).square().mean(), (q - z.detach()).square().mean()
        loss = to_encoder + BETA * to_codebook if self.legacy else BETA * to_encoder + to_codebook
        encodings = F.one_hot(indices, K).double()
        share = encodings.mean(0)
        perplexity = torch.exp(-(share * torch.log(share + 1e-10)).sum())
        return z + (q - z).detach(), loss, {"d": d, "indices": indices, "encodings": encodings, "perplexity": perplexity}


#: An adapter, whether its loss has beta on the codebook's term, and its third result from the textbook's.
GRADIENT = {
    "taming": (lambda: adapters.TamingVectorQuantizer(K, D, BETA), True, lambda t: (None, None, t["indices"])),
    "taming, fixed": (
        lambda: adapters.TamingVectorQuantizer(K, D, BETA, sane_index_shape=True, legacy=False),
        False,
        lambda t: (None, None, t["indices"].view(2, 3, 4)),
    ),
    "diffusers": (
        lambda: adapters.DiffusersVectorQuantizer(n_e=K, vq_embed_dim=D, beta=BETA, remap=None, sane_index_shape=False, legacy=False),
        False,
        lambda t: (None, None, t["indices"]),
    ),
    "codeformer": (
        lambda: adapters.CodeFormerVectorQuantizer(K, D, BETA, matrices=True),
        True,
        lambda t: {
            "perplexity": t["perplexity"],
            "min_encodings": t["encodings"],
            "min_encoding_indices": t["indices"][:, None],
            "min_encoding_scores": torch.exp(-t["d"].amin(1, keepdim=True) / 10),
            "mean_distance": t["d"].mean(),
        },
    ),
    "restoreformer": (
        lambda: adapters.RestoreFormerVectorQuantizer(K, D, BETA, matrices=True),
        True,
        lambda t: (t["perplexity"], t["encodings"], t["indices"][:, None], t["d"]),
    ),
    "femasr": (lambda: adapters.FeMaSRVectorQuantizer(K, D, BETA), False, lambda t: t["indices"].view(2, 1, 3, 4)),
}


def assert_same(found, expected):
    """Tensors, tuples and dicts alike; None only where None is expected."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = tuple(found.values()), tuple(expected.values())
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif expected is not None:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", GRADIENT)
def test_gradient_trained(name):
    make, legacy, third = GRADIENT[name]
    torch.manual_seed(0)
    theirs = Textbook(legacy).to(DEVICE).double()
    ours = adapters.take_over(theirs, make())
    assert ours.state_dict().keys() == {"embedding.weight"}
    weight = image(2)
    x, y = (image().requires_grad_() for _ in range(2))
    q, loss, rest = ours(x)
    expected_q, expected_loss, info = theirs(y)
    for one, losses in ((q, loss), (expected_q, expected_loss)):
        (losses + (one * weight).mean()).backward()
    assert_same((q, loss, rest), (expected_q, expected_loss, third(info)))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.embedding.weight.grad)


def test_entries_of_the_codebook():
    for make in (lambda: adapters.TamingVectorQuantizer(K, D, BETA), lambda: adapters.CodeFormerVectorQuantizer(K, D, BETA)):
        module = make().to(DEVICE).double()
        indices = module(image())[2]
        indices = indices["min_encoding_indices"] if isinstance(indices, dict) else indices[2]
        entry = getattr(module, "get_codebook_feat", module.get_codebook_entry)
        torch.testing.assert_close(entry(indices, (2, 3, 4, D)), module(image())[0])
        assert entry(indices, None).shape == (24, D)
    module = adapters.FeMaSRVectorQuantizer(K, D).to(DEVICE).double()
    q, _, indices = module(image())
    torch.testing.assert_close(module.get_codebook_entry(indices), q)


def test_femasr_s_second_stage():
    module = adapters.FeMaSRVectorQuantizer(K, D, BETA, LQ_stage=True).to(DEVICE).double()
    z, sharp = image().requires_grad_(), torch.arange(24, device=DEVICE).view(2, 1, 3, 4) % K
    _, loss, _ = module(z, gt_indices=sharp)
    rows, target = z.permute(0, 2, 3, 1), module.embedding.weight.detach()[sharp.view(2, 3, 4)]
    grams = [torch.einsum("nhwc,nhwd->ncd", t, t) / 12 for t in (rows, target)]
    torch.testing.assert_close(loss, BETA * (target - rows).square() + (grams[0] - grams[1]).square().mean())


def test_matrices_are_not_built_unasked():
    z = image()
    assert adapters.CodeFormerVectorQuantizer(K, D, BETA).to(DEVICE).double()(z)[2]["min_encodings"] is None
    assert adapters.RestoreFormerVectorQuantizer(K, D, BETA).to(DEVICE).double()(z)[2][1::2] == (None, None)


def rows(step):
    return random_tensor((5, 9, D), torch.float64, step) + step / 4


class Rosinality(nn.Module):
    """Codes as columns; averages from the codes themselves."""

    def __init__(self, decay=0.9, eps=1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("embed", torch.randn(D, K))
        self.register_buffer("cluster_size", torch.ones(K))
        self.register_buffer("embed_avg", self.embed.clone())

    def forward(self, x):
        flat = x.detach().reshape(-1, D)
        indices = (flat[:, :, None] - self.embed).square().sum(1).argmin(1)
        encodings = F.one_hot(indices, K).to(x.dtype)
        q = self.embed.t()[indices].view(x.shape)
        if self.training:
            self.cluster_size.mul_(self.decay).add_(encodings.sum(0), alpha=1 - self.decay)
            self.embed_avg.mul_(self.decay).add_(flat.t() @ encodings, alpha=1 - self.decay)
            n = self.cluster_size.sum()
            self.embed.copy_(self.embed_avg / ((self.cluster_size + self.eps) / (n + K * self.eps) * n))
        return x + (q - x).detach(), (q - x).square().mean(), indices.view(x.shape[:-1])


def test_rosinality():
    torch.manual_seed(0)
    theirs = Rosinality().to(DEVICE).double()
    ours = adapters.take_over(theirs, adapters.RosinalityQuantize(D, K, decay=0.9))
    for step in range(4):
        x, y = (rows(step).requires_grad_() for _ in range(2))
        found, expected = ours(x), theirs(y)
        assert_same(found, expected)
        (found[0].pow(2).mean() + found[1]).backward()
        (expected[0].pow(2).mean() + expected[1]).backward()
        torch.testing.assert_close(x.grad, y.grad)
        assert_same(dict(sorted(ours.state_dict().items())), dict(sorted(theirs.state_dict().items())))
    torch.testing.assert_close(ours.embed_code(found[2]), theirs.embed.t()[found[2]], rtol=1, atol=1)
    assert_same(ours.eval()(x), theirs.eval()(y))


def test_sonnet():
    torch.manual_seed(0)
    decay, eps = 0.9, 1e-5
    ours = adapters.SonnetVectorQuantizerEMA(D, K, BETA, decay, matrices=True).to(DEVICE).double()
    embeddings = ours.state_dict()["embeddings"].clone()
    assert embeddings.shape == (D, K)
    hidden_size, hidden_dw = torch.zeros(K).to(embeddings), torch.zeros_like(embeddings)
    for step in range(1, 5):
        x = rows(step)
        flat = x.reshape(-1, D)
        d = flat.square().sum(1, keepdim=True) - 2 * flat @ embeddings + embeddings.square().sum(0)
        indices = d.argmin(1)
        encodings = F.one_hot(indices, K).double()
        q = embeddings.t()[indices].view(x.shape)
        share = encodings.mean(0)
        expected = {
            "quantize": q,
            "loss": BETA * (q - x).square().mean(),
            "perplexity": torch.exp(-(share * torch.log(share + 1e-10)).sum()),
            "encodings": encodings,
            "encoding_indices": indices.view(x.shape[:-1]),
            "distances": d,
        }
        hidden_size = hidden_size - (hidden_size - encodings.sum(0)) * (1 - decay)
        hidden_dw = hidden_dw - (hidden_dw - flat.t() @ encodings) * (1 - decay)
        size, dw = hidden_size / (1 - decay**step), hidden_dw / (1 - decay**step)
        n = size.sum()
        embeddings = dw / ((size + eps) / (n + K * eps) * n)
        assert_same(ours(x, is_training=True), expected)
        state = {
            "embeddings": embeddings,
            "ema_cluster_size.hidden": hidden_size,
            "ema_dw.hidden": hidden_dw,
            "ema_cluster_size.counter": torch.tensor(step, device=DEVICE),
            "ema_dw.counter": torch.tensor(step, device=DEVICE),
            "ema_cluster_size.average": size,
            "ema_dw.average": dw,
        }
        assert_same(dict(sorted(ours.state_dict().items())), dict(sorted(state.items())))
    ours(rows(9), is_training=False)
    assert_same(dict(sorted(ours.state_dict().items())), dict(sorted(state.items())))


def test_adapters_within_a_network_read_and_write_its_checkpoint():
    torch.manual_seed(0)
    theirs = nn.ModuleDict({"quantize_b": Rosinality(), "conv": nn.Conv2d(3, 3, 1)})
    ours = nn.ModuleDict({"quantize_b": adapters.RosinalityQuantize(D, K), "conv": nn.Conv2d(3, 3, 1)})
    ours.load_state_dict(theirs.state_dict())
    assert {k: tuple(t.shape) for k, t in ours.state_dict().items()} == {k: tuple(t.shape) for k, t in theirs.state_dict().items()}
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor)
    state = theirs.state_dict()
    state["quantize_b.surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"quantize_b\.surplus"):
        ours.load_state_dict(state)
    del state["quantize_b.surplus"], state["quantize_b.embed"]
    with pytest.raises(RuntimeError, match=r"quantize_b\.embed"):
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(nn.ModuleDict({"quantize_b": adapters.RosinalityQuantize(D, K + 1), "conv": nn.Conv2d(3, 3, 1)}).state_dict())


def test_another_library_s_module_is_refused():
    with pytest.raises(RuntimeError, match="embed"):
        adapters.take_over(Textbook(True), adapters.RosinalityQuantize(D, K))
    with pytest.raises(ValueError, match=r"remap is 'used\.npy'"):
        adapters.TamingVectorQuantizer(K, D, BETA, remap="used.npy")
