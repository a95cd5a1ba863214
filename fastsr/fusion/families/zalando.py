"""The moving-average quantiser of zalandoresearch's pytorch-vq-vae, which has been copied far and wide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import FUSED_DTYPES, Backend
from fastsr.fusion.families.family import Candidate, Fusion, Probe
from fastsr.fusion.families.quantizers import RETURNS, Found
from fastsr.fusion.structure import Refused


@dataclass(frozen=True)
class ZalandoAverage(Fusion):
    """`fastsr.ops.vector_quantize`, whose counts and sums are what the averages need. In training, as in that code,

        size <- (s + eps) / (n + K eps) n,  s = decay * size + (1 - decay) * counts,  n = sum of s;    the smoothed sizes are kept
        w <- decay * w + (1 - decay) * sums;    codes <- w / size

    and w and the codes are new parameters, as they are there. `convs` is the embedding alone.
    """

    kind = "vector quantiser (moving average)"

    sizes: str
    sums: str
    decay: float
    eps: float
    beta: float

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Any:
        embedding: Any = getattr(module, self.convs[0][0])
        codes = embedding.weight.detach()
        out = ops.vector_quantize(x.to(codes.dtype), codes, channel_dim=1, backend=backend)
        if module.training:
            with torch.no_grad():
                size = getattr(module, self.sizes) * self.decay + (1 - self.decay) * out.counts
                size = (size + self.eps) / (size.sum() + len(codes) * self.eps) * size.sum()
                w = getattr(module, self.sums) * self.decay + (1 - self.decay) * out.sums.to(codes.dtype)
                setattr(module, self.sizes, size)
                setattr(module, self.sums, nn.Parameter(w))
                embedding.weight = nn.Parameter(w / size.unsqueeze(1))
        return RETURNS["zalando"](Found(x, codes, out.quantized, self.beta * out.commitment_loss, out))

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        codes: Any = getattr(module, self.convs[0][0]).weight
        return x.dim() == 4 and x.shape[1] == codes.shape[1] and x.dtype == codes.dtype and x.dtype in FUSED_DTYPES and x.numel() > 0


def match_zalando(module: nn.Module) -> Candidate | None:
    """An `nn.Embedding`, a buffer of a value for each code, and a parameter of the codes' shape."""
    embeddings = [(name, m) for name, m in module.named_children() if type(m) is nn.Embedding]
    if len(embeddings) != 1 or len(list(module.children())) != 1:
        return None
    name, embedding = embeddings[0]
    codes: Tensor = embedding.weight  # type: ignore[assignment]
    sizes = [k for k, b in module._buffers.items() if b is not None and b.shape == codes.shape[:1]]
    sums = [k for k, p in module._parameters.items() if p is not None and p.shape == codes.shape]
    if len(sizes) != 1 or len(sums) != 1 or len([*module.parameters(), *module.buffers()]) != 3:
        return None
    numbers = [[v for k, v in module.__dict__.items() if type(v) is float and word in k] for word in ("decay", "eps", "commit")]
    if any(len(found) != 1 for found in numbers):
        raise Refused("its decay, epsilon and commitment cost are not attributes of those names")
    (decay,), (eps,), (beta,) = numbers

    def hypotheses(probe: Probe) -> Iterator[ZalandoAverage]:
        yield ZalandoAverage(((name,),), sizes[0], sums[0], decay, eps, beta)

    return Candidate(ZalandoAverage.kind, (2, codes.shape[1], 5, 6), hypotheses, moves=True)
