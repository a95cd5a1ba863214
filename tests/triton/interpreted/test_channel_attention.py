"""The Triton backend of channel attention in the interpreter: a short list of what `tests/ops/test_channel_attention.py` asks of it
on a GPU, and what only the kernels themselves can show."""

from __future__ import annotations

import pytest
import torch

from fastsr.kernels.channel_attention import reference
from fastsr.kernels.channel_attention import triton as kernels
from fastsr.kernels.channel_attention.op import channel_attention
from tests.harness import Case, assert_twice_eager, random_tensor
from tests.ops.test_channel_attention import OPTIONS, arguments, drawn, flat

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

#: One chunk and many, one part of the channels and many, pixels and planes.
CASES = (
    (OPTIONS[0], Case((2, 64, 5, 7), F32, "channels_last", "plain", 0)),
    (OPTIONS[1], Case((1, 5, 9, 16), F16, "nchw", "permute", 1)),
    (OPTIONS[2], Case((3, 180, 2, 3), BF16, "channel_slice", "cat", 2)),
    (OPTIONS[3], Case((2, 64, 37, 31), F32, "channels_last", "sum", 3)),
    (OPTIONS[4], Case((1, 3, 160, 120), F16, "nchw", "plain", 4)),
    (OPTIONS[0], Case((2, 4, 12, 31), BF16, "misaligned", "cat", 5)),
    (OPTIONS[2], Case((3, 33, 4, 5), F32, "expanded", "plain", 6)),
    (OPTIONS[0], Case((1, 8, 1, 1), F32, "permuted", "plain", 7)),
    (OPTIONS[0], Case((0, 8, 3, 2), F32, "nchw", "plain", 8)),
)


@pytest.mark.parametrize(("options", "case"), CASES, ids=[f"{case}-{options[1]}" for options, case in CASES])
def test_output_and_gradients_are_as_good_as_eager(options, case):
    assert_twice_eager(
        fused=flat(channel_attention, options, backend="triton"),
        eager=flat(reference.channel_attention, options),
        args=drawn(case, options, "nchw"),
        grad=case.gradient_like,
        names=["x", "down_weight", "down_bias", "up_weight", "up_bias", "residual"],
    )


def test_out_may_be_x_or_residual():
    for alias in (0, 5):
        args = arguments(F32)
        expected = channel_attention(*args, backend="triton")
        with torch.no_grad():
            assert torch.equal(channel_attention(*args, out=args[alias], backend="triton"), expected)


def test_only_the_gradients_asked_for_and_they_repeat():
    for wanted in ({0}, {1, 4}, {5}, {0, 1, 2, 3, 4, 5}):
        results = []
        for _ in range(2):
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(arguments(F32))]
            channel_attention(*leaves, backend="triton").square().sum().backward()
            assert {i for i, t in enumerate(leaves) if t.grad is not None} == wanted
            results.append([leaves[i].grad for i in sorted(wanted)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_two_to_the_31():
    """Images 2^30 + 1 elements apart; untouched pages cost no memory."""
    near = random_tensor((3, 8, 2, 5), F16, 0).contiguous(memory_format=torch.channels_last)
    far = torch.empty(2 * (2**30 + 1) + 80, dtype=F16).as_strided(near.shape, (2**30 + 1, 1, 40, 8)).copy_(near)
    parameters = arguments(F16)[1:5]
    out = torch.empty_like(far)
    kernels.forward_into(out, None, None, far, None, *parameters, 1.0, "sigmoid", "relu")
    assert torch.equal(out, channel_attention(near, *parameters, backend="triton"))


def test_opcheck():
    x, down, down_bias, up, up_bias, residual = arguments(F32, (1, 8, 2, 3))
    out, dx, vectors = torch.empty_like(x), torch.empty_like(x), [x.new_zeros(x.shape[:2]) for _ in range(2)]
    parameters = (down, down_bias, up, up_bias)
    ops = torch.ops.fastsr
    torch.library.opcheck(ops.triton_channel_attention.default, (out, *vectors, x, residual, *parameters, 0.5, "sigmoid", "relu"))
    torch.library.opcheck(
        ops.triton_channel_attention.default, (out, None, None, x, None, None, None, up @ up.T, None, 0.5, "none", "relu")
    )
    for wanted in ((dx, [torch.empty_like(p) for p in parameters]), (None, [torch.empty_like(p) for p in parameters]), (dx, [])):
        arguments_ = (*wanted, True, residual, x, *vectors, *parameters[:3], 0.5, "sigmoid", "silu")
        torch.library.opcheck(ops.triton_channel_attention_backward.default, arguments_)


def test_fullgraph_compile_with_gradients():
    x, *parameters, _ = arguments(F32, (2, 8, 3, 4))
    leaves = [t.requires_grad_() for t in (x, *parameters)]

    def loss(x):
        return channel_attention(channel_attention(x, *parameters, backend="triton"), *parameters, x, backend="triton").square().mean()

    expected = torch.autograd.grad(loss(x), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(x), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
