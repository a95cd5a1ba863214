"""A budget as a context: the first model that trains inside gets a plan that fits."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from fastsr.memory.planning import Applied, Plan, plan, unwrapped
from fastsr.memory.sizes import parse_bytes
from fastsr.nn import needs_grad


class budget:
    """Train within `size` bytes of activations:

        with fastsr.memory.budget("2GiB") as within:
            for x, target in batches:
                loss(model(x), target).backward()       # the first call plans for x's shape, and applies the plan
                ...
        print(within.plan)

    The plan is for the first module that is called inside with gradients wanted, for that input's shape and dtype (and autocast);
    later inputs should be no larger. At the end of the block the model is put back as it was.

    Attributes:
        plan: None until the first step.

    Raises:
        BudgetError: at the first step, if no plan fits.
    """

    def __init__(self, size: int | str) -> None:
        self.bytes = parse_bytes(size)
        self.plan: Plan | None = None
        self._applied: Applied | None = None
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> budget:
        self._hook = register_module_forward_pre_hook(self._first_call)
        return self

    def _first_call(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        x = next((a for a in args if isinstance(a, Tensor)), None)
        if x is None or self._hook is None or torch.compiler.is_compiling() or not needs_grad(model, x):
            return
        self._hook.remove()
        self._hook = None
        self.plan = plan(model, x.shape, x.dtype, self.bytes)
        self._applied = self.plan.apply(unwrapped(model))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._applied is not None:
            self._applied.undo()
            self._applied = None
