"""The swap: what stands in `module.forward` of a fused block, and how it gets there and away again.

Only the instance's `forward` changes. The class, the parameters and their names, hooks and the state dict are as before, so optimizers,
EMA copies, DDP, FSDP2, checkpoints and `torch.compile` see the module that they know.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from fastsr.backends import Backend
from fastsr.fusion.families import Fusion
from fastsr.fusion.structure import unchanged, watch
from fastsr.nn import needs_grad

_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class FusedForward:
    """A block's `forward`: our operators on the block's own parameters, or where they do not fit the forward that it had.

    The block's own forward runs when

        - it is called with more than one tensor or with an option that is not its default;
        - it gains in training alone, and no gradient is asked for;
        - the tensor is one that the operators do not take (float64, complex, a subclass);
        - a part that would be skipped has got hooks or another forward, or a number or a layer has changed since the proof;
        - a graph is exported or traced (`torch.export`, ONNX, `torch.jit.trace`, `torch.fx`), or functorch or forward-mode AD is on.

    It goes along with `deepcopy` and pickling: the copy's refers to the copy.
    """

    def __init__(self, module: nn.Module, fusion: Fusion, backend: Backend, training_only: bool) -> None:
        self.module, self.fusion, self.backend, self.training_only = module, fusion, backend, training_only
        self.watched = watch(fusion.watched(module))
        self.enabled = True
        signature = inspect.signature(type(module).forward)
        simple = (bool, int, float, str, type(None))
        self.defaults = {p.name: p.default for p in signature.parameters.values() if isinstance(p.default, simple)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        said = any(name not in self.defaults or value is not self.defaults[name] for name, value in kwargs.items())
        if len(args) == 1 and not said and self.applies(args[0]):
            return self.fusion.run(self.module, args[0], self.backend)
        return type(self.module).forward(self.module, *args, **kwargs)

    def applies(self, x: Any) -> bool:
        """True if the fused forward runs on `x`."""
        if not self.enabled or type(x) not in _PLAIN or _transformed():
            return False
        if self.training_only and not needs_grad(self.module, x):
            return False
        return unchanged(self.fusion.watched(self.module), self.watched) and self.fusion.takes(self.module, x)

    def replicate(self) -> nn.Module:
        """`_replicate_for_data_parallel` of the block: a replica gets a forward of its own, which uses its weights."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        forward = object.__new__(FusedForward)
        forward.__dict__.update(self.__dict__, module=replica)
        replica.__dict__.update(forward=forward, _replicate_for_data_parallel=forward.replicate)
        return replica

    @property
    def __code__(self) -> Any:  # torch.export looks for its line numbers
        return type(self.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))


def _transformed() -> bool:
    """True while something looks at the graph, or differentiates by other means than backward."""
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def forward_of(module: nn.Module) -> FusedForward | None:
    """The fused forward that `module` has, or None."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, FusedForward) else None


def swap(module: nn.Module, fusion: Fusion, backend: Backend, training_only: bool = False) -> FusedForward:
    """Give `module` its fused forward; with `training_only` it runs where a gradient is asked for."""
    forward = FusedForward(module, fusion, backend, training_only)
    module.__dict__.update(forward=forward, _replicate_for_data_parallel=forward.replicate)
    if fusion.flag and not hasattr(module, "save"):
        module.__dict__["save"] = "all"
    return forward


def restore(module: nn.Module) -> None:
    """Take the fused forward away, wherever someone has wrapped it meanwhile."""
    forward = forward_of(module)
    if forward is None:
        return
    forward.enabled = False
    for name in ("forward", "_replicate_for_data_parallel"):
        module.__dict__.pop(name, None)
    if forward.fusion.flag and module.__dict__.get("save") in ("all", "input"):
        del module.__dict__["save"]
