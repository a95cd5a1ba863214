"""The 3x3 convolution's engines: wgmma's tiles bit for bit against mma.sync, then both and cuDNN in one run."""

from __future__ import annotations

import json
import os
import subprocess

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastsr import ops
from fastsr.bench import timing
from fastsr.bench.cases.gpu_steps import common
from fastsr.bench.statistics import median

CHANNELS = ((64, 64), (64, 32), (96, 32), (128, 32), (160, 32), (192, 64))
IMAGES = ((16, 48, 48), (1, 256, 256), (1, 540, 960))


def tiles() -> list[dict[str, object]]:
    """`native/conv_wgmma.cu`: a row for each shape and variant."""
    done = subprocess.run([str(common.build_probe("conv_wgmma"))], capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        raise SystemExit(f"conv_wgmma failed: {done.stderr}\n{done.stdout[-1000:]}")
    rows: list[dict[str, object]] = json.loads(done.stdout)["rows"]
    return rows


def fused(x: Tensor, weight: Tensor) -> Tensor:
    """The compiled convolution."""
    return ops.conv3x3(x, weight, backend="compiled")


def cudnn(x: Tensor, weight: Tensor) -> Tensor:
    """Eager's, which is cuDNN's."""
    return F.conv2d(x, weight, padding=1)


def kernels(x: Tensor, weight: Tensor) -> list[str]:
    """The kernels that one fused convolution launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        fused(x, weight)
        torch.cuda.synchronize()
    return sorted({event.key for event in record.key_averages()})


def rates(cin: int, cout: int, image: tuple[int, int, int]) -> dict[str, object]:
    """Milliseconds and TFLOP/s of mma.sync, wgmma, cuDNN's heuristic and autotuned choice, replayed from graphs, in turn."""
    n, h, w = image
    drawn = [torch.randn(n, cin, h, w, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    weight = (torch.randn(cout, cin, 3, 3, device="cuda") / (3 * cin**0.5)).bfloat16()
    sets = [(x.contiguous(memory_format=torch.channels_last), weight) for x in drawn]
    last = [(x, weight.contiguous(memory_format=torch.channels_last)) for x, _ in sets]
    row: dict[str, object] = {"cin": cin, "cout": cout, "image": image}
    flops = 18.0 * cin * cout * n * h * w
    ours = (("mma.sync", fused, "0", False), ("wgmma", fused, "1", False))
    theirs = (("cuDNN", cudnn, "0", False), ("cuDNN autotuned", cudnn, "0", True))
    for name, run, hopper, autotuned in (*ours, *theirs):
        os.environ["FASTSR_HOPPER"], torch.backends.cudnn.benchmark = hopper, autotuned
        arguments = last if run is cudnn else sets
        run(*arguments[0])
        torch.cuda.synchronize()
        seconds = median(timing.Graph(run, arguments).times(20))
        row[name] = {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12}
    return row


def main() -> None:
    result, _ = common.arguments()
    if torch.cuda.get_device_capability() != (9, 0):
        common.nothing_to_do(f"sm_90a kernels need compute capability 9.0; this GPU has {torch.cuda.get_device_capability()}")
    rows = tiles()
    wrong = [row for row in rows if row["differing"]]
    best = {}
    for row in rows:
        key = f"{row['cin']} -> {row['cout']} {row['image']}"
        right = not row["differing"]
        if right and (key not in best or row["us"] < best[key]["us"]):  # type: ignore[operator]
            best[key] = row
    result.save(tiles=rows, wrong=wrong, best=best)
    for key, row in best.items():
        print(f"{key}: {row['variant']} {row['us']} us, {row['tflops']} TFLOP/s")
    os.environ["FASTSR_HOPPER"] = "1"
    x = torch.randn(1, 64, 32, 32, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    names = kernels(x, torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16))
    result.save(kernels=names)
    if not any("conv3x3_hopper" in name for name in names):
        raise SystemExit(f"FASTSR_HOPPER=1 did not bring Hopper's convolution; the kernels were {names}")
    rated = []
    for image in IMAGES:
        for cin, cout in CHANNELS:
            rated.append(rates(cin, cout, image))
            result.save(rates=rated)
            print(rated[-1], flush=True)
    # A swizzled halo tile is a question to the hardware; the library's tiles are unswizzled.
    if any(row["variant"].endswith("unswizzled") for row in wrong):  # type: ignore[attr-defined]
        raise SystemExit(f"Hopper's convolution is not exact: {wrong[:3]}")


if __name__ == "__main__":
    main()
