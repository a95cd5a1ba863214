"""`fastsr.freeze`: the same bits as before, without packing in each call."""

from __future__ import annotations

import copy

import pytest
import torch

import fastsr
from fastsr import _native
from fastsr.models import RCAN, RRDBNet
from fastsr.nn import Conv3x3, ResidualDenseBlock
from tests.harness import DEVICE, available_backends

RUNNERS = [r for r in available_backends("dense_block") if r.backend == "compiled"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def network(dtype: torch.dtype = torch.float32, **options: bool) -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(3, 3, num_feat=16, num_block=2, num_grow_ch=8, **options).to(DEVICE, dtype)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plus", [False, True])
def test_frozen_gives_the_same_bits(plus, dtype, runner):
    model, x = network(dtype, plus=plus), torch.rand(2, 3, 9, 11).to(DEVICE, dtype)
    with runner.active(), torch.no_grad():
        before = model(x)
        assert fastsr.freeze(model) is model
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(model(x), before)
        assert torch.equal(copy.deepcopy(model)(x), before)
        assert torch.equal(fastsr.unfreeze(model)(x), before)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upscale", [3, 4])
def test_a_frozen_rcan_gives_the_same_bits(upscale, dtype, runner):
    """In float16 with the biases that its smaller features need."""
    torch.manual_seed(0)
    model = RCAN(3, 3, 16, 2, 2, 4, upscale=upscale, mean_shift=upscale == 3).to(DEVICE, dtype)
    x = torch.rand(2, 3, 9, 11).to(DEVICE, dtype)
    with runner.active(), torch.no_grad():
        before = model(x)
        assert torch.equal(fastsr.freeze(model)(x), before)
        if DEVICE == "cpu":
            held = {name for name, m in model.named_modules() if getattr(m, "packed", None) is not None}
            assert {"", "conv_first", "body.1.conv", "body.1.residual_group.1", "upsample.0"} <= held
            assert not {"conv_last", "body.1.residual_group.1.rcab.0"} & held
        model.img_range = 100.0
        changed = model(x)
        assert not torch.equal(changed, before)
        assert torch.equal(fastsr.freeze(model)(x), changed)
        assert torch.equal(copy.deepcopy(model)(x), changed)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU packs weights in the launch itself")
def test_frozen_weights_are_what_is_used_until_they_are_dropped():
    model, x = fastsr.freeze(network()), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        for p in model.parameters():
            p.data.mul_(1.5)
        assert torch.equal(model(x), before)  # as the docstring warns: frozen weights must not change
        changed = fastsr.unfreeze(model)(x)
        assert not torch.equal(changed, before)
        assert torch.equal(fastsr.freeze(model)(x), changed)
        state = {name: tensor / 1.5 for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        torch.testing.assert_close(model(x), before)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU packs weights in the launch itself")
def test_what_does_not_fit_is_ignored():
    """Another dtype (autocast), another instruction set, another device's cast: packed in the call, as without freezing."""
    plain, x = network().requires_grad_(False), torch.rand(1, 3, 8, 8)
    frozen = fastsr.freeze(copy.deepcopy(plain))
    for isa in _native.cpu_isas():
        with _native.use_cpu_isa(isa):
            assert torch.equal(frozen(x), plain(x))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(frozen(x), plain(x))
    assert torch.equal(frozen.half()(x.half()), plain.half()(x.half()))
    assert all(m.packed is None for m in frozen.modules() if isinstance(m, (Conv3x3, ResidualDenseBlock)))


def test_weights_are_held_packed_once_for_each_convolution():
    model = fastsr.freeze(network())
    held = [name for name, m in model.named_modules() if getattr(m, "packed", None) is not None]
    if DEVICE == "cpu":
        assert sum("rdb" in name for name in held) == 6
        assert not any("rdb" in name and "conv" in name for name in held)
    assert not any("packed" in name for name in model.state_dict())


def test_training_again_after_freezing():
    model = fastsr.freeze(network()).train().requires_grad_()
    model(torch.rand(1, 3, 6, 6, device=DEVICE)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
