"""OpenVINO on a CPU: the plain network converted by its own tool, in the precision asked for and with our number of threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsr.bench.case import Call, Unavailable


def compile_network(network: nn.Module, dtype: torch.dtype) -> Call:
    """A call that runs `network` on OpenVINO. It is compiled for the shape of the first input.

    Its inputs and outputs are float32 in any precision; several outputs make a tuple.

    Raises:
        Unavailable: OpenVINO is not installed, or it has no such precision on a CPU.
    """
    try:
        import openvino
    except ImportError as error:
        raise Unavailable("OpenVINO is not installed; pip install openvino") from error
    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if dtype not in hints:
        raise Unavailable(f"no OpenVINO runner for {dtype}")
    network = network.float()  # the precision of the inference is a hint
    compiled: dict[torch.Size, Any] = {}

    def run(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if x.shape not in compiled:
            model = openvino.convert_model(network, example_input=x, input=[tuple(x.shape)])
            settings = {
                "INFERENCE_PRECISION_HINT": hints[dtype],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            }
            compiled[x.shape] = openvino.compile_model(model, "CPU", settings)
        answer = compiled[x.shape](x.contiguous().numpy())
        outputs = tuple(torch.from_numpy(answer[i]) for i in range(len(answer)))
        return outputs[0] if len(outputs) == 1 else outputs

    return run
