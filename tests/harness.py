"""What every op's test uses: adversarial inputs, the twice-eager rule, and the backends that can run here.

The twice-eager rule: truth is the eager reference in float64. With e = max|y - truth| / max|truth|, a fused op
may have e <= 2 * e(eager in the same dtype) + 2 * eps(dtype), for its output and for every gradient. For images (the
output and the gradients of its shape or of the first argument's) the same holds for the worst single plane (image and
channel), each measured against its own largest value, so that a wrong border or a wrong channel cannot hide behind
larger values elsewhere. (A plane counts as no smaller than 1/16 of the tensor: one that holds a single value near zero
would measure cancellation, in which eager may be luckier, and not the kernel.)

FASTSR_TEST_DEVICE=cuda runs the same tests on a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsr import _native, backends

DEVICE = os.environ.get("FASTSR_TEST_DEVICE", "cpu")
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: How an (N, C, H, W) argument lies in memory.
LAYOUTS = ("nchw", "channels_last", "channel_slice", "permuted", "expanded", "misaligned")

#: How the gradient of the output arrives: as from a plain op, from `cat`, from `sum` (stride 0) and from `permute`.
GRADIENTS = ("plain", "cat", "sum", "permute")


@dataclass(frozen=True)
class Runner:
    """A backend, and for the compiled one on a CPU also its instruction set."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    @contextlib.contextmanager
    def active(self) -> Iterator[str]:
        """Inside the block the instruction set is forced; yields the backend's name."""
        with contextlib.nullcontext() if self.isa is None else _native.use_cpu_isa(self.isa):
            yield self.backend


def available_backends(op: str, device: str = DEVICE) -> list[Runner]:
    """The fused backends of `op` that can run on `device` in this process."""
    runners = []
    for backend in ("compiled", "triton"):
        if backends.why_not(op, backend, device, torch.float32) is None:
            isas = _native.cpu_isas() if backend == "compiled" and device == "cpu" else (None,)
            runners += [Runner(backend, isa) for isa in isas]
    return runners


@dataclass(frozen=True)
class Case:
    """One adversarial input: sizes, dtype, memory layout and the kind of gradient that comes back."""

    size: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str
    gradient: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))}-{str(self.dtype)[6:]}-{self.layout}-{self.gradient}"

    def input(self) -> Tensor:
        """The (N, C, H, W) argument in this case's layout."""
        return laid_out(random_tensor(self.size, self.dtype, self.seed), self.layout)

    def parameter(self, *shape: int, key: int = 0) -> Tensor:
        """A weight of this case's dtype, scaled by its fan-in so that outputs stay near 1."""
        fan_in = max(1, torch.Size(shape[1:]).numel())
        return random_tensor(shape, self.dtype, self.seed + 100 + key) / fan_in**0.5

    def gradient_like(self, y: Tensor) -> Tensor:
        """A gradient of y's shape as autograd hands it on from the op that this case names."""
        g = random_tensor(y.shape, y.dtype, self.seed + 1)
        if self.gradient == "cat":
            return torch.cat([g, g], 1)[:, : y.shape[1]]
        if self.gradient == "sum":
            return g.new_full((1,) * y.dim(), 0.75).expand(y.shape)
        if self.gradient == "permute":
            return g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        return g


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal, drawn in float32 so that all dtypes see the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(DEVICE, dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """`x` (or for "expanded" its first image, repeated) in another memory layout."""
    n, c, h, w = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channel_slice":  # a channel range of a larger channels-last workspace, at an odd offset
        workspace = torch.full((n, c + 5, h, w), torch.nan, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
        workspace[:, 3 : c + 3] = x
        return workspace[:, 3 : c + 3]
    if layout == "permuted":  # rows outermost
        return x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    if layout == "expanded":  # stride 0 over images
        return x[:1].contiguous(memory_format=torch.channels_last).expand(n, c, h, w)
    if layout == "misaligned":  # one element away from the allocation's start
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return flat[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
    return x.contiguous()


def adversarial_cases(
    channels: Iterable[int],
    dtypes: Iterable[torch.dtype] = ALL_DTYPES,
    images: Iterable[tuple[int, int]] = ((1, 1), (2, 3), (5, 7), (9, 16), (12, 31)),
) -> list[Case]:
    """The list that every op faces: each channel count and dtype with every layout and kind of gradient.

    Image sizes, batch sizes and kinds of gradient rotate through the list, so that each meets each layout
    somewhere without the full product.
    """
    sizes, batches, gradients = itertools.cycle(images), itertools.cycle((2, 1, 3)), itertools.cycle(GRADIENTS)
    cases = [
        Case((next(batches), c, *next(sizes)), dtype, layout, next(gradients), seed)
        for seed, (c, layout, dtype) in enumerate(itertools.product(channels, LAYOUTS, dtypes))
    ]
    empty = [Case((0, c, 5, 6), dtype, "channels_last", "plain") for c in list(channels)[:1] for dtype in dtypes]
    return cases + empty


def assert_twice_eager(
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    args: Sequence[Tensor | None],
    grad: Callable[[Tensor], Tensor] | None = None,
    names: Sequence[str] | None = None,
    case: Hashable | None = None,
) -> None:
    """`fused(*args)` obeys the twice-eager rule against `eager(*args)`; with `grad`, so do all gradients.

    `grad` makes the gradient of the output from the output. Arguments that are None stay None. Successive calls with the same
    `case`, which must tell `eager`, `args` and `grad` apart from all others, compute what eager gives once.
    """
    names = names or [f"argument {i}" for i in range(len(args))]
    truth, plain = _by_eager(eager, args, grad, case)
    ours = run(fused, args, grad, None)
    for name, t, p, o in zip(["output", *(f"gradient of {n}" for n in names)], truth, plain, ours, strict=False):
        if t is None:
            assert o is None, f"{name}: a gradient where eager has none"
            continue
        assert o is not None, f"{name}: missing"
        assert o.dtype == p.dtype, f"{name}: dtype {o.dtype}, eager has {p.dtype}"
        assert_close_as_eager(name, o, p, t, planes=t.shape in (args[0].shape, truth[0].shape))


#: The latest case, the bytes of its arguments, and what eager gave: in float64 and in the arguments' own dtype.
_latest: list[tuple[Hashable, list[bytes], tuple[list[Tensor | None], list[Tensor | None]]]] = []


def _by_eager(
    eager: Callable[..., Tensor], args: Sequence[Tensor | None], grad: Callable[[Tensor], Tensor] | None, case: Hashable | None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    seen = [str((t.shape, t.stride(), t.dtype)).encode() + _bytes(t) for t in args if t is not None] if case is not None else []
    if case is not None and _latest and _latest[0][0] == case:
        assert _latest[0][1] == seen, f"{case} names two calls with different arguments"
        return _latest[0][2]
    _latest.clear()
    found = run(eager, args, grad, torch.float64), run(eager, args, grad, None)
    if case is not None:
        _latest.append((case, seen, found))
    return found


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def run(
    function: Callable[..., Tensor], args: Sequence[Tensor | None], grad: Callable[[Tensor], Tensor] | None, dtype: torch.dtype | None
) -> list[Tensor | None]:
    """The output and, with `grad`, the gradients of all arguments; in `dtype` if one is given."""
    own = [None if a is None else _fresh(a, dtype).requires_grad_(grad is not None) for a in args]
    y = function(*own)
    if grad is None:
        return [y]
    low = grad(torch.empty_like(y, dtype=next(a for a in args if a is not None).dtype))
    y.backward(low if dtype is None else low.to(dtype))
    return [y.detach(), *(None if a is None else a.grad for a in own)]


def _fresh(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A leaf with a's values and, in its own dtype, also a's strides and offset."""
    return a.detach().to(dtype) if dtype is not None else a.detach()


def assert_close_as_eager(name: str, ours: Tensor, plain: Tensor, truth: Tensor, planes: bool = False) -> None:
    """The rule itself, for one tensor; with `planes` for its worst (image, channel) plane too."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}; expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    eps = torch.finfo(ours.dtype).eps
    for what, error in (("tensor", relative_error), ("worst plane", _worst_plane))[: 1 + planes]:
        e_ours, e_plain = error(ours, truth), error(plain, truth)
        bound = 2 * e_plain + 2 * eps
        assert e_ours <= bound, f"{name}: error of the {what} {e_ours:.3e}; eager has {e_plain:.3e}, so at most {bound:.3e}"


def relative_error(y: Tensor, truth: Tensor) -> float:
    scale = truth.abs().amax().item()
    return (y.double() - truth).abs().amax().item() / scale if scale else float(y.abs().amax())


def _worst_plane(y: Tensor, truth: Tensor) -> float:
    scale = truth.abs().amax((2, 3)).clamp_min(truth.abs().amax().item() / 16 or 1.0)
    return ((y.double() - truth).abs().amax((2, 3)) / scale).amax().item()
