"""How the factors of a float32 convolution may be rounded: torch's own switch decides."""

from __future__ import annotations

import torch
from torch import Tensor


def takes_tf32(x: Tensor) -> bool:
    """Whether convolutions of x round their factors to tf32, 10 bits of mantissa: float32 on an NVIDIA GPU, if torch's switch says so."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and torch.version.hip is None and _allowed()


def _allowed() -> bool:
    # The resolved new setting mirrors `allow_tf32` too; reading the old one raises where convolutions and RNNs differ.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


# torch.compile evaluates it while it traces, and keeps the answer: what `torch.compiler.assume_constant_result` sets, without its import.
_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]
