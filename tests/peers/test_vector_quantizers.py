"""Quantisers against the packages that they stand in for: vector-quantize-pytorch, diffusers, faiss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsr import ops
from fastsr.nn import adapters
from tests.harness import random_tensor

VQP = {
    "plain": ({}, (2, 50, 6)),
    "straight-through": ({"rotation_trick": False}, (2, 50, 6)),
    "cosine": ({"use_cosine_sim": True}, (2, 50, 6)),
    "projections": ({"codebook_dim": 4}, (2, 50, 6)),
    "heads": ({"heads": 3, "codebook_dim": 2}, (2, 50, 6)),
    "separate heads": ({"heads": 3, "codebook_dim": 2, "separate_codebook_per_head": True}, (2, 50, 6)),
    "images": ({"accept_image_fmap": True, "commitment_weight": 0.5}, (2, 6, 5, 7)),
    "channels first": ({"channel_last": False}, (2, 6, 50)),
    "single rows": ({}, (50, 6)),
}


def pair(options):
    why_not = "vector-quantize-pytorch is not installed; `make peers` installs it and runs this"
    package = pytest.importorskip("vector_quantize_pytorch", reason=why_not)
    torch.manual_seed(0)
    theirs = package.VectorQuantize(dim=6, codebook_size=16, decay=0.9, **options)
    with torch.no_grad():
        theirs._codebook.embed.copy_(torch.randn_like(theirs._codebook.embed))
        if options.get("use_cosine_sim"):
            theirs._codebook.embed.copy_(nn.functional.normalize(theirs._codebook.embed, dim=-1))
        theirs._codebook.embed_avg.copy_(theirs._codebook.embed)
    return theirs, adapters.take_over(theirs, adapters.VectorQuantize(6, 16, decay=0.9, **options))


@pytest.mark.parametrize("name", VQP)
def test_vector_quantize_pytorch(name):
    options, shape = VQP[name]
    theirs, ours = pair(options)
    for step in range(3):
        x, y = (random_tensor(shape, torch.float32, step).requires_grad_() for _ in range(2))
        found, expected = ours(x), theirs(y)
        assert torch.equal(found[1], expected[1])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, check_dtype=False)
        for q, _, loss in (found, expected):
            (q.square().mean() + loss).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-6)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    for a, b in zip(ours.eval()(x), theirs.eval()(y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_vector_quantize_pytorch_s_mask():
    theirs, ours = pair({})
    x, mask = random_tensor((2, 50, 6), torch.float32, 1), random_tensor((2, 50), torch.float32, 2) > 0
    for a, b in zip(ours(x, mask=mask), theirs(x, mask=mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=1e-4, atol=1e-5)


def test_a_swap_inside_a_training_run_gives_the_same_curve():
    curves = []
    for quantizer in pair({}):
        torch.manual_seed(1)
        model = nn.ModuleList([nn.Linear(12, 6), quantizer, nn.Linear(6, 12)])
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        losses = []
        for step in range(100):
            x = random_tensor((1, 256, 12), torch.float32, step)
            q, _, commitment = model[1](model[0](x))
            loss = (model[2](q) - x).square().mean()
            optimizer.zero_grad()
            (loss + commitment).backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-10:].mean() < 0.95 * curves[0][:5].mean()
    torch.testing.assert_close(curves[1], curves[0], rtol=0.02, atol=0)


def test_diffusers():
    module = pytest.importorskip("diffusers.models.autoencoders.vae", reason="diffusers and what it imports are not all installed")
    for options in ({"legacy": True}, {"legacy": False, "sane_index_shape": True}):
        torch.manual_seed(0)
        theirs = module.VectorQuantizer(16, 6, 0.3, **options)
        nn.init.normal_(theirs.embedding.weight)
        ours = adapters.take_over(theirs, adapters.DiffusersVectorQuantizer(16, 6, 0.3, **options))
        x, y = (random_tensor((2, 6, 5, 7), torch.float32, 1).requires_grad_() for _ in range(2))
        (q, loss, (*none, indices)), (expected, expected_loss, (*_, expected_indices)) = ours(x), theirs(y)
        assert none == [None, None]
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(q, expected)
        torch.testing.assert_close(loss, expected_loss)
        (q.square().mean() + loss).backward()
        (expected.square().mean() + expected_loss).backward()
        torch.testing.assert_close(x.grad, y.grad)
        torch.testing.assert_close(ours.embedding.weight.grad, theirs.embedding.weight.grad)


@pytest.mark.parametrize(("n", "k", "d"), [(3000, 512, 64), (500, 1024, 256)])
def test_faiss(n, k, d):
    faiss = pytest.importorskip("faiss", reason="`make peers` installs faiss-cpu and runs this")
    x, codes = random_tensor((n, d), torch.float32, 1), random_tensor((k, d), torch.float32, 2)
    index = faiss.IndexFlatL2(d)
    index.add(codes.numpy())
    distances, indices = index.search(x.numpy(), 1)
    found, found_distances = ops.vq_nearest(x, codes, return_distance=True)
    assert torch.equal(found, torch.from_numpy(indices)[:, 0])
    torch.testing.assert_close(found_distances, torch.from_numpy(distances)[:, 0], rtol=1e-4, atol=1e-4)
