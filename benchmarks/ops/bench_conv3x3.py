"""conv3x3 at the shapes that RRDBNet and RCAN are made of.

Each case names its channels, its image and what its epilogue does; eager PyTorch does the same steps one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastsr import ops
from fastsr.bench.case import Builder, Call, Case, Inputs, Runner, State, element_size, laid_out, with_gradients
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.suite import Options
from fastsr.kernels.conv3x3.reference import conv3x3 as eager_conv3x3

#: (in, out) channels: RCAN's body and RRDBNet's tail, then the five convolutions of a dense block.
CHANNELS = ((64, 64), (64, 32), (96, 32), (128, 32), (160, 32), (192, 64))
IMAGES = ((16, 48, 48), (32, 64, 64), (1, 128, 128), (1, 256, 256))
LARGE = (1, 540, 960)

SLOPE = 0.2


@dataclass(frozen=True)
class Epilogue:
    """What follows the convolution."""

    name: str
    options: dict[str, Any]  # of fastsr.ops.conv3x3
    residual: bool = False


NONE = Epilogue("bias", {})
RELU = Epilogue("bias relu", {"activation": "relu"})
LEAKY = Epilogue("bias leaky_relu", {"activation": "leaky_relu", "negative_slope": SLOPE})
SKIP = Epilogue("bias scale residual", {"scale": 0.2}, residual=True)
ENLARGE = Epilogue("upsample bias leaky_relu", {"upsample": 2, "activation": "leaky_relu", "negative_slope": SLOPE})
SHUFFLE = Epilogue("bias pixel_shuffle", {"pixel_shuffle": 2})


def cases(options: Options) -> list[Case]:
    """Forward at every size; forward and backward at the two ends of a dense block and in RCAN's body."""
    full = options.sizes == "full"
    images = {"tiny": ((2, 5, 19),), "quick": IMAGES[:1], "full": (*IMAGES, LARGE)}[options.sizes]
    made = []
    for dtype in options.dtypes:
        for image in images:
            for cin, cout in CHANNELS:
                if not full and (cin, cout) not in ((64, 64), (64, 32), (192, 64)):
                    continue
                epilogue = LEAKY if cout == 32 else SKIP if cin == 192 else RELU
                made.append(_case(options, dtype, cin, cout, image, epilogue))
                if (cin, cout) in ((64, 64), (64, 32), (192, 64)) and image != LARGE and (full or cin != 192):
                    made.append(_case(options, dtype, cin, cout, image, epilogue, backward=True))
        if options.sizes != "quick":
            image = (1, 256, 256) if full else images[0]
            made += [_case(options, dtype, 64, 64, image, epilogue) for epilogue in (NONE, SKIP, ENLARGE)]
            made.append(_case(options, dtype, 64, 256, image, SHUFFLE))
    return made


def _case(
    options: Options, dtype: str, cin: int, cout: int, image: tuple[int, int, int], epilogue: Epilogue, backward: bool = False
) -> Case:
    n, h, w = image
    up, r = epilogue.options.get("upsample", 1), epilogue.options.get("pixel_shuffle", 1)
    out_shape = (n, cout // (r * r), h * up * r, w * up * r)

    def state(generator: torch.Generator) -> State:
        drawn = {
            "weight": torch.randn(cout, cin, 3, 3, generator=generator) / (9 * cin) ** 0.5,
            "bias": torch.randn(cout, generator=generator),
        }
        if epilogue.residual and backward:  # a constant skip: its gradient is the output's own
            drawn["residual"] = torch.randn(out_shape, generator=generator)
        return drawn

    def inputs(generator: torch.Generator) -> Inputs:
        drawn = [torch.randn(n, cin, h, w, generator=generator)]
        if backward or epilogue.residual:
            drawn.append(torch.randn(out_shape, generator=generator))
        return tuple(drawn)

    build = functools.partial(_builder, epilogue=epilogue)
    runners = {
        name: Runner(_finish(build(call=functools.partial(ops.conv3x3, backend=name)), backward))
        for name in ("auto", "compiled", "triton", "reference")
    }
    runners |= plain_runners(lambda wrap: _finish(build(call=wrap(_eager)), backward), dtype, options, inference=not backward)
    pixels = n * h * w * up * up
    read, written, weights = n * cin * h * w, n * cout * h * w * up * up, (9 * cin + 1) * cout
    moved = read + written * (2 if epilogue.residual else 1) + weights
    if backward:
        moved += read + written + weights  # the gradients: that of the output comes in, those of x and of the weights go out
    direction = "forward+backward" if backward else "forward"
    return Case(
        suite="ops",
        subject="conv3x3",
        label=f"{cin}->{cout} {n}x{h}x{w} {epilogue.name} {direction}",
        device=options.device,
        dtype=dtype,
        sizes={"cin": cin, "cout": cout, "n": n, "h": h, "w": w, "epilogue": epilogue.name, "direction": direction},
        flops=2.0 * 9 * cin * cout * pixels * (3 if backward else 1),
        bytes=float(moved * element_size(dtype)),
        state=state,
        inputs=inputs,
        eager=_finish(build(call=_eager), backward),
        runners=runners,
    )


def _finish(build: Builder, backward: bool) -> Builder:
    return laid_out(with_gradients(build, count=2) if backward else build)


def _builder(epilogue: Epilogue, call: Callable[..., torch.Tensor]) -> Builder:
    """The op with this epilogue."""

    def build(state: State) -> Call:
        weight, bias, skip = state["weight"], state["bias"], state.get("residual")

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return call(x, weight, bias, residual=skip if residual is None else residual, **epilogue.options)

        return run

    return build


def _eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = SLOPE,
    **options: Any,
) -> torch.Tensor:
    """The same steps, one PyTorch op after the other."""
    slope = {"none": 1.0, "relu": 0.0, "leaky_relu": negative_slope}[activation]
    return eager_conv3x3(x, weight, bias, negative_slope=slope, **options)
