"""`fastsr upscale`: pictures from files into files."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsr.cli.system import enable_huge_pages, peak_memory

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

BACKENDS = ("auto", "compiled", "triton", "reference")  # not from fastsr.backends, which imports torch


class UsageError(ValueError):
    """Arguments that do not go together."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("upscale", help="enlarge pictures", description="Enlarge pictures with a super-resolution network.")
    parser.add_argument("inputs", nargs="+", metavar="IN", type=Path, help="a picture, or several")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", type=Path, help="a picture, or a folder (for several inputs)")
    parser.add_argument("-m", "--model", required=True, metavar="WEIGHTS", help="a file of weights, or a name such as realesrgan-x4plus")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="arithmetic; default fp32")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the operators; default auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--compare", metavar="PATH", type=Path, help="also write bicubic and ours side by side (one input only)")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")


def run(args: argparse.Namespace) -> int:
    enable_huge_pages()  # before torch is imported, which reads the variable
    try:
        pairs = _pairs(args)
    except UsageError as error:
        print(f"fastsr upscale: {error}", file=sys.stderr)
        return 2

    import torch

    from fastsr.upscaling import read_picture, upscale, write_picture
    from fastsr.upscaling.compare import side_by_side
    from fastsr.weights import load

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load(args.model, device, getattr(torch, DTYPES[args.dtype]))
    model.backend = args.backend
    for source, target in pairs:
        picture = read_picture(source)
        with _measured(device) as spent:
            result = upscale(model, picture)
        write_picture(result, target)
        if args.compare:
            write_picture(side_by_side(picture, result), args.compare)
        sizes = f"{picture.width}x{picture.height} -> {result.width}x{result.height}"
        print(f"{target}  {sizes}  {spent['seconds']:.2f} s  peak memory {spent['peak'] / 1e6:.0f} MB")
    return 0


def _pairs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Each input with its output, all of them checked before any work is done."""
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads is {args.threads}; expected at least 1")
    if args.compare and len(args.inputs) > 1:
        raise UsageError(f"--compare takes one picture; {len(args.inputs)} were given")
    several = len(args.inputs) > 1 or args.output.is_dir()
    targets = [args.output / f"{source.stem}.png" if several else args.output for source in args.inputs]
    if len(set(targets)) != len(targets):
        raise UsageError(f"several inputs would be written to one file in {args.output}; rename them")
    for path in args.inputs:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    if several and args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(f"{args.output} is a file; several pictures need a folder")
    from fastsr.upscaling.files import output_format

    for path in (*targets, *([args.compare] if args.compare else [])):
        output_format(path)
        if path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists; --overwrite replaces it")
        if not several and not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder")
    if several:
        args.output.mkdir(parents=True, exist_ok=True)
    return list(zip(args.inputs, targets, strict=True))


@contextlib.contextmanager
def _measured(device: Any) -> Iterator[dict[str, float]]:
    """Seconds, and the highest memory: of the GPU's tensors, or of this process so far."""
    import torch

    spent: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield spent
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        spent["peak"] = torch.cuda.max_memory_allocated(device)
    else:
        spent["peak"] = peak_memory()
    spent["seconds"] = time.perf_counter() - start
