"""`upscale`: a network on pictures of any kind, in the memory that there is and without a black one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr import backends
from fastsr.upscaling import budget, kinds, streaming

#: ITU-R BT.601: what a colour picture's grey is.
LUMA = (0.299, 0.587, 0.114)

#: What is tried after a dtype in which a network gave NaN or infinity.
WIDER = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float32}

Notify = Callable[[str], None]


def upscale(
    model: nn.Module,
    image: Any,
    *,
    dtype: torch.dtype | None = None,
    outscale: float | None = None,
    memory: int | None = None,
    notify: Notify | None = None,
    progress: streaming.Progress | None = None,
) -> Any:
    """Enlarge a picture with a super-resolution network; the result is of the kind that came in.

        1. The picture becomes (1, C, H, W) in `dtype` on the network's device, values 0..1.
        2. Colour (or grey, given to a colour network three times) goes through the network and is clamped to 0..1.
           Grey comes back as the luma of the result (ITU-R BT.601).
        3. Alpha is enlarged by bicubic interpolation.
        4. Where `outscale` asks for another size than the network gives, the result is resampled (bicubic, antialiased).
        5. The result becomes the kind, dtype and device of the picture, integers rounded to nearest.

    Memory: the trunk of the network runs whole, so that pooling sees the whole picture, and its tail in strips of rows, by
    default in no more memory than the trunk took; the result does not depend on the strips. Only if the trunk does not fit into
    `memory`, overlapping tiles with blended borders are used, and `notify` is told. Where memory runs out all the same, smaller
    pieces are tried. Networks other than this package's run whole.

    Precision: where a network in float16 gives NaN or infinity, the picture is done again in bfloat16 and then in float32,
    and `notify` is told. The network's own parameters stay as they are; give a float32 network and a lower `dtype`, and
    float32 is what is fallen back to.

    Args:
        model: for instance from `fastsr.load`; called under `torch.no_grad`.
        image: one of
            a PIL image of any mode (palettes become RGB or RGBA; 16-bit grey stays 16-bit; CMYK and others become RGB);
            a NumPy array (H, W), or (H, W, C) with 1 grey, 2 grey + alpha, 3 RGB or 4 RGBA channels, of uint8, uint16 or
            floating point in 0..1;
            a tensor (C, H, W) or (N, C, H, W), floating point in 0..1, with the network's number of channels or one.
        dtype: of the arithmetic: float16, bfloat16, float32 or float64; None for the network's own.
        outscale: the result's height and width by those of the picture; None for the network's own scale.
        memory: bytes that the network's activations may take; None for four fifths of what is free.
        notify: is given a line of text where something was done in another way than asked; None for Python's warnings.
        progress: is given the part that is done, 0..1.

    Raises:
        TypeError: another kind of picture, or dtype.
        ValueError: a shape that is no picture's, or an outscale or a budget that is not positive.
        FloatingPointError: the network gave NaN or infinity in float32 too.
        MemoryError: the smallest pieces do not fit.
    """
    return Upscaler(model, dtype=dtype, outscale=outscale, memory=memory, notify=notify, progress=progress)(image)


def upscale_many(model: nn.Module, images: Iterable[Any], **options: Any) -> Iterator[Any]:
    """The results of `upscale` for one picture after another, in their order, each computed when it is asked for.

    Options as of `upscale`. Iterating goes on where `images` does: it may be a generator that reads files.
    """
    one = Upscaler(model, **options)
    return (one(image) for image in images)


class Upscaler:
    """`upscale` with its options, for many pictures: copies of the network in other precisions are made once."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        outscale: float | None = None,
        memory: int | None = None,
        notify: Notify | None = None,
        progress: streaming.Progress | None = None,
    ) -> None:
        if outscale is not None and not 0 < outscale < float("inf"):
            raise ValueError(f"upscale: outscale is {outscale}; expected a positive number")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"upscale: dtype is {dtype}; expected a floating-point dtype")
        if memory is not None and memory <= 0:
            raise ValueError(f"upscale: memory is {memory}; expected a positive number of bytes")
        self.outscale, self.memory = outscale, memory
        self._notify: Notify = notify or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=6))
        self._progress: streaming.Progress = progress or (lambda part: None)
        like = next(model.parameters())
        self._channels: int = getattr(model, "num_in_ch", 3)
        self._device, self._dtype = like.device, dtype or like.dtype
        self._model, self._models = model, {like.dtype: model}

    def __call__(self, image: Any) -> Any:
        """The enlarged picture."""
        picture, restore = kinds.to_tensor(image)
        colour, alpha = _split(picture, self._channels, alpha_allowed=not isinstance(image, Tensor))
        with torch.no_grad():
            grey = colour.shape[1] == 1 and self._channels == 3
            y = self._finite(colour.expand(-1, 3, -1, -1) if grey else colour)
            if grey and y.shape[1] == 3:
                y = (y * y.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
            if alpha is not None:
                a = F.interpolate(alpha.to(y.device), size=y.shape[2:], mode="bicubic", align_corners=False).clamp_(0, 1)
                y = torch.cat([y, a], 1)
            y = self._resized(y, *picture.shape[2:])
        return restore(y)

    def _resized(self, y: Tensor, h: int, w: int) -> Tensor:
        if self.outscale is None:
            return y
        size = max(1, round(h * self.outscale)), max(1, round(w * self.outscale))
        if size == tuple(y.shape[2:]):
            return y
        return F.interpolate(y, size=size, mode="bicubic", align_corners=False, antialias=True).clamp_(0, 1)

    def _finite(self, colour: Tensor) -> Tensor:
        """The network's result in the working dtype; wider precisions are tried where it is not finite."""
        dtype = self._dtype
        while True:
            if dtype not in self._models:
                self._models[dtype] = copy.deepcopy(self._model).to(dtype)
            try:
                return self._fitting(self._models[dtype], colour.to(self._device, dtype), colour.dtype)
            except streaming.NotFinite:
                wider = WIDER.get(dtype)
                if wider is None:
                    at_fault = "its weights or the picture are at fault"
                    raise FloatingPointError(f"the network gave NaN or infinity in {dtype}: {at_fault}") from None
                self._notify(f"the network gave NaN or infinity in {dtype}; this picture is done again in {wider}")
                dtype = wider

    def _fitting(self, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in pieces that fit into memory."""
        if not all(hasattr(model, name) for name in ("features", "tail", "trunk_values", "tail_values")):
            return streaming.whole(model, x, dtype)
        limit = self._limit(model, x, dtype)
        n, _, h, w = x.shape
        while True:
            plan = budget.plan(model, n, h, w, x.element_size(), limit, _is_eager(model, x))  # type: ignore[arg-type]
            if plan.tile is not None:
                rows, columns = (len(budget.spans(side, tile)) for side, tile in zip((h, w), plan.tile, strict=True))
                pooled = ", each of which is pooled by itself" if getattr(model, "local_pooling", 0) is None else ""
                whole = f"{w}x{h} does not fit into {(limit or 0) / 1e6:.0f} MB of memory whole"
                self._notify(f"{whole}: done in {rows * columns} overlapping tiles{pooled}")
            try:
                return streaming.run(model, x, dtype, plan, self._progress)
            except (RuntimeError, MemoryError) as error:
                if not budget.out_of_memory(error):
                    raise
                problem = " ".join(str(error).split())[:200]
            # outside of the handler, whose traceback keeps every buffer alive
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
            limit = plan.work // 2
            self._notify(f"out of memory ({problem}); trying again with {limit / 1e6:.0f} MB")

    def _limit(self, model: Any, x: Tensor, dtype: torch.dtype) -> int | None:
        if self.memory is not None:
            return self.memory
        free = budget.available(x.device)
        if free is None:
            return None
        n, _, h, w = x.shape
        result = n * 3 * h * w * model.scale**2 * torch.empty((), dtype=dtype).element_size()
        return max(0, int(budget.SHARE * free) - 3 * result)  # the result, rounded and converted


def _is_eager(model: nn.Module, x: Tensor) -> bool:
    """True if the convolutions run in plain PyTorch, which copies and keeps more."""
    weight = next(model.parameters())
    probe = x[:, :1, :1, :1].expand(-1, weight.shape[1], -1, -1)
    return backends.choose("conv3x3", getattr(model, "backend", "auto"), probe, weight).backend == "reference"


def _split(picture: Tensor, channels: int, alpha_allowed: bool) -> tuple[Tensor, Tensor | None]:
    """Colour and alpha of (N, C, H, W) for a network that takes `channels` channels."""
    c = picture.shape[1]
    if c == channels or (c == 1 and channels == 3):
        return picture, None
    if alpha_allowed and c in (2, 4) and (c - 1 == channels or (c == 2 and channels == 3)):
        return picture[:, :-1], picture[:, -1:]
    raise ValueError(f"upscale: the picture has {c} channels; expected {channels} for this network, or 1 (grey) for a colour network")
