"""RCAN's files: both dialects there and back, what they show and what they cannot, and what does not fit."""

from __future__ import annotations

import contextlib

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsr
from fastsr.models import RCAN
from fastsr.weights import WeightsError
from fastsr.weights.dialects import build
from tests.models.eager_rcan import MEAN, OfficialRCAN
from tests.weights import files
from tests.weights.test_hostile_files import refuse

SIZES = {"num_feat": 6, "num_group": 2, "num_block": 3, "squeeze_factor": 3}

KEYS = {
    "basicsr": (
        "conv_first body.0.residual_group.0.rcab.0 body.0.residual_group.2.rcab.2 body.1.residual_group.1.rcab.3.attention.1 "
        "body.1.residual_group.1.rcab.3.attention.3 body.0.conv body.1.conv conv_after_body upsample.0 upsample.2 conv_last"
    ),
    "rcan": (
        "sub_mean add_mean head.0 body.0.body.0.body.0 body.0.body.2.body.2 body.1.body.1.body.3.conv_du.0 "
        "body.1.body.1.body.3.conv_du.2 body.0.body.3 body.1.body.3 body.2 tail.0.0 tail.0.2 tail.1"
    ),
}


def network(upscale: int = 4, channels: int = 3, **options) -> RCAN:
    torch.manual_seed(0)
    options = SIZES | options
    if channels != 3:
        options["rgb_mean"] = (0.0,)
    model = RCAN(channels, channels, upscale=upscale, **options).eval()
    if model.mean_shift:  # as if it had been trained
        with torch.no_grad():
            for parameter in (*model.sub_mean.parameters(), *model.add_mean.parameters()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def written(model: RCAN, path, dialect: str):
    fastsr.save(model, path, dialect)
    return path


def outputs_agree(a: RCAN, b: RCAN) -> bool:
    x = torch.rand(1, a.num_in_ch, 5, 6)
    with torch.no_grad():
        return torch.allclose(a(x), b(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("options", [
    {}, {"upscale": 1}, {"upscale": 2}, {"upscale": 3}, {"upscale": 8}, {"upscale": 16}, {"upscale": 2, "unshuffle": 2},
    {"upscale": 1, "unshuffle": 4}, {"num_feat": 96, "squeeze_factor": 16, "num_group": 1, "num_block": 1}, {"channels": 1},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dialect", ["basicsr", "rcan"])
def test_there_and_back_bit_for_bit(tmp_path, dialect, options, ending):
    grey = options.get("channels") == 1
    model = network(**options, mean_shift=dialect == "rcan" and not grey, **({"img_range": 1} if dialect == "rcan" and grey else {}))
    loaded = fastsr.load(written(model, tmp_path / f"m{ending}", dialect))
    assert loaded.extra_repr() == model.extra_repr()
    assert loaded.rgb_mean == model.rgb_mean
    assert files.same(loaded, model)
    assert not loaded.training
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == {n for n in loaded.state_dict() if "_mean" in n}
    again = written(loaded, tmp_path / f"again{ending}", dialect)
    assert again.read_bytes() == (tmp_path / f"m{ending}").read_bytes() or ending == ".pth"
    assert again.stat().st_size == (tmp_path / f"m{ending}").stat().st_size


@pytest.mark.parametrize("dialect", KEYS)
def test_the_keys_are_those_of_the_dialect(tmp_path, dialect):
    keys = torch.load(written(network(), tmp_path / "m.pth", dialect), weights_only=True).keys()
    assert {f"{name}.{part}" for name in KEYS[dialect].split() for part in ("weight", "bias")} <= keys
    assert len(keys) == 2 * (6 * 4 + 2 + 5 + 2 * (dialect == "rcan"))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("norm", "unshuffle", "scale"), [(True, 1, 4), (True, 1, 3), (False, 1, 2), (False, 2, 2)])
def test_the_authors_network_writes_what_is_read(tmp_path, norm, unshuffle, scale, prefix):
    torch.manual_seed(0)
    official = OfficialRCAN(6, 2, 3, 3, scale, norm, unshuffle)
    torch.save({prefix + key: tensor for key, tensor in official.state_dict().items()}, tmp_path / "m.pth")
    ours, x = fastsr.load(tmp_path / "m.pth"), torch.rand(1, 3, 4, 6)
    assert (ours.upscale, ours.unshuffle, ours.num_group, ours.num_block, ours.squeeze_factor) == (scale, unshuffle, 2, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), official(x))
    fastsr.save(ours, tmp_path / "back.pth", "rcan")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    official.load_state_dict(back)
    assert back.keys() == official.state_dict().keys()


def test_a_mean_of_values_up_to_one_tells_the_range():
    official = OfficialRCAN(6, 1, 1, 3)
    official.range = 1.0
    for sign, layer in ((-1, official.sub_mean), (1, official.add_mean)):
        layer.bias.data = sign * torch.tensor(MEAN)
    ours, x = build(official.state_dict()), torch.rand(1, 3, 4, 5)
    assert ours.img_range == 1
    with torch.no_grad():
        torch.testing.assert_close(ours(x), official(x))


@pytest.mark.parametrize("options", [
    {}, {"img_range": 1.0}, {"img_range": 1.0, "rgb_mean": (0.0,)}, {"img_range": 10.0, "rgb_mean": (0.1, 0.2, 0.3)},
    {"img_range": 1.0, "mean_shift": True}, {"mean_shift": True}, {"channels": 1}, {"channels": 1, "img_range": 1.0},
], ids=str)  # fmt: skip
def test_any_range_and_mean_is_written_in_the_authors_dialect(tmp_path, options):
    """They go into MeanShift, which every program that reads the dialect applies to values of 0..255."""
    model = network(**options)
    loaded = fastsr.load(written(model, tmp_path / "m.pth", "rcan"))
    assert outputs_agree(loaded, model)
    if loaded.num_in_ch == 3 and loaded.mean_shift and loaded.img_range == 255:
        official = OfficialRCAN(6, 2, 3, 3)
        official.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
        x = torch.rand(1, 3, 4, 5)
        with torch.no_grad():
            torch.testing.assert_close(official(x), model(x), rtol=0, atol=2e-6)


def test_from_one_dialect_to_the_other(tmp_path):
    official = build(OfficialRCAN(6, 2, 3, 3).state_dict()).eval()
    fastsr.save(official, tmp_path / "m.pth", "basicsr")
    loaded = fastsr.load(tmp_path / "m.pth")
    assert not loaded.mean_shift
    assert outputs_agree(loaded, official)


def test_what_a_dialect_cannot_express_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'rcan', whose networks have no res_scale; this one's is 0\.1"):
        fastsr.save(network(res_scale=0.1), tmp_path / "m.pth", "rcan")
    with pytest.raises(ValueError, match=r"'basicsr', whose files have no sub_mean\.weight"):
        fastsr.save(network(mean_shift=True), tmp_path / "m.pth", "basicsr")
    with pytest.raises(ValueError, match="'esrgan'; expected one of 'basicsr', 'rcan', those of RCAN"):
        fastsr.save(network(), tmp_path / "m.pth", "esrgan")
    with pytest.raises(TypeError, match=r"Linear; expected a fastsr\.models\.RRDBNet or fastsr\.models\.RCAN"):
        fastsr.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")
    assert not list(tmp_path.iterdir())


def test_what_no_file_shows_is_an_attribute(tmp_path):
    model = network(res_scale=0.1, img_range=1.0, rgb_mean=(0.5, 0.4, 0.3))
    loaded = fastsr.load(written(model, tmp_path / "m.pth", "basicsr"))
    assert not outputs_agree(loaded, model)
    loaded.res_scale, loaded.img_range, loaded.rgb_mean = 0.1, 1.0, (0.5, 0.4, 0.3)
    assert outputs_agree(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dialect", KEYS)
def test_other_dtypes_are_written_as_they_are(tmp_path, dialect, dtype):
    model = network(mean_shift=dialect == "rcan").to(dtype)
    path = written(model, tmp_path / "m.safetensors", dialect)
    assert {t.dtype for t in safetensors.torch.load_file(path).values()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(fastsr.load(path, dtype=dtype).parameters(), model.parameters(), strict=True))


SQUEEZE = "body.0.residual_group.0.rcab.3.attention.1.weight"


def without(key: str):
    return lambda state, name: state.pop(name(key))


def with_shape(key: str, *shape: int, dtype: torch.dtype = torch.float32):
    return lambda state, name: state.update({name(key): torch.zeros(shape, dtype=dtype)})


#: change of a state dict, given what turns BasicSR's key into the dialect's -> what the message says
CHANGES = [
    (without("body.1.residual_group.2.rcab.2.bias"), r"with 2 groups of 3 blocks lacks body\.1\.residual_group\.2\.rcab\.2\.bias"),
    (without("body.1.residual_group.1.rcab.0.weight"), "2 groups and 3 blocks in the first, but 5 blocks in all"),
    (without("conv_last.weight"), r"lacks conv_last\.weight"),
    (without("upsample.0.weight"), "PixelShuffle steps by nothing|has no upsample"),
    (with_shape("upsample.0.weight", 12, 6, 3, 3), "PixelShuffle steps by 1, 2 after"),
    (with_shape("upsample.0.weight"), "PixelShuffle steps by 0, 2"),
    (with_shape("upsample.2.weight", 54, 6, 3, 3), "PixelShuffle steps by 2, 3"),
    (with_shape("conv_after_body.bias", 7), r"conv_after_body\.bias has shape \(7,\)"),
    (with_shape("conv_after_body.bias", 6, dtype=torch.int32), "int32"),
    (lambda state, name: state.update(extra=torch.zeros(1)), "has no extra"),
    (with_shape("conv_first.weight", 10**6, 1, 3, 3), "for 1000000 features"),
    (with_shape("conv_first.weight", 7, 3, 3, 3), r"rcab\.0\.weight has shape \(6, 6, 3, 3\); expected \(7, 7, 3, 3\)"),
    (with_shape("conv_first.weight", 10**6, 0, 3, 3), "conv_first.weight has shape"),
    (with_shape("conv_first.weight", 6), r"conv_first\.weight has shape \(6,\)"),
    (with_shape(SQUEEZE, 4, 6, 1, 1), "squeezes 6 features to 4"),
    (with_shape(SQUEEZE, 99, 6, 1, 1), "squeezes 6 features to 99"),
    (with_shape("conv_last.weight", 5, 6, 3, 3), "conv_last.bias has shape|expected as many"),
]


@pytest.mark.parametrize("dialect", KEYS)
@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_files_that_do_not_fit(tmp_path, dialect, change, match):
    model = network(mean_shift=dialect == "rcan")
    state = torch.load(written(model, tmp_path / "m.pth", dialect), weights_only=True)
    names = dict(zip((key for key in model.state_dict() if "_mean" not in key), (key for key in state if "_mean" not in key), strict=True))
    change(state, names.__getitem__)
    torch.save(state, tmp_path / "m.pth")
    refuse(tmp_path / "m.pth", match)


@pytest.mark.parametrize(("key", "value"), [
    ("sub_mean.weight", torch.zeros(3)), ("sub_mean.bias", torch.zeros(2, 2)), ("add_mean.weight", torch.zeros(4, 4, 1, 1)),
    ("sub_mean.bias", torch.zeros(3, dtype=torch.bool)), ("sub_mean.bias", None),
])  # fmt: skip
def test_a_mean_shift_that_does_not_fit(tmp_path, key, value):
    state = torch.load(written(network(mean_shift=True), tmp_path / "m.pth", "rcan"), weights_only=True)
    if value is None:
        del state[key]
    else:
        state[key] = value
    torch.save(state, tmp_path / "m.pth")
    refuse(tmp_path / "m.pth", key.replace(".", r"\."))


def test_a_depth_that_the_file_does_not_have_is_not_built(tmp_path):
    """A thousand groups and a thousand blocks in the first are two thousand tensors, and would be a million modules."""
    state = network(num_group=1, num_block=1).state_dict()
    for i in range(1000):
        state[f"body.{i}.conv.weight"] = state[f"body.0.residual_group.{i}.rcab.0.weight"] = torch.zeros(6, 6, 3, 3)
    torch.save(state, tmp_path / "m.pth")
    refuse(tmp_path / "m.pth", "1000 groups and 1000 blocks in the first, but 1000 blocks in all")


def test_dialects_mixed_and_layers_out_of_order(tmp_path):
    state = torch.load(written(network(), tmp_path / "m.pth", "rcan"), weights_only=True)
    torch.save(state | {"conv_last.weight": state["tail.1.weight"]}, tmp_path / "mixed.pth")
    refuse(tmp_path / "mixed.pth", "several dialects")
    torch.save({key.replace("body.1.body.3.", "body.1.body.4."): value for key, value in state.items()}, tmp_path / "moved.pth")
    refuse(tmp_path / "moved.pth", r"has no body\.1\.body\.4\.weight|1 groups")


@pytest.mark.parametrize("dialect", KEYS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_changed_keys_and_shapes(dialect, data):
    """A network or a WeightsError, nothing else."""
    from fastsr.weights.dialects import express

    state = express(network(num_block=1, mean_shift=dialect == "rcan"), dialect)
    keys = list(state)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(keys))
        tensor = state.pop(key, torch.zeros(1))
        changed = data.draw(
            st.one_of(
                st.text("body.123conv_duhearcablastweightias", max_size=30),
                st.sampled_from(keys),
                st.sampled_from(["0", "1", "9", "99999", "-1"]).map(lambda number, key=key: key.replace("1", number)),
            )
        )
        shape = data.draw(st.sampled_from([tuple(tensor.shape), (), (0,), (1, 1, 1, 1), (6, 3, 3, 3), tuple(tensor.shape[::-1])]))
        state[changed] = torch.zeros(shape)
    with contextlib.suppress(WeightsError):
        assert build(state).num_block >= 1
