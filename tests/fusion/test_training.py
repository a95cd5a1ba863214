"""A training loop in BasicSR's manner (EMA, AMP, scheduler, checkpoints) runs unchanged but for one line, and to the same loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsr
from fastsr.fusion.swap import forward_of
from tests.harness import random_tensor
from tests.models.eager_rcan import EagerRCAN
from tests.models.eager_rrdbnet import EagerRRDBNet

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "esrgan": lambda: EagerRRDBNet(3, 3, 4, 8, 1, 4),
    "rcan": lambda: EagerRCAN(3, 3, 8, 1, 2, 2, 4, img_range=1.0),
}


class Trainer:
    """The parts of BasicSR's SRModel that a run needs; `one_line` is called where the networks are set up."""

    def __init__(self, make: Callable[[], nn.Module], one_line: Callable[[nn.Module], Any], amp: bool, decay: float = 0.9) -> None:
        torch.manual_seed(0)
        self.net_g = make()
        one_line(self.net_g)
        self.net_g_ema = copy.deepcopy(self.net_g).eval().requires_grad_(False)
        self.optimizer_g = torch.optim.Adam(self.net_g.parameters(), 2e-3, betas=(0.9, 0.99))
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer_g, [20, 30], 0.5)
        self.scaler, self.amp, self.decay = torch.amp.GradScaler("cpu", enabled=False), amp, decay

    def step(self, lr: Tensor, hr: Tensor) -> float:
        self.optimizer_g.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            loss = F.l1_loss(self.net_g(lr).float(), hr)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
        self.scheduler.step()
        ema = dict(self.net_g_ema.named_parameters())
        for name, parameter in self.net_g.named_parameters():
            ema[name].data.mul_(self.decay).add_(parameter.data, alpha=1 - self.decay)
        return loss.item()

    def save(self, path: Path) -> None:
        networks = {"params": self.net_g.state_dict(), "params_ema": self.net_g_ema.state_dict()}
        torch.save({**networks, "optimizer": self.optimizer_g.state_dict(), "scheduler": self.scheduler.state_dict()}, path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.net_g.load_state_dict(state["params"], strict=True)
        self.net_g_ema.load_state_dict(state["params_ema"], strict=True)
        self.optimizer_g.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def pair(k: int) -> tuple[Tensor, Tensor]:
    hr = F.interpolate(random_tensor((2, 3, 6, 6), torch.float32, k).sigmoid(), scale_factor=8, mode="bicubic")
    return F.avg_pool2d(hr, 4), hr


def nothing(model: nn.Module) -> None:
    """The run without the one line."""


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_one_line_changes_no_loss_and_checkpoints_go_both_ways(network, amp, tmp_path):
    plain, fused = (Trainer(NETWORKS[network], line, amp) for line in (nothing, fastsr.fuse_))
    assert any(forward_of(m) for m in fused.net_g.modules())
    assert any(forward_of(m) for m in fused.net_g_ema.modules())
    curves = torch.tensor([[trainer.step(*pair(k)) for k in range(40)] for trainer in (plain, fused)])
    assert curves[0, -5:].mean() < 0.7 * curves[0, :5].mean()
    torch.testing.assert_close(curves[1], curves[0], rtol=5e-2 if amp else 1e-3, atol=0)
    lr, hr = pair(99)
    scores = [F.l1_loss(trainer.net_g_ema(lr), hr) for trainer in (plain, fused)]
    torch.testing.assert_close(scores[1], scores[0], rtol=5e-2 if amp else 1e-3, atol=0)
    for writer, line in ((fused, nothing), (plain, fastsr.fuse_)):
        writer.save(tmp_path / "latest.pth")
        reader = Trainer(NETWORKS[network], line, amp)
        reader.resume(tmp_path / "latest.pth")
        for ours, theirs in zip(reader.net_g_ema.parameters(), writer.net_g_ema.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        next_losses = [trainer.step(*pair(50)) for trainer in (copy.deepcopy(writer), reader)]
        assert next_losses[1] == pytest.approx(next_losses[0], rel=2e-2 if amp else 1e-4)


def test_gradient_accumulation_gives_the_gradients_of_the_whole_batch():
    lr, hr = pair(0)
    gradients = []
    for line, parts in ((nothing, 1), (fastsr.fuse_, 2)):
        torch.manual_seed(0)
        model = NETWORKS["rcan"]()
        line(model)
        for x, y in zip(lr.chunk(parts), hr.chunk(parts), strict=True):
            (F.l1_loss(model(x), y) / parts).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
