"""One folder for each family of networks, in it one file for each way of naming the family's parameters.

A family has `NETWORK` (its class), `DIALECTS` (see `dialect.py`), `build(state, dialect)` and `express(model, dialect)`.
This package's own names are BasicSR's.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastsr.weights.dialects import rcan, rrdbnet, vqvae, vqvae2
from fastsr.weights.errors import WeightsError, some

#: The first dialect, over all families, whose `matches` holds takes the file.
FAMILIES = (rrdbnet, rcan, vqvae, vqvae2)

#: What data-parallel training puts before every name.
PREFIX = "module."


def build(state: dict[str, Tensor]) -> nn.Module:
    """The network that a state dict is for, with its weights.

    Raises:
        WeightsError: no dialect knows these names, or the tensors do not fit together.
    """
    if state and all(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    for family in FAMILIES:
        for dialect in family.DIALECTS:
            if dialect.matches(state):
                own = dialect.to_own(state)
                if len(own) != len(state):
                    raise WeightsError(f"keys of several dialects in one file: {some(state)}")
                return family.build(own, dialect)
    known = "; ".join(f"{dialect.ABOUT}: {dialect.EXPECTED}" for family in FAMILIES for dialect in family.DIALECTS)
    raise WeightsError(f"no known network has these keys: {some(state)}; expected {known}")


def express(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The state dict of a network in the dialect of this name.

    Raises:
        TypeError: a network of no known family.
        ValueError: no dialect of its family has this name, or the dialect cannot express the network.
    """
    for family in FAMILIES:
        if isinstance(model, family.NETWORK):
            for dialect in family.DIALECTS:
                if name == dialect.NAME:
                    return family.express(model, dialect)
            names = ", ".join(repr(d.NAME) for d in family.DIALECTS)
            raise ValueError(f"save: dialect is {name!r}; expected one of {names}, those of {family.NETWORK.__name__}")
    networks = " or ".join(f"fastsr.models.{family.NETWORK.__name__}" for family in FAMILIES)
    raise TypeError(f"save: the model is a {type(model).__name__}; expected a {networks}")
