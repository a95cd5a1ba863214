"""The text of csrc/cuda/hopper/conv3x3.cuh on the CPU: where its operands lie, and convolutions against plain PyTorch and mma.sync."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastsr.kernels.conv3x3 import reference
from tests.harness import DEVICE, Case, assert_close_as_eager
from tests.simt import host
from tests.simt.test_conv3x3 import OPTIONS, Options, check, convolve, inputs, workspace

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def hopper():
    return host.module("hopper")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_product_finds_its_kernel_rows_one_below_the_other(hopper, groups):
    """Group j of a product for shift (dh, kw) is kernel row dh - j of kw, or zeros, over all of its outputs in one order."""
    outputs = 64 // groups
    orders = set()
    for dh, kw, j in itertools.product(range(groups + 2), range(3), range(groups)):
        first = hopper.first_row(groups, dh, kw) + j * outputs
        rows = [hopper.filter_row(groups, first + i) for i in range(outputs)]
        assert 0 <= first <= hopper.filter_rows(groups) - outputs
        if 0 <= dh - j < 3:
            assert {(kh, at) for kh, at, _ in rows} == {(dh - j, kw)}
            orders.add(tuple(output for _, _, output in rows))
        else:
            assert all(kh > 2 for kh, _, _ in rows), "there are zeros where there is no kernel row"
    assert len(orders) == 1
    assert sorted(orders.pop()) == list(range(outputs))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_threads_rows_are_neighbouring_channels(hopper, groups):
    """Rows r and r + 8 of a product are channels c and c + 1, and those of the neighbouring lane follow."""
    first = hopper.first_row(groups, 1, 0)
    for r in range(64 // groups):
        if r % 16 < 8:
            own, other = (hopper.filter_row(groups, first + row)[2] for row in (r, r + 8))
            assert (own, other) == (r // 16 * 16 + r % 8 * 2, r // 16 * 16 + r % 8 * 2 + 1)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_tap_is_another_first_pixel(hopper, groups, swizzled):
    """Unit u of pixel 8 b + i of a strip lies where the copy puts that of halo pixel (groups * b + dh, kw + i)."""
    width, height, address = 18, 34, 8192
    places = sorted(hopper.halo_place(swizzled, pixel, unit) for pixel in range(width * height) for unit in range(4))
    assert places == list(range(0, width * height * 64, 16)), "every unit has one place"
    for dh, kw, strip, step in itertools.product(range(groups + 2), range(3), range(2), range(2)):
        descriptor = hopper.halo_descriptor(swizzled, address, dh * width + strip * 8 + kw, step, groups)
        start, units, rows, mode = (descriptor >> shift & mask for shift, mask in ((0, 0x3FFF), (16, 0x3FFF), (32, 0x3FFF), (62, 3)))
        assert mode == (2 if swizzled else 0)
        for block, i, unit in itertools.product(range(8), range(8), range(2)):
            linear = 16 * (start + block * rows) + i * (64 if swizzled else 16) + unit * (16 if swizzled else 16 * units)
            seen = hopper.swizzled(64, linear) if swizzled else linear
            pixel = (groups * block + dh) * width + strip * 8 + kw + i
            assert seen - address == hopper.halo_place(swizzled, pixel, 2 * step + unit)


def cases() -> list[tuple[Case, int, Options]]:
    """Channels in and out with sizes below and above a tile; options and layouts rotate."""
    layouts, options = itertools.cycle(("channels_last", "permuted")), itertools.cycle(o for o in OPTIONS if o.upsample == 1)
    channels = itertools.product(HALVES, ((8, 32), (64, 64), (104, 20), (40, 96), (160, 32), (16, 144)))
    sizes = itertools.cycle(((2, 1, 3), (2, 5, 7), (1, 33, 18), (2, 13, 25), (1, 17, 16)))
    listed = []
    for dtype, (cin, cout) in channels:
        o, (n, h, w) = next(options), next(sizes)
        rounded = -(-cout // o.pixel_shuffle**2) * o.pixel_shuffle**2
        listed.append((Case((n, cin, h, w), dtype, next(layouts), "plain", len(listed)), rounded, o))
    return listed


@pytest.mark.parametrize(("case", "cout", "options"), cases(), ids=str)
def test_forward_is_as_good_as_eager(case, cout, options):
    calls = host.module("conv3x3").wgmma_calls
    calls()
    check(case, cout, options, f"{str(case.dtype)[6:]} wgmma", seed=case.seed)
    assert calls() > 0


@pytest.mark.parametrize("cout", [32, 64])
def test_a_single_pixel(cout):
    case, o = Case((1, 72, 1, 1), torch.bfloat16, "channels_last", "plain"), Options()
    x, weight, bias, _ = inputs(case, cout, o)
    x = x.view(1, 1, 1, 72).permute(0, 3, 1, 2)  # a pixel's stride, where torch has 1 as good as any
    truth, plain = (reference.conv3x3(x.to(t), weight.to(t), bias.to(t)) for t in (torch.float64, torch.bfloat16))
    calls = host.module("conv3x3").wgmma_calls
    calls()
    y = convolve("bfloat16 wgmma", x, weight, bias, None, workspace((1, cout, 1, 1), torch.bfloat16, "alone")[1], o, 0)
    assert_close_as_eager("output", y, plain, truth, planes=True)
    assert calls() > 0


@pytest.mark.parametrize("cout", [32, 64])
def test_the_schedule_does_not_change_a_bit(cout):
    """Rings turn, blocks walk several tiles."""
    case, o = Case((2, 72, 20, 49), torch.bfloat16, "channels_last", "plain"), Options(negative_slope=0.1)
    arguments = inputs(case, cout, o)
    first, *others = (
        convolve("bfloat16 wgmma", *arguments, workspace((2, cout, 20, 49), torch.bfloat16, "alone")[1], o, seed) for seed in range(4)
    )
    assert all(torch.equal(first, other) for other in others)


def test_a_channel_prefix_of_uninitialised_memory_is_not_read_beyond_its_end():
    case, o = Case((1, 40, 9, 10), torch.bfloat16, "channels_last", "plain"), Options(bias=False)
    x, weight, _, _ = inputs(case, 64, o)
    wide = torch.full((1, 64, 9, 10), torch.nan, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    wide[:, :40] = x
    y = convolve("bfloat16 wgmma", wide[:, :40], weight, None, None, workspace((1, 64, 9, 10), torch.bfloat16, "alone")[1], o, 0)
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", ["misaligned", "channel_slice", "expanded"])
def test_what_tma_cannot_read_goes_to_mma_sync(layout):
    case, o = Case((2, 16, 5, 6), torch.bfloat16, layout, "plain"), Options()
    arguments = inputs(case, 64, o)
    kernels, calls = ("bfloat16 wgmma", "bfloat16"), host.module("conv3x3").wgmma_calls
    calls()
    outs = [convolve(kernel, *arguments, workspace((2, 64, 5, 6), torch.bfloat16, "alone")[1], o, 0) for kernel in kernels]
    assert torch.equal(*outs)
    assert calls() == 0
