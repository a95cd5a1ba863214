"""`fastsr.cuda_graph` of a whole training step: the bits of the step's own code, with gradients kept, dropped and accumulated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastsr.graphs import GraphedStep
from fastsr.graphs.step import WARMING
from tests.graphs.recorders import Making, options
from tests.graphs.test_module import REAL, Toy, picture, same_gradients, same_state
from tests.harness import DEVICE


class Training:
    """A model, its optimizer and a step; `graphed` makes the step a graph."""

    def __init__(self, model: nn.Module, zeroes: bool, graphed: bool, steps_inside: bool = False, **more) -> None:
        self.model, self.zeroes, self.steps_inside = model.to(DEVICE), zeroes, steps_inside
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
        self.run = self.step
        if graphed:
            make = Making(REAL[0], [model], shared_pool=False)
            self.run = GraphedStep(self.step, [model], options(make, **more))

    def step(self, x: Tensor) -> Tensor:
        if self.zeroes:
            self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = self.model(x)
            loss = out["y"].float().square().mean() + out["mean"].float()
        self.scaler.scale(loss).backward()
        if self.steps_inside:
            self.optimizer.step()
        return loss.detach()


def two(**more) -> tuple[Training, Training]:
    model = Toy()
    return Training(copy.deepcopy(model), graphed=False, **{k: v for k, v in more.items() if k != "max_graphs"}), Training(
        model, graphed=True, **more
    )


@pytest.mark.parametrize("zeroes", [False, True], ids=["zeroed outside", "zeroed inside"])
@pytest.mark.parametrize("to_none", [False, True])
def test_steps_are_those_of_the_plain_code(zeroes, to_none):
    """Eight steps, an optimizer's step after each second one: losses, gradients, parameters and statistics, bit for bit."""
    both = two(zeroes=zeroes)
    for i in range(8):
        x = picture(2, 3, 6, 6, seed=i)
        losses = [t.run(x) for t in both]
        assert torch.equal(*losses)
        assert same_gradients(both[0].model, both[1].model)
        if i % 2:
            for t in both:
                t.scaler.step(t.optimizer)
                t.scaler.update()
                if not zeroes:
                    t.optimizer.zero_grad(set_to_none=to_none)
        assert same_state(both[0].model, both[1].model)
    graphed = both[1].run
    assert dict(graphed.reasons) == {WARMING: 2}
    assert sum(graphed._ledger.replays.values()) == 6
    assert graphed._count() <= 2  # gradients there, gradients not there


def test_an_optimizer_inside_the_step():
    both = two(zeroes=True, steps_inside=True)
    for i in range(5):
        assert torch.equal(*(t.run(picture(2, 3, 6, 6, seed=i)) for t in both))
    assert same_state(both[0].model, both[1].model)
    assert sum(both[1].run._ledger.replays.values()) == 3


def test_two_shapes_alternate():
    both = two(zeroes=False)
    for i in range(10):
        x = picture(2, 3, 6, 6 + i % 2, seed=i)
        assert torch.equal(*(t.run(x) for t in both))
        if i % 3 == 2:
            for t in both:
                t.optimizer.step()
                t.optimizer.zero_grad(set_to_none=True)
        assert same_gradients(both[0].model, both[1].model)
    assert same_state(both[0].model, both[1].model)
    assert set(both[1].run.reasons) == {WARMING}


def test_the_loss_is_the_callers_own():
    _, graphed = two(zeroes=True)
    losses = [graphed.run(picture(2, 3, 6, 6, seed=i)) for i in range(5)]
    assert len({t.data_ptr() for t in losses}) == 5
    assert len({float(t) for t in losses}) == 5


def test_gradients_that_were_not_there_when_it_was_recorded():
    """More kinds than graphs allowed: the step's own code, and the right sums."""
    both = two(zeroes=False, max_graphs=1)
    for i in range(6):
        for t in both:
            t.run(picture(2, 3, 6, 6, seed=i))
            for p in t.model.parameters():
                p.grad = None if p.grad is None else p.grad.clone()
        assert same_gradients(both[0].model, both[1].model)
    assert any(r.startswith("max_graphs=1") for r in both[1].run.reasons)


def test_a_moved_parameter_is_noticed():
    both = two(zeroes=True)
    for i in range(8):
        if i == 4:
            for t in both:
                t.model.first.weight.data = t.model.first.weight.data * 2
        assert torch.equal(*(t.run(picture(2, 3, 6, 6, seed=i)) for t in both))
        assert same_gradients(both[0].model, both[1].model)
    assert both[1].run.reasons["Conv2d.weight lies elsewhere now: recorded graphs were dropped"] == 1


def test_a_failed_recording_leaves_gradients_alone():
    both = two(zeroes=False)
    make = both[1].run._options.make_recorder

    def broken(device: torch.device):
        recorder = make(device)

        def record(run):
            run()
            raise RuntimeError("capture failed")

        recorder.record = record
        return recorder

    both[1].run._options = options(broken)
    for i in range(3):
        plain = both[0].run(picture(2, 3, 6, 6, seed=i))
        before = [p.grad for p in both[1].model.parameters()]
        if i < 2:
            assert torch.equal(plain, both[1].run(picture(2, 3, 6, 6, seed=i)))
        else:
            found, reason = both[1].run._find((picture(2, 3, 6, 6, seed=i),), {})
            assert found is None
            assert reason == "recording failed: RuntimeError: capture failed"
            assert all(p.grad is g for p, g in zip(both[1].model.parameters(), before, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="asks what happens without a GPU")
def test_without_a_gpu_the_steps_own_code_runs():
    import fastsr

    model = Toy()
    step = fastsr.cuda_graph(Training(model, True, False).step, modules=[model])
    step(picture(2, 3, 6, 6))
    assert dict(step.reasons) == {"the model is on cpu; only a GPU has graphs": 1}
    assert model.first.weight.grad is not None
