"""A recorder for tests without a GPU: it has the aliasing of CUDA graphs, and computes a replay by running the code again.

A replay writes into the tensors that recording returned, as a graph does; and, as graphs with one pool of memory may, it destroys what
later recordings of the pool left. Recording leaves nothing computed: it puts parameters, buffers and gradients back, and what it
returned holds NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastsr.graphs.module import Options
from fastsr.graphs.recording import CudaRecorder


def tensors_of(answer: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(answer) if isinstance(t, Tensor)]


def destroy(t: Tensor) -> None:
    with torch.no_grad():
        t.detach().fill_(torch.nan if t.is_floating_point() else 77)


class FakeRecording:
    def __init__(self, recorder: FakeRecorder, run: Callable[[], Any]) -> None:
        self._recorder, self._run = recorder, run
        with recorder.undone():
            self.answer = run()
        kept = {t.data_ptr() for t in recorder.state()}
        self.own = [t for t in tensors_of(self.answer) if t.data_ptr() not in kept]
        for t in self.own:
            destroy(t)

    def replay(self) -> None:
        self._recorder.replays += 1
        new = tensors_of(self._run())
        with torch.no_grad():
            for mine, value in zip(tensors_of(self.answer), new, strict=True):
                if mine is not value:
                    mine.detach().copy_(value.detach())
        if self._recorder.shared_pool:
            later = self._recorder.recordings[self._recorder.recordings.index(self) + 1 :]
            for t in (t for other in later for t in other.own):
                destroy(t)


class FakeRecorder:
    """`modules`: whose state recording puts back."""

    def __init__(self, modules: Sequence[nn.Module] = (), shared_pool: bool = True) -> None:
        self.modules, self.shared_pool = modules, shared_pool
        self.recordings: list[FakeRecording] = []
        self.replays = self.turns = 0
        self.broken: Exception | None = None  # raised by record

    def state(self) -> list[Tensor]:
        held = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        return held + [t.grad for t in held if t.grad is not None]

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        state = self.state()
        before = [t.detach().clone() for t in state]
        with self.quiet():
            yield
        with torch.no_grad():
            for t, old in zip(state, before, strict=True):
                t.detach().copy_(old)

    def missing(self) -> str | None:
        return None

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], Any]) -> tuple[Any, FakeRecording]:
        if self.broken is not None:
            raise self.broken
        recording = FakeRecording(self, run)
        self.recordings.append(recording)
        return recording.answer, recording

    def take_turn(self) -> None:
        self.turns += 1


class Making:
    """A recorder factory that remembers what it made. Real graphs where `real` says so."""

    def __init__(self, real: bool = False, modules: Sequence[nn.Module] = (), shared_pool: bool = True) -> None:
        self.real, self.modules, self.shared_pool = real, modules, shared_pool
        self.made: list[Any] = []

    def __call__(self, device: torch.device) -> Any:
        recorder = CudaRecorder(device, (), self.shared_pool) if self.real else FakeRecorder(self.modules, self.shared_pool)
        self.made.append(recorder)
        return recorder

    def __reduce__(self) -> Any:
        return Making, (self.real, (), self.shared_pool)


def options(make: Making, max_graphs: int = 8, warmup: int = 2, static_output: bool = False) -> Options:
    return Options(max_graphs, warmup, static_output, make)
