"""Real photographs through the real Real-ESRGAN weights, x4: the network's forward, and `fastsr.upscale` on a whole 8-bit picture.

The latter turns bytes into values, runs the trunk whole and the tail in strips of rows, and clamps; everyone else does the same with
the network whole. It is judged before values are rounded to bytes again, which would turn a last bit into a level.

Inputs are crops of scikit-image's photographs; the weights come with a package (`fastsr models` tells which). ncnn reads its own file of
the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsr
from fastsr.bench.case import DTYPES, Call, Case, Inputs, Runner, State, Unavailable, corner, element_size
from fastsr.bench.cases.models import builders
from fastsr.bench.cases.peers import eager, ncnn_runtime
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.suite import Options
from fastsr.weights import KNOWN

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")

# (weights, RRDBs, (height, width))
PICTURES = {
    "full": (("realesrgan-x4plus", 23, (128, 192)), ("realesrgan-x4plus-anime", 6, (240, 320))),
    "quick": (("realesrgan-x4plus-anime", 6, (48, 64)),),
    "tiny": (("realesrgan-x4plus-anime", 6, (6, 9)),),
}
WHOLE = {
    "full": (("realesrgan-x4plus-anime", 6, (360, 480)),),
    "quick": (("realesrgan-x4plus-anime", 6, (40, 56)),),
    "tiny": (("realesrgan-x4plus-anime", 6, (8, 9)),),
}


def cases(options: Options) -> list[Case]:
    """One case for each picture and dtype."""
    made = []
    for dtype in options.dtypes:
        made += [_case(options, dtype, *picture, whole=False) for picture in PICTURES[options.sizes]]
        made += [_case(options, dtype, *picture, whole=True) for picture in WHOLE[options.sizes]]
    return made


def _case(options: Options, dtype: str, weights: str, blocks: int, image: tuple[int, int], whole: bool) -> Case:
    h, w = image
    plain = functools.partial(eager.RRDBNet, num_block=blocks)
    finish = functools.partial(_bytes_to_values, dtype=dtype) if whole else None
    with torch.device("meta"):
        network = plain()
    flops = eager.conv_flops(network, h, w)
    ours = functools.partial(_ours, weights=weights, whole=whole)
    runners = {name: Runner(functools.partial(ours, backend=name)) for name in ("auto", "compiled", "triton")}
    runners |= plain_runners(lambda wrap: builders.eager(plain, finish, wrap, trained=False), dtype, options, inference=True)
    runners |= builders.runtimes(plain, dtype, options, finish)
    if options.device == "cpu":
        for name, winograd in {"ncnn": True, "ncnn, direct": False}.items():
            by_ncnn = functools.partial(_ncnn, weights=weights, dtype=DTYPES[dtype], winograd=winograd, finish=finish)
            runners[name] = Runner(by_ncnn, channels_last=False)
    parameters = sum(p.numel() for p in network.parameters())
    return Case(
        suite="models",
        subject="upscaling",
        label=f"{weights} {h}x{w} {'8-bit picture' if whole else 'photograph'}",
        device=options.device,
        dtype=dtype,
        sizes={"n": 1, "h": h, "w": w, "num_block": blocks, "direction": "forward"},
        flops=flops,
        bytes=float(
            3 * h * w * (1 + 16 * 4) + parameters * element_size(dtype) if whole else element_size(dtype) * (3 * h * w * 17 + parameters)
        ),
        state=lambda generator: dict(_load(weights).state_dict()),
        inputs=functools.partial(_crop, h=h, w=w, whole=whole),
        eager=builders.eager(plain, finish, trained=False),
        runners=runners,
        crop=corner(64, flops),
    )


def _file(weights: str) -> Path:
    path = KNOWN[weights].path()
    if path is None:
        raise Unavailable(f"the weights {weights} are not installed; {KNOWN[weights].remedy}")
    return path


def _load(weights: str) -> torch.nn.Module:
    return fastsr.load(_file(weights))


@functools.cache
def _photograph(name: str) -> np.ndarray:
    try:
        from skimage import data
    except ImportError as error:
        raise Unavailable("scikit-image, which brings the photographs, is not installed; pip install scikit-image") from error
    picture: np.ndarray = getattr(data, name)()
    return picture


def _crop(generator: torch.Generator, h: int, w: int, whole: bool) -> Inputs:
    """A crop of a photograph, picture and place drawn at random; values 0..1, or bytes."""
    picture = _photograph(PHOTOGRAPHS[int(torch.randint(len(PHOTOGRAPHS), (1,), generator=generator))])
    top = int(torch.randint(picture.shape[0] - h + 1, (1,), generator=generator))
    left = int(torch.randint(picture.shape[1] - w + 1, (1,), generator=generator))
    crop = np.ascontiguousarray(picture[top : top + h, left : left + w].transpose(2, 0, 1))
    picture = torch.from_numpy(crop)[None]
    return (picture if whole else picture.float() / 255,)


def _bytes_to_values(network: torch.nn.Module, forward: Callable[[Tensor], Any], dtype: str) -> Call:
    """Bytes become values of the case's dtype, which is what the network sees in float64 too; the answer is clamped, float32 at least."""
    working = next(network.parameters()).dtype

    def call(x: Tensor) -> Tensor:
        values = (x.float() / 255).to(DTYPES[dtype]).to(working)
        with torch.no_grad():
            y: Tensor = forward(values)
            return (y if y.dtype == torch.float64 else y.float()).clamp_(0, 1)

    return call


def _ours(state: State, weights: str, backend: str, whole: bool) -> Call:
    """The network that `fastsr.load` gives, frozen, as `fastsr upscale` runs it."""
    fastsr.set_backend(backend)  # of this process, which belongs to this runner
    some = next(iter(state.values()))
    model = _load(weights).to(some.device, some.dtype)
    model.load_state_dict(state)
    fastsr.freeze(model)
    return (lambda x: fastsr.upscale(model, x.float() / 255)) if whole else _under_no_grad(model)


def _under_no_grad(model: torch.nn.Module) -> Call:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = model(x)
        return y

    return run


def _ncnn(state: State, weights: str, dtype: torch.dtype, winograd: bool, finish: builders.Finish | None) -> Call:
    path = _file(weights)
    if path.suffix != ".param":
        raise Unavailable(f"{path} is no file of ncnn's")
    call = ncnn_runtime.load_network(path, dtype, winograd)
    return finish(torch.nn.ParameterList(state.values()), call) if finish is not None else call
