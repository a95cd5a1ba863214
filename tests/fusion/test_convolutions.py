"""Convolutions with what stands around them in an `nn.Sequential`; children that stay are called, hooks and all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsr
from fastsr.fusion.swap import forward_of
from tests.fusion.toys import AttentionTail, conv
from tests.harness import assert_close_as_eager, random_tensor

#: name -> (layers, runs)
CHAINS = {
    "relu": (lambda: [conv(4, 6), nn.ReLU()], 1),
    "vgg": (lambda: [conv(4, 6), nn.ReLU(True), conv(6, 6), nn.ReLU(True), nn.MaxPool2d(2), conv(6, 8), nn.ReLU()], 3),
    "upsampled": (lambda: [nn.Upsample(scale_factor=2), conv(4, 6), nn.LeakyReLU(0.2, True), conv(6, 3)], 1),
    "pixel shuffle": (lambda: [conv(4, 16), nn.PixelShuffle(2), nn.LeakyReLU(0.1), conv(4, 36, bias=False), nn.PixelShuffle(3)], 2),
    "behind others": (lambda: [nn.BatchNorm2d(4), nn.GELU(), conv(4, 6), nn.ReLU()], 1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    torch.manual_seed(0)
    layers, runs = CHAINS[name]
    model = nn.Sequential(*layers())
    truth, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    report = fastsr.fuse_(model)
    assert report.fused == ("",), report
    assert len(forward_of(model).fusion.runs) == runs
    x, results = random_tensor((2, 4, 6, 7), torch.float32, 1), []
    assert forward_of(model).applies(x)
    for m in (model, plain, truth):
        own = x.clone().to(next(m.parameters()).dtype).requires_grad_()
        y = m(own * 1)
        (y * random_tensor(y.shape, y.dtype, 2)).sum().backward()
        results.append([y.detach(), own.grad, *(p.grad for p in m.parameters())])
    for ours, eager, true in zip(*results, strict=True):
        assert_close_as_eager(name, ours, eager, true)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [conv(4, 6), nn.BatchNorm2d(6), nn.ReLU()],
        lambda: [conv(4, 6), conv(6, 6)],
        lambda: [conv(4, 6, stride=2), nn.ReLU()],
        lambda: [conv(4, 6), nn.PReLU()],
        lambda: [conv(4, 6), nn.LeakyReLU(-0.1)],
        lambda: [nn.Upsample(scale_factor=2, mode="bilinear"), conv(4, 6)],
        lambda: [nn.Upsample(scale_factor=3), conv(4, 6)],
    ],
)
def test_nothing_to_fuse(layers):
    assert fastsr.fuse_(nn.Sequential(*layers())).rows == ()


def test_children_that_are_not_fused_are_called_and_those_that_are_may_get_hooks():
    seen = []
    model = nn.Sequential(conv(4, 8), nn.ReLU(), AttentionTail(), nn.Tanh())
    report = fastsr.fuse_(model, backend="compiled")  # by name also the CAB
    assert report.fused == ("", "2")
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    expected = fastsr.unfuse_(copy.deepcopy(model))(x)
    model[3].register_forward_hook(lambda *_: seen.append("tanh"))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert seen == ["tanh"]
    model[1].register_forward_hook(lambda *_: seen.append("relu"))
    assert not forward_of(model).applies(x)
    model(x)
    assert seen == ["tanh", "relu", "tanh"]


@pytest.mark.parametrize("change", [lambda m: m.append(nn.Tanh()), lambda m: m.insert(0, nn.Identity()), lambda m: m.pop(1)])
def test_a_chain_that_is_changed_afterwards(change):
    torch.manual_seed(0)
    model = nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 6))
    plain = copy.deepcopy(model)
    fastsr.fuse_(model)
    for m in (model, plain):
        change(m)
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("child", [1, 2])
def test_a_hook_in_any_run_is_a_reason_to_leave_the_chain(register, child):
    model, seen = nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 6), nn.ReLU()), []
    getattr(model[child], register)(lambda *_: seen.append(child))
    report = fastsr.fuse_(model)
    assert not report.fused
    assert f"{child} has hooks" in report.rows[0].reason
    model(random_tensor((1, 4, 5, 5), torch.float32, 0).requires_grad_()).sum().backward()
    assert seen == [child]


@pytest.mark.parametrize("strict", [False, True])
def test_a_fused_chain_as_the_root_is_exported(strict):
    model = nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 3)).eval()
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    before = model(x)
    assert fastsr.fuse_(model).fused == ("",)
    program = torch.export.export(model, (x,), strict=strict)
    assert "fastsr" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), before)
