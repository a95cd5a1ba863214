"""The tail of a network in training: a chain of 3x3 convolutions at rising resolution that holds one large tensor at a time.

    forward    z = x[0] -> x[1] -> ... -> x[K] = y             each arrow is one `fastsr.ops.conv3x3`
    backward   x[k], g[k+1]  ->  dweight[k], dbias[k]          by all pixels
               g[k+1]        ->  g[k]                          in strips, written over x[k] where that was computed again

After a PixelShuffle (or x2 step) the tensors of the high-resolution image are the largest of the whole network: at x4 one of 64
channels has the bytes of 16 in the trunk. Autograd would hold each with its gradient and the gradient before the shuffle.
Here a tensor makes room for its own gradient, and what is needed besides is one strip. Both ways of saving run the same operations
on the same numbers, so that their gradients agree in every bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastsr import backends, ops
from fastsr.backends import Backend
from fastsr.nn.module import Save, compute_dtype

#: A strip is about this part of the images, or of the rows of a few images, and at least so many rows.
STRIPS, FEWEST_ROWS = 8, 4


@dataclass(frozen=True)
class Step:
    """Options of one convolution, as `fastsr.ops.conv3x3` has them; `negative_slope` is that of a LeakyReLU, 1 for none."""

    upsample: int = 1
    pixel_shuffle: int = 1
    negative_slope: float = 1.0
    scale: float = 1.0

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend) -> Tensor:
        return ops.conv3x3(
            x, weight, bias, activation="none" if self.negative_slope == 1.0 else "leaky_relu",
            negative_slope=self.negative_slope, scale=self.scale, upsample=self.upsample, pixel_shuffle=self.pixel_shuffle, backend=backend,
        )  # fmt: skip


def tail(
    z: Tensor, steps: Sequence[Step], weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, save: Save, backend: Backend
) -> Tensor:
    """Run the steps with gradients.

    Args:
        z: (N, C, H, W).
        steps, weights, biases: one for each convolution; the scale of a step with a LeakyReLU is positive.
        save: "all" keeps the input of every convolution for backward, "input" keeps z.
        backend: of the convolutions.
    """
    dtype = compute_dtype(z)
    z, parameters = z.to(dtype), [t if t is None else t.to(dtype) for t in (*weights, *biases)]
    if backends.choose("conv3x3", backend, z).backend == "reference":
        if save == "input":
            return checkpoint(_plain, z, steps, parameters, backend, use_reentrant=False, preserve_rng_state=False)
        return _plain(z, steps, parameters, backend)
    return _Tail.apply(z, tuple(steps), save, backend, *parameters)


def _plain(z: Tensor, steps: Sequence[Step], parameters: Sequence[Any], backend: Backend) -> Tensor:
    for step, weight, bias in zip(steps, parameters, parameters[len(steps) :], strict=False):
        z = step.run(z, weight, bias, backend)
    return z


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, steps: tuple[Step, ...], save: str, backend: Backend, *parameters: Any) -> Tensor:
        inputs = [z]
        for step, weight, bias in zip(steps, parameters, parameters[len(steps) :], strict=False):
            inputs.append(step.run(inputs[-1], weight, bias, backend))
        y = inputs.pop()
        ctx.options = (steps, save, backend)
        shown = y if steps[-1].negative_slope != 1.0 else None
        ctx.save_for_backward(shown, *parameters, *(inputs[:1] if save == "input" else inputs))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        steps, save, backend = ctx.options
        count = len(steps)
        y, *saved = ctx.saved_tensors
        parameters, inputs = saved[: 2 * count], saved[2 * count :]
        weights, biases = parameters[:count], parameters[count:]
        del saved
        needs_z, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        gradients: list[Tensor | None] = [None] * (2 * count)
        if g.numel() == 0:
            gradients = [torch.zeros_like(p) if p is not None and need else None for p, need in zip(parameters, needs, strict=True)]
            return torch.zeros_like(inputs[0]) if needs_z else None, None, None, None, *gradients
        for step, weight, bias in zip(steps[len(inputs) - 1 : -1], weights[len(inputs) - 1 :], biases[len(inputs) - 1 :], strict=False):
            inputs.append(step.run(inputs[-1], weight, bias, backend))
        if y is not None:
            g = _masked(g, y, steps[-1].negative_slope)
        for k in range(count - 1, -1, -1):
            step, x, weight = steps[k], inputs.pop(), weights[k]
            g = g if step.scale == 1.0 else g * step.scale
            want = [needs[k], biases[k] is not None and needs[count + k]]
            gradients[k], gradients[count + k] = _parameter_gradients(g, x, weight, step, want)
            if not needs_z and not any(needs[:k]) and not any(needs[count : count + k]):
                break
            slope = steps[k - 1].negative_slope if k else 1.0
            ours = save == "input" and k > 0
            into = x if ours else torch.empty_like(x, memory_format=torch.channels_last)
            g = _data_gradient(into, g, x, weight, step, slope, backend)
        return g if needs_z else None, None, None, None, *gradients


def _masked(g: Tensor, y: Tensor, negative_slope: float) -> Tensor:
    return g if negative_slope == 1.0 else torch.where(y > 0, g, g * negative_slope)


def _parameter_gradients(g: Tensor, x: Tensor, weight: Tensor, step: Step, want: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Of one convolution, from the gradient of its output before the LeakyReLU; x is read whole, a shuffled g in its slices."""
    if not any(want):
        return None, None
    u = x if step.upsample == 1 else F.interpolate(x, scale_factor=float(step.upsample), mode="nearest")
    u = u.contiguous(memory_format=torch.channels_last)
    r, outputs = step.pixel_shuffle, weight.shape[0]
    slices = r * r
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want[0] else None
    dbias = weight.new_empty(outputs) if want[1] else None
    for s in range(slices):
        part = g[:, :, s // r :: r, s % r :: r].contiguous(memory_format=torch.channels_last)
        _, dw, db = torch.ops.aten.convolution_backward(
            part, u, weight[s::slices], [outputs // slices], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, *want]
        )
        if dweight is not None:
            dweight[s::slices] = dw
        if dbias is not None:
            dbias[s::slices] = db
    return dweight, dbias


def _data_gradient(into: Tensor, g: Tensor, x: Tensor, weight: Tensor, step: Step, negative_slope: float, backend: Backend) -> Tensor:
    """Fill `into`, which may be x itself, with the gradient of x, through the LeakyReLU that made x."""
    flipped = weight.flip(2, 3).transpose(0, 1).contiguous()
    up, r, height = step.upsample, step.pixel_shuffle, x.shape[2]
    for images, top, bottom in _strips(x.shape[0], height):
        low, high = max(0, top * up - 1), min(height * up, bottom * up + 1)  # rows of the convolution's output, one more on each side
        part = g[images, :, low * r : high * r]
        if r > 1:
            part = F.pixel_unshuffle(part, r)
        rows = ops.conv3x3(part, flipped, backend=backend)[:, :, top * up - low : bottom * up - low]
        if up > 1:
            rows = F.avg_pool2d(rows, up, divisor_override=1)
        into[images, :, top:bottom] = _masked(rows, x[images, :, top:bottom], negative_slope)
    return into


def _strips(count: int, height: int) -> Iterator[tuple[slice, int, int]]:
    """(images, first row, row after the last) of all strips: whole images where there are some, else rows of all."""
    if count >= STRIPS // 2:
        images = -(-count // STRIPS)
        for n in range(0, count, images):
            yield slice(n, n + images), 0, height
        return
    rows = max(FEWEST_ROWS, -(-height // STRIPS))
    for top in range(0, height, rows):
        yield slice(None), top, min(height, top + rows)
