"""Several quantisers in a row, each for what the ones before left over.

Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec", 2021, arXiv 2107.03312.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsr.backends import Backend
from fastsr.nn.ema_vector_quantizer import EMAVectorQuantizer
from fastsr.nn.module import Module
from fastsr.nn.vector_quantizer import Quantized, VectorQuantizer


class ResidualVectorQuantizer(Module):
    """`num_quantizers` codes for each row. With r_1 = x, for stage s:

        1. q_s     = nearest code of r_s in codebook s
        2. r_(s+1) = r_s - sg(q_s)                                                     (sg: stop-gradient)
        3. q       = q_1 + q_2 + ...
        4. loss    = the sum of the stages' losses

    With "straight_through" the gradient of q reaches x once, unchanged, however many stages there are; with "rotation" each
    stage rotates it on its own and the results are added, as in vector-quantize-pytorch.

    Args:
        num_quantizers: stages.
        codebook_size, codebook_dim: of each.
        decay: of moving averages; None for codebooks that the optimizer trains.
        backend: "auto", "compiled", "triton" or "reference".
        **options: of `EMAVectorQuantizer`, without `decay` of `VectorQuantizer`. `num_heads` and "cosine" are not
            among them: the residual of a unit vector is none.

    Attributes:
        stages: the quantisers.

    Raises:
        ValueError: a size or a name that does not exist.
    """

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int,
        *,
        decay: float | None = 0.99,
        backend: Backend = "auto",
        **options: Any,
    ) -> None:
        if num_quantizers < 1:
            raise ValueError(f"ResidualVectorQuantizer: num_quantizers is {num_quantizers}; expected at least 1")
        if options.get("metric", "euclidean") != "euclidean" or options.get("num_heads", 1) != 1:
            raise ValueError("ResidualVectorQuantizer: expected metric='euclidean' and num_heads=1")
        super().__init__(backend)
        kind: type[VectorQuantizer] = VectorQuantizer
        if decay is not None:
            kind, options = EMAVectorQuantizer, {"decay": decay, **options}
        stages = [kind(codebook_size, codebook_dim, backend=backend, **options) for _ in range(num_quantizers)]
        self.stages = nn.ModuleList(stages)
        self.gradient, self.channel_dim = stages[0].gradient, stages[0].channel_dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Arguments as in `VectorQuantizer`.

        Returns:
            `quantized` and the scalar `loss`; `indices` with the stages last, (..., num_quantizers); `codebook_loss`,
            `commitment_loss`, `counts` and `perplexity` with the stages first, (num_quantizers, ...).
        """
        residual, parts = x, []
        for stage in self.stages:
            part = stage(residual, mask)
            residual = residual - part.quantized.detach()
            parts.append(part)
        quantized = torch.stack([part.quantized for part in parts]).sum(0)
        if self.gradient == "straight_through":
            quantized = quantized.detach() + (x - x.detach())
        _, indices, loss, *statistics = zip(*parts, strict=True)
        return Quantized(quantized, torch.stack(indices, -1), torch.stack(loss).sum(), *(torch.stack(s) for s in statistics))

    def encode(self, x: Tensor) -> Tensor:
        """The indices alone, (..., num_quantizers)."""
        indices = []
        for stage in self.stages:
            indices.append(stage.encode(x))  # type: ignore[operator]
            x = x - stage.decode(indices[-1]).to(x.dtype)  # type: ignore[operator]
        return torch.stack(indices, -1)

    def decode(self, indices: Tensor) -> Tensor:
        """The sum of the codes of (..., num_quantizers) indices; fewer stages give a coarser result."""
        codes = [stage.decode(i) for stage, i in zip(self.stages, indices.unbind(-1), strict=False)]  # type: ignore[operator]
        return torch.stack(codes).sum(0)
