"""VQ-VAE and VQ-VAE-2: values and gradients of plain torch.nn, shapes, codes as the whole picture's description."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsr.models import VQVAE, VQVAE2
from tests.harness import DEVICE, random_tensor

KINDS = [VQVAE, VQVAE2]
SMALL = {"num_feat": 16, "num_block": 2, "num_res_ch": 6, "codebook_size": 24, "codebook_dim": 5}


class PlainResidual(nn.Module):
    def __init__(self, feat, inner):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(feat, inner, 3, padding=1), nn.Conv2d(inner, feat, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def plain_encoder(channels, feat, steps, blocks, inner):
    layers = []
    for step in range(steps):
        layers += [nn.Conv2d(channels, feat // 2 if step == 0 else feat, 4, 2, 1), nn.ReLU()]
        channels = feat // 2 if step == 0 else feat
    return nn.Sequential(*layers, nn.Conv2d(channels, feat, 3, 1, 1), *(PlainResidual(feat, inner) for _ in range(blocks)), nn.ReLU())


def plain_decoder(channels, out, feat, steps, blocks, inner):
    widths = [feat] * (steps - 1) + [feat // 2] * (steps > 1) + [out]
    widths = widths[-steps - 1 :] if steps > 1 else [feat, out]
    layers = [nn.Conv2d(channels, feat, 3, 1, 1), *(PlainResidual(feat, inner) for _ in range(blocks))]
    for narrow, wide in zip(widths[1:], widths, strict=False):
        layers += [nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
    return nn.Sequential(*layers)


def plain_vq(z, codebook):
    rows = z.movedim(1, -1)
    indices = (rows[..., None, :] - codebook).square().sum(-1).argmin(-1)
    q = codebook[indices].movedim(-1, 1)
    return z + (q - z).detach(), indices, F.mse_loss(q, z.detach()), F.mse_loss(z, q.detach())


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("downscale", [2, 4, 8])
def test_vqvae_is_the_paper_s(downscale, decay):
    torch.manual_seed(0)
    model = VQVAE(3, **SMALL, downscale=downscale, decay=decay, commitment_cost=0.5, data_variance=0.1).to(DEVICE).double()
    with torch.no_grad():
        model.quantizer.codebook.normal_(std=0.1)
    steps = downscale.bit_length() - 1
    encoder = plain_encoder(3, 16, steps, 2, 6).to(DEVICE).double()
    decoder = plain_decoder(5, 3, 16, steps, 2, 6).to(DEVICE).double()
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    codebook = model.quantizer.codebook.detach().clone().requires_grad_()
    x = random_tensor((2, 3, 16, 24), torch.float64, 1)

    found = model(x)
    found.loss.backward()
    z = F.conv2d(encoder(x), model.project.weight.detach(), model.project.bias.detach())
    q, indices, codebook_loss, commitment_loss = plain_vq(z, codebook)
    y = decoder(q)
    reconstruction_loss = F.mse_loss(y, x) / 0.1
    loss = reconstruction_loss + 0.5 * commitment_loss + (codebook_loss if decay is None else 0)
    loss.backward()

    assert torch.equal(found.indices[0], indices)
    torch.testing.assert_close(found.reconstruction, y)
    torch.testing.assert_close(found.reconstruction_loss.double(), reconstruction_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.codebook_loss, codebook_loss)
    torch.testing.assert_close(found.commitment_loss, commitment_loss)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=0)
    for ours, theirs in ((model.encoder, encoder), (model.decoder, decoder)):
        for p, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-7)
    if decay is None:
        torch.testing.assert_close(model.quantizer.codebook.grad, codebook.grad)


def test_vqvae2_s_levels_and_losses():
    torch.manual_seed(0)
    model = VQVAE2(3, **SMALL, decay=None, commitment_cost=0.5).to(DEVICE).double()
    with torch.no_grad():
        model.quantizer_t.codebook.normal_()
        model.quantizer_b.codebook.normal_()
    x = random_tensor((2, 3, 16, 24), torch.float64, 1)
    found = model(x)
    b = model.encoder_b(x)
    top, top_indices, *top_losses = plain_vq(model.project_t(model.encoder_t(b)), model.quantizer_t.codebook)
    bottom, bottom_indices, *bottom_losses = plain_vq(model.project_b(torch.cat([model.decoder_t(top), b], 1)), model.quantizer_b.codebook)
    y = model.decoder(torch.cat([model.upsample_t(top), bottom], 1))
    assert top_indices.shape == (2, 2, 3)
    assert bottom_indices.shape == (2, 4, 6)
    for indices, expected in zip(found.indices, (top_indices, bottom_indices), strict=True):
        assert torch.equal(indices, expected)
    torch.testing.assert_close(found.reconstruction, y)
    torch.testing.assert_close(found.codebook_loss, top_losses[0] + bottom_losses[0])
    torch.testing.assert_close(found.commitment_loss, top_losses[1] + bottom_losses[1])
    expected = F.mse_loss(y, x) + found.codebook_loss + 0.5 * found.commitment_loss
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=0)
    assert found.perplexity.shape == (2,)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("downscale", [2, 4])
@pytest.mark.parametrize("size", [(16, 32), (17, 30), (1, 1), (3, 50)])
def test_codes_hold_the_whole_picture(kind, downscale, size):
    torch.manual_seed(0)
    model = kind(1, **SMALL, downscale=downscale).to(DEVICE).eval()
    x = random_tensor((2, 1, *size), torch.float32, 1)
    with torch.no_grad():
        found = model(x)
        codes = model.encode(x)
        y = model.decode(codes)[:, :, : size[0], : size[1]]
    assert found.reconstruction.shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip(codes, found.indices, strict=True))
    torch.testing.assert_close(y, found.reconstruction)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_on_one_picture(kind):
    torch.manual_seed(0)
    model = kind(3, **SMALL, decay=0.9, kmeans_init=True, revive_below=0.1).to(DEVICE)
    ramp = torch.linspace(-1, 1, 32, device=DEVICE)
    x = torch.stack([ramp[:, None] * ramp, ramp[:, None].expand(32, 32), ramp.expand(32, 32)])[None]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        found = model(x)
        found.loss.backward()
        optimizer.step()
        losses.append(found.reconstruction_loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    torch.manual_seed(0)
    model = kind(3, **SMALL).to(DEVICE)
    x = random_tensor((2, 3, 16, 16), torch.float32, 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = model(x)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_the_value(kind):
    for downscale in (0, 1, 3, -4):
        with pytest.raises(ValueError, match=f"downscale is {downscale}; expected 2, 4, 8"):
            kind(downscale=downscale)
    model = kind(3, **SMALL)
    for shape in ((3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
            model(torch.zeros(shape))
