"""VQ-VAE's files: sizes from shapes, bit for bit, rosinality's names, clear errors."""

from __future__ import annotations

import pytest
import torch

import fastsr
from fastsr.models import VQVAE, VQVAE2
from fastsr.weights import WeightsError

SMALL = {"num_feat": 6, "num_block": 2, "num_res_ch": 3, "codebook_size": 9, "codebook_dim": 4}
CASES = [{}, {"decay": None}, {"downscale": 8, "num_in_ch": 1}, {"downscale": 2, "num_heads": 2}, {"num_block": 0}]


def same(a, b) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", [VQVAE, VQVAE2])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_round_trip(tmp_path, kind, options, ending):
    torch.manual_seed(0)
    model = kind(**{**SMALL, **options})
    x = torch.randn(1, model.num_in_ch, 16, 16)
    model(x)
    fastsr.save(model, tmp_path / f"m.{ending}", dialect="fastsr")
    loaded = fastsr.load(tmp_path / f"m.{ending}")
    assert type(loaded) is kind
    assert same(loaded, model)
    assert torch.equal(loaded(x).reconstruction, model.eval()(x).reconstruction)


@pytest.mark.parametrize("downscale", [2, 4])
def test_rosinality(tmp_path, downscale):
    torch.manual_seed(0)
    model = VQVAE2(**SMALL, downscale=downscale)
    fastsr.save(model, tmp_path / "m.pt", dialect="rosinality")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert {"enc_b.blocks.0.weight", "quantize_conv_t.bias", "dec.blocks.1.conv.3.weight", "upsample_t.weight"} <= state.keys()
    assert state["quantize_t.embed"].shape == (4, 9)
    assert same(fastsr.load(tmp_path / "m.pt"), model)


def test_errors(tmp_path):
    path = tmp_path / "m.pth"
    with pytest.raises(ValueError, match="dialect is 'basicsr'; expected one of 'fastsr'"):
        fastsr.save(VQVAE(**SMALL), path)
    with pytest.raises(ValueError, match="metric is 'cosine', which no file shows"):
        fastsr.save(VQVAE(**SMALL, metric="cosine"), path, dialect="fastsr")
    with pytest.raises(ValueError, match="codebooks are moving averages"):
        fastsr.save(VQVAE2(**SMALL, decay=None), path, dialect="rosinality")
    good = VQVAE(**SMALL).state_dict()
    for change, message in (
        ({"encoder.0.weight": torch.zeros(3)}, r"encoder.0.weight has shape \(3,\)"),
        ({"quantizer.codebook": torch.zeros(9)}, r"codebook of shape \(9,\)"),
        ({"quantizer.steps": torch.zeros(())}, r"quantizer.steps has shape \(\) and dtype torch.float32; expected \(\), torch.int64"),
        ({"project.weight": torch.zeros(2, 6, 1, 1)}, "project.weight has shape"),
        ({"surplus": torch.zeros(1)}, "has no surplus"),
    ):
        torch.save({**good, **change}, path)
        with pytest.raises(WeightsError, match=message):
            fastsr.load(path)
    del good["decoder.0.bias"]
    torch.save(good, path)
    with pytest.raises(WeightsError, match=r"lacks decoder\.0\.bias"):
        fastsr.load(path)
