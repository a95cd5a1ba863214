"""The residual dense block of ESRGAN and the residual in residual dense block made of three of them.

Source: Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", 2018, arXiv 1809.00219.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsr import backends, ops
from fastsr.backends import Backend
from fastsr.nn.freezing import Freezable
from fastsr.nn.module import Conv3x3, Module, Save, empty_buffer, needs_grad

NEGATIVE_SLOPE = 0.2
RES_SCALE = 0.2


class ResidualDenseBlock(Freezable, Module):
    """Five 3x3 convolutions, each of which sees the outputs of all before it.

    For x with F = `num_feat` channels, growth G = `num_grow_ch`:

        1. g[k] = leaky_relu(conv_k(x, g[1], ..., g[k-1]), 0.2)          k = 1..4, G channels each
        2. y    = 0.2 * conv_5(x, g[1], ..., g[4]) + x                   F channels

    Nothing is concatenated: `fastsr.ops.dense_block` keeps x and all g in one channels-last workspace, of which each
    convolution reads a channel prefix and writes the slice that follows.

    Parameters, their names and their initialisation are those of BasicSR: `conv1` to `conv5`.

    Args:
        num_feat: channels of the input and the output.
        num_grow_ch: channels that each of the first four convolutions adds.
        backend: "auto", "compiled", "triton" or "reference".
        save: what is kept for backward, "all" or "input"; also an attribute.
    """

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32, backend: Backend = "auto", *, save: Save = "all") -> None:
        super().__init__(backend)
        self.num_feat, self.num_grow_ch, self.save = num_feat, num_grow_ch, save
        self.conv1 = Conv3x3(num_feat, num_grow_ch, backend=backend)
        self.conv2 = Conv3x3(num_feat + num_grow_ch, num_grow_ch, backend=backend)
        self.conv3 = Conv3x3(num_feat + 2 * num_grow_ch, num_grow_ch, backend=backend)
        self.conv4 = Conv3x3(num_feat + 3 * num_grow_ch, num_grow_ch, backend=backend)
        self.conv5 = Conv3x3(num_feat + 4 * num_grow_ch, num_feat, backend=backend)
        for conv in self._convs:
            nn.init.kaiming_normal_(conv.weight)
            with torch.no_grad():
                conv.weight *= 0.1
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    @property
    def workspace_channels(self) -> int:
        """Channels of the workspace: x and the four outputs that grow from it."""
        return self.num_feat + 4 * self.num_grow_ch

    def buffer_channels(self, x: Tensor) -> int:
        """Channels of the buffers that `run_in` works in for inputs like `x`: those of x itself where the operator needs no
        workspace (compiled, on a CPU), else `workspace_channels`."""
        whole = x.device.type != "cpu" or backends.choose("dense_block", self.backend, x).backend == "triton"
        return self.workspace_channels if whole else self.num_feat

    @property
    def _convs(self) -> tuple[Conv3x3, ...]:
        return self.conv1, self.conv2, self.conv3, self.conv4, self.conv5

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(N, num_feat, H, W) -> the same shape, channels-last, in x's dtype (autocast's under autocast).

        With `skip`, the input of the RRDB that this block ends, the result is 0.2 * y + skip.
        """
        return self._dense_block(x, skip, save=self.save)

    def run_in(self, workspace: Tensor, out: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """Inference in a buffer whose first `num_feat` channels hold x; the other channels are overwritten.

        Args:
            workspace: (N, buffer_channels(x) or workspace_channels, H, W), channels-last.
            out: where y goes: (N, num_feat, H, W), channels-last or a channel slice of such a tensor; None for a fresh tensor.
            skip: the input of the RRDB that this block ends: the result is then 0.2 * y + skip.

        Returns:
            `out`, or the fresh tensor.
        """
        whole = workspace if workspace.shape[1] > self.num_feat else None
        return self._dense_block(workspace[:, : self.num_feat], skip, workspace=whole, out=out)

    def _dense_block(self, x: Tensor, skip: Tensor | None, **options: Any) -> Tensor:
        weights, biases = [conv.weight for conv in self._convs], [conv.bias for conv in self._convs]
        options = {"backend": self.backend, "packed": self.packed, **options}
        return ops.dense_block(x, weights, biases, NEGATIVE_SLOPE, RES_SCALE, skip, RES_SCALE, **options)

    def weights_to_pack(self) -> tuple[list[Tensor], list[Tensor | None]]:
        return [conv.weight for conv in self._convs], [conv.bias for conv in self._convs]

    def parts_packed_here(self) -> Iterable[nn.Module]:
        return self._convs


class ResidualDenseBlockPlus(ResidualDenseBlock):
    """The dense block of ESRGAN+, with two further skips: steps 1 of `ResidualDenseBlock` become

        g[2] = leaky_relu(conv_2(x, g[1]), 0.2) + conv1x1(x)
        g[4] = leaky_relu(conv_4(x, g[1], g[2], g[3]), 0.2) + g[2]

    `conv1x1` has no bias. `save` has no effect here: each convolution keeps its own input. The noise that ESRGAN+ adds
    while it trains is not part of this module.

    Source: Rakotonirina and Rasoanaivo, "ESRGAN+: Further Improving Enhanced Super-Resolution Generative Adversarial
    Network", 2020, arXiv 2001.08073.
    """

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32, backend: Backend = "auto", *, save: Save = "all") -> None:
        super().__init__(num_feat, num_grow_ch, backend, save=save)
        self.conv1x1 = nn.Conv2d(num_feat, num_grow_ch, 1, bias=False)

    def weights_to_pack(self) -> tuple[list[Tensor], list[Tensor | None]]:
        return [], []  # each convolution is an op of its own here

    def parts_packed_here(self) -> Iterable[nn.Module]:
        return ()

    def buffer_channels(self, x: Tensor) -> int:
        return self.workspace_channels

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if not needs_grad(self, x, skip):
            workspace = empty_buffer(x, self.workspace_channels)
            workspace[:, : self.num_feat] = x
            return self.run_in(workspace, skip=skip)
        parts = [x]
        for k, conv in enumerate(self._convs[:4], 1):
            residual = self.conv1x1(x) if k == 2 else parts[2] if k == 4 else None
            parts.append(conv(torch.cat(parts, 1), activation="leaky_relu", negative_slope=NEGATIVE_SLOPE, residual=residual))
        y = self.conv5(torch.cat(parts, 1), scale=RES_SCALE, residual=x)
        return y if skip is None else y * RES_SCALE + skip

    def run_in(self, workspace: Tensor, out: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        feat, grow = self.num_feat, self.num_grow_ch
        x, second = workspace[:, :feat], workspace[:, feat + grow : feat + 2 * grow]
        for k, conv in enumerate(self._convs[:4], 1):
            seen, grown = workspace[:, : feat + (k - 1) * grow], workspace[:, feat + (k - 1) * grow : feat + k * grow]
            residual = self.conv1x1(x) if k == 2 else second if k == 4 else None
            conv(seen, activation="leaky_relu", negative_slope=NEGATIVE_SLOPE, residual=residual, out=grown)
        if skip is None:
            return self.conv5(workspace, scale=RES_SCALE, residual=x, out=out)
        return self.conv5(workspace, scale=RES_SCALE * RES_SCALE, residual=torch.add(skip, x, alpha=RES_SCALE), out=out)


class RRDB(Module):
    """Residual in residual dense block: y = 0.2 * rdb3(rdb2(rdb1(x))) + x.

    Parameters as in BasicSR: `rdb1`, `rdb2`, `rdb3`, each a `ResidualDenseBlock` or, with `plus`, a
    `ResidualDenseBlockPlus`. Other arguments as there.
    """

    def __init__(
        self, num_feat: int = 64, num_grow_ch: int = 32, backend: Backend = "auto", *, plus: bool = False, save: Save = "all"
    ) -> None:
        super().__init__(backend)
        self.num_feat = num_feat
        block = ResidualDenseBlockPlus if plus else ResidualDenseBlock
        self.rdb1 = block(num_feat, num_grow_ch, backend, save=save)
        self.rdb2 = block(num_feat, num_grow_ch, backend, save=save)
        self.rdb3 = block(num_feat, num_grow_ch, backend, save=save)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) -> the same shape, channels-last, in x's dtype (autocast's under autocast)."""
        if needs_grad(self, x):
            return self.rdb3(self.rdb2(self.rdb1(x)), x)
        front, back, spare = self.scratch(x)
        front[:, : self.num_feat] = x
        front, _ = self.run_in(front, back, spare)
        return front[:, : self.num_feat].clone(memory_format=torch.channels_last)

    def scratch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two buffers to work in and a spare one for pictures like `x`; a chain of RRDBs needs no more, however long."""
        channels = self.rdb1.buffer_channels(x)
        return empty_buffer(x, channels), empty_buffer(x, channels), empty_buffer(x, self.num_feat)

    def run_in(self, front: Tensor, back: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Inference in `scratch`; the first `num_feat` channels of `front` hold x, those of the first result hold y.

        Returns:
            The two buffers, the one that holds y first: the `front` and `back` of the next RRDB.
        """
        feat = self.num_feat
        self.rdb1.run_in(front, out=back[:, :feat])
        if front.shape[1] == feat:  # no workspaces: x stays where it is
            self.rdb2.run_in(back, out=spare)
            self.rdb3.run_in(spare, out=back, skip=front)
            return back, front
        spare.copy_(front[:, :feat])
        self.rdb2.run_in(back, out=front[:, :feat])
        self.rdb3.run_in(front, out=back[:, :feat], skip=spare)
        return back, front
