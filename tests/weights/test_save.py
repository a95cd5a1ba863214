"""`fastsr.save`: every dialect there and back, and the keys that other programs look for."""

from __future__ import annotations

import os

import pytest
import safetensors.torch
import torch

import fastsr
from fastsr.weights import WeightsError
from tests.weights import files

DIALECTS = ("basicsr", "esrgan", "esrgan-old")

#: (scale, unshuffle) of BasicSR's networks, of older ones and of further ones.
SHAPES = [(4, None), (2, None), (1, None), (8, None), (16, None), (2, 1), (1, 1), (4, 2)]

#: What the files of each generation hold, for two blocks and two x2 steps, without the dense blocks after the first.
KEYS = {
    "basicsr": "conv_first body.0.rdb1.conv1 body.0.rdb1.conv5 body.1.rdb3.conv2 conv_body conv_up1 conv_up2 conv_hr conv_last",
    "esrgan": (
        "conv_first RRDB_trunk.0.RDB1.conv1 RRDB_trunk.0.RDB1.conv5 RRDB_trunk.1.RDB3.conv2 trunk_conv "
        "upconv1 upconv2 HRconv conv_last"
    ),
    "esrgan-old": (
        "model.0 model.1.sub.0.RDB1.conv1.0 model.1.sub.0.RDB1.conv5.0 model.1.sub.1.RDB3.conv2.0 model.1.sub.2 "
        "model.3 model.6 model.8 model.10"
    ),
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(("scale", "unshuffle"), SHAPES)
@pytest.mark.parametrize(("dialect", "plus"), [*((dialect, False) for dialect in DIALECTS), ("esrgan-old", True)])
def test_there_and_back_bit_for_bit(tmp_path, dialect, scale, unshuffle, plus, ending):
    model = files.network(scale, unshuffle=unshuffle, plus=plus)
    path = tmp_path / f"model{ending}"
    fastsr.save(model, path, dialect)
    loaded = fastsr.load(path)
    assert loaded.extra_repr() == model.extra_repr()
    assert files.same(loaded, model)
    fastsr.save(loaded, tmp_path / f"again{ending}", dialect)
    assert (tmp_path / f"again{ending}").stat().st_size == path.stat().st_size
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_keys_are_those_of_the_generation(tmp_path, dialect):
    fastsr.save(files.network(), tmp_path / "m.pth", dialect)
    keys = torch.load(tmp_path / "m.pth", weights_only=True).keys()
    named = {f"{name}.{part}" for name in KEYS[dialect].split() for part in ("weight", "bias")}
    assert named <= keys
    assert len(keys) == 2 * (6 + 2 * 15)


def test_esrgan_plus_is_written_in_its_own_dialect(tmp_path):
    model = files.network(num_block=1, plus=True)
    fastsr.save(model, tmp_path / "m.pth", "esrgan-old")
    plus = [key for key in torch.load(tmp_path / "m.pth", weights_only=True) if "conv1x1" in key]
    assert plus == [f"model.1.sub.0.RDB{j}.conv1x1.weight" for j in (1, 2, 3)]
    for dialect in ("basicsr", "esrgan"):
        with pytest.raises(ValueError, match=f"'{dialect}', but an ESRGAN"):
            fastsr.save(model, tmp_path / "other.pth", dialect)
    assert not (tmp_path / "other.pth").exists()


@pytest.mark.parametrize("steps", range(5))
def test_the_oldest_dialects_numbers_tell_the_scale(tmp_path, steps):
    fastsr.save(files.network(2**steps, num_block=1, unshuffle=1), tmp_path / "m.pth", "esrgan-old")
    keys = torch.load(tmp_path / "m.pth", weights_only=True).keys()
    layers = {key.split(".")[1] for key in keys}
    assert len(layers) == 4 + steps
    assert (max(map(int, layers)) + 1 - 5) // 3 == steps
    assert fastsr.load(tmp_path / "m.pth").scale == 2**steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_other_dtypes_are_written_as_they_are(tmp_path, dtype, ending):
    model = files.network().to(dtype)
    fastsr.save(model, tmp_path / f"m{ending}")
    read = safetensors.torch.load_file if ending == ".safetensors" else torch.load
    assert {t.dtype for t in read(tmp_path / f"m{ending}").values()} == {dtype}
    loaded = fastsr.load(tmp_path / f"m{ending}", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_safetensors_itself_reads_the_file(tmp_path):
    model = files.network()
    fastsr.save(model, tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in model.state_dict().items())


def test_the_wrapper_that_other_programs_want(tmp_path):
    model = files.network()
    fastsr.save(model, tmp_path / "m.pth", wrapper="params_ema")
    assert torch.load(tmp_path / "m.pth", weights_only=True)["params_ema"].keys() == model.state_dict().keys()
    assert files.same(fastsr.load(tmp_path / "m.pth"), model)
    with pytest.raises(ValueError, match="'params_ema', but a safetensors"):
        fastsr.save(model, tmp_path / "m.safetensors", wrapper="params_ema")


def test_a_view_of_something_larger_is_written_alone(tmp_path):
    model = files.network()
    model.conv_hr.weight.data = torch.zeros(1 << 20)[: 6 * 6 * 9].view(6, 6, 3, 3)
    fastsr.save(model, tmp_path / "m.pth")
    assert (tmp_path / "m.pth").stat().st_size < 1 << 20


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m.pth"
    path.write_bytes(b"before")

    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastsr.save(files.network(), path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["m.pth"]


def test_what_cannot_be_saved_is_named(tmp_path):
    model = files.network()
    with pytest.raises(ValueError, match="'edsr'; expected one of 'basicsr', 'esrgan', 'esrgan-old'"):
        fastsr.save(model, tmp_path / "m.pth", "edsr")
    with pytest.raises(ValueError, match=r"'\.onnx'; expected \.pth"):
        fastsr.save(model, tmp_path / "m.onnx")
    with pytest.raises(TypeError, match="Linear"):
        fastsr.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s, keys: s.pop(keys[-1]), "lacks conv_last.bias"),
        (lambda s, keys: s.pop(keys[4]), "lacks body.0.rdb1.conv2.weight"),
        (lambda s, keys: s.update({keys[4]: torch.zeros(3, 3, 3, 3)}), "body.0.rdb1.conv2.weight has shape"),
        (lambda s, keys: s.update({"extra.weight": torch.zeros(1)}), "has no extra.weight"),
    ],
)
def test_files_of_each_dialect_that_do_not_fit(tmp_path, dialect, change, match):
    fastsr.save(files.network(num_block=1), tmp_path / "m.pth", dialect)
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    change(state, list(state))
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match=match):
        fastsr.load(tmp_path / "m.pth")


def test_layers_out_of_order_and_dialects_mixed(tmp_path):
    fastsr.save(files.network(num_block=1), tmp_path / "m.pth", "esrgan-old")
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    torch.save({key.replace("model.6.", "model.7."): value for key, value in state.items()}, tmp_path / "moved.pth")
    with pytest.raises(WeightsError, match=r"layers .*0, 3, 7, 8, 10"):
        fastsr.load(tmp_path / "moved.pth")
    torch.save(state | {"conv_hr.weight": state["model.8.weight"]}, tmp_path / "mixed.pth")
    with pytest.raises(WeightsError, match="several dialects"):
        fastsr.load(tmp_path / "mixed.pth")


def test_scales_that_do_not_exist(tmp_path):
    state = dict(files.network(1, num_block=1).state_dict())  # unshuffled by 4
    for key in ("conv_up2.weight", "conv_up2.bias"):
        state.pop(key)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match="1 x2 steps after a pixel-unshuffle by 4"):
        fastsr.load(tmp_path / "m.pth")
