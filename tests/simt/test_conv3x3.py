"""The text of csrc/cuda/conv3x3.cuh on the CPU, against plain PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from fastsr.kernels.conv3x3 import reference
from tests.harness import ALL_DTYPES, DEVICE, Case, assert_close_as_eager, random_tensor
from tests.simt import host
from tests.simt.far import apart

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")

CHANNELS = ((1, 1), (3, 64), (12, 12), (64, 3), (64, 32), (96, 64), (33, 96), (180, 20))
SIZES = ((1, 1), (2, 3), (5, 7), (9, 17), (17, 18))
LAYOUTS = ("channels_last", "channel_slice", "misaligned", "expanded", "permuted")  # all with the channels side by side


@dataclass(frozen=True)
class Options:
    """Everything but x and weight; `out` is how the output lies: alone, or a slice of a workspace at an offset."""

    bias: bool = True
    residual: bool = False
    negative_slope: float = 1.0
    scale: float = 1.0
    upsample: int = 1
    pixel_shuffle: int = 1
    out: str = "alone"
    weight: str = "oihw"

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return "-".join(f"{name}-{value}" for name, value in changed.items()).replace(" ", "-") or "plain"


OPTIONS = (
    Options(),
    Options(negative_slope=0.2, out="aligned slice"),
    Options(residual=True, scale=0.2, negative_slope=0.0),
    Options(upsample=2, negative_slope=0.2, out="odd slice", weight="channels_last"),
    Options(bias=False, residual=True, out="aligned slice", weight="transposed"),
    Options(pixel_shuffle=2, residual=True, negative_slope=0.0, scale=-0.5),
    Options(upsample=2, pixel_shuffle=2, out="odd slice"),
)


def workspace(shape: tuple[int, int, int, int], dtype: torch.dtype, how: str) -> tuple[Tensor, Tensor]:
    """(workspace full of sevens, the slice of it that is to be written)."""
    n, c, h, w = shape
    before, behind = {"alone": (0, 0), "aligned slice": (16, 16 + -c % 16), "odd slice": (3, 2)}[how]
    whole = torch.full((n, before + c + behind, h, w), 7.0, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return whole, whole[:, before : before + c]


def convolve(
    kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, o: Options, seed: int
) -> Tensor:
    """Run the kernel's text: "bfloat16", "bfloat16 wgmma", "tf32" and so on; `out` is written in place."""

    def pixels(t: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if t is None else (t.stride(0), t.stride(2), t.stride(3))

    n, cin, h, w = x.shape
    dtype, _, engine = kernel.replace("tf32", "float32").partition(" ")
    getattr(host.module("conv3x3"), dtype)(
        seed, kernel == "tf32", engine == "wgmma", *(0 if t is None else t.data_ptr() for t in (x, weight, bias, residual, out)),
        pixels(x), weight.stride(), 0 if bias is None else bias.stride(0), pixels(residual), pixels(out),
        n, cin, weight.shape[0], h * o.upsample, w * o.upsample, o.upsample, o.pixel_shuffle, o.negative_slope, o.scale,
    )  # fmt: skip
    return out


def inputs(case: Case, cout: int, o: Options) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, weight, bias and residual."""
    n, cin, h, w = case.size
    r = o.pixel_shuffle
    weight = case.parameter(cout, cin, 3, 3)
    if o.weight == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif o.weight == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    bias = random_tensor((cout, 2), case.dtype, 5)[:, 1] if o.bias else None  # stride 2
    shape = (n, cout // r**2, h * o.upsample * r, w * o.upsample * r)
    residual = random_tensor(shape, case.dtype, 6).contiguous(memory_format=torch.channels_last) if o.residual else None
    return case.input(), weight, bias, residual


def check(case: Case, cout: int, o: Options, kernel: str, seed: int) -> None:
    x, weight, bias, residual = inputs(case, cout, o)
    keywords = {"negative_slope": o.negative_slope, "scale": o.scale, "upsample": o.upsample, "pixel_shuffle": o.pixel_shuffle}
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    truth = reference.conv3x3(*wide, **keywords)  # type: ignore[arg-type]
    plain = reference.conv3x3(x, weight, bias, residual, **keywords)
    whole, out = workspace(tuple(plain.shape), case.dtype, o.out)  # type: ignore[arg-type]
    convolve(kernel, x, weight, bias, residual, out, o, seed)
    ours = out.clone()
    assert_close_as_eager("output", ours, plain, truth, planes=True)
    out.fill_(7.0)
    assert (whole == 7.0).all(), "the kernel wrote outside of its slice"


def cases() -> list[tuple[Case, int, Options]]:
    """Every channel pair in every dtype; sizes, layouts and options rotate through the list."""
    sizes, layouts, options, batches = (itertools.cycle(v) for v in (SIZES, LAYOUTS, OPTIONS, (1, 2, 3)))
    listed = []
    for dtype, (cin, cout), _ in itertools.product(ALL_DTYPES, CHANNELS, range(3)):
        o = next(options)
        rounded = -(-cout // o.pixel_shuffle**2) * o.pixel_shuffle**2
        size = next(sizes)
        if cin * cout > 4000:
            size = (min(size[0], 5), min(size[1], 7))
        listed.append((Case((next(batches), cin, *size), dtype, next(layouts), "plain", len(listed)), rounded, o))
    return listed


@pytest.mark.parametrize(("case", "cout", "options"), cases(), ids=str)
def test_forward_is_as_good_as_eager(case, cout, options):
    check(case, cout, options, str(case.dtype)[6:], seed=case.seed)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_pixel_shuffle_by_four_to_three_channels(dtype):
    """Runs of channels cross from one pixel into the next."""
    check(Case((1, 20, 3, 4), dtype, "channels_last", "plain"), 48, Options(pixel_shuffle=4, residual=True), str(dtype)[6:], seed=1)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_the_schedule_does_not_change_a_bit(dtype):
    case, o = Case((2, 40, 6, 18), dtype, "channel_slice", "plain"), Options(negative_slope=0.1)
    arguments = inputs(case, 32, o)
    first, *others = (convolve(str(dtype)[6:], *arguments, workspace((2, 32, 6, 18), dtype, "alone")[1], o, seed) for seed in range(8))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kernel", ["float32", "tf32", "bfloat16", "bfloat16 wgmma"])
def test_offsets_are_counted_in_64_bits(kernel):
    dtype = torch.bfloat16 if "bfloat16" in kernel else torch.float32
    case, o = Case((2, 16, 5, 7), dtype, "channels_last", "plain"), Options(residual=True)
    x, weight, bias, residual = inputs(case, 32, o)
    near = convolve(kernel, x, weight, bias, residual, workspace((2, 32, 5, 7), dtype, "alone")[1], o, 0)
    far = convolve(kernel, apart(x), weight, bias, apart(residual), apart(torch.zeros_like(near)), o, 0)
    assert torch.equal(near, far)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_pixel_does_not_depend_on_the_picture_around_its_neighbourhood(dtype):
    case, o = Case((1, 24, 20, 21), dtype, "channels_last", "plain"), Options()
    x, weight, bias, _ = inputs(case, 32, o)
    whole = convolve(str(dtype)[6:], x, weight, bias, None, workspace((1, 32, 20, 21), dtype, "alone")[1], o, 0)
    part = x[:, :, 7:14, 9:20]
    cut = convolve(str(dtype)[6:], part, weight, bias, None, workspace((1, 32, 7, 11), dtype, "alone")[1], o, 0)
    assert torch.equal(whole[:, :, 8:13, 10:19], cut[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_nan_passes_through_the_activation(dtype, slope):
    case, o = Case((1, 16, 5, 5), dtype, "channels_last", "plain"), Options(negative_slope=slope)
    x, weight, bias, _ = inputs(case, 16, o)
    x = x.clone(memory_format=torch.preserve_format)
    x[0, 3, 2, 2] = torch.nan
    y = convolve(str(dtype)[6:], x, weight, bias, None, workspace((1, 16, 5, 5), dtype, "alone")[1], o, 0)
    near = torch.zeros(5, 5, dtype=torch.bool)
    near[1:4, 1:4] = True
    assert torch.equal(y.isnan(), near.expand_as(y))


def test_no_images_launch_nothing():
    x, o = torch.empty(0, 8, 5, 6).contiguous(memory_format=torch.channels_last), Options()
    convolve("float32", x, random_tensor((4, 8, 3, 3), torch.float32, 0), None, None, torch.empty(0, 4, 5, 6), o, 0)


@pytest.mark.parametrize(("cin", "cout"), [(3, 64), (64, 32), (20, 3)])
def test_tf32_products_have_the_error_of_eleven_bits(cin, cout):
    case, o = Case((2, cin, 5, 18), torch.float32, "channels_last", "plain"), Options(negative_slope=0.2)
    x, weight, bias, _ = inputs(case, cout, o)
    y = convolve("tf32", x, weight, bias, None, workspace((2, cout, 5, 18), torch.float32, "alone")[1], o, 0)
    truth = reference.conv3x3(x.double(), weight.double(), bias.double(), negative_slope=0.2)  # type: ignore[union-attr]
    magnitude = reference.conv3x3(x.double().abs(), weight.double().abs(), bias.double().abs())  # type: ignore[union-attr]
    assert ((y - truth).abs() <= 2.1 * 2.0**-11 * magnitude).all()
    assert (y - truth).abs().max() > 2.0**-18, "the products were not tf32's"


def test_the_address_sanitizer_finds_no_overrun():
    """Buffers of exactly the size that the arguments span; the first and last byte of each is at an allocation's edge."""
    script = """
import itertools
def address(a): return a.ctypes.data
rng = numpy.random.default_rng(0)
cases = [(3, 12, 5, 7, 1, 1), (64, 3, 2, 3, 2, 1), (20, 48, 3, 5, 1, 4), (16, 64, 3, 18, 1, 1), (33, 32, 17, 2, 1, 2)]
for (name, kind), (cin, cout, h, w, up, r), extra in itertools.product([("float32", "f4"), ("bfloat16", "u2")], cases, (0, 8)):
    def make(*shape):
        a = rng.standard_normal(shape).astype("f4")
        return a if kind == "f4" else (a.view("u4") >> 16).astype("u2")
    H, W, C = h * up, w * up, cout // r**2
    pitch, out_pitch = cin + extra, C + extra  # a channel prefix: the last pixel ends before its workspace row does
    x, out = make(2 * h * w * pitch - extra), make(2 * H * r * W * r * out_pitch - extra)
    weight, bias, residual = make(cout * cin * 9), make(cout), make(2 * H * r * W * r * C)
    getattr(conv3x3, name)(0, False, False, address(x), address(weight), address(bias), address(residual), address(out),
        (h * w * pitch, w * pitch, pitch), (cin * 9, 9, 3, 1), 1, (H * r * W * r * C, W * r * C, C),
        (H * r * W * r * out_pitch, W * r * out_pitch, out_pitch),
        2, cin, cout, H, W, up, r, 0.2, 1.0)
print("finished")
"""
    done = host.run_alone("conv3x3", script, host.ADDRESS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "finished" in done.stdout


@pytest.mark.parametrize("engine", ["", " wgmma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("o", OPTIONS, ids=str)
def test_float32_parameters_give_what_rounding_them_before_gives(o, dtype, engine):
    case = Case((2, 40 if engine else 33, 5, 7), torch.float32, "channels_last", "plain")
    x, weight, bias, residual = inputs(case, 36, o)
    x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    r = o.pixel_shuffle
    shape = (2, 36 // r**2, 5 * o.upsample * r, 7 * o.upsample * r)
    calls = host.module("conv3x3").wgmma_calls
    calls()
    results = []
    for kernel, w, b in (("_wide", weight, bias), ("", weight.to(dtype), None if bias is None else bias.to(dtype))):
        _, out = workspace(shape, dtype, o.out)
        results.append(convolve(str(dtype)[6:] + kernel + engine, x, w, b, residual, out, o, 0))
    assert torch.equal(*results)
    assert (calls() > 0) == (engine == " wgmma" and o.upsample == 1)
