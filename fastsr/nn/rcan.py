"""The residual channel attention block and the group of such blocks.

Source: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", 2018, arXiv 1807.02758.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.nn.attention import ChannelAttention
from fastsr.nn.freezing import Freezable
from fastsr.nn.module import Conv3x3, Module, Save, compute_dtype, empty_buffer, needs_grad, scaled


class RCAB(Freezable, Module):
    """Residual channel attention block:

        1. u = conv_2(relu(conv_1(x)))                                     3x3 convolutions
        2. y = res_scale * sigmoid(up(relu(down(mean(u))))) * u + x

    Run by `fastsr.ops.rcab`, which knows the gate before it computes the second convolution and so writes y at once.
    Parameters, their names and their initialisation are those of BasicSR: `rcab.0` and `rcab.2` are the convolutions,
    `rcab.3.attention.{1,3}` down and up.

    Args:
        num_feat: channels.
        squeeze_factor: the gate's hidden layer has num_feat // squeeze_factor channels.
        res_scale: scales the branch before the skip; also an attribute.
        backend: "auto", "compiled", "triton" or "reference".
        save: what is kept for backward: "all" keeps x and the hidden channels, "input" keeps x and computes them again;
            also an attribute.
    """

    def __init__(
        self, num_feat: int, squeeze_factor: int = 16, res_scale: float = 1, backend: Backend = "auto", *, save: Save = "all"
    ) -> None:
        super().__init__(backend)
        self.num_feat, self.res_scale, self.save = num_feat, res_scale, save
        self.rcab = nn.Sequential(
            Conv3x3(num_feat, num_feat, backend=backend),
            nn.ReLU(),
            Conv3x3(num_feat, num_feat, backend=backend),
            ChannelAttention(num_feat, squeeze_factor, backend),
        )

    def forward(self, x: Tensor, out: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """(N, num_feat, H, W) -> the same shape, channels-last, in x's dtype (autocast's under autocast).

        Inference only: `out` (which may be x itself) gets the result and `hidden` is worked in; both are channels-last
        tensors of x's shape.
        """
        conv1, conv2, attention = self._parts
        if attention.local_window is not None:
            u = conv2(conv1(x, activation="relu", out=hidden))
            y = attention(u, x, self.res_scale)
            return y if out is None else out.copy_(y)
        dtype = compute_dtype(x)
        bias1, bias2 = (scaled(conv.bias, conv.float16_scale, dtype) for conv in (conv1, conv2))
        return ops.rcab(
            x, conv1.weight, bias1, conv2.weight, bias2, *attention.gate_parameters(dtype),
            res_scale=self.res_scale, out=out, workspace=hidden, packed=self.packed, save=self.save, backend=self.backend,
        )  # fmt: skip

    @property
    def _parts(self) -> tuple[Conv3x3, Conv3x3, ChannelAttention]:
        conv1, _, conv2, attention = self.rcab
        return conv1, conv2, attention  # type: ignore[return-value]

    def weights_to_pack(self) -> tuple[list[Tensor], list[Tensor | None]]:
        convs = self._parts[:2]
        return [conv.weight for conv in convs], [scaled(conv.bias, conv.float16_scale, conv.weight.dtype) for conv in convs]

    def parts_packed_here(self) -> Iterable[nn.Module]:
        return self._parts[:2]


class ResidualGroup(Module):
    """A chain of blocks, a convolution and a skip: y = conv(RCAB_num_block(... RCAB_1(x))) + x.

    Parameters as in BasicSR: `residual_group.{i}` and `conv`. Other arguments as those of `RCAB`.
    """

    def __init__(
        self,
        num_feat: int,
        num_block: int,
        squeeze_factor: int = 16,
        res_scale: float = 1,
        backend: Backend = "auto",
        *,
        save: Save = "all",
    ) -> None:
        super().__init__(backend)
        self.num_feat = num_feat
        self.residual_group = nn.Sequential(*(RCAB(num_feat, squeeze_factor, res_scale, backend, save=save) for _ in range(num_block)))
        self.conv = Conv3x3(num_feat, num_feat, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) -> the same shape, channels-last, in x's dtype (autocast's under autocast)."""
        if needs_grad(self, x):
            return self.conv(self.residual_group(x), residual=x)
        return self.run_in(x, empty_buffer(x, self.num_feat), empty_buffer(x, self.num_feat))

    def run_in(self, x: Tensor, running: Tensor, hidden: Tensor) -> Tensor:
        """Inference in two channels-last buffers of x's shape, both of which are overwritten; the result lies in `hidden`."""
        y = x
        for block in self.residual_group:
            y = block(y, out=running, hidden=hidden)
        return self.conv(y, residual=x, out=hidden)
