"""The ground of the sm_90a kernels on the CPU: swizzles, descriptors, accumulators, barriers, and products that use them together."""

from __future__ import annotations

import pytest
import torch

from tests.harness import DEVICE
from tests.simt import host

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")

SPANS = (16, 32, 64, 128)


@pytest.fixture(scope="module")
def hopper():
    return host.module("hopper")


def test_swizzles_are_those_of_the_manuals_picture(hopper):
    """Of 16-byte units u in lines of 128 bytes: u ^ line % 8, u ^ line % 4, u ^ line % 2, u."""
    for span in SPANS:
        for line in range(16):
            for unit in range(8):
                expected = line * 128 + (unit ^ (line % (span // 16))) * 16 + 5
                assert hopper.swizzled(span, line * 128 + unit * 16 + 5) == expected
        places = [hopper.tile_place(span, row, k) for row in range(64) for k in range(span)]
        assert sorted(places) == list(range(64 * span)), "every byte has one place"


@pytest.mark.parametrize("span", SPANS)
def test_a_unit_of_eight_rows_lies_in_different_banks(hopper, span):
    for first in range(0, 64, 8):
        for unit in range(span // 16):
            assert len({hopper.tile_place(span, first + row, unit * 16) % 128 for row in range(8)}) == 8


def test_descriptors_have_the_manuals_fields(hopper):
    """Address in bits 0..13, units' distance in 16..29, blocks' distance in 32..45, all in 16 bytes; mode in 62..63."""
    for mode, span in ((0, 16), (1, 128), (2, 64), (3, 32)):
        descriptor = hopper.matrix_descriptor(span, 0x2B400, 1024, 2176)
        assert descriptor & 0x3FFF == 0x2B400 >> 4
        assert descriptor >> 16 & 0x3FFF == 2176 >> 4
        assert descriptor >> 32 & 0x3FFF == 1024 >> 4
        assert descriptor >> 62 == mode
        assert descriptor == (mode << 62 | 64 << 32 | 136 << 16 | 0x2B40), "all other bits are zero"
        assert hopper.tile_descriptor(span, 0x8000, 32) == (mode << 62 | span * 8 // 16 << 32 | 1 << 16 | 0x802)


def test_accumulators_lie_as_in_the_manual(hopper):
    """row = 16 (warp % 4) + lane / 4 + 8 * (i / 2 % 2), column = 8 (i / 4) + 2 (lane % 4) + i % 2; each element once."""
    seen = set()
    for thread in range(128):
        for i in range(128):
            warp, lane = divmod(thread, 32)
            assert hopper.fragment(thread, i) == (16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2)
            seen.add(hopper.fragment(thread, i))
    assert len(seen) == 64 * 256


def multiply(hopper, kind: str, columns: int, span: int, first: int = 0, seed: int = 0, waits: bool = True):
    """(what the tiles' product is, what it should be)."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    depth = max(span, 32) // dtype.itemsize if span > 16 else 128 // dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    # Few bits, so that the products and sums are exact in any order.
    a, b = (torch.randint(-8, 9, (n, depth), generator=generator).to(dtype) for n in (64, columns + 24))
    d = torch.full((64, columns), float("nan"))
    getattr(hopper, f"{kind}_{columns}_{span}")(seed, a.data_ptr(), b.data_ptr(), b.shape[0], depth, first, waits, d.data_ptr())
    rows = torch.zeros(columns, depth, dtype=torch.float64)
    for n in range(columns):
        if 0 <= first + n < b.shape[0]:
            rows[n] = b[first + n].double()
    return d, (a.double() @ rows.T).float()


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("kind", "columns"), [("float16", 64), ("float16", 128), ("bfloat16", 144), ("tf32", 256)])
def test_a_tile_is_read_where_the_copy_put_it(hopper, kind, columns, span):
    for first in (0, 5, -3, 40):
        got, expected = multiply(hopper, kind, columns, span, first, seed=first & 7)
        assert torch.equal(got, expected), first


def test_a_missing_wait_is_seen(hopper):
    outcomes = []
    for seed in range(6):
        got, expected = multiply(hopper, "float16", 64, 128, seed=seed, waits=False)
        outcomes.append(torch.equal(got, expected))
    assert not all(outcomes)


@pytest.mark.parametrize("seed", range(6))
def test_a_ring_of_stages(hopper, seed):
    values, out = torch.arange(9 * 32, dtype=torch.float32).view(9, 32), torch.zeros(32)
    hopper.ring(seed, values.data_ptr(), out.data_ptr(), 9, False)
    assert torch.equal(out, values.sum(0))


def test_a_stage_that_is_never_given_back_is_a_deadlock(hopper):
    values, out = torch.zeros(9, 32), torch.zeros(32)
    with pytest.raises(RuntimeError, match=r"no thread can go on; .*mbarrier\.try_wait"):
        hopper.ring(0, values.data_ptr(), out.data_ptr(), 9, True)
