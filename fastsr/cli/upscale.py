"""`fastsr upscale`: pictures from files into files."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsr.cli import pictures
from fastsr.cli.progress import Bar
from fastsr.cli.system import enable_huge_pages, peak_memory

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

BACKENDS = ("auto", "compiled", "triton", "reference")  # not from fastsr.backends, which imports torch

#: Pixels: 1.5 times the patches of 48 that RCAN is trained on, as arXiv 2112.04491 advises.
LOCAL_WINDOW = 72

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

#: What may go wrong with one picture while the next may go well.
PER_PICTURE = (OSError, ValueError, RuntimeError, TypeError, ArithmeticError, MemoryError)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("upscale", help="enlarge pictures", description="Enlarge pictures with a super-resolution network.")
    parser.add_argument("inputs", nargs="+", metavar="IN", help="a picture, a folder of pictures, or a pattern such as 'scans/*.tif'")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", type=Path, help="a picture, or a folder (for several inputs)")
    parser.add_argument("-m", "--model", required=True, metavar="WEIGHTS", help="a file of weights, or a name such as realesrgan-x4plus")
    parser.add_argument("--outscale", type=float, metavar="S", help="times larger; default: as much as the network enlarges")
    parser.add_argument("--format", choices=pictures.FORMATS, default="png", help="of results in a folder; default png")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist, which are skipped otherwise")
    parser.add_argument("--compare", metavar="PATH", type=Path, help="also write bicubic and ours side by side (one input only)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="arithmetic; auto is fp16 on a GPU and fp32 on a CPU")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the operators; default auto")
    parser.add_argument("--memory", type=memory, metavar="BUDGET", help="for the network, such as 2GB; default: most of what is free")
    parser.add_argument(
        "--local-pooling",
        nargs="?",
        type=int,
        const=LOCAL_WINDOW,
        metavar="PIXELS",
        help=f"RCAN: pool over windows of this side, default {LOCAL_WINDOW}, and not over the picture; another result, and slower",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def memory(text: str) -> int:
    """Bytes, from a number with or without a unit: 800MB, 1.5 GB, 2GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)B?", text.strip(), re.ASCII)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; expected for instance 800MB or 2GB")
    return size


def run(args: argparse.Namespace) -> int:
    enable_huge_pages()  # before torch is imported, which reads the variable
    try:
        _check(args)
        jobs = pictures.find(args.inputs, args.output, args.format, args.compare, args.overwrite)
    except pictures.UsageError as error:
        print(f"fastsr upscale: {error}", file=sys.stderr)
        return 2
    todo = [job for job in jobs if args.overwrite or not job.target.exists()]
    for job in jobs:
        if job not in todo:
            print(f"{job.target}  exists, skipped (--overwrite replaces it)")
    return _upscale(args, todo) if todo else 0


def _check(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise pictures.UsageError(f"--threads is {args.threads}; expected at least 1")
    if args.local_pooling is not None and args.local_pooling < 1:
        raise pictures.UsageError(f"--local-pooling is {args.local_pooling}; expected at least 1")
    if args.outscale is not None and not 0 < args.outscale <= 64:
        raise pictures.UsageError(f"--outscale is {args.outscale:g}; expected more than 0, at most 64")


def _upscale(args: argparse.Namespace, jobs: list[pictures.Job]) -> int:
    import torch

    from fastsr.backends import BackendUnavailable
    from fastsr.upscaling import Upscaler
    from fastsr.weights import load

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = ("fp16" if device.type == "cuda" else "fp32") if args.dtype == "auto" else args.dtype
    model = load(args.model, device)  # in float32, so that a picture on which half precision fails can go back to it
    model.backend = args.backend
    if args.local_pooling is not None:
        if not hasattr(model, "local_pooling"):
            raise ValueError(f"--local-pooling is for an RCAN; {args.model} is an {type(model).__name__}, which pools nothing")
        model.local_pooling = args.local_pooling
    failed = 0
    with Bar.open(sum(job.weight for job in jobs)) as bar, _warnings_as_lines():
        current = jobs[0]
        upscaler = Upscaler(
            model,
            dtype=getattr(torch, DTYPES[name]),
            outscale=args.outscale,
            memory=args.memory,
            notify=lambda text: _say(f"{current.source}: {text}"),
            progress=lambda part: bar.step(current.source.name, current.weight, part),
        )
        for current in jobs:
            try:
                print(_one(upscaler, current, device, args.compare), flush=True)
            except BackendUnavailable:  # no picture will go better
                raise
            except PER_PICTURE as error:
                failed += 1
                text = " ".join(str(error).split()) or type(error).__name__
                _say(text if str(current.source) in text else f"{current.source}: {text}")
            bar.finish(current.weight)
    if failed and len(jobs) > 1:
        _say(f"{failed} of {len(jobs)} pictures failed")
    return 1 if failed else 0


def _one(upscaler: Any, job: pictures.Job, device: Any, compare: Path | None) -> str:
    """Read, enlarge and write one picture; a line about it."""
    from fastsr.upscaling import read_picture, write_picture

    picture = read_picture(job.source)
    with _measured(device) as spent:
        result = upscaler(picture)
    write_picture(result, job.target)
    if compare is not None:
        from fastsr.upscaling.compare import side_by_side

        small, large = (p.to_pil() if hasattr(p, "to_pil") else p for p in (picture, result))
        write_picture(side_by_side(small, large), compare)
    sizes = f"{picture.width}x{picture.height} -> {result.width}x{result.height}"
    return f"{job.target}  {sizes}  {spent['seconds']:.2f} s  peak memory {spent['peak'] / 1e6:.0f} MB"


def _say(text: str) -> None:
    print(f"fastsr: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Inside the block Python's warnings are lines like the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: _say(" ".join(str(message).split()))
        yield


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
