"""Reading weights must never run what a file says."""

import collections
import io
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoints
from common.errors import UserError


class Attack:
    """Creates a file when an ordinary unpickler reads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


class Settings(dict):
    """Some project's own class, as Lightning checkpoints hold them."""


def weights() -> dict[str, object]:
    return {
        "model": {
            "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
            "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "count": np.int64(7),
            "empty": np.zeros((0, 3), np.float16),
        },
        "__author__": "someone",
        "order": collections.OrderedDict(a=1),
        "bytes": b"ab\xff",
        "set": {1, 2},
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_weights_survive_every_protocol(protocol: int) -> None:
    loaded = checkpoints.load(io.BytesIO(pickle.dumps(weights(), protocol=protocol)))
    expected = weights()
    model, reference = loaded.pop("model"), expected.pop("model")
    assert loaded == expected
    assert isinstance(reference, dict)
    for name, value in reference.items():
        np.testing.assert_array_equal(model[name], value, strict=True)
    data = pickle.dumps(np.arange(3), protocol=2).replace(b"numpy._core", b"numpy.core")  # numpy 1
    np.testing.assert_array_equal(checkpoints.load(io.BytesIO(data)), np.arange(3))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_functions_in_a_pickle_are_not_called(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "made"
    data = pickle.dumps({"model": {}, "trap": Attack(target)}, protocol=protocol)
    loaded = checkpoints.load(io.BytesIO(data))
    assert isinstance(loaded["trap"], checkpoints.Placeholder)
    assert not target.exists()
    pickle.loads(data)  # the trap is a real one
    assert target.exists()


@pytest.mark.parametrize(
    "source",
    [
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        b"c__builtin__\nexec\n(S'x=1'\ntR.",
        b"ctorch.hub\nload\n(S'a'\ntR.",
    ],
)
def test_builtin_doors_are_shut(source: bytes) -> None:
    assert isinstance(checkpoints.load(io.BytesIO(source)), checkpoints.Placeholder)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(weights())[:-40], b"\x80\x05K"])
def test_damaged_pickle_names_file_and_remedy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pkl: not a readable pickle of plain data"):
        checkpoints.read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_checkpoint_gives_up_its_tensors(zipped: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "last.ckpt", tmp_path / "made"
    state = collections.OrderedDict(
        weight=torch.arange(6.0).reshape(2, 3).T,
        half=torch.ones(2, dtype=torch.bfloat16),
        parameter=torch.nn.Parameter(torch.ones(3)),
    )
    content = {"state_dict": state, "settings": Settings(a=1), "trap": Attack(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = checkpoints.read(path)
    for name, value in state.items():
        assert torch.equal(loaded["state_dict"][name], value)
    assert isinstance(loaded["settings"], checkpoints.Placeholder)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_damaged_checkpoint_names_file_and_remedy(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=r"model\.pth: not a readable PyTorch checkpoint"):
        checkpoints.read(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        checkpoints.read(tmp_path / "nowhere.pth")


def test_index_in_a_pickle_cannot_ask_for_memory() -> None:
    """The unpickler in C would make a table of 16 GB for this index."""
    data = pickle.dumps({"model": {}}, protocol=2)
    grown = data.replace(b"q\x00", b"r" + (2**30).to_bytes(4, "little"), 1)
    assert grown != data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert checkpoints.load(io.BytesIO(grown)) == {"model": {}}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize(
    "name", [b"_codecs\nencode", b"numpy\nndarray", b"collections\nOrderedDict"]
)
def test_state_is_for_objects_only(name: bytes) -> None:
    """BUILD with a pair sets attributes: of a function it could change what later reads do."""
    data = b"c" + name + b"\n(N(S'__defaults__'\n(dttb."
    with pytest.raises(UserError, match="state for something that has none"):
        checkpoints.load(io.BytesIO(data))


# -- damage ---------------------------------------------------------------------------------------


def flip_a_byte_of(path: Path, part: bytes) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(part)
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_somebody_s_checkpoint_is_seen_by_its_crc(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    values = torch.full((64,), 1.5)
    torch.save({"state_dict": {"conv1.weight": values}}, path)
    assert checkpoints.read(path)["state_dict"]["conv1.weight"][0] == 1.5
    flip_a_byte_of(path, values.numpy().tobytes())
    assert torch.load(path), "torch does not look"
    with pytest.raises(UserError, match=r"weights\.pth: is damaged at .*CRC"):
        checkpoints.read(path)


def test_a_flipped_bit_in_our_checkpoint_is_seen_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    state = {"format": checkpoints.FORMAT, "model": {"w": torch.full((64,), 1.5)}}
    state["checksum"] = checkpoints.checksum(state)
    torch.save(state, path, _use_new_zipfile_serialization=False)  # without CRCs
    assert checkpoints.read(path)["format"] == checkpoints.FORMAT
    flip_a_byte_of(path, state["model"]["w"].numpy().tobytes())
    with pytest.raises(UserError, match=r"checkpoint\.pth is damaged .checksum"):
        checkpoints.read(path)
