"""The CPU convolution engine: each instruction set by name, bitwise independence, odd strides, edges, NaN and infinity."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr import _native
from fastsr.kernels.conv3x3.compiled import conv3x3_into

ISAS = _native.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

each_kernel = pytest.mark.parametrize(("isa", "dtype"), [(i, d) for i in ISAS for d in DTYPES], ids=lambda v: str(v).removeprefix("torch."))


def pixels(n: int, c: int, h: int, w: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(n, h, w, c, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).permute(0, 3, 1, 2)


def weights(o: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (torch.randn(o, c, 3, 3, generator=g) / (9 * c) ** 0.5).to(dtype), torch.randn(o, generator=g).to(dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, slope: float = 1.0, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], *x.shape[2:], dtype=x.dtype, memory_format=torch.channels_last)
    conv3x3_into(out, x, weight, bias, None, slope, 1.0, 1, 1)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def test_instruction_sets_are_switched_and_named() -> None:
    assert set(ISAS) <= set(_native.CPU_ISAS)
    assert ISAS[-1] == "portable"
    before = _native.cpu_isa()
    for isa in ISAS:
        with _native.use_cpu_isa(isa):
            assert _native.cpu_isa() == isa
    assert _native.cpu_isa() == before
    with pytest.raises(RuntimeError, match=r"isa is 'sse9'; this processor offers .*'portable'"), _native.use_cpu_isa("sse9"):
        pass
    for absent in set(_native.CPU_ISAS) - set(ISAS):
        with pytest.raises(RuntimeError, match=f"isa is '{absent}'"), _native.use_cpu_isa(absent):
            pass


@pytest.mark.parametrize("named", ["portable", "sse9"])
def test_the_environment_limits_the_instruction_set(named: str) -> None:
    code = "import fastsr._native as n; print(n.cpu_isa())"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"FASTSR_CPU_ISA": named}, capture_output=True, text=True)
    if named == "portable":
        assert run.stdout.strip() == "portable", run.stderr
    else:
        assert run.returncode != 0
        assert "FASTSR_CPU_ISA is 'sse9'" in run.stderr


@each_kernel
def test_every_kernel_is_as_good_as_eager(isa: str, dtype: torch.dtype) -> None:
    """Channels and widths on both sides of every vector, pair and tile; error against float64 at most twice that of eager."""
    eps = torch.finfo(dtype).eps
    for c, o, h, w in [(1, 1, 1, 1), (3, 64, 2, 15), (31, 17, 3, 16), (32, 32, 3, 17), (33, 3, 1, 47), (64, 33, 4, 33), (180, 48, 2, 13)]:
        x, (weight, bias) = pixels(2, c, h, w, dtype), weights(o, c, dtype)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        with _native.use_cpu_isa(isa):
            fused = conv(x, weight, bias)
        error = (fused - exact).abs().max() / exact.abs().max()
        eager = (F.conv2d(x, weight, bias, padding=1) - exact).abs().max() / exact.abs().max()
        assert error <= 2 * eager + 2 * eps, (c, o, h, w)


@each_kernel
def test_a_pixel_does_not_depend_on_threads_crop_or_tile(isa: str, dtype: torch.dtype) -> None:
    """The same neighbourhood gives the same bits wherever it lies, in whatever picture, on however many threads."""
    threads = torch.get_num_threads()
    for c, o in [(64, 32), (33, 20)]:
        x, (weight, bias) = pixels(1, c, 9, 53, dtype), weights(o, c, dtype)
        with _native.use_cpu_isa(isa):
            whole = conv(x, weight, bias, slope=0.2)
            torch.set_num_threads(1)
            alone = conv(x, weight, bias, slope=0.2)
            torch.set_num_threads(threads)
            assert same_bits(whole, alone)
            for left, right in [(1, 53), (5, 22), (3, 19), (20, 33), (7, 10), (0, 40)]:
                part = conv(x[:, :, 2:7, left:right], weight, bias, slope=0.2)
                assert same_bits(part[:, :, 1:-1, 1:-1], whole[:, :, 3:6, left + 1 : right - 1]), (c, left, right)


@each_kernel
@pytest.mark.parametrize("width", [1, 5, 16, 37])
def test_nothing_outside_the_prefix_is_read_or_written(isa: str, dtype: torch.dtype, width: int) -> None:
    """Odd pixel, row and image strides; whatever lies around input and output is NaN, and stays."""
    c, o, h = 33, 19, 3
    x, (weight, bias) = pixels(2, c, h, width, dtype), weights(o, c, dtype)
    around = torch.full((2, h + 2, width + 3, c + 8), torch.nan, dtype=dtype)
    inside = around.permute(0, 3, 1, 2)[:, 3 : 3 + c, 1 : 1 + h, 2 : 2 + width]
    inside.copy_(x)
    target = torch.full((2, h + 2, width + 3, o + 5), torch.nan, dtype=dtype)
    out = target.permute(0, 3, 1, 2)[:, 1 : 1 + o, 1 : 1 + h, 1 : 1 + width]
    with _native.use_cpu_isa(isa):
        expected = conv(x, weight, bias)
        conv(inside, weight, bias, out=out)
    assert same_bits(out, expected)
    assert target.isnan().sum() == target.numel() - out.numel()


@each_kernel
def test_nan_and_infinity_reach_exactly_their_neighbours(isa: str, dtype: torch.dtype) -> None:
    h, w = 5, 35
    for column in (0, 16, 34):
        x = pixels(1, 32, h, w, dtype).clone()
        x[0, 7, 2, column] = torch.nan
        weight, bias = weights(16, 32, dtype)
        touched = torch.zeros(h, w, dtype=torch.bool)
        touched[1:4, max(0, column - 1) : column + 2] = True
        with _native.use_cpu_isa(isa):
            for slope in (1.0, 0.2, 0.0):
                assert torch.equal(conv(x, weight, bias, slope=slope)[0].isnan().all(0), touched), slope
                assert torch.equal(conv(x, weight, bias, slope=slope)[0].isnan().any(0), touched), slope
            x[0, 7, 2, column] = -torch.inf
            y = conv(x, torch.ones_like(weight), bias, slope=0.0)
            assert (y[0, :, touched] == 0).all()  # ReLU of minus infinity is 0, not NaN
            assert (conv(x, torch.ones_like(weight), bias, slope=0.2)[0, :, touched] == -torch.inf).all()


@pytest.mark.parametrize("isa", ISAS)
def test_empty_pictures_do_nothing(isa: str) -> None:
    weight, bias = weights(8, 4, torch.float32)
    with _native.use_cpu_isa(isa):
        assert conv(torch.empty(0, 4, 5, 6).contiguous(memory_format=torch.channels_last), weight, bias).shape == (0, 8, 5, 6)
