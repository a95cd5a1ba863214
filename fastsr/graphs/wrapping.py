"""`fastsr.cuda_graph`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastsr.graphs.module import GraphedModule, Options
from fastsr.graphs.recording import CudaRecorder
from fastsr.graphs.step import GraphedStep

Example = Tensor | tuple[Any, ...] | None


class RecorderFactory:
    """Makes the recorder for a device; a plain class, so that it can be pickled."""

    def __init__(self, generators: Sequence[torch.Generator], shared_pool: bool) -> None:
        self.generators, self.shared_pool = tuple(generators), shared_pool

    def __call__(self, device: torch.device) -> CudaRecorder:
        return CudaRecorder(device, self.generators, self.shared_pool)

    def __reduce__(self) -> Any:
        return RecorderFactory, ((), self.shared_pool)  # generators are not picklable, and a copy has its own randomness


@overload
def cuda_graph(
    model: nn.Module, example: Example = None, *, max_graphs: int = 8, warmup: int = 3, static_output: bool = False,
    generators: Sequence[torch.Generator] = (),
) -> GraphedModule: ...  # fmt: skip


@overload
def cuda_graph(
    model: Callable[..., Any], *, modules: Sequence[nn.Module], max_graphs: int = 8, warmup: int = 3, static_output: bool = False,
    generators: Sequence[torch.Generator] = (),
) -> GraphedStep: ...  # fmt: skip


def cuda_graph(
    model: nn.Module | Callable[..., Any],
    example: Example = None,
    *,
    modules: Sequence[nn.Module] | None = None,
    max_graphs: int = 8,
    warmup: int = 3,
    static_output: bool = False,
    generators: Sequence[torch.Generator] = (),
) -> GraphedModule | GraphedStep:
    """Record what a model or a training step launches on the GPU, and from then on replay it in one launch.

        fast = fastsr.cuda_graph(model, x)           # inference or training: forward and backward are replayed
        loss(fast(x), target).backward()

        step = fastsr.cuda_graph(step, modules=[model])     # a function (x, target) -> loss that calls backward: one graph for all
        loss = step(x, target)
        optimizer.step()

    A graph serves calls that agree in shapes, dtypes, strides, `requires_grad` and the values of other arguments, in gradient mode,
    autocast, `training` of each module, our default backend, and torch's settings of precision and determinism. The first call of each
    kind records, up to `max_graphs`; any other call runs the model's own code, and so does every call while one of these holds:

    1. the model is on a CPU, on several devices or in `DistributedDataParallel` (wrap the other way round), or has hooks (a replay
       would not run them), or an argument is not a plain tensor on the model's device or a value with a hash;
    2. a parameter, buffer or module was replaced, moved, or has another `requires_grad`, or a memory plan, a backend or `fuse_` was
       applied: the graphs are dropped, and the call after that one records anew;
    3. recording failed, e.g. because the model waits for the GPU (`.item()`), or draws from a generator not among `generators`;
    4. the backward of an earlier call is still to come: its activations lie in the graphs' memory, so two calls before a backward, as
       in a GAN, are one replay and one call of the model's own code.

    `wrapper.reasons` counts these, `wrapper.report()` prints them. Python in the model runs while recording only: what it prints, counts
    or decides is not repeated in a replay. Tensors that are no parameters or buffers, like attributes that decide what runs, are taken as
    they were: after a change call `wrapper.reset()`.

    Args:
        model: a module; or a function, the step. A step may do all that a graph can hold: forward, loss, `scaler.scale(loss).backward()`,
            `zero_grad`, an optimizer with `capturable=True`. `GradScaler.step` waits for the GPU and stays outside.
        example: of a module: its argument, or a tuple of them, with which to record at once in the present modes. `prepare` does the
            same for further kinds of calls. Warming up leaves buffers, gradients and random generators as they were.
        modules: of a step: those whose parameters it reads or trains, to be watched. `.grad` of their parameters is a tensor of the graph
            after each replay, accumulated into if it was there before and the step did not drop it; both kinds of step are recorded.
        max_graphs: how many graphs are kept. A module's share the memory of their temporaries; a step's do not.
        warmup: how often to run before recording. Of a step these are real steps, the first calls of each kind.
        static_output: return the tensors that the graphs write, which the next replay overwrites, not copies of them. Gradients of
            parameters and inputs are the caller's own either way; of a step, they are the graph's.
        generators: random generators, beside torch's own, from which the model draws.

    Returns:
        For a module a `GraphedModule`: the same parameters, state dict and attributes; `deepcopy` and pickles leave graphs behind.
        For a step a `GraphedStep`: a function with `reasons` and `report()`.

    A replayed call can be differentiated once: no double backward, and no second backward through it, which raises a RuntimeError.

    Raises:
        TypeError: a step without `modules`, a module with them, or what is neither a module nor a function.
        ValueError: a step with an example, which would be a step of its own; `max_graphs` or `warmup` below 1.

    Source: the recorded graphs are those of `torch.cuda.make_graphed_callables`; a cache, what it watches and falling back are added.
    """
    for name, value in (("max_graphs", max_graphs), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"cuda_graph: {name} is {value}; expected at least 1")
    is_module = isinstance(model, nn.Module)
    options = Options(max_graphs, warmup, static_output, RecorderFactory(generators, shared_pool=is_module))
    if isinstance(model, nn.Module):
        if modules is not None:
            raise TypeError("cuda_graph: modules are for a step; a module is watched by itself")
        wrapper = GraphedModule(model, options)
        if example is not None:
            wrapper.prepare(*(example if isinstance(example, tuple) else (example,)))
        return wrapper
    if not callable(model):
        raise TypeError(f"cuda_graph: model is a {type(model).__name__}; expected a module or a function")
    if modules is None:
        raise TypeError("cuda_graph: a step needs modules, whose parameters it reads or trains; expected a sequence of them")
    if example is not None:
        raise ValueError("cuda_graph: a step takes no example, which would be a step of its own; its first calls warm it up")
    return GraphedStep(model, modules, options)
