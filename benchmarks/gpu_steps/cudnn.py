"""cuDNN's rate for the 3x3 convolutions of RRDBNet and RCAN: bf16, channels-last, heuristics and autotuned, launches and graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsr.bench import timing
from fastsr.bench.cases.gpu_steps import common
from fastsr.bench.statistics import median

CHANNELS = ((64, 64), (64, 32), (96, 32), (128, 32), (160, 32), (192, 64))
IMAGES = ((16, 48, 48), (1, 256, 256), (1, 540, 960))

result, _ = common.arguments()
rows = []
for n, h, w in IMAGES:
    for cin, cout in CHANNELS:
        drawn = [torch.randn(n, cin, h, w, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        sets = [(x.contiguous(memory_format=torch.channels_last),) for x in drawn]
        weight = (torch.randn(cout, cin, 3, 3, device="cuda") / (3 * cin**0.5)).bfloat16().contiguous(memory_format=torch.channels_last)
        row = {"cin": cin, "cout": cout, "image": [n, h, w]}
        for autotuned in (False, True):
            torch.backends.cudnn.benchmark = autotuned

            def convolve(x: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
                return F.conv2d(x, weight, padding=1)

            convolve(*sets[0])
            torch.cuda.synchronize()
            flops = 2.0 * 9 * cin * cout * n * h * w
            for mode in timing.CUDA_MODES:
                samples = (
                    timing.Graph(convolve, sets).times(20) if mode == "graph" else timing.events(convolve, sets, 20, cold=mode == "cold")
                )
                key = f"{'autotuned' if autotuned else 'heuristic'} {mode}"
                row[key] = {"ms": 1e3 * median(samples), "tflops": flops / median(samples) / 1e12}
        rows.append(row)
        result.save(rows=rows)
        print(row, flush=True)
