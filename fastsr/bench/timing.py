"""How one call is timed, on a CPU and on a GPU. Every function returns one time in seconds per call.

    wall     CPU: the monotonic clock around each call, the calls going round all input sets
    warm     CPU: the same, with one input set in the same storages, so that caches hold it
    cold     CPU: as wall, and before each call other memory than the call's fills the caches
    cold     GPU: device events around each call, the L2 cache overwritten before it
    warm     GPU: device events around each call, one input set in the same storages
    graph    GPU: replays of one CUDA graph that holds a call per input set; no launch from Python in between

Outside the clock every set gets new numbers before it is used again: `renew(set)`. Nobody can answer from memory.
Events include the gaps in which the GPU waits for the next launch; a graph replay does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsr.bench.case import Call, Inputs

CUDA_MODES = ("cold", "warm", "graph")

#: Larger inputs and outputs than a core's cache leave nothing to be warm.
WARM_BYTES = 8 << 20


#: Read to fill the caches of a CPU: twice the last level of most, of which a core of a large machine reaches a part.
FLUSH_BYTES = 128 << 20

#: Puts new numbers into the tensors of an input set.
Renew = Callable[[Inputs], None]


def modes(device: str, moved: float) -> tuple[str, ...]:
    """The ways in which a case that moves so many bytes is timed."""
    if device == "cuda":
        return CUDA_MODES
    return ("wall", "warm", "cold") if moved < WARM_BYTES else ("wall",)


def wall(call: Call, sets: Sequence[Inputs], iterations: int, renew: Renew, cold: bool = False) -> list[float]:
    """Time `iterations` calls that go round the input sets; releasing the answer is not timed."""
    samples = []
    with _flusher() if cold else contextlib.nullcontext(lambda: None) as flush:
        for i in range(iterations):
            inputs = sets[i % len(sets)]
            flush()
            start = time.perf_counter()
            answer = call(*inputs)
            samples.append(time.perf_counter() - start)
            del answer
            renew(inputs)
    return samples


@contextlib.contextmanager
def _flusher() -> Iterator[Callable[[], None]]:
    """Reads other memory on every core; by threads that sleep in between, where torch's would go on spinning."""
    threads = torch.get_num_threads()
    parts = np.ones((threads, FLUSH_BYTES // threads // 8))
    with ThreadPoolExecutor(threads) as pool:
        yield lambda: [*pool.map(np.sum, parts)].clear()


def events(call: Call, sets: Sequence[Inputs], iterations: int, renew: Renew, cold: bool, cuda: Any = torch.cuda) -> list[float]:
    """Time calls by device events; `cold` overwrites twice the L2 cache before each."""
    flush = torch.empty(2 * l2_bytes(cuda), dtype=torch.uint8, device="cuda") if cold else None
    starts = [cuda.Event(enable_timing=True) for _ in range(iterations)]
    ends = [cuda.Event(enable_timing=True) for _ in range(iterations)]
    for i in range(iterations):
        inputs = sets[i % len(sets)] if cold else sets[0]
        if flush is not None:
            flush.zero_()
        starts[i].record()
        answer = call(*inputs)
        ends[i].record()
        del answer
        renew(inputs)
    cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]


class Graph:
    """A CUDA graph that holds one call for each input set."""

    def __init__(self, call: Call, sets: Sequence[Inputs], cuda: Any = torch.cuda) -> None:
        self._cuda, self._calls = cuda, len(sets)
        # Lazy initialisation (handles, module loads, autotuning) is not allowed during capture: it happens before.
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for inputs in sets:
                call(*inputs)
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph):
            self.answers = [call(*inputs) for inputs in sets]

    def replay(self) -> None:
        """Run the captured calls again on what the input sets hold now."""
        self._graph.replay()

    def times(self, iterations: int, renew: Callable[[], None]) -> list[float]:
        """The mean time of a call, for each of `iterations` replays; `renew` puts new numbers into all sets before each."""
        starts = [self._cuda.Event(enable_timing=True) for _ in range(iterations)]
        ends = [self._cuda.Event(enable_timing=True) for _ in range(iterations)]
        self.replay()
        for start, end in zip(starts, ends, strict=True):
            renew()
            start.record()
            self.replay()
            end.record()
        self._cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / self._calls for start, end in zip(starts, ends, strict=True)]


def l2_bytes(cuda: Any = torch.cuda) -> int:
    """The L2 cache of the current GPU; 64 MiB where torch does not tell."""
    return int(getattr(cuda.get_device_properties(cuda.current_device()), "L2_cache_size", 0)) or 64 << 20


def launches(run: Callable[[], Any], device: str) -> int | None:
    """Kernels, copies and fills that `run` puts on the GPU, as the profiler counts them; None on a CPU."""
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@contextlib.contextmanager
def page_faults() -> Iterator[dict[str, int]]:
    """Counts the page faults of this process inside the block, and how often others took a core from it."""
    counts: dict[str, int] = {}
    before = resource.getrusage(resource.RUSAGE_SELF)
    yield counts
    after = resource.getrusage(resource.RUSAGE_SELF)
    counts["minor"] = after.ru_minflt - before.ru_minflt
    counts["major"] = after.ru_majflt - before.ru_majflt
    counts["preempted"] = after.ru_nivcsw - before.ru_nivcsw


def peak_memory(run: Callable[[], Any], device: str) -> int:
    """Bytes by which `run` raises the memory in use at its highest point: the allocator's on a GPU, resident on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Memory that earlier calls freed and the C library kept would serve this one unseen.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # Writing 5 resets the high-water mark (proc(5)); where that is forbidden only a new maximum shows.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def held_memory(device: str) -> int:
    """Bytes in use now: the allocator's on a GPU, resident on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else _resident("VmRSS")


def _resident(field: str) -> int:
    """A memory figure of this process in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
