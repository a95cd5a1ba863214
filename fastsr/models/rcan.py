"""RCAN, the residual channel attention network.

Source: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018, arXiv 1807.02758.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.models.pictures import check_picture, unshuffled
from fastsr.nn import RCAB, ChannelAttention, Conv3x3, Module, ResidualGroup, needs_grad, unfreeze
from fastsr.nn.freezing import Freezable
from fastsr.nn.module import Save, compute_dtype, empty_buffer, scaled
from fastsr.nn.strips import Part, run_parts
from fastsr.nn.tail import Step, tail

#: Of the colours of DIV2K, on which RCAN is trained.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)

#: scale of the tail -> the factors of its PixelShuffle steps
STEPS = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2), 16: (2, 2, 2, 2)}


class RCAN(Freezable, Module):
    """RCAN with BasicSR's constructor arguments, parameter names and state dict, and `num_block` = 20 as its authors have it.

    For an LR image x (N, `num_in_ch`, H, W) with values 0..1 and R = `img_range`:

        1. v        = R * (x - rgb_mean)                      or add.weight * R * x + add.bias with a MeanShift from a file
        2. f        = conv_first(v)
        3. features = conv_after_body(Group_num_group(... Group_1(f))) + f               2 and 3 are the trunk
        4. z        = features; then for each x2 (or the x3) step k: z = pixel_shuffle(upsample_2k(z))
        5. y        = conv_last(z) / R + rgb_mean                                         4 and 5 are the tail

    With `unshuffle` the image is pixel-unshuffled after step 1, and the tail enlarges by `upscale * unshuffle`.

    Range and mean. The features of a network that was trained on values 0..255 are of that size or much larger, and
    plain float16 overflows. Here no tensor of features has that range: all of them are held smaller by the power of two
    T that brings R * T below one (1/256 for R = 255; T is 1 where the features are not float16, whose range alone is so small).
    ReLU and convolutions are homogeneous, so this is exact once biases follow: T * (w * f + b) = w * (T * f) + T * b. The gate
    of channel attention must see the mean of f itself, so its first weight is divided by T. Multiplication by a power of two
    changes no bit of a weight. The mean is subtracted from the picture in float32 (a convolution with zero padding cannot
    absorb it: the padding of v is no picture's colour), and step 5 is one convolution: its epilogue multiplies by 1 / (R * T), and
    its bias is T * bias + R * T * rgb_mean.

    Without gradients the trunk runs in the head's output and three further buffers, whatever the number of blocks; they
    live for one call, and the returned tensor shares memory with nothing.

    Args:
        num_in_ch: channels of the image.
        num_out_ch: channels of the result.
        num_feat: channels of the trunk.
        num_group: number of residual groups.
        num_block: number of blocks (`fastsr.nn.RCAB`) in each group; BasicSR has 16 here, its authors' networks 20.
        squeeze_factor: of the channel attention.
        upscale: 1, 2, 3, 4, 8 or 16.
        res_scale: scales the branch of each block; no file shows it. Also an attribute.
        img_range: the range of values inside; no file shows it. Also an attribute.
        rgb_mean: one value for each channel of the image, or one for all. Also an attribute.
        backend: "auto", "compiled", "triton" or "reference"; the attribute `backend` may be set later too.
        unshuffle: 1, 2 or 4; 2 and 4 are traiNNer-redux's variant, with the tail of a x4 network.
        mean_shift: the network has the layers `sub_mean` and `add_mean` of its authors' code (1x1 convolutions on values
            0..`img_range`, 24 parameters, not trained) in place of `rgb_mean`.
        save: what the blocks and the tail keep for backward: "all" (128 values a pixel and block at the usual sizes) or "input" (64,
            and the first convolution is computed once more in backward). Attributes: `save` of each block, `save_tail` here.

    Raises:
        ValueError: a scale or a size that does not exist, or a mean that does not fit the channels.
    """

    def __init__(
        self,
        num_in_ch: int,
        num_out_ch: int,
        num_feat: int = 64,
        num_group: int = 10,
        num_block: int = 20,
        squeeze_factor: int = 16,
        upscale: int = 4,
        res_scale: float = 1,
        img_range: float = 255.0,
        rgb_mean: Sequence[float] = DIV2K_MEAN,
        backend: Backend = "auto",
        *,
        unshuffle: int = 1,
        mean_shift: bool = False,
        save: Save = "all",
    ) -> None:
        super().__init__(backend)
        if unshuffle not in (1, 2, 4):
            raise ValueError(f"RCAN: unshuffle is {unshuffle!r}; expected 1, 2 or 4")
        if upscale not in STEPS or upscale * unshuffle not in STEPS:
            raise ValueError(f"RCAN: upscale is {upscale!r}; expected one of {', '.join(map(str, STEPS))} (with unshuffle {unshuffle})")
        sizes = {"num_in_ch": num_in_ch, "num_out_ch": num_out_ch, "num_feat": num_feat, "num_group": num_group, "num_block": num_block}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"RCAN: {name} is {size!r}; expected at least 1")
        if mean_shift and num_in_ch != num_out_ch:
            raise ValueError(f"RCAN: num_out_ch is {num_out_ch}; expected {num_in_ch} as the image's channels, with mean_shift")
        self.num_in_ch, self.num_out_ch, self.unshuffle, self.upscale = num_in_ch, num_out_ch, unshuffle, upscale
        self.num_feat, self.num_group, self.num_block, self.squeeze_factor = num_feat, num_group, num_block, squeeze_factor
        self.save_tail: Save = save
        self.conv_first = Conv3x3(num_in_ch * unshuffle**2, num_feat, backend=backend)
        self.body = nn.Sequential(
            *(ResidualGroup(num_feat, num_block, squeeze_factor, res_scale, backend, save=save) for _ in range(num_group))
        )
        self.conv_after_body = Conv3x3(num_feat, num_feat, backend=backend)
        steps = [Conv3x3(num_feat, r * r * num_feat, backend=backend, pixel_shuffle=r) for r in STEPS[self.tail_scale]]
        self.upsample = nn.ModuleDict({str(2 * k): step for k, step in enumerate(steps)})
        self.conv_last = Conv3x3(num_feat, num_out_ch, backend=backend)
        self.img_range, self.rgb_mean, self.mean_shift = img_range, rgb_mean, mean_shift
        if mean_shift:
            self.sub_mean, self.add_mean = (_mean_shift(sign * img_range, self.rgb_mean, num_in_ch) for sign in (-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W), values 0..1 -> (N, num_out_ch, scale * H, scale * W), not clamped.

        Any floating dtype that the parameters have too; under autocast the result is in autocast's dtype.

        Raises:
            ValueError: x has other dimensions or another number of channels.
        """
        check_picture("RCAN", x, self.num_in_ch)
        h, w = x.shape[2:]
        return self.tail(self.features(x))[:, :, : h * self.scale, : w * self.scale]

    def features(self, x: Tensor, progress: Callable[[float], None] | None = None) -> Tensor:
        """Steps 1 to 3, times T; at inference `progress` is told after each group which part of them is done."""
        f = self.conv_first(unshuffled(self._centred(x), self.unshuffle))
        if needs_grad(self, x):
            return self.conv_after_body(self.body(f), residual=f)
        y, running, hidden, spare = f, *(empty_buffer(f, self.num_feat) for _ in range(3))
        for done, group in enumerate(self.body, 1):
            after = group.run_in(y, running, hidden)  # type: ignore[operator]
            hidden, y = spare if y is f else y, after
            if progress is not None:
                progress(done / self.num_group)
        return self.conv_after_body(y, residual=f, out=running)

    def tail(self, features: Tensor) -> Tensor:
        """Steps 4 and 5: features -> the (uncropped) result. A result pixel depends on the features at most two pixels away."""
        z = features
        del features  # so that the first step's input can go when the second runs
        dtype = compute_dtype(z)
        weight, bias = self._last_convolution(dtype)
        scale = 1 / (self.img_range * self._feature_scale(dtype))
        if needs_grad(self, z):
            convs: list[Any] = list(self.upsample.values())
            steps = [*(Step(pixel_shuffle=conv.pixel_shuffle) for conv in convs), Step(scale=scale)]
            biases = [*(scaled(conv.bias, conv.float16_scale, dtype) for conv in convs), bias]
            return tail(z, steps, [*(conv.weight for conv in convs), weight], biases, save=self.save_tail, backend=self.backend)
        parts = [Part(conv, self.num_feat, pixel_shuffle=conv.pixel_shuffle) for conv in self.upsample.values()]  # type: ignore[arg-type]
        last = partial(ops.conv3x3, weight=weight, bias=bias, scale=scale, packed=self.packed, backend=self.backend)
        return run_parts(z, [*parts, Part(last, self.num_out_ch)], self.backend)

    def _feature_scale(self, dtype: torch.dtype) -> float:
        """T for features in this dtype."""
        return self.conv_first.float16_scale if dtype == torch.float16 else 1.0

    def _centred(self, x: Tensor) -> Tensor:
        """Step 1, times T."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        t = self._feature_scale(compute_dtype(x))
        if self.mean_shift:
            weight, bias = self.sub_mean.weight.to(wide.dtype), self.sub_mean.bias.to(wide.dtype)  # type: ignore[union-attr]
            v = (weight * (self.img_range * t) * wide[:, None]).sum(2) + (bias * t)[:, None, None]  # by hand: autocast lets it be
        else:
            v = torch.cat([(wide[:, c : c + 1] - mean) * (self.img_range * t) for c, mean in enumerate(self._means(self.num_in_ch))], 1)
        return v.to(x.dtype)

    def _last_convolution(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias of step 5, but for the factor 1 / (R * T)."""
        weight, bias = self.conv_last.weight, self.conv_last.bias
        assert bias is not None
        wide = torch.promote_types(bias.dtype, torch.float32)
        shifted = bias.to(wide)
        if self.mean_shift:
            mix = self.add_mean.weight.flatten(1).to(wide)
            shifted = (mix * shifted).sum(1) + self.add_mean.bias.to(wide)  # type: ignore[union-attr]
            weight = (mix[:, :, None, None, None] * weight.to(wide)).sum(1).to(weight.dtype)
        else:
            shifted = torch.stack([b + self.img_range * mean for b, mean in zip(shifted, self._means(self.num_out_ch), strict=True)])
        return weight, (shifted * self._feature_scale(dtype)).to(bias.dtype)

    def _means(self, channels: int) -> tuple[float, ...]:
        return self.rgb_mean * channels if len(self.rgb_mean) == 1 else self.rgb_mean

    def weights_to_pack(self) -> tuple[list[Tensor], list[Tensor | None]]:
        weight, bias = self._last_convolution(self.conv_last.weight.dtype)
        return [weight], [bias]

    def parts_packed_here(self) -> Iterable[nn.Module]:
        return (self.conv_last,)

    @property
    def scale(self) -> int:
        """Result pixels along each side of a picture's pixel: `upscale`."""
        return self.upscale

    @property
    def img_range(self) -> float:
        """R, the range of values inside."""
        return self._img_range

    @img_range.setter
    def img_range(self, size: float) -> None:
        if not 0 < size < math.inf:
            raise ValueError(f"RCAN: img_range is {size!r}; expected a positive number")
        self._img_range = float(size)
        unfreeze(self)  # packed weights hold the old range
        for module in self.modules():
            if isinstance(module, (Conv3x3, ChannelAttention)):
                module.float16_scale = 2.0 ** -max(0, math.ceil(math.log2(size)))

    @property
    def rgb_mean(self) -> tuple[float, ...]:
        """What is subtracted from the picture and added to the result; without effect with `mean_shift`."""
        return self._rgb_mean

    @rgb_mean.setter
    def rgb_mean(self, mean: Sequence[float]) -> None:
        if len(mean) != 1 and not len(mean) == self.num_in_ch == self.num_out_ch:
            channels = f"{self.num_in_ch} channels of the image and {self.num_out_ch} of the result"
            raise ValueError(f"RCAN: rgb_mean is {tuple(mean)!r}; expected one value, or one for each of {channels}")
        self._rgb_mean = tuple(float(value) for value in mean)
        unfreeze(self)

    @property
    def res_scale(self) -> float:
        """Scales the branch of each block."""
        return next(block.res_scale for block in self.blocks())

    @res_scale.setter
    def res_scale(self, scale: float) -> None:
        for block in self.blocks():
            block.res_scale = scale

    @property
    def local_pooling(self) -> int | None:
        """None, or the side in pixels of the window whose mean stands for the picture's in every gate.

        The gates of a network that was trained on small patches see the mean of a patch; that of a whole picture may be unlike
        any. The test-time local converter (Chu et al., 2021, arXiv 2112.04491) takes a window instead, which gives another
        result, often a better one: its authors advise 1.5 times the training patch, 72 for RCAN's patches of 48. Runs in
        plain PyTorch, and not with the fused block.
        """
        return next(block.rcab[3].local_window for block in self.blocks())  # type: ignore[union-attr, return-value]

    @local_pooling.setter
    def local_pooling(self, window: int | None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"RCAN: local_pooling is {window!r}; expected at least 1, or None")
        for block in self.blocks():
            block.rcab[3].local_window = window  # type: ignore[assignment]

    def blocks(self) -> Iterator[RCAB]:
        """All blocks in their order."""
        return (module for module in self.body.modules() if isinstance(module, RCAB))

    @property
    def trunk_share(self) -> float:
        """The part of the time that `features` takes: the part of the multiplications."""
        trunk = self.num_group * (2 * self.num_block + 1) + 1
        tail, side = 0.0, 1
        for r in STEPS[self.tail_scale]:
            tail, side = tail + (r * side) ** 2, r * side
        return trunk / (trunk + tail + self.num_out_ch * side**2 / self.num_feat)

    @property
    def tail_scale(self) -> int:
        """Result pixels along each side of a feature pixel, before the crop."""
        return self.upscale * self.unshuffle

    @property
    def trunk_values(self) -> int:
        """Values for each feature pixel that `features` holds at its peak: f and three buffers; window means take six more."""
        return (4 if self.local_pooling is None else 10) * self.num_feat

    @property
    def tail_values(self) -> int:
        """Values for each feature pixel that `tail` holds at its peak: input and output of its last enlarging step."""
        steps = STEPS[self.tail_scale]
        return self.num_feat * self.tail_scale**2 + (self.num_feat * (self.tail_scale // steps[-1]) ** 2 if steps else 0)

    def extra_repr(self) -> str:
        special = f", unshuffle={self.unshuffle}" * (self.unshuffle > 1) + ", mean_shift=True" * self.mean_shift
        sizes = f"num_feat={self.num_feat}, num_group={self.num_group}, num_block={self.num_block}, squeeze_factor={self.squeeze_factor}"
        return f"upscale={self.upscale}, {sizes}, img_range={self.img_range:g}{special}"


def _mean_shift(offset: float, mean: tuple[float, ...], channels: int) -> nn.Conv2d:
    """The layer that its authors' code adds the mean with: values + offset * mean, not trained."""
    layer = nn.Conv2d(channels, channels, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None])
        layer.bias.copy_(offset * torch.tensor(mean))  # type: ignore[union-attr]
    return layer.requires_grad_(False)
