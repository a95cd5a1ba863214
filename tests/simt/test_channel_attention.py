"""The text of csrc/cuda/channel_attention.cuh on the CPU, and of the form for clusters: the op as users call it, with the shim in the
native library's place."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastsr import backends, ops
from fastsr.kernels.channel_attention import compiled, reference
from tests.harness import ALL_DTYPES, DEVICE, Case, assert_twice_eager, laid_out
from tests.ops.test_channel_attention import CASES, OPTIONS, arguments, drawn, flat
from tests.simt import host

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the shim runs kernels on CPU tensors")

NAMES = ["x", "down_weight", "down_bias", "up_weight", "up_bias", "residual"]


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def view(t: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return address(t), (0,) * 4 if t is None else tuple(t.stride())


class Shim:
    """`compiled.forward_into` and `backward_into`, as csrc/cuda/channel_attention.cu hands their arguments on."""

    schedule, clusters = 0, False

    def call(self, x: Tensor, others: list, parameters: list, scale: float, gate: str, activation: str) -> tuple:
        """The kernels of x's dtype, the shape and the gate's call."""
        pictures = [t for t in (x, *others) if t is not None]
        planes = all((t.shape[3] <= 1 or t.stride(3) == 1) and (t.shape[2] <= 1 or t.stride(2) == t.shape[3]) for t in pictures)
        pixels = all(t.shape[1] <= 1 or t.stride(1) == 1 for t in pictures)
        assert pixels or planes
        shape = (*x.shape, not pixels or (planes and x.shape[1] == 1), scale)
        up_weight = parameters[2]
        squeezed = up_weight.numel() // up_weight.shape[0]
        gate_call = (squeezed, compiled.GATES[gate], compiled.ACTIVATIONS[activation], [address(p) for p in parameters])
        return getattr(host.module("channel_attention"), str(x.dtype)[6:]), shape, gate_call

    def forward_into(self, out, pooled, gates, x, residual, *rest) -> None:
        if x.numel() == 0:
            return
        kernels, shape, gate = self.call(x, [residual, out], list(rest[:4]), *rest[4:])
        kernels.forward(self.schedule, self.clusters, shape, gate, view(x), view(residual), view(out), address(pooled), address(gates))

    def backward_into(self, dx, gradients, grad, x, pooled, gates, *rest) -> None:
        kernels, shape, gate = self.call(x, [grad, dx], [*rest[:3], None], *rest[3:])
        addresses = [address(g) for g in gradients]
        kernels.backward(self.schedule, shape, gate, view(grad), view(x), address(pooled), address(gates), view(dx), addresses)


@pytest.fixture(autouse=True)
def shim(monkeypatch) -> Shim:
    """In place of the native library, which need not be there."""
    shim = Shim()
    monkeypatch.setattr(compiled, "forward_into", shim.forward_into)
    monkeypatch.setattr(compiled, "backward_into", shim.backward_into)
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    return shim


def rows_apart(x: Tensor) -> Tensor:
    """Channels-last, with a gap after each row."""
    return laid_out(torch.nn.functional.pad(x, (2, 6, 1, 1)), "channels_last")[:, :, 1:-1, 2:-6]


def ours(*args, **options):
    return ops.channel_attention(*args, **options, backend="compiled")


@pytest.mark.parametrize(("case", "options", "residual_layout"), CASES, ids=[f"{c}-{o[1]}-{o[2]}-{o[0]}" for c, o, _ in CASES])
def test_output_and_gradients_are_as_good_as_eager(case, options, residual_layout):
    assert_twice_eager(
        fused=flat(ours, options),
        eager=flat(reference.channel_attention, options),
        args=drawn(case, options, residual_layout),
        grad=case.gradient_like,
        names=NAMES,
    )


#: Many strips, many columns of channels, rows with gaps, planes of one strip and of several, the gate in either place.
LARGE = (
    ((2, 20, 47, 31), "row_slice", OPTIONS[0]),
    ((1, 64, 40, 41), "channels_last", OPTIONS[4]),
    ((2, 600, 5, 6), "channels_last", OPTIONS[2]),
    ((1, 300, 9, 7), "nchw", OPTIONS[0]),
    ((1, 2, 110, 96), "nchw", OPTIONS[3]),
    ((1, 1, 64, 60), "channels_last", OPTIONS[0]),
    ((2, 4, 33, 31), "channel_slice", OPTIONS[0]),
)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("size", "layout", "options"), LARGE, ids=[f"{'x'.join(map(str, s))}-{name}" for s, name, _ in LARGE])
def test_large_images(size, layout, options, dtype):
    case = Case(size, dtype, "nchw", "plain")
    args = drawn(case, options, "channels_last" if layout != "nchw" else "nchw")
    args[0] = rows_apart(args[0]) if layout == "row_slice" else laid_out(args[0], layout)
    assert_twice_eager(flat(ours, options), flat(reference.channel_attention, options), args, case.gradient_like, NAMES)


@pytest.mark.parametrize("clusters", [False, True], ids=["passes", "clusters"])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_the_schedule_does_not_change_a_bit(layout, clusters, shim):
    shim.clusters, results = clusters, []
    for shim.schedule in range(3):
        leaves = [t.detach().requires_grad_() for t in drawn(Case((2, 16, 20, 24), torch.float16, layout, "plain"), OPTIONS[0], layout)]
        y = flat(ours, OPTIONS[0])(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y.float().sin().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("clusters", [False, True], ids=["passes", "clusters"])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_an_image_does_not_depend_on_its_batch(layout, clusters, shim):
    shim.clusters = clusters
    args = arguments(torch.bfloat16, (5, 24, 20, 26))
    x, residual = (laid_out(args[i], layout) for i in (0, 5))
    together = ours(x, *args[1:5], residual)
    for n in range(5):
        assert torch.equal(together[n : n + 1], ours(x[n : n + 1], *args[1:5], residual[n : n + 1]))


#: An eighth of the pixels or of the channels for each block; fewer of them than blocks; one item a thread and many.
CLUSTERED = (
    ((2, 64, 24, 24), torch.bfloat16, "channels_last", OPTIONS[0]),
    ((1, 64, 40, 41), torch.float32, "channels_last", OPTIONS[4]),
    ((3, 120, 9, 8), torch.float32, "channels_last", OPTIONS[3]),
    ((2, 8, 1, 3), torch.float16, "channels_last", OPTIONS[2]),
    ((1, 32, 65, 100), torch.float16, "channels_last", OPTIONS[1]),
    ((2, 64, 24, 24), torch.bfloat16, "nchw", OPTIONS[0]),
    ((1, 20, 16, 13), torch.float32, "nchw", OPTIONS[4]),
    ((2, 3, 50, 60), torch.float16, "nchw", OPTIONS[1]),
    ((1, 256, 4, 4), torch.bfloat16, "nchw", OPTIONS[3]),
    ((2, 16, 10, 31), torch.bfloat16, "row_slice", OPTIONS[2]),
)


@pytest.mark.parametrize(("size", "dtype", "layout", "options"), CLUSTERED, ids=[f"{'x'.join(map(str, c[0]))}-{c[2]}" for c in CLUSTERED])
def test_a_cluster_keeps_an_image(size, dtype, layout, options, shim):
    shim.clusters = True
    case = Case(size, dtype, "nchw", "plain")
    args = drawn(case, options, "nchw" if layout == "nchw" else "channels_last")
    args[0] = rows_apart(args[0]) if layout == "row_slice" else laid_out(args[0], layout)
    kernels, shape, gate = shim.call(args[0], [args[5]], args[1:5], 1.0, "sigmoid", "relu")
    assert kernels.cut(shape, gate, [view(args[0]), view(args[5])])[6] > 0, "it does not fit"
    assert_twice_eager(flat(ours, options), flat(reference.channel_attention, options), args, case.gradient_like, NAMES)


def test_a_cluster_is_for_images_that_fit(shim):
    for fits, dtype, size, layout in (
        (True, torch.bfloat16, (1, 64, 48, 48), "channels_last"),
        (True, torch.float32, (1, 64, 48, 48), "nchw"),
        (True, torch.bfloat16, (1, 64, 112, 112), "channels_last"),
        (False, torch.bfloat16, (1, 64, 128, 128), "channels_last"),
        (False, torch.bfloat16, (1, 180, 16, 16), "channels_last"),  # no units of 16 bytes
        (False, torch.float32, (1, 64, 16, 16), "misaligned"),
        (False, torch.float32, (1, 264, 8, 8), "nchw"),
    ):
        x, *parameters, _ = arguments(dtype, size, 4)
        x = laid_out(x, layout)
        kernels, shape, gate = shim.call(x, [], parameters, 1.0, "sigmoid", "relu")
        assert (kernels.cut(shape, gate, [view(x)])[6] > 0) is fits, (size, layout)


@pytest.mark.parametrize("layout", ["channels_last", "nchw", "misaligned"])
def test_out_may_be_x_or_residual(layout, shim):
    for alias, shim.clusters in itertools.product((0, 5), (False, True)):
        args = [laid_out(t, layout) if t.dim() == 4 else t for t in arguments(torch.float32, (2, 8, 16, 17))]
        expected = ours(*args)
        with torch.no_grad():
            assert ours(*args, out=args[alias]) is args[alias]
        assert torch.equal(args[alias], expected)


def test_only_the_gradients_asked_for():
    args = arguments(torch.float32)
    truth = torch.autograd.grad(reference.channel_attention(*(t.requires_grad_() for t in args)).square().sum(), args)
    for wanted in ({0}, {5}, {1, 4}, {3}, {0, 1, 2, 3, 4, 5}):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(args)]
        ours(*leaves).square().sum().backward()
        for i, t in enumerate(leaves):
            assert (t.grad is not None) == (i in wanted)
            if i in wanted:
                torch.testing.assert_close(t.grad, truth[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_go_where_eager_lets_them(bad, shim):
    for options, shim.clusters in itertools.product(OPTIONS, (False, True)):
        args = drawn(Case((3, 8, 6, 7), torch.float32, "channels_last", "plain", seed=3), options, "nchw")
        args[0][1, 2, 3, 4] = bad
        torch.testing.assert_close(flat(ours, options)(*args), flat(reference.channel_attention, options)(*args), equal_nan=True)


def test_half_pictures_are_summed_in_float32():
    x, *rest = arguments(torch.float16, (1, 4, 60, 61), 2)
    x = (x.abs() * 100 + 20000).requires_grad_()
    y = ours(x, *rest)
    assert y.isfinite().all()
    y.float().mean().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("channels", "dtype", "layout", "width", "unit"),
    [
        (64, torch.bfloat16, "channels_last", 6, 8),
        (180, torch.bfloat16, "channels_last", 6, 4),  # HAT: 16-byte loads would begin at 360 bytes
        (180, torch.float32, "channels_last", 6, 4),
        (64, torch.float16, "misaligned", 6, 1),
        (64, torch.float16, "channel_slice", 6, 1),
        (6, torch.bfloat16, "channels_last", 6, 1),
        (6, torch.bfloat16, "nchw", 8, 8),
        (6, torch.bfloat16, "nchw", 6, 4),
        (6, torch.float32, "nchw", 7, 1),
    ],
)
def test_loads_are_as_wide_as_every_picture_allows(channels, dtype, layout, width, unit, shim):
    x, *parameters, _ = arguments(dtype, (2, channels, 6, width))
    x = laid_out(x, layout)
    kernels, shape, gate = shim.call(x, [], parameters, 1.0, "sigmoid", "relu")
    assert kernels.cut(shape, gate, [view(x)])[0] == unit
    assert kernels.cut(shape, gate, [view(x), (x.data_ptr() + x.element_size(), x.stride())])[0] == 1


def test_rcan_computes_its_gate_inside_the_second_pass_and_larger_images_before(shim):
    for dtype, size, inside in (
        (torch.bfloat16, (2, 64, 48, 48), True),
        (torch.float32, (2, 64, 48, 48), True),
        (torch.float32, (1, 64, 256, 256), False),
        (torch.bfloat16, (1, 512, 4, 4), False),
    ):
        x, *parameters, _ = arguments(dtype, size, 4)
        x = laid_out(x, "channels_last")
        kernels, shape, gate = shim.call(x, [], parameters, 1.0, "sigmoid", "relu")
        cut = kernels.cut(shape, gate, [view(x)])
        assert cut[5] is inside
        assert cut[2] * cut[3] <= 512


def test_the_address_sanitizer_finds_no_overrun():
    """Buffers of exactly the size that the arguments span."""
    script = """
def address(a): return a.ctypes.data
rng = numpy.random.default_rng(0)
for clusters, (name, kind), (c, r, h, w), planar in [(clusters, *case) for clusters in (False, True) for case in [
    (("float32", "f4"), (3, 2, 3, 17), False), (("bfloat16", "u2"), (20, 1, 7, 9), False), (("bfloat16", "u2"), (3, 2, 7, 9), True),
    (("float32", "f4"), (2, 1, 40, 64), True), (("float32", "f4"), (64, 4, 3, 3), False), (("float16", "u2"), (272, 17, 2, 1), False),
    (("bfloat16", "u2"), (64, 4, 5, 8), True),
]]:
    def make(*shape):
        a = rng.standard_normal(shape).astype("f4")
        return a if kind == "f4" else (a.view("u4") >> 16).astype("u2")
    strides = (c * h * w, h * w, w, 1) if planar else (c * h * w, 1, w * c, c)
    pictures = [make(2 * c * h * w) for _ in range(4)]
    views = [(address(a), strides) for a in pictures]
    weights, gradients = ([make(r, c), make(r), make(c, r), make(c)] for _ in range(2))
    p, s = (rng.standard_normal((2, c)).astype("f4") for _ in range(2))
    call = (r, 1, 0, [address(a) for a in weights])
    shape = (2, c, h, w, planar, 0.5)
    run = getattr(channel_attention, name)
    run.forward(0, clusters, shape, call, *views[:3], address(p), address(s))
    run.backward(0, shape, call, views[0], views[1], address(p), address(s), views[3], [address(a) for a in gradients])
print("finished")
"""
    done = host.run_alone("channel_attention", script, host.ADDRESS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "finished" in done.stdout
