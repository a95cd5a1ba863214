"""`fastsr.upscale`: the same kind out as in, and the picture that plain PyTorch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastsr
from fastsr.models import RRDBNet
from tests.models.eager_rrdbnet import EagerRRDBNet


class Nearest(torch.nn.Module):
    """Enlarges by nearest neighbour: its results are known without arithmetic."""

    def __init__(self, num_in_ch: int = 3) -> None:
        super().__init__()
        self.num_in_ch, self.factor = num_in_ch, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return F.interpolate(x, scale_factor=2.0, mode="nearest") * self.factor


def pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def doubled(array: np.ndarray) -> np.ndarray:
    return array.repeat(2, 0).repeat(2, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_arrays_come_back_exactly(dtype, shape):
    array = pixels(*shape, dtype=dtype)
    result = fastsr.upscale(Nearest().to(torch.float64 if dtype == np.float64 else torch.float32), array)
    assert result.dtype == dtype
    assert result.flags.c_contiguous
    # the luma's three weights sum to 1 but for rounding
    rounding = np.finfo(dtype).eps if np.dtype(dtype).kind == "f" and shape != (5, 7, 3) else 0
    np.testing.assert_allclose(result.astype(np.float64), doubled(array).astype(np.float64), rtol=0, atol=rounding)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_enlarged_on_its_own(channels):
    array = pixels(6, 5, channels)
    array[:, :, -1] = 200
    result = fastsr.upscale(Nearest(), array)
    assert result.shape == (12, 10, channels)
    np.testing.assert_array_equal(result[:, :, :-1], doubled(array[:, :, :-1]))
    assert (result[:, :, -1] == 200).all()
    array[:, :3, -1] = 0
    alpha = fastsr.upscale(Nearest(), array)[:, :, -1]
    assert ((alpha > 0) & (alpha < 200)).any(), "bicubic interpolation softens the edge"


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (1, 4, 5), (2, 1, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensors_keep_dimensions_and_dtype(shape, dtype):
    x = torch.rand(shape).to(dtype)
    y = fastsr.upscale(Nearest(), x)
    assert y.dtype == dtype
    assert not y.requires_grad
    torch.testing.assert_close(y, x.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGB", "RGB"),
        ("L", "L"),
        ("RGBA", "RGBA"),
        ("LA", "LA"),
        ("P", "RGB"),
        ("1", "L"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
        ("I;16", "I;16"),
        ("I", "I;16"),
        ("F", "F"),
    ],
)
def test_pil_modes(mode, expected):
    if mode in ("I;16", "I"):
        picture = Image.fromarray(pixels(5, 6, dtype=np.uint16))
        picture = picture.convert("I") if mode == "I" else picture
    elif mode == "F":
        picture = Image.fromarray(pixels(5, 6, dtype=np.float32))
        with pytest.raises(ValueError, match=r"0\.0\.\.2\.0; expected 0\.\.1"):
            fastsr.upscale(Nearest(), Image.fromarray(np.linspace(0, 2, 12, dtype=np.float32).reshape(3, 4)))
    else:
        picture = Image.fromarray(pixels(5, 6, 3)).convert(mode)
    result = fastsr.upscale(Nearest(), picture)
    assert (result.mode, result.size) == (expected, (12, 10))
    plain = picture if expected == "I;16" else picture.convert(expected)
    np.testing.assert_allclose(np.asarray(result).astype(float), doubled(np.asarray(plain)).astype(float), rtol=0, atol=1e-6)


def test_a_transparent_palette_keeps_its_transparency():
    picture = Image.fromarray(pixels(5, 6, 3)).convert("P")
    picture.info["transparency"] = 0
    assert fastsr.upscale(Nearest(), picture).mode == "RGBA"


def test_one_channel_networks():
    array = pixels(4, 4)
    np.testing.assert_array_equal(fastsr.upscale(Nearest(1), array), doubled(array))
    with pytest.raises(ValueError, match="3 channels; expected 1"):
        fastsr.upscale(Nearest(1), pixels(4, 4, 3))


def test_values_outside_are_clamped_and_rounded_to_nearest():
    model = Nearest()
    with torch.no_grad():
        model.factor.fill_(1.5)
    array = np.full((2, 2, 3), 101, np.uint8)
    assert (fastsr.upscale(model, array) == 152).all()  # 151.5
    assert (fastsr.upscale(model, array + 100) == 255).all()


def test_the_picture_that_came_in_stays_as_it_is():
    for picture in (pixels(4, 5, 3, dtype=np.float32), torch.rand(3, 4, 5)):
        kept = picture.copy() if isinstance(picture, np.ndarray) else picture.clone()
        result = fastsr.upscale(Nearest(), picture)
        assert (kept == picture).all()
        result[...] = 0
        assert (kept == picture).all()


def test_not_a_number_is_an_error():
    model = Nearest()
    with torch.no_grad():
        model.factor.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"torch\.float32: its weights or the picture"):
        fastsr.upscale(model, pixels(4, 4, 3))


@pytest.mark.parametrize(
    ("picture", "error", "match"),
    [
        ("picture.png", TypeError, "str"),
        (np.zeros((4, 4), np.int32), TypeError, "int32"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"\(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\(0, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(4, 4), ValueError, r"\(4, 4\)"),
        (torch.zeros(4, 4, 4), ValueError, "4 channels"),
    ],
)
def test_what_is_no_picture_is_named(picture, error, match):
    with pytest.raises(error, match=match):
        fastsr.upscale(Nearest(), picture)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_real_weights_give_plain_pytorchs_picture(backend):
    model = fastsr.load("realesrgan-x4plus-anime")
    model.backend = backend
    eager = EagerRRDBNet(3, 3, num_block=6)
    eager.load_state_dict(model.state_dict())
    picture = pixels(14, 11, 3)
    ours, plain = fastsr.upscale(model, picture), fastsr.upscale(eager, picture)
    assert ours.shape == (56, 44, 3)
    assert ours.std() > 10
    assert np.abs(ours.astype(int) - plain.astype(int)).max() <= 1


def test_bfloat16_is_near_float32():
    model = RRDBNet(3, 3, num_feat=16, num_block=2, num_grow_ch=8)
    with torch.no_grad():
        model.conv_last.bias.fill_(0.5)
        picture = pixels(8, 8, 3)
        single = fastsr.upscale(model, picture)
        assert np.abs(fastsr.upscale(model.bfloat16(), picture).astype(int) - single.astype(int)).max() <= 2
