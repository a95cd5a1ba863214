"""Vector quantisers whose codebook is a moving average: vector-quantize-pytorch, and rosinality's vq-vae-2-pytorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.backends import FUSED_DTYPES, Backend
from fastsr.fusion.families.family import Candidate, Fusion, Probe
from fastsr.fusion.structure import Refused
from fastsr.nn import EMAVectorQuantizer, adapters


@dataclass
class State:
    """Whether the block still waits for its first batch."""

    waits: bool


def waits(module: nn.Module) -> bool:
    """True until `module` has its first codebook."""
    return any(name.endswith("initted") and not bool(b) for name, b in module.named_buffers())


@dataclass(frozen=True, eq=False)
class MovingAverage(Fusion):
    """One of `fastsr.nn.adapters` at work on the buffers of the block, which it moves in place as the block would.

    `adapter` owns nothing: it is given views of the block's buffers, and the block's projections, in each call.
    """

    kind = "vector quantiser (moving average)"

    adapter: EMAVectorQuantizer
    state: State

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Any:
        self.bind(module, backend)
        return self.adapter(x)

    def bind(self, module: nn.Module, backend: Backend) -> None:
        """Lend the block's state to the adapter."""
        adapter, theirs = self.adapter, dict(module.named_buffers())
        own = adapter.format.to_own(theirs)  # type: ignore[attr-defined, union-attr, operator]
        if adapter.steps.device != own["codebook"].device:
            adapter.steps = adapter.steps.to(own["codebook"].device)
        adapter._buffers.update({name: own[name] for name in ("codebook", "cluster_size", "cluster_sum")})
        for name in ("project_in", "project_out"):
            if name in adapter._modules:
                adapter._modules[name] = module._modules[name]
        adapter.training, adapter._backend = module.training, backend

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        if self.state.waits:  # for k-means, which the block does itself
            self.state.waits = waits(module)
        if self.state.waits or (not module.training and torch.is_grad_enabled()):  # some have no gradient then
            return False
        return x.dtype in FUSED_DTYPES and x.numel() > 0


def _adapter(module: nn.Module) -> EMAVectorQuantizer | None:
    """The adapter with the options of `module`; None where it is no quantiser that we know."""
    buffers = {name: b for name, b in module.named_buffers() if b is not None}
    if {"embed", "cluster_size", "embed_avg"} == buffers.keys() and buffers["embed"].dim() == 2:
        dim, codes = buffers["embed"].shape
        return adapters.RosinalityQuantize(dim, codes, getattr(module, "decay", 0.99), getattr(module, "eps", 1e-5))
    if not {"_codebook.embed", "_codebook.cluster_size", "_codebook.embed_avg", "_codebook.initted"} <= buffers.keys():
        if "_codebook.embed" in dict(module.named_parameters()):
            raise Refused("its codebook is trained by an optimizer; expected moving averages")
        return None
    book = module._codebook
    options = {name: getattr(module, name) for name in _OPTIONS if hasattr(module, name)}
    options |= {name: getattr(book, name) for name in _BOOK_OPTIONS if hasattr(book, name)}
    return adapters.VectorQuantize(codebook_dim=buffers["_codebook.embed"].shape[-1], **options)


_OPTIONS = (
    "dim", "codebook_size", "heads", "separate_codebook_per_head", "freeze_codebook", "channel_last", "accept_image_fmap",
    "commitment_weight", "rotation_trick", "return_zeros_for_masked_padding",
)  # fmt: skip
_BOOK_OPTIONS = ("decay", "eps", "threshold_ema_dead_code", "use_cosine_sim", "kmeans_iters")


def match_moving_average(module: nn.Module) -> Candidate | None:
    """The buffers of one of the libraries."""
    adapter = _adapter(module)
    if adapter is None:
        return None
    if adapter.revive_below > 0:
        raise Refused(f"dead codes restart at random rows (threshold_ema_dead_code={adapter.revive_below}): ours would be other rows")
    adapter._buffers.update(codebook=None, cluster_size=None, cluster_sum=None)
    adapter._modules.update(dict.fromkeys(adapter._modules))

    def hypotheses(probe: Probe) -> Iterator[MovingAverage]:
        yield MovingAverage((), adapter, State(waits(module)))

    channels = int(module.dim if hasattr(module, "dim") else module.embed.shape[0])  # type: ignore[union-attr, arg-type, index]
    shape: tuple[int, ...] = (64, channels)
    if getattr(module, "accept_image_fmap", False):
        shape = (2, channels, 5, 6)
    elif getattr(module, "channel_last", True) is False:
        shape = (2, channels, 30)
    return Candidate(MovingAverage.kind, shape, hypotheses, moves=True)
