"""Checkpoints: whole or not at all, plain, a copy of the state at the call, one to fall back on."""

import contextlib
import errno
import os
import pickle
import shutil
import threading
from unittest.mock import Mock

import pytest
import torch

from common.checkpoints import checksum
from common.errors import UserError
from common.files import DiskFullError
from pretrain.config import EngineConfig, PretrainConfig
from pretrain.engine import checkpoint, run_folder
from pretrain.engine.checkpoint import Checkpoints, load_newest


def state(value=1):
    weights = {"w": torch.full((1000,), float(value)), "slots": [{"m": torch.zeros(3)}]}
    fields = dict.fromkeys(checkpoint.FIELDS)
    return fields | {"format": checkpoint.FORMAT, "model": weights, "step": value}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(state(1), path)
    return path


def step_of(path):
    return checkpoint.load(path)["step"]


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_failure_in_the_middle_leaves_the_old_file(path, monkeypatch, where):
    def fail(*arguments):
        if where == "write":
            arguments[1].write(b"half a checkpoint")
        raise OSError(errno.EIO, "Input/output error")

    places = {"write": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}
    with monkeypatch.context() as patched:
        patched.setattr(*places[where], fail)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.save(state(2), path)
    assert step_of(path) == 1
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pth"]


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_next_save_works(path):
    partial = path.with_name("checkpoint.pth.1.partial")
    partial.write_bytes(b"half")  # what kill -9 leaves
    assert step_of(path) == 1
    checkpoint.save(state(2), path)
    assert step_of(path) == 2
    config = PretrainConfig(out=str(path.parent))
    run_folder.prepare(config, resume=True)[1].close()
    assert not partial.exists()


@pytest.mark.parametrize("is_hidden", [False, True])
def test_full_disk_says_what_to_do(path, monkeypatch, is_hidden):
    """torch's zip writer hides the cause: then the free space tells, measured beside the file."""

    def torch_save(value, file):
        file.write(b"x")
        if is_hidden:
            raise RuntimeError("unexpected pos 4801600 vs 4801552")
        raise OSError(errno.ENOSPC, "No space left on device")

    def usage(folder):
        is_filled = list(path.parent.glob("*.partial"))
        return shutil._ntuple_diskusage(10, 10, 0 if is_filled else 1 << 30)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torch_save)
        patched.setattr(shutil, "disk_usage", usage)
        with pytest.raises(
            DiskFullError, match=r"disk full while writing .*run the same command with --resume"
        ):
            checkpoint.save(state(2), path)
    assert step_of(path) == 1
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "noise", "one bit"])
def test_damaged_file_is_refused(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[data.index(torch.full((1000,), 1.0).numpy().tobytes())] ^= 1
    changed = {"truncated": data[: len(data) // 2], "empty": b"", "noise": bytes(range(256)) * 4}
    path.write_bytes(changed.get(damage, data))
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match=r"checkpoint\.pth.*(damaged|not a readable|no such file)"):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("made-by-a-pickle",))


def test_code_in_a_file_is_not_run(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="holds a whole object"):
        checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "model": Harmful()}, path)
    with pytest.raises(UserError, match="lacks"):
        checkpoint.load(path)
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, r"is not a checkpoint of format 'fa-pretrain-1'"),
        ([1, 2], r"is not a checkpoint of format 'fa-pretrain-1'"),
        ({k: v for k, v in state().items() if k != "position"}, r"lacks \['position'\]"),
    ],
)
def test_other_contents_are_refused(path, content, message):
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        checkpoint.load(path)


def test_different_keys():
    a = {"x": 1, "fa": {"k": 1, "same": 0}, "gone": None, "old": 3}
    b = {"x": 2, "fa": {"k": 5, "same": 0}, "new": "n"}
    assert checkpoint.different_keys(a, b) == [
        "fa.k: 1 -> 5", "new: None -> 'n'", "old: 3 -> None", "x: 1 -> 2",
    ]  # fmt: skip
    assert checkpoint.different_keys(a, a) == []


def test_checksums_tell_values_apart_and_survive_the_file(tmp_path):
    values = [
        {"a": 1}, {"a": 1.0}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": {"a": 1}}, {"a": None},
        {"a": torch.zeros(2)}, {"a": torch.zeros(2, 1)}, {"a": torch.zeros(2).double()},
        {"a": torch.tensor([0.0, -0.0])}, {"a": torch.zeros(2, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, dtype=torch.bool)}, {"a": torch.zeros(0)}, {"a": torch.tensor(0.0)},
    ]  # fmt: skip
    assert len({checksum(value) for value in values}) == len(values)
    for value in values:
        torch.save(value, tmp_path / "value.pth")
        again = torch.load(tmp_path / "value.pth", weights_only=True)
        assert checksum(again | {"checksum": "ignored"}) == checksum(value)


def writer_in(folder, num_kept=2, kept_every_steps=0):
    engine = EngineConfig(keep_checkpoints=num_kept, keep_every_steps=kept_every_steps)
    return Checkpoints(folder, engine)


def save(writer, state):
    """Let the run stand at a state and save it."""
    writer.trainer = Mock(state_dict=lambda: state)
    writer.trainer.position.step = state["step"]
    writer.save()


def test_what_is_written_is_the_state_at_the_call(tmp_path, monkeypatch):
    release, real = threading.Event(), checkpoint.save

    def slow(value, path):
        assert release.wait(10)
        real(value, path)

    monkeypatch.setattr(checkpoint, "save", slow)
    writer, now = writer_in(tmp_path), state(1)
    save(writer, now)
    now["model"]["w"].fill_(7)  # the next optimiser step, while the file is being written
    now["model"]["slots"][0]["m"].fill_(7)
    assert not (tmp_path / checkpoint.NAME).exists()
    release.set()
    writer.wait()
    written = checkpoint.load(tmp_path / checkpoint.NAME)["model"]
    assert written["w"].tolist() == [1.0] * 1000
    assert written["slots"][0]["m"].tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("num_kept", "every", "kept"),
    [(0, 0, []), (2, 0, [6, 7]), (0, 3, [3, 6]), (2, 3, [3, 5, 6, 7])],
)
def test_saves_follow_each_other_and_the_newest_and_every_mth_stay(tmp_path, num_kept, every, kept):
    writer = writer_in(tmp_path, num_kept, every)
    for step in (*range(1, 8), 7):  # again at one step: it is replaced
        save(writer, state(step))
    writer.wait()
    if kept:  # a copy by hand is nobody's
        own = tmp_path / "checkpoints/step-00000001-best.pth"
        own.write_bytes(b"")
        save(writer, state(7))
        writer.wait()
        own.unlink()
    assert step_of(tmp_path / checkpoint.NAME) == 7
    assert sorted(map(step_of, (tmp_path / "checkpoints").glob("*"))) == kept


def test_a_failed_write_is_told_once(tmp_path, monkeypatch):
    def full(value, path):
        raise DiskFullError("disk full while writing")

    writer = writer_in(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", full)
        save(writer, state(1))
        with pytest.raises(DiskFullError, match="disk full"):
            writer.wait()
    save(writer, state(2))
    writer.wait()
    assert step_of(tmp_path / checkpoint.NAME) == 2


def test_space_is_checked_before_the_first_step(tmp_path, monkeypatch):
    writer = writer_in(tmp_path, num_kept=3)
    size = checkpoint.num_bytes(state(1))
    assert size == 4 * 1000 + 4 * 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * size))
    writer.trainer = Mock(state_dict=lambda: state(1))
    with writer:
        pass
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * size - 1))
    message = r"checkpoints need 0 MB .*lower engine\.keep_checkpoints"
    with pytest.raises(UserError, match=message), writer:
        pass


def test_momenta_that_come_with_the_first_step_take_space(tmp_path, monkeypatch):
    weight = torch.zeros(1000, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    writer = Checkpoints(tmp_path, EngineConfig(keep_checkpoints=1), optimizer)
    writer.trainer = Mock(state_dict=lambda: {"w": weight, "optimizer": optimizer.state_dict()})
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((2 * 12_000 - 1, False), (2 * 12_000 + 100, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="need"), writer:
            pass
        if fits:  # also once they are there, which are not counted twice
            weight.sum().backward()
            optimizer.step()
            with writer:
                pass


def test_a_damaged_checkpoint_falls_back_on_the_one_before(tmp_path):
    writer = writer_in(tmp_path)
    for step in (1, 2, 3):
        save(writer, state(step))
    writer.wait()
    assert load_newest(tmp_path)[1] is None
    newest = tmp_path / checkpoint.NAME
    newest.write_bytes(newest.read_bytes()[:-2000])  # also damages its link, step-00000003.pth
    found, note = load_newest(tmp_path)
    assert found["step"] == 2
    assert note is not None
    assert "damaged" in note
    assert "step-00000002.pth (step 2) instead" in note
    for file in (tmp_path / "checkpoints").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="No older checkpoint is whole: start again"):
        load_newest(tmp_path)
