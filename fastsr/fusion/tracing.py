"""What a module's own forward calls, and in which order: a graph in which every child is one node."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import fx, nn


class Untraceable(Exception):
    """The forward has no such graph; the message says why."""


class _Tracer(fx.Tracer):
    """Runs the forward of the root alone, on one argument. No child runs, and no function of the root's file: each is one node."""

    def __init__(self, root: nn.Module) -> None:
        names = getattr(inspect.unwrap(type(root).forward), "__globals__", {})
        helpers = (f for f in names.values() if isinstance(f, types.FunctionType) and not (f.__module__ or "").startswith("torch"))
        super().__init__(autowrap_functions=tuple(helpers))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]


def own_graph(module: nn.Module) -> fx.Graph:
    """The graph of `module`'s forward, which is the same in training and in evaluation, with gradients and without.

    Raises:
        Untraceable: it depends on the values or the shape of its input, or on the mode, or it keeps something for later.
    """
    mode, graphs = module.training, []
    try:
        for training in (False, True):
            module.training = training
            with torch.set_grad_enabled(training):
                graphs.append(_graph(module))
    finally:
        module.training = mode
    if str(graphs[0]) != str(graphs[1]):
        raise Untraceable("it is another one in training")
    return graphs[0]


def _graph(module: nn.Module) -> fx.Graph:
    before = [(d, dict(d)) for d in (module.__dict__, module._parameters, module._buffers, module._modules)]
    try:
        graph = _Tracer(module).trace(module)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise Untraceable(f"{type(error).__name__}: {lines[0]}") from error
    finally:
        written = _restore(before)
    for name, value in written.items():
        if not _converted(name, value):
            raise Untraceable(f"it writes to its attribute {name!r}")
    return graph


def _restore(before: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Make the dictionaries what they were; what had been written."""
    written = {}
    for now, old in before:
        for name in {*now, *old}:
            if name not in old or now.get(name) is not old[name]:
                written[name] = now.get(name)
        if written:
            now.clear()
            now.update(old)
    return written


def _converted(name: str, value: Any) -> bool:
    """True for `self.mean = self.mean.type_as(x)`: the same number in another dtype or place, which the next call would find."""
    if not isinstance(value, fx.Proxy) or value.node.op != "call_method" or value.node.target not in ("type_as", "to"):
        return False
    source = value.node.args[0]
    return isinstance(source, fx.Node) and source.op == "get_attr" and source.target == name
