"""Train RCAN, all 400 layers of it, on real photographs within a memory budget.

    python examples/train_rcan.py                              16 patches of 48x48 a step, within 1 GiB of activations
    python examples/train_rcan.py --steps 20 --groups 2        a look at the loss going down, on a small machine
    python examples/train_rcan.py --pictures DIV2K/ --dtype bf16 --steps 300000

The first Ctrl-C ends the run after the step that is under way and keeps it; a second one ends it at once, and the last checkpoint
stays. Run again with the same options to go on: the patches of a step depend on its number alone, so the run is the same as one
without the stop. `fastsr upscale -m rcan-x4.pth` takes the checkpoint as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from training import found_checkpoint, large_pictures, patches, progress, run, stoppable

import fastsr
from fastsr.atomic import atomic_file
from fastsr.models import RCAN

#: What a checkpoint must have in common with the run that goes on from it.
FIXED = ("upscale", "features", "groups", "blocks", "patch", "batch", "rate", "seed")


def main() -> int:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = large_pictures(args)

    torch.manual_seed(args.seed)
    squeeze = max(1, args.features // 4)
    model = RCAN(3, 3, args.features, args.groups, args.blocks, min(16, squeeze), args.upscale).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    losses = resume(args, model, optimizer)
    first = len(losses)

    parameters, size = sum(p.numel() for p in model.parameters()), f"{args.batch}x3x{args.patch}x{args.patch}"
    print(f"RCAN x{args.upscale}, {parameters:,} parameters, {size} {args.dtype} on {device}, from step {first}")
    within = fastsr.memory.budget(args.memory) if args.memory != "none" else contextlib.nullcontext()
    with within as budget, stoppable() as stopped, progress(args.steps, first) as show:
        for step in range(first, args.steps):
            start = time.perf_counter()
            small, large = (t.to(device) for t in patches(pictures, args, step))
            with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = F.l1_loss(model(small).float(), large)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            show(losses, time.perf_counter() - start)
            last = stopped() or step + 1 == args.steps
            if last or (step + 1) % args.every == 0:
                save(args, model, optimizer, losses)
            if last:
                break
    if budget is not None and budget.plan is not None:
        print(f"plan within {args.memory}: {budget.plan}")
    return 130 if stopped() and len(losses) < args.steps else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="of training pictures; default: scikit-image's photographs")
    parser.add_argument("--checkpoint", type=Path, default=Path("rcan-x4.pth"), help="written and gone on from (default: rcan-x4.pth)")
    parser.add_argument("--steps", type=int, default=1000, help="in all, those of the checkpoint included (default: 1000)")
    parser.add_argument("--every", type=int, default=50, metavar="N", help="write the checkpoint every N steps (default: 50)")
    parser.add_argument("--memory", default="1GiB", help="budget for activations, or none for no plan (default: 1GiB)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default: fp32)")
    parser.add_argument("--upscale", type=int, default=4, choices=(2, 3, 4, 8))
    for name, value in {"features": 64, "groups": 10, "blocks": 20, "patch": 48, "batch": 16, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--rate", type=float, default=1e-4, help="of Adam (default: 1e-4)")
    return parser.parse_args()


def save(args: argparse.Namespace, model: RCAN, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """The weights in BasicSR's dialect and wrapper, and what is needed to go on; the file appears whole or not at all."""
    options = {name: getattr(args, name) for name in FIXED}
    with atomic_file(args.checkpoint) as file:
        torch.save({"params": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "options": options}, file)


def resume(args: argparse.Namespace, model: RCAN, optimizer: torch.optim.Optimizer) -> list[float]:
    """Load the checkpoint if there is one; the losses of the steps that it has done."""
    found = found_checkpoint(args, next(model.parameters()).device)
    if found is None:
        return []
    model.load_state_dict(found["params"])
    optimizer.load_state_dict(found["optimizer"])
    return list(found["losses"])


if __name__ == "__main__":
    run(main)
