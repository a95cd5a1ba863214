"""The residual channel attention block, its group, and the attention modules of other networks against plain torch.nn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsr.nn import CAB, RCAB, ChannelAttention, ResidualGroup, SqueezeExcite
from fastsr.nn.attention import local_mean
from tests.harness import ALL_DTYPES, DEVICE, LAYOUTS, assert_close_as_eager, laid_out, random_tensor
from tests.models.eager_rcan import EagerChannelAttention, EagerRCAB, EagerResidualGroup, conv


class EagerCAB(nn.Module):
    """As HAT and DRCT have it."""

    def __init__(self, feat: int, compress: int, squeeze: int) -> None:
        super().__init__()
        hidden = feat // compress
        self.cab = nn.Sequential(conv(feat, hidden), nn.GELU(), conv(hidden, feat), EagerChannelAttention(feat, squeeze))

    def forward(self, x):
        return self.cab(x)


class EagerSqueezeExcite(nn.Module):
    """As timm has it."""

    def __init__(self, channels: int, hidden: int, act=F.relu, gate=torch.sigmoid, bias: bool = True) -> None:
        super().__init__()
        self.act, self.gate = act, gate
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1, bias=bias), nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


#: name -> (ours, plain), both of 12 channels
PAIRS = {
    "ChannelAttention": (lambda: ChannelAttention(12, 3), lambda: EagerChannelAttention(12, 3)),
    "RCAB": (lambda: RCAB(12, 3), lambda: EagerRCAB(12, 3)),
    "RCAB scaled": (lambda: RCAB(12, 3, 0.2), lambda: EagerRCAB(12, 3, 0.2)),
    "ResidualGroup": (lambda: ResidualGroup(12, 3, 3, 0.5), lambda: EagerResidualGroup(12, 3, 3, 0.5)),
    "CAB": (lambda: CAB(12, 3, 4), lambda: EagerCAB(12, 3, 4)),
    "SqueezeExcite": (lambda: SqueezeExcite(12), lambda: EagerSqueezeExcite(12, 8)),
    "SqueezeExcite silu": (
        lambda: SqueezeExcite(12, rd_channels=5, bias=False, act_layer=nn.SiLU, gate_layer="hard_sigmoid"),
        lambda: EagerSqueezeExcite(12, 5, F.silu, F.hardsigmoid, bias=False),
    ),
}


def pair(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    ours, eager = (make() for make in PAIRS[name])
    ours.load_state_dict(eager.state_dict())
    return ours.to(DEVICE, dtype), eager.to(DEVICE, dtype)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_with_and_without_gradients_as_good_as_eager(name, dtype, layout):
    ours, eager = pair(name, dtype)
    x = laid_out(random_tensor((2, 12, 5, 7), dtype, 1), layout)
    kept = x.clone()
    with torch.no_grad():
        truth = copy.deepcopy(eager).double()(x.double())
        assert_close_as_eager("inference", ours(x), eager(x), truth)
    assert_close_as_eager("recorded", ours(x).detach(), eager(x).detach(), truth)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_equal_eager_in_float64(name):
    ours, eager = pair(name, torch.float64)
    results = []
    for module in (ours, eager):
        x = random_tensor((2, 12, 4, 3), torch.float64, 1).requires_grad_()
        module(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_keys_are_basicsrs_hats_and_timms():
    both = ("weight", "bias")
    block = {f"rcab.{layer}.{part}" for layer in ("0", "2", "3.attention.1", "3.attention.3") for part in both}
    assert RCAB(8, 2).state_dict().keys() == block
    group = {f"residual_group.{i}.{key}" for i in range(2) for key in block} | {f"conv.{part}" for part in both}
    assert ResidualGroup(8, 2, 2).state_dict().keys() == group
    assert CAB(8, 2, 2).state_dict().keys() == {key.replace("rcab", "cab") for key in block}
    assert SqueezeExcite(8).state_dict().keys() == {f"fc{i}.{part}" for i in (1, 2) for part in both}


@pytest.mark.parametrize(("channels", "options", "hidden"), [
    (64, {}, 8), (64, {"rd_ratio": 0.25}, 16), (200, {"rd_ratio": 0.25}, 48), (64, {"rd_divisor": 1, "rd_ratio": 0.05}, 3),
    (64, {"rd_channels": 7}, 7),
])  # fmt: skip
def test_the_hidden_layer_of_squeeze_excite_is_timms(channels, options, hidden):
    assert SqueezeExcite(channels, **options).fc1.out_channels == hidden


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="act_layer is 'gelu'; expected one of relu"):
        SqueezeExcite(8, act_layer="gelu")
    with pytest.raises(ValueError, match="gate_layer is 'softmax'"):
        SqueezeExcite(8, gate_layer="softmax")
    with pytest.raises(ValueError, match="squeeze_factor is 16; expected 1 to 8"):
        ChannelAttention(8)
    with pytest.raises(ValueError, match="compress_ratio is 0"):
        CAB(8, 0)


@pytest.mark.parametrize("window", [None, 3])
def test_a_block_in_place_and_in_buffers(window):
    ours, _ = pair("RCAB", torch.float32)
    ours.rcab[3].local_window = window
    x = random_tensor((2, 12, 6, 5), torch.float32, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = ours(x)
        out, hidden = (torch.full_like(x, torch.nan) for _ in range(2))
        assert ours(x, out=out, hidden=hidden) is out
        assert torch.equal(out, expected)
        hidden.fill_(torch.nan)
        assert ours(x, out=x, hidden=hidden) is x
        assert torch.equal(x, expected)


def test_a_group_runs_in_two_buffers():
    ours, _ = pair("ResidualGroup", torch.float32)
    x = random_tensor((2, 12, 6, 5), torch.float32, 1).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    with torch.no_grad():
        running, hidden = (torch.full_like(x, torch.nan) for _ in range(2))
        y = ours.run_in(x, running, hidden)
        assert y is hidden
        assert torch.equal(y, ours(x))
    assert torch.equal(x, kept)


def test_frozen_input_and_frozen_parameters():
    ours, _ = pair("ResidualGroup", torch.float32)
    x = random_tensor((1, 12, 4, 4), torch.float32, 1)
    assert ours(x).requires_grad
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    assert ours(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("save", ["all", "input"])
def test_what_is_saved_changes_no_gradient(save):
    results = []
    for kept in ("all", save):
        ours, _ = pair("ResidualGroup", torch.float32)
        for block in ours.residual_group:
            block.save = kept
        x = random_tensor((2, 12, 4, 3), torch.float32, 1).requires_grad_()
        ours(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [(9, 7), (5, 20), (1, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 6, 9, 50])
def test_the_local_mean_is_that_of_the_nearest_whole_window(size, window):
    h, w = size
    x = random_tensor((2, 3, h, w), torch.float64, 1)
    k, m = min(window, h), min(window, w)
    expected = torch.empty_like(x)
    for i in range(h):
        for j in range(w):
            top, left = min(max(0, i - (k - 1) // 2), h - k), min(max(0, j - (m - 1) // 2), w - m)
            expected[:, :, i, j] = x[:, :, top : top + k, left : left + m].mean((2, 3))
    torch.testing.assert_close(local_mean(x, window).expand_as(x), expected)
    x = torch.full((1, 2, 300, 310), 300.0, dtype=torch.float16)  # whose sums float16 cannot hold
    assert (local_mean(x, 290) == 300).all()
