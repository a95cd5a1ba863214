"""VQ-VAE as anyone would write it in plain PyTorch, its codebook's moving averages through a one-hot matrix as many tutorials do.

Parameter names are this package's, so that a state_dict fits both sides. Van den Oord et al., 2017, arXiv 1711.00937.
"""

from __future__ import annotations

from typing import NamedTuple

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
        index = code_search.expanded(rows.detach(), codebook)
        hot = F.one_hot(index, len(codebook)).to(z.dtype)
        q = (hot @ codebook).view(last.shape).permute(0, 3, 1, 2)
        loss = self.commitment_cost * F.mse_loss(z, q)
        if self.training:
            with torch.no_grad():
                size.lerp_(hot.sum(0), 1 - self.decay)
                average.lerp_(hot.T @ rows, 1 - self.decay)
                codebook.copy_(average / code_search.smoothed(size)[:, None])
        return z + (q - z).detach(), index.view(last.shape[:-1]), loss


class VQVAE(nn.Module):
    """Two strided convolutions down, two residual layers, codes, and the way back."""

    def __init__(self, num_feat: int = 128, num_res_ch: int = 32, codebook_size: int = 512, codebook_dim: int = 64) -> None:
        super().__init__()
        half = num_feat // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(3, half, 4, 2, 1), nn.ReLU(), nn.Conv2d(half, num_feat, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(num_feat, num_feat, 3, padding=1), ResidualLayer(num_feat, num_res_ch), ResidualLayer(num_feat, num_res_ch),
            nn.ReLU(),
        )  # fmt: skip
        self.project = nn.Conv2d(num_feat, codebook_dim, 1)
        self.quantizer = Quantizer(codebook_size, codebook_dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook_dim, num_feat, 3, padding=1), ResidualLayer(num_feat, num_res_ch), ResidualLayer(num_feat, num_res_ch),
            nn.ReLU(), nn.ConvTranspose2d(num_feat, half, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(half, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Output:
        """(N, 3, H, W), sides multiples of 4, to the reconstruction, the codes' indices and the loss."""
        q, indices, commitment = self.quantizer(self.project(self.encoder(x)))
        y = self.decoder(q)
        return Output(y, (indices,), F.mse_loss(y, x) + commitment)
