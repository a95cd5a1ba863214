"""Train a VQ-VAE (or a VQ-VAE-2) on real photographs, and look at pictures that it has never seen through its codes.

    python examples/train_vqvae.py                        some minutes on two cores
    python examples/train_vqvae.py --levels 2             two grids of codes
    python examples/train_vqvae.py --pictures FOLDER --features 128 --steps 100000

The first Ctrl-C ends the run after the step that is under way and keeps it; a second one ends it at once, and the last checkpoint
stays. Run again with the same options to go on: what is random in a step (patches, k-means, revived codes) depends on its number
alone, so the run is the same as one without the stop. `fastsr.load("vqvae.pth")` takes the checkpoint as it is.

The photographs come with scikit-image, and with scikit-learn where that is installed; those named HELD_OUT are never trained on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from training import found_checkpoint, picture_files, progress, run, stoppable

from fastsr.atomic import atomic_file
from fastsr.models import VQVAE, VQVAE2
from fastsr.upscaling import write_picture

#: What the figures are of.
HELD_OUT = ("coffee.png", "china.jpg")

#: What a checkpoint must have in common with the run that goes on from it.
FIXED = ("levels", "features", "codes", "channels", "downscale", "patch", "batch", "rate", "decay", "seed")

MARGIN, LABEL = 12, 34


def main() -> int:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = photographs(args.pictures)
    train = [picture for path in files if path.name not in HELD_OUT and min((picture := read(path)).shape[1:]) >= args.patch]
    if not train:
        raise SystemExit(f"no picture has {args.patch} pixels on each side, which a patch needs")

    torch.manual_seed(args.seed)
    model = network(args).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    losses = resume(args, model, optimizer)
    first = len(losses)

    parameters, size = sum(p.numel() for p in model.parameters()), f"{args.batch}x3x{args.patch}x{args.patch}"
    print(f"{type(model).__name__}, {parameters:,} parameters, {args.codes} codes, {size} on {device}, from step {first}")
    with stoppable() as stopped, progress(args.steps, first) as show:
        for step in range(first, args.steps):
            start = time.perf_counter()
            found = model(patches(train, args, step).to(device))
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            losses.append(found.reconstruction_loss.item())
            show(losses, time.perf_counter() - start)
            last = stopped() or step + 1 == args.steps
            if last or (step + 1) % args.every == 0:
                save(args, model, optimizer, losses)
            if last:
                break
    if len(losses) < args.steps:
        return 130
    report(args, model, [path for path in files if path.name in HELD_OUT] or files)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="of pictures; default: scikit-image's photographs")
    parser.add_argument("--checkpoint", type=Path, default=Path("vqvae.pth"), help="written and gone on from (default: vqvae.pth)")
    parser.add_argument("--output", type=Path, default=Path("vqvae-output"), help="folder for pictures and figures (default: vqvae-output)")
    parser.add_argument("--steps", type=int, default=2000, help="in all, those of the checkpoint included (default: 2000)")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="write the checkpoint every N steps (default: 100)")
    parser.add_argument("--levels", type=int, default=1, choices=(1, 2), help="2 for VQ-VAE-2 (default: 1)")
    sizes = {"features": 64, "codes": 512, "channels": 32, "downscale": 4, "patch": 64, "batch": 16, "seed": 0}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam (default: 1e-3)")
    parser.add_argument("--decay", type=float, default=0.97, help="of the codebook's moving averages (default: 0.97)")
    return parser.parse_args()


def network(args: argparse.Namespace) -> VQVAE | VQVAE2:
    kind = VQVAE if args.levels == 1 else VQVAE2
    inner = max(1, args.features // 2)
    options = {"decay": args.decay, "data_variance": 0.25, "kmeans_init": True, "revive_below": 0.1}
    return kind(3, args.features, 2, inner, args.codes, args.channels, args.downscale, **options)


def photographs(folder: Path | None) -> list[Path]:
    """The pictures of a folder, or the photographs of scikit-image and, if installed, of scikit-learn (neither is imported)."""
    files = picture_files(folder)
    spec = importlib.util.find_spec("sklearn") if folder is None else None
    if spec is not None and spec.origin is not None:
        images = Path(spec.origin).parent / "datasets" / "images"
        files += [path for name in ("china.jpg", "flower.jpg") if (path := images / name).is_file()]
    return files


def read(path: Path) -> Tensor:
    """(3, H, W), values -1..1."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def patches(pictures: list[Tensor], args: argparse.Namespace, step: int) -> Tensor:
    """The batch of a step, which also seeds what the model draws in it."""
    torch.manual_seed(1_000_003 * args.seed + step)
    random = np.random.default_rng((args.seed, step))
    cut = []
    for _ in range(args.batch):
        picture = pictures[random.integers(len(pictures))]
        top, left = (int(random.integers(length - args.patch + 1)) for length in picture.shape[1:])
        patch = picture[:, top : top + args.patch, left : left + args.patch]
        cut.append(torch.rot90(patch if random.integers(2) else patch.flip(2), int(random.integers(4)), (1, 2)))
    return torch.stack(cut)


def save(args: argparse.Namespace, model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """The weights, and what is needed to go on; the file appears whole or not at all."""
    options = {name: getattr(args, name) for name in FIXED}
    with atomic_file(args.checkpoint) as file:
        torch.save({"params": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "options": options}, file)


def resume(args: argparse.Namespace, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Load the checkpoint if there is one; the losses of the steps that it has done."""
    found = found_checkpoint(args, next(model.parameters()).device)
    if found is None:
        return []
    model.load_state_dict(found["params"])
    optimizer.load_state_dict(found["optimizer"])
    return list(found["losses"])


@torch.no_grad()
def report(args: argparse.Namespace, model: VQVAE | VQVAE2, files: list[Path]) -> None:
    """PSNR, use of the codebooks and a side-by-side picture, of pictures that were not trained on where there are such."""
    model.eval()
    device = next(model.parameters()).device
    squares, values, pixels, pairs = 0.0, 0, 0, []
    counts = [torch.zeros(args.codes, dtype=torch.int64) for _ in range(args.levels)]
    for path in files:
        x = read(path)[None].to(device)
        indices = model.encode(x)
        y = model.decode(indices)[:, :, : x.shape[2], : x.shape[3]].clamp(-1, 1)
        squares += ((y - x) / 2).square().double().sum().item()
        values, pixels = values + x.numel(), pixels + x[0, 0].numel()
        for level, codes in enumerate(indices):
            counts[level] += codes.flatten().bincount(minlength=args.codes).cpu()
        pairs.append(tuple(Image.fromarray(((t[0] + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()) for t in (x, y)))
    entropy = [torch.special.entr(count / count.sum()).sum().item() for count in counts]
    figures = {
        "pictures": [path.name for path in files],
        "psnr_db": round(-10 * np.log10(squares / values), 2),
        "codes_used": [int((count > 0).sum()) for count in counts],
        "perplexity": [round(float(np.exp(h)), 1) for h in entropy],
        "bits_per_pixel": round(sum(int(c.sum()) for c in counts) * float(np.log2(args.codes)) / pixels, 3),
        "steps": args.steps,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output / "figures.json") as file:
        file.write((json.dumps(figures, indent=1) + "\n").encode())
    write_picture(side_by_side(pairs), args.output / "side-by-side.png")
    for name, value in figures.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"wrote {args.output / 'side-by-side.png'} and figures.json")


def side_by_side(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Each picture beside its reconstruction."""
    width = max(picture.width for picture, _ in pairs)
    height = sum(picture.height + MARGIN for picture, _ in pairs)
    sheet = Image.new("RGB", (2 * width + 3 * MARGIN, LABEL + height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=22)
    for column, label in enumerate(("photograph", "from its codes")):
        draw.text((MARGIN + column * (width + MARGIN), MARGIN // 2), label, fill="black", font=font)
    top = LABEL + MARGIN
    for pair in pairs:
        for column, picture in enumerate(pair):
            sheet.paste(picture, (MARGIN + column * (width + MARGIN), top))
        top += pair[0].height + MARGIN
    return sheet


if __name__ == "__main__":
    run(main)
