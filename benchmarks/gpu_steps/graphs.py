"""Every op with every fused backend: on a side stream, and captured in a CUDA graph and replayed on new inputs.

On the side stream the inputs are written late (after a long sleep on that stream), so a kernel launched on another stream
reads them too early. A replay must give bit for bit what a plain call gives on the new inputs.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsr.backends import BackendUnavailable
from fastsr.bench import gate, suite, timing
from fastsr.bench.case import Call, Case, Inputs
from fastsr.bench.cases.gpu_steps import common

SLEEP_CYCLES = 50_000_000  # some 30 ms


def outputs(answer: Any) -> tuple[torch.Tensor, ...]:
    """The outputs as a tuple, copied."""
    return tuple(t.detach().clone() for t in (answer if isinstance(answer, tuple) else (answer,)))


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def side_stream(call: Call, drawn: Inputs) -> bool:
    """True if the call waits for its own stream."""
    expected = outputs(call(*drawn))
    torch.cuda.synchronize()
    late = tuple(torch.full_like(t, torch.nan) if t.is_floating_point() else t.clone() for t in drawn)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for mine, source in zip(late, drawn, strict=True):
            mine.copy_(source)
        got = outputs(call(*late))
    stream.synchronize()
    return same(expected, got)


def replay(call: Call, first: Inputs, second: Inputs) -> bool:
    """True if replays on two sets of inputs give what plain calls give."""
    static = tuple(t.clone() for t in first)
    graph = timing.Graph(call, [static])
    for drawn in (first, second, first):
        for mine, source in zip(static, drawn, strict=True):
            mine.copy_(source)
        graph.replay()
        if not same(outputs(graph.answers[0]), outputs(call(*drawn))):
            return False
    return True


def check(case: Case, backend: str) -> dict[str, Any]:
    """Both checks of one case, or why they could not be made."""
    runner, dtype = case.runners[backend], getattr(torch, case.dtype)
    found: dict[str, Any] = {}
    try:
        call = runner.build(gate.draw_state(case, dtype))
        first, second = (gate.draw_inputs(case, seed, dtype, runner.channels_last) for seed in (1, 2))
        found["side_stream"] = side_stream(call, first)
        found["replay"] = replay(call, first, second)
    except BackendUnavailable as error:
        found["missing"] = str(error)
    except Exception as error:
        found["error"] = common.short(error)
    return found


def main() -> int:
    """1 if a check failed."""
    result, _ = common.arguments()
    # Gradients of eager convolutions inside the ops must repeat too.
    torch.backends.cudnn.deterministic = True
    found: dict[str, dict[str, Any]] = {}
    for form in common.hopper_forms():
        for module in suite.select(["ops"]):
            for case in suite.cases(module, suite.Options("cuda", ("float32", "bfloat16", "float16"), "tiny")):
                for backend in ("compiled", "triton") if form == "" else ("compiled",):
                    if backend in case.runners:
                        found[f"{case.name} {backend}{form}"] = check(case, backend)
                        result.save(checks=found)
    bad = {name: f for name, f in found.items() if "error" in f or False in f.values()}
    done = [f for f in found.values() if "missing" not in f]
    if not done:
        common.nothing_to_do("no kernel yet: no op has a fused backend here")
    print(f"{len(done)} checked, {len(bad)} bad: {bad}")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
