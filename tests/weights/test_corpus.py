"""Files made to break a reader, or handed in by mistake, are kept in `corpus/`; and dialects with keys changed at random."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsr
from fastsr.weights import WeightsError
from tests.weights import files
from tests.weights.test_hostile_files import refuse

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())

#: What the message must say, where it is not enough that there is one.
MESSAGES = {
    "code.pth": "mkdir",
    "code-legacy.pth": "mkdir",
    "error-page.pth": "<!DOCTY",
    "lfs-pointer.safetensors": "version ",
    "optimizer-only.pth": "no tensors found; keys: optimizer, epoch",
    "srresnet.pth": "these keys: conv_first.weight, body.0.conv1.weight",
    "old-without-tail.pth": "expected for instance model",
    "tensor-of-a-petabyte.safetensors": "does not fit",
    "torchscript.pt": "TorchScript",
    "zip-bomb.pth": "compressed",
}


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.name)
def test_every_file_is_refused(path):
    message = refuse(path)
    assert MESSAGES.get(path.name, "") in message
    assert len(message) < 2000
    assert not Path("/tmp/fastsr-must-not-appear").exists(), "code from a file was run"


def test_the_messages_are_about_files_that_exist():
    assert MESSAGES.keys() <= {path.name for path in CORPUS}


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder, found = tmp_path_factory.mktemp("dialects"), {}
    for dialect in ("basicsr", "esrgan", "esrgan-old"):
        fastsr.save(files.network(num_block=1, plus=dialect == "esrgan-old"), folder / "m.pth", dialect)
        found[dialect] = torch.load(folder / "m.pth", weights_only=True)
    return found


@pytest.mark.parametrize("dialect", ["basicsr", "esrgan", "esrgan-old"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_changed_keys_and_shapes(tmp_path, states, dialect, data):
    """A network or a WeightsError, nothing else."""
    state = dict(states[dialect])
    keys = list(state)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(keys))
        tensor = state.pop(key, torch.zeros(1))
        changed = data.draw(
            st.one_of(
                st.text("model.123sub0RDBconvbody_weightias", max_size=30),
                st.sampled_from(keys),
                st.sampled_from(["0", "1", "9", "99999", "-1"]).map(lambda number, key=key: key.replace("1", number)),
            )
        )
        shape = data.draw(st.sampled_from([tuple(tensor.shape), (), (0,), (1, 1, 1, 1), (6, 3, 3, 3), tuple(tensor.shape[::-1])]))
        state[changed] = torch.zeros(shape)
    torch.save(state, tmp_path / "m.pth")
    with contextlib.suppress(WeightsError):
        assert fastsr.load(tmp_path / "m.pth").num_block >= 1
