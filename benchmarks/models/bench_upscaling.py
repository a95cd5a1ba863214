"""Real photographs through the real Real-ESRGAN weights, x4, forward: what `fastsr upscale` does for each picture.

Inputs are crops of scikit-image's photographs; the weights come with a package (`fastsr models` tells which). ncnn reads its own
file of the same weights.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastsr
from fastsr.bench.case import DTYPES, Builder, Call, Case, Inputs, Runner, State, Unavailable, corner
from fastsr.bench.cases.peers import eager, ncnn_runtime, onnx_runtime, openvino_runtime, tensorrt_runtime
from fastsr.bench.cases.peers.rivals import Wrap, plain_runners
from fastsr.bench.suite import Options
from fastsr.weights import KNOWN

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")

# (weights, RRDBs, (height, width))
PICTURES = {
    "full": (("realesrgan-x4plus", 23, (128, 192)), ("realesrgan-x4plus-anime", 6, (240, 320))),
    "quick": (("realesrgan-x4plus-anime", 6, (48, 64)),),
    "tiny": (("realesrgan-x4plus-anime", 6, (6, 9)),),
}


def cases(options: Options) -> list[Case]:
    """One case for each picture and dtype."""
    return [_case(options, dtype, *picture) for dtype in options.dtypes for picture in PICTURES[options.sizes]]


def _case(options: Options, dtype: str, weights: str, blocks: int, image: tuple[int, int]) -> Case:
    h, w = image
    with torch.device("meta"):
        network = eager.RRDBNet(num_block=blocks)
    element = torch.finfo(DTYPES[dtype]).bits // 8

    def build(wrap: Wrap) -> Builder:
        return lambda state: wrap(_loaded(state, blocks))

    flops = eager.conv_flops(network, h, w)
    runners = {name: Runner(functools.partial(_ours, weights=weights, backend=name)) for name in ("auto", "compiled", "triton")}
    runners |= plain_runners(build, dtype, options)
    if options.device == "cpu":
        for name, peer in {"OpenVINO": openvino_runtime, "onnxruntime": onnx_runtime}.items():
            runners[name] = Runner(_compiled(peer.compile_network, blocks, DTYPES[dtype]), channels_last=False)
        for name, winograd in {"ncnn": True, "ncnn, direct": False}.items():
            by_ncnn = functools.partial(_ncnn, weights=weights, dtype=DTYPES[dtype], winograd=winograd)
            runners[name] = Runner(by_ncnn, channels_last=False)
    else:
        runners["TensorRT"] = Runner(_compiled(tensorrt_runtime.compile_network, blocks, DTYPES[dtype]))
    return Case(
        suite="models",
        subject="upscaling",
        label=f"{weights} {h}x{w} photograph",
        device=options.device,
        dtype=dtype,
        sizes={"n": 1, "h": h, "w": w, "num_block": blocks, "direction": "forward"},
        flops=flops,
        bytes=float(element * (3 * h * w * 17 + sum(p.numel() for p in network.parameters()))),
        state=lambda generator: dict(_load(weights).state_dict()),
        inputs=functools.partial(_crop, h=h, w=w),
        eager=build(lambda network: network),
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


def _crop(generator: torch.Generator, h: int, w: int) -> Inputs:
    """A crop of a photograph, picture and place drawn at random; values 0..1."""
    picture = _photograph(PHOTOGRAPHS[int(torch.randint(len(PHOTOGRAPHS), (1,), generator=generator))])
    top = int(torch.randint(picture.shape[0] - h + 1, (1,), generator=generator))
    left = int(torch.randint(picture.shape[1] - w + 1, (1,), generator=generator))
    crop = np.ascontiguousarray(picture[top : top + h, left : left + w].transpose(2, 0, 1))
    return (torch.from_numpy(crop)[None].float() / 255,)


def _loaded(state: State, blocks: int) -> torch.nn.Module:
    some = next(iter(state.values()))
    network = eager.RRDBNet(num_block=blocks).to(some.device, some.dtype).requires_grad_(False).eval()
    network.load_state_dict(state)
    return network.to(memory_format=torch.channels_last)


def _compiled(peer: object, blocks: int, dtype: torch.dtype) -> Builder:
    return lambda state: peer(_loaded(state, blocks).to(memory_format=torch.contiguous_format), dtype)  # type: ignore[operator]


def _ours(state: State, weights: str, backend: str) -> Call:
    """The network that `fastsr.load` gives, frozen, as `fastsr upscale` runs it."""
    fastsr.set_backend(backend)  # of this process, which belongs to this runner
    some = next(iter(state.values()))
    model = _load(weights).to(some.device, some.dtype)
    model.load_state_dict(state)
    return _under_no_grad(fastsr.freeze(model))


def _under_no_grad(model: torch.nn.Module) -> Call:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = model(x)
        return y

    return run


def _ncnn(state: State, weights: str, dtype: torch.dtype, winograd: bool) -> Call:
    path = _file(weights)
    if path.suffix != ".param":
        raise Unavailable(f"{path} is no file of ncnn's")
    return ncnn_runtime.load_network(path, dtype, winograd)
