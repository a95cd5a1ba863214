"""safetensors: 8 bytes with the length of a JSON header, the header, then the tensors without gaps.

The whole header is checked against the file's size before anything is allocated; so this reader needs no package.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from fastsr.weights.errors import WeightsError

#: No network of ours comes near; a header that claims more is an attack or another kind of file.
MAX_HEADER = 16 << 20

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


def matches(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{"


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise WeightsError(f"the safetensors header claims {length} bytes; the file has {size}, and at most {MAX_HEADER} are read")
        entries = _entries(_header(file.read(length)), size - 8 - length)
        # copy-on-write: a page of the file enters memory when a tensor is first read, and is never written back
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        count = math.prod(shape)
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + begin) if end > begin else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape).clone()  # a header of any length: tensors may lie misaligned in the file
    return tensors


def write(tensors: dict[str, Tensor], file: BinaryIO) -> None:
    """Write contiguous tensors on the CPU, marked as PyTorch's."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _header(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise WeightsError("the safetensors header names something twice")
        return names

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, OverflowError) as error:
        raise WeightsError(f"the safetensors header is not JSON: {type(error).__name__}") from error
    except WeightsError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise WeightsError(f"the safetensors header is not usable: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError("the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _entries(header: dict[str, Any], room: int) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Each tensor's dtype, shape and place; together they fill the file exactly."""
    entries: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
    for name, entry in header.items():
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        kind, shape, place = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
        if not (isinstance(kind, str) and _naturals(shape) and len(shape) <= 8 and _naturals(place) and len(place) == 2):
            raise WeightsError(f"the safetensors entry {name[:80]!r} lacks a proper dtype, shape or data_offsets")
        if kind not in DTYPES:
            raise WeightsError(f"the tensor {name[:80]!r} has dtype {kind[:20]!r}; expected one of {', '.join(DTYPES)}")
        begin, end = place
        if end > room or end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            where = f"{begin}..{end} of {room} bytes"
            raise WeightsError(f"the tensor {name[:80]!r} of shape {shape} and dtype {kind} does not fit its place {where}")
        entries[name] = (DTYPES[kind], shape, begin, end)
    at = 0
    for _, _, begin, end in sorted(entries.values(), key=lambda entry: entry[2:]):
        if begin != at:
            raise WeightsError(f"the safetensors data has a gap or an overlap at byte {min(begin, at)}")
        at = end
    if at != room:
        raise WeightsError(f"the safetensors data has {room} bytes; its header describes {at}")
    return entries


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
