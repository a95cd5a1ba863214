"""Freezing a network for inference: every convolution's weights are packed once instead of in each call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from fastsr import ops

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Freezable(nn.Module):
    """A module whose weights can be packed. Moving, casting or loading drops them, and it works as before."""

    packed: Tensor | None = None
    pixel_shuffle: int = 1  # as the op gets it

    def weights_to_pack(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """The weights and biases of the op that `forward` calls; empty if it calls none with packed weights."""
        raise NotImplementedError

    def parts_packed_here(self) -> Iterable[nn.Module]:
        """Modules inside whose weights this one packs for them."""
        return ()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)


def freeze(model: AnyModule) -> AnyModule:
    """Prepare `model` for inference: evaluation mode, no gradients, weights packed once.

    From here on no weight may change in place (by an optimizer, an EMA update or `.data`): the packed copies would not
    follow. `.to(...)`, `.half()` and `load_state_dict` drop them, so freeze after those. `unfreeze` drops them too. Costs one
    more copy of the weights. Calls with gradients switched on ignore the packed weights.

    Returns:
        `model` itself.
    """
    unfreeze(model).eval().requires_grad_(False)
    elsewhere = {part for m in model.modules() if isinstance(m, Freezable) for part in m.parts_packed_here()}
    for module in model.modules():
        if isinstance(module, Freezable) and module not in elsewhere:
            weights, biases = module.weights_to_pack()
            module.packed = ops.pack_weights(weights, biases, module.pixel_shuffle) if weights else None
    return model


def unfreeze(model: AnyModule) -> AnyModule:
    """Drop what `freeze` packed; mode and `requires_grad` stay as they are. Returns `model` itself."""
    for module in model.modules():
        if isinstance(module, Freezable):
            module.packed = None
    return model
