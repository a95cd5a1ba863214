"""ESRGAN in plain PyTorch, trained as BasicSR trains it, on real photographs; one line of it is fastsr's.

    python examples/train_esrgan.py                            the published network, 16 patches of 32x32 a step
    python examples/train_esrgan.py --steps 20 --blocks 1      a look at the loss going down, on a small machine
    python examples/train_esrgan.py --own-code                 the same run without that line

Network, losses (pixels and a relativistic average GAN; no perceptual loss, whose VGG would have to be downloaded), learning rates, EMA,
mixed precision and the schedule are those of BasicSR's ESRGANModel. Run again with the same options to go on; whether the line is there
does not matter to the checkpoint. `fastsr upscale -m esrgan-x4.pth` takes it as it is.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import found_checkpoint, large_pictures, patches, progress, run, stoppable

import fastsr
from fastsr.atomic import atomic_file

#: What a checkpoint must have in common with the run that goes on from it.
FIXED = ("features", "growth", "blocks", "patch", "batch", "rate", "warmup", "seed")


class ResidualDenseBlock(nn.Module):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        for k in range(5):
            setattr(self, f"conv{k + 1}", nn.Conv2d(features + k * growth, growth if k < 4 else features, 3, 1, 1))
        self.lrelu = nn.LeakyReLU(negative_slope=0.2, inplace=True)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data *= 0.1
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        return self.conv5(torch.cat((x, x1, x2, x3, x4), 1)) * 0.2 + x


class RRDB(nn.Module):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (ResidualDenseBlock(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class RRDBNet(nn.Module):
    """The generator, x4."""

    def __init__(self, features: int, growth: int, blocks: int) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, features, 3, 1, 1)
        self.body = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
            setattr(self, name, nn.Conv2d(features, features, 3, 1, 1))
        self.conv_last = nn.Conv2d(features, 3, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(negative_slope=0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        feat = self.conv_first(x)
        feat = feat + self.conv_body(self.body(feat))
        feat = self.lrelu(self.conv_up1(F.interpolate(feat, scale_factor=2, mode="nearest")))
        feat = self.lrelu(self.conv_up2(F.interpolate(feat, scale_factor=2, mode="nearest")))
        return self.conv_last(self.lrelu(self.conv_hr(feat)))


def discriminator(features: int, side: int) -> nn.Sequential:
    """VGG-like, for pictures of side x side pixels: the side is halved until a few pixels are left."""
    layers: list[nn.Module] = [nn.Conv2d(3, features, 3, 1, 1), nn.LeakyReLU(0.2, True)]
    width = features
    while side > 4:
        layers += [nn.Conv2d(width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2, True)]
        wider = min(2 * width, 8 * features)
        layers += [nn.Conv2d(width, wider, 3, 1, 1, bias=False), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2, True)]
        width, side = wider, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, 100), nn.LeakyReLU(0.2, True), nn.Linear(100, 1))


class ESRGANModel:
    """What BasicSR's model of that name holds and does."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.device, self.warmup = device, args.warmup
        self.net_g = RRDBNet(args.features, args.growth, args.blocks).to(device)
        self.net_d = discriminator(args.features, 4 * args.patch).to(device)
        if not args.own_code:
            self.report = fastsr.fuse_(self.net_g)  # the one line
        self.net_g_ema = copy.deepcopy(self.net_g).eval().requires_grad_(False)
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(net.parameters(), lr=args.rate, betas=(0.9, 0.99)) for net in (self.net_g, self.net_d)
        )
        milestones = [args.steps * k // 8 for k in (1, 2, 4, 6)] if args.milestones is None else args.milestones
        self.schedulers = [torch.optim.lr_scheduler.MultiStepLR(o, milestones, 0.5) for o in (self.optimizer_g, self.optimizer_d)]
        self.low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
        self.scaler = torch.amp.GradScaler(device, enabled=args.dtype == "fp16")

    def optimize_parameters(self, lq: Tensor, gt: Tensor, step: int) -> float:
        """One step; the pixel loss."""
        with torch.autocast(self.device, self.low or torch.bfloat16, enabled=self.low is not None):
            self.net_d.requires_grad_(False)
            self.optimizer_g.zero_grad()
            output = self.net_g(lq)
            pixels = F.l1_loss(output.float(), gt)
            loss = pixels * 1e-2
            if step >= self.warmup:
                real, fake = self.net_d(gt).float().detach(), self.net_d(output).float()
                loss = loss + 5e-3 * (_gan(real - fake.mean(), False) + _gan(fake - real.mean(), True)) / 2
            else:
                loss = pixels  # as PSNR-oriented training, from which ESRGAN starts
        self._update(self.optimizer_g, loss)
        if step >= self.warmup:
            self.net_d.requires_grad_(True)
            self.optimizer_d.zero_grad()
            with torch.autocast(self.device, self.low or torch.bfloat16, enabled=self.low is not None):
                fake = self.net_d(output.detach()).float()
                real = self.net_d(gt).float()
                loss = (_gan(real - fake.mean().detach(), True) + _gan(fake - real.mean().detach(), False)) / 2
            self._update(self.optimizer_d, loss)
        self.scaler.update()
        for scheduler in self.schedulers:
            scheduler.step()
        self.model_ema(0.999)
        return pixels.item()

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)

    def model_ema(self, decay: float) -> None:
        ours = dict(self.net_g.named_parameters())
        for name, parameter in self.net_g_ema.named_parameters():
            parameter.data.mul_(decay).add_(ours[name].data, alpha=1 - decay)

    def state(self) -> dict[str, Any]:
        """As BasicSR keeps it: "params" and "params_ema" are those of the generator."""
        networks = {"params": self.net_g, "params_ema": self.net_g_ema, "net_d": self.net_d}
        parts = {**networks, "optimizer_g": self.optimizer_g, "optimizer_d": self.optimizer_d, "scaler": self.scaler}
        return {**parts, **{f"scheduler{k}": scheduler for k, scheduler in enumerate(self.schedulers)}}


def _gan(logits: Tensor, real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def main() -> int:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = large_pictures(args)
    torch.manual_seed(args.seed)
    model = ESRGANModel(args, device)
    losses = resume(args, model)
    first = len(losses)
    print(f"ESRGAN x4, {sum(p.numel() for p in model.net_g.parameters()):,} parameters, {args.dtype} on {device}, from step {first}")
    print("its own code" if args.own_code else model.report)
    with stoppable() as stopped, progress(args.steps, first) as show:
        for step in range(first, args.steps):
            start = time.perf_counter()
            lq, gt = (t.to(device) for t in patches(pictures, args, step))
            losses.append(model.optimize_parameters(lq, gt, step))
            show(losses, time.perf_counter() - start)
            last = stopped() or step + 1 == args.steps
            if last or (step + 1) % args.every == 0:
                save(args, model, losses)
            if last:
                break
    return 130 if stopped() and len(losses) < args.steps else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="of training pictures; default: scikit-image's photographs")
    parser.add_argument("--checkpoint", type=Path, default=Path("esrgan-x4.pth"), help="written and gone on from (default: esrgan-x4.pth)")
    parser.add_argument("--steps", type=int, default=1000, help="in all, those of the checkpoint included (default: 1000)")
    parser.add_argument("--every", type=int, default=50, metavar="N", help="write the checkpoint every N steps (default: 50)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="bf16 and fp16 are autocast (default: fp32)")
    parser.add_argument("--own-code", action="store_true", help="do not fuse")
    parser.add_argument("--milestones", type=int, nargs="*", help="steps at which the rate is halved; default: at 1/8, 1/4, 1/2 and 3/4")
    for name, value in {"features": 64, "growth": 32, "blocks": 23, "patch": 32, "batch": 16, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--warmup", type=int, default=500, help="steps by pixels alone, before the discriminator joins (default: 500)")
    parser.add_argument("--rate", type=float, default=1e-4, help="of Adam (default: 1e-4)")
    return argparse.Namespace(**vars(parser.parse_args()), upscale=4)


def save(args: argparse.Namespace, model: ESRGANModel, losses: list[float]) -> None:
    """The file appears whole or not at all."""
    options = {name: getattr(args, name) for name in FIXED}
    with atomic_file(args.checkpoint) as file:
        parts = {name: part.state_dict() for name, part in model.state().items()}
        for part in parts.values():
            part.pop("milestones", None)  # a Counter, which no reader of weights takes; the options say them
        torch.save({**parts, "losses": losses, "options": options}, file)


def resume(args: argparse.Namespace, model: ESRGANModel) -> list[float]:
    """Load the checkpoint if there is one; the losses of the steps that it has done."""
    found = found_checkpoint(args, model.device)
    if found is None:
        return []
    for name, part in model.state().items():
        part.load_state_dict(found[name])
    return list(found["losses"])


if __name__ == "__main__":
    run(main)
