"""One file for each way of naming a network's parameters: `matches(state)` and `build(state)`."""

from __future__ import annotations

from torch import Tensor, nn

from fastsr.weights.dialects import basicsr
from fastsr.weights.errors import WeightsError, some

#: The first whose `matches` holds takes the file.
DIALECTS = (basicsr,)

#: What data-parallel training puts before every name.
PREFIX = "module."


def build(state: dict[str, Tensor]) -> nn.Module:
    """The network that a state dict is for, with its weights.

    Raises:
        WeightsError: no dialect knows these names, or the tensors do not fit together.
    """
    if state and all(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    for dialect in DIALECTS:
        if dialect.matches(state):
            return dialect.build(state)
    known = "; ".join(f"{dialect.NAME}: {dialect.EXPECTED}" for dialect in DIALECTS)
    raise WeightsError(f"no known network has these keys: {some(state)}; expected {known}")
