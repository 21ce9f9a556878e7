"""Pictures of the first and the last weights in whole runs: whose, at what cost, what stays."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from pretrain.engine import checkpoint
from pretrain.engine.train import Run
from pretrain.eval.pictures import save_neighbours
from pretrain.eval.probe import Probe
from tests.pretrain.engine.run_helpers import TINY, assert_same_state

EPOCH = TINY["optim"] | {"epochs": 1, "base_lr": 0.5}  # five steps
BASE = TINY | {"optim": EPOCH, "eval": {"num_pictures": 3, "num_map_points": 12, "knn_k": 5}}
OPTIONS = ["engine.checkpoint_every_steps=2"]


@pytest.fixture
def probe(shards, make_shards):
    return [f"eval.probe_train={shards}", f"eval.probe_val={make_shards('val', num=20)}"]


def state_of(folder):
    return checkpoint.load(folder / "checkpoint.pth")


def rows_of(folder, name):
    return json.loads((folder / "pictures" / f"{name}.json").read_text())["rows"]


def map_of(folder):
    return json.loads((folder / "feature_map.json").read_text())


def interrupt(monkeypatch, step):
    """Let the next run die like one that is killed, before a step."""
    step_of = Run._step

    def dying(self, fed, *, is_logged):
        if self.position.step == step:
            raise KeyboardInterrupt
        return step_of(self, fed, is_logged=is_logged)

    monkeypatch.setattr(Run, "_step", dying)


def test_a_run_with_pictures_ends_with_the_bits_of_one_without(start, probe):
    """Dropout draws from the global random state, which an evaluation loader would move."""
    options = [*OPTIONS, "heads.dropout=0.3"]
    _, shown, err = start("shown", *options, *probe)
    assert (shown / "feature_map.json").exists(), err
    _, bare, _ = start("bare", *options, *probe, "eval.num_pictures=0")
    assert not (bare / "pictures").exists()
    assert not (bare / "feature_map.json").exists()
    for part in ("model", "optimizer", "queue", "random", "step"):
        assert_same_state(state_of(shown)[part], state_of(bare)[part], part)


def test_before_is_of_the_initial_and_after_of_the_last_weights(start, make_run, probe, tmp_path):
    status, folder, err = start("run", *OPTIONS, *probe)
    assert status == 0, err
    untrained = make_run(*OPTIONS, *probe, name="untrained")
    backbone = untrained.model.online.backbone
    for name, state in (("neighbours_before", None), ("neighbours", state_of(folder)["model"])):
        if state is not None:
            untrained.model.online.load_state_dict(state)
        expected = tmp_path / name
        save_neighbours(
            expected, backbone, None, untrained.probe, 3, untrained.device, untrained.config.data
        )
        assert rows_of(folder, name) == rows_of(expected, "neighbours")
    before, after = rows_of(folder, "neighbours_before"), rows_of(folder, "neighbours")
    assert [row["query"] for row in before] == [row["query"] for row in after]
    assert [row["similarities"] for row in before] != [row["similarities"] for row in after]


def test_kept_features_are_those_of_the_initial_weights(start, make_run, probe):
    _, folder, _ = start("run", *OPTIONS, *probe)
    run = make_run(*OPTIONS, *probe, name="untrained")
    assert isinstance(run.probe, Probe)
    rows, _ = run.probe.features(run.model.online.backbone, run.probe.val)
    chosen = np.linspace(0, 19, 12).astype(int)
    with np.load(folder / "features_before.npz") as kept:
        expected = functional.normalize(rows[torch.from_numpy(chosen)], dim=1)
        torch.testing.assert_close(torch.from_numpy(kept["features"]), expected)
    assert map_of(folder)["missing"] is None
    assert map_of(folder)["keys"] == [run.probe.val.key_name(int(i)) for i in chosen]


def test_a_resumed_run_keeps_what_was_made_of_the_initial_weights(start, probe, monkeypatch):
    _, whole, _ = start("whole", *OPTIONS, *probe)
    with monkeypatch.context() as patched:
        interrupt(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            start("cut", *OPTIONS, *probe)
    cut = whole.parent / "cut"
    assert not (cut / "pictures" / "neighbours.json").exists()
    names = ("features_before.npz", "pictures/neighbours_before.jpg")
    kept = {name: (cut / name).read_bytes() for name in names}
    status, _, err = start("cut", *OPTIONS, *probe, "--resume")
    assert status == 0, err
    for name, data in kept.items():
        assert (cut / name).read_bytes() == data
    for name in ("neighbours_before", "neighbours"):
        assert rows_of(cut, name) == rows_of(whole, name)
    for part in ("before", "after"):
        for figures in (map_of(cut), map_of(whole)):
            figures[part].pop("processor_seconds")
    one, two = ({**map_of(f), "before": 0, "after": 0} for f in (cut, whole))
    assert one == two
    for part in ("before", "after"):
        assert map_of(cut)[part]["x"] == map_of(whole)[part]["x"]


def test_what_cannot_be_made_any_more_is_told_as_missing(start, probe, monkeypatch, tmp_path):
    """A run that began without pictures: at its end nobody knows the features of its start."""
    with monkeypatch.context() as patched:
        interrupt(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            start("run", *OPTIONS, *probe, "eval.num_pictures=0")
    folder = tmp_path / "run"
    status, _, err = start("run", *OPTIONS, *probe, "--resume")
    assert status == 0, err
    assert not (folder / "pictures" / "neighbours_before.json").exists()
    assert len(rows_of(folder, "neighbours")) == 3
    assert map_of(folder)["before"] is None
    assert "initial weights were not kept" in map_of(folder)["missing"]


def test_an_earlier_run_leaves_nothing_that_could_be_taken_for_this_one(start, probe):
    _, folder, _ = start("run", *OPTIONS, *probe)
    earlier = rows_of(folder, "neighbours_before")
    for path in (folder / "checkpoint.pth", folder / "summary.json", *folder.glob("checkpoints/*")):
        path.unlink()
    _, _, err = start("run", *OPTIONS)
    assert (folder / "summary.json").exists(), err
    assert not (folder / "feature_map.json").exists()  # without a probe there is no map
    assert not (folder / "features_before.npz").exists()
    assert rows_of(folder, "neighbours_before") != earlier


@pytest.mark.parametrize(("num", "expected"), [(0, None), (8, 8), (100, 20)])
def test_num_map_points_decides_the_points(start, probe, num, expected):
    _, folder, err = start("run", *OPTIONS, *probe, f"eval.num_map_points={num}")
    assert (folder / "pictures" / "neighbours.json").exists(), err
    if expected is None:
        assert not (folder / "feature_map.json").exists()
        assert not (folder / "features_before.npz").exists()
    else:
        assert len(map_of(folder)["after"]["x"]) == len(map_of(folder)["before"]["y"]) == expected
