"""One vector quantiser out of, and into, the state dicts of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsr.nn import EMAVectorQuantizer, VectorQuantizer
from fastsr.nn.quantizer_states import FORMATS, Format
from fastsr.weights.errors import WeightsError, some


@dataclass(frozen=True)
class Library:
    """A library: the names that its quantiser's tensors have, and what it does that no tensor shows."""

    format: Format
    options: dict[str, Any] = field(default_factory=dict)  #: of our module
    averages: dict[str, Any] = field(default_factory=dict)  #: further ones of moving averages


_LEGACY = {"commitment_cost": 0.25, "legacy_beta": True, "channel_dim": 1}
_FIRST = {"commitment_cost": 0.25, "channel_dim": 1}

LIBRARIES: dict[str, Library] = {
    "taming": Library(FORMATS["embedding"], _LEGACY),
    "diffusers": Library(FORMATS["embedding"], _LEGACY),
    "codeformer": Library(FORMATS["embedding"], _LEGACY),
    "restoreformer": Library(FORMATS["embedding"], _LEGACY),
    "femasr": Library(FORMATS["embedding"], _FIRST),
    "zalando": Library(FORMATS["zalando"], _FIRST, {"decay": 0.99}),
    "vector-quantize-pytorch": Library(
        FORMATS["vector-quantize-pytorch"], {"commitment_cost": 1.0, "gradient": "rotation"}, {"decay": 0.8}
    ),
    "rosinality": Library(FORMATS["rosinality"], {"commitment_cost": 0.25}, {"decay": 0.99}),
    "sonnet": Library(FORMATS["sonnet"], {"commitment_cost": 0.25}, {"decay": 0.99, "zero_debias": True}),
}


def read_quantizer(state: Mapping[str, Tensor], library: str, prefix: str = "", **options: Any) -> VectorQuantizer:
    """The quantiser that a part of a state dict is for.

    Args:
        state: of a whole network, or of its quantiser alone.
        library: who wrote it, one of `LIBRARIES`. It tells what no tensor shows: the placement of beta, the decay, the gradient.
        prefix: of the quantiser's names, for instance "quantize.".
        **options: of our module, in place of the library's, for instance `legacy_beta=False` for taming-transformers with
            `legacy=False`, `metric="cosine"`, or `decay`.

    Returns:
        An `fastsr.nn.EMAVectorQuantizer` where the state has moving averages, else a `VectorQuantizer`.

    Raises:
        ValueError: an unknown library.
        WeightsError: tensors that are missing or ill-shaped, or projections around the codebook.
    """
    known = _library(library)
    part = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if projections := [key for key in part if key.startswith(("project_in.", "project_out."))]:
        raise WeightsError(f"{some(projections)}: the quantiser projects; fastsr.nn.adapters.VectorQuantize does too")
    try:
        own = known.format.to_own(part)
    except KeyError as error:
        raise WeightsError(f"{library}: no {prefix}{error.args[0]} among {some(state)}") from error
    codebook = own["codebook"]
    _check(library, own)
    heads = codebook.shape[0] if codebook.dim() == 3 else 1
    settings = {**known.options, **(known.averages if "cluster_size" in own else {}), "num_heads": heads, **options}
    kind = EMAVectorQuantizer if "cluster_size" in own else VectorQuantizer
    module = kind(codebook.shape[-2], codebook.shape[-1], **settings)
    module.load_state_dict({key: tensor.detach() for key, tensor in own.items()})
    return module.to(codebook.device)


def write_quantizer(module: VectorQuantizer, library: str, prefix: str = "") -> dict[str, Tensor]:
    """The state of a quantiser as `library` names and lays it out; fresh tensors.

    Raises:
        ValueError: an unknown library, or one that has no place for several heads or for moving averages.
    """
    own = {name: getattr(module, name).detach() for name in ("codebook", "cluster_size", "cluster_sum", "steps") if hasattr(module, name)}
    theirs = _library(library).format.from_own(own, getattr(module, "decay", 0.0))
    return {prefix + key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in theirs.items()}


def _library(name: str) -> Library:
    if name not in LIBRARIES:
        raise ValueError(f"library is {name!r}; expected one of {', '.join(map(repr, LIBRARIES))}")
    return LIBRARIES[name]


def _check(library: str, own: dict[str, Any]) -> None:
    shape = tuple(own["codebook"].shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise WeightsError(f"{library}: the codebook has shape {shape}; expected (K, D), or (heads, K, D)")
    for name, expected in (("cluster_size", shape[:-1]), ("cluster_sum", shape)):
        if name in own and tuple(own[name].shape) != expected:
            raise WeightsError(f"{library}: the averages ({name}) have shape {tuple(own[name].shape)}; expected {expected}")
    if floats := [name for name, tensor in own.items() if name != "steps" and not tensor.is_floating_point()]:
        raise WeightsError(f"{library}: {some(floats)} of dtype {own[floats[0]].dtype}; expected floating point")
