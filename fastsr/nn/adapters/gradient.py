"""Stand-ins for the quantisers with `embedding.weight`: taming-transformers, diffusers, CodeFormer, RestoreFormer, FeMaSR.

The first four put beta on the codebook's term of the loss; FeMaSR, and the first two with `legacy=False`, on the commitment's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.backends import Backend
from fastsr.nn.adapters.base import all_distances, one_hot
from fastsr.nn.vector_quantizer import Quantized, VectorQuantizer


class EmbeddingQuantizer(VectorQuantizer):
    """Images (N, e_dim, H, W), and the codebook in an `nn.Embedding` named `embedding`."""

    embedding: nn.Embedding

    def __init__(self, n_e: int, e_dim: int, beta: float, legacy_beta: bool, backend: Backend) -> None:
        super().__init__(n_e, e_dim, commitment_cost=beta, legacy_beta=legacy_beta, channel_dim=1, backend=backend)
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta

    def _own_codebook(self, codes: Tensor) -> None:
        self.embedding = nn.Embedding(codes.shape[0], codes.shape[1], _weight=codes)

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        return self.embedding.weight

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The codes of flat indices as rows, or with a `shape` (N, H, W, e_dim) as images."""
        rows = self.embedding(indices.flatten())
        return rows if shape is None else rows.view(shape).permute(0, 3, 1, 2).contiguous()


class TamingVectorQuantizer(EmbeddingQuantizer):
    """`taming.modules.vqvae.quantize.VectorQuantizer2`.

    Args:
        n_e, e_dim, beta: codes, channels, beta.
        remap, unknown_index: None and anything: remapped indices are not supported.
        sane_index_shape: indices (N, H, W) instead of (N * H * W).
        legacy: beta on the codebook's term.

    `forward(z)` returns (z_q, loss, (None, None, indices)).
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: None = None,
        unknown_index: Any = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
        *,
        backend: Backend = "auto",
    ) -> None:
        if remap is not None:
            raise ValueError(f"{type(self).__name__}: remap is {remap!r}; expected None, remapped indices are not supported")
        super().__init__(n_e, e_dim, beta, legacy, backend)
        self.legacy, self.remap, self.re_embed, self.sane_index_shape = legacy, remap, n_e, sane_index_shape

    def forward(self, z: Tensor, temp: Any = None, rescale_logits: Any = False, return_logits: Any = False) -> Any:  # type: ignore[override]
        """(N, e_dim, H, W); the other arguments are those of taming's Gumbel quantiser and have no meaning here."""
        found = super().forward(z)
        indices = found.indices if self.sane_index_shape else found.indices.flatten()
        return found.quantized, found.loss, (None, None, indices)


class DiffusersVectorQuantizer(TamingVectorQuantizer):
    """`diffusers.models.autoencoders.vae.VectorQuantizer`: taming's, with `vq_embed_dim` for `e_dim`."""

    def __init__(self, n_e: int, vq_embed_dim: int, beta: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(n_e, vq_embed_dim, beta, *args, **kwargs)
        self.vq_embed_dim = vq_embed_dim


class CodeFormerVectorQuantizer(EmbeddingQuantizer):
    """CodeFormer's `VectorQuantizer` (`basicsr/archs/vqgan_arch.py`).

    `forward(z)` returns (z_q, loss, statistics), a dict with `perplexity`, `min_encodings` (N, K; None without `matrices`),
    `min_encoding_indices` (N, 1), `min_encoding_scores` (N, 1; exp(-distance / 10), which some versions leave out) and `mean_distance`.
    """

    def __init__(self, codebook_size: int, emb_dim: int, beta: float, *, matrices: bool = False, backend: Backend = "auto") -> None:
        super().__init__(codebook_size, emb_dim, beta, True, backend)
        self.emb_dim, self.matrices = emb_dim, matrices

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:  # type: ignore[override]
        out = self._quantize(self._rows(z), None, return_distance=True, mean_distance=True)
        found = self._result(z, out)
        indices = found.indices.reshape(-1, 1)
        statistics = {
            "perplexity": found.perplexity,
            "min_encodings": one_hot(indices, self.codebook_size, z) if self.matrices else None,
            "min_encoding_indices": indices,
            "min_encoding_scores": out.scores.reshape(-1, 1),
            "mean_distance": out.mean_distance,
        }
        return found.quantized, found.loss, statistics

    def get_codebook_feat(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """`get_codebook_entry` by CodeFormer's name."""
        return self.get_codebook_entry(indices, shape)


class RestoreFormerVectorQuantizer(EmbeddingQuantizer):
    """RestoreFormer's `VectorQuantizer` (`RestoreFormer/modules/vqvae/vqvae_arch.py`).

    `forward(z)` returns (z_q, loss, (perplexity, min_encodings, min_encoding_indices, d)): (N, K), (N, 1) and the (N, K) distances; the
    two matrices are None without `matrices`.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float, *, matrices: bool = False, backend: Backend = "auto") -> None:
        super().__init__(n_e, e_dim, beta, True, backend)
        self.matrices = matrices

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:  # type: ignore[override]
        found = super().forward(z)
        indices, encodings, distances = found.indices.reshape(-1, 1), None, None
        if self.matrices:
            encodings = one_hot(indices, self.codebook_size, z)
            distances = all_distances(z.movedim(1, -1).reshape(-1, self.e_dim), self.codebook)
        return found.quantized, found.loss, (found.perplexity, encodings, indices, distances)


class FeMaSRVectorQuantizer(EmbeddingQuantizer):
    """FeMaSR's `VectorQuantizer` (`basicsr/archs/femasr_arch.py`): beta on the commitment's term, a standard normal codebook.

    `forward(z)` returns (z_q, loss, indices (N, 1, H, W)). With `LQ_stage` and `gt_indices`, the codes of the sharp image, the loss is
    FeMaSR's of its second stage: beta (q_gt - z)^2, not averaged, + the mean squared difference of the Gram matrices.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, LQ_stage: bool = False, *, backend: Backend = "auto") -> None:
        super().__init__(int(n_e), int(e_dim), beta, False, backend)
        self.LQ_stage = LQ_stage
        nn.init.normal_(self.embedding.weight)

    def forward(self, z: Tensor, gt_indices: Tensor | None = None, current_iter: Any = None) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        found: Quantized = super().forward(z)
        loss = found.loss
        if self.LQ_stage and gt_indices is not None:
            rows = z.movedim(1, -1)
            sharp = self.embedding(gt_indices.reshape(rows.shape[:-1])).detach()
            loss = self.beta * (sharp - rows).square() + F.mse_loss(_gram(rows), _gram(sharp))
        return found.quantized, loss, found.indices.unsqueeze(1)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Images from indices (N, 1, H, W)."""
        return self.decode(indices.squeeze(1)).contiguous()


def _gram(rows: Tensor) -> Tensor:
    """(N, H, W, D) -> (N, D, D), over H * W."""
    rows = rows.flatten(1, 2)
    return torch.matmul(rows.transpose(1, 2), rows) / rows.shape[1]
