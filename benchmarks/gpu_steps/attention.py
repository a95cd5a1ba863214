"""Channel attention with a residual: two passes, one pass by clusters, eager; time, and traffic against the copy bandwidth of this run.

The traffic counted is x, residual and output once each; two passes read x twice, the second time from L2 where it is there still.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr import ops
from fastsr.bench import roofs, timing
from fastsr.bench.cases.gpu_steps import common
from fastsr.bench.statistics import median
from fastsr.kernels.channel_attention import reference

SIZES = ((16, 64, 48, 48), (4, 64, 256, 256), (64, 64, 48, 48), (16, 64, 256, 256))
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
SQUEEZED = 4


def eager(x: Tensor, residual: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, out: Tensor) -> Tensor:
    """As networks write it."""
    s = torch.sigmoid(F.conv2d(F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), down, down_bias)), up, up_bias))
    return x * s + residual


def fused(hopper: str) -> Callable[..., Tensor]:
    """The compiled op, with or without the kernels for Hopper."""

    def run(x: Tensor, residual: Tensor, *rest: Tensor) -> Tensor:
        os.environ["FASTSR_HOPPER"] = hopper
        return ops.channel_attention(x, *rest[:4], residual, out=rest[4], backend="compiled")

    return run


def error(y: Tensor, truth: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((y.double() - truth).abs().max() / truth.abs().max()).item()


def measure(size: tuple[int, ...], dtype: torch.dtype, layout: str, copy_gb_s: float) -> dict[str, Any]:
    """The answers' errors, then the times, of every form."""
    n, c, h, w = size

    def draw(*shape: int) -> Tensor:
        t = torch.randn(*shape, device="cuda")
        return (t + 0.25).to(dtype, memory_format=FORMATS[layout]) if shape == size else (t / shape[-1] ** 0.5).to(dtype)

    parameters = (draw(SQUEEZED, c, 1, 1), draw(SQUEEZED), draw(c, SQUEEZED, 1, 1), draw(c))
    # More than L2 holds in all, so that a graph's calls find nothing there; few where one set is that large.
    bytes_moved = 3 * n * c * h * w * dtype.itemsize
    count = max(2, min(16, -(-3 * timing.l2_bytes() // bytes_moved)))
    sets = [(draw(*size), draw(*size), *parameters, torch.empty_like(draw(*size))) for _ in range(count)]
    x, residual, *rest = sets[0]
    truth = reference.channel_attention(x.double(), *(p.double() for p in rest[:4]), residual.double())
    row: dict[str, Any] = {"size": size, "dtype": str(dtype)[6:], "layout": layout, "bytes": bytes_moved}
    plain = error(eager(*sets[0]), truth)
    for name, run in {"two passes": fused("0"), "cluster": fused("1"), "eager": eager}.items():
        found: dict[str, Any] = {"error": error(run(*sets[0]), truth), "launches": timing.launches(lambda run=run: run(*sets[0]), "cuda")}
        if name == "cluster" and found["launches"] != 1:
            row[name] = {"not taken": f"{found['launches']} launches: the image does not fit, or this GPU is no Hopper"}
            continue
        if found["error"] > 2 * plain + 2 * torch.finfo(dtype).eps:
            raise SystemExit(f"attention: {name} of {row} has an error of {found['error']:.2e}; eager has {plain:.2e}")
        for mode in timing.CUDA_MODES:
            samples = timing.Graph(run, sets).times(20) if mode == "graph" else timing.events(run, sets, 30, cold=mode == "cold")
            gb_s = bytes_moved / median(samples) / 1e9
            found[mode] = {"us": 1e6 * median(samples), "gb_s": gb_s, "of_copy": gb_s / copy_gb_s}
        row[name] = found
    if "graph" in row["cluster"]:
        row["faster"] = min(("two passes", "cluster"), key=lambda name: row[name]["graph"]["us"])
        row["cluster_speedup"] = row["two passes"]["graph"]["us"] / row["cluster"]["graph"]["us"]
    return row


def main() -> int:
    """One row for each size, dtype and layout."""
    result, _ = common.arguments()
    copy = roofs.gpu_roofs(())["copy"]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for size in SIZES:
            for dtype in DTYPES:
                for layout in FORMATS:
                    rows.append(measure(size, dtype, layout, copy["value"]))
                    result.save(copy=copy, rows=rows)
                    print(rows[-1], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
