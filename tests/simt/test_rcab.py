"""The text of csrc/cuda/rcab.cuh and what stands below it on the CPU: forward and all gradients against plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import unfold

from fastsr.kernels.rcab import reference
from tests.harness import ALL_DTYPES, DEVICE, assert_close_as_eager, laid_out, random_tensor
from tests.simt import host, tf32

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")

LOW = (torch.bfloat16, torch.float16)
NAMES = ("weight1", "bias1", "weight2", "bias2", "down_weight", "down_bias", "up_weight", "up_bias")


@dataclass(frozen=True)
class Block:
    """Sizes, layouts and scale of one call."""

    features: int
    hidden: int
    squeezed: int
    size: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    bias: bool = True
    weights: str = "oihw"
    res_scale: float = 1.0
    wide: bool = False  # float32 parameters, as autocast leaves them
    seed: int = 0
    engine: str = ""  # "wgmma", "tf32", or that of the dtype

    def __str__(self) -> str:
        sizes = f"{self.features}-{self.hidden}-{self.squeezed}-{'x'.join(map(str, self.size))}"
        return "-".join(filter(None, (sizes, self.layout, self.engine)))

    def pixels(self, channels: int) -> Tensor:
        """Channels-last, full of NaN."""
        n, h, w = self.size
        return torch.full((n, h, w, channels), torch.nan, dtype=self.dtype).permute(0, 3, 1, 2)

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.wide else self.dtype

    def arguments(self) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """x, the parameters and the gradient of the output."""
        n, h, w = self.size
        f, m, r = self.features, self.hidden, self.squeezed
        parameters: list[Tensor | None] = []
        for key, shape in enumerate(((m, f, 3, 3), (f, m, 3, 3), (r, f), (f, r))):
            weight = random_tensor(shape, self.parameter_dtype, self.seed + key) / torch.Size(shape[1:]).numel() ** 0.5
            last = self.weights == "channels_last" and len(shape) == 4
            parameters.append(weight.contiguous(memory_format=torch.channels_last) if last else weight)
            parameters.append(0.3 * random_tensor(shape[:1], self.parameter_dtype, self.seed + 10 + key) if self.bias else None)
        x, grad = (laid_out(random_tensor((n, f, h, w), self.dtype, self.seed + 20 + i), self.layout) for i in range(2))
        return x, parameters, grad

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and all gradients in plain PyTorch."""
        x, parameters, grad = self.arguments()
        named = {"x": x, **dict(zip(NAMES, parameters, strict=True))}
        leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in named.items() if t is not None}
        y = reference.rcab(*(leaves.get(name) for name in named), res_scale=self.res_scale)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))
        return y.detach(), dict(zip(leaves, gradients, strict=True))


@dataclass
class Saved:
    """What the forward leaves for the backward."""

    hidden: Tensor
    sums: Tensor
    attention: Tensor

    def vectors(self) -> tuple[int, int, int]:
        return self.sums.data_ptr(), self.attention[0].data_ptr(), self.attention[1].data_ptr()


def pixels(t: Tensor | None) -> tuple[int, tuple[int, int, int]]:
    return (0, (0, 0, 0)) if t is None else (t.data_ptr(), (t.stride(0), t.stride(2), t.stride(3)))


def call(b: Block, parameters: list[Tensor | None]) -> tuple[object, ...]:
    """The arguments that forward and backward share."""
    address = [0 if t is None else t.data_ptr() for t in parameters]
    w1, _, w2, *_ = parameters
    assert w1 is not None
    assert w2 is not None
    convs = [(address[i], w.stride(), address[i + 1], 1, w.shape[1], w.shape[0]) for i, w in ((0, w1), (2, w2))]
    return b.size, *convs, (b.squeezed, address[4:]), b.res_scale


def kernels(b: Block):  # type: ignore[no-untyped-def]
    return getattr(host.module("rcab"), "tf32" if b.engine == "tf32" else str(b.dtype)[6:] + "_wide" * b.wide)


def forward(b: Block, schedule: int = 0, in_place: bool = False) -> tuple[Tensor, Saved]:
    """The output, and what is saved."""
    x, parameters, _ = b.arguments()
    n = b.size[0]
    saved = Saved(b.pixels(b.hidden), torch.full((n, b.hidden, 9), torch.nan), torch.full((2, n, b.features), torch.nan))
    out = x if in_place else b.pixels(b.features)
    kernels(b).forward(schedule, b.engine == "wgmma", *call(b, parameters), pixels(x), pixels(saved.hidden), saved.vectors(), pixels(out))
    return out, saved


def backward(
    b: Block, saved: Saved, schedule: int = 0, dx: bool = True, wanted: bool = True, image_bytes: int = 1 << 28,
    parameters: list[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Every gradient that was asked for."""
    x, own, grad = b.arguments()
    parameters = [t if t is None else t.contiguous() for t in parameters or own]
    found = {"x": b.pixels(b.features)} if dx else {}
    addresses = []
    if wanted:
        for name, weight in zip(NAMES[::2], parameters[::2], strict=True):
            assert weight is not None
            found |= {name: torch.full(weight.shape, torch.nan, dtype=b.parameter_dtype)}
            found |= {name.replace("weight", "bias"): torch.full(weight.shape[:1], torch.nan, dtype=b.parameter_dtype)}
        addresses = [found[name].data_ptr() for name in NAMES]
    scratch = b.pixels(b.hidden)
    read, written = [pixels(t) for t in (grad, x, saved.hidden)], [pixels(t) for t in (scratch, found.get("x"))]
    kernels(b).backward(schedule, b.engine == "wgmma", *call(b, parameters), *read, saved.vectors(), *written, addresses, image_bytes)
    return found


RCAN = Block(64, 64, 4, (2, 9, 18))
SMALL = Block(16, 24, 5, (2, 5, 7), res_scale=0.1)
BLOCKS = (
    RCAN,
    SMALL,
    Block(3, 5, 7, (3, 17, 1), layout="misaligned", bias=False, res_scale=-1.5, weights="channels_last"),
    Block(33, 48, 11, (1, 1, 19), layout="channel_slice"),
    Block(40, 17, 24, (1, 16, 16), layout="permuted", weights="channels_last"),
    Block(1, 1, 1, (2, 1, 1), layout="expanded", res_scale=0.5),
    Block(12, 96, 2, (1, 34, 33), bias=False),
)
WGMMA = [replace(b, engine="wgmma") for b in (RCAN, Block(32, 96, 4, (2, 14, 29)), Block(16, 40, 5, (3, 33, 1), res_scale=0.1))]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_output_and_all_gradients_are_as_good_as_eager(block, dtype):
    b = replace(block, dtype=dtype)
    (truth, truths), (plain, plains) = b.reference(torch.float64), b.reference(dtype)
    out, saved = forward(b)
    assert_close_as_eager("output", out, plain, truth, planes=True)
    ours = backward(b, saved)
    for name, gradient in truths.items():
        assert_close_as_eager(f"gradient of {name}", ours[name], plains[name], gradient, planes=name == "x")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("block", [*BLOCKS, *WGMMA], ids=str)
def test_float32_parameters_give_what_rounding_them_before_gives(block, dtype):
    """Bit for bit, but that their gradients are not rounded."""
    wide = replace(block, dtype=dtype, wide=True)
    x, parameters, _ = wide.arguments()
    rounded = [None if t is None else t.to(dtype) for t in parameters]
    results = []
    for b, given in ((wide, parameters), (replace(block, dtype=dtype), rounded)):
        n = b.size[0]
        saved = Saved(b.pixels(b.hidden), torch.full((n, b.hidden, 9), torch.nan), torch.full((2, n, b.features), torch.nan))
        out = b.pixels(b.features)
        kernels(b).forward(0, b.engine == "wgmma", *call(b, given), pixels(x), pixels(saved.hidden), saved.vectors(), pixels(out))
        results.append((out, saved, backward(b, saved, parameters=given)))
    (out, saved, ours), (plain, plain_saved, theirs) = results
    assert torch.equal(out, plain)
    assert torch.equal(saved.attention, plain_saved.attention)
    for name, gradient in ours.items():
        assert gradient.dtype == (dtype if name == "x" else torch.float32)
        assert torch.equal(gradient.to(dtype), theirs[name]), name
    assert any(not torch.equal(g, g.to(dtype).float()) for name, g in ours.items() if name != "x")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("block", WGMMA, ids=str)
def test_wgmma_is_as_good_as_eager(block, dtype):
    b, calls = replace(block, dtype=dtype), host.module("rcab").wgmma_calls
    calls()
    saved = forward(b)[1]
    assert calls() > 0
    backward(b, saved)
    assert calls() > 0
    test_output_and_all_gradients_are_as_good_as_eager(block, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_wgmma_without_a_gradient_of_x_has_the_same_bits(dtype):
    """The scaled gradient then lies in memory of its own instead of dx's."""
    b = replace(WGMMA[1], dtype=dtype)
    saved = forward(b)[1]
    everything = backward(b, saved)
    for part in (backward(b, saved, wanted=False), backward(b, saved, dx=False)):
        assert part
        assert all(torch.equal(t, everything[name]) for name, t in part.items())


@pytest.mark.parametrize("block", [replace(RCAN, squeezed=16), BLOCKS[2]], ids=str)
def test_tf32_is_as_good_as_eager_in_tf32(block, monkeypatch):
    """Twice eager's error, where eager rounds the factors of each convolution and of each of its gradients to 10 bits of mantissa.

    With 16 squeezed channels: of RCAN's 4 a few live, and eager's error of bias2 and down_bias, theirs alone, is a matter of luck.
    """
    b = replace(block, engine="tf32")
    truth, truths = b.reference(torch.float64)
    monkeypatch.setattr(torch.nn.functional, "conv2d", tf32.conv2d)
    plain, plains = b.reference(torch.float32)
    out, saved = forward(b)
    assert_close_as_eager("output", out, plain, truth, planes=True)
    assert (out - truth).abs().max() > 1e-5 * truth.abs().max(), "nothing was rounded to tf32"
    ours = backward(b, saved)
    for name, gradient in truths.items():
        assert_close_as_eager(f"gradient of {name}", ours[name], plains[name], gradient, planes=name == "x")


@pytest.mark.parametrize(("dtype", "engine"), [(t, e) for e in ("", "wgmma") for t in ALL_DTYPES[bool(e) :]], ids=str)
@pytest.mark.parametrize("size", [(2, 1, 1), (1, 1, 40), (1, 40, 1), (1, 2, 2), (2, 16, 16), (1, 17, 33), (1, 50, 7)], ids=str)
def test_the_sums_of_each_tap_are_those_of_the_stored_values(size, dtype, engine):
    """In whole numbers below 2^8, where every order of addition gives the same."""
    b = Block(8 if engine else 2, 40, 1, size, dtype, engine=engine)
    x, parameters, _ = b.arguments()
    x.copy_(x.mul(2).round().clamp(-3, 3))
    parameters = [t if t is None else t.mul(3).round().clamp(-2, 2) for t in parameters]
    saved = Saved(b.pixels(40), torch.full((size[0], 40, 9), torch.nan), torch.full((2, size[0], b.features), torch.nan))
    out = b.pixels(b.features)
    kernels(b).forward(0, engine == "wgmma", *call(b, parameters), pixels(x), pixels(saved.hidden), saved.vectors(), pixels(out))
    seen = unfold(saved.hidden.float().flatten(0, 1)[:, None], 3, padding=1).unflatten(0, (size[0], 40))
    assert torch.equal(saved.sums, seen.sum(-1))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_the_output_may_be_the_input(dtype):
    b = replace(SMALL, dtype=dtype, size=(2, 17, 18))
    assert torch.equal(forward(b, in_place=True)[0], forward(b)[0])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_gradient_alone_has_the_same_bits(dtype):
    b = replace(SMALL, dtype=dtype)
    saved = forward(b)[1]
    everything = backward(b, saved)
    for part in (backward(b, saved, wanted=False), backward(b, saved, dx=False)):
        assert part
        assert all(torch.equal(t, everything[name]) for name, t in part.items())


@pytest.mark.parametrize(("dtype", "engine"), [*((t, "") for t in ALL_DTYPES), (torch.bfloat16, "wgmma")], ids=str)
def test_the_schedule_does_not_change_a_bit(dtype, engine):
    b = replace(SMALL, dtype=dtype, size=(2, 9, 18), engine=engine)
    out, saved = forward(b)
    gradients = backward(b, saved)
    for schedule in range(1, 5):
        again, same = forward(b, schedule)
        assert torch.equal(out, again)
        assert torch.equal(saved.sums, same.sums)
        assert torch.equal(saved.attention, same.attention)
        assert all(torch.equal(t, gradients[name]) for name, t in backward(b, saved, schedule).items())


def test_images_are_taken_a_few_at_a_time():
    """Room for two of five: three rounds, which share their buffers."""
    b = replace(SMALL, size=(5, 5, 19))
    (_, truths), (_, plains) = b.reference(torch.float64), b.reference(b.dtype)
    saved = forward(b)[1]
    ours = backward(b, saved, image_bytes=2 * 8 * 9 * b.features * b.hidden)
    for name, gradient in truths.items():
        assert_close_as_eager(f"gradient of {name}", ours[name], plains[name], gradient)


def test_the_address_sanitizer_finds_no_overrun():
    """Buffers of exactly the size that the arguments span."""
    script = """
def address(a): return a.ctypes.data
rng = numpy.random.default_rng(0)
for (name, kind), (f, m, r, h, w) in zip(
    [("float32", "f4"), ("bfloat16", "u2"), ("bfloat16", "u2"), ("float32", "f4")],
    [(3, 5, 2, 3, 17), (3, 33, 7, 9, 2), (16, 16, 1, 5, 7), (64, 16, 4, 2, 3)],
):
    def make(*shape, kind=kind):
        a = rng.standard_normal(shape).astype("f4")
        return a if kind == "f4" else (a.view("u4") >> 16).astype("u2")
    def pixels(a): return address(a), (h * w * a.shape[-1], w * a.shape[-1], a.shape[-1])
    shapes = (m, f, 3, 3), (m,), (f, m, 3, 3), (f,), (r, f), (r,), (f, r), (f,)
    parameters, gradients = ([make(*shape) for shape in shapes] for _ in range(2))
    at = [address(p) for p in parameters]
    convs = (at[0], (9 * f, 9, 3, 1), at[1], 1, f, m), (at[2], (9 * m, 9, 3, 1), at[3], 1, m, f)
    x, grad, hidden, out, scratch = (make(2, h, w, c) for c in (f, f, m, f, m))
    vectors = [make(2, c, kind="f4") for c in (9 * m, f, f)]
    places = [address(v) for v in vectors]
    run, call = getattr(rcab, name), ((2, h, w), *convs, (r, at[4:]), 0.5)
    run.forward(0, False, *call, pixels(x), pixels(hidden), places, pixels(out))
    written = pixels(scratch), pixels(out), [address(g) for g in gradients]
    run.backward(0, False, *call, *map(pixels, (grad, x, hidden)), places, *written, 1 << 20)
print("finished")
"""
    done = host.run_alone("rcab", script, host.ADDRESS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "finished" in done.stdout
