"""The vector quantiser whose codes are moving averages of the rows that choose them.

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937, appendix A.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsr import ops
from fastsr.backends import Backend
from fastsr.nn.codebook import step, with_heads
from fastsr.nn.kmeans import kmeans
from fastsr.nn.vector_quantizer import Gradient, Metric, Quantized, VectorQuantizer


class EMAVectorQuantizer(VectorQuantizer):
    """A codebook that no optimizer sees: each training call moves it towards the rows that chose its codes.

        1. to 3. as in `VectorQuantizer`, but loss = commitment_cost * commitment_loss
        4. in training mode, after 3: the averages and the codebook take a step (`fastsr.nn.codebook.step`)

    With several ranks of torch.distributed and `sync`, step 4 adds up the statistics of all ranks, so their codebooks stay equal:
    in training mode all ranks must call this module equally often. Evaluation mode never communicates.

    Step 4 waits for nothing on the device and fits in a CUDA graph, except in the first call with `kmeans_init` (`initialise`).
    Recomputing this module in backward (activation checkpointing) would take step 4 twice: keep it outside of the recomputed part.

    The codebook and the averages stay in float32 when the module is cast to a lower precision.

    Args:
        codebook_size, codebook_dim, num_heads, metric, gradient, commitment_cost, channel_dim, backend: as in `VectorQuantizer`.
        decay: of the averages, 0 to 1.
        eps: of the Laplace smoothing.
        zero_debias: the averages begin at zero and are divided by 1 - decay^t (sonnet); else at one row for each code, the code itself.
        revive_below: codes whose average size falls below so many rows of a batch restart at random rows of it; 0 for never.
        kmeans_init: the first training batch's k-means centres are the first codebook.
        kmeans_iterations: of it.
        sync: join the ranks of torch.distributed.

    Attributes (buffers, all in the state dict):
        codebook: (K, D), or (num_heads, K, D).
        cluster_size, cluster_sum: the averages N and m of the counts and the sums.
        steps: int64, how many steps were taken; -1 while the codebook waits for k-means.

    Raises:
        ValueError: a size or a name that does not exist.
    """

    cluster_size: Tensor
    cluster_sum: Tensor
    steps: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        num_heads: int = 1,
        metric: Metric = "euclidean",
        gradient: Gradient = "straight_through",
        commitment_cost: float = 0.25,
        channel_dim: int = -1,
        decay: float = 0.99,
        eps: float = 1e-5,
        zero_debias: bool = False,
        revive_below: float = 0.0,
        kmeans_init: bool = False,
        kmeans_iterations: int = 10,
        sync: bool = True,
        backend: Backend = "auto",
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMAVectorQuantizer: decay is {decay}; expected 0 <= decay < 1")
        super().__init__(
            codebook_size,
            codebook_dim,
            num_heads=num_heads,
            metric=metric,
            gradient=gradient,
            commitment_cost=commitment_cost,
            channel_dim=channel_dim,
            backend=backend,
        )
        self.decay, self.eps, self.zero_debias, self.revive_below = decay, eps, zero_debias, revive_below
        self.kmeans_iterations, self.sync = kmeans_iterations, sync
        start = torch.zeros_like if zero_debias else torch.clone
        self.register_buffer("cluster_size", start(torch.ones(self.codebook.shape[:-1])))
        self.register_buffer("cluster_sum", start(self.codebook))
        self.register_buffer("steps", torch.full((), -1 if kmeans_init else 0))
        self._waits = kmeans_init  # for k-means; on the host, where asking costs nothing

    def _own_codebook(self, codes: Tensor) -> None:
        self.register_buffer("codebook", codes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantise x, and in training mode move the codebook; arguments and result as in `VectorQuantizer`.

        While training with `sync`, `counts` and `perplexity` are those of all ranks.
        """
        return self._forward(x, mask, self.training)

    def _forward(self, x: Tensor, mask: Tensor | None, moves: bool) -> Quantized:
        rows, mask = self._rows(x), self._mask(x, mask)
        if moves and self._waits:
            self._initialise(rows, mask)
        out = self._quantize(rows, mask)
        if moves:
            self._step(rows, mask, out)
        return self._result(x, out)

    def initialise(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the codebook to the k-means centres of x (as in `forward`), whether or not it was set before.

        The first training call with `kmeans_init` does this on its own; call it beforehand where that call must be a graph
        (`torch.compile(fullgraph=True)`, CUDA graphs). A collective, as `forward` is.
        """
        self._initialise(self._rows(x), self._mask(x, mask))

    @torch.no_grad()
    def _initialise(self, rows: Tensor, mask: Tensor | None) -> None:
        last = self._channels_last(rows)
        centres, counts = kmeans(
            last.to(self._search_dtype(rows)),
            self.codebook_size,
            self.kmeans_iterations,
            valid=self._row_mask(mask),
            cosine=self.metric == "cosine",
            sync=self.sync,
            backend=self.backend,
        )
        share = 1 - self.decay if self.zero_debias else 1.0  # as if the batch had been the first step
        self.codebook.copy_(centres.view_as(self.codebook))
        self.cluster_size.copy_(counts.view_as(self.cluster_size) * share)
        self.cluster_sum.copy_(self.codebook * self.cluster_size[..., None])
        self.steps.fill_(int(self.zero_debias))
        self._waits = False

    def _step(self, rows: Tensor, mask: Tensor | None, out: ops.VQOutput) -> None:
        step(
            *(with_heads(t, self.num_heads) for t in (self.codebook, self.cluster_size, self.cluster_sum, out.counts, out.sums)),
            rows=self._channels_last(rows),
            valid=self._row_mask(mask),
            decay=self.decay,
            eps=self.eps,
            steps=self.steps,
            zero_debias=self.zero_debias,
            revive_below=self.revive_below,
            cosine=self.metric == "cosine",
            sync=self.sync,
        )

    def _channels_last(self, rows: Tensor) -> Tensor:
        """A view (..., heads, D)."""
        rows = rows.detach()
        if self.num_heads == 1:
            return rows.movedim(self._channel_dim, -1).unsqueeze(-2)
        return rows.movedim((self._channel_dim - 1, self._channel_dim), (-2, -1))

    def _row_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask without a size for the heads."""
        return mask if mask is None or self.num_heads == 1 else mask.squeeze(self.channel_dim)

    def _codes(self, x: Tensor | None = None) -> Tensor:
        return self.codebook if x is None else self.codebook.to(self._search_dtype(x))  # of norm 1 for "cosine"

    def _loss(self, codebook_loss: Tensor, commitment_loss: Tensor) -> Tensor:
        return self.commitment_cost * commitment_loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.steps.is_meta:
            self._waits = self.steps.item() < 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}, zero_debias={self.zero_debias}, revive_below={self.revive_below}"
