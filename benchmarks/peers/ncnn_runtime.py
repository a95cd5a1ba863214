"""ncnn on a CPU, with the weights in its own files as they are shipped for it, and our number of threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsr.bench.case import Call, Unavailable

#: Half-precision storage and arithmetic are other computations than the one that the answers are judged by.
ROUNDING = ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage")


def load_network(param: Path, dtype: torch.dtype, winograd: bool) -> Call:
    """A call that runs the network of a `.param` and its `.bin`, in float32; Winograd is faster and less exact.

    Raises:
        Unavailable: ncnn is not installed, or the dtype is not float32.
    """
    try:
        import ncnn
    except ImportError as error:
        raise Unavailable("ncnn is not installed; pip install ncnn") from error
    if dtype != torch.float32:
        raise Unavailable(f"ncnn computes in float32 on this CPU; this case is {dtype}")
    net = ncnn.Net()
    for option in ROUNDING:
        setattr(net.opt, f"use_{option}", False)
    net.opt.use_winograd_convolution = winograd
    net.opt.num_threads = torch.get_num_threads()
    if net.load_param(str(param)) != 0 or net.load_model(str(param.with_suffix(".bin"))) != 0:
        raise Unavailable(f"ncnn cannot read {param}")

    def run(x: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(np.ascontiguousarray(x[0].numpy())).clone())  # a Mat alone does not keep its array alive
        status, result = extractor.extract(net.output_names()[0])
        if status != 0:
            raise RuntimeError(f"ncnn returned {status}")
        return torch.from_numpy(np.array(result)[None])

    return run
