"""A module whose calls are replays of recorded graphs; forward and backward are one autograd node."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsr.graphs import calls
from fastsr.graphs.calls import Call, Unrecordable
from fastsr.graphs.entry import Entry, Turn
from fastsr.graphs.ledger import Ledger, in_short
from fastsr.graphs.recording import Recorder
from fastsr.graphs.watching import Watch

MakeRecorder = Callable[[torch.device], Recorder]


@dataclass(frozen=True)
class Options:
    """The arguments of `cuda_graph` that a copy takes over."""

    max_graphs: int
    warmup: int
    static_output: bool
    make_recorder: MakeRecorder


class _Recorded:
    """The graphs of one wrapper: everything that a copy or a pickle leaves behind."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.recorder: Recorder | None = None
        self.entries: dict[Hashable, Entry] = {}
        self.failed: dict[Hashable, str] = {}
        self.made = 0  # graphs, those since dropped too
        self.turn: weakref.ref[Turn] | None = None

    def pending(self) -> bool:
        """True while the backward of a replayed forward may still come: it needs what that left in the graphs' memory."""
        turn = self.turn() if self.turn else None
        return turn is not None and not turn.done


class GraphedModule(nn.Module):
    """`model`, replayed. Made by `fastsr.cuda_graph`, which tells when a call is a replay.

    It shares the model's parameters, buffers and children under the same names: state dicts, optimizers, `.to(...)`, `train()`, `eval()`
    and attributes reach the model. `deepcopy` and pickles copy the model and the options; the copy records graphs of its own.

    Attributes:
        model: the module itself; calling it never replays.
        reasons: why calls ran the model's own code, with how often.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        own = self.__dict__
        own["model"], own["_options"], own["_recorded"], own["_ledger"] = model, options, _Recorded(), Ledger()
        # The very same dictionaries: what a walk over modules finds or replaces here, it finds or replaces in the model.
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[shared] = getattr(model, shared)
        own["training"] = model.training

    @property
    def reasons(self) -> Counter[str]:
        """Why calls ran the model's own code -> how often."""
        return self._ledger.reasons

    def report(self) -> str:
        """What was recorded and replayed, and why other calls ran the model's own code."""
        return self._ledger.report(len(self._recorded.entries), self._options.max_graphs)

    def reset(self) -> None:
        """Drop all graphs and what is known of failed ones; later calls record anew. For changes that nothing else tells of:
        attributes that decide what a model runs, or tensors that are neither parameters nor buffers."""
        self._recorded = _Recorded()

    def prepare(self, *args: Any, **kwargs: Any) -> bool:
        """Record a graph for calls like this one (shapes, dtypes, layouts) in the present modes, without running any.

        Returns:
            True if there is a graph for such calls now; else the last of `reasons` says why not.
        """
        ready, reason = self._entry(args, kwargs)
        if ready is None:
            self._ledger.reasons[reason] += 1
        return ready is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer: replayed where a graph fits, else computed by the model's own code, with a reason in `reasons`."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        ready, reason = self._entry(args, kwargs)
        if ready is None:
            self._ledger.reasons[reason] += 1
            return self.model(*args, **kwargs)
        entry, call = ready
        self._ledger.replays[entry.words] += 1
        return entry.answer(call.tensors, self._recorded, self._options.static_output)

    def _entry(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Entry, Call] | None, str]:
        """A graph for such a call, recorded now if need be; or None and why there is none."""
        recorded = self._recorded
        if recorded.watch is None:
            recorded.watch = Watch([self.model])
        elif change := recorded.watch.changed():
            # Graphs of the old state are of no use. This call goes on by itself; if the state stays, the next one records.
            made, self._recorded = recorded.made, _Recorded()
            self._recorded.made = made
            return None, f"{change}: recorded graphs were dropped"
        watch = recorded.watch
        if reason := watch.unfit() if recorded.recorder is None else None:
            recorded.watch = None
            return None, reason
        device = watch.device() or _first_device(args, kwargs)
        if device is None:
            return None, "neither the model nor the call has a tensor"
        if recorded.recorder is None:
            recorded.recorder = self._options.make_recorder(device)
        if reason := recorded.recorder.missing() or watch.hooked():
            return None, reason
        if recorded.pending():
            return None, "the backward of an earlier call is still to come"
        try:
            call = calls.describe(args, kwargs, device)
        except Unrecordable as error:
            return None, str(error)
        key = (call.key, watch.training())
        if key not in recorded.entries and (reason := self._record(recorded, watch, key, call)):
            return None, reason
        return (recorded.entries[key], call), ""

    def _record(self, recorded: _Recorded, watch: Watch, key: Hashable, call: Call) -> str | None:
        """Add a graph for `call`; or say why there is none."""
        options = self._options
        if key in recorded.failed:
            return recorded.failed[key]
        if len(recorded.entries) >= options.max_graphs:
            return f"max_graphs={options.max_graphs} graphs are recorded and none fits ({calls.in_words(call)})"
        if recorded.made >= 4 * options.max_graphs:
            return f"{recorded.made} graphs were recorded and most of them dropped again: the model keeps changing; reset() starts anew"
        assert recorded.recorder is not None
        try:
            recorded.entries[key] = Entry(self.model, watch, call, recorded.recorder, options.warmup)
        except Exception as error:  # whatever it is, the model's own code runs, and raises what is the user's to see
            reason = str(error) if isinstance(error, Unrecordable) else f"recording failed: {in_short(error)}"
            recorded.failed[key] = reason
            return reason
        recorded.made += 1
        return None

    # What reaches the model instead of this wrapper.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__:
                raise
            return getattr(self.__dict__["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "model" in self.__dict__ and name not in self.__dict__:
            setattr(self.__dict__["model"], name, value)
        elif "model" in self.__dict__:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["model"], name)

    def __reduce__(self) -> Any:
        return GraphedModule, (self.model, self._options)

    def train(self, mode: bool = True) -> GraphedModule:
        self.model.train(mode)
        self.training = mode
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> GraphedModule:
        self.model._apply(*args, **kwargs)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"replays {type(self.model).__name__}, {len(self._recorded.entries)} graphs"


def _first_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    return next((t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
