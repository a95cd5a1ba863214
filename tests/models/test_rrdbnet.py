"""RRDBNet against the same network in plain torch.nn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsr import _native
from fastsr.models import RRDBNet
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager, available_backends, random_tensor
from tests.models.eager_rrdbnet import EagerRRDBNet

SMALL = {"num_feat": 16, "num_block": 2, "num_grow_ch": 8}
RUNNERS = ["reference", *dict.fromkeys(r.backend for r in available_backends("conv3x3") if r.backend == "compiled" or DEVICE != "cpu")]


def pair(scale: int = 4, dtype: torch.dtype = torch.float64, channels: int = 3, **sizes: int) -> tuple[RRDBNet, EagerRRDBNet]:
    """Our network and the eager one with the same weights, large enough for every part to matter."""
    torch.manual_seed(0)
    ours = RRDBNet(channels, channels, scale, **(SMALL | sizes))
    for name, parameter in ours.named_parameters():
        if "rdb" in name:  # the initialisation all but switches the blocks off
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    eager = EagerRRDBNet(channels, channels, scale, **(SMALL | sizes))
    eager.load_state_dict(ours.state_dict())
    return ours.to(DEVICE, dtype), eager.to(DEVICE, dtype)


def gradients(model: torch.nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(g.to(y.dtype))
    named = {"output": y.detach(), "gradient of x": x.grad} | {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root mean square over the tensors of their relative errors (Euclidean norm); a single wrong tensor makes it large."""
    each = [((found[name].double() - truth[name]).norm() / truth[name].norm()).item() for name in truth]
    return (sum(e * e for e in each) / len(each)) ** 0.5


@pytest.mark.parametrize(("scale", "blocks", "count"), [(4, 23, 16_697_987), (2, 23, 16_703_171), (1, 23, 16_723_907), (4, 6, 4_467_779)])
def test_parameter_counts_are_the_published_ones(scale, blocks, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in RRDBNet(3, 3, scale, num_block=blocks).parameters()) == count


@pytest.mark.parametrize("scale", [1, 2, 4, 8, 16])
def test_float64_equals_eager_at_every_scale(scale):
    ours, eager = pair(scale, num_block=1)
    x = random_tensor((2, 3, 4, 8), torch.float64, 1)
    with torch.no_grad():
        expected = eager(x)
        assert expected.shape == (2, 3, 4 * scale, 8 * scale)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_float64_gradients_equal_eager():
    ours, eager = pair()
    x, g = random_tensor((2, 3, 5, 3), torch.float64, 1), random_tensor((2, 3, 20, 12), torch.float64, 2)
    found, expected = gradients(ours, x, g), gradients(eager, x, g)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11 * expected[name].abs().max().item(), msg=name)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 9)], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUNNERS)
def test_inference_is_as_good_as_eager(backend, dtype, size):
    ours, eager = pair(dtype=dtype)
    ours.backend = backend
    x = random_tensor((2, 3, *size), dtype, 1)
    with torch.no_grad():
        y, plain = ours(x), eager(x)
        assert y.dtype == dtype
        assert_close_as_eager("output", y, plain, copy.deepcopy(eager).double()(x.double()))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUNNERS)
def test_gradients_are_as_good_as_eager(backend, dtype):
    """Over all gradients together: rounding flips signs inside a network, so the error of a single bias is a draw."""
    ours, eager = pair(dtype=dtype, num_block=1)
    ours.backend = backend
    x, g = random_tensor((2, 3, 6, 5), dtype, 1), random_tensor((2, 3, 24, 20), dtype, 2)
    truth = gradients(copy.deepcopy(eager).double(), x.double(), g)
    found, plain = gradients(ours, x, g), gradients(eager, x, g)
    assert found.keys() == truth.keys()
    assert error(found, truth) <= 2 * error(plain, truth) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", RUNNERS)
def test_autocast_is_as_good_as_eager(backend):
    ours, eager = pair(dtype=torch.float32)
    ours.backend = backend
    x = random_tensor((1, 3, 6, 5), torch.float32, 1)
    with torch.no_grad():
        truth = copy.deepcopy(eager).double()(x.double())
        with torch.autocast(DEVICE, torch.bfloat16):
            y, plain = ours(x), eager(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    assert_close_as_eager("output", y, plain, truth)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = ours(x)
    assert y.requires_grad
    assert_close_as_eager("output with gradients", y.detach(), plain, truth)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 7), (8, 6)], ids=str)
def test_unshuffle_pads_by_reflection_and_crops(scale, size):
    ours, eager = pair(scale, num_block=1)
    x, r = random_tensor((1, 3, *size), torch.float64, 1), {1: 4, 2: 2}[scale]
    bottom, right = -size[0] % r, -size[1] % r
    mode = "reflect" if bottom < size[0] and right < size[1] else "replicate"
    with torch.no_grad():
        y = ours(x)
        expected = eager(F.pad(x, (0, right, 0, bottom), mode) if bottom or right else x)[:, :, : size[0] * scale, : size[1] * scale]
    assert y.shape == (1, 3, size[0] * scale, size[1] * scale)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("train", [False, True])
def test_an_empty_batch_stays_empty(scale, train):
    ours, _ = pair(scale, torch.float32, num_block=1)
    with torch.set_grad_enabled(train):
        assert ours(torch.empty(0, 3, 5, 4, device=DEVICE)).shape == (0, 3, 5 * scale, 4 * scale)


@pytest.mark.parametrize("backend", RUNNERS)
def test_results_are_fresh_and_stay_as_they_are(backend):
    ours, _ = pair(dtype=torch.float32)
    ours.backend = backend
    a, b = (random_tensor((1, 3, 6, 6), torch.float32, seed) for seed in (1, 2))
    kept = a.clone()
    with torch.no_grad():
        first = ours(a)
        copied = first.clone()
        second = ours(b)
    assert torch.equal(a, kept)
    assert torch.equal(first, copied)
    assert not torch.equal(first, second)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()


class Calls(TorchDispatchMode):
    """Counts the operators that torch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(_native.missing is not None, reason="needs the native library")
def test_inference_concatenates_nothing_and_needs_no_further_buffers_for_further_blocks():
    counts = []
    for blocks in (1, 4):
        ours, _ = pair(dtype=torch.float32, num_block=blocks)
        ours.backend = "compiled"
        with torch.no_grad(), Calls() as calls:
            ours(random_tensor((1, 3, 6, 6), torch.float32, 1))
        assert "cat" not in calls.counts
        assert "convolution" not in calls.counts
        counts.append(sum(calls.counts.get(name, 0) for name in ("empty", "clone", "new_empty", "empty_like", "add", "mul")))
    assert counts[0] == counts[1] > 0


def test_the_backend_reaches_every_part_and_is_checked():
    ours, _ = pair(dtype=torch.float32)
    ours.backend = "reference"
    assert ours.body[1].rdb2.backend == "reference"
    with pytest.raises(ValueError, match="'cudnn'"):
        ours.backend = "cudnn"
    with pytest.raises(ValueError, match="'cudnn'"):
        RRDBNet(3, 3, **SMALL, backend="cudnn")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="scale is 3"):
        RRDBNet(3, 3, scale=3)
    with pytest.raises(ValueError, match="num_block is 0"):
        RRDBNet(3, 3, num_block=0)
    ours, _ = pair(dtype=torch.float32)
    for shape in ((3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
            ours(torch.empty(shape, device=DEVICE))


@pytest.mark.parametrize("train", [False, True])
def test_it_compiles_as_one_graph(train):
    ours, _ = pair(dtype=torch.float32, num_block=1)
    x = random_tensor((1, 3, 5, 4), torch.float32, 1)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(x), ours(x))


def test_a_copy_and_a_state_dict_give_the_same_network():
    ours, _ = pair(2, torch.float32)
    x = random_tensor((1, 3, 4, 4), torch.float32, 1)
    twin = RRDBNet(3, 3, 2, **SMALL).to(DEVICE)
    twin.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(x), twin(x))
        assert torch.equal(ours(x), copy.deepcopy(ours)(x))


@pytest.mark.parametrize("scale", [4, 8, 16])
def test_the_tail_of_a_strip_is_the_strip_of_the_tail(scale):
    """Two rows of features on each side are enough, and one is not."""
    ours, _ = pair(scale, num_block=1)
    with torch.no_grad():
        features = random_tensor((1, 16, 11, 4), torch.float64, 1)
        whole = ours.tail(features)[:, :, 4 * scale : 7 * scale]
        for overlap, equal in ((2, True), (1, False)):
            strip = ours.tail(features[:, :, 4 - overlap : 7 + overlap])[:, :, overlap * scale : -overlap * scale]
            assert torch.allclose(strip, whole, rtol=0, atol=1e-12) == equal
