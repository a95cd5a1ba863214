"""Which files a command line names, and where the result of each goes; all of it checked before any work is done."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

#: Endings of results in a folder; "same" is that of the input.
FORMATS = ("png", "jpg", "webp", "tif", "same")


class UsageError(ValueError):
    """Arguments that do not go together."""


@dataclass(frozen=True)
class Job:
    """One picture; its weight in the progress is its number of pixels."""

    source: Path
    target: Path
    weight: float


def find(inputs: list[str], output: Path, ending: str, compare: Path | None, overwrite: bool) -> list[Job]:
    """A job for each picture.

    Raises:
        UsageError: several pictures would be written to one file or into their own, or --compare with several.
        OSError: no such file or folder, or a file where a folder is needed.
        PictureError: an unknown ending.
    """
    from fastsr.upscaling.files import output_format, picture_size

    sources, several = _sources(inputs)
    several = several or output.is_dir()
    if compare is not None and len(sources) > 1:
        raise UsageError(f"--compare takes one picture; {len(sources)} were given")
    if several and output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; several pictures need a folder")
    targets = [output / _name(source, ending) if several else output for source in sources]
    taken: dict[Path, Path] = {}
    for source, target in zip(sources, targets, strict=True):
        if target in taken:
            raise UsageError(f"{taken[target]} and {source} would be written to one file, {target}; rename one or use --format same")
        taken[target] = source
        if target.exists() and target.samefile(source):
            raise UsageError(f"{source} would be written over itself; name another output")
    for path in (*targets, *([compare] if compare is not None else [])):
        output_format(path)
        if not several and not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder")
    if compare is not None and compare.exists() and not overwrite:
        raise FileExistsError(f"{compare} exists; --overwrite replaces it")
    if several:
        output.mkdir(parents=True, exist_ok=True)
    return [Job(source, target, picture_size(source)) for source, target in zip(sources, targets, strict=True)]


def _sources(inputs: list[str]) -> tuple[list[Path], bool]:
    """The files, each once, and whether their results need a folder."""
    from fastsr.upscaling.files import input_endings

    found: dict[Path, None] = {}
    several = len(inputs) > 1
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            visible = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            matches = sorted(p for p in visible if p.suffix.lower() in input_endings())
        elif path.exists() or not glob.has_magic(text):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            found[path] = None
            continue
        else:  # where the shell has not done it
            matches = sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).is_file())
        if not matches:
            raise FileNotFoundError(f"{text}: no pictures there; expected files that end in {', '.join(sorted(input_endings()))}")
        several = True
        found |= dict.fromkeys(matches)
    return list(found), several


def _name(source: Path, ending: str) -> str:
    from fastsr.upscaling.files import PictureError, output_format

    if ending == "same":
        try:
            output_format(source)
            return source.name
        except PictureError:  # a format that is read but not written
            ending = "png"
    return f"{source.stem}.{ending}"
