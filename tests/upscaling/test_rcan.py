"""RCAN on pictures: the trunk whole, whose pooling allows no tiles, and the tail in strips."""

from __future__ import annotations

import argparse
import re

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from fastsr.cli import main
from fastsr.cli import upscale as command
from fastsr.models import RCAN
from fastsr.upscaling import budget
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager
from tests.models.eager_rcan import EagerRCAN
from tests.models.test_rcan import pictures
from tests.upscaling.test_streaming import NATIVE, in_strips
from tests.upscaling.test_upscale import pixels
from tests.weights import files

SMALL = {"num_feat": 16, "num_group": 2, "num_block": 2, "squeeze_factor": 4}
SHAPES = [{"upscale": 1}, {"upscale": 2}, {"upscale": 3}, {"upscale": 4}, {"upscale": 8}, {"upscale": 16}, {"upscale": 2, "unshuffle": 2}]


def network(dtype: torch.dtype = torch.float32, **options) -> RCAN:
    torch.manual_seed(0)
    model = RCAN(3, 3, **(SMALL | options))
    with torch.no_grad():
        for conv in model.upsample.values():
            conv.weight.mul_(3)  # so that a border that is wrong shows
    return model.to(DEVICE, dtype).eval()


@NATIVE
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_every_strip_height_gives_the_whole_bit_for_bit(options):
    model = network(**options)
    x = pictures((13 * model.unshuffle - (model.unshuffle > 1), 9), torch.float32, batch=1)
    with torch.no_grad():
        whole = model(x).clamp(0, 1)
    assert whole.std() > 0.01
    for rows in range(1, 14):
        assert torch.equal(in_strips(model, x, rows), whole), rows


@NATIVE
def test_exact_with_the_real_width_and_frozen_too():
    model = network(num_feat=64, squeeze_factor=16, num_block=1)
    x = pictures((21, 35), torch.float32, batch=1)
    with torch.no_grad():
        whole = model(x).clamp(0, 1)
        fastsr.freeze(model)
        assert torch.equal(model(x).clamp(0, 1), whole)
    for rows in (1, 2, 3, 5, 8, 13, 20):
        assert torch.equal(in_strips(model, x, rows), whole), rows


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_strips_are_as_good_as_eager_on_every_backend(backend, dtype):
    model = network(dtype)
    model.backend = backend
    eager = EagerRCAN(3, 3, **SMALL).to(DEVICE, dtype)
    eager.load_state_dict(model.state_dict())
    x = pictures((11, 6), dtype)
    with torch.no_grad():
        plain, truth = eager(x).clamp(0, 1), eager.double()(x.double()).clamp(0, 1)
    for rows in (1, 4, 11):
        assert_close_as_eager(f"{rows} rows", in_strips(model, x, rows), plain, truth)


def test_a_picture_is_upscaled_whole_by_default():
    model, picture = network(), pixels(40, 30, 3)
    with torch.no_grad():
        x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        expected = (model(x.to(DEVICE)).clamp(0, 1)[0].permute(1, 2, 0) * 255).round().cpu().numpy()
    assert np.abs(fastsr.upscale(model, picture).astype(int) - expected).max() <= 1


def test_half_precision_needs_no_second_try():
    """Plain float16 overflows here, where values are of 0..255 and features beyond: see tests/models/test_rcan.py."""
    model, said = network(), []
    with torch.no_grad():
        for parameter in model.conv_first.parameters():
            parameter.mul_(2e3)
        model.conv_last.weight.mul_(1e-3)
    picture = pixels(9, 8, 3)
    single = fastsr.upscale(model, picture)
    half = fastsr.upscale(model, picture, dtype=torch.float16, notify=said.append)
    assert said == []
    assert np.abs(half.astype(int) - single.astype(int)).max() <= 2


def test_a_plan_keeps_to_its_budget_and_tiles_are_reported():
    model, said = network(), []
    whole = budget.plan(model, 1, 100, 100, 4, None)
    assert whole.tile is None
    assert budget.plan(model, 1, 100, 100, 4, whole.work).tile is None
    fastsr.upscale(model, pixels(150, 150, 3), memory=5_000_000, notify=said.append)
    assert len(said) == 1
    assert "overlapping tiles, each of which is pooled by itself" in said[0]
    model.local_pooling = 20
    said.clear()
    fastsr.upscale(model, pixels(150, 150, 3), memory=5_000_000, notify=said.append)
    assert said[0].endswith("overlapping tiles")


def test_progress_rises_to_one():
    model, parts = network(num_group=5), []
    fastsr.upscale(model, pixels(20, 9, 3), progress=parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1)
    assert len(parts) >= 6
    assert 0.9 < RCAN.trunk_share.fget(argparse.Namespace(num_group=10, num_block=20, tail_scale=4, num_out_ch=3, num_feat=64)) < 1


@pytest.fixture
def weights(tmp_path) -> str:
    fastsr.save(network(), tmp_path / "rcan.pth", "rcan")
    return str(tmp_path / "rcan.pth")


@pytest.fixture
def picture(tmp_path) -> str:
    Image.fromarray(pixels(40, 50, 3)).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


def test_the_command_and_local_pooling(tmp_path, weights, picture):
    results = {}
    runs = {"exact": [], "window": ["--local-pooling", "9"], "default": ["--local-pooling"], "fp16": ["--dtype", "fp16"]}
    for name, options in runs.items():
        assert main(["upscale", picture, "-o", str(tmp_path / f"{name}.png"), "-m", weights, "--device", "cpu", *options]) == 0
        results[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        assert results[name].shape == (160, 200, 3)
    expected = fastsr.upscale(fastsr.load(weights), np.asarray(Image.open(picture)))
    np.testing.assert_array_equal(results["exact"], expected)
    assert np.abs(results["window"] - results["exact"]).max() > 0
    assert np.abs(results["default"] - results["exact"]).max() <= 1, "the default window holds this picture"
    assert np.abs(results["fp16"] - results["exact"]).max() <= 2
    assert command.LOCAL_WINDOW == 1.5 * 48


@pytest.mark.parametrize(("options", "code", "match"), [
    (["--local-pooling", "0"], 2, "--local-pooling is 0; expected at least 1"),
    (["--local-pooling", "much"], 2, "invalid int value"),
    (["--local-pooling", "-m", "{rrdbnet}"], 1, "is for an RCAN; .* is an RRDBNet, which pools nothing"),
])  # fmt: skip
def test_mistakes_with_local_pooling_are_named(tmp_path, capsys, weights, picture, options, code, match):
    rrdbnet = str(files.write_pth(files.network(num_block=1), tmp_path / "rrdbnet.pth"))
    words = [word.replace("{rrdbnet}", rrdbnet) for word in options]
    assert main(["upscale", picture, "-o", str(tmp_path / "out.png"), "-m", weights, *words]) == code
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "out.png").exists()
