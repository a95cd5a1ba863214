"""What a block is made of: its parts, whether they are plain, and a record of all that a fused forward takes for granted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

#: The names that lead from a block to one of its parts.
Path = tuple[str, ...]

PARAMETRIZED = ", without weight norm or spectral norm"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Set by torch, or meant to change.
_NOT_WATCHED = {"training", "save", "call_super_init", "dump_patches", "T_destination", "_is_full_backward_hook", "_compiled_call_impl"}
_EVERY_MODULE = set(nn.Module().__dict__)
_SCALARS = (bool, int, float, str, tuple, type(None))


class Refused(Exception):
    """A block looks like one that could be fused and is not; the message says why."""


def part(module: nn.Module, path: Path) -> Any:
    """The part of a block at this path."""
    for name in path:
        module = getattr(module, name)
    return module


def owners(module: nn.Module) -> list[tuple[Path, nn.Module]]:
    """The parts (the block itself too) that have parameters or buffers of their own, in the order of registration.

    A layer with parametrizations (weight norm, spectral norm) counts as one part.
    """
    found = []
    for name, m in module.named_modules():
        path = tuple(name.split(".")) if name else ()
        own = hasattr(m, "parametrizations") or any(p is not None for p in (*m._parameters.values(), *m._buffers.values()))
        if own and "parametrizations" not in path:
            found.append((path, m))
    return found


def has_hooks(module: nn.Module) -> bool:
    """True if someone else is called when `module` is."""
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def check_plain(path: Path, conv: nn.Module, size: int) -> None:
    """`conv` is an `nn.Conv2d` and nothing more, of this kernel size, with stride 1 and zeros around.

    Raises:
        Refused: it is not.
    """
    name = ".".join(path)
    if type(conv) is not nn.Conv2d:
        raise Refused(f"{name} is a {type(conv).__name__}; expected a plain nn.Conv2d{PARAMETRIZED * hasattr(conv, 'parametrizations')}")
    wanted = {
        "kernel_size": (size, size),
        "stride": (1, 1),
        "padding": (size // 2, size // 2),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
    }
    if size == 1:
        del wanted["padding_mode"], wanted["dilation"]
    for attribute, value in wanted.items():
        given = getattr(conv, attribute)
        if given != value and not (attribute == "padding" and given == "same"):
            raise Refused(f"{name} has {attribute} {given!r}; expected {value!r}")


def check_no_hooks(module: nn.Module) -> None:
    """No part of `module` has hooks, which fusing would silence, nor a forward of its own; hooks of the block itself still run.

    Raises:
        Refused: one has.
    """
    for name, m in module.named_modules():
        if m is module:
            continue
        if has_hooks(m):
            raise Refused(f"{name} has hooks, which fusing would silence (old-style weight norm and spectral norm are hooks too)")
        if "forward" in m.__dict__ and not hasattr(m.__dict__["forward"], "fusion"):
            raise Refused(f"the forward of {name} was replaced on the instance")


def likeness(module: nn.Module) -> Any:
    """A key that blocks share which are alike but for the values of their parameters; None for a block that holds what has no key."""
    key: list[Any] = []
    for name, m in module.named_modules():
        tensors = {**m._parameters, **m._buffers}
        key += [name, type(m), *((k, None if t is None else (t.shape, t.dtype, t.device)) for k, t in tensors.items())]
        for attribute, value in m.__dict__.items():
            if attribute in _EVERY_MODULE or attribute in ("forward", "_replicate_for_data_parallel"):
                continue
            value = tuple(value) if isinstance(value, list) else value
            if not isinstance(value, _SCALARS):
                return None
            key.append((attribute, value))
    try:
        hash(key := tuple(key))  # type: ignore[assignment]
    except TypeError:
        return None
    return key


def watch(modules: Sequence[nn.Module]) -> list[tuple[type, tuple[tuple[str, Any], ...]]]:
    """The class and the plain attributes of each module: what a fused forward takes for granted."""
    return [(type(m), tuple((k, v) for k, v in m.__dict__.items() if k not in _NOT_WATCHED and isinstance(v, _SCALARS))) for m in modules]


def unchanged(modules: Sequence[nn.Module], watched: Sequence[tuple[type, tuple[tuple[str, Any], ...]]]) -> bool:
    """True if the modules are as `watch` found them, and all but the first, the block itself, have no hooks and no forward of their own."""
    if len(modules) != len(watched):
        return False
    for k, (module, (kind, scalars)) in enumerate(zip(modules, watched, strict=True)):
        attributes = module.__dict__
        if k == 0:
            if not isinstance(module, kind):  # FSDP2 makes a subclass
                return False
        elif type(module) is not kind or has_hooks(module) or "forward" in attributes:
            return False
        for name, value in scalars:
            if attributes.get(name) != value:
                return False
    return True
