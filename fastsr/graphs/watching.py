"""What a recorded graph takes for granted about modules, and whether it still holds.

A graph reads parameters and buffers where they lay when it was recorded, and runs what Python decided then. Looking at all of it costs
one pass over the modules in each call, some 0.2 microseconds for each parameter and module, while the GPU is busy with the last replay.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

#: Settings of our modules that decide what runs: a memory plan and a choice of backend set them.
SETTINGS = ("save", "save_tail", "runs", "_backend")

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


class Watch:
    """The state of some modules at one moment."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._places = [getattr(m, kind) for m in self.modules for kind in ("_parameters", "_buffers", "_modules")]
        self._held = self._look()
        tensors = [t for t in self._held if isinstance(t, Tensor)]
        self.parameters = list(dict.fromkeys(t for t in tensors if isinstance(t, nn.Parameter)))
        self.buffers = list(dict.fromkeys(t for t in tensors if not isinstance(t, nn.Parameter)))
        self.tensors = [*self.parameters, *self.buffers]
        self._pointers = [] if self.unfit() else self._addresses()
        self._wanted = [p.requires_grad for p in self.parameters]
        self._classes = [type(m) for m in self.modules]
        self._settings = [(m, name) for m in self.modules for name in SETTINGS if name in m.__dict__]
        self._values = [m.__dict__.get(name) for m, name in self._settings]
        self._run = self._what_runs()
        self._hooks = [getattr(m, kind) for m in self.modules for kind in HOOKS]

    def _look(self) -> list[Any]:
        return [held for place in self._places for held in place.values()]

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in self.tensors]

    def _what_runs(self) -> list[Any]:
        """Forwards that instances have (`fuse_` sets them), and whether they are switched on."""
        forwards = [m.__dict__.get("forward") for m in self.modules]
        return forwards + [getattr(f, "enabled", None) for f in forwards if f is not None]

    def changed(self) -> str | None:
        """What is no longer as it was, or None."""
        held = self._look()
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            return "a parameter, buffer or module was replaced"
        if self._addresses() != self._pointers:
            return f"{self._name_of_moved()} lies elsewhere now"
        if [p.requires_grad for p in self.parameters] != self._wanted:
            return "requires_grad of a parameter changed"
        if [type(m) for m in self.modules] != self._classes or [m.__dict__.get(name) for m, name in self._settings] != self._values:
            return "a module's class or setting changed (a memory plan or a backend)"
        if self._what_runs() != self._run:
            return "a module's forward was exchanged (fuse_ or unfuse_)"
        return None

    def _name_of_moved(self) -> str:
        moved = next(t for t, old in zip(self.tensors, self._pointers, strict=True) if t.data_ptr() != old)
        for module in self.modules:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is moved:
                    return f"{type(module).__name__}.{name}"
        return "a parameter"

    def training(self) -> tuple[bool, ...]:
        """The modes of all modules, in short where they agree."""
        modes = [m.training for m in self.modules]
        return (modes[0],) if modes and modes.count(modes[0]) == len(modes) else tuple(modes)

    def hooked(self) -> str | None:
        """Why hooks forbid a replay, which would not run them; None if there are none."""
        if any(self._hooks):
            module = next(m for m in self.modules if any(getattr(m, kind) for kind in HOOKS))
            return f"{type(module).__name__} has hooks, which a replay would not run"
        if any(getattr(torch_module, kind) for kind in GLOBAL_HOOKS):
            return "hooks for all modules are registered, which a replay would not run"
        if any(p._backward_hooks for p in self.parameters):
            return "a parameter has a tensor hook, which would run while recording and again in each backward"
        return None

    def unfit(self) -> str | None:
        """Why these modules cannot be recorded at all, or None."""
        for module in self.modules:
            if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
                return f"{type(module).__name__} talks to other processes or devices; record the module inside and wrap the result"
        devices = {t.device for t in self.tensors}
        if len(devices) > 1:
            return f"parameters and buffers lie on {len(devices)} devices ({', '.join(sorted(map(str, devices)))})"
        if any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in self.tensors):
            return "a parameter or buffer is sparse or of a class of its own"
        return None

    def device(self) -> torch.device | None:
        """Where the modules are; None if they hold nothing."""
        return self.tensors[0].device if self.tensors else None
