"""ncnn: a `.param` text with one layer a line, and a `.bin` with the weights of its convolutions in that order.

The graph is not trusted to be an RRDBNet because it has the right number of convolutions. Its outputs are written as
expressions (which convolution of what, added to what, times how much), the same is done for an RRDBNet of the
sizes found, and the two must be equal. Only then is the `.bin` read, and its size must be right to the byte.

    .param   7767517 / layers blobs / type name inputs outputs input-names... output-names... key=value...
    .bin     for each convolution: tag (4 bytes), weights (float16 padded to 4 bytes if the tag is 0x01306B47,
             float32 if it is 0), bias (float32)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsr.weights.errors import WeightsError

MAGIC = b"7767517"
FP16_TAG = 0x01306B47

#: The text of a network with 23 blocks has 117 kB.
MAX_TEXT = 4 << 20


@dataclass(frozen=True)
class Layer:
    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[int, Any]


@dataclass(frozen=True)
class Convolution:
    """Sizes of a 3x3 convolution."""

    out_channels: int
    in_channels: int


def matches(head: bytes) -> bool:
    return head.split(b"\n", 1)[0].strip() == MAGIC


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a converted RRDBNet under BasicSR's names; `path` is the `.param`."""
    if path.stat().st_size > MAX_TEXT:
        raise WeightsError(f"its text has {path.stat().st_size} bytes; at most {MAX_TEXT} are read")
    convolutions, names = recognise(parse(path.read_bytes()))
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise WeightsError(f"no {weights.name} beside it; ncnn keeps the weights there, and both files are needed")
    return _blob(weights, convolutions, names)


def parse(text: bytes) -> list[Layer]:
    """The layers of a `.param` text."""
    try:
        lines = [line for line in text.decode("ascii").splitlines() if line.strip()]
        count, _ = (int(word) for word in lines[1].split())
    except (UnicodeDecodeError, IndexError, ValueError) as error:
        raise WeightsError("a broken .param file: its second line should hold the number of layers and of blobs") from error
    if len(lines) - 2 != count:
        raise WeightsError(f"the .param file announces {count} layers and has {len(lines) - 2}")
    return [_layer(line) for line in lines[2:]]


def _layer(line: str) -> Layer:
    words = line.split()
    try:
        kind, name, inputs, outputs = words[0], words[1], int(words[2]), int(words[3])
        blobs, options = words[4 : 4 + inputs + outputs], words[4 + inputs + outputs :]
        if inputs < 0 or outputs < 0 or len(blobs) != inputs + outputs:
            raise ValueError
        parsed: dict[int, Any] = {}
        for option in options:
            key, value = option.split("=")
            if int(key) <= -23300:  # an array: its length, then its items
                length, *items = value.split(",")
                if len(items) != int(length):
                    raise ValueError
                parsed[-int(key) - 23300] = tuple(float(item) for item in items)
            else:
                parsed[int(key)] = float(value) if any(c in value for c in ".eE") else int(value)
    except (ValueError, IndexError) as error:
        raise WeightsError(f"a broken line in the .param file: {line[:120]!r}") from error
    return Layer(kind, name, tuple(blobs[:inputs]), tuple(blobs[inputs:]), parsed)


class Expressions:
    """Expressions by number: equal expressions get equal numbers, so that comparing graphs costs nothing."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._terms: dict[int, tuple[tuple[int, float], ...]] = {}
        self._channels: dict[int, int] = {}
        self.convolutions: list[Convolution] = []

    def _number(self, expression: Any, channels: int) -> int:
        number = self._numbers.setdefault(expression, len(self._numbers))
        self._channels[number] = channels
        return number

    def channels(self, x: int) -> int:
        return self._channels[x]

    def image(self, channels: int) -> int:
        return self._number("image", channels)

    def conv(self, x: int, order: int, out_channels: int, slope: float) -> int:
        """Convolution number `order` in the file, with LeakyReLU; a slope of 1 is none."""
        return self._number(("conv", x, order, round(slope, 6)), out_channels)

    def cat(self, parts: tuple[int, ...]) -> int:
        return self._number(("cat", parts), sum(self._channels[p] for p in parts)) if len(parts) > 1 else parts[0]

    def double(self, x: int) -> int:
        return self._number(("nearest x2", x), self._channels[x])

    def add(self, *terms: tuple[int, float]) -> int:
        """A weighted sum; scaled values stay symbolic until they are added."""
        flat: list[tuple[int, float]] = []
        for x, factor in terms:
            flat += [(y, f * factor) for y, f in self._terms[x]] if x in self._terms else [(x, factor)]
        channels = {self._channels[x] for x, _ in flat}
        if len(channels) != 1:
            raise WeightsError(f"the graph adds blobs of {sorted(channels)} channels")
        key = tuple(sorted((x, round(f, 6)) for x, f in flat))
        number = self._number(("add", key), channels.pop())
        if len(terms) == 1:
            self._terms[number] = tuple(flat)
        return number


def recognise(layers: list[Layer]) -> tuple[list[Convolution], list[str]]:
    """The convolutions of the graph in their order, and the name of each in BasicSR's RRDBNet.

    Raises:
        WeightsError: the graph is not exactly an RRDBNet.
    """
    expressions = Expressions()
    result = _graph(layers, expressions)
    found = expressions.convolutions
    # conv_first, 15 a block, conv_body, 2 to 4 upsampling steps, conv_hr, conv_last
    steps = sum(layer.kind == "Interp" for layer in layers)
    blocks, rest = divmod(len(found) - 4 - steps, 15)
    if rest or blocks < 1 or not 2 <= steps <= 4:
        raise WeightsError(
            f"the graph has {len(found)} convolutions and {steps} upsampling steps, which is no RRDBNet: expected 4 + 15 * blocks + steps"
        )
    names = _names(blocks, steps)
    if _rrdbnet(expressions, blocks, steps) != result:
        raise WeightsError(f"the graph has the {len(found)} convolutions of an RRDBNet with {blocks} blocks, but is wired in another way")
    return found, names


def _graph(layers: list[Layer], e: Expressions) -> int:
    """The expression of the graph's last blob; fills `e.convolutions`."""
    blobs: dict[str, int] = {}
    first = next((layer for layer in layers if layer.kind == "Convolution"), None)
    if first is None:
        raise WeightsError("the graph has no convolution")
    for layer in layers:
        try:
            inputs = [blobs[name] for name in layer.inputs]
        except KeyError as error:
            raise WeightsError(f"the layer {layer.name!r} reads the blob {error}, which none before it writes") from error
        try:
            value = _expression(layer, inputs, e, first)
        except TypeError as error:  # an array where a number belongs, or the other way round
            raise WeightsError(f"the layer {layer.name!r} has options of the wrong kind: {layer.options}") from error
        blobs |= dict.fromkeys(layer.outputs, value)
    return value


def _expression(layer: Layer, inputs: list[int], e: Expressions, first: Layer) -> int:
    """What a layer gives, from what it is given."""
    option = layer.options
    if layer.kind != "Split" and len(layer.outputs) != 1:
        raise WeightsError(f"the layer {layer.name!r} of kind {layer.kind!r} has {len(layer.outputs)} outputs; expected 1")
    match layer.kind, len(inputs):
        case "Input", 0:
            size, out = _integer(first, 6), _integer(first, 0)
            return e.image(size // (9 * out) if out > 0 else 0)
        case "Split", 1:
            return inputs[0]
        case "Convolution", 1:
            return _convolution(layer, inputs[0], e)
        case "Concat", n if n >= 1 and option.get(0, 0) == 0:
            return e.cat(tuple(inputs))
        case "Eltwise", 2 if option.get(0, 0) == 1 and len(option.get(1, (1.0, 1.0))) == 2:
            return e.add(*zip(inputs, option.get(1, (1.0, 1.0)), strict=True))
        case "BinaryOp", 2 if option.get(0, 0) == 0:
            return e.add((inputs[0], 1.0), (inputs[1], 1.0))
        case "BinaryOp", 1 if option.get(0, 0) == 2 and option.get(1, 0) == 1:
            return e.add((inputs[0], float(option.get(2, 0.0))))
        case "Interp", 1 if option.get(0, 0) == 1 and option.get(1) == option.get(2) == 2.0:
            return e.double(inputs[0])
    about = f"of kind {layer.kind!r} with {len(inputs)} inputs and options {option}"
    raise WeightsError(f"the layer {layer.name!r} {about} is not part of an RRDBNet")


def _integer(layer: Layer, key: int) -> int:
    value = layer.options.get(key, 0)
    return value if isinstance(value, int) else 0


def _convolution(layer: Layer, x: int, e: Expressions) -> int:
    """A 3x3 convolution with stride 1, padding 1 and a bias; its weight count must fit the channels that reach it."""
    option = dict(layer.options)
    out, size = _integer(layer, 0), _integer(layer, 6)
    shape = {key: option.get(key, default) for key, default in ((1, 0), (2, 1), (3, 1), (4, 0), (5, 0), (8, 0))}
    square = all(option.get(key, shape[key - 10]) == shape[key - 10] for key in (11, 12, 13, 14))
    if shape != {1: 3, 2: 1, 3: 1, 4: 1, 5: 1, 8: 0} or not square or set(option) - {0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14}:
        raise WeightsError(f"the convolution {layer.name!r} has options {option}; expected 3x3, stride 1, padding 1, with a bias")
    activation, parameters = option.get(9, 0), option.get(10, ())
    if activation == 0:
        slope = 1.0
    elif activation == 2 and isinstance(parameters, tuple) and len(parameters) == 1:
        slope = parameters[0]
    else:
        raise WeightsError(f"the convolution {layer.name!r} has activation {activation} {parameters}; expected none or LeakyReLU")
    if out < 1 or size != 9 * out * e.channels(x):
        raise WeightsError(f"the convolution {layer.name!r} has {size} weights; expected 9 * {out} * {e.channels(x)}")
    e.convolutions.append(Convolution(out, e.channels(x)))
    return e.conv(x, len(e.convolutions) - 1, out, slope)


def _names(blocks: int, steps: int) -> list[str]:
    body = [f"body.{i}.rdb{j}.conv{k}" for i in range(blocks) for j in (1, 2, 3) for k in range(1, 6)]
    return ["conv_first", *body, "conv_body", *(f"conv_up{k}" for k in range(1, steps + 1)), "conv_hr", "conv_last"]


def _rrdbnet(e: Expressions, blocks: int, steps: int) -> int:
    """The expression that an RRDBNet has."""
    orders = iter(range(len(e.convolutions)))

    def conv(x: int, slope: float = 1.0) -> int:
        order = next(orders)
        return e.conv(x, order, e.convolutions[order].out_channels, slope)

    def dense(x: int) -> int:
        parts = [x]
        for _ in range(4):
            parts.append(conv(e.cat(tuple(parts)), 0.2))
        return e.add((conv(e.cat(tuple(parts))), 0.2), (x, 1.0))

    first = y = conv(e.image(e.convolutions[0].in_channels))
    for _ in range(blocks):
        y = e.add((dense(dense(dense(y))), 0.2), (y, 1.0))
    y = e.add((first, 1.0), (conv(y), 1.0))
    for _ in range(steps):
        y = conv(e.double(y), 0.2)
    return conv(conv(y, 0.2))


def _blob(path: Path, convolutions: list[Convolution], names: list[str]) -> dict[str, Tensor]:
    """The tensors; every size has been checked against the file's before it is allocated."""
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    tensors: dict[str, Tensor] = {}
    at = 0

    def take(size: int, dtype: str, name: str) -> np.ndarray:
        nonlocal at
        if at + size > len(data):
            raise WeightsError(f"{path.name} has {len(data)} bytes; {name} needs {size} at {at} (is it truncated?)")
        at += size
        return data[at - size : at].view(dtype)

    for name, conv in zip(names, convolutions, strict=True):
        count = 9 * conv.out_channels * conv.in_channels
        tag = int(take(4, "<u4", name)[0])
        if tag == FP16_TAG:
            weight = take(2 * count + 2 * (count % 2), "<f2", name)[:count]
        elif tag == 0:
            weight = take(4 * count, "<f4", name)
        else:
            raise WeightsError(f"{path.name}: {name} has the tag {tag:#010x}; expected {FP16_TAG:#010x} (float16) or 0 (float32)")
        bias = take(4 * conv.out_channels, "<f4", name)
        tensors[f"{name}.weight"] = torch.from_numpy(weight.astype(np.float32)).reshape(conv.out_channels, conv.in_channels, 3, 3)
        tensors[f"{name}.bias"] = torch.from_numpy(bias.astype(np.float32))
    if at != len(data):
        raise WeightsError(f"{path.name} has {len(data)} bytes; this network needs {at}")
    return tensors
