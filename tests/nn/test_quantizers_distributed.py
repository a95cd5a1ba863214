"""Two processes (gloo) train as one with the joined batch; evaluation on one rank does not wait for the other."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastsr.nn import EMAVectorQuantizer, ResidualVectorQuantizer, VectorQuantizer
from tests.harness import random_tensor

RANKS = 2

#: name -> a quantiser of 4 channels and the rows of each rank in each of three steps.
CASES = {
    "ema": (lambda: EMAVectorQuantizer(8, 4, decay=0.7), (20, 20)),
    "debiased heads": (lambda: EMAVectorQuantizer(8, 2, num_heads=2, decay=0.7, zero_debias=True), (20, 20)),
    "revival": (lambda: EMAVectorQuantizer(32, 4, decay=0.7, revive_below=0.8), (25, 13)),
    "revival, one rank without rows": (lambda: EMAVectorQuantizer(32, 4, decay=0.7, revive_below=0.8), (0, 30)),
    "k-means": (lambda: EMAVectorQuantizer(8, 4, kmeans_init=True, metric="cosine", revive_below=0.5), (25, 30)),
    "residual": (lambda: ResidualVectorQuantizer(2, 8, 4, kmeans_init=True), (20, 30)),
    "not joined": (lambda: EMAVectorQuantizer(8, 4, decay=0.7, sync=False), (20, 20)),
}


def rows(step: int, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's rows and their mask."""
    x = random_tensor((count, 4), torch.float64, 10 * step + rank).cpu() + rank / 2
    return x, random_tensor((count,), torch.float32, 100 + 10 * step + rank).cpu() > -1


def train(make, batches, rank=0):
    """Three steps; the state and what the last step returned. Each rank has random numbers of its own."""
    torch.manual_seed(0)
    module = make().double()
    torch.manual_seed(1 + rank)
    for batch in batches:
        found = module(*batch)
    return module.state_dict(), found


class Encoder(nn.Module):
    def __init__(self, decay: float | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.quantizer = VectorQuantizer(8, 4) if decay is None else EMAVectorQuantizer(8, 4, decay=decay)

    def forward(self, x):
        found = self.quantizer(self.linear(x))
        return found.loss + found.quantized.square().mean()


def optimise(model: nn.Module, batches) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return [t.detach() for t in (*model.parameters(), *model.buffers())]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    results = {}
    for name, (make, counts) in CASES.items():
        results[name] = train(make, [rows(step, rank, counts[rank]) for step in range(3)], rank)
    if rank == 0:
        torch.manual_seed(0)
        module = CASES["revival"][0]().double().eval()
        results["evaluation"] = module(*rows(0, 0, 20))
        with torch.no_grad():
            module.encode(rows(0, 0, 20)[0])
    for decay in (None, 0.9):
        torch.manual_seed(0)
        model = DistributedDataParallel(Encoder(decay).double())
        results["ddp", decay] = optimise(model, [rows(step, rank, 20)[0] for step in range(3)])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "not joined"])
def test_two_ranks_are_one_process_with_the_joined_batch(results, name):
    make, counts = CASES[name]
    joined = [tuple(torch.cat(parts) for parts in zip(*(rows(s, r, counts[r]) for r in range(RANKS)), strict=True)) for s in range(3)]
    state, found = train(make, joined)
    for rank in range(RANKS):
        ranks_state, ranks_found = results[rank][name]
        for key, tensor in state.items():
            assert torch.equal(ranks_state[key], results[0][name][0][key]), f"{key} differs between the ranks"
            torch.testing.assert_close(ranks_state[key], tensor, msg=lambda m, key=key: f"{key}: {m}")
        assert torch.equal(ranks_found.counts, found.counts)
        torch.testing.assert_close(ranks_found.perplexity, found.perplexity)
    assert torch.equal(torch.cat([results[r][name][1].indices for r in range(RANKS)]), found.indices)


def test_ranks_go_their_own_ways_without_sync(results):
    first, second = (results[rank]["not joined"][0] for rank in range(RANKS))
    assert not torch.equal(first["codebook"], second["codebook"])


def test_evaluation_on_one_rank_returns(results):
    assert results[0]["evaluation"].indices.shape == (20,)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_distributed_data_parallel(results, decay):
    torch.manual_seed(0)
    expected = optimise(Encoder(decay).double(), [torch.cat([rows(s, r, 20)[0] for r in range(RANKS)]) for s in range(3)])
    for rank in range(RANKS):
        for found, tensor in zip(results[rank]["ddp", decay], expected, strict=True):
            torch.testing.assert_close(found, tensor)
