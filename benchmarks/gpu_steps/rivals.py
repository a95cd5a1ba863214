"""Eager RRDBNet and RCAN at the four sizes that matter: forward, training step, each also as a CUDA graph, with peak memory.

    a  16 x 48 x 48     b  32 x 64 x 64     c  1 x 256 x 256     d  1 x 540 x 960      (LR; x4; c and d forward only)

A training step is forward, mean absolute error, backward and a fused Adam step. AMP is bfloat16 without a scaler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastsr.bench.cases.gpu_steps import common
from fastsr.bench.cases.peers import eager

SIZES = {"a": (16, 48, 48), "b": (32, 64, 64), "c": (1, 256, 256), "d": (1, 540, 960)}
#: The most telling first: a compiled network is compiled again for each, and the time may run out.
ORDER = (("a", "forward"), ("c", "forward"), ("a", "train"), ("d", "forward"), ("b", "train"), ("b", "forward"))
NETWORKS = {"rrdbnet": eager.RRDBNet, "rcan": eager.RCAN}


def graph_of(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`run`, captured after three calls on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def step_of(name: str, rival: str, size: str, direction: str) -> Callable[[], Any]:
    """What is timed."""
    torch.manual_seed(0)
    amp, compiled = rival.startswith(("amp", "compile")), rival.startswith("compile")
    layout = torch.channels_last if compiled or rival.endswith("channels_last") else torch.contiguous_format
    network = NETWORKS[name]().cuda().to(memory_format=layout)
    n, h, w = SIZES[size]
    x = torch.rand(n, 3, h, w, device="cuda").contiguous(memory_format=layout)
    # The weights' casts are part of every call, as in a training loop, and a captured graph must not keep a cached one.
    precision: Callable[[], Any] = (
        (lambda: torch.autocast("cuda", torch.bfloat16, cache_enabled=False)) if amp else contextlib.nullcontext
    )
    forward = network
    if compiled:
        mode = rival.removeprefix("compile ")
        forward = torch.compile(network, mode=None if mode == "default" else mode, dynamic=False)
    if direction == "forward":
        network.eval().requires_grad_(False)

        def infer() -> torch.Tensor:
            with torch.no_grad(), precision():
                return forward(x)

        return infer
    target = torch.rand(n, 3, 4 * h, 4 * w, device="cuda")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True, capturable=True)

    def train() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with precision():
            loss = F.l1_loss(forward(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss

    return train


def measure(name: str, rival: str, size: str, direction: str) -> dict[str, Any]:
    """Time and peak memory, launched and as a graph; an error in words where something fails."""
    found: dict[str, Any] = {"size": size, "direction": direction}
    try:
        run = step_of(name, rival, size, direction)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["allocated_before_bytes"] = before
        found["launched"] = common.milliseconds(run)
    except Exception as error:
        found["error"] = common.short(error)
        return found
    if rival != "compile max-autotune":  # which replays graphs of its own
        try:
            graph = graph_of(run)
            found["graph"] = common.milliseconds(graph.replay)
        except Exception as error:
            found["graph"] = {"error": common.short(error)}
    return found


def main() -> int:
    """1 if nothing could be timed."""
    result, args = common.arguments("network", "rival")
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    rows = []
    for size, direction in ORDER:
        torch.compiler.reset()
        torch.cuda.empty_cache()
        rows.append(measure(args.network, args.rival, size, direction))
        result.save(network=args.network, rival=args.rival, rows=rows)
        print(rows[-1], flush=True)
    return 0 if any("launched" in row for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
