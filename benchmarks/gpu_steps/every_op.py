"""Runs every op on tiny inputs, with each fused backend and dtype: the program that compute-sanitizer watches."""

from __future__ import annotations

import torch

from fastsr.backends import BackendUnavailable
from fastsr.bench import gate, suite
from fastsr.bench.cases.gpu_steps import common

result, _ = common.arguments()
options = suite.Options("cuda", ("float32", "bfloat16", "float16"), "tiny")
ran: dict[str, int] = {}
missing: dict[str, str] = {}
for form in common.hopper_forms():
    for module in suite.select(["ops"]):
        for case in suite.cases(module, options):
            for backend in ("compiled", "triton") if form == "" else ("compiled",):
                if backend not in case.runners:
                    continue
                runner = case.runners[backend]
                dtype = getattr(torch, case.dtype)
                name = f"{case.subject} {backend}{form}"
                try:
                    call = runner.build(gate.draw_state(case, dtype))
                    call(*gate.draw_inputs(case, 1, dtype, runner.channels_last))
                except BackendUnavailable as error:
                    missing[name] = str(error)
                    continue
                torch.cuda.synchronize()
                ran[name] = ran.get(name, 0) + 1
                result.save(ran=ran, missing=missing)
print(f"ran: {ran}; missing: {missing}")
if not ran:
    common.nothing_to_do("no kernel yet: no op has a fused backend here")
print("every op ran")
