"""What the training examples share: photographs, patches of them, a bar, and Ctrl-C that ends a run well."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

#: Of those that come with scikit-image.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg")


def picture_files(folder: Path | None) -> list[Path]:
    """The pictures directly in a folder, or the photographs of scikit-image, which is not imported."""
    if folder is not None:
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".tif"))
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("the photographs come with scikit-image: pip install 'fastsr-torch[demo]', or give --pictures")
    return [path for name in PHOTOGRAPHS if (path := Path(spec.origin).parent / "data" / name).is_file()]


def patches(pictures: list[np.ndarray], args: argparse.Namespace, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of small patches (bicubic, antialiased) and the large ones that they were made from, values 0..1."""
    random, side = np.random.default_rng((args.seed, step)), args.patch * args.upscale
    pairs = []
    for _ in range(args.batch):
        picture = pictures[random.integers(len(pictures))]
        top, left = (random.integers(length - side + 1) for length in picture.shape[:2])
        large = np.rot90(picture[top : top + side, left : left + side], random.integers(4))
        large = np.ascontiguousarray(large[:, :: random.choice((-1, 1))])
        small = Image.fromarray(large).resize((args.patch, args.patch), Image.Resampling.BICUBIC)
        pairs.append((np.asarray(small), large))
    small, large = (torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255 for batch in zip(*pairs, strict=True))
    return small, large


def large_pictures(args: argparse.Namespace) -> list[np.ndarray]:
    """The training pictures from which a patch can be cut."""
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in picture_files(args.pictures)]
    pictures = [picture for picture in pictures if min(picture.shape[:2]) >= args.patch * args.upscale]
    if not pictures:
        raise SystemExit(f"no picture has {args.patch * args.upscale} pixels on each side, which a patch of {args.patch} needs")
    return pictures


def found_checkpoint(args: argparse.Namespace, device: torch.device | str) -> dict[str, Any] | None:
    """What the checkpoint holds, if there is one; a run with other options than those that it names is refused."""
    if not args.checkpoint.exists():
        return None
    found: dict[str, Any] = torch.load(args.checkpoint, weights_only=True, map_location=device)
    for name, value in found["options"].items():
        if getattr(args, name) != value:
            raise SystemExit(f"{args.checkpoint} was trained with --{name} {value}, and this run has {getattr(args, name)}")
    return found


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what `main` returns; a second Ctrl-C ends it in its step, with no traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint stays as it is", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only remembered; the second is as usual."""
    asked: list[int] = []

    def remember(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)
        print("stopping after this step; once more to stop now", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def progress(steps: int, done: int) -> Iterator[Callable[[list[float], float], None]]:
    """A bar of rich on a terminal, a line for every step elsewhere."""
    if not sys.stdout.isatty():
        yield lambda losses, seconds: print(f"step {len(losses)}/{steps}  loss {losses[-1]:.4f}  {seconds:.1f} s", flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    loss, pace = TextColumn("loss {task.fields[loss]:.4f}"), TextColumn("{task.fields[pace]:.1f} s a step")
    with Progress(loss, BarColumn(), MofNCompleteColumn(), pace, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=steps, completed=done, loss=float("nan"), pace=float("nan"))

        def show(losses: list[float], seconds: float) -> None:
            bar.update(task, completed=len(losses), loss=float(np.mean(losses[-20:])), pace=seconds)

        yield show
