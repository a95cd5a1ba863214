"""The cases: every runner has weights in the layout that its name says, searches are judged by clear choices, work is counted alike."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from fastsr.bench import gate, suite
from fastsr.bench.case import BASELINE, CLEAR, Call, Case, Runner, State, element_size, laid_out, with_gradients
from fastsr.bench.cases.ops import bench_vq_nearest
from fastsr.bench.cases.peers import code_search, rivals

OPS = ("ops.bench_conv3x3", "ops.bench_dense_block", "ops.bench_rcab", "ops.bench_channel_attention")
CODES = ("ops.bench_vq_nearest", "ops.bench_vector_quantize")


def cases(module: str, dtype: str = "float32", sizes: str = "tiny", device: str = "cpu") -> list[Case]:
    return suite.cases(module, suite.Options(device, (dtype,), sizes))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_take_the_layout_of_the_input(layout: torch.memory_format, backward: bool) -> None:
    seen = []

    def build(state: State) -> Call:
        def call(x: torch.Tensor) -> torch.Tensor:
            seen.append(state["weight"].is_contiguous(memory_format=layout))
            return torch.nn.functional.conv2d(x, state["weight"])

        return call

    state = {"weight": torch.randn(4, 3, 3, 3)}
    given = state["weight"].contiguous(memory_format=torch.contiguous_format if layout == torch.channels_last else torch.channels_last)
    call = laid_out(with_gradients(build, 1) if backward else build)({"weight": given})
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=layout)
    answers = call(x, torch.randn(2, 4, 4, 3).contiguous(memory_format=layout)) if backward else (call(x),)
    assert seen == [True]
    assert all(y.is_contiguous(memory_format=layout) for y in answers)


@pytest.mark.parametrize("module", [*OPS, "models.bench_rcan", "models.bench_rrdbnet"])
@pytest.mark.parametrize("name", ["eager NCHW", BASELINE])
def test_eager_convolutions_see_one_layout_alone(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch computes in channels-last if the input or the weight is: "NCHW" must have neither, the baseline both."""
    layouts: set[bool] = set()
    convolve = torch.nn.functional.conv2d

    def watched(x: torch.Tensor, weight: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        if weight.shape[2] == 3 and x.shape[1] > 1:
            layouts.update(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return convolve(x, weight, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda self, x, w, b: watched(x, w, b, padding=self.padding))
    for case in cases(module):
        layouts.clear()
        runner = case.runners[name]
        runner.build(gate.draw_state(case, torch.float32))(*gate.draw_for(case, runner, 1))
        if module != "ops.bench_channel_attention":  # whose convolutions are 1x1
            assert layouts == {name == BASELINE}, case.name


def judged(case: Case, name: str, path: Path) -> gate.Verdict:
    runner = case.runners[name]
    return gate.judge(case, runner, runner.build(gate.draw_state(case, getattr(torch, case.dtype))), path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("module", CODES)
def test_exact_searches_pass_in_every_precision(module: str, dtype: str, tmp_path: Path) -> None:
    for case in cases(module, dtype):
        gate.prepare(case, tmp_path / "truth.pt")
        named = ["auto", BASELINE, *(n for n in ("eager, expanded", "torch.cdist", "eager, one-hot") if n in case.runners)]
        for name in named:
            verdict = judged(case, name, tmp_path / "truth.pt")
            assert verdict.passed, f"{case.name} {name}: {verdict.reason}"


def test_products_of_low_precision_are_wrong_and_so_are_their_training_steps(tmp_path: Path) -> None:
    """More rows than the tiny case has, so that some choice is within bfloat16's rounding and yet clear."""
    options = suite.Options("cpu", ("bfloat16",), "tiny")
    case = bench_vq_nearest.case(options, "bfloat16", bench_vq_nearest.Size(2048, 256, 8))
    gate.prepare(case, tmp_path / "truth.pt")
    assert judged(case, BASELINE, tmp_path / "truth.pt").passed
    assert judged(case, "auto", tmp_path / "truth.pt").passed
    for name in ("eager, bfloat16 products", "eager AMP"):
        assert not judged(case, name, tmp_path / "truth.pt").passed, name


def test_clear_choices_are_those_with_a_margin() -> None:
    codebook = torch.tensor([[0.0], [2.0], [10.0], [10.0]], dtype=torch.float64)
    near = 1 - CLEAR  # squared distances are (1 - e)^2 and (1 + e)^2: 4 e apart
    rows = torch.tensor([[0.1], [1.0], [1 - CLEAR / 8], [near], [9.0]], dtype=torch.float64)
    assert code_search.clear(rows, codebook).tolist() == [True, False, False, True, False]  # the last: two codes are one


def test_what_follows_an_unclear_stage_is_unclear() -> None:
    state = {"codebook": torch.tensor([[[-1.0], [1.0]], [[-0.25], [0.5]]], dtype=torch.float64)}
    rows = torch.tensor([[0.0], [1.4]], dtype=torch.float64)
    assert bench_vq_nearest.margin((rows,), state, "float32").tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_inputs_once_and_outputs_once(dtype: str) -> None:
    """Of every op: what the timed call is given, with its weights, and what it returns."""
    for module in (*OPS, *CODES):
        for case in cases(module, dtype):
            low = getattr(torch, dtype)
            state, inputs = gate.draw_state(case, low), gate.draw_inputs(case, 1, low)
            answer = case.eager(state)(*inputs)
            outputs = answer if isinstance(answer, tuple) else (answer,)
            moved = sum(t.numel() * t.element_size() for t in (*state.values(), *inputs, *outputs))
            assert case.bytes == moved, case.name


def test_rivals_are_named_by_what_they_do() -> None:
    def build(wrap: rivals.Wrap) -> object:
        return lambda state: wrap(torch.relu)

    def named(device: str, dtype: str, **more: bool) -> dict[str, Runner]:
        return rivals.plain_runners(build, dtype, suite.Options(device, (dtype,)), **more)  # type: ignore[arg-type]

    assert {"torch.compile, frozen", "torch.compile, max-autotune"} <= named("cpu", "float32", inference=True).keys()
    assert "torch.compile, frozen" not in named("cpu", "float32")
    assert "torch.compile, max-autotune, no graphs" in named("cuda", "bfloat16", inference=True)
    assert named("cpu", "bfloat16")["eager AMP"].dtype == "float32"
    assert "eager NCHW" not in named("cpu", "float32", images=False)


def test_every_peer_has_a_row_and_says_why_it_has_no_time() -> None:
    for device, wanted in {"cpu": {"OpenVINO", "onnxruntime"}, "cuda": {"TensorRT"}}.items():
        for module in ("models.bench_rcan", "models.bench_rrdbnet", "models.bench_vqvae", "models.bench_upscaling"):
            for case in cases(module, device=device):
                if case.sizes["direction"] == "forward":
                    assert wanted <= case.runners.keys(), case.name
    for case in cases("ops.bench_vq_nearest"):
        assert {"faiss IndexFlatL2", "flash-kmeans", "vector-quantize-pytorch"} <= case.runners.keys()


def test_depths_begin_at_ten_and_end_above_eight_hundred() -> None:
    found = [case.sizes["depth"] for case in cases("scaling.bench_scaling", sizes="full") if case.sizes["axis"] == "depth"]
    assert found == sorted(set(found))
    assert found[0] <= 10
    assert found[-1] > 800
    assert all(math.log2(b / a) < 1.5 for a, b in itertools.pairwise(found))


def test_element_sizes() -> None:
    assert [element_size(dtype) for dtype in ("float32", "bfloat16", "float16")] == [4, 2, 2]
