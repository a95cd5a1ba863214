"""One recorded call of a module: a graph of its forward and, where gradients are wanted, one of its backward.

    forward graph    static inputs ------> static outputs, and what autograd saves, in the graphs' memory
    backward graph   static gradients of the outputs ------> gradients of the inputs, and one flat tensor of all parameters' gradients

Gradients of thousands of parameters leave the graph as one tensor for each dtype: one copy makes them the caller's own, whereas
tensors of the graph itself would change under his hands with the next replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastsr.graphs import calls
from fastsr.graphs.calls import Call
from fastsr.graphs.recording import Recorder, Recording
from fastsr.graphs.watching import Watch


class Turn:
    """A replayed forward whose backward is to come; it is gone when nothing could call that any more."""

    __slots__ = ("__weakref__", "done")

    def __init__(self) -> None:
        self.done = False


class TurnHolder(Protocol):
    """Who remembers whose turn it is."""

    turn: weakref.ref[Turn] | None


class Entry:
    """The graphs for one key.

    Args:
        model: its forward is recorded.  watch: its parameters.  call: with an example's arguments.
        recorder: makes the graphs.  warmup: how often to run everything before.

    Raises:
        Unrecordable: what the model returns cannot be handed on.
        Exception: whatever the model or the recorder raises.
    """

    def __init__(self, model: nn.Module, watch: Watch, call: Call, recorder: Recorder, warmup: int) -> None:
        self.words = calls.in_words(call)
        self._model, self._call, self._recorder = model, call, recorder
        gradients = torch.is_grad_enabled()
        self._inputs = [calls.static_twin(t, gradients and t.requires_grad) for t in call.tensors]
        self.parameters = [p for p in watch.parameters if p.requires_grad] if gradients else []
        self._differentiated = [t for t in self._inputs if t.requires_grad]
        self._backward: Recording | None = None
        self._live: list[Any] = []
        self._kept = [t.detach() for t in watch.tensors]  # where the graphs read: not freed before them, wherever a parameter moves
        before = [b.clone() for b in watch.buffers]  # neither warming up nor recording is a step of the user's
        with recorder.quiet(), uncached_autocast():
            try:
                with recorder.aside():
                    for _ in range(warmup):
                        self._run_forward()
                        if self._wants_backward():
                            self._gradients = [torch.zeros_like(t) for t in self._returned]
                            self._run_backward()
                self._forget()
                (self._leaves, self._spec), self._forward = recorder.record(self._run_forward)
                if self._wants_backward():
                    self._gradients = [torch.zeros_like(t) for t in self._returned]
                    (self._input_gradients, self._flats), self._backward = recorder.record(self._run_backward)
                self._differentiable = [isinstance(t, Tensor) and t.requires_grad for t in self._live]
            finally:
                self._forget()
                with torch.no_grad():
                    for buffer, old in zip(watch.buffers, before, strict=True):
                        buffer.copy_(old)

    # What is recorded. Under a recorder that computes these anew in a replay they are called again; a GPU's graph never does.

    def _run_forward(self) -> tuple[list[Any], Any]:
        args, kwargs = self._call.rebuilt(self._inputs)
        wanted = bool(self.parameters or self._differentiated)
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            self._live, spec = calls.flatten_outputs(self._model(*args, **kwargs))
        return [t.detach() if isinstance(t, Tensor) else t for t in self._live], spec

    def _run_backward(self) -> tuple[list[Tensor | None], list[Tensor]]:
        wanted = [*self._differentiated, *self.parameters]
        with torch.inference_mode(False), _no_autocast([*self._inputs, *self.parameters]):
            found = torch.autograd.grad(self._returned, wanted, self._gradients, allow_unused=True)
        count = len(self._differentiated)
        self._used = [g is not None for g in found[count:]]
        flats: dict[torch.dtype, list[Tensor]] = {}
        for g in found[count:]:
            if g is not None:
                flats.setdefault(g.dtype, []).append(g.reshape(-1))
        return list(found[:count]), [torch.cat(parts) for parts in flats.values()]

    @property
    def _returned(self) -> list[Tensor]:
        """The outputs that gradients come back to."""
        return [t for t in self._live if isinstance(t, Tensor) and t.requires_grad]

    def _wants_backward(self) -> bool:
        return bool(self._returned)

    def _forget(self) -> None:
        """Let go of autograd's own graph."""
        self._live = []

    # What a call does.

    def answer(self, tensors: Sequence[Tensor], holder: TurnHolder, static_output: bool) -> Any:
        """Replay on these inputs."""
        if self._backward is None:
            outputs = self.replay_forward(tensors, static_output)
        else:
            outputs = list(_Replay.apply(self, holder, static_output, len(tensors), *tensors, *self.parameters))
        values = iter(outputs)
        return calls.rebuild([next(values) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves], self._spec)

    def replay_forward(self, tensors: Sequence[Tensor], static_output: bool) -> list[Tensor]:
        """The outputs that are tensors."""
        self._recorder.take_turn()
        calls.fill(self._inputs, tensors)
        self._forward.replay()
        outputs = [t for t in self._leaves if isinstance(t, Tensor)]
        return [t.detach() if static_output else t.clone() for t in outputs]

    def replay_backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all inputs and of the parameters, for those of the outputs that are tensors."""
        assert self._backward is not None
        self._recorder.take_turn()
        for static, g in zip(self._gradients, (g for g, d in zip(gradients, self.tensor_outputs(), strict=True) if d), strict=True):
            if g is None:
                static.zero_()
            else:
                static.copy_(g)
        self._backward.replay()
        found = iter(self._input_gradients)
        of_inputs = [next(found) if t.requires_grad else None for t in self._inputs]
        return [*(None if g is None else g.clone() for g in of_inputs), *self._own_gradients()]

    def tensor_outputs(self) -> list[bool]:
        """Of each output that is a tensor: whether it can be differentiated."""
        return [d for leaf, d in zip(self._leaves, self._differentiable, strict=True) if isinstance(leaf, Tensor)]

    def _own_gradients(self) -> list[Tensor | None]:
        """The parameters' gradients in memory of the caller's."""
        used = [p for p, u in zip(self.parameters, self._used, strict=True) if u]
        pieces: dict[torch.dtype, Any] = {}
        for flat in self._flats:
            sizes = [p.numel() for p in used if p.dtype == flat.dtype]
            pieces[flat.dtype] = iter(flat.clone().split(sizes))
        return [next(pieces[p.dtype]).view(p.shape) if u else None for p, u in zip(self.parameters, self._used, strict=True)]


class _Replay(torch.autograd.Function):
    """A replayed forward and its backward."""

    @staticmethod
    def forward(ctx: Any, entry: Entry, holder: TurnHolder, static_output: bool, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = entry.replay_forward(tensors[:count], static_output)
        ctx.mark_non_differentiable(*(t for t, d in zip(outputs, entry.tensor_outputs(), strict=True) if not d))
        ctx.entry, ctx.turn = entry, Turn()
        holder.turn = weakref.ref(ctx.turn)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.turn.done:
            raise RuntimeError(
                "cuda_graph: a second backward through one replayed call; a graph's memory serves one. "
                "Add the losses and call backward once, or call wrapper.model for this step"
            )
        ctx.turn.done = True
        return None, None, None, None, *ctx.entry.replay_backward(gradients)


class uncached_autocast:
    """Autocast's cache of casts empty and off: no graph reads a cast from outside, and no cast of a graph is read elsewhere."""

    def __enter__(self) -> None:
        self._before = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self._before)


def _no_autocast(tensors: Sequence[Tensor]) -> Any:
    """Autocast off, as it is where backward is called."""
    kind = next((t.device.type for t in tensors), "cpu")
    return torch.autocast(kind, enabled=False)
