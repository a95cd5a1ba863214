"""3x3 convolutions whose activation, upsampling and PixelShuffle stand in a module's own forward: tails of ESRGAN, SwinIR and others."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.package.importer import sys_importer

from fastsr import ops
from fastsr.backends import FUSED_DTYPES, Backend
from fastsr.fusion.families.convolutions import Convolutions, Run, is_doubling, is_plain_conv
from fastsr.fusion.families.family import Candidate, Fusion, Probe
from fastsr.fusion.structure import Path, Refused, has_hooks, part
from fastsr.fusion.tracing import Untraceable, own_graph

LEAKY, RELU = (F.leaky_relu, F.leaky_relu_, torch._C._nn.leaky_relu_), (F.relu, F.relu_, torch.relu, torch.relu_)
CALLS = {"leaky_relu", "leaky_relu_", "relu", "relu_", "lrelu"}


#: What torch.fx writes into code without an import.
_BUILTIN = {"inf": float("inf"), "nan": float("nan"), "NoneType": type(None), "torch": torch, "device": torch.device}


@dataclass(frozen=True)
class Wired(Fusion):
    """The module's forward, traced through once, with each chain of a convolution and its neighbours as one call of `fastsr.ops.conv3x3`.

    Attributes:
        parts: of the chains, which are not called any more.
        source, names: the code, and where the functions that it calls are imported from.
        containers: the lists whose children the forward runs through, and the names that they had.
    """

    kind = "convolutions"
    skips = False
    calls_parts = True

    parts: tuple[Path, ...]
    source: str
    names: tuple[tuple[str, str, str], ...]
    containers: tuple[tuple[Path, tuple[str, ...]], ...]
    function: Callable[..., Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", _compiled(self.source, self.names))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Any:
        return self.function(module, x, backend)

    def watched(self, module: nn.Module) -> list[nn.Module]:
        return [module, *(part(module, path) for path in self.parts)]

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        return super().takes(module, x) and all(tuple(part(module, path)._modules) == names for path, names in self.containers)


def chain(conv: Any, x: Tensor, upsample: int, negative_slope: float, pixel_shuffle: int, backend: Backend) -> Tensor:
    """Nearest upsampling, convolution, leaky ReLU and PixelShuffle; each may be left out."""
    if x.dim() == 4 and x.dtype in FUSED_DTYPES and x.numel():
        return ops.conv3x3(
            x, conv.weight, conv.bias, activation="leaky_relu", negative_slope=negative_slope, upsample=upsample,
            pixel_shuffle=pixel_shuffle, backend=backend,
        )  # fmt: skip
    y = conv(x if upsample == 1 else F.interpolate(x, scale_factor=float(upsample), mode="nearest"))
    return F.pixel_shuffle(F.leaky_relu(y, negative_slope), pixel_shuffle)


def _compiled(source: str, names: tuple[tuple[str, str, str], ...]) -> Callable[..., Any]:
    scope: dict[str, Any] = dict(_BUILTIN)
    scope |= {name: _imported(module, attribute) for name, module, attribute in names}
    exec(compile(source, "<traced by fastsr>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def _imported(module: str, attribute: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in attribute.split(".") if attribute else ():
        found = getattr(found, name)
    return found


def _named(name: str, found: Any) -> tuple[str, str, str]:
    """Where `found` is imported from."""
    if isinstance(found, type(torch)):
        return name, found.__name__, ""
    try:
        module, attribute = sys_importer.get_name(found)
    except Exception as error:
        raise Refused(f"its forward calls {found}, which has no name to import it by") from error
    return name, module, attribute


@dataclass
class _Chain:
    """Nodes of a graph that are one call of the operator."""

    conv: Path
    nodes: list[fx.Node]
    parts: list[Path]
    run: Run

    @property
    def x(self) -> fx.Node:
        """Its input."""
        found = self.nodes[0].args[0] if self.nodes[0].args else self.nodes[0].kwargs.get("input")
        assert isinstance(found, fx.Node)
        return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _called(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The part that a node calls on one tensor and nothing else."""
    alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return module.get_submodule(str(node.target)) if alone else None


def _given(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by name; None where it has others."""
    found = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return found if len(node.args) <= len(names) and found.keys() <= {*names} else None


def _slope(module: nn.Module, node: fx.Node) -> float | None:
    """The negative slope of a (leaky) ReLU of one tensor; None for all else."""
    layer = _called(module, node)
    if type(layer) is nn.ReLU:
        return 0.0
    if type(layer) is nn.LeakyReLU:
        return float(layer.negative_slope)  # type: ignore[union-attr]
    given: dict[str, Any] | None = None
    if (node.op == "call_function" and node.target in RELU) or (node.op == "call_method" and node.target in ("relu", "relu_")):
        given = _given(node, ("input", "inplace"), {"inplace": False})
        return None if given is None else 0.0
    if node.op == "call_function" and node.target in LEAKY:
        given = _given(node, ("input", "negative_slope", "inplace"), {"negative_slope": 0.01, "inplace": False})
    slope = given["negative_slope"] if given is not None else None
    return float(slope) if isinstance(slope, (int, float)) else None


def _shuffle(module: nn.Module, node: fx.Node) -> int | None:
    """The factor of a PixelShuffle of one tensor; None for all else."""
    layer = _called(module, node)
    if type(layer) is nn.PixelShuffle:
        return int(layer.upscale_factor)  # type: ignore[arg-type]
    if node.op == "call_function" and node.target in (F.pixel_shuffle, torch.pixel_shuffle):
        factor = (_given(node, ("input", "upscale_factor"), {}) or {}).get("upscale_factor")
        return factor if isinstance(factor, int) else None
    return None


def _doubles(module: nn.Module, node: fx.Node) -> bool:
    """True for nearest upsampling by 2."""
    layer = _called(module, node)
    if layer is not None:
        return is_doubling(layer)
    if node.op != "call_function" or node.target is not F.interpolate:
        return False
    plain = {"size": None, "mode": "nearest", "align_corners": None, "recompute_scale_factor": None, "antialias": False}
    given = _given(node, ("input", "size", "scale_factor", *list(plain)[1:]), plain)
    if given is None or not isinstance(given.pop("input", None), fx.Node):
        return False
    return given.pop("scale_factor", None) in (2, (2, 2), [2, 2]) and given == plain


def _chain_at(module: nn.Module, node: fx.Node) -> _Chain | None:
    """The chain around a convolution, if it holds more than that."""
    conv = _called(module, node)
    if conv is None or not is_plain_conv(conv):
        return None
    nodes, upsample, slope, shuffle = [node], 1, 1.0, 1
    source = node.args[0]
    if isinstance(source, fx.Node) and _only_user(source) is node and _doubles(module, source):
        nodes, upsample = [source, node], 2
    last = node
    while (after := _only_user(last)) is not None:
        found_slope, found_shuffle = _slope(module, after), _shuffle(module, after)
        if found_slope is not None and found_slope >= 0 and slope == 1.0:
            slope = found_slope
        elif found_shuffle is not None and shuffle == 1:
            shuffle = found_shuffle
        else:
            break
        nodes.append(last := after)
    if len(nodes) == 1:
        return None
    paths = [tuple(str(n.target).split(".")) for n in nodes if n.op == "call_module"]
    return _Chain(tuple(str(node.target).split(".")), nodes, paths, Run(0, 0, 0, upsample, slope, shuffle))


def _chains(module: nn.Module, graph: fx.Graph) -> list[_Chain]:
    return [found for node in graph.nodes if (found := _chain_at(module, node)) is not None]


def _fused(module: nn.Module, graph: fx.Graph, chains: list[_Chain]) -> Wired:
    """The graph with its chains replaced, each where it begins."""
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(x):
        backend = graph.placeholder("backend")
    for c in chains:
        with graph.inserting_before(c.nodes[0]):
            conv = graph.get_attr(".".join(c.conv))
            call = graph.call_function(chain, (conv, c.x, c.run.upsample, c.run.negative_slope, c.run.pixel_shuffle, backend))
        c.nodes[-1].replace_all_uses_with(call)
        for node in reversed(c.nodes):
            graph.erase_node(node)
    for node in graph.nodes:
        node.type = None  # annotations, which the code would have to import
    code = graph.python_code("self")
    words = set(re.findall(r"\w+", code.src))
    names = tuple(_named(name, found) for name, found in code.globals.items() if name in words and name not in _BUILTIN)
    lists = [(name, m) for name, m in module.named_modules() if not name or isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    containers = tuple((tuple(name.split(".")) if name else (), tuple(m._modules)) for name, m in lists)
    parts = {path: None for c in chains for path in c.parts}
    return Wired(tuple(c.conv for c in chains), tuple(parts), code.src, names, containers)


def match_wired(module: nn.Module) -> Candidate | None:
    """A forward of its own that can be traced, in which a plain 3x3 convolution is followed by an activation, or the like."""
    own = type(module).forward
    if own in (nn.Sequential.forward, nn.Module.forward) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # type: ignore[comparison-overlap]
        return None
    near = [m for child in module.children() for m in (child, *(child.children() if isinstance(child, nn.ModuleList) else ()))]
    if not any(is_plain_conv(m) for m in near):
        return None
    try:
        graph = own_graph(module)
    except Untraceable as error:
        called = {*getattr(getattr(own, "__code__", None), "co_names", ())}
        if called & CALLS or any(type(m) in (nn.ReLU, nn.LeakyReLU) for m in near):
            raise Refused(f"its forward cannot be traced: {error}") from error
        return None
    chains = _chains(module, graph)
    if not chains:
        return None
    for c in chains:
        for path in c.parts:
            if has_hooks(part(module, path)):
                raise Refused(f"{'.'.join(path)} has hooks, which fusing would silence")
    whole = _fused(module, graph, chains)
    conv, run = part(module, chains[0].conv), chains[0].run
    at = int(run.upsample == 2)
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2)] * at + [conv]
    layers += [nn.LeakyReLU(run.negative_slope)] * (run.negative_slope != 1)
    layers += [nn.PixelShuffle(run.pixel_shuffle)] * (run.pixel_shuffle > 1)
    alone = Run(0, len(layers), at, *(run.upsample, run.negative_slope, run.pixel_shuffle))

    def hypotheses(probe: Probe) -> Iterator[Convolutions]:
        yield Convolutions(((str(at),),), (alone,))

    return Candidate(Wired.kind, (1, conv.in_channels, 5, 6), hypotheses, stand_in=nn.Sequential(*layers), whole=whole)
