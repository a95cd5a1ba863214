"""The runners that every case has beside ours: plain PyTorch in both layouts, under autocast, and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastsr.bench.case import BASELINE, DTYPES, Builder, Call, Runner, State
from fastsr.bench.suite import Options

#: Wraps the function or module that does the work; what differentiates it stays outside.
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def plain_runners(build: Callable[[Wrap], Builder], dtype: str, options: Options) -> dict[str, Runner]:
    """Runners of plain PyTorch; `build(wrap)` is the builder of a call whose forward computation went through `wrap`.

    Autotuning takes minutes and is for full sizes alone; "eager AMP" keeps float32 weights, as trainers do, and casts in
    every call.
    """
    runners = {
        "eager NCHW": Runner(build(_as_it_is), channels_last=False),
        BASELINE: Runner(build(_as_it_is)),
        # Compiled when it is built: importing the compiler costs seconds, and only these runners need it.
        "torch.compile": Runner(build(functools.partial(torch.compile, dynamic=False))),
    }
    if options.sizes == "full":
        autotune = functools.partial(torch.compile, dynamic=False, mode="max-autotune-no-cudagraphs")
        runners["torch.compile, max-autotune"] = Runner(build(autotune))
    if dtype != "float32":
        runners["eager AMP"] = Runner(_in_float32(build(_autocast(options.device, DTYPES[dtype]))))
    return runners


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _autocast(device: str, dtype: torch.dtype) -> Wrap:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, dtype):
                return function(*args, **kwargs)

        return call

    return wrap


def _in_float32(build: Builder) -> Builder:
    """The call gets its weights and inputs in float32 with the values of the case's dtype."""

    def build_wide(state: State) -> Call:
        call = build({name: tensor.float() for name, tensor in state.items()})
        return lambda *inputs: call(*(t.float() for t in inputs))

    return build_wide
