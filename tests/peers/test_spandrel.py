"""Random weights in each dialect give the output of spandrel, whose networks are the original authors' code."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import fastsr
from fastsr.models import RRDBNet
from tests.harness import assert_close_as_eager

WITHOUT_LIBRARY = "does not exist"


@pytest.fixture(scope="module")
def spandrel():
    """The package; where torchvision is built for another torch, the two operators that its Python side registers are declared first."""
    if importlib.util.find_spec("spandrel") is None:
        pytest.skip("spandrel is not installed; `make peers` installs it and runs this")
    probe = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    library = None
    if probe.returncode and WITHOUT_LIBRARY in probe.stderr:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import spandrel

    yield spandrel
    del library


#: (scale, unshuffle, plus): every number of x2 steps, BasicSR's pixel-unshuffle and older networks without it.
NETWORKS = [(4, None), (2, None), (1, None), (8, None), (16, None), (2, 1), (1, 1), (4, 2)]


def network(scale: int, unshuffle: int | None, plus: bool = False) -> RRDBNet:
    torch.manual_seed(scale)
    model = RRDBNet(3, 3, scale, 16, 2, 32, unshuffle=unshuffle, plus=plus).eval()  # spandrel takes a growth of 32 alone
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def compare(spandrel, model: RRDBNet, path, dialect: str) -> None:
    fastsr.save(model, path, dialect)
    theirs = spandrel.ModelLoader().load_from_file(path)
    assert theirs.scale == model.scale
    loaded, x = fastsr.load(path), torch.rand(1, 3, 9, 11)
    with torch.no_grad():
        ours, plain, truth = loaded(x), theirs.model(x), theirs.model.double()(x.double())
    assert ours.std() > 1e-3
    assert_close_as_eager(dialect, ours, plain, truth)


@pytest.mark.parametrize("dialect", ["basicsr", "esrgan", "esrgan-old"])
@pytest.mark.parametrize(("scale", "unshuffle"), NETWORKS)
def test_equal_in_every_dialect(spandrel, tmp_path, scale, unshuffle, dialect):
    compare(spandrel, network(scale, unshuffle), tmp_path / "model.pth", dialect)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_esrgan_plus(spandrel, tmp_path, scale):
    compare(spandrel, network(scale, 1, plus=True), tmp_path / "model.pth", "esrgan-old")


def test_safetensors(spandrel, tmp_path):
    compare(spandrel, network(4, None), tmp_path / "model.safetensors", "esrgan")
