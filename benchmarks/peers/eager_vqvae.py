"""VQ-VAE and VQ-VAE-2 in plain PyTorch as a careful user writes them: one BLAS call for distances, gather and `index_add_` for the rest.

Parameter names are this package's, so that a state_dict fits both sides. Van den Oord et al., 2017, arXiv 1711.00937; Razavi et al.,
2019, arXiv 1906.00446.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.bench.cases.peers import code_search


class Output(NamedTuple):
    """The fields of this package's own output that a benchmark looks at."""

    reconstruction: Tensor
    indices: tuple[Tensor, ...]
    loss: Tensor


class ResidualLayer(nn.Module):
    """ReLU, a 3x3 convolution, ReLU, a 1x1 convolution, and a skip."""

    def __init__(self, num_feat: int, num_res_ch: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(num_feat, num_res_ch, 3, padding=1), nn.Conv2d(num_res_ch, num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Quantizer(nn.Module):
    """Codes that are moving averages of the rows which chose them."""

    def __init__(self, codebook_size: int, codebook_dim: int, decay: float = 0.99, commitment_cost: float = 0.25) -> None:
        super().__init__()
        self.decay, self.commitment_cost = decay, commitment_cost
        self.register_buffer("codebook", torch.randn(codebook_size, codebook_dim))
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", torch.zeros(codebook_size, codebook_dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D, h, w) -> the codes in the same shape, their indices (N, h, w), the commitment loss."""
        codebook, size, average = self.codebook, self.cluster_size, self.cluster_sum
        assert isinstance(codebook, Tensor)
        assert isinstance(size, Tensor)
        assert isinstance(average, Tensor)
        last = z.permute(0, 2, 3, 1)
        rows = last.reshape(-1, z.shape[1])
        index = code_search.product(rows.detach(), codebook)
        q = codebook[index].view(last.shape).permute(0, 3, 1, 2)
        loss = self.commitment_cost * F.mse_loss(z, q)
        if self.training:
            with torch.no_grad():
                counts, sums = code_search.scattered(rows, index, len(codebook))
                size.lerp_(counts, 1 - self.decay)
                average.lerp_(sums, 1 - self.decay)
                codebook.copy_(average / code_search.smoothed(size)[:, None])
        return z + (q - z).detach(), index.view(last.shape[:-1]), loss


def encoder(num_in_ch: int, num_feat: int, num_res_ch: int, steps: int) -> nn.Sequential:
    """Strided convolutions, the first to half the features, a 3x3 convolution, two residual layers, ReLU."""
    half = num_feat // 2
    layers: list[nn.Module] = [nn.Conv2d(num_in_ch, half, 4, 2, 1), nn.ReLU()]
    for _ in range(steps - 1):
        layers += [nn.Conv2d(half if len(layers) == 2 else num_feat, num_feat, 4, 2, 1), nn.ReLU()]
    layers.append(nn.Conv2d(half if steps == 1 else num_feat, num_feat, 3, padding=1))
    return nn.Sequential(*layers, ResidualLayer(num_feat, num_res_ch), ResidualLayer(num_feat, num_res_ch), nn.ReLU())


def decoder(num_in_ch: int, num_out_ch: int, num_feat: int, num_res_ch: int, steps: int) -> nn.Sequential:
    """A 3x3 convolution, two residual layers, and one or two transposed convolutions."""
    half = num_feat // 2
    layers = [nn.Conv2d(num_in_ch, num_feat, 3, padding=1), ResidualLayer(num_feat, num_res_ch), ResidualLayer(num_feat, num_res_ch)]
    ups = [(num_feat, num_out_ch)] if steps == 1 else [(num_feat, half), (half, num_out_ch)]
    for wide, narrow in ups:
        layers += [nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
    return nn.Sequential(*layers)


class VQVAE(nn.Module):
    """Two strided convolutions down, two residual layers, codes, and the way back."""

    def __init__(self, num_feat: int = 128, num_res_ch: int = 32, codebook_size: int = 512, codebook_dim: int = 64) -> None:
        super().__init__()
        self.encoder = encoder(3, num_feat, num_res_ch, 2)
        self.project = nn.Conv2d(num_feat, codebook_dim, 1)
        self.quantizer = Quantizer(codebook_size, codebook_dim)
        self.decoder = decoder(codebook_dim, 3, num_feat, num_res_ch, 2)

    def forward(self, x: Tensor) -> Output:
        """(N, 3, H, W), sides multiples of 4, to the reconstruction, the codes' indices and the loss."""
        q, indices, commitment = self.quantizer(self.project(self.encoder(x)))
        y = self.decoder(q)
        return Output(y, (indices,), F.mse_loss(y, x) + commitment)


class VQVAE2(nn.Module):
    """Codes at an eighth and, in their light, at a quarter of the picture's sides."""

    def __init__(self, num_feat: int = 128, num_res_ch: int = 32, codebook_size: int = 512, codebook_dim: int = 64) -> None:
        super().__init__()
        self.encoder_b = encoder(3, num_feat, num_res_ch, 2)
        self.encoder_t = encoder(num_feat, num_feat, num_res_ch, 1)
        self.project_t = nn.Conv2d(num_feat, codebook_dim, 1)
        self.quantizer_t = Quantizer(codebook_size, codebook_dim)
        self.decoder_t = decoder(codebook_dim, codebook_dim, num_feat, num_res_ch, 1)
        self.project_b = nn.Conv2d(codebook_dim + num_feat, codebook_dim, 1)
        self.quantizer_b = Quantizer(codebook_size, codebook_dim)
        self.upsample_t = nn.ConvTranspose2d(codebook_dim, codebook_dim, 4, 2, 1)
        self.decoder = decoder(2 * codebook_dim, 3, num_feat, num_res_ch, 2)

    def forward(self, x: Tensor) -> Output:
        """(N, 3, H, W), sides multiples of 8, to the reconstruction, both levels' indices and the loss."""
        b = self.encoder_b(x)
        top, top_indices, top_loss = self.quantizer_t(self.project_t(self.encoder_t(b)))
        bottom, indices, loss = self.quantizer_b(self.project_b(torch.cat([self.decoder_t(top), b], 1)))
        y = self.decoder(torch.cat([self.upsample_t(top), bottom], 1))
        return Output(y, (top_indices, indices), F.mse_loss(y, x) + top_loss + loss)


class Reconstruction(nn.Module):
    """One of the two as other runtimes convert it: its result is a tuple of the reconstruction and the codes' indices, without a loss."""

    def __init__(self, network: type[VQVAE] | type[VQVAE2]) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The picture's reconstruction, and the indices of each level."""
        out = self.network(x)
        return (out.reconstruction, *out.indices)

    def load_state_dict(self, state: Any, *args: Any, **more: Any) -> Any:
        """Of the network itself."""
        return self.network.load_state_dict(state, *args, **more)
