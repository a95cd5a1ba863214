"""Builders that the networks' cases share: the plain network in both layouts, compiled, in OpenVINO, and ours with the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastsr
from fastsr.bench.case import BASELINE, Builder, Call, Runner, State
from fastsr.bench.cases.peers import openvino_runtime

#: Makes a network of the case's sizes.
Network = Callable[[], nn.Module]

#: What is timed of a network: the call itself, or something around it.
Wrap = Callable[[nn.Module], Call]

BACKENDS = ("auto", "compiled", "triton", "reference")


def state_like(network: Network, gain: float) -> Callable[[torch.Generator], State]:
    """Draws normal weights of variance `gain` over the fan-in, and likewise small biases."""

    def draw(generator: torch.Generator) -> State:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in network().state_dict().items()}
        return {name: torch.randn(shape, generator=generator) * (gain / max(1, shape[1:].numel())) ** 0.5 for name, shape in shapes.items()}

    return draw


def runners(plain: Network, ours: Network, device: str, dtype: torch.dtype, wrap: Wrap | None = None) -> dict[str, Runner]:
    """Everyone who runs the network; OpenVINO on a CPU, and only where nothing stands around the call."""
    compiled = functools.partial(torch.compile, dynamic=False)
    found = {
        **{name: Runner(_ours(ours, name, wrap)) for name in BACKENDS},
        "eager NCHW": Runner(eager(plain, wrap), channels_last=False),
        BASELINE: Runner(eager(plain, wrap, channels_last=True)),
        "torch.compile": Runner(eager(lambda: compiled(plain()), wrap, channels_last=True)),
    }
    if device == "cpu" and wrap is None:
        found["OpenVINO"] = Runner(_openvino(plain, dtype), channels_last=False)
    return found


def eager(network: Network, wrap: Wrap | None = None, channels_last: bool = False) -> Builder:
    """The network with the case's weights."""

    def build(state: State) -> Call:
        some = next(iter(state.values()))
        built = network()
        inner = getattr(built, "_orig_mod", built)  # what torch.compile wraps
        inner.to(some.device, some.dtype).load_state_dict(state)
        inner.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        built.train(wrap is not None).requires_grad_(wrap is not None)
        return wrap(built) if wrap is not None else built

    return build


def training_step(names: tuple[str, ...]) -> Wrap:
    """Forward and backward of inputs (x, grad): the output, and of all gradients those of x and of the parameters in `names`."""

    def around(network: nn.Module) -> Call:
        inner = getattr(network, "_orig_mod", network)
        parameters = dict(inner.named_parameters())

        def call(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            leaf = x.detach().requires_grad_()
            y = network(leaf)
            found = torch.autograd.grad(y, [leaf, *parameters.values()], grad)
            gradients = dict(zip(parameters, found[1:], strict=True))
            return (y.detach(), found[0], *(gradients[name] for name in names))

        return call

    return around


def _openvino(network: Network, dtype: torch.dtype) -> Builder:
    return lambda state: openvino_runtime.compile_network(eager(network)(state), dtype)


def _ours(network: Network, backend: str, wrap: Wrap | None) -> Builder:
    def build(state: State) -> Call:
        fastsr.set_backend(backend)  # of this process, which belongs to this runner
        return eager(network, wrap, channels_last=True)(state)

    return build
