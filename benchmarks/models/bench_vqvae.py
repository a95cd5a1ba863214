"""VQ-VAE and VQ-VAE-2 (512 codes of 64 channels, 4 pixels a code): reconstruction, and a training step with its moving averages.

In float32 alone: which of two nearly equal codes an encoder in a lower precision arrives at is chance, whoever computes, and one other
code changes the picture. A training step starts from the same averages every time and is judged by the reconstruction, the loss, the
new codebook, and the gradients of the first and of the last convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.bench.case import Call, Case, Inputs, Runner, State
from fastsr.bench.cases.models import builders
from fastsr.bench.cases.peers import eager, eager_vqvae
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.suite import Options
from fastsr.models import VQVAE, VQVAE2

CODES, CHANNELS, DOWNSCALE = 512, 64, 4


@dataclass(frozen=True)
class Network:
    """Ours and the plain one, and what a training step is judged by."""

    fused: Callable[[], nn.Module]
    plain: type[eager_vqvae.VQVAE] | type[eager_vqvae.VQVAE2]
    levels: tuple[str, ...]  # of codes, as their quantisers are called; each has half the side of the one before
    trained: tuple[str, ...]  # parameters


NETWORKS = {
    "vqvae": Network(VQVAE, eager_vqvae.VQVAE, ("quantizer",), ("encoder.0.weight", "decoder.6.weight")),
    "vqvae2": Network(VQVAE2, eager_vqvae.VQVAE2, ("quantizer_b", "quantizer_t"), ("encoder_b.0.weight", "decoder.6.weight")),
}

#: (batch, height, width)
FORWARD = {
    "vqvae": {"full": ((16, 128, 128), (1, 512, 512)), "quick": ((4, 64, 64),), "tiny": ((1, 16, 16),)},
    "vqvae2": {"full": ((1, 256, 256),), "quick": (), "tiny": ((1, 16, 16),)},
}
TRAINING = {
    "vqvae": {"full": ((16, 64, 64), (32, 128, 128)), "quick": ((4, 64, 64),), "tiny": ((1, 16, 16),)},
    "vqvae2": {"full": ((4, 128, 128),), "quick": (), "tiny": ((1, 16, 16),)},
}


def cases(options: Options) -> list[Case]:
    """Forward and a training step at each size, in float32."""
    if "float32" not in options.dtypes:
        return []
    made = []
    for name in NETWORKS:
        made += [_case(options, name, image, backward=False) for image in FORWARD[name][options.sizes]]
        made += [_case(options, name, image, backward=True) for image in TRAINING[name][options.sizes]]
    return made


def _case(options: Options, name: str, image: tuple[int, int, int], backward: bool) -> Case:
    n, h, w = image
    made = NETWORKS[name]
    rows = sum(n * h * w // (DOWNSCALE << level) ** 2 for level in range(len(made.levels)))
    finish = functools.partial(_training_step, made) if backward else _reconstruct
    runners = {backend: Runner(builders.ours(made.fused, backend, finish, trained=backward)) for backend in builders.BACKENDS}
    build = functools.partial(builders.eager, made.plain, finish, trained=backward)
    runners |= plain_runners(lambda wrap: build(wrap=wrap), "float32", options, inference=not backward)
    if not backward:
        runners |= builders.runtimes(functools.partial(eager_vqvae.Reconstruction, made.plain), "float32", options)
    with torch.device("meta"):
        network = made.plain().eval()
    parameters = sum(p.numel() for p in network.parameters())
    codebooks = len(made.levels) * CODES * CHANNELS
    values = 2 * 3 * n * h * w + parameters + codebooks
    if backward:
        values += parameters + 2 * codebooks  # gradients; moving averages are read, and new codes written
    direction = "training step" if backward else "forward"
    return Case(
        suite="models",
        subject=name,
        label=f"{n}x3x{h}x{w} {direction}",
        device=options.device,
        dtype="float32",
        sizes={"n": n, "h": h, "w": w, "k": CODES, "d": CHANNELS, "rows": rows, "direction": direction},
        flops=n * eager.conv_flops(network, h, w) * (3 if backward else 1) + 2.0 * rows * CODES * CHANNELS,
        bytes=float(4 * values + (0 if backward else 8 * rows)),
        state=functools.partial(_state, made),
        inputs=lambda generator: _draw(generator, image),
        eager=build(),
        runners=runners,
    )


def _draw(generator: torch.Generator, image: tuple[int, int, int]) -> Inputs:
    n, h, w = image
    return (torch.rand(n, 3, h, w, generator=generator) - 0.5,)


def _state(network: Network, generator: torch.Generator) -> State:
    """Weights that keep the variance, and averages as after a step from one row for each code."""
    state = builders.state_like(network.plain, 1)(generator)
    for level in network.levels:
        codebook = torch.randn(CODES, CHANNELS, generator=generator)
        moving = {"codebook": codebook, "cluster_size": torch.ones(CODES), "cluster_sum": codebook.clone(), "steps": torch.ones(())}
        state |= {f"{level}.{name}": tensor for name, tensor in moving.items()}
    return state


def _reconstruct(network: nn.Module, forward: Callable[[Tensor], Any]) -> Call:
    def call(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = forward(x)
        return (out.reconstruction, *out.indices)

    return call


def _training_step(made: Network, network: nn.Module, forward: Callable[[Tensor], Any]) -> Call:
    parameters = dict(network.named_parameters())
    buffers = dict(network.named_buffers())
    first = {name: tensor.clone() for name, tensor in buffers.items()}
    update = builders.optimiser(network)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        for name, tensor in buffers.items():  # 0.3 MB: every call takes the same step
            tensor.copy_(first[name])
        out = forward(x)
        update(out.loss)
        codebooks = (buffers[f"{level}.codebook"].clone() for level in made.levels)
        gradients = (builders.gradient_of(parameters[name]) for name in made.trained)
        return (out.reconstruction.detach(), out.loss.detach(), *codebooks, *gradients)

    return call
