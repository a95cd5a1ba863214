"""What every module here shares: a `backend` that reaches all parts, the fused convolution, buffers for inference."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import BACKENDS, Backend, autocasts
from fastsr.nn.freezing import Freezable

#: What a block keeps for backward: all that it needs there, or its input alone, from which it computes the rest again.
Save = Literal["all", "input"]

OptionalTensor = TypeVar("OptionalTensor", Tensor, "Tensor | None")


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
    `fastsr.ops.conv3x3` (`activation`, `scale`, `residual`, `upsample`, `out`).

    Args:
        pixel_shuffle: the PixelShuffle by which the result is written.

    Attributes:
        float16_scale: multiplies the bias where the convolution is computed in float16: see `fastsr.models.RCAN`.
    """

    float16_scale: float = 1.0

    def __init__(
        self, in_channels: int, out_channels: int, bias: bool = True, backend: Backend = "auto", *, pixel_shuffle: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        self._backend: Backend = backend
        self.pixel_shuffle = pixel_shuffle

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        bias = scaled(self.bias, self.float16_scale, compute_dtype(x))
        return ops.conv3x3(x, self.weight, bias, pixel_shuffle=self.pixel_shuffle, backend=self._backend, packed=self.packed, **options)

    def weights_to_pack(self) -> tuple[list[Tensor], list[Tensor | None]]:
        return [self.weight], [scaled(self.bias, self.float16_scale, self.weight.dtype)]


def needs_grad(module: nn.Module, *tensors: Tensor | None) -> bool:
    """True if autograd must record: gradients are on, and a tensor or a parameter of `module` wants one."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters())


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of `x` gives its output: autocast's where that is on, else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and autocasts(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def scaled(parameter: OptionalTensor, scale: float, dtype: torch.dtype) -> OptionalTensor:
    """The parameter times `scale` where features are computed in float16, else the parameter itself."""
    return parameter if parameter is None or scale == 1.0 or dtype != torch.float16 else parameter * scale


def empty_buffer(like: Tensor, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """A channels-last buffer of like's batch and picture size (or another `size`), in the dtype that its convolutions compute in."""
    shape = (like.shape[0], channels, *(size or like.shape[2:]))
    return torch.empty(shape, dtype=compute_dtype(like), device=like.device, memory_format=torch.channels_last)
