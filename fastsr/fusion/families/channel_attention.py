"""Channel attention in its spellings: RCAN's, squeeze-and-excitation of timm, torchvision and others, NAFNet-like without a gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.fusion.families.family import Candidate, Fusion, Probe
from fastsr.fusion.structure import Path, Refused, check_plain, owners
from fastsr.kernels.gate import Activation, Gate

GATES: dict[type[nn.Module], Gate] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}
SQUEEZES: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.SiLU: "silu"}


@dataclass(frozen=True)
class ChannelAttention(Fusion):
    """`fastsr.ops.channel_attention`; `convs` are down and up, or up alone."""

    kind = "channel attention"
    skips = False

    gate: Gate
    activation: Activation

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Tensor:
        parameters = gate_parameters(self, module)
        return ops.channel_attention(x, *parameters, gate=self.gate, activation=self.activation, backend=backend)


def gate_parameters(fusion: Fusion, module: nn.Module, first: int = 0) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """down_weight, down_bias, up_weight and up_bias from the parts of a fusion, beginning at `first`."""
    weights, biases = fusion.parameters(module)
    down = (weights[first], biases[first]) if len(weights) - first == 2 else (None, None)
    return *down, weights[-1], biases[-1]


def is_gate_layer(module: nn.Module) -> bool:
    """True for a layer that maps a vector of channels: a 1x1 convolution, or a linear layer."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.in_channels, layer.out_channels)  # type: ignore[return-value]


def check_gate_layer(path: Path, layer: nn.Module) -> None:
    """`layer` is plain.

    Raises:
        Refused: it is not.
    """
    if isinstance(layer, nn.Conv2d):
        check_plain(path, layer, 1)
    elif type(layer) is not nn.Linear:
        raise Refused(f"{'.'.join(path)} is a {type(layer).__name__}; expected a plain nn.Linear or 1x1 nn.Conv2d")


def gates(module: nn.Module) -> list[Gate]:
    """The gates that `module` may have: those that it has as modules; without any, what its code may call."""
    return sorted({GATES[type(m)] for m in module.modules() if type(m) in GATES}) or ["sigmoid", "none", "hardsigmoid"]


def squeezes(module: nn.Module) -> list[Activation]:
    """The same for the activation of the squeezed vector."""
    return sorted({SQUEEZES[type(m)] for m in module.modules() if type(m) in SQUEEZES}) or ["relu", "silu"]


def match_channel_attention(module: nn.Module) -> Candidate | None:
    """A gate's one or two layers, and nothing else that has parameters."""
    parts = owners(module)
    if len(parts) == 1 and parts[0][0] and isinstance(parts[0][1], nn.Conv1d) and sizes(parts[0][1]) == (1, 1):
        raise Refused("its gate is a convolution along the channels (ECA), not a layer of all of them")
    if not 1 <= len(parts) <= 2 or not all(is_gate_layer(layer) and path for path, layer in parts):
        return None
    channels, squeezed = sizes(parts[0][1])
    last = sizes(parts[-1][1])
    if last != ((squeezed, channels) if len(parts) == 2 else (channels, channels)) or squeezed > channels:
        return None
    if type(module).forward is nn.Sequential.forward:  # the gate alone, or two pointwise convolutions
        return None
    for path, layer in parts:
        check_gate_layer(path, layer)
    paths = tuple(path for path, _ in parts)

    def hypotheses(probe: Probe) -> Iterator[ChannelAttention]:
        for gate in gates(module):
            for activation in squeezes(module)[: None if len(paths) == 2 else 1]:
                yield ChannelAttention(paths, gate, activation)

    return Candidate(ChannelAttention.kind, (2, channels, 5, 6), hypotheses, sure=False)
