"""Problems that break nearest-code searches, and their true answers: for tests of every backend, the soak run and the docs' table.

The truth is computed without any kernel of the package. A float64 matrix product gives scores |e|^2 / 2 - x . e with a bound on
their rounding; wherever several codes lie within it, they are compared by the reference's direct form. Rows that are not
finite, and all rows where a code is not, go to the reference itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsr.kernels.vq_nearest import reference

#: (generator, rows, codes, channels) -> x (n, d) and codebook (k, d) in float32
Draw = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor]]


def _normal(g: torch.Generator, n: int, d: int) -> Tensor:
    return torch.randn((n, d), generator=g)


def _integers(g: torch.Generator, high: int, n: int) -> Tensor:
    return torch.randint(high, (n,), generator=g)


def gaussian(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return _normal(g, n, d), _normal(g, k, d)


def kmeans(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Codes in the middle of the rows that they stand for."""
    codes = _normal(g, k, d)
    return codes[_integers(g, k, n)] + 0.3 * _normal(g, n, d), codes


def uniform_init(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """The usual initialisation of a codebook, 1/K small beside the rows."""
    return _normal(g, n, d), (torch.rand((k, d), generator=g) * 2 - 1) / k


def offset_10(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codes = gaussian(g, n, k, d)
    return x + 10, codes + 10


def offset_1000(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codes = gaussian(g, n, k, d)
    return x + 1000, codes + 1000


def clusters(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Two far apart: no common offset brings both near zero."""
    x, codes = gaussian(g, n, k, d)
    return x + 300 * (_integers(g, 2, n)[:, None] * 2 - 1), codes + 300 * (_integers(g, 2, k)[:, None] * 2 - 1)


def duplicates(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Every code several times, at distances that fall into the same and into different vector lanes."""
    codes = _normal(g, max(1, k // 4), d)
    return _normal(g, n, d), torch.cat([codes, codes.flip(0), codes, codes, codes, codes, codes])[:k].contiguous()


def integers(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """A coarse grid: sums are exact, and ties abound."""
    return _integers(g, 5, n * d).view(n, d).float() - 2, _integers(g, 5, k * d).view(k, d).float() - 2


def near_ties(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Codes that differ by one unit in the last place of one channel; rows that are permuted codes."""
    codes = _normal(g, 1, d).expand(k, d).clone()
    bits = codes.view(torch.int32)
    bits[torch.arange(k), _integers(g, d, k)] += _integers(g, 3, k).to(torch.int32) - 1
    x = codes[_integers(g, k, n)].flip(1)
    x[: n // 2] = 0
    return x.contiguous(), codes


def zeros(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows of zeros; half of the codes are zero, too, with either sign."""
    x, codes = gaussian(g, n, k, d)
    x[::2] = 0
    codes[::2] = 0
    codes[::4] *= -1
    return x, codes


def all_equal(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return _normal(g, n, d), torch.zeros(k, d)


def denormals(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Products and squares vanish in float32, and the values themselves are denormal."""
    x, codes = gaussian(g, n, k, d)
    x[::3] *= 1e17
    return x * 1e-40, codes * 1e-40


def small(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Normal values whose products are denormal."""
    x, codes = gaussian(g, n, k, d)
    return x * 1e-22, codes * 1e-22


def huge(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Squares and sums overflow in float32."""
    x, codes = gaussian(g, n, k, d)
    x[::3] *= 1e-19
    return (x * 6e37).clamp(-3e38, 3e38), (codes * 6e37).clamp(-3e38, 3e38)


def far(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows so far away that even float64 distances are equal."""
    x, codes = gaussian(g, n, k, d)
    return x * torch.logspace(4, 20, n)[:, None], codes


def scales(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Every row and code with a magnitude of its own."""
    x, codes = gaussian(g, n, k, d)
    return x * torch.exp2(12 * _normal(g, n, 1)), codes * torch.exp2(6 * _normal(g, k, 1))


def infinite_rows(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codes = gaussian(g, n, k, d)
    x[torch.arange(n), _integers(g, d, n)] *= torch.tensor([1.0, torch.inf])[_integers(g, 2, n)]
    return x, codes


def infinite_codes(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows with infinities as well: their difference is NaN."""
    codes, x = infinite_rows(g, k, n, d)
    x[0] = torch.inf
    x[1:2] = -torch.inf
    return x, codes


def nan_rows(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codes = gaussian(g, n, k, d)
    x[::3, 0] = torch.nan
    return x, codes


def nan_codes(g: torch.Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    x, codes = gaussian(g, n, k, d)
    codes[k // 3, d // 2] = torch.nan
    codes[k // 2, 0] = torch.nan
    return x, codes


DISTRIBUTIONS: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        *(gaussian, kmeans, uniform_init, offset_10, offset_1000, clusters, duplicates, integers, near_ties, zeros, all_equal),
        *(denormals, small, huge, far, scales, infinite_rows, infinite_codes, nan_rows, nan_codes),
    )
}

#: (K, D): from one code and one channel to sizes that no tile divides.
SHAPES = ((512, 64), (1, 1), (33, 17), (1024, 32), (100, 3), (2, 130), (1000, 8), (256, 256), (65, 1), (7, 1024), (4096, 16), (16, 9))

#: For a few rows only.
LARGEST = (65536, 1024)

#: Float16 would turn these into others.
NOT_IN_FLOAT16 = ("denormals", "small", "huge", "far", "scales")


@dataclass(frozen=True)
class Problem:
    """Rows and a codebook, drawn anew from the same seed each time."""

    distribution: str
    n: int
    k: int
    d: int
    dtype: torch.dtype = torch.float32
    cosine: bool = False
    seed: int = 0

    def __str__(self) -> str:
        metric = "-cosine" if self.cosine else ""
        return f"{self.distribution}-{self.n}x{self.k}x{self.d}-{str(self.dtype)[6:]}{metric}"

    @property
    def metric(self) -> str:
        """As `ops.vq_nearest` takes it."""
        return "cosine" if self.cosine else "euclidean"

    def tensors(self) -> tuple[Tensor, Tensor]:
        """x (n, d) and codebook (k, d)."""
        generator = torch.Generator().manual_seed(self.seed)
        x, codes = DISTRIBUTIONS[self.distribution](generator, self.n, self.k, self.d)
        return x.to(self.dtype), codes.to(self.dtype)

    def first_wrong(self, search: Callable[[Tensor, Tensor], Tensor]) -> str | None:
        """None if every index of `search(x, codebook)` is the true one, else what is wrong with the first that is not."""
        x, codes = self.tensors()
        found, truth = search(x, codes), true_indices(x, codes, self.cosine)
        wrong = (found != truth).nonzero()[:, 0]
        if not len(wrong):
            return None
        row = int(wrong[0])
        return f"{self}: {len(wrong)} of {self.n} indices wrong; row {row} has {int(found[row])}, expected {int(truth[row])}"


def problems(rows: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,), shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Problem]:
    """About `rows` rows over all distributions, in turn with shapes, dtypes and metrics; costly shapes get fewer rows."""
    turns: Iterator[tuple[int, int]] = itertools.cycle(shapes)
    pairs = [(name, dtype, cosine) for cosine in (False, True) for dtype in dtypes for name in DISTRIBUTIONS]
    pairs = [p for p in pairs if not (p[1] == torch.float16 and p[0] in NOT_IN_FLOAT16)]
    chosen = []
    for seed, (name, dtype, cosine) in enumerate(pairs):
        if seed % len(DISTRIBUTIONS) == 0:
            next(turns)  # so that a distribution meets other shapes in the next dtype
        chosen.append((name, *next(turns), dtype, cosine, seed))
    costs = [(k * d + 2000) ** -0.5 for _, k, d, *_ in chosen]
    return [
        Problem(name, max(8, round(rows * cost / sum(costs))), k, d, dtype, cosine, seed)
        for cost, (name, k, d, dtype, cosine, seed) in zip(costs, chosen, strict=True)
    ]


def true_indices(x: Tensor, codes: Tensor, cosine: bool = False) -> Tensor:
    """What `ops.vq_nearest` must return for x (n, d) and codes (k, d)."""
    x, codes = (reference._lanes(t, cosine) for t in (x, codes))
    if not codes.isfinite().all():
        return reference._nearest_of_all(x, codes)[0]
    finite = x.isfinite().flatten(1).all(1)
    indices = torch.zeros(len(x), dtype=torch.int64)
    if not finite.all():
        indices[~finite] = reference._nearest_of_all(x[~finite], codes)[0]
    indices[finite] = _among_finite(x[finite], codes)
    return indices


def _among_finite(x: Tensor, codes: Tensor, at_once: int = 1 << 23) -> Tensor:
    rows, columns = x.flatten(1), codes.flatten(1)
    half = 0.5 * columns.square().sum(1)
    largest_half, largest = half.amax(), (2 * half.amax()).sqrt()
    step = max(1, at_once // len(codes))
    indices = torch.empty(len(x), dtype=torch.int64)
    for begin in range(0, len(x), step):
        part = rows[begin : begin + step]
        norms = part.square().sum(1).sqrt()
        scores = torch.addmm(half, part, columns.T, alpha=-1)
        # Of the scores, and of the distances in which the truth is defined; denormal products are too small to matter in float64
        # for float32 data, whose squares stay above 2^-298.
        bound = (part.shape[1] + 8) * 2.0**-52 * (norms.square() / 2 + largest_half + norms * largest)
        smallest, index = scores.min(1)
        limit = (smallest + 2 * bound)[:, None]
        near = scores <= limit
        several = near.sum(1) > 1
        index[several] = _by_direct_form(x[begin : begin + step][several], codes, near[several])
        indices[begin : begin + step] = index
    return indices


def _by_direct_form(x: Tensor, codes: Tensor, near: Tensor, at_once: int = 1 << 18) -> Tensor:
    """The nearest of each row's candidates, the lowest index among equals."""
    row, code = near.nonzero(as_tuple=True)
    step = max(1, at_once // codes[0].numel())
    parts = zip(row.split(step), code.split(step), strict=True)
    distances = torch.cat([reference._sum_of_squares(x[r] - codes[c]) for r, c in parts]) if len(row) else x.new_empty(0)
    smallest = x.new_full((len(x),), torch.inf).scatter_reduce(0, row, distances, "amin")
    code = torch.where(distances == smallest[row], code, near.shape[1])
    return code.new_full((len(x),), near.shape[1]).scatter_reduce(0, row, code, "amin")


#: What people write instead, for the docs' table: name -> search(x, codebook).
EAGER_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x^2 - 2 x e + e^2": lambda x, e: (x.square().sum(1, keepdim=True) - 2 * x @ e.T + e.square().sum(1)).argmin(1),
    "e^2 - 2 x e": lambda x, e: (e.square().sum(1) - 2 * x @ e.T).argmin(1),
    "torch.cdist": lambda x, e: torch.cdist(x, e).argmin(1),
    "direct form": lambda x, e: torch.cat([(p[:, None] - e).square().sum(2).argmin(1) for p in x.split(max(1, (1 << 24) // e.numel()))]),
}


@functools.cache
def largest_problem(dtype: torch.dtype, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """x, codebook and true indices at `LARGEST`; kept, since drawing it takes seconds."""
    x, codes = Problem("gaussian", rows, *LARGEST, dtype).tensors()
    return x, codes, true_indices(x, codes)
