"""`fastsr.cuda_graph` of a module: replays against the model's own code, and every reason to run that instead.

Without a GPU a fake recorder stands in for CUDA graphs (recorders.py); with FASTSR_TEST_DEVICE=cuda the same tests record real ones.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastsr
from fastsr.graphs import GraphedModule
from fastsr.models import RCAN, RRDBNet
from tests.graphs.recorders import Making, options
from tests.harness import DEVICE

REAL = (True,) if DEVICE == "cuda" else (False,)


class Toy(nn.Module):
    """Batch statistics, a dropout, a buffer, a parameter that nothing reads and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        self.calls += 1
        y = self.last(torch.relu(self.norm(self.first(x)))) * scale
        return {"y": y, "largest": y.argmax(1), "mean": y.mean()}


def picture(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pair(model: nn.Module, **more) -> tuple[nn.Module, GraphedModule, Making]:
    """The model on its own, and a wrapper around a copy."""
    model = model.to(DEVICE)
    make = Making(REAL[0])
    return model, GraphedModule(copy.deepcopy(model), options(make, **more)), make


def inner(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, GraphedModule) else model


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return list(mine) == list(other) and all(torch.equal(mine[k], other[k]) for k in mine)


def same_gradients(a: nn.Module, b: nn.Module) -> bool:
    pairs = [(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    return all((g is None) == (h is None) and (g is None or torch.equal(g, h)) for g, h in pairs)


@pytest.fixture(autouse=True)
def _repeatable():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.deterministic = before


def test_inference_gives_the_models_own_bits():
    own, fast, _ = pair(RRDBNet(3, 3, num_feat=8, num_block=1, num_grow_ch=4, scale=4).eval())
    with torch.no_grad():
        for seed in range(3):
            for size in ((1, 3, 6, 7), (2, 3, 5, 5)):
                x = picture(*size, seed=seed)
                assert torch.equal(fast(x), own(x))
    assert not fast.reasons
    assert "2 of at most 8 graphs" in fast.report()
    assert "3 x replayed: (1, 3, 6, 7) float32" in fast.report()


@pytest.mark.parametrize("static", [False, True])
def test_outputs_are_the_callers_own_unless_he_wants_them_static(static):
    own, fast, _ = pair(nn.Conv2d(3, 4, 3), static_output=static)
    with torch.no_grad():
        first = fast(picture(1, 3, 8, 8, seed=1))
        second = fast(picture(1, 3, 8, 8, seed=2))
        assert torch.equal(second, own(picture(1, 3, 8, 8, seed=2)))
        assert (first.data_ptr() == second.data_ptr()) == static
        assert torch.equal(first, own(picture(1, 3, 8, 8, seed=1))) != static


def test_training_steps_are_those_of_the_model():
    """Statistics, gradients, accumulation over two calls, and what an optimizer makes of it, bit for bit; no phantom steps."""
    own, fast, _ = pair(Toy())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (own, fast)]
    for step in range(6):
        for model, optimizer in zip((own, fast), optimizers, strict=True):
            if step % 2 == 0:
                optimizer.zero_grad(set_to_none=step % 4 == 0)
            x = picture(4, 3, 6, 6, seed=step).requires_grad_(step != 3)
            out = model(x, scale=0.5)
            assert not out["largest"].requires_grad
            (out["y"].square().mean() + out["mean"]).backward()
            model.of_input = x.grad
            if step % 2:
                optimizer.step()
        assert (own.of_input is None) == (fast.of_input is None)
        assert own.of_input is None or torch.equal(own.of_input, fast.of_input)
        assert same_gradients(own, fast)
        assert own.unused.grad is None
        assert same_state(own, fast)
    assert not fast.reasons
    assert int(fast.calls) == 6


def test_a_whole_network_trains_alike_under_autocast_with_a_scaler():
    own, fast, _ = pair(RCAN(3, 3, num_feat=8, num_group=1, num_block=2, squeeze_factor=4, upscale=2))
    for seed in range(3):
        gradients = []
        for model in (own, fast):
            scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            with torch.autocast(DEVICE, torch.bfloat16):
                y = model(picture(2, 3, 7, 9, seed=seed))
                loss = y.float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            gradients.append([p.grad.clone() for p in model.parameters()])
            optimizer.zero_grad()
        assert y.dtype == torch.bfloat16
        assert all(torch.equal(g, h) for g, h in zip(*gradients, strict=True))
        assert same_state(own, fast)
    assert not fast.reasons


def test_the_gradients_of_two_calls_do_not_share_memory():
    _, fast, _ = pair(nn.Conv2d(3, 4, 3))
    fast(picture(1, 3, 8, 8, seed=1)).sum().backward()
    kept = fast.weight.grad
    before = kept.clone()
    fast.zero_grad(set_to_none=True)
    fast(picture(1, 3, 8, 8, seed=2)).sum().backward()
    assert torch.equal(kept, before)
    assert not torch.equal(fast.weight.grad, before)


def test_each_mode_has_a_graph_of_its_own():
    own, fast, _ = pair(Toy())
    x = picture(2, 3, 6, 6)
    for _ in range(2):
        for training in (True, False):
            for gradients in (True, False):
                own.train(training)
                fast.train(training)
                with torch.set_grad_enabled(gradients):
                    mine, other = own(x)["y"], fast(x)["y"]
                assert mine.requires_grad == other.requires_grad == gradients
                assert torch.equal(mine, other)
                del mine, other  # else their backward is still to come
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(own(x)["y"], fast(x)["y"])
        with torch.inference_mode():
            assert torch.equal(own(x)["y"], fast(x)["y"])
            assert torch.equal(own(x, scale=2.0)["y"], fast(x, scale=2.0)["y"])
    assert not fast.reasons
    assert len(fast._recorded.entries) == 6  # inference mode is no mode of its own, scale=2 is


def test_layouts_are_told_apart_and_kept():
    own, fast, make = pair(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = picture(2, 3, 8, 8).contiguous(memory_format=layout)
            assert fast(x).stride() == own(x).stride()
        wide = picture(1, 3, 8, 8).expand(2, 3, 8, 8)
        assert torch.equal(fast(wide), own(wide))
    assert len(fast._recorded.entries) == 3
    assert len(make.made) == 1


def test_an_update_in_place_is_seen_and_a_moved_parameter_is_noticed():
    own, fast, _ = pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)))
    x = picture(1, 3, 8, 8)

    def agree() -> None:
        with torch.no_grad():
            assert torch.equal(own(x), fast(x))

    agree()
    for model in (own, fast):
        inner(model)[0].weight.data.mul_(2.0)
    agree()
    assert not fast.reasons
    for model in (own, fast):
        inner(model)[0].weight.data = inner(model)[0].weight.data * 3
    agree()
    assert dict(fast.reasons) == {"Conv2d.weight lies elsewhere now: recorded graphs were dropped": 1}
    agree()
    for model in (own, fast):
        inner(model)[1].bias = nn.Parameter(torch.ones(4, device=DEVICE))
    agree()
    agree()
    for model in (own, fast):
        inner(model)[1] = nn.Identity()
    agree()
    agree()
    assert fast.reasons["a parameter, buffer or module was replaced: recorded graphs were dropped"] == 2
    assert sum(fast.reasons.values()) == 3


def test_a_change_between_forward_and_backward_leaves_the_old_values_to_backward():
    own, fast, _ = pair(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)))
    x = picture(1, 3, 8, 8)
    for model in (own, fast):
        y = model(x)
        inner(model)[1].weight.data = torch.zeros_like(inner(model)[1].weight)
        y.square().sum().backward()
    assert same_gradients(own, fast)


def test_a_memory_plan_is_noticed():
    own, fast, _ = pair(RCAN(3, 3, num_feat=8, num_group=2, num_block=2, squeeze_factor=4, upscale=2))
    shape = (2, 3, 6, 6)
    for model in (own, fast):
        model(picture(*shape)).square().mean().backward()
    fastsr.memory.plan(fast.model, shape, policy="inputs").apply(fast.model)
    assert any(getattr(m, "save", None) == "input" for m in fast.model.modules())
    for _ in range(2):
        for model in (own, fast):
            model(picture(*shape)).square().mean().backward()
    assert list(fast.reasons.values()) == [1]
    assert "memory plan" in next(iter(fast.reasons)) or "replaced" in next(iter(fast.reasons))
    assert same_gradients(own, fast)


def test_an_exchanged_forward_is_noticed():
    own, fast, _ = pair(nn.Sequential(nn.Conv2d(3, 4, 3)))
    x = picture(1, 3, 8, 8)
    with torch.no_grad():
        fast(x)
        for model in (own, fast.model):
            model[0].forward = lambda x: x * 2
        assert torch.equal(fast(x), x * 2)
        assert torch.equal(fast(x), own(x))
        for model in (own, fast.model):
            del model[0].forward
        assert torch.equal(fast(x), own(x))
    assert dict(fast.reasons) == {"a module's forward was exchanged (fuse_ or unfuse_): recorded graphs were dropped": 2}


def test_two_calls_before_a_backward():
    """As in a GAN: the second call runs the model's own code, for the first one's activations are still needed."""
    own, fast, _ = pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)))
    for _ in range(2):
        for model in (own, fast):
            real, faked = (model(picture(2, 3, 8, 8, seed=s)) for s in (1, 2))
            with torch.no_grad():
                model(picture(2, 3, 8, 8, seed=3))  # nor may this one replay
            (real.square().mean() - faked.square().mean()).backward()
        assert same_gradients(own, fast)
    assert dict(fast.reasons) == {"the backward of an earlier call is still to come": 4}
    y = fast(picture(2, 3, 8, 8))  # never differentiated
    del y
    fast(picture(2, 3, 8, 8)).sum().backward()
    assert sum(fast.reasons.values()) == 4


def test_a_second_backward_and_a_double_backward_raise():
    _, fast, _ = pair(nn.Conv2d(3, 4, 3))
    y = fast(picture(1, 3, 8, 8))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through one replayed call"):
        y.sum().backward()
    x = picture(1, 3, 8, 8).requires_grad_()
    (g,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


@pytest.mark.parametrize("where", ["module", "inner", "all modules", "parameter", "argument"])
def test_hooks_are_run(where):
    _, fast, _ = pair(nn.Sequential(nn.Conv2d(3, 4, 3)))
    x = picture(1, 3, 8, 8).requires_grad_()
    seen = []
    handle = {
        "module": lambda: fast.model.register_forward_pre_hook(lambda *_: seen.append(1)),
        "inner": lambda: fast.model[0].register_full_backward_hook(lambda *_: seen.append(1)),
        "all modules": lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)),
        "parameter": lambda: fast.model[0].weight.register_hook(lambda g: seen.append(1)),
        "argument": lambda: x.register_hook(lambda g: seen.append(1)),
    }[where]()
    try:
        for _ in range(2):
            fast(x).sum().backward()
    finally:
        handle.remove()
    assert len(seen) >= 2
    assert sum(fast.reasons.values()) == 2
    assert "hook" in next(iter(fast.reasons))
    fast(x).sum().backward()
    assert sum(fast.reasons.values()) == 2


def test_hooks_on_the_wrapper_and_after_accumulation_do_not_hinder():
    _, fast, _ = pair(nn.Conv2d(3, 4, 3))
    seen = []
    fast.register_forward_hook(lambda *_: seen.append("output"))
    fast.weight.register_post_accumulate_grad_hook(lambda p: seen.append("gradient"))
    for _ in range(2):
        fast(picture(1, 3, 8, 8)).sum().backward()
    assert seen == ["output", "gradient"] * 2
    assert not fast.reasons


def test_no_more_graphs_than_allowed():
    own, fast, _ = pair(nn.Conv2d(3, 4, 3), max_graphs=2)
    with torch.no_grad():
        for _ in range(2):
            for width in (8, 9, 10):
                x = picture(1, 3, 8, width)
                assert torch.equal(own(x), fast(x))
    assert dict(fast.reasons) == {"max_graphs=2 graphs are recorded and none fits ((1, 3, 8, 10) float32)": 2}
    assert "2 x max_graphs=2 graphs" in fast.report()


def test_a_model_that_keeps_moving_is_not_recorded_for_ever():
    _, fast, make = pair(nn.Conv2d(3, 4, 3), max_graphs=1)
    with torch.no_grad():
        for _ in range(20):
            fast.model.weight.data = fast.model.weight.data.clone()
            fast(picture(1, 3, 8, 8))
            fast(picture(1, 3, 8, 8))
    assert any("keeps changing" in reason for reason in fast.reasons)
    assert fast._recorded.made == 4
    fast.reset()
    with torch.no_grad():
        fast(picture(1, 3, 8, 8))
    assert fast._recorded.made == 1
    assert make.made


def test_a_failed_recording_leaves_the_models_own_code():
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum().item())  # waits for the GPU

    own, fast, make = pair(Waits())
    if not REAL[0]:

        def broken(device: torch.device):
            recorder = Making()(device)
            recorder.broken = RuntimeError("operation not permitted when stream is capturing\nmore lines")
            return recorder

        fast.__dict__["_options"] = options(broken)
    for _ in range(2):
        x = picture(1, 3, 8, 8)
        assert torch.equal(own(x), fast(x))
    (reason,) = fast.reasons
    assert reason.startswith("recording failed: ")
    assert "more lines" not in reason
    assert fast.reasons[reason] == 2
    assert make is not None


def test_the_users_own_mistake_is_raised_as_the_model_raises_it():
    _, fast, _ = pair(nn.Conv2d(3, 4, 3))
    with pytest.raises(RuntimeError, match="channels"):
        fast(picture(1, 5, 8, 8))
    assert len(fast.reasons) == 1


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda f: f(picture(1, 3, 8, 8), {"a": {1, 2}}), "an argument is a set, which has no hash"),
        (lambda f: f(torch.zeros(1, 3, 8, 8).to("meta"), None), "an argument is on meta, the model on"),
    ],
)
def test_arguments_that_no_graph_can_take(call, reason):
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, other: object) -> Tensor:
            return self.conv(x) if x.device == self.conv.weight.device else x

    _, fast, _ = pair(Takes())
    call(fast)
    assert [r.startswith(reason) for r in fast.reasons] == [True]


def test_several_devices_and_classes_of_their_own():
    two = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, device="meta"))
    fast = GraphedModule(two, options(Making()))
    assert not fast.prepare(torch.zeros(1, 3, 8, 8))
    assert next(iter(fast.reasons)).startswith("parameters and buffers lie on 2 devices (")
    lazy = GraphedModule(nn.LazyConv2d(4, 3), options(Making()))
    lazy(torch.zeros(1, 3, 8, 8))
    assert next(iter(lazy.reasons)) == "a parameter or buffer is sparse or of a class of its own"
    assert lazy(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    assert lazy.prepare(torch.zeros(1, 3, 8, 8)) or len(lazy.reasons) == 2


def test_preparing_is_no_step():
    """Neither statistics nor gradients nor random numbers change, and the first call then replays."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).to(DEVICE)
    fast = GraphedModule(model, options(Making(REAL[0])))
    before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert fast.prepare(picture(2, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(numbers, torch.get_rng_state())
    first, second = (fast(picture(2, 3, 8, 8)) for _ in range(2))
    assert not torch.equal(first, second)  # a replay draws new numbers


def test_it_passes_for_the_model():
    """State dict, loading, `.to`, modes, attributes, children; also as a part of another module."""
    model = Toy().to(DEVICE)
    fast = GraphedModule(model, options(Making(REAL[0])))
    whole = nn.ModuleDict({"net": fast}).to(DEVICE)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert list(whole.state_dict()) == [f"net.{k}" for k in model.state_dict()]
    assert [n for n, _ in whole.named_parameters()] == [f"net.{n}" for n, _ in model.named_parameters()]
    whole.load_state_dict({k: torch.full_like(v, 3) for k, v in whole.state_dict().items()})
    assert all((p == 3).all() for p in model.parameters())
    whole.eval()
    assert not model.norm.training
    assert not model.training
    assert fast.first is model.first
    fast.double()
    assert model.first.weight.dtype == torch.float64
    fast.note = "reaches the model"
    assert model.note == "reaches the model"
    fast.unused = nn.Parameter(torch.ones(3))
    assert model.unused.sum() == 3
    assert fast.model is model
    with pytest.raises(AttributeError, match="nothing"):
        _ = fast.nothing


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how):
    own, fast, _ = pair(nn.Conv2d(3, 4, 3), max_graphs=3)
    x = picture(1, 3, 8, 8)
    with torch.no_grad():
        fast(x)
        other = copy.deepcopy(fast) if how == "deepcopy" else pickle.loads(pickle.dumps(fast))
        assert type(other) is GraphedModule
        assert other._options.max_graphs == 3
        assert not other._recorded.entries
        other.weight.zero_()
        assert not torch.equal(other(x), own(x))
        assert torch.equal(fast(x), own(x))
    assert not fast.reasons
    assert not other.reasons


@pytest.mark.skipif(DEVICE == "cuda", reason="asks what happens without a GPU")
def test_without_a_gpu_the_models_own_code_runs():
    model = nn.Conv2d(3, 4, 3)
    fast = fastsr.cuda_graph(model, torch.zeros(1, 3, 8, 8))
    assert isinstance(fast, GraphedModule)
    x = picture(1, 3, 8, 8)
    assert torch.equal(fast(x), model(x))
    assert dict(fast.reasons) == {"the model is on cpu; only a GPU has graphs": 2}
    assert "2 calls ran the model's own code" in fast.report()
    assert pickle.loads(pickle.dumps(fast))._options.warmup == 3


def test_under_torch_compile_the_models_own_code_is_traced():
    own, fast, _ = pair(nn.Conv2d(3, 4, 3))
    compiled = torch.compile(lambda x: fast(x) * 2, backend="aot_eager", fullgraph=True)
    x = picture(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), own(x) * 2)
    assert not fast._recorded.entries


def test_mistakes_are_named():
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="max_graphs is 0; expected at least 1"):
        fastsr.cuda_graph(model, max_graphs=0)
    with pytest.raises(TypeError, match="modules are for a step"):
        fastsr.cuda_graph(model, modules=[model])
    with pytest.raises(TypeError, match="a step needs modules"):
        fastsr.cuda_graph(lambda x: x)
    with pytest.raises(ValueError, match="a step takes no example"):
        fastsr.cuda_graph(lambda x: x, torch.zeros(1), modules=[model])
    with pytest.raises(TypeError, match="model is a int; expected a module or a function"):
        fastsr.cuda_graph(3, modules=[])
