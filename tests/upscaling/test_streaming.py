"""Strips and tiles: what is exact, what is blended, what happens where memory or precision runs out."""

from __future__ import annotations

import gc
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsr
from fastsr import _native
from fastsr.models import RRDBNet
from fastsr.upscaling import Upscaler, budget, engine, streaming
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager, random_tensor
from tests.models.eager_rrdbnet import EagerRRDBNet
from tests.upscaling.test_upscale import Nearest, pixels

NATIVE = pytest.mark.skipif(_native.missing is not None or DEVICE != "cpu", reason="exactness is promised for the native library on a CPU")

#: The memory that this process holds, in pages.
STATM = Path("/proc/self/statm")

#: (scale, unshuffle): every number of x2 steps, with and without pixel-unshuffle.
SHAPES = [(4, None), (2, None), (1, None), (8, None), (16, None), (2, 1), (1, 1)]


def network(scale: int = 4, unshuffle: int | None = None, dtype: torch.dtype = torch.float32, **sizes: int) -> RRDBNet:
    torch.manual_seed(0)
    model = RRDBNet(3, 3, scale, **({"num_feat": 16, "num_block": 1, "num_grow_ch": 8} | sizes), unshuffle=unshuffle)
    with torch.no_grad():
        model.conv_last.bias.fill_(0.5)
        for name in ("conv_hr", *(f"conv_up{k}" for k in range(1, model.num_up + 1))):
            model.get_submodule(name).weight.mul_(2)  # so that a border that is wrong shows
    return model.to(DEVICE, dtype).eval()


def in_strips(model: RRDBNet, x: torch.Tensor, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return streaming.strips(model, x, x.dtype, rows, lambda part: None)


@NATIVE
@pytest.mark.parametrize(("scale", "unshuffle"), SHAPES)
def test_every_strip_height_gives_the_whole_bit_for_bit(scale, unshuffle):
    model = network(scale, unshuffle)
    model.backend = "compiled"
    h = 13 * model.unshuffle - (model.unshuffle > 1)  # one row that is padded and cropped
    x = torch.rand(1, 3, h, 9)
    with torch.no_grad():
        whole = model(x).clamp(0, 1)
    assert whole.std() > 0.01
    for rows in range(1, 14):
        assert torch.equal(in_strips(model, x, rows), whole), rows


@NATIVE
def test_exact_with_the_real_sizes_too():
    """64 features take other paths through the kernels than 16."""
    model = network(num_feat=64, num_grow_ch=32)
    model.backend = "compiled"
    x = torch.rand(1, 3, 21, 35)
    with torch.no_grad():
        whole = model(x).clamp(0, 1)
    for rows in (1, 2, 3, 5, 8, 13, 20):
        assert torch.equal(in_strips(model, x, rows), whole), rows


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_strips_are_as_good_as_eager_on_every_backend(backend, dtype):
    model = network(dtype=dtype)
    model.backend = backend
    eager = EagerRRDBNet(3, 3, num_feat=16, num_block=1, num_grow_ch=8).to(DEVICE, dtype)
    eager.load_state_dict(model.state_dict())
    x = random_tensor((2, 3, 11, 6), dtype, 1).abs().mul(0.3).clamp(0, 1)
    with torch.no_grad():
        plain, truth = eager(x).clamp(0, 1), eager.double()(x.double()).clamp(0, 1)
    for rows in (1, 4, 11):
        found = in_strips(model, x, rows)
        assert_close_as_eager(f"{rows} rows", found, plain, truth)
        assert (found.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1 / 255


def test_weights_of_tiles_sum_to_one_everywhere():
    like = torch.empty(0, dtype=torch.float64)
    for length in (*range(65, 300, 7), 1000, 4097):
        for tile in (64, 68, 100, 256):
            total = torch.zeros(2 * length, dtype=torch.float64)
            found = budget.spans(length, tile)
            assert found[0][0] == 0
            assert found[-1][1] == length
            for start, stop in found:
                assert 0 < stop - start <= tile
                assert start % 4 == 0
                total[2 * start : 2 * stop] += budget.ramp(start, stop, length, 2, like)
            torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(("scale", "unshuffle"), [(4, None), (2, None)])
def test_tiles_show_no_seam(scale, unshuffle):
    """The receptive field of one block is smaller than a tile's overlap: blended tiles are the whole but for rounding."""
    model = network(scale, unshuffle)
    x = torch.rand(1, 3, 150, 101, device=DEVICE)
    plan = budget.Plan(rows=7, tile=(64, 68), work=0)
    with torch.no_grad():
        tiled = streaming.tiles(model, x, torch.float32, plan, lambda part: None)
        torch.testing.assert_close(tiled, model(x).clamp(0, 1), rtol=0, atol=1e-5)


def test_a_plan_keeps_to_its_budget():
    with torch.device("meta"):
        model = RRDBNet(3, 3)
    for h, w in ((64, 64), (512, 512), (100, 3000), (3000, 100), (2048, 2048)):
        last = 0
        for limit in (10**8, 3 * 10**8, 10**9, 10**10, None):
            plan = budget.plan(model, 1, h, w, 4, limit)
            assert limit is None or plan.work <= limit
            assert 1 <= plan.rows <= h
            area = h * w if plan.tile is None else plan.tile[0] * plan.tile[1]
            assert area >= last, "more memory, no smaller pieces"
            last = area
        assert plan.tile is None
    assert budget.plan(model, 1, 512, 512, 4, None).work <= 1.01 * 512**2 * model.trunk_values * 4, "the tail takes no more than the trunk"
    assert budget.plan(model, 1, 512, 512, 2, 3 * 10**8).tile is None
    assert budget.plan(model, 1, 512, 512, 4, 3 * 10**8).tile is not None
    with pytest.raises(MemoryError, match=r"1\.0 MB of memory are too few for a picture of 512x300; the smallest tile needs 8\.4 MB"):
        budget.plan(model, 1, 300, 512, 4, 10**6)


class Scarce:
    """Stands for a network's tail where every allocation beyond `limit` features fails."""

    def __init__(self, model: RRDBNet, limit: int, error: Exception) -> None:
        self.tail, self.limit, self.error, self.failures = model.tail, limit, error, 0

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        if features.shape[2] * features.shape[3] > self.limit:
            self.failures += 1
            raise self.error
        return self.tail(features)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_goes_on_in_smaller_pieces(monkeypatch, error):
    model, picture, said = network(), pixels(90, 80, 3), []
    whole = fastsr.upscale(model, picture)
    scarce = Scarce(model, 40 * 80, error)
    monkeypatch.setattr(model, "tail", scarce)
    result = fastsr.upscale(model, picture, notify=said.append)
    assert np.abs(result.astype(int) - whole.astype(int)).max() <= 1
    assert scarce.failures > 0
    assert any("out of memory" in text for text in said)
    monkeypatch.setattr(model, "tail", Scarce(model, 10, error))
    with pytest.raises(MemoryError, match="the smallest tile needs"):
        fastsr.upscale(model, picture, notify=said.append)


def test_other_errors_are_not_taken_for_out_of_memory(monkeypatch):
    model = network()
    monkeypatch.setattr(model, "tail", Scarce(model, 0, RuntimeError("a kernel is broken")))
    with pytest.raises(RuntimeError, match="a kernel is broken"):
        fastsr.upscale(model, pixels(8, 8, 3))


def overflowing() -> RRDBNet:
    """Features beyond float16's range, a result within 0..1."""
    model = network()
    with torch.no_grad():
        model.conv_first.weight.mul_(1e5)
        model.conv_first.bias.mul_(1e5)
        model.conv_up1.weight.mul_(1e-5)
    return model


def test_no_black_pictures():
    model, picture, said = overflowing(), pixels(9, 8, 3), []
    single = fastsr.upscale(model, picture)
    assert single.std() > 5
    many = Upscaler(model, dtype=torch.float16, notify=said.append)
    for _ in range(2):
        assert np.abs(many(picture).astype(int) - single.astype(int)).max() <= 6
    assert said == ["the network gave NaN or infinity in torch.float16; this picture is done again in torch.bfloat16"] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastsr.upscale(model, picture, dtype=torch.float16)
    assert any("done again in torch.bfloat16" in str(w.message) for w in caught)


def test_float32_is_the_last_resort(monkeypatch):
    model, said = network(), []
    original = streaming.strips

    def fails_in_half(model, x, *rest):
        if x.dtype != torch.float32:
            raise streaming.NotFinite
        return original(model, x, *rest)

    monkeypatch.setattr(streaming, "strips", fails_in_half)
    picture = pixels(9, 8, 3)
    np.testing.assert_array_equal(fastsr.upscale(model, picture, dtype=torch.float16, notify=said.append), fastsr.upscale(model, picture))
    assert [text.split()[-1] for text in said] == ["torch.bfloat16", "torch.float32"]


@pytest.mark.parametrize("outscale", [0.5, 2, 2.5, 4, 5])
def test_outscale(outscale):
    picture = np.full((10, 7, 4), 77, np.uint8)
    result = fastsr.upscale(Nearest(), picture, outscale=outscale)
    assert result.shape == (round(10 * outscale), round(7 * outscale), 4)
    assert (result == 77).all()
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="outscale is"):
            fastsr.upscale(Nearest(), picture, outscale=bad)
    with pytest.raises(ValueError, match="memory is 0"):
        fastsr.upscale(Nearest(), picture, memory=0)
    with pytest.raises(TypeError, match=r"torch\.int8"):
        fastsr.upscale(Nearest(), picture, dtype=torch.int8)


def test_an_empty_batch_stays_empty():
    assert fastsr.upscale(network(), torch.empty(0, 3, 5, 4)).shape == (0, 3, 20, 16)


def test_upscale_many_is_lazy_and_in_order():
    asked = []

    def pictures():
        for k in range(3):
            asked.append(k)
            yield np.full((2, 2, 3), k, np.uint8)

    results = fastsr.upscale_many(Nearest(), pictures())
    assert asked == []
    assert (next(results) == 0).all()
    assert asked == [0]
    assert [int(result.max()) for result in results] == [1, 2]


def test_progress_rises_to_one():
    model, parts = network(num_block=3), []
    fastsr.upscale(model, pixels(20, 9, 3), progress=parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1)
    assert len(parts) >= 4
    parts.clear()
    fastsr.upscale(model, pixels(150, 150, 3), progress=parts.append, memory=4_000_000, notify=lambda text: None)
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1)


def test_memory_is_asked_of_the_system(monkeypatch, tmp_path):
    free = budget.available(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert budget.available(torch.device("meta")) is None
    said = []
    monkeypatch.setattr(engine.budget, "available", lambda device: 20_000_000)
    fastsr.upscale(network(), pixels(150, 150, 3), notify=said.append)
    assert len(said) == 1
    assert "overlapping tiles" in said[0]


@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc")
def test_two_hundred_pictures_keep_memory_flat():
    model = network(num_feat=8, num_grow_ch=4)
    sizes = [(40 + 7 * (k % 5), 30 + 11 * (k % 3)) for k in range(200)]
    held = []
    for k, result in enumerate(fastsr.upscale_many(model, (pixels(h, w, 3) for h, w in sizes), dtype=torch.bfloat16)):
        assert result.shape[2] == 3
        if k in (49, 199):
            del result
            gc.collect()
            held.append(int(STATM.read_text().split()[1]) * resource.getpagesize())
    assert held[1] - held[0] < 8e6, "150 further pictures of the same sizes; the smallest result has 58 kB"
