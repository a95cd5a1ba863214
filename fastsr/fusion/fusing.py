"""`fuse_`, `unfuse_` and `fused`: our operators inside modules that someone else wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from fastsr.backends import BACKENDS, Backend, default_backend
from fastsr.fusion.costs import IN_TRAINING, NO_GAIN, gain, predicted
from fastsr.fusion.families import COMPOSITES, MATCHERS, Candidate, Fusion
from fastsr.fusion.planning import PlanAtFirstStep, forget_plan
from fastsr.fusion.proof import bare_copy, identify, identify_moving, prove
from fastsr.fusion.report import Cost, Report, Row
from fastsr.fusion.structure import Refused, check_no_hooks, likeness
from fastsr.fusion.swap import forward_of, restore, swap
from fastsr.memory.planning import unwrapped
from fastsr.nn import Conv3x3, Module

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]


def fuse_(model: nn.Module, filter_fn: Filter | None = None, backend: Backend = "auto", memory: int | str | None = None) -> Report:
    """Find the blocks in `model` that our operators compute, and let them: in place, one block after another.

        1. match    a block's parts (their types, sizes and order, not their names) look like one of a family
        2. identify a float64 copy of the block with random parameters agrees with the family's formula to 1e-9
        3. prove    a copy with its own parameters obeys the twice-eager rule, output and gradients
        4. swap     the instance's `forward`; nothing else

    A block that fails at 2 or 3 is left as it was, with the reason in the report. Of blocks that are alike (class, parts, sizes and every
    plain attribute; only the values of parameters differ) the first is proven. Parameters and their names, hooks, the state dict,
    `requires_grad`, device and dtype stay, and so do optimizers and checkpoints. Families: residual dense blocks and RRDBs, RCABs and CABs,
    channel attention and squeeze-and-excitation, vector quantisers, and in an `nn.Sequential` or a forward that can be traced 3x3
    convolutions with the upsampling, activation and PixelShuffle around them.

    Unless a backend is named, what gains nothing runs its own code: a block whose fused forward moves as many bytes as before and, on a
    GPU, needs as many launches is fused for training alone, and left where its backward saves nothing either. On a CPU, the former are
    squeeze-and-excitation by itself and a CAB with GELU.

    Args:
        model: any module; also one inside DDP or `torch.compile`.
        filter_fn: called once with each module and its name; where it returns False the block is not fused (its parts may be).
        backend: of the operators: "auto", "compiled", "triton" or "reference"; one by name fuses what is proven, also without a gain.
        memory: a budget for the activations of a training step, in bytes or like "2GiB", or a policy of `fastsr.memory.plan`. The plan is
            made in the first training step, for that step's input; later inputs should be no larger. `unfuse_` takes it out again.

    Returns:
        A report of all blocks that were fused, or looked as if they could be. `print` it.

    Raises:
        ValueError: `backend` does not exist.
        BudgetError: in the first training step, if no plan fits.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: model is a {type(model).__name__}; expected a torch.nn.Module")
    planner = None if memory is None else PlanAtFirstStep(memory)
    walk = _Walk(filter_fn, backend)
    walk.visit("", unwrapped(model))
    if planner is not None:
        forget_plan(unwrapped(model))
        unwrapped(model).register_forward_pre_hook(planner)
    return Report(model, tuple(walk.rows))


def unfuse_(model: AnyModule) -> AnyModule:
    """Give every fused block of `model` back the forward that it had. Returns `model` itself."""
    forget_plan(unwrapped(model))
    for module in unwrapped(model).modules():
        restore(module)
    return model


class fused:
    """Fuse inside a `with` block: `with fastsr.fused(model) as report: ...`. Arguments as those of `fuse_`.

    At its end the blocks that it fused are as they were before; blocks that were fused already stay so.
    """

    def __init__(self, model: nn.Module, filter_fn: Filter | None = None, backend: Backend = "auto") -> None:
        self._arguments = (model, filter_fn, backend)
        self._fused: list[nn.Module] = []

    def __enter__(self) -> Report:
        report = fuse_(*self._arguments)
        modules = dict(unwrapped(report.model).named_modules())
        self._fused = [modules[name] for name in report.fused]
        return report

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for module in self._fused:
            restore(module)


class _Walk:
    """A walk through a model: blocks before their parts, composites after them."""

    def __init__(self, filter_fn: Filter | None, backend: Backend) -> None:
        self.filter_fn, self.backend = filter_fn, backend
        self.rows: list[Row] = []
        self.seen: set[int] = set()
        self.known: dict[Any, tuple[Fusion, tuple[Cost, ...]]] = {}  # by kind and `likeness`

    def visit(self, name: str, module: nn.Module) -> None:
        if id(module) in self.seen or isinstance(module, (Module, Conv3x3)):  # our own, inside and out
            return
        self.seen.add(id(module))
        wanted = self.filter_fn is None or self.filter_fn(module, name)
        known = forward_of(module)
        fused_before = None if known is None else Row(name, known.fusion.kind, False, "it is fused already")
        row = fused_before or self.attempt(name, module, MATCHERS, wanted)
        if row is not None:
            self.rows.append(row)
            if row.fused or row.reason == NO_GAIN or (known is not None and not known.fusion.calls_parts):
                return  # where the whole gains nothing its parts do not either
        place = len(self.rows)  # behind the reason why it is no block of another kind
        for child_name, child in module.named_children():
            self.visit(f"{name}.{child_name}" if name else child_name, child)
        if known is None and (wanted or row is None):  # that it was left out is said once
            composite = self.attempt(name, module, COMPOSITES, wanted)
            if composite is not None:
                self.rows.insert(place, composite)

    def attempt(
        self, name: str, module: nn.Module, matchers: Iterable[Callable[[nn.Module], Candidate | None]], wanted: bool
    ) -> Row | None:
        """Fuse `module` if one of `matchers` knows it; None if none does."""
        for match in matchers:
            kind, candidate = "block", None
            try:
                candidate = match(module)
                if candidate is None:
                    continue
                kind = candidate.kind
                if not wanted:
                    raise Refused("filter_fn left it out")
                return self.fuse(name, module, candidate)
            except Exception as error:  # also of the block's own code, on an input that it was not made for
                if candidate is not None and not candidate.sure and not isinstance(error, Refused):
                    continue
                reason = str(error) if isinstance(error, Refused) else f"its proof failed: {type(error).__name__}: {error}"
                return Row(name, _KINDS.get(match.__name__, kind), False, reason.splitlines()[0])
        return None

    def fuse(self, name: str, module: nn.Module, candidate: Candidate) -> Row:
        """Steps 2 to 4."""
        proven = module if candidate.stand_in is None else candidate.stand_in
        check(module, proven)
        key = None if candidate.moves else likeness(proven)  # a fusion that holds state serves one block
        known = self.known.get((candidate.kind, key)) if key is not None else None
        fusion, costs = known or self.prove(proven, candidate)
        if key is not None:
            self.known[candidate.kind, key] = fusion, costs
        when = self.when(proven, costs)
        if when != "never":
            swap(module, candidate.whole or fusion, self.backend, training_only=when == "in training")
        return Row(name, fusion.kind, when != "never", {"always": "", "in training": IN_TRAINING, "never": NO_GAIN}[when], *costs)

    def prove(self, module: nn.Module, candidate: Candidate) -> tuple[Fusion, tuple[Cost, ...]]:
        """Steps 2 and 3, and what is predicted; without a gain that is all."""
        if candidate.moves:
            return identify_moving(module, candidate, self.backend), ()
        fusion = identify(module, candidate)
        fused_copy = bare_copy(module, keep_fused=True)
        swap(fused_copy, fusion, self.backend)
        costs = predicted(bare_copy(module), fused_copy, candidate.input_shape)
        if self.when(module, costs) != "never":
            prove(bare_copy(module).eval() if candidate.draws else module, fusion, candidate.input_shape, self.backend)
        return fusion, costs

    def when(self, module: nn.Module, costs: tuple[Cost, ...]) -> str:
        """When the fused forward is to run; who names a backend wants it always."""
        if self.backend != "auto" or default_backend() != "auto" or not costs:
            return "always"
        return gain(costs[0], costs[1], next(module.parameters()).device.type)


def check(module: nn.Module, proven: nn.Module) -> None:
    """What does not depend on the kind of block, whose `proven` parts the fused forward does not call.

    Raises:
        Refused: with the reason.
    """
    if "forward" in module.__dict__:
        raise Refused("its forward was replaced on the instance")
    check_no_hooks(proven)
    for parameter in proven.parameters():
        if parameter.is_meta:
            raise Refused("its parameters are on the meta device; fuse once they are materialised")
        if type(parameter) is not nn.Parameter:
            raise Refused(f"its parameters are of type {type(parameter).__name__}; fuse before fully_shard or quantisation")


#: Names of families for the rows of blocks that their `match` refuses.
_KINDS = {
    "match_dense_block": "residual dense block",
    "match_dense_block_plus": "residual dense block of ESRGAN+",
    "match_rrdb": "RRDB",
    "match_convolutions": "convolutions",
    "match_wired": "convolutions",
    "match_rcab": "RCAB or CAB",
    "match_channel_attention": "channel attention",
    "match_quantizer": "vector quantiser",
    "match_moving_average": "vector quantiser (moving average)",
    "match_zalando": "vector quantiser (moving average)",
}
