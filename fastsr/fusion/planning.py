"""A memory plan for a fused model, made when the first training step shows the input's shape."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastsr.memory import Applied, Plan, plan
from fastsr.memory.planning import POLICIES, Policy
from fastsr.memory.sizes import parse_bytes
from fastsr.nn import needs_grad


class PlanAtFirstStep:
    """A forward pre-hook of a model, which plans once; `plan` is None until then."""

    def __init__(self, memory: int | str) -> None:
        self.memory = memory if memory in POLICIES else parse_bytes(memory)
        self.plan: Plan | None = None
        self.applied: Applied | None = None
        self.done = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        x = next((a for a in args if isinstance(a, Tensor)), None)
        if self.done or x is None or torch.compiler.is_compiling() or not needs_grad(model, x):
            return
        self.done = True  # planning calls copies of the model, and of this hook
        policy = cast(Policy, self.memory) if isinstance(self.memory, str) else None
        self.plan = plan(model, x.shape, x.dtype, None if policy else self.memory, policy=policy)
        self.applied = self.plan.apply(model)


def forget_plan(model: nn.Module) -> None:
    """Take plan and hook out of `model`, where there are any."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, PlanAtFirstStep):
            if hook.applied is not None:
                hook.applied.undo()
            del model._forward_pre_hooks[key]
