"""Two processes (gloo): a fused model under DDP, wrapped before or after, and under FSDP2 trains as the plain one."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastsr
from fastsr.fusion.swap import forward_of
from tests.fusion.test_living import esrgan, rcan
from tests.harness import random_tensor

RANKS = 2
NETWORKS = {"esrgan": esrgan, "rcan": rcan}


def train(model: nn.Module, pictures: list[torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for x in pictures:
        optimizer.zero_grad()
        loss = (model(x) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pictures(rank: int) -> list[torch.Tensor]:
    return [random_tensor((1, 3, 6, 7), torch.float32, 10 * step + rank) for step in range(3)]


def ddp_after(model: nn.Module) -> nn.Module:
    fastsr.fuse_(model)
    return DistributedDataParallel(model)


def ddp_before(model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    assert fastsr.fuse_(wrapped).fused
    return wrapped


def fsdp(model: nn.Module) -> nn.Module:
    fastsr.fuse_(model)
    for block in model.body:
        fully_shard(block)
    fully_shard(model)
    return model


def fsdp_of_layers(model: nn.Module) -> nn.Module:
    """Each convolution is a unit of its own: it must be called, so that its parameters are gathered."""
    fastsr.fuse_(model)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fully_shard(m)
    fully_shard(model)
    return model


WAYS = {"ddp, fused before": ddp_after, "ddp, fused after": ddp_before, "fsdp": fsdp, "fsdp of layers": fsdp_of_layers}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet, limit = f"file://{folder}/meet", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=limit)
    results = {}
    for network, make in NETWORKS.items():
        for way, wrap in WAYS.items():
            model = wrap(make())
            losses = train(model, pictures(rank))
            blocks = [f for m in model.modules() if (f := forward_of(m)) is not None]
            state = model.module.state_dict() if way.startswith("ddp") else model.state_dict()
            state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
            late = fastsr.fuse_(make_sharded(make)) if way == "fsdp" else None
            results[network, way] = losses, state, len(blocks), late and [row.reason for row in late.rows]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def make_sharded(make) -> nn.Module:
    model = make()
    fully_shard(model)
    return model


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_two_ranks_train_as_one_plain_process_with_the_joined_batch(results, network, way):
    model = NETWORKS[network]()
    losses = train(model, [torch.cat(both) for both in zip(pictures(0), pictures(1), strict=True)])
    for rank in range(RANKS):
        _, state, blocks, _ = results[rank][network, way]
        assert blocks > 0
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    means = [sum(pair) / 2 for pair in zip(results[0][network, way][0], results[1][network, way][0], strict=True)]
    assert means == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_sharded_parameters_are_refused_with_the_remedy(results, network):
    reasons = results[0][network, "fsdp"][3]
    assert reasons
    assert all("fuse before fully_shard" in reason for reason in reasons)
