"""Hopper's own kernels, which FASTSR_HOPPER=1 turns on: every index against float64 and the usual kernels, and the time of both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastsr import ops
from fastsr.bench.cases.gpu_steps import common
from tests.vq_cases import Problem, problems

#: (N, K, D), milliseconds that were aimed at and predicted.
TIMED = ((65536, 1024, 64, 0.040, 0.028), (16384, 8192, 256, 0.150, 0.122), (16384, 512, 64, None, None))

#: What wgmma serves, beside the shapes of the tests: rings that turn several times, in one and in several stages of the depth.
SHAPES = ((512, 64), (1, 1), (33, 17), (1024, 32), (2, 130), (256, 256), (2000, 64), (1500, 200), (8192, 256), (16, 16))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def hopper(wanted: bool) -> Iterator[None]:
    """With or without Hopper's own kernels; the library asks the environment at each call."""
    os.environ["FASTSR_HOPPER"] = "1" if wanted else "0"
    try:
        yield
    finally:
        del os.environ["FASTSR_HOPPER"]


def search(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """The compiled search."""
    found = ops.vq_nearest(x, codebook, metric=metric, backend="compiled")
    assert isinstance(found, Tensor)
    return found


def kernels(x: Tensor, codebook: Tensor) -> list[str]:
    """The kernels that one search launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        search(x, codebook)
        torch.cuda.synchronize()
    return sorted({event.key for event in record.key_averages()})


def wrong(problem: Problem) -> str | None:
    """What is wrong with a problem's indices on the GPU, or None."""
    return problem.first_wrong(lambda x, codes: search(x.cuda(), codes.cuda(), problem.metric).cpu())


def timed(n: int, k: int, d: int) -> dict[str, object]:
    """Both searches of normal rows and codes, in turn; their indices must be the same."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, codes = (torch.randn((size, d), generator=generator, device="cuda") for size in (n, k))
    found: dict[str, object] = {}
    indices = []
    for name, wanted in (("mma.sync", False), ("wgmma", True), ("mma.sync again", False), ("wgmma again", True)):
        with hopper(wanted):
            indices.append(search(x, codes))
            found[name] = common.milliseconds(lambda: search(x, codes), repeats=30)
    found["differing"] = sum(int((other != indices[0]).sum()) for other in indices[1:])
    return found


def main() -> None:
    result, _ = common.arguments()
    if torch.cuda.get_device_capability() != (9, 0):
        common.nothing_to_do(f"sm_90a kernels need compute capability 9.0; this GPU has {torch.cuda.get_device_capability()}")
    x, codes = torch.randn(1000, 64, device="cuda"), torch.randn(700, 64, device="cuda")
    with hopper(True):
        names = kernels(x, codes)
        result.save(kernels=names)
        if not any("search_rows_hopper" in name for name in names):
            raise SystemExit(f"FASTSR_HOPPER=1 did not bring Hopper's search; the kernels were {names}")
        wrongs = [found for problem in problems(60_000, DTYPES, SHAPES) if (found := wrong(problem))]
    result.save(problems=len(problems(60_000, DTYPES, SHAPES)), wrong=wrongs)
    times = {}
    for n, k, d, aim, predicted in TIMED:
        times[f"{n}x{k}x{d}"] = {**timed(n, k, d), "target_ms": aim, "predicted_ms": predicted}
        result.save(times=times)
    print(f"{len(wrongs)} wrong problems: {wrongs[:3]}")
    for size, found in times.items():
        print(size, {name: value["ms"] if isinstance(value, dict) else value for name, value in found.items()})
    if wrongs or any(found["differing"] for found in times.values()):
        raise SystemExit("Hopper's search is not exact")


if __name__ == "__main__":
    main()
