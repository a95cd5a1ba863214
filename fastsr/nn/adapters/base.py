"""What every adapter shares: a state dict in another library's names, and matrices on demand."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastsr.nn.quantizer_states import Format
from fastsr.nn.vector_quantizer import VectorQuantizer

Adapter = TypeVar("Adapter", bound=nn.Module)


class Foreign(VectorQuantizer):
    """Mixed into a quantiser: reads and writes its state in `format`. In `state_dict` our names do not appear."""

    format: Format

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Tensor] = {}
        super()._save_to_state_dict(own, "", keep_vars)
        theirs = self.format.from_own(own, getattr(self, "decay", 0.0))
        destination.update({prefix + name: tensor for name, tensor in theirs.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        theirs = {name: state_dict.pop(prefix + name) for name in self.format.keys if prefix + name in state_dict}
        *_, missing, _, _ = args
        if self.format.codebook not in theirs:
            missing.append(prefix + self.format.codebook)
        else:
            own = self.format.to_own(theirs)
            known = {name for name, _ in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))}
            state_dict.update({prefix + name: tensor for name, tensor in own.items() if name in known})
            super()._load_from_state_dict(state_dict, prefix, *args)


def take_over(theirs: nn.Module, ours: Adapter) -> Adapter:
    """`ours` with the weights, device, dtype and mode of the module that it stands in for.

    The parameters are new ones: make the optimizer afterwards.

    Raises:
        RuntimeError: the states do not fit (sizes, or another library's module).
    """
    ours.load_state_dict(theirs.state_dict())
    like = next(iter((*theirs.parameters(), *theirs.buffers())))
    return ours.to(like.device, like.dtype if like.is_floating_point() else None).train(theirs.training)


def one_hot(indices: Tensor, size: int, like: Tensor) -> Tensor:
    """(N, K) in like's dtype; `F.one_hot` would fill 64-bit integers first."""
    return like.new_zeros((indices.numel(), size)).scatter_(1, indices.reshape(-1, 1), 1.0)


def all_distances(rows: Tensor, codebook: Tensor) -> Tensor:
    """(N, K): |x|^2 + |e|^2 - 2 x.e, as those who return this matrix compute it."""
    products = torch.addmm(codebook.square().sum(1), rows, codebook.t(), alpha=-2)  # one pass over (N, K) less than a sum of three
    return products + rows.square().sum(1, keepdim=True)
