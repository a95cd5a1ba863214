"""What a codebook needs while it trains: moving averages, fresh rows for dead codes, and one answer on all ranks.

Everything here runs without waiting for the device, works in place on buffers of `EMAVectorQuantizer` and of its adapters, and
takes a leading dimension of heads H: codebook (H, K, D), sizes and counts (H, K), sums (H, K, D).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def ranks_to_join(sync: bool) -> int:
    """The number of ranks whose statistics are added up: 1 without torch.distributed, or with `sync=False`."""
    return dist.get_world_size() if sync and dist.is_available() and dist.is_initialized() else 1


def add_over_ranks(*tensors: Tensor, sync: bool) -> None:
    """Each tensor becomes its sum over all ranks, in place. A collective: every rank must come here."""
    if ranks_to_join(sync) > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def with_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """A view with the leading size of the heads that tensors of a single codebook lack."""
    return tensor if num_heads > 1 else tensor.unsqueeze(0)


@torch.no_grad()
def step(
    codebook: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    rows: Tensor,
    valid: Tensor | None,
    decay: float,
    eps: float,
    steps: Tensor,
    zero_debias: bool,
    revive_below: float,
    cosine: bool,
    sync: bool,
) -> None:
    """What a training call does to an EMA codebook, in place:

        1. `counts` and `sums` become those of all ranks                                              (with `sync`)
        2. `update_moving_averages`, and codes back to norm 1                                         (norm: for `cosine`)
        3. `revive`                                                                                   (with `revive_below`)

    Args:
        rows: (..., H, D), what was quantised; read by step 3 alone.  valid: (...) bool, or None for all.
    """
    add_over_ranks(counts, sums, sync=sync)
    steps += 1
    share = debias(decay, steps).to(cluster_size.dtype) if zero_debias else None
    update_moving_averages(codebook, cluster_size, cluster_sum, counts, sums, decay, eps, share)
    if cosine:
        codebook.copy_(F.normalize(codebook, dim=-1))
    if revive_below > 0:
        revive(codebook, cluster_size, cluster_sum, rows, valid, revive_below, 1.0 if share is None else share, sync)


@torch.no_grad()
def update_moving_averages(
    codebook: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    share: Tensor | None = None,
) -> None:
    """One step of the codebook's moving averages, in place; n_k and s_k are a batch's `counts` and `sums`.

        1. N_k  = decay * N_k + (1 - decay) * n_k                    `cluster_size`
        2. m_k  = decay * m_k + (1 - decay) * s_k                    `cluster_sum`
        3. N', m' = N, m; with `share` (`debias`) both divided by it                                 (zero-debiased)
        4. S_k  = (N'_k + eps) / (N' + K eps) * N'   where N' = sum of N'_k                          (Laplace smoothing)
        5. e_k  = m'_k / S_k;   unchanged where S_k is 0

    A code whose s_k is not finite (an overflow that a gradient scaler will skip too) counts as not seen: one such
    batch would otherwise stay in the averages for ever.

    Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937, appendix A.1.
    """
    finite = sums.isfinite().all(-1)
    cluster_size.lerp_(torch.where(finite, counts, 0).to(cluster_size.dtype), 1 - decay)
    cluster_sum.lerp_(torch.where(finite[..., None], sums, 0).to(cluster_sum.dtype), 1 - decay)
    size, total = cluster_size, cluster_sum
    if share is not None:
        size, total = size / share, total / share
    n = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (n + size.shape[-1] * eps) * n
    codebook.copy_(torch.where((smoothed > 0)[..., None], total / smoothed[..., None], codebook))


def debias(decay: float, steps: Tensor) -> Tensor:
    """1 - decay^t: the weight that t batches have in an average that began at zero."""
    return 1 - torch.pow(decay, steps.double())


@torch.no_grad()
def revive(
    codebook: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    threshold: float,
    share: Tensor | float = 1.0,
    sync: bool = True,
) -> None:
    """Codes whose moving size is below `threshold` restart at random rows of the batch, in place.

    Args:
        rows: (..., H, D), the batch.  valid: (...) bool, or None for all rows.
        threshold: in rows; the restarted codes have this size.
        share: what the stored averages are multiplied by (`debias`).
        sync: all ranks draw from the batches of all ranks, and draw the same.
    """
    dead = cluster_size < threshold * share
    fresh, found = draw_rows(rows, valid, dead, sync)
    found = found & fresh.isfinite().all(-1)
    size = torch.where(found, threshold * share, cluster_size)
    codebook.copy_(torch.where(found[..., None], fresh, codebook))
    cluster_sum.copy_(torch.where(found[..., None], fresh * size[..., None], cluster_sum))
    cluster_size.copy_(size)


@torch.no_grad()
def draw_rows(rows: Tensor, valid: Tensor | None, wanted: Tensor, sync: bool) -> tuple[Tensor, Tensor]:
    """Distinct random rows, one for each wanted code, without a host synchronisation.

        1. N rows are valid, in the order of the ranks; M <= N codes of a head are wanted (the first N, if more are).
        2. The rows fall into M parts, from j N // M on, and the j-th wanted code gets a random row of the j-th.

    With `sync`, N counts the rows of all ranks, the random numbers are rank 0's, and each rank gives the rows that it has: all ranks get
    what one process with the joined batch and rank 0's random numbers would.

    Args:
        rows: (..., H, D).  valid: (...) bool, or None.  wanted: (H, K) bool.

    Returns:
        (H, K, D), zero where nothing was drawn, in float32 or float64; and (H, K) bool, where something was.
    """
    heads, device = wanted.shape[0], wanted.device
    dtype = torch.promote_types(rows.dtype, torch.float32)
    uniform = torch.rand(wanted.shape, device=device, dtype=torch.float64)
    places = None if valid is None else valid.flatten().cumsum(0)  # how many valid rows there are up to each
    here = rows.shape[:-2].numel()
    own = torch.full((), here, device=device) if places is None else (places[-1] if here else places.new_zeros(()))
    before, total = torch.zeros_like(own), own
    ranks = ranks_to_join(sync)
    if ranks > 1:
        dist.broadcast(uniform, 0)
        each = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(each, own)
        through = torch.stack(each).cumsum(0)
        before, total = through[dist.get_rank()] - own, through[-1]

    order = wanted.cumsum(-1) - 1
    found = wanted & (order < total)
    parts = found.sum(-1, keepdim=True).clamp(min=1)
    begin, end = order * total // parts, (order + 1) * total // parts
    index = begin + (uniform * (end - begin)).long() - before
    mine = found & (index >= 0) & (index < own)
    if here:
        local = torch.where(mine, index, 0)
        if places is not None:
            local = torch.searchsorted(places, local + 1)
        drawn = torch.where(mine[..., None], _take(rows, local.clamp(max=here - 1), heads).to(dtype), 0)
    else:
        drawn = torch.zeros(*wanted.shape, rows.shape[-1], device=device, dtype=dtype)
    add_over_ranks(drawn, sync=sync)
    return drawn, found


def _take(rows: Tensor, index: Tensor, heads: int) -> Tensor:
    """rows[index[h, k], h] for rows (..., H, D) of any strides, without a copy of all of them."""
    places = [torch.arange(heads, device=rows.device)[:, None]]
    for size in reversed(rows.shape[:-2]):
        places.insert(0, index % size)
        index = index // size
    return rows[tuple(places)]
