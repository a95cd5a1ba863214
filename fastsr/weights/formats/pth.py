"""PyTorch's own files, the zip archives of today and the plain pickles of before 1.6.

`torch.load(weights_only=True)` runs no code, but trusts the sizes that the pickle claims. So the pickle is first
walked without being executed: it may hold nothing but tensors, containers and plain values, and each storage may
claim no more bytes than the file has for it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from fastsr.weights.errors import WeightsError, some

#: Of the pickle alone; that of a network with a thousand tensors has about 100 kB.
MAX_PICKLE = 2 << 20

STORAGES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip

GLOBALS = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._tensor _rebuild_from_type_v2",
    "torch Tensor",
    "torch.nn.parameter Parameter",
    *(f"torch {name}" for name in STORAGES),
}

WRAPPERS = ("params_ema", "params-ema", "params", "state_dict")

#: The number with which PyTorch's plain pickles begin, as pickled.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def matches(head: bytes) -> bool:
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[2:4] == b"\x8a\x0a")


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of the file's state dict."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(file)
        else:
            _check_legacy(file, path.stat().st_size)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on a broken file
        raise WeightsError(f"PyTorch cannot read it: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    return _state_dict(content)


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without its wrapper; tensors whose storage is smaller than themselves are refused."""
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise WeightsError(f"it holds a {type(content).__name__}; expected a dictionary of tensors")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(f"the tensor {name[:80]!r} of shape {tuple(tensor.shape)} repeats a smaller storage")
    if not tensors:
        raise WeightsError(f"no tensors found; keys: {some(map(str, content))}")
    return tensors


def _check_archive(file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            if len(records) != len(archive.infolist()):
                raise WeightsError("the archive holds two records of one name")
            if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in records.values()):
                raise WeightsError("the archive is compressed, which PyTorch's files never are")
            if any(name.endswith("/constants.pkl") for name in records):
                raise WeightsError("a TorchScript program, which is code; expected a state dict (torch.save(model.state_dict(), path))")
            pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise WeightsError(f"a zip archive, but not one of PyTorch's; records: {some(records)}")
            if records[pickles[0]].file_size > MAX_PICKLE:
                raise WeightsError(f"its pickle has {records[pickles[0]].file_size} bytes; at most {MAX_PICKLE} are read")
            root = pickles[0].removesuffix("data.pkl")
            for key, size in _storages(io.BytesIO(archive.read(pickles[0]))):
                record = records.get(f"{root}data/{key}")
                if record is None or record.file_size < size:
                    has = "no bytes" if record is None else f"{record.file_size} bytes"
                    raise WeightsError(f"the storage {key[:40]!r} claims {size} bytes; the file has {has} for it")
    except WeightsError:
        raise
    except Exception as error:  # zipfile raises nearly anything on a broken archive
        raise WeightsError(f"a truncated or broken PyTorch archive: {error}") from error


def _check_legacy(file: BinaryIO, size: int) -> None:
    """Five pickles (magic number, protocol, system, the object, its storages' names), then the storages' bytes."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE))
    claimed: dict[str, int] = {}
    for _ in range(5):
        claimed |= dict(_storages(head))
    if sum(claimed.values()) > size:
        raise WeightsError(f"its storages claim {sum(claimed.values())} bytes; the file has {size}")


REFUSED = {
    *("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BYTEARRAY8", "FRAME"),
    *("POP", "POP_MARK", "DUP"),  # with which a tensor could be given other sizes than those that were checked
}


def _storages(stream: io.BytesIO) -> list[tuple[str, int]]:
    """Walk one pickle without executing it: the storages that it names, with the bytes that each claims."""
    storages: list[tuple[str, int]] = []
    elements = 0  # of the storage named last
    stack: deque[Any] = deque(maxlen=8)  # what the last operations pushed; that of an operation with no value is its name
    memo: dict[int, Any] = {}
    view: list[list[int]] | None = None  # while a tensor is described: its offset, then its sizes, then its strides
    try:
        for op, argument, _ in pickletools.genops(stream):
            name, value = op.name, cast(Any, argument)
            if name in REFUSED:
                raise WeightsError(f"its pickle uses {name}, which state dicts saved by PyTorch do not")
            if name == "PROTO" and value < 2:
                raise WeightsError(f"its pickle has protocol {value}; expected 2")
            if view is not None:
                view = _describe(view, name, value, elements)
            if name == "GLOBAL":
                if value not in GLOBALS:
                    raise WeightsError(f"its pickle names {value[:80]!r}, which is not a tensor; expected a state dict of tensors")
                stack.append(value)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                if value > MAX_PICKLE:
                    raise WeightsError("its pickle numbers its memo absurdly")
                memo[value] = stack[-1] if stack else None
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo.get(value))
            elif name == "BINPERSID":
                key, elements, size = _claim(list(stack))
                storages.append((key, size))
                stack.append(name)
                view = [[]]
            else:
                stack.append(value if value is not None else name)
    except (ValueError, EOFError, IndexError, pickle.UnpicklingError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"a truncated or broken pickle: {str(error)[:100]}") from error
    return storages


def _describe(view: list[list[int]], name: str, value: Any, elements: int) -> list[list[int]] | None:
    """Go on with a tensor's offset, sizes and strides, which follow its storage; None once they are known to fit into it."""
    if len(view) == 1 and len(view[0]) == 1:
        view.append([])  # the offset is there
    if isinstance(value, int) and name in ("BININT", "BININT1", "BININT2", "LONG1") and value >= 0:
        view[-1].append(value)
    elif name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3") and len(view) > 1:
        view.append([])
    elif name not in ("MARK", "BINPUT", "LONG_BINPUT") or view == [[]]:
        raise WeightsError("its pickle describes a tensor in a way that PyTorch's own files do not")
    if len(view) < 4:
        return view
    (offset,), sizes, strides, _ = view
    if len(sizes) != len(strides):
        raise WeightsError(f"a tensor has sizes {sizes} and strides {strides}")
    end = offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if all(sizes) else 0
    if end > elements:
        raise WeightsError(f"a tensor with sizes {sizes} and strides {strides} reaches element {end} of a storage of {elements}")
    return None


def _claim(last: list[Any]) -> tuple[str, int, int]:
    """Key, elements and bytes of a storage, from the values pushed before it: MARK "storage" class key location count [None] TUPLE."""
    if last[-2:-1] == ["NONE"]:
        del last[-2]
    match last[-7:]:
        case ["MARK", "storage", str(kind), str(key), str(), int(count), "TUPLE"] if kind.removeprefix("torch ") in STORAGES and count >= 0:
            return key, count, count * STORAGES[kind.removeprefix("torch ")]
    raise WeightsError("its pickle describes a storage in a way that PyTorch's own files do not")
