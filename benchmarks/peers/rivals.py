"""The runners that every case has beside ours: plain PyTorch in both layouts, under autocast, and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.bench.case import BASELINE, DTYPES, Builder, Call, Runner, State
from fastsr.bench.suite import Options

#: Wraps the function or module that does the work; what differentiates it stays outside.
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def plain_runners(
    build: Callable[[Wrap], Builder], dtype: str, options: Options, *, inference: bool = False, images: bool = True
) -> dict[str, Runner]:
    """Runners of plain PyTorch; `build(wrap)` is the builder of a call whose forward computation went through `wrap`.

    Autotuning takes minutes and is for full sizes alone; "eager AMP" keeps float32 weights and inputs, as trainers do, and casts
    them in every call. With `inference` the compiler also gets weights that never change, which is when it packs them on a CPU; the
    wrapped function then takes x, the weights, and by keyword what is new in every call. Rows, unlike `images`, have no layout.
    """
    runners = {BASELINE: Runner(build(as_it_is))}
    if images:
        runners = {"eager NCHW": Runner(build(as_it_is), channels_last=False), **runners}
    # Compiled when it is built: importing the compiler costs seconds, and only these runners need it.
    runners["torch.compile"] = Runner(_late(build, functools.partial(torch.compile, dynamic=False)))
    if options.sizes == "full":
        # A graph of the compiler's own would overwrite its last answer; on a GPU the harness captures every runner in one itself.
        no_graphs = options.device == "cuda"
        mode = "max-autotune-no-cudagraphs" if no_graphs else "max-autotune"
        name = f"torch.compile, max-autotune{', no graphs' if no_graphs else ''}"
        runners[name] = Runner(_late(build, functools.partial(torch.compile, dynamic=False, mode=mode)))
    if inference and options.device == "cpu":
        runners["torch.compile, frozen"] = Runner(_late(build, frozen))
    if dtype != "float32":
        runners["eager AMP"] = Runner(_in_float32(build(_autocast(options.device, DTYPES[dtype]))), dtype="float32")
    return runners


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Plain eager."""
    return function


def frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled with the weights as constants (`torch._inductor.config.freezing`), without gradients."""
    compiled: list[Callable[..., Any]] = []
    seen: set[torch.Size] = set()

    def call(x: Tensor, *weights: Tensor | Sequence[Tensor], **new: Any) -> Any:
        if not compiled:
            module = function if isinstance(function, nn.Module) else _Constant(function, weights)
            compiled.append(torch.compile(module, dynamic=False))
        with torch.no_grad():
            if x.shape in seen:
                return compiled[0](x, **new)
            seen.add(x.shape)
            import torch._inductor.config as inductor

            with inductor.patch(freezing=True):  # read when it compiles, at the first call of a shape
                return compiled[0](x, **new)

    return call


class _Constant(nn.Module):
    """A function of x and of weights that are parameters of this module, the only weights that the compiler takes for constant."""

    def __init__(self, function: Callable[..., Any], weights: tuple[Tensor | Sequence[Tensor], ...]) -> None:
        super().__init__()
        self.function = function
        self.single = [isinstance(given, Tensor) for given in weights]
        for i, given in enumerate(weights):
            held = [given] if isinstance(given, Tensor) else given
            self.register_module(f"weights{i}", nn.ParameterList(nn.Parameter(t.detach(), requires_grad=False) for t in held))

    def forward(self, x: Tensor, **new: Any) -> Any:
        """The function's answer."""
        lists = [list(getattr(self, f"weights{i}")) for i in range(len(self.single))]
        return self.function(x, *(held[0] if single else held for held, single in zip(lists, self.single, strict=True)), **new)


def _late(build: Callable[[Wrap], Builder], compiling: Wrap) -> Builder:
    def build_compiled(state: State) -> Call:
        # Other runners of the same process must not use up the limit beyond which the compiler gives up and runs eagerly, unsaid.
        torch.compiler.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return build(compiling)(state)

    return build_compiled


def _autocast(device: str, dtype: torch.dtype) -> Wrap:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, dtype):
                return function(*args, **kwargs)

        return call

    return wrap


def _in_float32(build: Builder) -> Builder:
    """The call gets its weights in float32 with the values of the case's dtype."""

    def build_wide(state: State) -> Call:
        return build({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()})

    return build_wide
