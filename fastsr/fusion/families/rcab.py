"""Two 3x3 convolutions, channel attention, and a skip or none: RCAN's RCAB, the CAB of HAT, DRCT and GRL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.fusion.families.channel_attention import check_gate_layer, gate_parameters, gates, is_gate_layer, sizes, squeezes
from fastsr.fusion.families.family import ACTIVATIONS, Candidate, Fusion, Probe, fitted, slopes
from fastsr.fusion.structure import check_plain, owners
from fastsr.kernels.gate import Activation, Gate


@dataclass(frozen=True)
class AttentionBlock(Fusion):
    """y = res_scale * attention(conv_2(act(conv_1(x)))), without a skip; `convs` are conv_1, conv_2, down and up."""

    kind = "CAB"
    skips = False

    between: str | float  #: "gelu", "silu", or the negative slope of a leaky ReLU
    gate: Gate
    activation: Activation
    res_scale: float

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Tensor:
        return self._run(module, x, None, backend)

    def _run(self, module: nn.Module, x: Tensor, residual: Tensor | None, backend: Backend) -> Tensor:
        (weight1, weight2, *_), (bias1, bias2, *_) = self.parameters(module)
        if isinstance(self.between, str):
            r = ACTIVATIONS[self.between](ops.conv3x3(x, weight1, bias1, backend=backend))
        else:
            r = ops.conv3x3(x, weight1, bias1, activation="leaky_relu", negative_slope=self.between, backend=backend)
        u = ops.conv3x3(r, weight2, bias2, backend=backend)
        options = {"res_scale": self.res_scale, "gate": self.gate, "activation": self.activation, "backend": backend}
        return ops.channel_attention(u, *gate_parameters(self, module, 2), residual, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SkippedAttentionBlock(AttentionBlock):
    """The same plus x."""

    kind = "RCAB"
    skips = True

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Tensor:
        return self._run(module, x, x, backend)


@dataclass(frozen=True)
class RCAB(SkippedAttentionBlock):
    """`fastsr.ops.rcab`: where both activations are ReLU and the gate is a sigmoid."""

    kind = "RCAB"
    flag = True

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Tensor:
        (weight1, weight2, *_), (bias1, bias2, *_) = self.parameters(module)
        options = {"res_scale": self.res_scale, "save": getattr(module, "save", "all"), "backend": backend}
        return ops.rcab(x, weight1, bias1, weight2, bias2, *gate_parameters(self, module, 2), **options)  # type: ignore[arg-type]


def match_rcab(module: nn.Module) -> Candidate | None:
    """Two 3x3 convolutions, then a gate's two layers, and nothing else that has parameters."""
    parts = owners(module)
    if len(parts) != 4 or not all(path for path, _ in parts):
        return None
    (_, conv1), (_, conv2), (_, down), (_, up) = parts
    if not all(isinstance(c, nn.Conv2d) and c.kernel_size == (3, 3) for c in (conv1, conv2)):
        return None
    if not is_gate_layer(down) or not is_gate_layer(up):
        return None
    features, hidden = sizes(conv1)
    if sizes(conv2) != (hidden, features) or sizes(down)[0] != features or sizes(up) != (sizes(down)[1], features):
        return None
    for path, layer in parts[:2]:
        check_plain(path, layer, 3)
    for path, layer in parts[2:]:
        check_gate_layer(path, layer)
    paths = tuple(path for path, _ in parts)
    between: list[str | float] = ["gelu"] if any(isinstance(m, nn.GELU) for m in module.modules()) else [*slopes(module), "gelu", "silu"]

    def hypotheses(probe: Probe) -> Iterator[Fusion]:
        for act in between:
            for gate in gates(module):
                for activation in squeezes(module):
                    branch = AttentionBlock(paths, act, gate, activation, 1.0).run(probe.module, probe.x, "reference")
                    plain = act == 0.0 and gate == "sigmoid" and activation == "relu"
                    for scale in fitted(branch, probe.y - probe.x):
                        yield (RCAB if plain else SkippedAttentionBlock)(paths, act, gate, activation, scale)
                    for scale in fitted(branch, probe.y):
                        yield AttentionBlock(paths, act, gate, activation, scale)

    return Candidate("RCAB or CAB", (1, features, 5, 6), hypotheses)
