"""Lloyd's k-means on the quantiser's own search: the start of a codebook, or centres for any rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr import ops
from fastsr.backends import Backend
from fastsr.nn.codebook import add_over_ranks, draw_rows


@torch.no_grad()
def kmeans(
    rows: Tensor,
    num_centres: int,
    iterations: int = 10,
    *,
    valid: Tensor | None = None,
    cosine: bool = False,
    sync: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Centres of `rows`, each head on its own.

        1. The centres are distinct random rows (`draw_rows`); all of one row again where there are fewer rows.
        2. `iterations` times: each row goes to its nearest centre, each centre to the mean of its rows; a centre without rows stays.

    Args:
        rows: (..., H, D), finite.  valid: (...) bool, or None for all.
        cosine: the rows are unit vectors, and the means are normalised.
        sync: over the rows of all ranks of torch.distributed, with the same result on each.

    Returns:
        (H, K, D) centres and (H, K) int64, the rows nearest to each in the last iteration (zeros without one).
    """
    heads = rows.shape[-2]
    counts = torch.zeros(heads, num_centres, dtype=torch.int64, device=rows.device)
    centres, found = draw_rows(rows, valid, torch.ones_like(counts, dtype=torch.bool), sync)
    # fewer rows than centres: the rest repeat what was drawn, and lose every tie to it
    drawn = found.sum(-1, keepdim=True).clamp(min=1)
    repeated = torch.arange(num_centres, device=rows.device) % drawn
    centres = centres.gather(1, repeated[..., None].expand_as(centres))
    rows = rows.to(centres.dtype)
    mask = None if valid is None else valid[..., None]
    for _ in range(iterations):
        batch = ops.vector_quantize(rows, centres, mask=mask, backend=backend)
        counts, sums = batch.counts, batch.sums
        add_over_ranks(counts, sums, sync=sync)
        means = sums / counts.clamp(min=1)[..., None]
        centres = torch.where((counts > 0)[..., None], F.normalize(means, dim=-1) if cosine else means, centres)
    return centres, counts
