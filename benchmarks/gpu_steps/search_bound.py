"""`native/search_bound.cu`: how near tensor cores come to the bound that the code search certifies; beyond it is a failure."""

from __future__ import annotations

import json
import subprocess

from fastsr.bench.cases.gpu_steps import common

result, _ = common.arguments()
done = subprocess.run([str(common.build_probe("search_bound"))], capture_output=True, text=True, timeout=50, check=False)
if done.returncode:
    raise SystemExit(f"search_bound failed: {done.stderr}")
found = json.loads(done.stdout)
result.save(**found)
print(f"{found['products']} products, at most {found['largest_ratio']:.3f} of the bound")
if not found["largest_ratio"] <= 1:
    raise SystemExit("the bound is broken: csrc/common/vq_bound.h needs a larger constant for this GPU")
