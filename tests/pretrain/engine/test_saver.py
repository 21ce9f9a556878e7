"""Checkpoints beside the training: a copy, its order, its errors, the one to fall back on."""

import shutil
import threading
from unittest.mock import Mock

import pytest
import torch

from common.errors import UserError
from common.files import DiskFullError
from pretrain.config import EngineConfig
from pretrain.engine import checkpoint
from pretrain.engine.checkpoint import Checkpoints, load_newest


def state(value):
    fields = dict.fromkeys(checkpoint.FIELDS)
    weights = {"w": torch.full((1000,), float(value)), "slots": [{"m": torch.zeros(3)}]}
    return fields | {"format": checkpoint.FORMAT, "model": weights, "step": value}


def make(folder, *, in_background=True, num_kept=2, kept_every_steps=0):
    config = EngineConfig(
        keep_checkpoints=num_kept, keep_every_steps=kept_every_steps,
        async_checkpoints=in_background,
    )  # fmt: skip
    return Checkpoints(folder, config)


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
    writer, now = make(tmp_path), state(1)
    save(writer, now)
    now["model"]["w"].fill_(7)  # the next optimiser step, while the file is being written
    now["model"]["slots"][0]["m"].fill_(7)
    assert not (tmp_path / checkpoint.NAME).exists()
    release.set()
    writer.wait()
    written = checkpoint.load(tmp_path / checkpoint.NAME)["model"]
    assert written["w"].tolist() == [1.0] * 1000
    assert written["slots"][0]["m"].tolist() == [0.0] * 3


@pytest.mark.parametrize("in_background", [True, False])
def test_saves_follow_each_other_and_the_newest_stay(tmp_path, in_background):
    writer = make(tmp_path, in_background=in_background, num_kept=2, kept_every_steps=3)
    for step in range(1, 8):
        save(writer, state(step))
    writer.wait()
    assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] == 7
    kept = sorted(int(p.stem[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [3, 5, 6, 7]  # 3 and 6 for good, of the others the newest two


def save_and_wait(writer, step):
    save(writer, state(step))
    writer.wait()


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failed_write_is_told_once(tmp_path, monkeypatch, in_background):
    def full(value, path):
        raise DiskFullError("disk full while writing")

    writer = make(tmp_path, in_background=in_background)
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(DiskFullError, match="disk full"):
        save_and_wait(writer, 1)
    monkeypatch.undo()
    save(writer, state(2))
    writer.wait()
    assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] == 2


def test_in_the_foreground_nothing_is_left_to_a_thread(tmp_path):
    writer, before = make(tmp_path, in_background=False), threading.active_count()
    save(writer, state(1))
    assert threading.active_count() == before
    assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] == 1


def test_space_is_checked_before_the_first_step(tmp_path, monkeypatch):
    writer = make(tmp_path, num_kept=3)
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


def test_a_damaged_checkpoint_falls_back_on_the_one_before(tmp_path):
    writer = make(tmp_path)
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
    assert "Going on from" in note
    assert "step-00000002.pth (step 2) instead" in note
    for file in (tmp_path / "checkpoints").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"checkpoint\.pth cannot be read"):
        load_newest(tmp_path)
