"""`fastsr.cuda_graph` on whole networks: replays against the networks' own code, bit for bit, and the time that they save.

Inference, a module's training step under bf16 autocast (forward and backward replayed, loss and optimizer outside), and a whole step as one
graph. A replay counts only where nothing fell back: every reason is in the file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastsr
from fastsr import models
from fastsr.bench.cases.gpu_steps import common

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "rcan": lambda: models.RCAN(3, 3, upscale=2),
    "rrdbnet": lambda: models.RRDBNet(3, 3, scale=4),
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Some loss."""
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    return y.float().square().mean()


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of all gradients."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def inference(model: nn.Module) -> dict[str, Any]:
    """One small picture, where launches cost most."""
    fast = fastsr.cuda_graph(model, max_graphs=2)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        equal = all(torch.equal(fast(x), model(x)) for x in (torch.rand(1, 3, s, 64, device="cuda") for s in (64, 96, 64)))
        x = torch.rand(1, 3, 64, 64, device="cuda")
        times = {"own": common.milliseconds(lambda: model(x)), "replay": common.milliseconds(lambda: fast(x))}
    return {"equal": equal, "reasons": dict(fast.reasons), "ms": times}


def training(model: nn.Module) -> dict[str, Any]:
    """A patch of 16 x 48 x 48; gradients of two steps, accumulated, then dropped."""
    fast = fastsr.cuda_graph(copy.deepcopy(model))
    whole_model = copy.deepcopy(model)

    def step(x: Tensor) -> Tensor:
        whole_model.zero_grad(set_to_none=True)
        loss = loss_of(whole_model, x)
        loss.backward()
        return loss.detach()

    whole = fastsr.cuda_graph(step, modules=[whole_model], warmup=2)
    inputs = [torch.rand(16, 3, 48, 48, device="cuda") for _ in range(4)]
    equal = []
    for i, x in enumerate(inputs):
        for one in (model, fast):
            if i % 2 == 0:
                one.zero_grad(set_to_none=True)
            loss_of(one, x).backward()
        equal.append(same(gradients(model), gradients(fast)))
    for x in inputs:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, x)
        loss.backward()
        equal.append(torch.equal(loss, whole(x)) and same(gradients(model), gradients(whole_model)))

    def plain(one: nn.Module) -> None:
        one.zero_grad(set_to_none=True)
        loss_of(one, inputs[0]).backward()

    times = {
        "own": common.milliseconds(lambda: plain(model)),
        "module": common.milliseconds(lambda: plain(fast)),
        "whole step": common.milliseconds(lambda: whole(inputs[0])),
    }
    warming = {r: n for r, n in whole.reasons.items() if not r.startswith("warming up")}
    return {"equal": all(equal), "reasons": {**fast.reasons, **warming}, "ms": times}


def main() -> int:
    """1 if a replay differs or a call fell back."""
    result, _ = common.arguments()
    torch.backends.cudnn.deterministic = True  # gradients of eager convolutions must repeat
    bad = []
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model = make().cuda()
        for what, check in (("inference", inference), ("training", training)):
            try:
                found = check(model.eval() if what == "inference" else model.train())
            except Exception as error:
                found = {"error": common.short(error)}
            result.save(**{f"{name} {what}": found})
            print(name, what, found, flush=True)
            if not found.get("equal") or found.get("reasons"):
                bad.append(f"{name} {what}")
            torch.cuda.empty_cache()
    print(f"bad: {bad}")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
