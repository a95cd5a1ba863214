"""`torch.compile` before and after fusing sees the operators; what is exported is the reference graph."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastsr
from tests.fusion.test_living import esrgan, picture, rcan

OPERATOR = {esrgan: "fastsr.dense_block", rcan: "fastsr.rcab"}
COUNT = {esrgan: 3, rcan: 2}


class Graphs:
    """A compiler that changes nothing and keeps the names of what it was given."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.targets: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[torch.Tensor]):
        self.targets += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph


@pytest.mark.parametrize("make", [esrgan, rcan])
def test_compiled_after_fusing_in_one_graph_with_the_operators(make):
    model, graphs = make(), Graphs()
    plain = copy.deepcopy(model)
    fastsr.fuse_(model)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend=graphs)(picture())
    torch.testing.assert_close(y, plain(picture()), rtol=1e-5, atol=1e-6)
    assert graphs.targets.count(OPERATOR[make]) == COUNT[make]


@pytest.mark.parametrize("make", [esrgan, rcan])
def test_compiled_training_step(make):
    model = make()
    plain = copy.deepcopy(model)
    fastsr.fuse_(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for m in (compiled, plain):
        m(picture()).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * theirs.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_before_fusing(in_place):
    model, graphs = esrgan(), Graphs()
    plain = copy.deepcopy(model)
    compiled = model if in_place else torch.compile(model, backend=graphs)
    if in_place:
        model.compile(backend=graphs)
    with torch.no_grad():
        compiled(picture())
        assert "fastsr.dense_block" not in graphs.targets
        assert len(fastsr.fuse_(compiled).fused) == 5
        y = compiled(picture())
        assert graphs.targets.count("fastsr.dense_block") == 3
        torch.testing.assert_close(y, plain(picture()), rtol=1e-5, atol=1e-6)
        graphs.targets.clear()
        fastsr.unfuse_(compiled)
        assert torch.equal(compiled(picture()), plain(picture()))


@pytest.mark.parametrize("make", [esrgan, rcan])
@pytest.mark.parametrize("strict", [False, True])
def test_export_is_the_reference_graph(make, strict):
    model = make().eval()
    plain = copy.deepcopy(model)
    fastsr.fuse_(model)
    program = torch.export.export(model, (picture(),), strict=strict)
    assert "fastsr" not in str(program.graph)
    torch.testing.assert_close(program.module()(picture()), plain(picture()))


def test_onnx(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    onnxscript = pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    assert onnxscript
    model = esrgan().eval()
    fastsr.fuse_(model)
    program = torch.onnx.export(model, (picture(),), dynamo=True, verbose=False)
    assert "fastsr" not in str(program.model.graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_older_onnx_exporter(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    model = esrgan().eval()
    fastsr.fuse_(model)
    file = io.BytesIO()
    torch.onnx.export(model, (picture(),), file, dynamo=False)
    assert b"fastsr" not in file.getvalue()
    assert file.getvalue().count(b"Conv") >= 15


def test_compiled_with_inductor():
    torch.compiler.reset()
    model = nn.Sequential(esrgan().body[0])
    plain = copy.deepcopy(model)
    fastsr.fuse_(model)
    x = torch.randn(1, 8, 6, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), plain(x), rtol=1e-5, atol=1e-6)
