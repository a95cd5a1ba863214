"""What records and replays: the seam between CUDA and the rest of this package, which knows nothing of streams and pools.

    caller's stream   ... fill inputs, replay, copy outputs ...                     the stream that is current in each call
    side stream             warm-up | capture | capture ...                         one a recorder; each waits for the caller's

A recorder's graphs share one pool of memory unless each is to have its own. Sharing is what keeps a cache of graphs small: a graph's
temporaries lie where those of the others do, so that what a graph leaves is good until the next replay of any of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch


class Recording(Protocol):
    """A graph: `replay` computes anew from what its inputs hold, into the tensors that its `run` returned."""

    def replay(self) -> None:
        """Run it in the current stream."""
        ...


class Recorder(Protocol):
    """Makes recordings on one device."""

    def missing(self) -> str | None:
        """Why nothing can be recorded or replayed now, or None."""
        ...

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """A block that leaves the random generators as they were."""
        ...

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """A block that runs on the side stream, after what the caller's stream holds and before what it gets next."""
        ...

    def record(self, run: Callable[[], Any]) -> tuple[Any, Recording]:
        """Record `run`: what it returned, and the recording. On a GPU nothing has been computed yet."""
        ...

    def take_turn(self) -> None:
        """Order the current stream after the last replay; called before the inputs are written."""
        ...


class CudaRecorder:
    """Recordings as CUDA (or HIP) graphs.

    Args:
        device: where the model lives.
        generators: random generators, beside torch's own, from which the recorded code draws.
        shared_pool: whether the graphs share their temporaries' memory.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = (), shared_pool: bool = True) -> None:
        self._device, self._generators, self._shared_pool = device, tuple(generators), shared_pool
        self._side: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._pool: Any = None

    def missing(self) -> str | None:
        if self._device.type != "cuda":
            return f"the model is on {self._device}; only a GPU has graphs"
        if torch.cuda.is_current_stream_capturing():
            return "another graph is being recorded, of which this call becomes a part"
        return None

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        own = [g.get_state() for g in self._generators]
        with torch.random.fork_rng(devices=[self._device]):
            yield
        for generator, state in zip(self._generators, own, strict=True):
            generator.set_state(state)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            side, caller = self._side_stream(), torch.cuda.current_stream()
            side.wait_stream(caller)
            try:
                with torch.cuda.stream(side):
                    yield
            finally:
                caller.wait_stream(side)

    def record(self, run: Callable[[], Any]) -> tuple[Any, Recording]:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)  # type: ignore[no-untyped-call]
        if self._pool is None or not self._shared_pool:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads (data loaders that pin memory, say) may go on calling CUDA.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream(), capture_error_mode="thread_local"),
            ):
                answer = run()
        except BaseException:
            self._pool = None  # what a broken capture left in it stays away from later ones
            raise
        return answer, graph

    def take_turn(self) -> None:
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def _side_stream(self) -> torch.cuda.Stream:
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        return self._side
