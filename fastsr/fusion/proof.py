"""The proof that stands before every swap.

    1. On a float64 copy with random parameters the block's own code and the formula agree to 1e-9, in evaluation and in training mode:
       that is what the code computes. Numbers that the code alone knows (0.2 in `x5 * 0.2 + x`) are measured here.
    2. On a copy with the true parameters, in their dtype and with the backend that will run, the fused block is at most twice as far
       from float64 as the block's own code is, output and gradients together (+ 2 units in the last place).

Both use copies; the block, its buffers, its gradients and the random state are left alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.backends import Backend
from fastsr.fusion.families import Candidate, Fusion, Probe
from fastsr.fusion.structure import Refused, has_hooks
from fastsr.fusion.swap import restore

EXACT = 1e-9


def identify(module: nn.Module, candidate: Candidate) -> Fusion:
    """Step 1: what `module` computes.

    Raises:
        Refused: none of the candidate's hypotheses.
    """
    probe = _probe(module, candidate.input_shape, training=False)
    nearest = float("inf")
    for fusion in candidate.hypotheses(probe):
        difference = _difference(fusion.run(probe.module, probe.x, "reference"), probe.y)
        nearest = min(nearest, difference)
        if difference > EXACT:
            continue
        training = _probe(module, candidate.input_shape, training=True)
        difference = _difference(fusion.run(training.module, training.x, "reference"), training.y)
        if difference > EXACT:
            raise Refused(f"in training mode its output differs from a {candidate.kind} by {difference:.1e}")
        return fusion
    raise Refused(f"its output differs from a {candidate.kind} by {nearest:.1e}")


def prove(module: nn.Module, fusion: Fusion, shape: tuple[int, ...], backend: Backend) -> None:
    """Step 2.

    Raises:
        Refused: the fused block is further from float64 than twice the block itself.
    """
    with torch.enable_grad(), _fresh_random_state(module), torch.autocast(next(module.parameters()).device.type, enabled=False):
        parameter = next(module.parameters())
        x, grad = (torch.randn(shape, dtype=torch.float64, device=parameter.device).to(parameter.dtype) for _ in range(2))
        truth = _step(bare_copy(module).double(), _own_forward, x.double(), grad)
        eager = _step(bare_copy(module), _own_forward, x, grad)
        ours = _step(bare_copy(module), lambda block, x: fusion.run(block, x, backend), x, grad)
    e_eager, e_ours = _error(eager, truth), _error(ours, truth)
    bound = 2 * e_eager + 2 * torch.finfo(parameter.dtype).eps
    if not e_ours <= bound:  # NaN is refused too
        raise Refused(f"its fused error is {e_ours:.1e}, and that of its own code {e_eager:.1e}: expected at most {bound:.1e}")


def _probe(module: nn.Module, shape: tuple[int, ...], training: bool) -> Probe:
    """A float64 copy with random parameters, on the CPU, and what its code makes of a random input."""
    with torch.no_grad(), _fresh_random_state(module):
        block = bare_copy(module).to("cpu", torch.float64).train(training)
        for parameter in block.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            parameter.normal_(std=1.2 / fan_in**0.5)
        x = torch.randn(shape, dtype=torch.float64)
        given = x.clone()
        y, again = _own_forward(block, x), _own_forward(block, given.clone())
    if not isinstance(y, Tensor):
        raise Refused(f"it returns a {type(y).__name__}; expected one tensor")
    if not torch.equal(x, given):
        raise Refused("it changes its input in place")
    if not torch.equal(y, again):
        raise Refused(f"it is random in {'training' if training else 'evaluation'} mode")
    return Probe(block, x, y)


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy without hooks and fused forwards, with no gradients."""
    clone = copy.deepcopy(module)
    for m in clone.modules():
        restore(m)
        if has_hooks(m):
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
                hooks.clear()
    for parameter in clone.parameters():
        parameter.grad = None
    return clone


def _own_forward(block: nn.Module, x: Tensor) -> Any:
    return type(block).forward(block, x)


def _step(block: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    block.requires_grad_(True)
    y = run(block, x * 1)  # no leaf: the code may change it in place
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *block.parameters()))]


def _error(tensors: list[Tensor], truth: list[Tensor]) -> float:
    """|t - truth| / |truth| in the Euclidean norm, of the output and the gradients together: steadier on small blocks than a maximum."""
    squares = [((y.double() - t).norm() / t.norm().clamp_min(1e-30)).item() ** 2 for y, t in zip(tensors, truth, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def _difference(y: Any, truth: Tensor) -> float:
    """max |y - truth| / max |truth|; infinite where the shapes differ."""
    if not isinstance(y, Tensor) or y.shape != truth.shape:
        return float("inf")
    difference = (y.double() - truth.double()).abs().max().item() / max(truth.abs().max().item(), 1e-30)
    return difference if difference == difference else float("inf")


@contextlib.contextmanager
def _fresh_random_state(module: nn.Module) -> Iterator[None]:
    """Random numbers of its own, the same each time; torch's states are as before afterwards."""
    devices = sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng([d.index or 0 for d in devices]):
        torch.manual_seed(0)
        yield
