"""RRDBNet, the generator of ESRGAN, BSRGAN and Real-ESRGAN.

Sources: Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", 2018, arXiv 1809.00219;
Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", 2021, arXiv 2107.10833.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastsr.backends import Backend
from fastsr.models.pictures import check_picture, unshuffled
from fastsr.nn import RRDB, Conv3x3, Module, needs_grad
from fastsr.nn.module import Save
from fastsr.nn.rrdb import NEGATIVE_SLOPE
from fastsr.nn.strips import Part, run_parts
from fastsr.nn.tail import Step, tail

SCALES = (1, 2, 4, 8, 16)

#: What the tail costs, in blocks of the trunk.
TAIL_BLOCKS = 2

#: scale -> BasicSR's pixel-unshuffle factor before the trunk; 1 where it is not named
UNSHUFFLE = {1: 4, 2: 2}


class RRDBNet(Module):
    """RRDBNet with BasicSR's constructor arguments, parameter names and state dict.

    For an LR image x (N, `num_in_ch`, H, W):

        1. u        = x, or its pixel-unshuffle by `unshuffle`
        2. f        = conv_first(u)
        3. features = conv_body(RRDB_num_block(... RRDB_1(f))) + f                       the trunk
        4. z        = features; then for each x2 step k: z = leaky_relu(conv_up_k(nearest_x2(z)), 0.2)
        5. y        = conv_last(leaky_relu(conv_hr(z), 0.2))                             4 and 5 are the tail

    There are log2(`scale` * `unshuffle`) x2 steps: two for BasicSR's scales 4, 2 and 1, the last two of which run the
    x4 network on the pixel-unshuffled image. That is first padded to a multiple of `unshuffle` (by reflection, or by its
    edge where the image is too small for that); the result is cropped. 8 and 16 are this package's continuation, which
    BasicSR does not have: a third and a fourth x2 step with the convolutions `conv_up3` and `conv_up4`.

    Without gradients the trunk runs in four buffers, whatever the number of blocks (`fastsr.nn.RRDB.scratch`); they
    live for one call, and the returned tensor shares memory with nothing.

    Args:
        num_in_ch: channels of the image (3, not 12 or 48, for the pixel-unshuffle scales).
        num_out_ch: channels of the result.
        scale: 1, 2, 4, 8 or 16.
        num_feat: channels of the trunk.
        num_block: number of RRDBs.
        num_grow_ch: growth of the dense blocks.
        backend: "auto", "compiled", "triton" or "reference"; the attribute `backend` may be set later too.
        unshuffle: 1, 2 or 4; None for BasicSR's choice, which is 2 for scale 2, 4 for scale 1, else 1. Older networks of
            scale 2 and 1 have 1, with one x2 step and with none.
        plus: the dense blocks of ESRGAN+ (`fastsr.nn.ResidualDenseBlockPlus`).
        save: what the dense blocks keep for backward: "all" (192 values a pixel and block at the usual sizes) or "input"
            (64, and the four growing convolutions are computed once more in backward); and whether the tail keeps all or its
            input. Attributes: `save` of each dense block, `save_tail` here.

    Raises:
        ValueError: a scale or a size that does not exist.
    """

    def __init__(
        self,
        num_in_ch: int,
        num_out_ch: int,
        scale: int = 4,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
        backend: Backend = "auto",
        *,
        unshuffle: int | None = None,
        plus: bool = False,
        save: Save = "all",
    ) -> None:
        super().__init__(backend)
        if scale not in SCALES:
            raise ValueError(f"RRDBNet: scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
        if unshuffle not in (None, 1, 2, 4):
            raise ValueError(f"RRDBNet: unshuffle is {unshuffle!r}; expected 1, 2, 4 or None")
        sizes = {"num_in_ch": num_in_ch, "num_out_ch": num_out_ch, "num_feat": num_feat, "num_block": num_block, "num_grow_ch": num_grow_ch}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"RRDBNet: {name} is {size!r}; expected at least 1")
        self.num_in_ch, self.num_out_ch, self.scale = num_in_ch, num_out_ch, scale
        self.num_feat, self.num_block, self.num_grow_ch = num_feat, num_block, num_grow_ch
        self.unshuffle = UNSHUFFLE.get(scale, 1) if unshuffle is None else unshuffle
        self.plus, self.num_up = plus, (scale * self.unshuffle).bit_length() - 1
        self.save_tail: Save = save
        self.conv_first = Conv3x3(num_in_ch * self.unshuffle**2, num_feat, backend=backend)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch, backend, plus=plus, save=save) for _ in range(num_block)))
        self.conv_body = Conv3x3(num_feat, num_feat, backend=backend)
        for k in range(1, self.num_up + 1):
            self.add_module(f"conv_up{k}", Conv3x3(num_feat, num_feat, backend=backend))
        self.conv_hr = Conv3x3(num_feat, num_feat, backend=backend)
        self.conv_last = Conv3x3(num_feat, num_out_ch, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W), values usually 0..1 -> (N, num_out_ch, scale * H, scale * W), not clamped.

        Any floating dtype that the parameters have too; under autocast the result is in autocast's dtype.

        Raises:
            ValueError: x has other dimensions or another number of channels.
        """
        check_picture("RRDBNet", x, self.num_in_ch)
        h, w = x.shape[2:]
        return self.tail(self.features(x))[:, :, : h * self.scale, : w * self.scale]

    def features(self, x: Tensor, progress: Callable[[float], None] | None = None) -> Tensor:
        """Steps 1 to 3; at inference `progress` is told after each block which part of them is done."""
        return self.trunk(unshuffled(x, self.unshuffle), progress)

    def trunk(self, x: Tensor, progress: Callable[[float], None] | None = None) -> Tensor:
        """Steps 2 and 3: the (unshuffled) image -> features (N, num_feat, H, W), channels-last."""
        f = self.conv_first(x)
        if needs_grad(self, x):
            return self.conv_body(self.body(f), residual=f)
        front, back, spare = self.body[0].scratch(f)  # type: ignore[operator]
        front[:, : self.num_feat] = f
        for done, block in enumerate(self.body, 1):
            front, back = block.run_in(front, back, spare)  # type: ignore[operator]
            if progress is not None:
                progress(done / self.num_block)
        return self.conv_body(front[:, : self.num_feat], residual=f, out=spare)

    def tail(self, features: Tensor) -> Tensor:
        """Steps 4 and 5: features -> the (uncropped) result. A result pixel depends on the features at most two pixels away."""
        z = features
        del features  # so that the first step's input can go when the second runs
        if needs_grad(self, z):
            convs = [*(getattr(self, f"conv_up{k}") for k in range(1, self.num_up + 1)), self.conv_hr, self.conv_last]
            steps = [Step(upsample=2, negative_slope=NEGATIVE_SLOPE)] * self.num_up + [Step(negative_slope=NEGATIVE_SLOPE), Step()]
            weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
            return tail(z, steps, weights, biases, save=self.save_tail, backend=self.backend)
        act: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": NEGATIVE_SLOPE}
        ups = [getattr(self, f"conv_up{k}") for k in range(1, self.num_up + 1)]
        parts = [Part(partial(conv, upsample=2, **act), self.num_feat, upsample=2) for conv in ups]
        parts += [Part(partial(self.conv_hr, **act), self.num_feat), Part(self.conv_last, self.num_out_ch)]
        return run_parts(z, parts, self.backend)

    @property
    def trunk_share(self) -> float:
        """The part of the time that `features` takes."""
        return self.num_block / (self.num_block + TAIL_BLOCKS)

    @property
    def tail_scale(self) -> int:
        """Result pixels along each side of a feature pixel, before the crop."""
        return 2**self.num_up

    @property
    def trunk_values(self) -> int:
        """Values for each feature pixel that `features` holds at its peak."""
        return 2 * self.body[0].rdb1.buffer_channels(self.conv_first.weight) + 2 * self.num_feat  # type: ignore[operator, union-attr]

    @property
    def tail_values(self) -> int:
        """Values for each feature pixel that `tail` holds at its peak: the input and the output of `conv_hr`."""
        return 2 * self.num_feat * self.tail_scale**2

    def extra_repr(self) -> str:
        special = f", unshuffle={self.unshuffle}" * (self.unshuffle > 1) + ", plus=True" * self.plus
        return f"scale={self.scale}, num_block={self.num_block}, num_feat={self.num_feat}, num_grow_ch={self.num_grow_ch}{special}"
