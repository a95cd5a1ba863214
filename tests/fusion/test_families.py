"""Every spelling is known by its structure, computes what it did, and what is another function is left with a reason."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import fastsr
from fastsr.fusion import fusing
from fastsr.fusion.costs import IN_TRAINING, gain
from fastsr.fusion.report import Cost
from fastsr.fusion.swap import forward_of
from tests.fusion import toys
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager, random_tensor
from tests.models.eager_rcan import EagerRCAB, OfficialRCAN
from tests.models.eager_rrdbnet import EagerResidualDenseBlock, EagerRRDB

#: name -> (block, its kind in the report)
KNOWN = {
    "dense, functional": (lambda: EagerResidualDenseBlock(8, 4), "residual dense block"),
    "dense, in Sequentials": (toys.DenseSequential, "residual dense block"),
    "dense, seven convolutions": (lambda: toys.DenseSequential(5, 3, 7, 0.2, 1 / 3), "residual dense block"),
    "dense, other order": (toys.DenseRelu, "residual dense block"),
    "dense, ESRGAN+": (lambda: EagerResidualDenseBlock(8, 4, plus=True), "residual dense block of ESRGAN+"),
    "dense, ESRGAN+ with a part for noise": (toys.DensePlusNoisy, "residual dense block of ESRGAN+"),
    "RRDB": (lambda: EagerRRDB(8, 4), "RRDB"),
    "chain of two": (toys.Chain, "RRDB"),
    "attention of BasicSR": (lambda: EagerRCAB(8, 2).rcab[3], "channel attention"),
    "attention of RCAN": (lambda: OfficialRCAN(8, 1, 1, 2).body[0].body[0].body[3], "channel attention"),
    "linear gate": (toys.LinearGate, "channel attention"),
    "functional gate": (toys.FunctionalGate, "channel attention"),
    "hard gate": (toys.HardGate, "channel attention"),
    "hard gate without squeeze": (lambda: toys.HardGate(squeeze=False), "channel attention"),
    "no gate": (toys.NoGate, "channel attention"),
    "RCAB of BasicSR": (lambda: EagerRCAB(8, 2, 0.7), "RCAB"),
    "RCAB in place": (toys.InPlaceRcab, "RCAB"),
    "RCAB with leaky ReLU": (lambda: toys.AttentionTail(act=nn.LeakyReLU(0.1), scale=0.5), "RCAB"),
    "CAB": (toys.AttentionTail, "CAB"),
}
#: Blocks whose fused forward moves as much as their own code, and whose backward moves less: on a CPU they are fused for training alone.
TIES = {name for name, (_, kind) in KNOWN.items() if kind in ("channel attention", "CAB")}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return KNOWN[name][0]().to(DEVICE)


def features(block: nn.Module) -> int:
    layer = next(m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def steps(block: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    torch.manual_seed(7)  # of noise
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x * 1)
    (y.float() * random_tensor(y.shape, torch.float32, 5)).sum().backward()
    return [y.detach(), *(t.grad.clone() for t in (x, *block.parameters()))]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_known_blocks_are_fused_and_equal(name, dtype):
    block = made(name).to(dtype)
    truth, plain = copy.deepcopy(block).double(), copy.deepcopy(block)
    x = random_tensor((2, 6 if name == "dense, other order" else features(block), 7, 9), dtype, 3)
    report = fastsr.fuse_(block, backend="compiled" if name in TIES else "auto")
    assert report.rows[0].fused, report
    assert report.rows[0].kind == KNOWN[name][1]
    with torch.set_grad_enabled("ESRGAN+" not in name):  # that one serves inference alone
        assert forward_of(block).applies(x)
    for k, (ours, eager, true) in enumerate(zip(steps(block, x), steps(plain, x), steps(truth, x.double()), strict=True)):
        assert_close_as_eager(f"{name}: {k}", ours, eager, true)
    with torch.no_grad():
        for m in (block, plain, truth):
            m.eval()
        assert_close_as_eager(name, block(x), plain(x), truth(x.double()))


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_block_keeps_and_moves_is_predicted(name):
    report = fastsr.fuse_(made(name))
    row = report.rows[0]
    assert 0 < row.after.moved <= row.before.moved
    assert 0 < row.after.saved < 1.05 * row.before.saved + 8
    assert 0 < row.after.calls < row.before.calls
    assert 0 < row.after.stepped < row.before.stepped or ("ESRGAN+" in name and row.after.stepped == row.before.stepped)
    assert row.fused
    assert row.reason == (IN_TRAINING if name in TIES and DEVICE == "cpu" else "")
    assert f"fused {row.reason}".rstrip() in str(report)
    assert f"{row.before.calls} -> {row.after.calls}" in str(report)


def test_bytes_are_those_that_move():
    x, gates = 8 * 4, pytest.approx  # bytes a pixel of one tensor; vectors and weights come on top
    gate = fastsr.fuse_(made("linear gate"), backend="compiled").rows[0]
    assert gate.before.moved == gates(3 * x, rel=0.005)  # for the mean, for the product, and out: an expanded gate is a vector
    assert gate.after.moved == gates(3 * x, rel=0.005)
    block = fastsr.fuse_(made("RCAB in place")).rows[0]
    assert block.before.moved == gates(12 * x, rel=0.03)  # two convolutions, ReLU, mean, product, sum
    assert block.after.moved == gates(5 * x, rel=0.03)  # x, r out, r, x again, out


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU launches are saved")
@pytest.mark.parametrize("name", sorted(TIES))
def test_what_gains_in_training_alone_runs_there_unless_a_backend_is_named(name):
    block = made(name)
    x = random_tensor((2, features(block), 7, 9), torch.float32, 3)

    def runs() -> list[bool]:
        found = [forward_of(block).applies(x)]
        with torch.no_grad():
            found.append(forward_of(block).applies(x))
        block.requires_grad_(False)
        found += [forward_of(block).applies(x), forward_of(block).applies(x.clone().requires_grad_())]
        block.requires_grad_(True)
        return found

    fastsr.fuse_(block)
    assert runs() == [True, False, False, True]
    with torch.no_grad():
        assert torch.equal(block(x), type(block).forward(block, x))
    fastsr.unfuse_(block)
    with fastsr.set_backend("compiled"):
        fastsr.fuse_(block)
    assert runs() == [True] * 4
    fastsr.fuse_(fastsr.unfuse_(block), backend="reference")
    assert runs() == [True] * 4


def test_what_gains_nothing_is_left(monkeypatch):
    block, proofs = made("functional gate"), []
    monkeypatch.setattr(fusing, "gain", lambda before, after, device: "never")
    monkeypatch.setattr(fusing, "prove", lambda *arguments: proofs.append(arguments))
    report = fastsr.fuse_(block)
    assert [(row.name, row.fused, row.reason) for row in report.rows] == [("", False, fusing.NO_GAIN)]
    assert "left: no gain expected" in str(report)
    assert forward_of(block) is None
    assert not proofs


def test_a_gain_is_bytes_moved_or_kept_and_on_a_gpu_launches():
    cost = Cost(100.0, 300.0, 900.0, 6)
    assert gain(cost, Cost(100.0, 300.0, 900.0, 1), "cpu") == "never"
    assert gain(cost, Cost(100.0, 300.0, 900.0, 6), "cuda") == "never"
    assert gain(cost, Cost(99.9, 299.9, 899.9, 6), "cpu") == "never"
    assert gain(cost, Cost(100.0, 300.0, 900.0, 1), "cuda") == "always"
    assert gain(cost, Cost(100.0, 297.0, 897.0, 6), "cpu") == "always"
    assert gain(cost, Cost(99.0, 300.0, 900.0, 6), "cpu") == "in training"
    assert gain(cost, Cost(100.0, 300.0, 890.0, 6), "cpu") == "in training"


@pytest.mark.parametrize("name", ["functional gate", "RCAB in place"])
def test_alike_blocks_are_looked_at_once(name, monkeypatch):
    seen, identify = [], fusing.identify
    monkeypatch.setattr(fusing, "identify", lambda *arguments: seen.append(arguments) or identify(*arguments))
    report = fastsr.fuse_(nn.Sequential(made(name), made(name), made(name)))
    assert len(seen) == 1
    assert len({row.reason for row in report.rows}) == 1
    assert len(report.rows) == 3


def test_a_block_whose_code_needs_values_has_no_prediction():
    report = fastsr.fuse_(toys.Measuring())
    assert report.fused == ("",), report
    assert report.rows[0].before is None


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_backend_reaches_the_operators(backend, monkeypatch):
    from fastsr import backends

    seen = []
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda op, name, *rest: seen.append(name) or choose(op, name, *rest))
    block = made("RRDB")
    fastsr.fuse_(block, backend=backend)
    seen.clear()
    block(random_tensor((1, 8, 5, 5), torch.float32, 0))
    assert seen == [backend] * 3
    with pytest.raises(ValueError, match="backend is 'fast'"):
        fastsr.fuse_(block, backend="fast")


def hooked():
    block = toys.DenseSequential()
    block.step0[0].register_forward_hook(lambda *_: None)
    return block


def patched():
    block = toys.DenseSequential()
    block.out.forward = block.out.forward
    return block


def replaced():
    block = toys.DenseSequential()
    block.forward = block.forward
    return block


def with_conv(change):
    def make():
        block = toys.DenseSequential()
        change(block.step1)
        return block

    return make


#: name -> (block, what the reason says)
LEFT = {
    "noise in training": (toys.Noisy, "random in training mode"),
    "another output in training": (toys.Muted, "in training mode its output differs"),
    "a norm": (toys.Normed, "differs"),
    "writes into its input": (toys.Vandal, "changes its input"),
    "a gain": (toys.Gain, "has parameters or buffers that a residual dense block does not know"),
    "a pointwise convolution of another size": (lambda: toys.DensePlus(squeeze=2), r"shortcut \(Conv2d\) has parameters"),
    "ESRGAN+ with noise in its code": (toys.DensePlusDrawing, "random in training mode"),
    "ESRGAN+ with a gain": (toys.DensePlusGain, "the block itself has parameters or buffers"),
    "ECA": (toys.EfficientGate, "convolution along the channels"),
    "a hook inside": (hooked, "step0.0 has hooks"),
    "a patched part": (patched, "forward of out was replaced"),
    "a patched block": (replaced, "forward was replaced on the instance"),
    "dilation": (with_conv(lambda s: setattr(s[0], "dilation", (2, 2))), r"step1.0 has dilation \(2, 2\)"),
    "circular padding": (with_conv(lambda s: setattr(s[0], "padding_mode", "circular")), "padding_mode 'circular'"),
    "weight norm": (with_conv(lambda s: parametrizations.weight_norm(s[0])), "ParametrizedConv2d"),
    "spectral norm": (with_conv(lambda s: parametrizations.spectral_norm(s[0])), "ParametrizedConv2d"),
    "old weight norm": (with_conv(lambda s: weight_norm(s[0])), "step1.0 has hooks"),
    "old spectral norm": (with_conv(lambda s: spectral_norm(s[0])), "parameters or buffers|hooks"),
    "on meta": (lambda: toys.DenseSequential().to("meta"), "meta device"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", LEFT)
def test_other_blocks_are_left_with_a_reason(name):
    block, reason = LEFT[name]
    block = block()
    before = dict(block.__dict__)
    report = fastsr.fuse_(block)
    assert not report.rows[0].fused
    assert forward_of(block) is None or [row.kind for row in report.rows if row.name == "" and row.fused] == ["convolutions"]
    if forward_of(block) is not None:  # as a block of another kind: the rest of its code runs as before
        x, plain = random_tensor((1, block.first.in_channels, 7, 9), torch.float32, 3), fastsr.unfuse_(copy.deepcopy(block))
        torch.testing.assert_close(block(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-6)
    for part in map(block.get_submodule, filter(None, report.fused)):  # convolutions with their activations, each a block of its own
        assert isinstance(part, nn.Sequential)
        convolution = part[0]
        assert (convolution.dilation, convolution.padding_mode) == ((1, 1), "zeros")
        assert "forward" not in convolution.__dict__
        assert not any((convolution._forward_hooks, convolution._forward_pre_hooks, parametrize.is_parametrized(convolution)))
    assert re.search(reason, report.rows[0].reason), report.rows[0].reason
    assert report.rows[0].reason in str(report)
    assert fastsr.unfuse_(block).__dict__.keys() == before.keys()


def test_nothing_to_fuse():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))
    report = fastsr.fuse_(model)
    assert report.rows == ()
    assert "nothing to fuse" in str(report)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fastsr.fuse_(model.state_dict())


def test_our_own_modules_are_not_touched():
    report = fastsr.fuse_(nn.Sequential(fastsr.nn.RRDB(8, 4), fastsr.nn.RCAB(8, 2)))
    assert report.rows == ()


def test_attention_inside_a_block_that_is_left_is_fused():
    block = toys.AttentionTail(act=nn.Tanh())
    report = fastsr.fuse_(block, backend="compiled")
    assert not report.rows[0].fused
    assert report.fused == ("cab.3",)
