"""Vector quantisers whose codebook is an `nn.Embedding`: taming-transformers, diffusers, CodeFormer, RestoreFormer, FeMaSR, zalando's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import FUSED_DTYPES, Backend
from fastsr.fusion.families.family import Candidate, Fusion, Probe
from fastsr.fusion.structure import Refused, owners, part
from fastsr.nn.adapters.base import all_distances, one_hot


@dataclass(frozen=True)
class Found:
    """What a quantiser of images z (N, D, H, W) has found."""

    z: Tensor
    codes: Tensor
    quantized: Tensor
    loss: Tensor
    out: ops.VQOutput

    @property
    def indices(self) -> Tensor:
        """(N * H * W, 1)"""
        return self.out.indices.reshape(-1, 1)

    @property
    def encodings(self) -> Tensor:
        """(N * H * W, K), a one in each row."""
        return one_hot(self.indices, len(self.codes), self.z)

    @property
    def distances(self) -> Tensor:
        """(N * H * W, K)"""
        return all_distances(self.z.movedim(1, -1).reshape(-1, self.z.shape[1]), self.codes)


def _statistics(f: Found, scores: bool) -> dict[str, Tensor]:
    found = {"perplexity": f.out.perplexity, "min_encodings": f.encodings, "min_encoding_indices": f.indices}
    if scores:
        found["min_encoding_scores"] = f.out.scores.reshape(-1, 1)
    return {**found, "mean_distance": f.out.mean_distance}  # type: ignore[dict-item]


def _dictionary(f: Found) -> dict[str, Tensor]:
    found = {"quantize": f.quantized, "loss": f.loss, "perplexity": f.out.perplexity, "encodings": f.encodings}
    return {**found, "encoding_indices": f.out.indices, "distances": f.distances}


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


ALONE = "the images alone"

#: What the libraries return. The matrices of all rows by all codes are made only where the block returns them.
RETURNS: dict[str, Callable[[Found], Any]] = {
    ALONE: lambda f: f.quantized,
    "taming": lambda f: (f.quantized, f.loss, (None, None, f.out.indices.flatten())),
    "taming, indices as images": lambda f: (f.quantized, f.loss, (None, None, f.out.indices)),
    "FeMaSR": lambda f: (f.quantized, f.loss, f.out.indices.unsqueeze(1)),
    "taming, with encodings": lambda f: (f.quantized, f.loss, (f.out.perplexity, f.encodings, f.indices)),
    "RestoreFormer": lambda f: (f.quantized, f.loss, (f.out.perplexity, f.encodings, f.indices, f.distances)),
    "CodeFormer": lambda f: (f.quantized, f.loss, _statistics(f, True)),
    "CodeFormer without scores": lambda f: (f.quantized, f.loss, _statistics(f, False)),
    "zalando": lambda f: (f.loss, f.quantized, f.out.perplexity, f.encodings),
    "zalando, with indices": lambda f: (f.loss, f.quantized, f.out.perplexity, f.encodings, f.indices),
    "images and loss": lambda f: (f.quantized, f.loss),
    "images, loss and indices": lambda f: (f.quantized, f.loss, f.out.indices),
    "images, loss and flat indices": lambda f: (f.quantized, f.loss, f.out.indices.flatten()),
    "sonnet": lambda f: _dictionary(f),
}


@dataclass(frozen=True)
class Quantizer(Fusion):
    """`fastsr.ops.vector_quantize`; `convs` is the embedding alone. Its gradient is straight through."""

    kind = "vector quantiser"

    beta: float
    legacy: bool  #: beta on the codebook's term
    returns: str

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Any:
        codes: Tensor = part(module, self.convs[0]).weight
        wide = torch.promote_types(x.dtype, codes.dtype)
        distance = self.returns.startswith("CodeFormer")
        options = {"channel_dim": 1, "return_distance": distance, "mean_distance": distance, "backend": backend}
        if self.returns == ALONE:  # no loss, so that nothing need be kept
            with torch.no_grad():
                quantized = ops.vector_quantize(x.to(wide), codes.to(wide), **options).quantized  # type: ignore[arg-type]
            return _StraightThrough.apply(x, quantized)
        out = ops.vector_quantize(x.to(wide), codes.to(wide), **options)  # type: ignore[arg-type]
        terms = (out.commitment_loss, out.codebook_loss)
        first, second = terms if self.legacy else reversed(terms)
        loss = first + self.beta * second
        return RETURNS[self.returns](Found(x, codes, out.quantized, loss, out))

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        codes = part(module, self.convs[0]).weight
        if x.dim() != 4 or x.shape[1] != codes.shape[1] or x.device != codes.device or x.numel() == 0:
            return False
        if x.dtype not in FUSED_DTYPES or codes.dtype not in FUSED_DTYPES:
            return False
        return x.dtype == codes.dtype or torch.is_autocast_enabled(x.device.type)


def match_quantizer(module: nn.Module) -> Candidate | None:
    """An `nn.Embedding` and nothing else that has parameters, in a module that is no embedding itself."""
    parts = owners(module)
    if len(parts) != 1 or not parts[0][0] or not isinstance(parts[0][1], nn.Embedding):
        return None
    path, embedding = parts[0]
    if type(module).forward is nn.Sequential.forward:
        return None
    if embedding.max_norm is not None or embedding.padding_idx is not None:
        raise Refused(f"{'.'.join(path)} has max_norm {embedding.max_norm} and padding_idx {embedding.padding_idx}; expected neither")
    numbers = {v for v in module.__dict__.values() if type(v) is float} or {0.25}

    def hypotheses(probe: Probe) -> Iterator[Quantizer]:
        for returns in RETURNS:
            for beta in sorted(numbers):
                for legacy in (True, False):
                    yield Quantizer((path,), beta, legacy, returns)

    return Candidate(Quantizer.kind, (2, embedding.embedding_dim, 5, 6), hypotheses)
