"""A fused model lives on as the trainer's: copies, checkpoints, hooks, wrappers, exports; and comes back unchanged."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastsr
from fastsr.fusion.swap import forward_of
from tests.fusion import toys
from tests.harness import random_tensor
from tests.models.eager_rcan import EagerRCAN
from tests.models.eager_rrdbnet import EagerRRDBNet


def esrgan() -> nn.Module:
    torch.manual_seed(0)
    return EagerRRDBNet(3, 3, 4, 8, 1, 4)


def rcan() -> nn.Module:
    torch.manual_seed(0)
    return EagerRCAN(3, 3, 8, 1, 2, 2, 2)


def picture(n: int = 1) -> torch.Tensor:
    return random_tensor((n, 3, 6, 7), torch.float32, 1)


@pytest.mark.parametrize("make", [esrgan, rcan])
def test_only_forward_changes_and_comes_back(make):
    model = make().train()
    model.body.requires_grad_(False)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    names = {name: set(m.__dict__) for name, m in model.named_modules()}
    parameters, types = [id(p) for p in model.parameters()], [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = model(picture())
    fastsr.fuse_(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [id(p) for p in model.parameters()] == parameters
    assert [type(m) for m in model.modules()] == types
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(picture()), before, rtol=1e-5, atol=1e-6)
    assert fastsr.unfuse_(model) is model
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == names
    assert torch.equal(model(picture()), before)


@pytest.mark.parametrize("make", [esrgan, rcan])
def test_a_second_time_changes_nothing_and_says_so(make):
    model = make()
    first = fastsr.fuse_(model)
    forwards = [m.forward for m in model.modules()]
    second = fastsr.fuse_(model)
    assert first.fused
    assert second.fused == ()
    assert {row.reason for row in second.rows} == {"it is fused already"}
    assert [m.forward for m in model.modules()] == forwards


def test_filter():
    report = fastsr.fuse_(esrgan(), lambda module, name: not name.endswith("rdb2"))
    assert set(report.fused) == {"", "body.0.rdb1", "body.0.rdb3"}
    assert [row.reason for row in report.rows if row.name == "body.0.rdb2"] == ["filter_fn left it out"]


def test_filter_is_asked_once_for_each_module():
    model, asked = esrgan(), []
    fastsr.fuse_(model, lambda module, name: asked.append((name, module)) is not None)
    assert len(asked) == len({name for name, _ in asked})
    assert all(model.get_submodule(name) is module for name, module in asked)
    assert {"", "body", "body.0", "body.0.rdb1", "body.0.rdb1.conv1", "conv_last"} <= {name for name, _ in asked}


def test_an_error_of_the_filter_is_the_caller_s():
    with pytest.raises(KeyError, match="conv_first"):
        fastsr.fuse_(esrgan(), lambda module, name: {"": False}[name])


def test_context():
    model = esrgan()
    fastsr.fuse_(model.body[0].rdb1)
    with fastsr.fused(model, lambda module, name: name != "body.0.rdb3") as report:
        assert report.fused == ("", "body.0.rdb2")
        assert forward_of(model.body[0].rdb2)
    assert forward_of(model.body[0].rdb1)
    assert not forward_of(model.body[0].rdb2)


@pytest.mark.parametrize("make", [esrgan, rcan])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_use_their_own_weights(make, how):
    model = make()
    fastsr.fuse_(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    fused = [m for m in other.modules() if forward_of(m)]
    assert fused
    assert all(forward_of(m).module is m for m in fused)
    before = model(picture())
    torch.testing.assert_close(other(picture()), before)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    assert torch.equal(model(picture()), before)
    changed = other(picture())
    assert not torch.allclose(changed, before, rtol=1e-2)
    torch.testing.assert_close(changed, fastsr.unfuse_(other)(picture()), rtol=1e-4, atol=1e-5)


def test_replicas_of_data_parallel_use_their_own_weights():
    block = toys.DenseSequential()
    fastsr.fuse_(block)
    replica = block._replicate_for_data_parallel()
    for name, child in block.named_children():  # as torch.nn.parallel.replicate fills it
        replica._modules[name] = copy.deepcopy(child)
        replica._modules[name].requires_grad_(False).apply(lambda m: [p.zero_() for p in m.parameters(recurse=False)])
    x = random_tensor((1, 8, 5, 5), torch.float32, 0)
    assert forward_of(replica).applies(x)
    assert torch.equal(replica(x), x)
    assert not torch.equal(block(x), x)


def test_updates_in_any_way_are_seen():
    model, plain = esrgan(), esrgan()
    fastsr.fuse_(model)
    for k, change in enumerate((
        lambda p: p.data.mul_(1.3),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: setattr(p, "data", p.data * 0.5),
    )):  # fmt: skip
        for m in (model, plain):
            for p in m.parameters():
                change(p)
        torch.testing.assert_close(model(picture()), plain(picture()), rtol=1e-4, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}")
    state = {key: tensor * 0.7 for key, tensor in plain.state_dict().items()}
    for m in (model, plain):
        m.load_state_dict(state)
        m.body[0].rdb2.conv3 = nn.Conv2d(16, 4, 3, padding=1)
        torch.nn.init.constant_(m.body[0].rdb2.conv3.weight, 0.01)
        torch.nn.init.constant_(m.body[0].rdb2.conv3.bias, 0.1)
    torch.testing.assert_close(model(picture()), plain(picture()), rtol=1e-4, atol=1e-6)


def test_hooks_of_the_block_run_and_hooks_of_its_parts_are_never_silenced():
    model = esrgan()
    fastsr.fuse_(model)
    seen = []
    rrdb, block = model.body[0], model.body[0].rdb3
    rrdb.register_forward_hook(lambda m, a, y: seen.append("rrdb"))
    block.register_forward_hook(lambda m, a, y: seen.append(("rdb3", y)))
    expected = fastsr.unfuse_(copy.deepcopy(model))
    with torch.no_grad():
        model(picture())
        assert [s if isinstance(s, str) else s[0] for s in seen] == ["rdb3", "rrdb"]
        ours = seen[0][1]
        seen.clear()
        expected(picture())
        torch.testing.assert_close(ours, seen[0][1], rtol=1e-5, atol=1e-6)
    seen.clear()
    handle = block.conv2.register_forward_pre_hook(lambda m, a: seen.append("conv2"))
    model(picture())
    assert "conv2" in seen
    assert not forward_of(block).applies(random_tensor((1, 8, 5, 5), torch.float32, 0))
    handle.remove()
    assert forward_of(block).applies(random_tensor((1, 8, 5, 5), torch.float32, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "scale", 0.5),
        lambda b: setattr(b.step1[1], "negative_slope", 0.4),
        lambda b: setattr(b.step1[0], "padding_mode", "circular"),
        lambda b: setattr(b.step1, "forward", nn.Sequential.forward.__get__(b.step1)),
        lambda b: nn.utils.parametrizations.weight_norm(b.step1[0]),
        lambda b: b.step1.append(nn.Tanh()),
        lambda b: setattr(b, "out", nn.Sequential(toys.conv(24, 8, bias=True))),
    ],
)
def test_a_block_that_is_changed_afterwards_runs_its_own_code(change):
    block = toys.DenseSequential()
    plain = copy.deepcopy(block)
    fastsr.fuse_(block)
    for b in (block, plain):
        torch.manual_seed(1)
        if change.__code__.co_names[:1] == ("setattr",) and "padding_mode" in change.__code__.co_consts:
            b.step1[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
        change(b)
    x = random_tensor((1, 8, 5, 5), torch.float32, 0)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-6)


def test_shared_blocks_and_shared_weights():
    torch.manual_seed(0)
    shared = toys.DenseSequential()
    tied = toys.DenseSequential()
    tied.step0[0].weight = shared.step0[0].weight
    model = nn.Sequential(shared, tied, shared)
    plain = copy.deepcopy(model)
    report = fastsr.fuse_(model)
    assert report.fused == ("0", "1")
    x = random_tensor((1, 8, 5, 5), torch.float32, 0)
    for m in (model, plain):
        m(x).square().sum().backward()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_by_the_trainer_frozen_layers_and_accumulation():
    from torch.utils.checkpoint import checkpoint

    model, plain = esrgan(), esrgan()
    fastsr.fuse_(model)
    for m in (model, plain):
        m.body[0].rdb1.requires_grad_(False)
        for k in range(2):
            features = m.conv_first(random_tensor((1, 3, 6, 7), torch.float32, k))
            checkpoint(m.body[0], features, use_reentrant=False).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [esrgan, rcan])
@pytest.mark.parametrize("channels_last", [False, True])
def test_autocast(make, channels_last):
    model, plain = make(), make()
    fastsr.fuse_(model)
    x = picture(2).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    results = []
    for m in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        y.float().square().sum().backward()
        results.append(y)
    assert results[0].dtype == results[1].dtype
    truth = make().double()(x.double())
    errors = [(y.double() - truth).abs().max().item() for y in results]
    assert errors[0] <= 2 * errors[1] + 0.01 * truth.abs().max().item()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_skip_in_a_wider_dtype_than_autocast_s_is_not_narrowed():
    block = toys.DenseSequential()
    plain = copy.deepcopy(block)
    fastsr.fuse_(block)
    x = random_tensor((1, 8, 5, 5), torch.float32, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), plain(x))
        assert block(x).dtype == torch.float32
        assert block(x.bfloat16()).dtype == plain(x.bfloat16()).dtype == torch.bfloat16


def test_dtypes_that_operators_do_not_take_and_transforms_run_the_block_s_own_code():
    block = toys.DenseSequential()
    plain = copy.deepcopy(block)
    fastsr.fuse_(block)
    x = random_tensor((2, 8, 5, 5), torch.float32, 0)
    torch.testing.assert_close(torch.vmap(block, in_dims=0)(x.unsqueeze(1)), plain(x).unsqueeze(1))
    _, ours = torch.func.jvp(block, (x,), (x,))
    _, theirs = torch.func.jvp(plain, (x,), (x,))
    torch.testing.assert_close(ours, theirs)
    graph = torch.fx.symbolic_trace(nn.Sequential(block))
    torch.testing.assert_close(graph(x), plain(x))
    traced = torch.jit.trace(block, x)
    assert "fastsr::" not in str(traced.graph)
    torch.testing.assert_close(traced(x), plain(x))
    block.double()
    plain.double()
    assert torch.equal(block(x.double()), plain(x.double()))
    with pytest.raises(RuntimeError):
        block(x)


def test_measure():
    model = esrgan()
    report = fastsr.fuse_(model)
    measured = report.measure(random_tensor((1, 3, 16, 16), torch.float32, 0), repeats=2)
    assert measured.training
    assert measured.difference <= 1e-4 * measured.scale
    assert measured.memory[1].saved < measured.memory[0].saved
    assert all(p.grad is None for p in model.parameters())
    assert "times as fast" in str(report)
    assert forward_of(model.body[0]).enabled
    model.eval().requires_grad_(False)
    assert report.measure(picture(), repeats=1).memory is None


def test_signature():
    import inspect

    block = toys.DenseSequential()
    fastsr.fuse_(block)
    assert list(inspect.signature(block.forward).parameters) == ["x"]


@pytest.mark.parametrize("memory", ["inputs", "saved"])
def test_memory_is_planned_in_the_first_training_step(memory):
    model, plain = esrgan(), esrgan()
    x = random_tensor((1, 3, 16, 16), torch.float32, 0)
    fastsr.fuse_(model)
    all_kept = fastsr.memory.measure(model, x)
    if memory == "saved":
        memory = all_kept.peak - 10_000
    report = fastsr.fuse_(model, memory=memory)
    assert report.fused == ()
    assert model.body[0].rdb1.save == "all"
    with torch.no_grad():
        model(x)
    assert model.body[0].rdb1.save == "all"
    for m in (model, plain):
        m(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * theirs.grad.abs().max().item())
    assert "input" in {getattr(m, "save", "") for m in model.modules()}
    assert fastsr.memory.measure(model, x).saved < all_kept.saved
    fastsr.unfuse_(copy.deepcopy(model))
    fastsr.unfuse_(model)
    assert not any(hasattr(m, "save") for m in model.modules())
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="bytes"):
        fastsr.fuse_(model, memory="much")
