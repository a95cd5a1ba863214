"""RRDBNet x4 with 23 blocks, one image, forward: the network of Real-ESRGAN.

All runners have the same weights; the answer of each is compared with the eager network in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

import fastsr
from fastsr.bench.case import BASELINE, DTYPES, Builder, Call, Case, Inputs, Runner, State, Unavailable
from fastsr.bench.cases.peers import eager, openvino_runtime
from fastsr.bench.suite import Options

SIZES = {"full": (128, 256), "quick": (32,), "tiny": (8,)}


def cases(options: Options) -> list[Case]:
    """One case for each size and dtype."""
    return [_case(options.device, dtype, size) for dtype in options.dtypes for size in SIZES[options.sizes]]


def _case(device: str, dtype: str, size: int) -> Case:
    def state(generator: torch.Generator) -> State:
        """Weights of the size that training starts from, times what keeps 23 blocks' outputs near 1."""
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in eager.RRDBNet().state_dict().items()}
        return {name: torch.randn(shape, generator=generator) / max(1, shape[1:].numel()) ** 0.5 for name, shape in shapes.items()}

    def inputs(generator: torch.Generator) -> Inputs:
        return (torch.rand(1, 3, size, size, generator=generator),)

    with torch.device("meta"):
        network = eager.RRDBNet()
    element = torch.finfo(DTYPES[dtype]).bits // 8
    return Case(
        suite="models",
        subject="rrdbnet",
        label=f"x4 1x3x{size}x{size} forward",
        device=device,
        dtype=dtype,
        sizes={"n": 1, "h": size, "w": size, "num_feat": 64, "num_block": 23, "num_grow_ch": 32, "direction": "forward"},
        flops=eager.conv_flops(network, size, size),
        bytes=float(element * (3 * size * size * 17 + sum(p.numel() for p in network.parameters()))),
        state=state,
        inputs=inputs,
        eager=_eager(channels_last=False),
        runners={
            **{name: Runner(_ours(name)) for name in ("auto", "compiled", "triton", "reference")},
            "eager NCHW": Runner(_eager(channels_last=False), channels_last=False),
            BASELINE: Runner(_eager()),
            "torch.compile": Runner(_eager(wrap=functools.partial(torch.compile, dynamic=False))),
            **({"OpenVINO": Runner(_openvino(DTYPES[dtype]), channels_last=False)} if device == "cpu" else {}),
        },
    )


def _loaded(network: nn.Module, state: State, channels_last: bool) -> nn.Module:
    some = next(iter(state.values()))
    network = network.to(some.device, some.dtype).requires_grad_(False).eval()
    network.load_state_dict(state)
    return network.to(memory_format=torch.channels_last) if channels_last else network


def _eager(channels_last: bool = True, wrap: Callable[[nn.Module], Call] = lambda network: network) -> Builder:
    return lambda state: wrap(_loaded(eager.RRDBNet(), state, channels_last))


def _openvino(dtype: torch.dtype) -> Builder:
    return lambda state: openvino_runtime.compile_network(_loaded(eager.RRDBNet(), state, channels_last=False), dtype)


def _ours(backend: str) -> Builder:
    def build(state: State) -> Call:
        try:
            from fastsr.models import RRDBNet
        except ImportError as error:
            raise Unavailable(f"fastsr.models has no RRDBNet: {error}") from error
        fastsr.set_backend(backend)  # of this process, which belongs to this runner
        return _loaded(RRDBNet(3, 3, scale=4, num_feat=64, num_block=23, num_grow_ch=32), state, channels_last=True)

    return build
