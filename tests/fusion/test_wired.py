"""Convolutions whose neighbours stand in a module's own forward: found by a trace, which must hold for every call that is to come."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsr
from fastsr import ops
from fastsr.fusion.families.wired import Wired
from fastsr.fusion.swap import forward_of
from tests.fusion.toys import conv
from tests.harness import DEVICE, assert_close_as_eager, random_tensor


class Tail(nn.Module):
    """As BasicSR's RRDBNet and SwinIR end: a shared activation, upsampling by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.up1, self.up2, self.hr, self.last = conv(4, 6), conv(6, 6), conv(6, 6), conv(6, 6), conv(6, 3)
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)
        self.scale = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.scale == 4:
            x = self.lrelu(self.up1(F.interpolate(x, scale_factor=2, mode="nearest")))
        x = self.lrelu(self.up2(F.interpolate(x, scale_factor=2.0)))
        return self.last(self.lrelu(self.hr(x)))


class Residual(nn.Module):
    """EDSR's block; the second convolution has no neighbour to join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = conv(4, 4), conv(4, 4, bias=False), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(x))) * 0.1


def padded(x: Tensor, multiple: int) -> Tensor:
    """A function of the module's file, which looks at the shape: it is called as before."""
    _, _, h, w = x.shape
    return F.pad(x, (0, -w % multiple, 0, -h % multiple), "replicate") if h % multiple or w % multiple else x


class Functional(nn.Module):
    """A padded input, functions and methods, PixelShuffle before and behind an activation, layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(4, 4), conv(4, 16)])
        self.mean, self.shuffle, self.out = torch.full((1, 4, 1, 1), 0.5), nn.PixelShuffle(2), conv(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        _, _, h, w = x.shape
        x = padded(x - self.mean, 4)
        x = F.relu(self.layers[0](x), inplace=True)
        x = F.leaky_relu(F.pixel_shuffle(self.layers[1](x), 2), 0.3)
        return self.shuffle(self.out(x).relu())[:, :, : 4 * h, : 4 * w]


class Used(nn.Module):
    """The first convolution's output is also added: only the second chain is one call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = conv(4, 4), conv(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.act(y) + y
        return self.act(self.b(z))


class Late(Used):
    """Writes into the convolution's input before the activation is reached."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.a(x)
        x.zero_()
        return self.act(y) + x + self.b(x)


#: name -> (module, calls of the operator)
WIRED = {"tail": (Tail, 3), "residual": (Residual, 1), "functional": (Functional, 3), "used twice": (Used, 1)}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return WIRED[name][0]().to(DEVICE)


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x * 1)
    (y * random_tensor(y.shape, torch.float32, 2).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", WIRED)
def test_chains_are_one_call_each_and_equal(name, monkeypatch):
    module, calls = made(name), []
    truth, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    report = fastsr.fuse_(module)
    assert report.fused == ("",), report
    assert forward_of(module).fusion.source.count("wired_chain(") == WIRED[name][1]
    x = random_tensor((2, 4, 6, 7), torch.float32, 1)
    assert forward_of(module).applies(x)
    original = ops.conv3x3
    monkeypatch.setattr(ops, "conv3x3", lambda *a, **k: calls.append(1) or original(*a, **k))
    for training in (True, False):
        calls.clear()
        results = [step(m.train(training), x.to(next(m.parameters()).dtype)) for m in (module, plain, truth)]
        assert len(calls) == WIRED[name][1]
        for ours, eager, true in zip(*results, strict=True):
            assert_close_as_eager(name, ours, eager, true)
    with torch.no_grad():
        assert_close_as_eager(name, module(x), plain(x), truth(x.double()))
    assert torch.equal(fastsr.unfuse_(module)(x), plain(x))


def test_a_chain_runs_where_it_began():
    module = Late()
    plain = copy.deepcopy(module)
    assert fastsr.fuse_(module).fused == ("",)
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-6)


class Branching(Used):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x)) if x.shape[2] > 4 else self.b(x)


class Trained(Used):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x)) if self.training else self.b(x)


class Remembering(Used):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.act(self.a(x))
        return self.b(self.seen)


class TwoInputs(Used):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(self.a(x)) + self.b(y)


def hooked() -> nn.Module:
    module = Residual()
    module.relu.register_forward_hook(lambda *_: None)
    return module


LEFT = {
    "branches on the shape": (Branching, "its forward cannot be traced: TraceError"),
    "another one in training": (Trained, "another one in training"),
    "keeps a tensor": (Remembering, "writes to its attribute 'seen'"),
    "two inputs": (TwoInputs, "its forward cannot be traced: TypeError"),
    "a hook": (hooked, "relu has hooks"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_a_trace_would_not_hold_for_is_left_with_a_reason(name):
    make, reason = LEFT[name]
    module = make()
    before = {n: set(m.__dict__) for n, m in module.named_modules()}
    report = fastsr.fuse_(module)
    assert not report.fused
    assert reason in report.rows[0].reason, report
    assert {n: set(m.__dict__) for n, m in module.named_modules()} == before
    assert module.training


class Others(nn.Module):
    """Nothing that the operator computes beside the convolution."""

    def __init__(self, change) -> None:
        super().__init__()
        self.conv, self.change = conv(4, 4), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.conv(x))


@pytest.mark.parametrize(
    "change",
    [
        F.gelu,
        torch.sigmoid,
        lambda y: y * 2,
        lambda y: F.leaky_relu(y, -0.1),
        lambda y: F.interpolate(y, scale_factor=2),
        lambda y: torch.maximum(y, F.relu(y)),
    ],
)
def test_nothing_to_fuse(change):
    assert fastsr.fuse_(Others(change)).rows == ()


def bilinear(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(F.interpolate(x, scale_factor=2, mode="bilinear"))


def tripled(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(F.interpolate(x, scale_factor=3))


class Before(Others):
    def forward(self, x: Tensor) -> Tensor:
        return self.change(x, self.conv)


@pytest.mark.parametrize("change", [bilinear, tripled])
def test_other_upsampling_is_left(change):
    assert fastsr.fuse_(Before(change)).rows == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "scale", 2),
        lambda m: setattr(m.lrelu, "negative_slope", 0.4),
        lambda m: setattr(m, "lrelu", nn.Tanh()),
        lambda m: setattr(m, "up1", nn.Sequential(conv(6, 6), nn.Tanh())),
        lambda m: setattr(m.hr, "forward", lambda x: x * 2),
    ],
)
def test_a_module_that_is_changed_afterwards_runs_its_own_code(change):
    module = made("tail")
    plain = copy.deepcopy(module)
    fastsr.fuse_(module)
    for m in (module, plain):
        torch.manual_seed(1)
        change(m)
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-6)
    assert not forward_of(module).applies(x)


class Loop(nn.Module):
    """Runs through a list, which may grow."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(4, 4), conv(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


def test_a_list_that_grows_is_seen():
    module = Loop()
    fastsr.fuse_(module)
    module.layers.append(conv(4, 4))
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    assert torch.equal(module(x), fastsr.unfuse_(copy.deepcopy(module))(x))


def test_hooks_of_other_parts_run():
    module, seen = made("tail"), []
    fastsr.fuse_(module)
    module.before.register_forward_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("tail"))
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    module(x)
    assert seen == ["before", "tail"]
    assert forward_of(module).applies(x)
    module.up2.register_forward_hook(lambda *_: seen.append("up2"))
    module(x)
    assert seen == ["before", "tail", "before", "up2", "tail"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_use_their_own_weights(way):
    module = made("tail")
    fastsr.fuse_(module)
    if way == "deepcopy":
        other = copy.deepcopy(module)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert isinstance(forward_of(other).fusion, Wired)
    assert forward_of(other).module is other
    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    before = module(x)
    with torch.no_grad():
        assert torch.equal(other(x), before)
        for p in other.parameters():
            p.mul_(1.5)
        assert torch.equal(module(x), before)
        torch.testing.assert_close(other(x), fastsr.unfuse_(other)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_autocast_and_pictures_without_a_batch(channels_last):
    module = made("tail")
    plain = copy.deepcopy(module)
    fastsr.fuse_(module)
    x = random_tensor((2, 4, 6, 7), torch.float32, 1)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    truth = copy.deepcopy(plain).double()(x.double())
    assert_close_as_eager("autocast", ours, theirs, truth)
    class_x = nn.Upsample(scale_factor=1)(x)
    torch.testing.assert_close(module(class_x), plain(class_x), rtol=1e-5, atol=1e-6)


def test_compiled_in_one_graph():
    module, graphs = made("tail"), []
    plain = copy.deepcopy(module)
    fastsr.fuse_(module)
    torch.compiler.reset()

    def keep(graph, example):
        graphs.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x = random_tensor((1, 4, 5, 5), torch.float32, 0)
    with torch.no_grad():
        y = torch.compile(module, fullgraph=True, backend=keep)(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)
    assert sum("conv3x3" in name for name in graphs) == 3
    program = torch.export.export(module.eval(), (x,))
    assert "fastsr" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), plain(x))


def test_double_precision_runs_its_own_code():
    module = made("tail")
    fastsr.fuse_(module)
    x = random_tensor((1, 4, 5, 5), torch.float64, 0)
    assert not forward_of(module.double()).applies(x)
    assert module(x).dtype == torch.float64
