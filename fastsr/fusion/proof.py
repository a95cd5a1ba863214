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
from torch.utils._pytree import tree_flatten, tree_leaves

from fastsr.backends import Backend
from fastsr.fusion.families import Candidate, Fusion, Probe
from fastsr.fusion.structure import Refused, has_hooks
from fastsr.fusion.swap import restore

EXACT = 1e-9
MOVING = 1e-4
DRAWS = 8


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
        training = _probe(module, candidate.input_shape, training=True, draws=candidate.draws)
        with _fresh_random_state(module):
            difference = _difference(fusion.run(training.module, training.x, "reference"), training.y)
        if difference > EXACT:
            raise Refused(f"in training mode its output differs from a {candidate.kind} by {difference:.1e}")
        if not _same_gradients(training, fusion):  # losses of equal value may have other gradients
            nearest = 1.0
            continue
        return fusion
    if nearest == float("inf"):
        raise Refused(f"it returns {_described(probe.y)} for an input of shape {tuple(probe.x.shape)}: not what a {candidate.kind} returns")
    raise Refused(f"its output differs from a {candidate.kind} by {nearest:.1e}")


def _same_gradients(probe: Probe, fusion: Fusion) -> bool:
    """The block's own code and the formula have the same gradients, in float64."""
    with torch.enable_grad(), _fresh_random_state(probe.module):
        own = _step(bare_copy(probe.module), _own_forward, probe.x)
        torch.manual_seed(0)
        ours = _step(bare_copy(probe.module), lambda block, x: fusion.run(block, x, "reference"), probe.x)
    return _difference(ours, own) <= 100 * EXACT


def identify_moving(module: nn.Module, candidate: Candidate, backend: Backend) -> Fusion:
    """Both steps for a block whose buffers move in training: three training steps of two copies, one with its own code and one fused, then
    one in evaluation mode, agree in outputs, gradients and all of the state. To 1e-4, since such code computes in float32 whatever it gets.

    Raises:
        Refused: they do not.
    """
    probe_shape, kind = candidate.input_shape, candidate.kind
    with torch.enable_grad(), _fresh_random_state(module):
        device = next(t.device for t in (*module.parameters(), *module.buffers()))
        own, ours = bare_copy(module), bare_copy(module)
        for block in (own, ours):
            _initialise(block)
        fusion = next(candidate.hypotheses(Probe(own, torch.empty(0), None)))
        for step in range(4):
            x = torch.randn(probe_shape, device=device)
            run = _step if step < 3 else _outputs  # with gradients, evaluation mode is left to the block
            theirs = run(own.train(step < 3), _own_forward, x)
            fused = run(ours.train(step < 3), lambda block, x: fusion.run(block, x, backend), x)
            for name, a, b in (("output or gradient", fused, theirs), ("state", _state(ours), _state(own))):
                differences = [_difference(a, b) for a, b in zip(a, b, strict=False)]
                if len(a) != len(b) or max(differences) > MOVING:
                    where = f"training step {step + 1}" if step < 3 else "evaluation mode"
                    raise Refused(f"in {where} its {name} differs from a {kind} by {max(differences):.1e}")
    return fusion


def _state(block: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*block.buffers(), *block.parameters())]


def _initialise(block: nn.Module) -> None:
    """Random codes of norm 1, also for a codebook that waits for its first batch, and random parameters: the same in each call."""
    generator = torch.Generator().manual_seed(1)
    codes = None
    with torch.no_grad():
        for name, buffer in block.named_buffers():
            if name.endswith("initted"):
                buffer.fill_(True)
            elif name.endswith("cluster_size"):
                buffer.fill_(1)
            elif name.endswith(("embed", "embed_avg")):
                codes = nn.functional.normalize(torch.randn(buffer.shape, generator=generator), dim=-1) if codes is None else codes
                buffer.copy_(codes)
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)


def _outputs(block: nn.Module, run: Callable[[nn.Module, Tensor], Any], x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in tree_leaves(run(block, x)) if isinstance(y, Tensor)]


def prove(module: nn.Module, fusion: Fusion, shape: tuple[int, ...], backend: Backend) -> None:
    """Step 2. Where the error on one input is larger, more are drawn and taken as one: a gradient that happens to vanish tells nothing.

    Raises:
        Refused: the fused block is further from float64 than twice the block itself.
    """
    steps: list[tuple[list[Tensor], ...]] = []
    bound, e_eager, e_ours = 0.0, 0.0, 0.0
    with torch.enable_grad(), _fresh_random_state(module), torch.autocast(next(module.parameters()).device.type, enabled=False):
        parameter = next(module.parameters())
        for _ in range(DRAWS):
            x = torch.randn(shape, dtype=torch.float64, device=parameter.device).to(parameter.dtype)
            truth = _step(bare_copy(module).double(), _own_forward, x.double())
            eager = _step(bare_copy(module), _own_forward, x)
            ours = _step(bare_copy(module), lambda block, x: fusion.run(block, x, backend), x)
            steps.append((truth, eager, ours))
            truths, eagers, all_ours = ([torch.stack(same) for same in zip(*lists, strict=True)] for lists in zip(*steps, strict=True))
            e_eager, e_ours = _error(eagers, truths), _error(all_ours, truths)
            bound = 2 * e_eager + 2 * torch.finfo(parameter.dtype).eps
            if e_ours <= bound:
                return
    raise Refused(f"its fused error is {e_ours:.1e}, and that of its own code {e_eager:.1e}: expected at most {bound:.1e}")


def _probe(module: nn.Module, shape: tuple[int, ...], training: bool, draws: bool = False) -> Probe:
    """A float64 copy with random parameters, on the CPU, and what its code makes of a random input; `draws`: under one seed."""
    with torch.no_grad(), _fresh_random_state(module):
        block = bare_copy(module).to("cpu", torch.float64).train(training)
        for parameter in block.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            parameter.normal_(std=1.2 / fan_in**0.5)
        x = torch.randn(shape, dtype=torch.float64)
        given, outputs = x.clone(), []
        for argument in (x, given.clone()):
            if draws:
                torch.manual_seed(0)
            outputs.append(_own_forward(block, argument))
        y, again = outputs
    if not torch.equal(x, given):
        raise Refused("it changes its input in place")
    if _difference(again, y) > 0:
        raise Refused(f"it is random in {'training' if training else 'evaluation'} mode")
    return Probe(block, x, y)


def bare_copy(module: nn.Module, keep_fused: bool = False) -> nn.Module:
    """A copy without hooks and fused forwards (but with `keep_fused`), with no gradients."""
    clone = copy.deepcopy(module)
    for m in clone.modules():
        if not keep_fused:
            restore(m)
        if has_hooks(m):
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
                hooks.clear()
    for parameter in clone.parameters():
        parameter.grad = None
    return clone


def _own_forward(block: nn.Module, x: Tensor) -> Any:
    return type(block).forward(block, x)


def _step(block: nn.Module, run: Callable[[nn.Module, Tensor], Any], x: Tensor) -> list[Tensor]:
    """The outputs, and the gradients that the first two of them give x and all parameters."""
    x = x.clone().requires_grad_()
    block.requires_grad_(True).zero_grad()
    outputs = [y for y in tree_leaves(run(block, x * 1)) if isinstance(y, Tensor)]  # x * 1: no leaf, the code may change it in place
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first = (outputs[0] * grad.to(outputs[0])).sum()  # others are losses; they join with a weight of their own
    losses = [y.sum() * 0.7 for y in outputs[1:2] if y.requires_grad]  # what follows a loss are statistics
    sum(losses, first).backward()
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in (x, *block.parameters())]
    return [*(y.detach() for y in outputs), *gradients]


def _error(tensors: list[Tensor], truth: list[Tensor]) -> float:
    """|t - truth| / |truth| in the Euclidean norm, of the output and the gradients together: steadier on small blocks than a maximum."""
    pairs = [(y.double(), t.double()) for y, t in zip(tensors, truth, strict=True)]
    squares = [((y - t).norm() / t.norm().clamp_min(1e-30)).item() ** 2 for y, t in pairs]
    return (sum(squares) / len(squares)) ** 0.5


def _difference(y: Any, truth: Any) -> float:
    """max |y - truth| / max |truth| of the worst tensor; infinite where they are built differently, or integers differ."""
    (ours, ours_spec), (theirs, spec) = tree_flatten(y), tree_flatten(truth)
    if ours_spec != spec:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            difference = 0.0 if a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) else float("inf")
        elif a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            difference = float("inf")
        elif not a.is_floating_point():
            difference = 0.0 if torch.equal(a, b) else 1.0
        elif a.numel() == 0:
            difference = 0.0
        else:
            difference = (a.double() - b.double()).abs().max().item() / max(b.abs().max().item(), 1e-30)
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _described(y: Any) -> str:
    return f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"


@contextlib.contextmanager
def _fresh_random_state(module: nn.Module) -> Iterator[None]:
    """Random numbers of its own, the same each time; torch's states are as before afterwards."""
    devices = sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng([d.index or 0 for d in devices]):
        torch.manual_seed(0)
        yield
