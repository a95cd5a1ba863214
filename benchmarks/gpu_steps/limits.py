"""The roofs of the GPU through torch, and what `native/device_limits.cu` measures."""

from __future__ import annotations

import json
import subprocess

from fastsr.bench import roofs
from fastsr.bench.cases.gpu_steps import common

result, _ = common.arguments()
result.save(roofs=roofs.gpu_roofs(("float32", "bfloat16", "float16")))
done = subprocess.run([str(common.build_probe("device_limits"))], capture_output=True, text=True, timeout=60, check=False)
if done.returncode:
    raise SystemExit(f"device_limits failed: {done.stderr}")
result.save(device=json.loads(done.stdout), units={"l2_read": "GB/s"})
print(done.stdout)
