"""VQ-VAE (512 codes of 64 channels, 4 pixels a code): reconstruction of a batch, and a training step with its moving averages.

In float32 alone: which of two nearly equal codes an encoder in a lower precision arrives at is chance, whoever computes, and one other
code changes the picture. A training step starts from the same averages every time and is judged by the reconstruction, the loss, the
new codebook, and the gradients of the first and of the last convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.bench.case import Call, Case, Inputs, Runner, State
from fastsr.bench.cases.models import builders
from fastsr.bench.cases.peers import eager, eager_vqvae
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.suite import Options
from fastsr.models import VQVAE

CODES, CHANNELS, DOWNSCALE = 512, 64, 4

#: (batch, height, width)
FORWARD = {"full": ((16, 128, 128), (1, 512, 512)), "quick": ((4, 64, 64),), "tiny": ((1, 16, 16),)}
TRAINING = {"full": ((16, 64, 64), (32, 128, 128)), "quick": ((4, 64, 64),), "tiny": ((1, 16, 16),)}
TRAINED = ("encoder.0.weight", "decoder.6.weight")


def cases(options: Options) -> list[Case]:
    """Forward and a training step at each size, in float32."""
    if "float32" not in options.dtypes:
        return []
    made = [_case(options, image, backward=False) for image in FORWARD[options.sizes]]
    return made + [_case(options, image, backward=True) for image in TRAINING[options.sizes]]


def _case(options: Options, image: tuple[int, int, int], backward: bool) -> Case:
    n, h, w = image
    rows = n * h * w // DOWNSCALE**2
    finish = _training_step if backward else _reconstruct
    runners = {name: Runner(builders.ours(VQVAE, name, finish, trained=backward)) for name in builders.BACKENDS}
    build = functools.partial(builders.eager, eager_vqvae.VQVAE, finish, trained=backward)
    runners |= plain_runners(lambda wrap: build(wrap=wrap), "float32", options)
    with torch.device("meta"):
        network = eager_vqvae.VQVAE().eval()
    parameters = sum(p.numel() for p in network.parameters())
    direction = "forward+backward" if backward else "forward"
    return Case(
        suite="models",
        subject="vqvae",
        label=f"{n}x3x{h}x{w} {direction}",
        device=options.device,
        dtype="float32",
        sizes={"n": n, "h": h, "w": w, "k": CODES, "d": CHANNELS, "rows": rows, "direction": direction},
        flops=n * eager.conv_flops(network, h, w) * (3 if backward else 1) + 2.0 * rows * CODES * CHANNELS,
        bytes=float(4 * (1 + backward) * (2 * 3 * n * h * w + parameters)),
        state=_state,
        inputs=lambda generator: _draw(generator, image),
        eager=build(),
        runners=runners,
    )


def _draw(generator: torch.Generator, image: tuple[int, int, int]) -> Inputs:
    n, h, w = image
    return (torch.rand(n, 3, h, w, generator=generator) - 0.5,)


def _state(generator: torch.Generator) -> State:
    """Weights that keep the variance, and averages as after a step from one row for each code."""
    state = builders.state_like(eager_vqvae.VQVAE, 1)(generator)
    codebook = torch.randn(CODES, CHANNELS, generator=generator)
    moving = {"codebook": codebook, "cluster_size": torch.ones(CODES), "cluster_sum": codebook.clone(), "steps": torch.ones(())}
    return state | {f"quantizer.{name}": tensor for name, tensor in moving.items()}


def _reconstruct(network: nn.Module, forward: Callable[[Tensor], Any]) -> Call:
    def call(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = forward(x)
        return out.reconstruction, out.indices[0]

    return call


def _training_step(network: nn.Module, forward: Callable[[Tensor], Any]) -> Call:
    parameters = dict(network.named_parameters())
    buffers = dict(network.named_buffers())
    first = {name: tensor.clone() for name, tensor in buffers.items()}

    def call(x: Tensor) -> tuple[Tensor, ...]:
        for name, tensor in buffers.items():  # 0.3 MB: every call takes the same step
            tensor.copy_(first[name])
        out = forward(x)
        found = torch.autograd.grad(out.loss, list(parameters.values()))
        gradients = dict(zip(parameters, found, strict=True))
        codebook = buffers["quantizer.codebook"].clone()
        return (out.reconstruction.detach(), out.loss.detach(), codebook, *(gradients[name] for name in TRAINED))

    return call
