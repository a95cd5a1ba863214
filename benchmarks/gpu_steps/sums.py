"""The statistics of vector quantisation and the codebook's gradient: sums of sorted rows, and by atomics (FASTSR_FAST_SUMS=1).

Codes are used alike, or one of them takes most rows, as in a fresh codebook. Both sums are compared with float64's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsr import ops
from fastsr.bench.cases.gpu_steps import common

SIZES = ((65536, 1024, 64), (16384, 8192, 256), (65536, 16, 64))
DTYPES = (torch.float32, torch.bfloat16)
VARIABLE = "FASTSR_FAST_SUMS"


def drawn(n: int, k: int, d: int, dtype: torch.dtype, crowded: bool) -> tuple[Tensor, Tensor]:
    """Rows and codes; crowded, all codes but the first are far from most rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, codes = (torch.randn((size, d), generator=generator, device="cuda") for size in (n, k))
    if crowded:
        codes[0], codes[1:] = 0, codes[1:] * 8
    return x.to(dtype), codes.to(dtype)


def forms(x: Tensor, codebook: Tensor) -> dict[str, Callable[[], Any]]:
    """Forward, and the codebook's gradient."""
    codes = codebook.requires_grad_()
    loss = ops.vector_quantize(x, codes, backend="compiled").codebook_loss
    return {
        "forward": lambda: ops.vector_quantize(x, codebook.detach(), backend="compiled"),
        "gradient": lambda: torch.autograd.grad(loss, codes, retain_graph=True)[0],
    }


def compare(n: int, k: int, d: int, dtype: torch.dtype, crowded: bool) -> dict[str, Any]:
    """Times of both, in turn, and their errors."""
    x, codebook = drawn(n, k, d, dtype, crowded)
    row: dict[str, Any] = {"n": n, "k": k, "d": d, "dtype": str(dtype)[6:], "crowded": crowded}
    calls = forms(x, codebook)
    for turn in range(2):
        for name, value in (("sorted", "0"), ("atomics", "1")):
            os.environ[VARIABLE] = value
            for form, call in calls.items():
                row.setdefault(form, {})[f"{name} {turn}"] = common.milliseconds(call, repeats=30)
            found = calls["forward"]()
            truth = torch.zeros((k, d), dtype=torch.float64, device="cuda").index_add_(0, found.indices, x.double())
            row.setdefault("errors", {})[name] = ((found.sums - truth).abs().max() / truth.abs().max()).item()
            if not torch.equal(found.counts, torch.bincount(found.indices, minlength=k)):
                raise SystemExit(f"sums: wrong counts by {name}: {row}")
    del os.environ[VARIABLE]
    if max(row["errors"].values()) > 1e-5:
        raise SystemExit(f"sums: wrong sums: {row}")
    return row


def main() -> None:
    result, _ = common.arguments()
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for dtype in DTYPES:
            for crowded in (False, True):
                rows.append(compare(*size, dtype, crowded))
                result.save(rows=rows)
                times = {form: {name: found["ms"] for name, found in rows[-1][form].items()} for form in ("forward", "gradient")}
                print(*size, dtype, "crowded" if crowded else "even", times, flush=True)


if __name__ == "__main__":
    main()
