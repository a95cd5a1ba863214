"""The vector quantiser whose codebook is a parameter, and what every quantiser here shares.

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend, autocasts
from fastsr.nn.module import Module

Metric = Literal["euclidean", "cosine"]
Gradient = Literal["straight_through", "rotation"]


class Quantized(NamedTuple):
    """What a quantiser returns; the three losses are apart, so that each can be weighted, logged or left out."""

    quantized: Tensor  #: like x; its gradient goes to x
    indices: Tensor  #: int64: x's shape without channels, or with the heads in the channels' place
    loss: Tensor  #: codebook_loss + commitment_cost * commitment_loss; with `legacy_beta` the cost weighs the codebook's term
    codebook_loss: Tensor  #: mean of (sg(x) - q)^2: trains the codebook, if that is a parameter
    commitment_loss: Tensor  #: mean of (x - sg(q))^2: trains the encoder
    counts: Tensor  #: (K,) or (heads, K) int64: how many rows of this batch have each code
    perplexity: Tensor  #: exp of the entropy of `counts`, scalar or (heads,): 1 to K


class VectorQuantizer(Module):
    """A codebook that the optimizer trains. For rows x_i of D channels and codes e_k:

        1. index_i = argmin over k of |x_i - e_k|^2, exact (`fastsr.ops.vq_nearest`)
        2. q_i     = e[index_i]
        3. loss    = mean |sg(x) - q|^2 + commitment_cost * mean |x - sg(q)|^2             (sg: stop-gradient)

    The gradient of q reaches x unchanged ("straight_through") or by the rotation trick ("rotation", arXiv 2410.06424).
    With metric "cosine", x and e are first divided by their norms, so q and the losses are those of unit vectors.

    The search is float32 under autocast, and wherever the codebook is; q comes back in x's dtype.

    Args:
        codebook_size: K.
        codebook_dim: D, the channels of one head.
        num_heads: x has num_heads * D channels, and each D of them a codebook of their own.
        metric: "euclidean" or "cosine".
        gradient: "straight_through" or "rotation".
        commitment_cost: beta.
        legacy_beta: put beta on the codebook's term instead, as taming-transformers, CodeFormer and RestoreFormer do.
        channel_dim: -1 for x (..., C), 1 for x (N, C, ...).
        backend: "auto", "compiled", "triton" or "reference".

    Attributes:
        codebook: (K, D), or (num_heads, K, D) for several heads; uniform in (-1/K, 1/K) at first, for "cosine" random directions.

    Raises:
        ValueError: a size or a name that does not exist.
    """

    codebook: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        num_heads: int = 1,
        metric: Metric = "euclidean",
        gradient: Gradient = "straight_through",
        commitment_cost: float = 0.25,
        legacy_beta: bool = False,
        channel_dim: int = -1,
        backend: Backend = "auto",
    ) -> None:
        name = type(self).__name__
        for what, size in (("codebook_size", codebook_size), ("codebook_dim", codebook_dim), ("num_heads", num_heads)):
            if size < 1:
                raise ValueError(f"{name}: {what} is {size}; expected at least 1")
        for what, value, known in (
            ("metric", metric, ("euclidean", "cosine")),
            ("gradient", gradient, ("straight_through", "rotation")),
            ("channel_dim", channel_dim, (-1, 1)),
        ):
            if value not in known:
                raise ValueError(f"{name}: {what} is {value!r}; expected {known[0]!r} or {known[1]!r}")
        super().__init__(backend)
        self.codebook_size, self.codebook_dim, self.num_heads = codebook_size, codebook_dim, num_heads
        self.metric, self.gradient, self.channel_dim = metric, gradient, channel_dim
        self.commitment_cost, self.legacy_beta = commitment_cost, legacy_beta
        self._own_codebook(self._first_codes())

    def _own_codebook(self, codes: Tensor) -> None:
        self.codebook = nn.Parameter(codes)

    def _first_codes(self) -> Tensor:
        shape = (self.codebook_size, self.codebook_dim)
        codes = torch.empty(shape if self.num_heads == 1 else (self.num_heads, *shape))
        if self.metric == "cosine":
            return F.normalize(codes.normal_(), dim=-1)
        return codes.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantise x.

        Args:
            x: (..., C) or (N, C, ...), C = num_heads * codebook_dim; float32, float16, bfloat16 or float64; any strides.
            mask: bool, of x's shape without channels; rows where it is False have no part in losses and counts.

        Raises:
            ValueError: shapes that do not fit.
            TypeError: an unsupported dtype.
        """
        rows, mask = self._rows(x), self._mask(x, mask)
        return self._result(x, self._quantize(rows, mask))

    def encode(self, x: Tensor) -> Tensor:
        """The indices alone."""
        x = self._rows(x)
        codes = self._codes(x)
        return ops.vq_nearest(x.to(codes.dtype), codes, channel_dim=self._channel_dim, backend=self.backend)  # type: ignore[return-value]

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of `indices`, as `forward` lays out `quantized`, in the codebook's dtype."""
        codes = self._codes()
        if self.num_heads == 1:
            rows = F.embedding(indices, codes)
        else:
            heads = torch.arange(self.num_heads, device=codes.device)
            rows = codes[heads, indices.movedim(self.channel_dim, -1)].flatten(-2)
        return rows.movedim(-1, self.channel_dim)

    @property
    def _channel_dim(self) -> int:
        """Of x with its heads apart."""
        return 2 if self.channel_dim == 1 and self.num_heads > 1 else self.channel_dim

    def _rows(self, x: Tensor) -> Tensor:
        """x, its heads apart just before the channels of one head; for "cosine" of norm 1."""
        channels = self.num_heads * self.codebook_dim
        if x.dim() <= max(self.channel_dim, 0) or x.shape[self.channel_dim] != channels:
            wanted = f"(..., {channels})" if self.channel_dim == -1 else f"(N, {channels}, ...)"
            raise ValueError(f"{type(self).__name__}: x has shape {tuple(x.shape)}; expected {wanted}")
        if self.num_heads > 1:
            x = x.unflatten(self.channel_dim, (self.num_heads, self.codebook_dim))
        return F.normalize(x.to(self._search_dtype(x)), dim=self._channel_dim) if self.metric == "cosine" else x

    def _mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        shape = list(x.shape)
        del shape[self.channel_dim]
        if mask.dtype != torch.bool or list(mask.shape) != shape:
            raise ValueError(
                f"{type(self).__name__}: mask is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape {tuple(shape)}"
            )
        return mask if self.num_heads == 1 else mask.unsqueeze(self.channel_dim)

    def _search_dtype(self, x: Tensor) -> torch.dtype:
        """Float32 at least where the codebook is, and everywhere under autocast; what is no float stays, for the operator to refuse."""
        if not x.is_floating_point():
            return x.dtype
        cast = autocasts(x.device.type)
        return torch.promote_types(torch.promote_types(x.dtype, self.codebook.dtype), torch.float32 if cast else x.dtype)

    def _codes(self, x: Tensor | None = None) -> Tensor:
        """The codebook that is searched, in the dtype for x."""
        codes = self.codebook if x is None else self.codebook.to(self._search_dtype(x))
        return F.normalize(codes, dim=-1) if self.metric == "cosine" else codes

    def _quantize(self, rows: Tensor, mask: Tensor | None, **options: bool) -> ops.VQOutput:
        codes = self._codes(rows)
        options = {"channel_dim": self._channel_dim, "mask": mask, "gradient": self.gradient, "backend": self.backend, **options}  # type: ignore[dict-item]
        return ops.vector_quantize(rows.to(codes.dtype), codes, **options)  # type: ignore[arg-type]

    def _result(self, x: Tensor, out: ops.VQOutput) -> Quantized:
        loss = self._loss(out.codebook_loss, out.commitment_loss)
        quantized = out.quantized.to(x.dtype)
        if self.num_heads > 1:
            quantized = quantized.flatten(self._channel_dim - 1, self._channel_dim)
        return Quantized(quantized, out.indices, loss, out.codebook_loss, out.commitment_loss, out.counts, out.perplexity)

    def _loss(self, codebook_loss: Tensor, commitment_loss: Tensor) -> Tensor:
        if self.legacy_beta:
            return commitment_loss + self.commitment_cost * codebook_loss
        return codebook_loss + self.commitment_cost * commitment_loss

    def extra_repr(self) -> str:
        heads = f", num_heads={self.num_heads}" * (self.num_heads > 1)
        legacy = ", legacy_beta=True" * self.legacy_beta
        return (
            f"{self.codebook_size}, {self.codebook_dim}{heads}, metric={self.metric!r}, gradient={self.gradient!r}, "
            f"commitment_cost={self.commitment_cost}{legacy}, channel_dim={self.channel_dim}"
        )
