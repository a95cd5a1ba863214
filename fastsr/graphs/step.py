"""A whole training step as one graph: forward, loss and backward (and more, if the step does more), without autograd in a replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.graphs import calls
from fastsr.graphs.calls import Call, Unrecordable
from fastsr.graphs.entry import uncached_autocast
from fastsr.graphs.ledger import Ledger, in_short
from fastsr.graphs.module import Options
from fastsr.graphs.recording import Recorder, Recording
from fastsr.graphs.watching import Watch


@dataclass
class _Step:
    """One recorded step.

    `before` and `after` are the `.grad` of all parameters around it. A gradient that is the same tensor before and after was added to in
    place, so a replay needs it there; where it was None, it has to be None; where the step put another in its place, any will do.
    """

    inputs: list[Tensor]
    leaves: list[Any]
    spec: Any
    recording: Recording
    before: list[Tensor | None]
    after: list[Tensor | None]
    kept: list[Tensor]
    words: str

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """True if a replay does with these gradients what the step itself would."""
        return all(
            now is old or (old is not None and new is not None and old is not new and not new.requires_grad)
            for now, old, new in zip(gradients, self.before, self.after, strict=True)
        )


class GraphedStep:
    """`step`, replayed. Made by `fastsr.cuda_graph`.

    The first `warmup` calls of each kind are real steps in the step's own code, on a side stream; the next one is recorded, and from
    then on replayed. Every replay leaves in `.grad` of the watched parameters the tensor that the recorded step left there.

    Attributes:
        step: the function itself.
        reasons: why calls ran the step's own code, with how often.
    """

    def __init__(self, step: Callable[..., Any], modules: Sequence[nn.Module], options: Options) -> None:
        self.step, self.modules = step, tuple(modules)
        self._options, self._ledger = options, Ledger()
        self.reset()

    @property
    def reasons(self) -> Counter[str]:
        """Why calls ran the step's own code -> how often."""
        return self._ledger.reasons

    def report(self) -> str:
        """What was recorded and replayed, and why other calls ran the step's own code."""
        return self._ledger.report(self._count(), self._options.max_graphs)

    def reset(self) -> None:
        """Drop all graphs; later calls warm up and record anew."""
        self._watch: Watch | None = None
        self._recorder: Recorder | None = None
        self._steps: dict[Hashable, list[_Step]] = {}
        self._warmed: Counter[Hashable] = Counter()
        self._failed: dict[Hashable, str] = {}

    def _count(self) -> int:
        return sum(map(len, self._steps.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step on these arguments."""
        found, reason = self._find(args, kwargs)
        if found is None:
            self._ledger.reasons[reason] += 1
            if reason != WARMING:
                return self.step(*args, **kwargs)
            assert self._recorder is not None
            with self._recorder.aside(), uncached_autocast():
                return self.step(*args, **kwargs)
        step, call = found
        self._ledger.replays[step.words] += 1
        return self._replay(step, call)

    def _find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[_Step, Call] | None, str]:
        if torch.compiler.is_compiling():
            return None, "torch.compile is tracing"
        if self._watch is None:
            self._watch = Watch(self.modules)
        elif change := self._watch.changed():
            self.reset()
            return None, f"{change}: recorded graphs were dropped"
        watch = self._watch
        if reason := watch.unfit() if self._recorder is None else None:
            self._watch = None
            return None, reason
        device = watch.device() or next((t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if device is None:
            return None, "neither the modules nor the call have a tensor"
        if self._recorder is None:
            self._recorder = self._options.make_recorder(device)
        if reason := self._recorder.missing() or watch.hooked():
            return None, reason
        try:
            call = calls.describe(args, kwargs, device)
        except Unrecordable as error:
            return None, str(error)
        key = (call.key, watch.training())
        gradients = [p.grad for p in watch.parameters]
        for step in self._steps.get(key, ()):
            if step.fits(gradients):
                return (step, call), ""
        if key in self._failed:
            return None, self._failed[key]
        if self._warmed[key] < self._options.warmup:
            self._warmed[key] += 1
            return None, WARMING
        if self._count() >= self._options.max_graphs:
            return None, f"max_graphs={self._options.max_graphs} graphs are recorded and none fits ({calls.in_words(call)})"
        try:
            step = self._record(watch, call, gradients)
        except Exception as error:  # the step's own code runs then, and raises what is the user's to see
            self._failed[key] = str(error) if isinstance(error, Unrecordable) else f"recording failed: {in_short(error)}"
            return None, self._failed[key]
        self._steps.setdefault(key, []).append(step)
        return (step, call), ""

    def _record(self, watch: Watch, call: Call, before: list[Tensor | None]) -> _Step:
        assert self._recorder is not None
        inputs = [calls.static_twin(t, torch.is_grad_enabled() and t.requires_grad) for t in call.tensors]
        args, kwargs = call.rebuilt(inputs)

        def run() -> tuple[list[Any], Any, list[Tensor | None]]:
            leaves, spec = calls.flatten_outputs(self.step(*args, **kwargs))
            return [t.detach() if isinstance(t, Tensor) else t for t in leaves], spec, [p.grad for p in watch.parameters]

        try:
            with uncached_autocast():
                (leaves, spec, after), recording = self._recorder.record(run)
        finally:  # nothing has been computed yet
            for parameter, gradient in zip(watch.parameters, before, strict=True):
                parameter.grad = gradient
        kept = [t.detach() for t in watch.tensors]
        return _Step(inputs, leaves, spec, recording, before, after, kept, calls.in_words(call))

    def _replay(self, step: _Step, call: Call) -> Any:
        assert self._recorder is not None
        assert self._watch is not None
        self._recorder.take_turn()
        calls.fill(step.inputs, call.tensors)
        step.recording.replay()
        for parameter, gradient in zip(self._watch.parameters, step.after, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        static = self._options.static_output
        return calls.rebuild([t if static or not isinstance(t, Tensor) else t.clone() for t in step.leaves], step.spec)


WARMING = "warming up: a real step in the step's own code"
