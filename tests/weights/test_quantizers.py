"""Quantisers out of and into other libraries' state dicts: bit for bit, with the right placement of beta, and clear errors."""

from __future__ import annotations

import pytest
import torch

from fastsr.nn import EMAVectorQuantizer, VectorQuantizer
from fastsr.weights import WeightsError
from fastsr.weights.quantizers import LIBRARIES, read_quantizer, write_quantizer

#: library -> the shapes of its tensors for 7 codes of 3 channels.
SHAPES = {
    "taming": {"embedding.weight": (7, 3)},
    "diffusers": {"embedding.weight": (7, 3)},
    "codeformer": {"embedding.weight": (7, 3)},
    "restoreformer": {"embedding.weight": (7, 3)},
    "femasr": {"embedding.weight": (7, 3)},
    "zalando": {"_embedding.weight": (7, 3), "_ema_cluster_size": (7,), "_ema_w": (7, 3)},
    "vector-quantize-pytorch": {
        "_codebook.initted": (),
        "_codebook.cluster_size": (1, 7),
        "_codebook.embed_avg": (1, 7, 3),
        "_codebook.embed": (1, 7, 3),
    },
    "rosinality": {"embed": (3, 7), "cluster_size": (7,), "embed_avg": (3, 7)},
    "sonnet": {
        "embeddings": (3, 7),
        "ema_cluster_size.hidden": (7,),
        "ema_cluster_size.average": (7,),
        "ema_cluster_size.counter": (),
        "ema_dw.hidden": (3, 7),
        "ema_dw.average": (3, 7),
        "ema_dw.counter": (),
    },
}


def state_of(library, prefix=""):
    torch.manual_seed(0)
    state = {name: torch.rand(shape) for name, shape in SHAPES[library].items()}
    if library == "vector-quantize-pytorch":
        state["_codebook.initted"] = torch.tensor(True)
    if library == "sonnet":
        for part in ("ema_cluster_size", "ema_dw"):
            state[f"{part}.counter"] = torch.tensor(3)
            state[f"{part}.average"] = (state[f"{part}.hidden"] / (1 - 0.99**3)).float()
    return {prefix + name: tensor for name, tensor in state.items()}


def test_every_library_has_a_case():
    assert SHAPES.keys() == LIBRARIES.keys()


@pytest.mark.parametrize("prefix", ["", "model.quantize."])
@pytest.mark.parametrize("library", SHAPES)
def test_round_trip(library, prefix):
    state = state_of(library, prefix)
    module = read_quantizer({**state, "decoder.weight": torch.zeros(2)}, library, prefix)
    written = write_quantizer(module, library, prefix)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].is_contiguous()
        if name.endswith("average"):
            torch.testing.assert_close(written[name], tensor)
        else:
            assert torch.equal(written[name], tensor)
    assert (module.codebook_size, module.codebook_dim, module.num_heads) == (7, 3, 1)
    x = torch.rand(2, 3, 4, 5) if module.channel_dim == 1 else torch.rand(2, 4, 3)
    assert module(x).indices.max() < 7


@pytest.mark.parametrize("library", SHAPES)
def test_beta_is_where_the_library_has_it(library):
    module = read_quantizer(state_of(library), library, commitment_cost=0.3).eval()
    found = module(torch.rand(20, 3))
    if library in ("taming", "diffusers", "codeformer", "restoreformer"):
        expected = found.commitment_loss + 0.3 * found.codebook_loss
    elif library == "femasr":
        expected = 0.3 * found.commitment_loss + found.codebook_loss
    else:
        expected = 0.3 * found.commitment_loss
        assert isinstance(module, EMAVectorQuantizer)
    assert found.loss == expected
    if library in ("taming", "diffusers"):
        assert not read_quantizer(state_of(library), library, legacy_beta=False).legacy_beta


def test_vector_quantize_pytorch_s_heads_and_waiting_for_kmeans():
    state = {
        "_codebook.initted": torch.tensor(False),
        "_codebook.cluster_size": torch.ones(2, 7),
        "_codebook.embed_avg": torch.zeros(2, 7, 3),
        "_codebook.embed": torch.zeros(2, 7, 3),
    }
    module = read_quantizer(state, "vector-quantize-pytorch", kmeans_iterations=2)
    assert module.num_heads == 2
    assert module.gradient == "rotation"
    assert module.decay == 0.8
    written = write_quantizer(module, "vector-quantize-pytorch")
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    module(torch.rand(30, 6))
    assert write_quantizer(module, "vector-quantize-pytorch")["_codebook.initted"]
    assert module.codebook.any()


def test_sonnet_s_gradient_trained_quantizer_has_no_averages():
    module = read_quantizer({"embeddings": torch.rand(3, 7)}, "sonnet")
    assert type(module) is VectorQuantizer
    assert not module.legacy_beta


def test_from_one_library_to_another():
    module = read_quantizer(state_of("rosinality"), "rosinality")
    other = read_quantizer(write_quantizer(module, "vector-quantize-pytorch"), "vector-quantize-pytorch")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: read_quantizer(state_of("taming"), "tamming"), ValueError, "library is 'tamming'; expected one of 'taming'"),
        (lambda: read_quantizer({"q.embedding.weight": torch.zeros(7, 3)}, "taming"), WeightsError, "no embedding.weight among q.embed"),
        (lambda: read_quantizer(state_of("zalando"), "taming", "a."), WeightsError, "no a.embedding.weight"),
        (lambda: read_quantizer({"embedding.weight": torch.zeros(7)}, "taming"), WeightsError, r"shape \(7,\); expected \(K, D\)"),
        (lambda: read_quantizer({"embedding.weight": torch.zeros(0, 3)}, "taming"), WeightsError, r"shape \(0, 3\)"),
        (lambda: read_quantizer({"embedding.weight": torch.zeros(7, 3).long()}, "taming"), WeightsError, "expected floating point"),
        (
            lambda: read_quantizer({**state_of("rosinality"), "cluster_size": torch.zeros(6)}, "rosinality"),
            WeightsError,
            r"cluster_size\) have shape \(6,\); expected \(7,\)",
        ),
        (
            lambda: read_quantizer({"embed": torch.zeros(3, 7), "cluster_size": torch.zeros(7)}, "rosinality"),
            WeightsError,
            "no embed_avg",
        ),
        (
            lambda: read_quantizer({**state_of("vector-quantize-pytorch"), "project_in.weight": torch.zeros(1)}, "vector-quantize-pytorch"),
            WeightsError,
            "the quantiser projects",
        ),
        (lambda: write_quantizer(EMAVectorQuantizer(7, 3), "taming"), ValueError, "has no moving averages"),
        (lambda: write_quantizer(VectorQuantizer(7, 3, num_heads=2), "sonnet"), ValueError, "this has 2 heads"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
