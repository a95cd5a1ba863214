"""Real photographs by the real weights are those of plain PyTorch in float32, within one grey level."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastsr
from tests.models.eager_rrdbnet import EagerRRDBNet

data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")

#: (weights, photograph, left, top, side): details that differ, small because plain PyTorch takes most of the time.
CASES = [
    ("realesrgan-x4plus", "astronaut", 210, 120, 24),
    ("realesrgan-x4plus-anime", "chelsea", 140, 100, 40),
    ("realesrgan-x4plus-anime", "coffee", 250, 160, 40),
    ("realesrgan-x4plus-anime", "rocket", 310, 190, 40),
]


@pytest.mark.parametrize(("weights", "name", "left", "top", "side"), CASES)
def test_within_one_grey_level(weights, name, left, top, side):
    picture = np.ascontiguousarray(getattr(data, name)()[top : top + side, left : left + side])
    model = fastsr.load(weights)
    eager = EagerRRDBNet(3, 3, num_block=model.num_block)
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = eager(torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32) / 255))
    plain = (y[0].permute(1, 2, 0).clamp(0, 1) * 255).round().numpy().astype(int)
    ours = fastsr.upscale(model, picture).astype(int)
    assert ours.std() > 10
    assert np.abs(ours - plain).max() <= 1
