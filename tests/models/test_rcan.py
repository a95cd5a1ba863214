"""RCAN against the same network in plain torch.nn."""

from __future__ import annotations

import copy
from statistics import median

import pytest
import torch
from torch import Tensor

import fastsr
from fastsr import _native
from fastsr.memory.tracker import Tracker
from fastsr.models import RCAN
from fastsr.weights.dialects import build
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager, available_backends, random_tensor
from tests.models.eager_rcan import EagerRCAN, OfficialRCAN
from tests.models.test_rrdbnet import Calls, gradients

SMALL = {"num_feat": 16, "num_group": 2, "num_block": 2, "squeeze_factor": 4}
RUNNERS = ["reference", *dict.fromkeys(r.backend for r in available_backends("rcab") if r.backend == "compiled" or DEVICE != "cpu")]


def pair(dtype: torch.dtype = torch.float64, **options) -> tuple[RCAN, EagerRCAN]:
    """Our network and the eager one with the same weights, large enough for every part to matter."""
    torch.manual_seed(0)
    ours = RCAN(3, 3, **(SMALL | options))
    for name, parameter in ours.named_parameters():
        if "rcab" in name:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        elif name.startswith("upsample"):
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    eager = EagerRCAN(3, 3, **(SMALL | options))
    eager.load_state_dict(ours.state_dict())
    return ours.to(DEVICE, dtype), eager.to(DEVICE, dtype)


def pictures(size: tuple[int, int], dtype: torch.dtype, seed: int = 1, batch: int = 2) -> Tensor:
    """Values of 0..1."""
    return random_tensor((batch, 3, *size), torch.float32, seed).sigmoid().to(dtype)


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize(("upscale", "count"), [(2, 15_444_667), (3, 15_629_307), (4, 15_592_379), (8, 15_740_091)])
def test_parameter_counts_are_the_published_ones(upscale, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in RCAN(3, 3, upscale=upscale, mean_shift=True).parameters()) == count
        assert sum(p.numel() for p in RCAN(3, 3, upscale=upscale).parameters()) == count - 24  # BasicSR's file


@pytest.mark.parametrize("options", [
    {"upscale": 1}, {"upscale": 2}, {"upscale": 3}, {"upscale": 4}, {"upscale": 8}, {"upscale": 16},
    {"res_scale": 0.3}, {"img_range": 1.0}, {"img_range": 3.0, "rgb_mean": (0.1, 0.5, -0.2)}, {"upscale": 2, "unshuffle": 2},
], ids=str)  # fmt: skip
def test_float64_equals_eager(options):
    ours, eager = pair(**options)
    x, scale = pictures((4, 8), torch.float64), options.get("upscale", 4)
    with torch.no_grad():
        expected = eager(x)
        assert expected.shape == (2, 3, 4 * scale, 8 * scale)
        equal(ours(x), expected)
    equal(ours(x).detach(), expected)


@pytest.mark.parametrize(("norm", "unshuffle", "scale"), [(True, 1, 4), (True, 1, 3), (False, 1, 2), (True, 2, 2), (False, 4, 1)])
def test_float64_equals_the_authors_network(norm, unshuffle, scale):
    torch.manual_seed(0)
    official = OfficialRCAN(16, 2, 2, 4, scale, norm, unshuffle)
    if norm:  # as if it had been trained
        for layer in (official.sub_mean, official.add_mean):
            layer.weight.data += 0.05 * torch.randn(3, 3, 1, 1)
            layer.bias.data += torch.randn(3)
    ours, official = build(official.state_dict()).to(DEVICE, torch.float64), official.to(DEVICE, torch.float64)
    x = pictures((4, 8), torch.float64)
    with torch.no_grad():
        expected = official(x)
        equal(ours(x), expected)
    equal(ours(x).detach(), expected)


@pytest.mark.parametrize("res_scale", [1, 0.3])
def test_float64_gradients_equal_eager(res_scale):
    ours, eager = pair(res_scale=res_scale)
    x, g = pictures((5, 3), torch.float64), random_tensor((2, 3, 20, 12), torch.float64, 2)
    found, expected = gradients(ours, x, g), gradients(eager, x, g)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11 * expected[name].abs().max().item(), msg=name)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 9)], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUNNERS)
def test_inference_is_as_good_as_eager(backend, dtype, size):
    ours, eager = pair(dtype)
    ours.backend = backend
    x = pictures(size, dtype)
    with torch.no_grad():
        y, plain = ours(x), eager(x)
        assert y.dtype == dtype
        assert_close_as_eager("output", y, plain, copy.deepcopy(eager).double()(x.double()))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUNNERS)
def test_gradients_are_as_good_as_eager(backend, dtype):
    """Over all gradients together, each by the median of nine pictures.

    On a single picture the error is a draw: rounding flips the sign before a ReLU, and the gates' gradients cancel. Plain PyTorch breaks
    the rule against plain PyTorch (backend "reference") on every thirtieth picture in float32 and every fifth in float16.
    """
    ours, eager = pair(dtype, num_group=1)
    ours.backend = backend
    wide = copy.deepcopy(eager).double()
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(9):
        x, g = pictures((6, 5), dtype, seed), random_tensor((2, 3, 24, 20), dtype, seed + 1)
        truth, found, plain = (gradients(model, image, g) for model, image in ((wide, x.double()), (ours, x), (eager, x)))
        assert found.keys() == truth.keys()
        for name, true in truth.items():
            norms = [t.double().norm().item() for t in (found[name] - true, plain[name] - true, true)]
            errors.setdefault(name, []).append((norms[0], norms[1], norms[2]))
        for model in (wide, ours, eager):
            model.zero_grad()
    medians = [[median(values) for values in zip(*rows, strict=True)] for rows in errors.values()]
    found_error, plain_error = (sum((row[k] / row[2]) ** 2 for row in medians) ** 0.5 for k in (0, 1))
    assert found_error <= 2 * plain_error + 2 * torch.finfo(dtype).eps * len(medians) ** 0.5


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", RUNNERS)
def test_autocast_is_as_good_as_eager(backend, low):
    ours, eager = pair(torch.float32)
    ours.backend = backend
    x = pictures((6, 5), torch.float32)
    with torch.no_grad():
        truth = copy.deepcopy(eager).double()(x.double())
        with torch.autocast(DEVICE, low):
            y, plain = ours(x), eager(x).to(low)  # eager adds the mean in float32
    assert y.dtype == low
    assert_close_as_eager("output", y, plain, truth)
    with torch.autocast(DEVICE, low):
        y = ours(x)
    assert y.requires_grad
    assert_close_as_eager("output with gradients", y.detach(), plain, truth)


def overflowing(mean_shift: bool) -> tuple[RCAN, EagerRCAN]:
    """Features far beyond float16's range, a result within 0..1."""
    torch.manual_seed(0)
    ours = RCAN(3, 3, 32, 2, 3, 8, mean_shift=mean_shift)
    with torch.no_grad():
        for parameter in ours.conv_first.parameters():
            parameter.mul_(2e3)
        ours.conv_last.weight.mul_(3e-3)
        for block in ours.blocks():  # gates that are neither open nor shut
            block.rcab[3].attention[1].weight.mul_(1e-4)
            block.rcab[3].attention[3].weight.mul_(3)
    eager = EagerRCAN(3, 3, 32, 2, 3, 8)
    eager.load_state_dict({key: tensor for key, tensor in ours.state_dict().items() if "_mean" not in key})
    return ours, eager


@pytest.mark.parametrize("mean_shift", [False, True])
@pytest.mark.parametrize("backend", RUNNERS)
def test_float16_does_not_overflow_where_plain_pytorch_does(backend, mean_shift):
    """... and keeps float16's precision: a part of what bfloat16, which plain PyTorch would have to use, loses."""
    ours, eager = overflowing(mean_shift)
    ours.backend = backend
    x = pictures((13, 9), torch.float32)
    with torch.no_grad():
        truth = copy.deepcopy(eager).double()(x.double())
        wide = copy.deepcopy(eager).bfloat16()(x.bfloat16())
        assert not torch.isfinite(copy.deepcopy(eager).half()(x.half())).all()
        assert truth.std() > 0.02
        allowed = (wide.double() - truth).abs().max() / 3
        half = copy.deepcopy(ours).half()
        results = {"half": half(x.half()), "frozen": fastsr.freeze(half)(x.half())}
        with torch.autocast(DEVICE, torch.float16):
            results["autocast"] = ours(x)
    with torch.autocast(DEVICE, torch.float16):
        y = ours(x)
    y.float().square().mean().mul(2**10).backward()
    for name, found in (results | {"recorded": y.detach()}).items():
        assert found.dtype == torch.float16
        assert (found.double() - truth).abs().max() <= allowed, name
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == len(list(eager.parameters()))
    assert all(torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{}, {"upscale": 3}, {"upscale": 2, "unshuffle": 2}], ids=str)
def test_an_empty_batch_stays_empty(options, train):
    ours, _ = pair(torch.float32, **options)
    scale = options.get("upscale", 4)
    with torch.set_grad_enabled(train):
        assert ours(torch.empty(0, 3, 5, 4, device=DEVICE)).shape == (0, 3, 5 * scale, 4 * scale)


@pytest.mark.parametrize("backend", RUNNERS)
@pytest.mark.parametrize("options", [{}, {"num_group": 3, "num_block": 1, "upscale": 1}], ids=str)
def test_results_are_fresh_and_stay_as_they_are(backend, options):
    ours, _ = pair(torch.float32, **options)
    ours.backend = backend
    a, b = (pictures((6, 6), torch.float32, seed) for seed in (1, 2))
    kept = a.clone()
    with torch.no_grad():
        first = ours(a)
        copied = first.clone()
        second = ours(b)
    assert torch.equal(a, kept)
    assert torch.equal(first, copied)
    assert not torch.equal(first, second)
    assert len({t.untyped_storage().data_ptr() for t in (first, second, a)}) == 3


@pytest.mark.skipif("compiled" not in RUNNERS, reason="needs the native library")
@pytest.mark.parametrize("features", [16, 64])
@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (2, 1), (4, 3)])
def test_inference_holds_its_buffers_and_the_vectors_of_one_block(features, groups, blocks):
    """To the byte: the first convolution's result and three buffers, whatever the depth. The estimates for large pictures say so, too."""
    ours, _ = pair(torch.float32, num_feat=features, num_group=groups, num_block=blocks)
    ours.backend = "compiled"
    x = pictures((48, 40), torch.float32, batch=1)
    pixels, vectors = 48 * 40 * 4, (9 + 2) * features * 4
    with torch.no_grad(), Tracker([x, *ours.parameters()]) as trunk:
        f = ours.features(x)
    with torch.no_grad(), Tracker([f, *ours.parameters()]) as tail:
        ours.tail(f)
    assert max(trunk.peaks().values()) == pixels * ours.trunk_values + vectors
    assert max(tail.peaks().values()) <= pixels * (ours.tail_values + 3 * ours.tail_scale**2)


@pytest.mark.skipif("compiled" not in RUNNERS, reason="needs the native library")
def test_inference_runs_no_convolution_of_its_own():
    ours, _ = pair(torch.float32)
    ours.backend = "compiled"
    with torch.no_grad(), Calls() as calls:
        ours(pictures((6, 6), torch.float32))
    assert "convolution" not in calls.counts
    assert calls.counts["rcab"] == 4


def test_attributes_reach_every_part_and_are_checked():
    ours, eager = pair(torch.float32)
    ours.backend = "reference"
    assert ours.body[1].residual_group[0].rcab[3].backend == "reference"
    assert ours.res_scale == 1
    ours.res_scale = 0.5
    assert {block.res_scale for block in ours.blocks()} == {0.5} == {ours.res_scale}
    ours.res_scale, ours.img_range, ours.rgb_mean = 1, 7.0, (0.3,)
    eager.img_range, eager.mean = 7.0, torch.tensor([0.3], dtype=torch.float64)
    x = pictures((5, 4), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), eager(x))
    for name, value in (("img_range", 0), ("img_range", float("inf")), ("rgb_mean", (1, 2)), ("local_pooling", 0), ("backend", "cudnn")):
        with pytest.raises(ValueError, match=f"{name} is"):
            setattr(ours, name, value)


def test_bad_arguments_are_named():
    for options, match in (
        ({"upscale": 5}, "upscale is 5; expected one of 1, 2, 3, 4"),
        ({"upscale": 8, "unshuffle": 4}, "upscale is 8"),
        ({"unshuffle": 3}, "unshuffle is 3"),
        ({"num_group": 0}, "num_group is 0"),
        ({"num_block": 0}, "num_block is 0"),
        ({"squeeze_factor": 17}, "squeeze_factor is 17; expected 1 to 16"),
        ({"squeeze_factor": 0}, "squeeze_factor is 0"),
        ({"num_in_ch": 1}, r"rgb_mean is \(0.4488, 0.4371, 0.404\); expected one value, or one for each of 1 channels"),
        ({"num_out_ch": 1, "rgb_mean": (0,), "mean_shift": True}, "num_out_ch is 1"),
        ({"backend": "cudnn"}, "'cudnn'"),
    ):
        with pytest.raises(ValueError, match=match):
            RCAN(**({"num_in_ch": 3, "num_out_ch": 3} | SMALL | options))
    ours, _ = pair(torch.float32)
    for shape in ((3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"RCAN: .* expected \(N, 3, H, W\)"):
            ours(torch.empty(shape, device=DEVICE))


def test_grey_pictures():
    ours = RCAN(1, 1, **SMALL, rgb_mean=(0.5,))
    with torch.no_grad():
        assert ours(torch.rand(1, 1, 4, 5)).shape == (1, 1, 16, 20)


@pytest.mark.parametrize("mean_shift", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_it_compiles_as_one_graph(train, mean_shift):
    ours, _ = pair(torch.float32, num_group=1)
    if mean_shift:
        ours = build(OfficialRCAN(16, 1, 2, 4).state_dict())
    x = pictures((5, 4), torch.float32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(x), ours(x))


def test_a_copy_and_a_state_dict_give_the_same_network():
    ours, _ = pair(torch.float32)
    x = pictures((4, 4), torch.float32)
    twin = RCAN(3, 3, **SMALL).to(DEVICE)
    twin.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(x), twin(x))
        assert torch.equal(ours(x), copy.deepcopy(ours)(x))


@pytest.mark.parametrize("upscale", [2, 3, 4, 8, 16])
def test_the_tail_of_a_strip_is_the_strip_of_the_tail(upscale):
    """Two rows of features on each side are enough, and one is not."""
    ours, _ = pair(upscale=upscale)
    with torch.no_grad():
        features = random_tensor((1, 16, 11, 4), torch.float64, 1)
        whole = ours.tail(features)[:, :, 4 * upscale : 7 * upscale]
        for overlap, equal in ((2, True), (1, False)):
            strip = ours.tail(features[:, :, 4 - overlap : 7 + overlap])[:, :, overlap * upscale : -overlap * upscale]
            assert torch.allclose(strip, whole, rtol=0, atol=1e-12) == equal


@pytest.mark.parametrize("backend", RUNNERS)
def test_local_pooling(backend):
    """A window that holds the picture is exact; a smaller one is another network, whose constant pictures stay the same inside."""
    ours, _ = pair(torch.float32)
    ours.backend = backend
    x = pictures((20, 24), torch.float32)
    with torch.no_grad():
        exact = ours(x)
        ours.local_pooling = 24
        torch.testing.assert_close(ours(x), exact, rtol=0, atol=1e-4)
        ours.local_pooling = 6
        local = ours(x)
        assert (local - exact).abs().max() > 1e-3
        recorded = copy.deepcopy(ours).requires_grad_()
    torch.testing.assert_close(recorded(x).detach(), local, rtol=0, atol=1e-4)
    assert ours.local_pooling == 6
    ours.local_pooling = None
    with torch.no_grad():
        assert torch.equal(ours(x), exact)


def test_reference_is_what_is_left_without_the_library(monkeypatch):
    monkeypatch.setattr(_native, "missing", "it was never built")
    ours, eager = pair(torch.float32)
    ours.backend = "reference"
    x = pictures((5, 4), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), eager(x))
