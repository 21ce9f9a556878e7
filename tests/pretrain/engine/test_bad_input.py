"""What a user got wrong, and what a disk or a diverging loss does: one message each."""

import json
import re

import pytest
import torch

from pretrain.collectives import choose_device
from pretrain.engine import checkpoint
from tests.pretrain.data.picture_helpers import damage
from tests.pretrain.engine.run_helpers import LIGHT, TINY, error_of, train_rows

BASE = TINY | LIGHT


def test_missing_shards(start, shards, tmp_path):
    message = error_of(start("a", f"data.shards={tmp_path / 'nothing'}"), 2)
    assert "nothing" in message
    assert "make_shards" in message
    (tmp_path / "file").touch()
    assert "a file is in the way" in error_of(start("b", f"out={tmp_path / 'file'}"), 2)
    # --check finds what a run would.
    for words, text in (
        (["data.batch_size=4096"], "do not fill one batch of 4096"),
        (["eval.probe_train={}", "eval.probe_val={}", "eval.knn_k=999"], "lower knn_k"),
    ):
        result = start("a", *(word.format(shards) for word in words), "--check=all")
        assert text in error_of(result, 2)


def test_bad_pictures_stop_the_run_or_are_counted(start, make_shards):
    shards = make_shards("bad-picture")
    damage(shards, 13)
    where = f"data.shards={shards}"
    message = error_of(start("stop", where), 2)
    assert "sample 13" in message
    assert "shard-000001.tar" in message
    assert "data.max_bad_samples" in message
    status, folder, err = start("count", where, "data.max_bad_samples=1", "eval.num_pictures=14")
    assert status == 0, err
    assert train_rows(folder)[-1]["num_bad_samples"] == 2  # once in each epoch
    assert json.loads((folder / "summary.json").read_text())["num_skipped_samples"] == 2


@pytest.mark.parametrize(
    ("decay", "what"), [(0, r"the loss is (nan|inf)"), (1e30, "weights are no longer finite")]
)
def test_diverged_training_stops_and_saves_nothing_broken(start, decay, what):
    result = start(
        "nan", "optim.name=sgd", "optim.base_lr=1e30", "optim.warmup_epochs=0",
        f"optim.weight_decay={decay}", "engine.checkpoint_every_steps=1",
    )  # fmt: skip
    message = error_of(result, 1)
    saved = "holds an earlier state"
    assert re.search(rf"{what} at step \d+; .*{saved}", message)
    assert "Lower optim.base_lr or lengthen optim.warmup_epochs" in message
    saved = result[1] / "checkpoint.pth"
    if saved.exists():
        assert all(torch.isfinite(w).all() for w in checkpoint.load(saved)["model"].values())
    assert not (result[1] / "summary.json").exists()


def test_gpu_asked_for_without_one(start, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = error_of(start("gpu", "engine.device=cuda"), 2)
    assert "engine.device=cuda, but torch sees no GPU; use engine.device=auto or cpu" in message
    assert choose_device("auto") == torch.device("cpu")


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for rank in (0, 3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", rank)
    assert choose_device("cpu") == torch.device("cpu")
