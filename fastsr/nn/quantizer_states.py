"""The state of a vector quantiser in the names and layouts of the libraries that have one.

This package's own state is `codebook` (K, D) or (heads, K, D), for moving averages with `cluster_size`, `cluster_sum` and `steps`:

    format                     codebook                            averages
    embedding                  embedding.weight (K, D)             none
    zalando                    _embedding.weight (K, D)            _ema_cluster_size (K), _ema_w (K, D)
    vector-quantize-pytorch    _codebook.embed (heads, K, D)       _codebook.cluster_size, _codebook.embed_avg; initted: not before k-means
    rosinality                 embed (D, K)                        cluster_size (K), embed_avg (D, K)
    sonnet                     embeddings (D, K)                   ema_cluster_size.hidden (K), ema_dw.hidden (D, K), .counter: the steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsr.nn.codebook import debias

State = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How one library names and lays out what we call `codebook`, `cluster_size`, `cluster_sum` and `steps`."""

    name: str
    codebook: str
    cluster_size: str = ""
    cluster_sum: str = ""
    steps: str = ""  #: of an integer
    initialised: str = ""  #: of a bool
    transposed: bool = False  #: (D, K)
    with_heads: bool = False  #: (heads, K, D) for a single codebook too
    averages: tuple[tuple[str, str], ...] = ()  #: (debiased average, what it is the average of), written and not read

    @property
    def keys(self) -> set[str]:
        """All of them."""
        named = {self.codebook, self.cluster_size, self.cluster_sum, self.steps, self.initialised} - {""}
        return named | {name for name, _ in self.averages} | ({"ema_dw.counter"} if self.averages else set())

    def to_own(self, state: State) -> State:
        """The tensors of a quantiser in this package's names; views where they can be. Other keys are ignored.

        Raises:
            KeyError: the codebook, or a part of the averages, is missing.
        """
        own = {"codebook": self._turned(state[self.codebook])}
        if self.cluster_size in state or self.cluster_sum in state:
            own["cluster_size"] = self._flat(state[self.cluster_size])
            own["cluster_sum"] = self._turned(state[self.cluster_sum])
            steps = torch.zeros((), dtype=torch.int64, device=own["codebook"].device)
            if self.steps:
                steps = state[self.steps].reshape(()).to(torch.int64)
            elif not bool(state.get(self.initialised, True)):
                steps = steps - 1
            own["steps"] = steps
        return own

    def from_own(self, own: State, decay: float = 0.0) -> State:
        """The other way; `decay` where the format has debiased averages.

        Raises:
            ValueError: several heads, for which the format has no place.
        """
        state = {self.codebook: self._turned(own["codebook"], back=True)}
        if "cluster_size" not in own:
            return state
        if not self.cluster_size:
            raise ValueError(f"the format {self.name!r} has no moving averages, and this codebook is one")
        state[self.cluster_size] = self._flat(own["cluster_size"], back=True)
        state[self.cluster_sum] = self._turned(own["cluster_sum"], back=True)
        if self.steps:
            state[self.steps] = own["steps"]
            state["ema_dw.counter"] = own["steps"]
        if self.initialised:
            state[self.initialised] = own["steps"] >= 0
        for average, hidden in self.averages:
            share = debias(decay, own["steps"].clamp(min=1))
            state[average] = (state[hidden] / share).to(state[hidden].dtype)
        return state

    def _turned(self, tensor: Tensor, back: bool = False) -> Tensor:
        """(K, D) or (heads, K, D) from this format's layout, or `back`."""
        if self.with_heads:
            return _heads(tensor, 3, back)
        if back and tensor.dim() != 2:
            raise ValueError(f"the format {self.name!r} has one codebook, and this has {tensor.shape[0]} heads")
        return tensor.t() if self.transposed else tensor

    def _flat(self, tensor: Tensor, back: bool = False) -> Tensor:
        return _heads(tensor, 2, back) if self.with_heads else tensor


def _heads(tensor: Tensor, sizes: int, back: bool) -> Tensor:
    """Without the leading size of a single head; with it, `back`."""
    if back:
        return tensor if tensor.dim() == sizes else tensor.unsqueeze(0)
    return tensor.squeeze(0) if tensor.dim() == sizes and tensor.shape[0] == 1 else tensor


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("embedding", "embedding.weight"),
        Format("zalando", "_embedding.weight", "_ema_cluster_size", "_ema_w"),
        Format(
            "vector-quantize-pytorch",
            "_codebook.embed",
            "_codebook.cluster_size",
            "_codebook.embed_avg",
            initialised="_codebook.initted",
            with_heads=True,
        ),
        Format("rosinality", "embed", "cluster_size", "embed_avg", transposed=True),
        Format(
            "sonnet",
            "embeddings",
            "ema_cluster_size.hidden",
            "ema_dw.hidden",
            steps="ema_cluster_size.counter",
            transposed=True,
            averages=(("ema_cluster_size.average", "ema_cluster_size.hidden"), ("ema_dw.average", "ema_dw.hidden")),
        ),
    )
}
