"""One file for each way of naming RRDBNet's parameters; a dialect is a renaming to and from this package's own names.

Each file has `NAME` (for `fastsr.save`), `ABOUT`, `EXPECTED` (its keys, for messages), `matches(state)`,
`to_own(state)` and `from_own(state)`. This package's own names are BasicSR's.
"""

from __future__ import annotations

from torch import Tensor

from fastsr.models import RRDBNet
from fastsr.weights.dialects import basicsr, esrgan, esrgan_old, rrdbnet
from fastsr.weights.errors import WeightsError, some

#: The first whose `matches` holds takes the file.
DIALECTS = (basicsr, esrgan, esrgan_old)

#: What data-parallel training puts before every name.
PREFIX = "module."


def build(state: dict[str, Tensor]) -> RRDBNet:
    """The network that a state dict is for, with its weights.

    Raises:
        WeightsError: no dialect knows these names, or the tensors do not fit together.
    """
    if state and all(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    for dialect in DIALECTS:
        if dialect.matches(state):
            own = dialect.to_own(state)
            if len(own) != len(state):
                raise WeightsError(f"keys of several dialects in one file: {some(state)}")
            return rrdbnet.build(own)
    known = "; ".join(f"{dialect.ABOUT}: {dialect.EXPECTED}" for dialect in DIALECTS)
    raise WeightsError(f"no known network has these keys: {some(state)}; expected {known}")


def express(model: RRDBNet, name: str) -> dict[str, Tensor]:
    """The state dict of a network in the dialect of this name.

    Raises:
        ValueError: no dialect has this name, or the dialect cannot express the network.
    """
    if model.plus and name != esrgan_old.NAME:
        # other programs leave its conv1x1 out, and say nothing
        raise ValueError(f"save: dialect is {name!r}, but an ESRGAN+ network (plus=True) has files in {esrgan_old.NAME!r} alone")
    for dialect in DIALECTS:
        if name == dialect.NAME:
            return dialect.from_own({key: tensor.detach() for key, tensor in model.state_dict().items()})
    raise ValueError(f"save: dialect is {name!r}; expected one of {', '.join(repr(d.NAME) for d in DIALECTS)}")
