"""onnxruntime on a CPU: the plain network exported by torch, in float32, with our number of threads."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsr.bench.case import Call, Unavailable


def compile_network(network: nn.Module, dtype: torch.dtype) -> Call:
    """A call that runs `network` on onnxruntime. It is exported for the shape of the first input; several outputs make a tuple.

    Raises:
        Unavailable: onnxruntime or the exporter's packages are not installed, or the dtype is not float32.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed; pip install onnxruntime onnx onnxscript") from error
    if dtype != torch.float32:
        raise Unavailable(f"onnxruntime's CPU convolutions are float32; this case is {dtype}")
    sessions: dict[torch.Size, Any] = {}

    def run(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if x.shape not in sessions:
            exported = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
            assert exported is not None
            file = io.BytesIO()
            exported.save(file)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            sessions[x.shape] = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        session = sessions[x.shape]
        answer = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(x.numpy())})
        outputs = tuple(torch.from_numpy(y) for y in answer)
        return outputs[0] if len(outputs) == 1 else outputs

    return run
