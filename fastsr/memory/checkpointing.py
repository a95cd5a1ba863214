"""What a plan changes in a model: flags that our modules have, and the class of a Sequential whose runs are recomputed.

Nothing is wrapped and no parameter is renamed, so state dicts, `deepcopy`, pickling, DDP and `torch.compile` see the same model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastsr.nn import needs_grad

#: A run of a Sequential's modules: the first, the one after the last, and whether to keep the state of the random generator.
Run = tuple[int, int, bool]

#: Attributes of our modules that say what is kept for backward, "all" or "input".
FLAGS = ("save", "save_tail")


def flags_of(module: nn.Module) -> list[str]:
    """The flags that this module itself has."""
    return [flag for flag in FLAGS if getattr(module, flag, None) in ("all", "input")]


def all_flags(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name of a module, flag) for the whole model."""
    for name, module in model.named_modules():
        for flag in flags_of(module):
            yield name, flag


class CheckpointedSequential(nn.Sequential):
    """A Sequential of which some runs of modules keep their input only, and are computed once more in backward.

    Made from an `nn.Sequential` by `checkpoint_runs`; `runs` are in order and do not overlap.
    """

    runs: tuple[Run, ...] = ()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        modules = list(self)
        if not needs_grad(self, x):
            return _through(modules, x)
        done = 0
        for first, stop, keep_random_state in self.runs:
            x = _through(modules[done:first], x)
            x = checkpoint(_through, modules[first:stop], x, use_reentrant=False, preserve_rng_state=keep_random_state)
            done = stop
        return _through(modules[done:], x)


def _through(modules: list[nn.Module], x: Any) -> Any:
    for module in modules:
        x = module(x)
    return x


def is_chain(module: nn.Module) -> bool:
    """True for a Sequential that runs its modules in order: one whose forward nobody changed."""
    ours = (nn.Sequential.forward, CheckpointedSequential.forward)
    return isinstance(module, nn.Sequential) and "forward" not in module.__dict__ and type(module).forward in ours


_MADE: dict[type[nn.Sequential], type[CheckpointedSequential]] = {nn.Sequential: CheckpointedSequential}


def checkpoint_runs(chain: nn.Sequential, runs: tuple[Run, ...]) -> None:
    """Turn `chain` into a `CheckpointedSequential` with these runs; with none, into what it was."""
    kind = type(chain)
    if issubclass(kind, CheckpointedSequential):
        kind = next(k for k, made in _MADE.items() if made is kind)
        chain.__dict__.pop("runs", None)
    chain.__class__ = kind
    if runs:
        if kind not in _MADE:
            _MADE[kind] = type(f"Checkpointed{kind.__name__}", (CheckpointedSequential, kind), {})
        chain.__class__ = _MADE[kind]
        chain.runs = runs  # type: ignore[assignment]


def set_up(model: nn.Module, flags: set[tuple[str, str]], runs: Mapping[str, tuple[Run, ...]]) -> None:
    """Set these (module, flag) to "input" and all others to "all"; give the Sequentials these runs, and no others."""
    for name, module in list(model.named_modules()):
        for flag in flags_of(module):
            setattr(module, flag, "input" if (name, flag) in flags else "all")
        if is_chain(module):
            checkpoint_runs(module, runs.get(name, ()))  # type: ignore[arg-type]
