"""Random weights in each dialect give the output of spandrel, whose networks are the original authors' code, and back."""

from __future__ import annotations

import pytest
import torch

import fastsr
from fastsr.models import RCAN, RRDBNet
from tests.harness import assert_close_as_eager


@pytest.fixture(scope="module")
def spandrel(torchvision_imports):
    return pytest.importorskip("spandrel", reason="spandrel is not installed; `make peers` installs it and runs this")


#: (scale, unshuffle, plus): every number of x2 steps, BasicSR's pixel-unshuffle and older networks without it.
NETWORKS = [(4, None), (2, None), (1, None), (8, None), (16, None), (2, 1), (1, 1), (4, 2)]


def network(scale: int, unshuffle: int | None, plus: bool = False) -> RRDBNet:
    torch.manual_seed(scale)
    model = RRDBNet(3, 3, scale, 16, 2, 32, unshuffle=unshuffle, plus=plus).eval()  # spandrel takes a growth of 32 alone
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def compare(spandrel, model: RRDBNet | RCAN, path, dialect: str) -> None:
    fastsr.save(model, path, dialect)
    theirs = spandrel.ModelLoader().load_from_file(path)
    assert theirs.scale == model.scale
    loaded, x = fastsr.load(path), torch.rand(8, 3, 9, 11)  # eight: the largest error on one picture is a draw
    with torch.no_grad():  # copies, since spandrel's RCAN multiplies its argument in place
        ours, plain, truth = loaded(x), theirs.model(x.clone()), theirs.model.double()(x.double())
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


#: The pixel-unshuffle and the lack of a mean are traiNNer-redux's; any other range and mean is written into the MeanShift.
RCANS = [
    *({"upscale": upscale, "mean_shift": True} for upscale in (2, 3, 4, 8, 16)),
    {"num_feat": 96, "squeeze_factor": 16, "mean_shift": True},
    {"img_range": 1.0, "rgb_mean": (0.0,)},
    {"img_range": 1.0},
    {"upscale": 2, "unshuffle": 2, "mean_shift": True},
    {"upscale": 1, "unshuffle": 4, "img_range": 1.0, "rgb_mean": (0.0,)},
]


def rcan(**options) -> RCAN:
    """With a MeanShift as if it had been trained."""
    torch.manual_seed(0)
    model = RCAN(3, 3, **({"num_feat": 16, "num_group": 2, "num_block": 3, "squeeze_factor": 4} | options)).eval()
    for name, parameter in model.named_parameters():
        if "_mean" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
        elif "rcab" in name:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize("options", RCANS, ids=str)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_rcan(spandrel, tmp_path, options, ending):
    compare(spandrel, rcan(**options), tmp_path / f"model.{ending}", "rcan")


@pytest.mark.parametrize("options", [{}, {"scale": 3}, {"scale": 2, "unshuffle_mod": True}, {"norm": False}], ids=str)
def test_rcan_from_spandrel_and_back(spandrel, tmp_path, options):
    """Its own network, saved by torch: the same output, and the same file again."""
    from spandrel.architectures.RCAN import RCAN as Theirs

    torch.manual_seed(0)
    theirs = Theirs(n_resgroups=2, n_resblocks=3, n_feats=32, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, x = fastsr.load(tmp_path / "theirs.pth"), torch.rand(1, 3, 9, 11)
    with torch.no_grad():
        assert_close_as_eager("output", ours(x), theirs(x.clone()), theirs.double()(x.double()))
    fastsr.save(ours, tmp_path / "ours.pth", "rcan")
    state, back = (torch.load(tmp_path / name, weights_only=True) for name in ("theirs.pth", "ours.pth"))
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) for key in state)
