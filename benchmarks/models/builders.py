"""Builders that the networks' cases share: the plain network and its rivals, and ours with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsr
from fastsr.bench.case import DTYPES, Builder, Call, Runner, State, is_channels_last
from fastsr.bench.cases.peers import onnx_runtime, openvino_runtime, tensorrt_runtime
from fastsr.bench.cases.peers.rivals import Wrap, plain_runners
from fastsr.bench.suite import Options

#: Makes a network of the case's sizes.
Network = Callable[[], nn.Module]

#: Makes the timed call of a network and of its forward computation, which may be compiled, under autocast or another runtime's.
Finish = Callable[[nn.Module, Callable[[Tensor], Any]], Call]

BACKENDS = ("auto", "compiled", "triton", "reference")


def state_like(network: Network, gain: float) -> Callable[[torch.Generator], State]:
    """Draws normal weights of variance `gain` over the fan-in, and biases of variance `gain`."""

    def draw(generator: torch.Generator) -> State:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in network().state_dict().items()}
        return {name: torch.randn(shape, generator=generator) * (gain / max(1, shape[1:].numel())) ** 0.5 for name, shape in shapes.items()}

    return draw


def runners(
    plain: Network, fused: Network, dtype: str, options: Options, finish: Finish | None = None, lean: Network | None = None
) -> dict[str, Runner]:
    """Everyone who runs the network: inference, or with `finish` what that makes of it (then without other runtimes).

    `lean` is our network with its blocks' inputs alone kept for backward, where it has that choice.
    """
    found = {name: Runner(ours(fused, name, finish)) for name in BACKENDS}
    if lean is not None:
        found["auto, save=input"] = Runner(ours(lean, "auto", finish))
    if finish is None:
        found["auto, frozen"] = Runner(ours(fused, "auto", freeze=True))
    found |= plain_runners(lambda wrap: eager(plain, finish, wrap), dtype, options, inference=finish is None)
    if finish is None:
        found |= runtimes(plain, dtype, options)
    return found


def runtimes(network: Network, dtype: str, options: Options, finish: Finish | None = None) -> dict[str, Runner]:
    """Inference of the plain network by the runtimes that exist for the device; they have layouts of their own, and get NCHW."""

    def converted(convert: Callable[[nn.Module, torch.dtype], Call]) -> Builder:
        def build(state: State) -> Call:
            built = loaded(network, state, trained=False)
            call = convert(built, DTYPES[dtype])
            return finish(built, call) if finish is not None else call

        return build

    if options.device == "cuda":
        return {"TensorRT": Runner(converted(tensorrt_runtime.compile_network), channels_last=False)}
    return {
        "OpenVINO": Runner(converted(openvino_runtime.compile_network), channels_last=False, dtype="float32"),
        "onnxruntime": Runner(converted(onnx_runtime.compile_network), channels_last=False),
    }


def eager(network: Network, finish: Finish | None = None, wrap: Wrap = lambda forward: forward, trained: bool | None = None) -> Builder:
    """The network with the case's weights, which take the layout of the first input; it trains if there is a `finish`, or as said."""
    trained = finish is not None if trained is None else trained

    def build(state: State) -> Call:
        built = loaded(network, state, trained)
        forward = wrap(built)
        call = finish(built, forward) if finish is not None else forward
        settled = False

        def settle_and_call(x: Tensor, *rest: Tensor) -> Any:
            nonlocal settled
            if not settled:
                settled = True
                built.to(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
            return call(x, *rest)

        return settle_and_call

    return build


def training_step(names: tuple[str, ...]) -> Finish:
    """A step on inputs (x, target): forward, loss, backward, optimiser. Its answer: the output, and of all gradients those of the
    parameters in `names`.

    The loss is the mean square, which costs what L1 does and has no kink at which rounding would decide the gradient.
    """

    def finish(network: nn.Module, forward: Callable[[Tensor], Tensor]) -> Call:
        parameters = dict(network.named_parameters())
        update = optimiser(network)

        def call(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            y = forward(x)
            # Under autocast y may be of a lower dtype, and a trainer's loss is float32.
            update(F.mse_loss(y.to(target.dtype), target))
            return (y.detach(), *(gradient_of(parameters[name]) for name in names))

        return call

    return finish


def optimiser(network: nn.Module) -> Callable[[Tensor], None]:
    """Backward of a loss and a step of Adam with a learning rate of zero: all its work, and every call finds the same weights."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=0.0, capturable=parameters[0].is_cuda)

    def update(loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    return update


def gradient_of(parameter: Tensor) -> Tensor:
    """That of the last backward."""
    assert parameter.grad is not None
    return parameter.grad


def loaded(network: Network, state: State, trained: bool) -> nn.Module:
    """The network with these weights, to train or for inference."""
    some = next(iter(state.values()))
    built = network().to(some.device, some.dtype)
    built.load_state_dict(state)
    return built.train(trained).requires_grad_(trained)


def ours(network: Network, backend: str, finish: Finish | None = None, freeze: bool = False, trained: bool | None = None) -> Builder:
    """Our network in channels-last on a backend; it trains if there is a `finish`, or as said."""
    trained = finish is not None if trained is None else trained

    def build(state: State) -> Call:
        fastsr.set_backend(backend)  # of this process, which belongs to this runner
        built = loaded(network, state, trained).to(memory_format=torch.channels_last)
        if freeze:
            fastsr.freeze(built)
        return finish(built, built) if finish is not None else built

    return build
