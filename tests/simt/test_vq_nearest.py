"""The text of csrc/cuda/vq_*.cuh on the CPU: exact indices over everything that breaks code searches, on tensor cores and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsr.kernels.vq_nearest import reference
from tests.harness import ALL_DTYPES, DEVICE
from tests.simt import host
from tests.vq_cases import DISTRIBUTIONS, Problem, problems, true_indices

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")

#: From one code and value to several slabs, and slabs that do not stay (D above 256, or above 64 in float32).
SHAPES = ((512, 64), (1, 1), (33, 17), (1024, 32), (100, 3), (2, 130), (256, 256), (65, 1), (7, 300), (1000, 16))


#: The products: float16 by mma.sync or by Hopper's wgmma (vectors of up to 256 values), or float32.
KERNELS = ("mma", "wgmma", "fma")


def fours(t: Tensor, channels: int) -> bool:
    """As `fours` of csrc/cuda/vq_tensors.cuh."""
    strides = [s for i, s in enumerate(t.stride()) if i != channels]
    unit = 4 * t.element_size()
    return t.data_ptr() % unit == 0 and t.shape[channels] % 4 == 0 and t.stride(channels) == 1 and all(s % 4 == 0 for s in strides)


def run(x: Tensor, codebook: Tensor, cosine: bool = False, kernel: str = "mma", schedule: int = 0) -> tuple[Tensor, Tensor, list[int], int]:
    """What `search` gives, and the bytes of scratch memory that it took."""
    shape = (x.shape[0], x.shape[1], x.shape[3])
    indices, distances = torch.full(shape, -1), torch.full(shape, -7.0)
    rescored = torch.zeros(2, dtype=torch.int64)
    scratch = getattr(host.module("vq_nearest"), str(x.dtype)[6:])(
        schedule,
        x.data_ptr(),
        x.shape,
        x.stride(),
        fours(x, 2),
        codebook.data_ptr(),
        codebook.shape[1],
        fours(codebook, 2),
        cosine,
        indices.data_ptr(),
        distances.data_ptr(),
        rescored.data_ptr(),
        kernel != "fma",
        kernel == "wgmma",
    )
    return indices, distances, rescored.tolist(), scratch


def search(x: Tensor, codebook: Tensor, cosine: bool = False, kernel: str = "mma", schedule: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Indices, distances and the two counters, of x (O, H, D, I) and codebook (H, K, D)."""
    return run(x, codebook, cosine, kernel, schedule)[:3]


def rows(x: Tensor) -> Tensor:
    """(N, D) as (N, 1, D, 1)."""
    return x[:, None, :, None]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("problem", problems(1000, ALL_DTYPES, SHAPES), ids=str)
def test_every_index_is_the_true_one(problem, kernel):
    assert not problem.first_wrong(lambda x, codes: search(rows(x), codes[None], problem.cosine, kernel)[0].flatten())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cosine", [False, True])
def test_distances_are_the_references_bits(kernel, cosine):
    x, codes = Problem("gaussian", 130, 65, 40).tensors()
    indices, distances, _ = search(rows(x), codes[None], cosine, kernel)
    expected = reference.search(rows(x), codes[None], cosine)
    assert torch.equal(indices, expected[0])
    assert torch.equal(distances, expected[1].float())


@pytest.mark.parametrize("kernel", KERNELS)
def test_heads_and_layouts_are_read_in_place(kernel):
    """Channels-first and channels-last images, a channel slice, reversed heads, one row repeated (stride 0), at odd addresses."""
    generator = torch.Generator().manual_seed(0)
    book = torch.randn((3, 70, 20), generator=generator)
    base = torch.randn((2, 3, 24, 45), generator=generator)
    memory = torch.empty(base[:, :, :20].numel() + 1)[1:]
    layouts = {
        "channels first": base[:, :, :20].contiguous(),
        "channels last": base[:, :, :20].transpose(2, 3).contiguous().transpose(2, 3),
        "channel slice": base.transpose(2, 3).contiguous().transpose(2, 3)[:, :, 4:],
        "heads apart": base[:, :, :20].transpose(0, 1).contiguous().transpose(0, 1),
        "every second row": base[:, :, 2:22, ::2],
        "repeated": base[:, :, :20, :1].expand(2, 3, 20, 37),
        "misaligned": memory.view(2, 3, 20, 45).copy_(base[:, :, :20]),
    }
    for name, x in layouts.items():
        indices, distances, _ = search(x, book, kernel=kernel)
        expected = reference.search(x, book, False)
        assert torch.equal(indices, expected[0]), name
        assert torch.equal(distances, expected[1].float()), name


def test_hoppers_ring_turns_several_times():
    """Five stages for one slab of values, eight for more: 24 and 9 are read here, by warpgroups that run apart."""
    for schedule, (n, k, d) in enumerate([(130, 700, 200), (200, 1100, 64), (70, 1100, 30)]):
        problem = Problem("gaussian", n, k, d)
        x, codes = problem.tensors()
        for seed in (schedule, schedule + 10):
            assert torch.equal(search(rows(x), codes[None], kernel="wgmma", schedule=seed)[0].flatten(), true_indices(x, codes))


def test_long_lists_are_searched_again_in_float32():
    """More than kFewRows rows that float16 cannot decide: the second search answers them, and only what is left is scanned."""
    generator = torch.Generator().manual_seed(0)
    codes, x = (10 + 0.2 * torch.randn((n, 16), generator=generator) for n in (512, 1100))
    indices, _, (_, scanned) = search(rows(x), codes[None])
    assert torch.equal(indices, reference.search(rows(x), codes[None], False)[0])
    assert scanned < 50
    short = search(rows(x[:500]), codes[None])
    assert short[2][1] > 400, "a short list is scanned at once"
    assert torch.equal(short[0], indices[:500])


def test_ordinary_rows_need_no_scan():
    x, codes = Problem("gaussian", 1500, 512, 64).tensors()
    _, _, (several, scanned) = search(rows(x), codes[None])
    assert 0 < several < 150
    assert scanned == 0


def test_the_schedule_does_not_change_a_bit():
    x, codes = Problem("near_ties", 200, 60, 20).tensors()
    first = search(rows(x), codes[None])
    for schedule in range(1, 5):
        again = search(rows(x), codes[None], schedule=schedule)
        assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_scratch_memory_grows_with_rows_and_with_codes_but_not_with_their_product(dtype, kernel):
    """A list of rows, on tensor cores two, and the packed codebook: 4 bytes a value in float32, on tensor cores 2 more in float16."""
    few, many, depth = 64, 1024, 64

    def scratch(n: int, k: int) -> int:
        x, codes = Problem("gaussian", n, k, depth).tensors()
        return run(rows(x.to(dtype)), codes.to(dtype)[None], kernel=kernel)[3]

    lists, bytes_of_a_value = (1, 4) if kernel == "fma" else (2, 6)
    assert scratch(200, few) - scratch(100, few) == scratch(200, many) - scratch(100, many) == 100 * 4 * lists
    assert scratch(100, many) <= many * (bytes_of_a_value * depth + 32) + 100 * 4 * lists + 4096


def test_every_distribution_takes_part():
    assert {p.distribution for p in problems(1000, ALL_DTYPES, SHAPES)} == set(DISTRIBUTIONS)


def test_the_address_sanitizer_finds_no_overrun():
    """Buffers of exactly the size that the arguments span."""
    script = """
rng = numpy.random.default_rng(0)
for kind, n, k, d in [("f4", 5, 3, 1), ("f2", 130, 129, 20), ("f4", 70, 40, 70), ("f4", 9, 7, 270)]:
    name = {"f4": "float32", "f2": "float16"}[kind]
    for tensor_cores, hopper in ((True, False), (True, True), (False, False)):
        x, codes = rng.standard_normal((n, d)).astype(kind), rng.standard_normal((k, d)).astype(kind)
        x[0] = numpy.nan
        indices, distances, rescored = numpy.empty(n, "i8"), numpy.empty(n, "f4"), numpy.zeros(2, "i8")
        for vectors in {False, d % 4 == 0}:
            getattr(vq_nearest, name)(
                0, x.ctypes.data, (n, 1, d, 1), (d, d, 1, 1), vectors, codes.ctypes.data, k, vectors, False,
                indices.ctypes.data, distances.ctypes.data, rescored.ctypes.data, tensor_cores, hopper)
print("finished")
"""
    done = host.run_alone("vq_nearest", script, host.ADDRESS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "finished" in done.stdout
