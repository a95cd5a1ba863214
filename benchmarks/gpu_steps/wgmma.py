"""`native/wgmma.cu`: descriptors shifted inside a swizzled tile, and the rate with M = 64."""

from __future__ import annotations

import json
import subprocess

import torch

from fastsr.bench.cases.gpu_steps import common

result, _ = common.arguments()
if torch.cuda.get_device_capability()[0] != 9:
    common.nothing_to_do(f"wgmma exists on compute capability 9.0 alone; this GPU has {torch.cuda.get_device_capability()}")
done = subprocess.run([str(common.build_probe("wgmma"))], capture_output=True, text=True, timeout=60, check=False)
if done.returncode:
    raise SystemExit(f"wgmma failed: {done.stderr}")
result.save(**json.loads(done.stdout))
print(done.stdout)
