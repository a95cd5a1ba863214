"""The text of csrc/cuda/dense_block.cuh and wgrad.cuh on the CPU: forward, features and all gradients against plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastsr.kernels.dense_block import reference
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager, laid_out, random_tensor
from tests.simt import host, tf32
from tests.simt.far import apart

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")


@dataclass(frozen=True)
class Block:
    """Sizes, layouts and scales of one call; the last convolution returns to `features`."""

    features: int
    growths: tuple[int, ...]
    size: tuple[int, int, int]
    dtype: torch.dtype
    layout: str = "channels_last"
    residual: bool = False
    bias: bool = True
    in_workspace: bool = False  # x is the workspace's prefix already
    weights: str = "oihw"
    negative_slope: float = 0.2
    res_scale: float = 0.2
    residual_scale: float = 1.0
    wide: bool = False  # float32 parameters, as autocast leaves them
    seed: int = 0
    engine: str = ""  # "wgmma", "tf32", or that of the dtype

    def __str__(self) -> str:
        sizes = f"{self.features}-{'-'.join(map(str, self.growths))}-{'x'.join(map(str, self.size))}"
        return "-".join(filter(None, (sizes, str(self.dtype)[6:], self.layout, self.engine)))

    @property
    def channels(self) -> int:
        return self.features + sum(self.growths)

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.wide else self.dtype

    def pixels(self, channels: int) -> Tensor:
        """Channels-last, full of NaN."""
        n, h, w = self.size
        return torch.full((n, h, w, channels), torch.nan, dtype=self.dtype).permute(0, 3, 1, 2)

    def arguments(self) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor | None, Tensor]:
        """x, weights, biases, residual and the gradient of the output."""
        n, h, w = self.size
        shape, begin, weights, biases = (n, self.features, h, w), self.features, [], []
        for k, outputs in enumerate((*self.growths, self.features)):
            weight = random_tensor((outputs, begin, 3, 3), self.parameter_dtype, self.seed + 10 + k) / (9 * begin) ** 0.5
            weights.append(weight.contiguous(memory_format=torch.channels_last) if self.weights == "channels_last" else weight)
            biases.append(random_tensor((outputs, 2), self.parameter_dtype, self.seed + 20 + k)[:, 1] if self.bias else None)  # stride 2
            begin += outputs
        images = [laid_out(random_tensor(shape, self.dtype, self.seed + 30 + i), self.layout) for i in range(3)]
        return images[0], weights, biases, images[1] if self.residual else None, images[2]

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and all gradients in plain PyTorch."""
        x, weights, biases, residual, grad = self.arguments()
        named = {"x": x, **{f"weight {k}": w for k, w in enumerate(weights)}}
        named |= {f"bias {k}": b for k, b in enumerate(biases) if b is not None}
        leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in named.items()}
        y = reference.dense_block(
            leaves["x"],
            [leaves[f"weight {k}"] for k in range(len(weights))],
            [leaves.get(f"bias {k}") for k in range(len(weights))],
            None if residual is None else residual.to(dtype),
            negative_slope=self.negative_slope,
            res_scale=self.res_scale,
            residual_scale=self.residual_scale if self.residual else 1.0,
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))
        return y.detach(), dict(zip(leaves, gradients, strict=True))


def pixels(t: Tensor | None) -> tuple[int, tuple[int, int, int]]:
    return (0, (0, 0, 0)) if t is None else (t.data_ptr(), (t.stride(0), t.stride(2), t.stride(3)))


def convolutions(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[tuple[object, ...]]:
    return [
        (w.data_ptr(), w.stride(), *((0, 0) if b is None else (b.data_ptr(), b.stride(0))), w.shape[1], w.shape[0])
        for w, b in zip(weights, biases, strict=True)
    ]


def kernels(b: Block):  # type: ignore[no-untyped-def]
    return getattr(host.module("dense_block"), "tf32" if b.engine == "tf32" else str(b.dtype)[6:] + "_wide" * b.wide)


Parameters = tuple[list[Tensor], list[Tensor | None]]


def forward(b: Block, schedule: int = 0, given: Parameters | None = None) -> tuple[Tensor, Tensor]:
    """The output and the workspace."""
    x, weights, biases, residual, _ = b.arguments()
    weights, biases = given or (weights, biases)
    workspace, out = b.pixels(b.channels), b.pixels(b.features)
    if b.in_workspace:
        workspace[:, : b.features] = x
        x = workspace[:, : b.features]
    scales = (b.negative_slope, b.res_scale, b.residual_scale if b.residual else 1.0)
    views = (pixels(t) for t in (x, residual, workspace, out))
    kernels(b).forward(schedule, b.engine == "wgmma", b.size, convolutions(weights, biases), *views, *scales)
    return out, workspace


def backward(
    b: Block, workspace: Tensor, schedule: int = 0, dx: bool = True, parameters: bool = True, given: Parameters | None = None
) -> dict[str, Tensor]:
    """Every gradient that was asked for."""
    _, weights, biases, _, grad = b.arguments()
    weights, _ = given or (weights, biases)
    found = {"x": b.pixels(b.features)} if dx else {}
    if parameters:
        found |= {f"weight {k}": torch.full(w.shape, torch.nan, dtype=b.parameter_dtype) for k, w in enumerate(weights)}
        found |= {f"bias {k}": torch.full((w.shape[0],), torch.nan, dtype=b.parameter_dtype) for k, w in enumerate(weights)}
    addresses = [(found[f"weight {k}"].data_ptr(), found[f"bias {k}"].data_ptr()) for k in range(len(weights) if parameters else 0)]
    scratch = b.pixels(b.channels)
    views = (pixels(t) for t in (grad, workspace, scratch, found.get("x")))
    scales = (b.negative_slope, b.res_scale, b.residual_scale if b.residual else 1.0)
    kernels(b).backward(schedule, b.engine == "wgmma", b.size, convolutions(weights, [None] * len(weights)), *views, addresses, *scales)
    return found


SMALL = Block(16, (8, 8), (2, 5, 7), torch.float32)
ESRGAN = Block(64, (32, 32, 32, 32), (1, 5, 9), torch.float32, residual=True, residual_scale=0.2)
BLOCKS = (
    SMALL,
    replace(SMALL, size=(1, 18, 19), layout="channel_slice", residual=True, residual_scale=0.2, in_workspace=True),
    ESRGAN,
    Block(3, (5, 1, 7), (3, 9, 17), torch.float32, layout="misaligned", residual=True, residual_scale=-0.5, weights="channels_last"),
    Block(8, (4, 8, 20), (1, 3, 5), torch.float32),  # a3 lies at 40 bytes where g3 lies at 16
    Block(40, (24,), (1, 2, 3), torch.float32, bias=False, negative_slope=0.0, layout="permuted"),
    Block(20, (), (2, 1, 1), torch.float32, layout="expanded", res_scale=1.5, negative_slope=1.0),
)
#: The second block's convolutions are some of both engines: 8 outputs, and prefixes of 24 and 56 channels that end in a stage.
WGMMA = [replace(b, engine="wgmma") for b in (ESRGAN, Block(24, (32, 8, 48), (2, 13, 26), torch.float32))]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_output_and_all_gradients_are_as_good_as_eager(block, dtype):
    b = replace(block, dtype=dtype)
    (truth, truths), (plain, plains) = b.reference(torch.float64), b.reference(dtype)
    out, workspace = forward(b)
    assert_close_as_eager("output", out, plain, truth, planes=True)
    ours = backward(b, workspace)
    for name, gradient in truths.items():
        assert_close_as_eager(f"gradient of {name}", ours[name], plains[name], gradient, planes=name == "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [*BLOCKS, *WGMMA], ids=str)
def test_float32_parameters_give_what_rounding_them_before_gives(block, dtype):
    """Bit for bit, but that their gradients are not rounded."""
    wide, plain = replace(block, dtype=dtype, wide=True), replace(block, dtype=dtype)
    _, weights, biases, _, _ = wide.arguments()
    rounded = [w.to(dtype) for w in weights], [None if t is None else t.to(dtype) for t in biases]
    (out, workspace), (expected, same) = forward(wide), forward(plain, given=rounded)
    assert torch.equal(out, expected)
    assert torch.equal(workspace, same)
    ours, theirs = backward(wide, workspace), backward(plain, workspace, given=rounded)
    for name, gradient in ours.items():
        assert gradient.dtype == (dtype if name == "x" else torch.float32)
        assert torch.equal(gradient.to(dtype), theirs[name]), name
    assert any(not torch.equal(g, g.to(dtype).float()) for name, g in ours.items() if name != "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", WGMMA, ids=str)
def test_wgmma_is_as_good_as_eager(block, dtype):
    host.module("dense_block").wgmma_calls()
    test_output_and_all_gradients_are_as_good_as_eager(block, dtype)
    assert host.module("dense_block").wgmma_calls() > 0


@pytest.mark.parametrize("block", [BLOCKS[1], ESRGAN, BLOCKS[3]], ids=str)
def test_tf32_is_as_good_as_eager_in_tf32(block, monkeypatch):
    """Twice eager's error, where eager rounds the factors of each convolution and of each of its gradients to 10 bits of mantissa."""
    b = replace(block, engine="tf32")
    truth, truths = b.reference(torch.float64)
    monkeypatch.setattr(torch.nn.functional, "conv2d", tf32.conv2d)
    plain, plains = b.reference(torch.float32)
    out, workspace = forward(b)
    assert_close_as_eager("output", out, plain, truth, planes=True)
    assert (out - truth).abs().max() > 1e-5 * truth.abs().max(), "nothing was rounded to tf32"
    ours = backward(b, workspace)
    for name, gradient in truths.items():
        assert_close_as_eager(f"gradient of {name}", ours[name], plains[name], gradient, planes=name == "x")
        rounded = "bias" not in name and gradient.numel() > 100
        assert not rounded or (ours[name] - gradient).abs().max() > 1e-5 * gradient.abs().max(), f"gradient of {name}: not rounded to tf32"


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_features_are_the_workspace_of_the_forward(dtype):
    b = replace(BLOCKS[3], dtype=dtype)
    x, weights, biases, _, _ = b.arguments()
    workspace = b.pixels(b.channels)
    views = pixels(x), b.features, pixels(workspace)
    kernels(b).features(0, False, b.size, convolutions(weights[:-1], biases[:-1]), *views, b.negative_slope)
    assert torch.equal(workspace, forward(b)[1])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_gradient_alone_has_the_same_bits(dtype):
    b = replace(SMALL, dtype=dtype)
    workspace = forward(b)[1]
    everything = backward(b, workspace)
    for part in (backward(b, workspace, parameters=False), backward(b, workspace, dx=False)):
        assert part
        assert all(torch.equal(t, everything[name]) for name, t in part.items())


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_the_schedule_does_not_change_a_bit(dtype):
    b = replace(SMALL, dtype=dtype, size=(2, 9, 18), residual=True)  # several pixel tiles: more than one partial sum
    out, workspace = forward(b)
    gradients = backward(b, workspace)
    for schedule in range(1, 5):
        again, same = forward(b, schedule)
        assert torch.equal(out, again)
        assert torch.equal(workspace, same)
        assert all(torch.equal(t, gradients[name]) for name, t in backward(b, workspace, schedule).items())


@pytest.mark.parametrize("engine", ["", "wgmma"])
def test_offsets_are_counted_in_64_bits(engine, monkeypatch):
    b = Block(16, (32,), (2, 5, 7), torch.bfloat16, residual=True, engine=engine)
    out, workspace = forward(b)
    near = backward(b, workspace)
    compact = Block.pixels
    monkeypatch.setattr(Block, "pixels", lambda self, channels: apart(compact(self, channels)))
    out_far, workspace_far = forward(b)
    assert torch.equal(out, out_far)
    assert torch.equal(workspace, workspace_far)
    far = backward(b, workspace_far)
    assert all(torch.equal(t, far[name]) for name, t in near.items())


def test_more_convolutions_than_a_launch_takes():
    b = Block(2, (1,) * 17, (1, 3, 4), torch.float32)
    (truth, truths), (plain, plains) = b.reference(torch.float64), b.reference(b.dtype)
    out, workspace = forward(b)
    assert_close_as_eager("output", out, plain, truth)
    for name, ours in backward(b, workspace).items():
        assert_close_as_eager(f"gradient of {name}", ours, plains[name], truths[name])


def test_the_mask_takes_the_sign_of_what_was_saved():
    """Zeros, also negative ones, and every border pixel: the slope belongs to all that is not above zero."""
    b = Block(8, (8,), (1, 3, 17), torch.float32, negative_slope=0.25)
    _, weights, _, _, grad = b.arguments()
    workspace = random_tensor((1, 16, 3, 17), b.dtype, 3).contiguous(memory_format=torch.channels_last)
    saved = workspace[:, 8:]
    saved[..., ::3], saved[..., 1::3] = 0.0, -0.0
    g_last = (grad * b.res_scale).double()
    flowing = torch.nn.functional.conv_transpose2d(g_last, weights[1][:, 8:].double(), padding=1)
    g_first = torch.where(saved > 0, flowing, 0.25 * flowing)
    bias = backward(b, workspace)["bias 0"]
    torch.testing.assert_close(bias.double(), g_first.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_the_address_sanitizer_finds_no_overrun():
    """Buffers of exactly the size that the arguments span."""
    script = """
def address(a): return a.ctypes.data
rng = numpy.random.default_rng(0)
for (name, kind), (features, growths, h, w) in zip(
    [("float32", "f4"), ("bfloat16", "u2"), ("bfloat16", "u2"), ("float32", "f4")],
    [(3, (5, 1), 3, 17), (3, (5, 1), 9, 2), (16, (8, 8), 5, 7), (32, (16,), 2, 3)],
):
    def make(*shape):
        a = rng.standard_normal(shape).astype("f4")
        return a if kind == "f4" else (a.view("u4") >> 16).astype("u2")
    def pixels(a): return address(a), (h * w * a.shape[-1], w * a.shape[-1], a.shape[-1])
    channels, convs, gradients, kept, begin = features + sum(growths), [], [], [], features
    for outputs in (*growths, features):
        weight, bias, dweight, dbias = make(outputs, begin, 3, 3), make(outputs), make(outputs, begin, 3, 3), make(outputs)
        convs.append((address(weight), (begin * 9, 9, 3, 1), address(bias), 1, begin, outputs))
        gradients.append((address(dweight), address(dbias)))
        kept += [weight, bias, dweight, dbias]
        begin += outputs
    x, residual, out, workspace, scratch = (make(2, h, w, c) for c in (features, features, features, channels, channels))
    run = getattr(dense_block, name)
    run.forward(0, False, (2, h, w), convs, *map(pixels, (x, residual, workspace, out)), 0.2, 0.2, 0.2)
    run.backward(0, False, (2, h, w), convs, *map(pixels, (x, workspace, scratch, out)), gradients, 0.2, 0.2, 0.2)
print("finished")
"""
    done = host.run_alone("dense_block", script, host.ADDRESS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "finished" in done.stdout
