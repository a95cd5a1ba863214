"""Stand-ins for quantisers with moving averages: vector-quantize-pytorch, rosinality's vq-vae-2-pytorch, sonnet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.backends import Backend
from fastsr.nn.adapters.base import Foreign, all_distances, one_hot
from fastsr.nn.ema_vector_quantizer import EMAVectorQuantizer
from fastsr.nn.quantizer_states import FORMATS


class VectorQuantize(Foreign, EMAVectorQuantizer):
    """`vector_quantize_pytorch.VectorQuantize` with moving averages, and the same defaults: decay 0.8, the rotation trick.

    Args:
        dim, codebook_size, codebook_dim, heads, separate_codebook_per_head, decay, eps, freeze_codebook, kmeans_init, kmeans_iters,
        use_cosine_sim, threshold_ema_dead_code, channel_last, accept_image_fmap, commitment_weight, rotation_trick,
        return_zeros_for_masked_padding: as there. sync_codebook: None for joining ranks where there are any.

    `forward(x, mask=None, freeze_codebook=None)` returns (quantized, indices, loss): loss is commitment_weight times the commitment
    loss while training, else 0; masked rows are 0 (or x), their indices -1. Options of theirs that are not named here
    (learnable or orthogonal codebooks, sampling, affine parameters, ...) are refused.
    """

    format = FORMATS["vector-quantize-pytorch"]

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        *,
        backend: Backend = "auto",
    ) -> None:
        codebook_dim = dim if codebook_dim is None else codebook_dim
        rotation = dim > 1 if rotation_trick is None else rotation_trick
        super().__init__(
            codebook_size,
            codebook_dim,
            num_heads=heads if separate_codebook_per_head else 1,
            metric="cosine" if use_cosine_sim else "euclidean",
            gradient="rotation" if rotation else "straight_through",
            commitment_cost=commitment_weight,
            decay=decay,
            eps=eps,
            revive_below=threshold_ema_dead_code,
            kmeans_init=kmeans_init,
            kmeans_iterations=kmeans_iters,
            sync=sync_codebook is not False,
            backend=backend,
        )
        self.dim, self.heads, self.separate_codebook_per_head = dim, heads, separate_codebook_per_head
        self.freeze_codebook, self.channel_last, self.accept_image_fmap = freeze_codebook, channel_last, accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        inside = codebook_dim * heads
        self.project_in = nn.Linear(dim, inside) if inside != dim else nn.Identity()
        self.project_out = nn.Linear(inside, dim) if inside != dim else nn.Identity()

    def _first_codes(self) -> Tensor:
        codes = nn.init.kaiming_uniform_(torch.empty(self.num_heads, self.codebook_size, self.codebook_dim))
        codes = codes if self.num_heads > 1 else codes[0]
        return F.normalize(codes, dim=-1) if self.metric == "cosine" else codes

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, freeze_codebook: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, N, dim) or (B, dim); (B, dim, N) without `channel_last`; (B, dim, H, W) with `accept_image_fmap`."""
        first = x.dim() > 2 and (self.accept_image_fmap or not self.channel_last)
        rows = x.movedim(1, -1) if first else x
        z = self.project_in(rows)
        shared = self.heads > 1 and not self.separate_codebook_per_head
        if shared:  # the heads' rows are rows of one codebook
            z = z.unflatten(-1, (self.heads, self.codebook_dim))
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        kept = mask.unsqueeze(-1).expand(z.shape[:-1]) if mask is not None and shared else mask
        found = self._forward(z, kept, self.training and not freeze)
        quantized = self.project_out(found.quantized.flatten(-2) if shared else found.quantized)
        indices, loss = found.indices, found.loss if self.training else found.loss.new_zeros(())
        if mask is not None:
            quantized = torch.where(mask.unsqueeze(-1), quantized, 0 if self.return_zeros_for_masked_padding else rows)
            indices = torch.where(mask if indices.dim() == mask.dim() else mask.unsqueeze(-1), indices, -1)
        return (quantized.movedim(-1, 1) if first else quantized), indices, loss

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices, before `project_out`; channels where x has them."""
        shared = self.heads > 1 and not self.separate_codebook_per_head
        codes = self.decode(indices).flatten(-2) if shared else self.decode(indices)
        return codes if self.channel_last and not self.accept_image_fmap else codes.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The same after `project_out`."""
        return self.project_out(self.get_codes_from_indices(indices))


class RosinalityQuantize(Foreign, EMAVectorQuantizer):
    """`Quantize` of rosinality's vq-vae-2-pytorch.

    `forward(input)` with channels last returns (quantize, diff, indices); diff is the plain commitment loss, which that code
    multiplies by `latent_loss_weight` outside.
    """

    format = FORMATS["rosinality"]

    def __init__(self, dim: int, n_embed: int, decay: float = 0.99, eps: float = 1e-5, *, backend: Backend = "auto") -> None:
        super().__init__(n_embed, dim, commitment_cost=1.0, decay=decay, eps=eps, backend=backend)
        self.dim, self.n_embed = dim, n_embed

    def _first_codes(self) -> Tensor:
        return torch.randn(self.codebook_size, self.codebook_dim)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        found = super().forward(input)
        return found.quantized, found.loss, found.indices

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """The codes of indices, channels last."""
        return self.decode(embed_id)


class SonnetVectorQuantizerEMA(Foreign, EMAVectorQuantizer):
    """sonnet's `VectorQuantizerEMA`: averages debiased, channels last.

    `forward(inputs)` returns a dict with `quantize`, `loss`, `perplexity`, `encodings` (N, K), `encoding_indices` and `distances`
    (N, K); the two matrices are None without `matrices`. `is_training`, if given, stands for the mode of the module.
    """

    format = FORMATS["sonnet"]

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int,
        commitment_cost: float,
        decay: float,
        epsilon: float = 1e-5,
        *,
        matrices: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            commitment_cost=commitment_cost,
            decay=decay,
            eps=epsilon,
            zero_debias=True,
            backend=backend,
        )
        self.embedding_dim, self.num_embeddings, self.epsilon, self.matrices = embedding_dim, num_embeddings, epsilon, matrices

    def _first_codes(self) -> Tensor:
        bound = (3 / self.codebook_dim) ** 0.5  # sonnet's VarianceScaling, uniform, of a (D, K) matrix
        return torch.empty(self.codebook_size, self.codebook_dim).uniform_(-bound, bound)

    def forward(self, inputs: Tensor, is_training: bool | None = None) -> dict[str, Tensor | None]:  # type: ignore[override]
        encodings, distances = None, None
        if self.matrices:  # of the codes before the step
            with torch.no_grad():
                distances = all_distances(inputs.reshape(-1, self.codebook_dim), self.codebook)
        found = self._forward(inputs, None, self.training if is_training is None else is_training)
        if self.matrices:
            encodings = one_hot(found.indices, self.codebook_size, inputs)
        return {
            "quantize": found.quantized,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "encodings": encodings,
            "encoding_indices": found.indices,
            "distances": distances,
        }

    def quantize(self, encoding_indices: Tensor) -> Tensor:
        """The codes of indices, channels last."""
        return self.decode(encoding_indices)
