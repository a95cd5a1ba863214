"""VQ-VAE and VQ-VAE-2: pictures as grids of codes, and back.

Sources: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937; Razavi et al., "Generating
Diverse High-Fidelity Images with VQ-VAE-2", 2019, arXiv 1906.00446.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.backends import Backend
from fastsr.nn import Conv3x3, EMAVectorQuantizer, Module, Quantized, VectorQuantizer


class VQVAEOutput(NamedTuple):
    """What `VQVAE` and `VQVAE2` return; the four losses are scalars."""

    reconstruction: Tensor  #: like x
    indices: tuple[Tensor, ...]  #: (N, h, w) int64 for each level, the coarsest first
    loss: Tensor  #: reconstruction_loss + the quantisers' losses (`fastsr.nn.Quantized`)
    reconstruction_loss: Tensor  #: mean of (reconstruction - x)^2, over `data_variance`
    codebook_loss: Tensor  #: summed over levels; without a gradient where the codebook is a moving average
    commitment_loss: Tensor  #: summed over levels, before `commitment_cost`
    perplexity: Tensor  #: (levels,): how many codes the batch uses, weighted by how often


class ResidualLayer(Module):
    """y = x + conv2(relu(conv1(relu(x)))): a 3x3 convolution to `num_res_ch` channels and a 1x1 back, as in the paper."""

    def __init__(self, num_feat: int, num_res_ch: int, backend: Backend = "auto") -> None:
        super().__init__(backend)
        self.conv1 = Conv3x3(num_feat, num_res_ch, backend=backend)
        self.conv2 = nn.Conv2d(num_res_ch, num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(F.relu(x), activation="relu"))


def encoder(num_in_ch: int, num_feat: int, steps: int, num_block: int, num_res_ch: int, backend: Backend) -> nn.Sequential:
    """`steps` 4x4 convolutions of stride 2 (the first to half the features), a 3x3 convolution, residual layers, ReLU."""
    layers: list[nn.Module] = []
    channels = num_in_ch
    for step in range(steps):
        wide = num_feat if step else num_feat // 2
        layers += [nn.Conv2d(channels, wide, 4, stride=2, padding=1), nn.ReLU()]
        channels = wide
    layers.append(Conv3x3(channels, num_feat, backend=backend))
    layers += [ResidualLayer(num_feat, num_res_ch, backend) for _ in range(num_block)]
    return nn.Sequential(*layers, nn.ReLU())


def decoder(num_in_ch: int, num_out_ch: int, num_feat: int, steps: int, num_block: int, num_res_ch: int, backend: Backend) -> nn.Sequential:
    """A 3x3 convolution, residual layers, ReLU, and `steps` transposed 4x4 convolutions of stride 2."""
    layers: list[nn.Module] = [Conv3x3(num_in_ch, num_feat, backend=backend)]
    layers += [ResidualLayer(num_feat, num_res_ch, backend) for _ in range(num_block)]
    channels = num_feat
    for left in reversed(range(steps)):
        narrow = num_out_ch if left == 0 else num_feat // 2 if left == 1 else num_feat
        layers += [nn.ReLU(), nn.ConvTranspose2d(channels, narrow, 4, stride=2, padding=1)]
        channels = narrow
    return nn.Sequential(*layers)


class VQVAE(Module):
    """One grid of codes. For an image x (N, `num_in_ch`, H, W):

        1. z    = project(encoder(x))                      (N, codebook_dim, H / downscale, W / downscale)
        2. q    = the nearest codes of z                   `quantizer`
        3. x'   = decoder(q)
        4. loss = mean((x' - x)^2) / data_variance + codebook_loss + commitment_cost * commitment_loss

    Sides that are no multiples of `downscale` are padded by repeating the border, and x' is cropped.

    Args:
        num_in_ch: channels of the image.
        num_feat: features of the encoder and the decoder.
        num_block: residual layers of each.
        num_res_ch: features inside a residual layer.
        codebook_size, codebook_dim: K codes of D values; with an option `num_heads`, for each head.
        downscale: pixels along each side of a code: 2, 4, 8, ...
        commitment_cost: beta.
        decay: of the codebook's moving averages; None for a codebook that the optimizer trains.
        data_variance: of the images, which makes the first term comparable with the others.
        backend: "auto", "compiled", "triton" or "reference".
        **quantizer: further options of `fastsr.nn.EMAVectorQuantizer` or, without `decay`, `VectorQuantizer`.

    Raises:
        ValueError: sizes that do not exist.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 128,
        num_block: int = 2,
        num_res_ch: int = 32,
        codebook_size: int = 512,
        codebook_dim: int = 64,
        downscale: int = 4,
        commitment_cost: float = 0.25,
        decay: float | None = 0.99,
        data_variance: float = 1.0,
        backend: Backend = "auto",
        **quantizer: Any,
    ) -> None:
        steps = _steps("VQVAE", downscale)
        super().__init__(backend)
        self.num_in_ch, self.downscale, self.data_variance = num_in_ch, downscale, data_variance
        self.encoder = encoder(num_in_ch, num_feat, steps, num_block, num_res_ch, backend)
        channels = codebook_dim * quantizer.get("num_heads", 1)
        self.project = nn.Conv2d(num_feat, channels, 1)
        self.quantizer = _quantizer(codebook_size, codebook_dim, commitment_cost, decay, backend, quantizer)
        self.decoder = decoder(channels, num_in_ch, num_feat, steps, num_block, num_res_ch, backend)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """(N, num_in_ch, H, W), usually centred at 0 -> the reconstruction, the codes and the terms of the loss."""
        z = self.project(self.encoder(_padded("VQVAE", x, self.num_in_ch, self.downscale)))
        q = self.quantizer(z)
        return _output(x, self.decoder(q.quantized), (q,), self.data_variance)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, num_in_ch, H, W) -> the codes' indices ((N, h, w),)."""
        return (self.quantizer.encode(self.project(self.encoder(_padded("VQVAE", x, self.num_in_ch, self.downscale)))),)

    def decode(self, indices: tuple[Tensor, ...]) -> Tensor:
        """Indices ((N, h, w),) -> pictures (N, num_in_ch, h * downscale, w * downscale)."""
        return self.decoder(self.quantizer.decode(indices[0]))


class VQVAE2(Module):
    """Two grids of codes, the finer seen in the light of the coarser. For an image x (N, `num_in_ch`, H, W):

        1. b    = encoder_b(x)                                     at H / downscale
        2. t    = encoder_t(b)                                     at H / (2 downscale)
        3. q_t  = the nearest codes of project_t(t)                `quantizer_t`
        4. q_b  = the nearest codes of project_b([decoder_t(q_t), b])          `quantizer_b`
        5. x'   = decoder([upsample_t(q_t), q_b])
        6. loss = mean((x' - x)^2) / data_variance + the losses of both quantisers

    Arguments as in `VQVAE`; both levels have the same sizes.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 128,
        num_block: int = 2,
        num_res_ch: int = 32,
        codebook_size: int = 512,
        codebook_dim: int = 64,
        downscale: int = 4,
        commitment_cost: float = 0.25,
        decay: float | None = 0.99,
        data_variance: float = 1.0,
        backend: Backend = "auto",
        **quantizer: Any,
    ) -> None:
        steps = _steps("VQVAE2", downscale)
        super().__init__(backend)
        self.num_in_ch, self.downscale, self.data_variance = num_in_ch, downscale, data_variance
        self.encoder_b = encoder(num_in_ch, num_feat, steps, num_block, num_res_ch, backend)
        self.encoder_t = encoder(num_feat, num_feat, 1, num_block, num_res_ch, backend)
        channels = codebook_dim * quantizer.get("num_heads", 1)
        self.project_t = nn.Conv2d(num_feat, channels, 1)
        self.quantizer_t = _quantizer(codebook_size, codebook_dim, commitment_cost, decay, backend, quantizer)
        self.decoder_t = decoder(channels, channels, num_feat, 1, num_block, num_res_ch, backend)
        self.project_b = nn.Conv2d(channels + num_feat, channels, 1)
        self.quantizer_b = _quantizer(codebook_size, codebook_dim, commitment_cost, decay, backend, quantizer)
        self.upsample_t = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.decoder = decoder(2 * channels, num_in_ch, num_feat, steps, num_block, num_res_ch, backend)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """(N, num_in_ch, H, W), usually centred at 0 -> the reconstruction, the codes and the terms of the loss."""
        b = self.encoder_b(_padded("VQVAE2", x, self.num_in_ch, 2 * self.downscale))
        top = self.quantizer_t(self.project_t(self.encoder_t(b)))
        bottom = self.quantizer_b(self._bottom(top.quantized, b))
        return _output(x, self._decode(top.quantized, bottom.quantized), (top, bottom), self.data_variance)

    def _bottom(self, top: Tensor, b: Tensor) -> Tensor:
        return self.project_b(torch.cat([self.decoder_t(top), b], 1))

    def _decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.upsample_t(top), bottom], 1))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, num_in_ch, H, W) -> the codes' indices, top (N, h / 2, w / 2) and bottom (N, h, w)."""
        b = self.encoder_b(_padded("VQVAE2", x, self.num_in_ch, 2 * self.downscale))
        top = self.quantizer_t.encode(self.project_t(self.encoder_t(b)))
        return top, self.quantizer_b.encode(self._bottom(self.quantizer_t.decode(top), b))

    def decode(self, indices: tuple[Tensor, ...]) -> Tensor:
        """Indices of the top and the bottom -> pictures (N, num_in_ch, h * downscale, w * downscale)."""
        return self._decode(self.quantizer_t.decode(indices[0]), self.quantizer_b.decode(indices[1]))


def _steps(name: str, downscale: int) -> int:
    if downscale < 2 or downscale & (downscale - 1):
        raise ValueError(f"{name}: downscale is {downscale}; expected 2, 4, 8, ...")
    return downscale.bit_length() - 1


def _quantizer(
    size: int, dim: int, cost: float, decay: float | None, backend: Backend, options: dict[str, Any]
) -> VectorQuantizer | EMAVectorQuantizer:
    options = {"commitment_cost": cost, "channel_dim": 1, "backend": backend, **options}
    return VectorQuantizer(size, dim, **options) if decay is None else EMAVectorQuantizer(size, dim, decay=decay, **options)


def _padded(name: str, x: Tensor, channels: int, multiple: int) -> Tensor:
    """`x` with its border repeated to the right and below, to sides that the strided convolutions divide."""
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[1:]:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; expected (N, {channels}, H, W) with at least one pixel")
    right, below = -x.shape[3] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, right, 0, below), "replicate") if right or below else x


def _output(x: Tensor, y: Tensor, levels: tuple[Quantized, ...], data_variance: float) -> VQVAEOutput:
    y = y[:, :, : x.shape[2], : x.shape[3]]
    reconstruction = F.mse_loss(y.float(), x.float()) / data_variance
    return VQVAEOutput(
        y,
        tuple(level.indices for level in levels),
        torch.stack([reconstruction, *(level.loss for level in levels)]).sum(),
        reconstruction,
        torch.stack([level.codebook_loss for level in levels]).sum(),
        torch.stack([level.commitment_loss for level in levels]).sum(),
        torch.stack([level.perplexity for level in levels]),
    )
