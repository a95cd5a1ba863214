"""Tails in strips of rows: the same bits as whole, whatever the factors, the strips' height and what is left for the last one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastsr import _native, ops
from fastsr.nn import strips
from fastsr.nn.strips import Part

needs_native = pytest.mark.skipif(_native.missing is not None, reason="needs the native library")

CHAINS = {
    "nearest": [(2, 1, 8), (2, 1, 8), (1, 1, 8), (1, 1, 3)],
    "shuffle": [(1, 2, 8), (1, 2, 8), (1, 1, 3)],
    "shuffle by 3": [(1, 3, 5), (1, 1, 3)],
    "both": [(2, 2, 4), (1, 1, 1)],
    "none": [(1, 1, 7), (1, 1, 3)],
}


def chain(steps: list[tuple[int, int, int]], dtype: torch.dtype) -> list[Part]:
    parts, channels = [], 8
    for up, r, outputs in steps:
        weight, bias = torch.randn(outputs * r * r, channels, 3, 3).to(dtype) / 8, torch.randn(outputs * r * r).to(dtype)
        run = partial(ops.conv3x3, weight=weight, bias=bias, upsample=up, pixel_shuffle=r, activation="leaky_relu")
        parts.append(Part(run, outputs, up, r))
        channels = outputs
    return parts


def whole(z: Tensor, parts: list[Part]) -> Tensor:
    for part in parts:
        z = part.run(z)
    return z


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 40, 9), (2, 53, 16), (1, 17, 1)])
def test_bits_of_the_whole(name: str, dtype: torch.dtype, batch: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(strips, "FEWEST_ROWS", 3)
    torch.manual_seed(0)
    parts = chain(CHAINS[name], dtype)
    z = torch.randn(batch, 8, height, width).to(dtype)
    assert strips._rows(z, parts, "compiled") is not None, "the case is to be cut"
    assert torch.equal(strips.run_parts(z, parts, "compiled"), whole(z, parts))


@needs_native
def test_no_tensor_is_larger_than_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": 64 << 10, "cuda": 64 << 10})
    z, largest = torch.randn(1, 8, 256, 16), 0
    parts = chain(CHAINS["nearest"], torch.float32)

    def watch(part: Part) -> Part:
        def run(x: Tensor, **options: Tensor) -> Tensor:
            nonlocal largest
            y = part.run(x, **options)
            largest = max(largest, y.numel() * y.element_size())
            return y

        return Part(run, part.channels, part.upsample, part.pixel_shuffle)

    strips.run_parts(z, [watch(part) for part in parts], "compiled")
    assert largest <= 2 * (64 << 10)


def test_small_pictures_run_whole() -> None:
    parts = chain(CHAINS["nearest"], torch.float32)
    assert strips._rows(torch.randn(1, 8, 32, 32), parts, "auto") is None
    assert strips.run_parts(torch.randn(0, 8, 3, 4), parts, "auto").shape == (0, 3, 12, 16)
