"""What every module here shares: a `backend` that reaches all parts, the fused convolution, buffers for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import BACKENDS, Backend
from fastsr.nn.freezing import Freezable


class Module(nn.Module):
    """An `nn.Module` with a `backend`; setting it sets that of every module inside."""

    def __init__(self, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = backend

    @property
    def backend(self) -> Backend:
        """The backend of the operators inside: "auto", "compiled", "triton" or "reference"."""
        return self._backend

    @backend.setter
    def backend(self, name: Backend) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend is {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
        self._backend: Backend = name
        for child in self.modules():
            if child is not self and isinstance(child, (Module, Conv3x3)):
                child._backend = name


class Conv3x3(Freezable, nn.Conv2d):
    """A 3x3 convolution with stride 1 and zero padding of one pixel, run by `fastsr.ops.conv3x3`.

    An `nn.Conv2d` in every other way: parameters, initialisation, state dict. `forward` takes the options of
    `fastsr.ops.conv3x3` (`activation`, `scale`, `residual`, `upsample`, `pixel_shuffle`, `out`).
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, backend: Backend = "auto") -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        self._backend: Backend = backend

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        return ops.conv3x3(x, self.weight, self.bias, backend=self._backend, packed=self.packed, **options)

    def weights_to_pack(self) -> tuple[list[Tensor], list[Tensor | None]]:
        return [self.weight], [self.bias]


def needs_grad(module: nn.Module, *tensors: Tensor | None) -> bool:
    """True if autograd must record: gradients are on, and a tensor or a parameter of `module` wants one."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters())


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of `x` gives its output: autocast's where that is on, else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def empty_buffer(like: Tensor, channels: int) -> Tensor:
    """A channels-last buffer of like's batch and picture size, in the dtype that its convolutions compute in."""
    n, _, h, w = like.shape
    return torch.empty((n, channels, h, w), dtype=compute_dtype(like), device=like.device, memory_format=torch.channels_last)
