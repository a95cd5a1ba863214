"""Files of weights for the tests: a small network in every format."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fastsr.models import RRDBNet

SIZES = {"num_feat": 6, "num_block": 2, "num_grow_ch": 3}


def network(scale: int = 4, channels: tuple[int, int] = (3, 3), **sizes: Any) -> RRDBNet:
    """With biases that are not zero, and weights that float16 holds exactly."""
    torch.manual_seed(0)
    model = RRDBNet(*channels, scale, **(SIZES | sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half().float())
    return model


def write_pth(model: RRDBNet, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def write_legacy_pth(model: RRDBNet, path: Path) -> Path:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    return path


def write_safetensors(model: RRDBNet, path: Path) -> Path:
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def write_ncnn(model: RRDBNet, path: Path, half: bool = True) -> Path:
    """`path` and its `.bin`, laid out as ncnn's converter does, with scalar products as layers of their own for float32."""
    lines: list[str] = []
    blob = b""
    count = 0

    def layer(kind: str, inputs: list[str], options: str = "") -> str:
        nonlocal count
        count += 1
        lines.append(f"{kind} {kind.lower()}_{count} {len(inputs)} 1 {' '.join(inputs)} b{count} {options}".strip())
        return f"b{count}"

    def conv(x: str, name: str, active: bool = False) -> str:
        nonlocal blob
        weight = model.get_submodule(name).weight.detach().numpy()
        data = weight.astype("<f2").tobytes() if half else weight.astype("<f4").tobytes()
        blob += struct.pack("<I", 0x01306B47 if half else 0) + data + b"\0" * (-len(data) % 4)
        blob += model.get_submodule(name).bias.detach().numpy().astype("<f4").tobytes()
        return layer("Convolution", [x], f"0={weight.shape[0]} 1=3 4=1 5=1 6={weight.size}" + " 9=2 -23310=1,2.000000e-01" * active)

    def scaled_sum(a: str, b: str) -> str:
        if half:
            return layer("Eltwise", [a, b], "0=1 -23301=2,2.000000e-01,1.000000e+00")
        return layer("BinaryOp", [layer("BinaryOp", [a], "0=2 1=1 2=2.000000e-01"), b], "0=0")

    def dense(x: str, name: str) -> str:
        parts = [x]
        for k in range(1, 5):
            parts.append(conv(parts[0] if k == 1 else layer("Concat", parts), f"{name}.conv{k}", True))
        return scaled_sum(conv(layer("Concat", parts), f"{name}.conv5"), x)

    x = first = conv("data", "conv_first")
    for i in range(model.num_block):
        y = x
        for j in (1, 2, 3):
            y = dense(y, f"body.{i}.rdb{j}")
        x = scaled_sum(y, x)
    x = layer("BinaryOp", [first, conv(x, "conv_body")])
    for k in range(1, {4: 2, 8: 3}[model.scale] + 1):
        x = conv(layer("Interp", [x], "0=1 1=2.000000e+00 2=2.000000e+00"), f"conv_up{k}", True)
    conv(conv(x, "conv_hr", True), "conv_last")
    lines.insert(0, "Input data 0 1 data")
    path.write_text("\n".join(["7767517", f"{len(lines)} {count + 1}", *lines]) + "\n")
    path.with_suffix(".bin").write_bytes(blob)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(np.array_equal(x[key].numpy(), y[key].numpy()) for key in x)
