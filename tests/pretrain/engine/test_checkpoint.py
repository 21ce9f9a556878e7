"""Checkpoint files: written whole or not at all, plain, refused with a remedy when unfit."""

import errno
import os
import pickle
import shutil

import pytest
import torch

from common.checkpoints import checksum
from common.errors import UserError
from common.files import DiskFullError
from pretrain.engine import checkpoint, run_folder


def state(value=1.0):
    fields = dict.fromkeys(checkpoint.FIELDS)
    return fields | {"format": checkpoint.FORMAT, "model": {"w": torch.full((3,), value)}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(state(1.0), path)
    return path


def value(path):
    return float(checkpoint.load(path)["model"]["w"][0])


def test_round_trip_leaves_one_file(path):
    checkpoint.save(state(2.0), path)
    assert value(path) == 2.0
    run_folder.hold(path.parent).close()
    (path.parent / ".lock").unlink()
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("kind", [RuntimeError("boom"), OSError(errno.EIO, "Input/output error")])
def test_failure_in_the_middle_leaves_the_old_file(path, monkeypatch, where, kind):
    def fail(*args, **kwargs):
        raise kind

    if where == "write":

        def torch_save(value, file):
            file.write(b"half a checkpoint")
            raise kind

        monkeypatch.setattr(torch, "save", torch_save)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(kind), match=r"boom|Input/output error"):
        checkpoint.save(state(2.0), path)
    monkeypatch.undo()
    assert value(path) == 1.0
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pth"]


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_next_save_works(path):
    partial = path.with_name("checkpoint.pth.1.partial")
    partial.write_bytes(b"half")  # what kill -9 leaves
    assert value(path) == 1.0
    checkpoint.save(state(2.0), path)
    assert value(path) == 2.0
    run_folder.hold(path.parent).close()
    assert not partial.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_what_to_do(path, monkeypatch, number):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DiskFullError,
        match=r"disk full while writing .*checkpoint\.pth .* MB free.*free some space and run the "
        r"same command with --resume",
    ):
        checkpoint.save(state(2.0), path)
    monkeypatch.undo()
    assert value(path) == 1.0


def test_full_disk_is_seen_behind_torch_s_own_error(path, monkeypatch):
    """torch's zip writer reports a failed write as a RuntimeError about positions."""

    def torch_save(value, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 4801600 vs 4801552")  # noqa: B904

    monkeypatch.setattr(torch, "save", torch_save)
    with pytest.raises(DiskFullError, match="disk full"):
        checkpoint.save(state(2.0), path)


def test_full_disk_is_measured_before_the_partial_file_goes(path, monkeypatch):
    """Where torch hides the cause, only the free space tells; the partial file fills it."""

    def torch_save(value, file):
        file.write(b"x")
        raise RuntimeError("unexpected pos 4801600 vs 4801552")

    def usage(folder):
        is_filled = list(path.parent.glob("*.partial"))
        return shutil._ntuple_diskusage(10, 10, 0 if is_filled else 1 << 30)

    monkeypatch.setattr(torch, "save", torch_save)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(DiskFullError, match="disk full"):
        checkpoint.save(state(2.0), path)
    assert not list(path.parent.glob("*.partial"))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint .*nothing\.pth does not exist"):
        checkpoint.load(tmp_path / "nothing.pth")


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "flipped"])
def test_damaged_file(path, damage):
    data = path.read_bytes()
    changed = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "noise": bytes(range(256)) * 4,
        "flipped": b"PL" + data[2:],
    }[damage]
    path.write_bytes(changed)
    with pytest.raises(
        UserError,
        match=r"checkpoint .*checkpoint\.pth cannot be read .* damaged or not .*older one",
    ):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, (HARM,))


HARM = "made-by-a-pickle"


def test_code_in_a_file_is_not_run(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "model": Harmful()}, path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    assert not (path.parent / HARM).exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"format": "other-1"}, [1, 2]])
def test_other_formats(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match=r"is not a checkpoint of format 'fa-pretrain-1'"):
        checkpoint.load(path)


def test_missing_field(path):
    incomplete = state()
    del incomplete["position"]
    torch.save(incomplete, path)
    with pytest.raises(UserError, match=r"lacks \['position'\]; it is damaged"):
        checkpoint.load(path)


def kept(path):
    return sorted(p.name for p in (path.parent / "checkpoints").glob("*"))


def test_keep_checkpoints_keeps_the_newest(path):
    for step in (5, 10, 15, 20):
        checkpoint.save(state(float(step)), path)
        checkpoint.keep(path, step, 2)
    assert kept(path) == ["step-00000015.pth", "step-00000020.pth"]
    assert value(path.parent / "checkpoints" / "step-00000015.pth") == 15.0
    assert value(path) == 20.0


def test_keep_none(path):
    checkpoint.keep(path, 5, 0)
    assert not (path.parent / "checkpoints").exists()


def test_keep_again_replaces(path):
    checkpoint.keep(path, 5, 3)
    checkpoint.save(state(9.0), path)
    checkpoint.keep(path, 5, 3)
    assert kept(path) == ["step-00000005.pth"]
    assert value(path.parent / "checkpoints" / "step-00000005.pth") == 9.0


def test_keep_copies_where_there_are_no_hard_links(path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.keep(path, 5, 1)
    assert value(path.parent / "checkpoints" / "step-00000005.pth") == 1.0


def test_different_keys():
    a = {"x": 1, "fa": {"k": 1, "same": 0}, "gone": None, "old": 3}
    b = {"x": 2, "fa": {"k": 5, "same": 0}, "new": "n"}
    assert checkpoint.different_keys(a, b) == [
        "fa.k: 1 -> 5",
        "new: None -> 'n'",
        "old: 3 -> None",
        "x: 1 -> 2",
    ]
    assert checkpoint.different_keys(a, a) == []


# --- checksum, and what stays


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1}, {"a": 1.0}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": {"a": 1}}, {"a": None},
        {"a": torch.zeros(2)}, {"a": torch.zeros(2, 1)}, {"a": torch.zeros(2).double()},
        {"a": torch.tensor([0.0, -0.0])}, {"a": torch.zeros(0)}, {"a": torch.tensor(0.0)},
        {"a": torch.zeros(2, dtype=torch.bfloat16)}, {"a": torch.zeros(2, dtype=torch.bool)},
    ],
)  # fmt: skip
def test_checksum_tells_values_apart(value, tmp_path):
    torch.save(value, tmp_path / "value.pth")
    again = torch.load(tmp_path / "value.pth", weights_only=True)
    assert checksum(again) == checksum(value)
    assert checksum(value | {"checksum": "ignored"}) == checksum(value)
    for other in ({"a": 2}, {"a": torch.ones(2)}, {"a": torch.zeros(3)}):
        assert checksum(value) != checksum(other)


def test_checksums_of_neighbouring_values_differ():
    values = [
        {"a": 1}, {"a": 1.0}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": {"a": 1}}, {"a": None},
        {"a": torch.zeros(2)}, {"a": torch.zeros(2, 1)}, {"a": torch.zeros(2).double()},
        {"a": torch.tensor([0.0, -0.0])}, {"a": torch.zeros(2, dtype=torch.bfloat16)},
    ]  # fmt: skip
    assert len({checksum(value) for value in values}) == len(values)


def flip(path, needle):
    """Change one bit of the file where `needle` stands, as a bad disk does."""
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


def test_one_changed_bit_is_found(path):
    flip(path, torch.full((3,), 1.0).numpy().tobytes())
    with pytest.raises(UserError, match=r"checkpoint\.pth .*damaged"):
        checkpoint.load(path)


def test_newest_and_every_mth_stay(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for step in range(2, 21, 2):
        checkpoint.save(state(step), path)
        checkpoint.keep(path, step, 2, 8)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}.pth" for step in (8, 16, 18, 20)]
    assert value(tmp_path / "checkpoints" / kept[0]) == 8
    other = tmp_path / "other" / "checkpoint.pth"
    other.parent.mkdir()
    for step in (4, 8, 12):
        checkpoint.save(state(step), other)
        checkpoint.keep(other, step, 0, 8)
    assert [p.name for p in (other.parent / "checkpoints").iterdir()] == ["step-00000008.pth"]
