"""Real photographs by the real weights: ncnn's own runtime agrees within two grey levels."""

from __future__ import annotations

import numpy as np
import pytest

import fastsr
from fastsr.weights import KNOWN

#: (weights, photograph, left, top, side): crops with detail, small because ncnn runs here without a GPU.
CASES = [
    ("realesrgan-x4plus", "astronaut", 200, 110, 40),
    ("realesrgan-x4plus-anime", "chelsea", 130, 90, 64),
    ("realesrgan-x4plus-anime", "coffee", 240, 150, 64),
    ("realsr-df2k", "rocket", 310, 190, 32),
]


def photograph(name: str, left: int, top: int, side: int) -> np.ndarray:
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    return np.ascontiguousarray(getattr(data, name)()[top : top + side, left : left + side])


def by_ncnn(ncnn, weights: str, picture: np.ndarray) -> np.ndarray:
    path = KNOWN[weights].path()
    net = ncnn.Net()
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "winograd_convolution"):
        setattr(net.opt, f"use_{option}", False)
    net.opt.num_threads = 2
    assert net.load_param(str(path)) == 0
    assert net.load_model(str(path.with_suffix(".bin"))) == 0
    extractor = net.create_extractor()
    values = np.ascontiguousarray(picture.transpose(2, 0, 1).astype(np.float32) / 255)
    extractor.input("data", ncnn.Mat(values).clone())  # a Mat alone does not keep its array alive
    status, result = extractor.extract(net.output_names()[0])
    assert status == 0
    return (np.array(result).transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)


@pytest.mark.parametrize(("weights", "name", "left", "top", "side"), CASES)
def test_ncnn_agrees_within_two_grey_levels(weights, name, left, top, side):
    ncnn = pytest.importorskip("ncnn", reason="ncnn is not installed; `make peers` installs it and runs this")
    if KNOWN[weights].path() is None:
        pytest.skip(f"the weights are not installed: {KNOWN[weights].remedy}")
    picture = photograph(name, left, top, side)
    ours = fastsr.upscale(fastsr.load(weights), picture)
    assert ours.std() > 10
    assert np.abs(ours.astype(int) - by_ncnn(ncnn, weights, picture).astype(int)).max() <= 2
