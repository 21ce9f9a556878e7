"""Pictures of the first and the last weights in whole runs: whose, at what cost, what stays."""

import json
from types import SimpleNamespace

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.engine import checkpoint
from pretrain.evaluation import pictures
from pretrain.evaluation.pictures import RunPictures
from pretrain.evaluation.probe import Probe
from tests.pretrain.engine.run_helpers import LIGHT, TINY, assert_same_state, die_before

EPOCH = TINY["optim"] | {"epochs": 1, "base_lr": 0.5}  # five steps
PICTURES = {"num_pictures": 3, "num_map_points": 12, "knn_k": 5}
# Dropout draws from the global random state, which an evaluation loader would move.
HEADS = TINY["heads"] | {"dropout": 0.3}
BASE = TINY | LIGHT | {"optim": EPOCH, "eval": PICTURES, "heads": HEADS}
OPTIONS = ["engine.checkpoint_every_steps=2"]


@pytest.fixture(scope="module")
def probe(shards, make_shards):
    return [f"eval.probe_train={shards}", f"eval.probe_val={make_shards('val', num=20)}"]


@pytest.fixture(scope="module")
def whole(shards, probe, tmp_path_factory):
    """The folder of an undisturbed run with pictures."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(BASE))
    words = [f"out={folder / 'run'}", f"data.shards={shards}", *OPTIONS, *probe]
    assert main([str(folder / "tiny.yaml"), *words]) == 0
    return folder / "run"


def state_of(folder):
    return checkpoint.load(folder / "checkpoint.pth")


def rows_of(folder, name):
    return json.loads((folder / "pictures" / f"{name}.json").read_text())["rows"]


MAP = "pictures/feature_map.png"


def test_a_run_with_pictures_ends_with_the_bits_of_one_without(start, whole, probe):
    assert (whole / MAP).exists()
    status, bare, err = start("bare", *OPTIONS, *probe, "eval.num_pictures=0")
    assert status == 0, err
    assert not (bare / "pictures").exists()
    for part in ("model", "optimizer", "queue", "random", "step"):
        assert_same_state(state_of(whole)[part], state_of(bare)[part], part)


def test_before_is_of_the_initial_and_after_of_the_last_weights(whole, make_run, probe, tmp_path):
    untrained = make_run(*OPTIONS, *probe, name="untrained")
    backbone = untrained.task.model.online.backbone
    opened = Probe.open(untrained.task.config.eval, untrained.task.config.data, untrained.device)
    for name, state in (("neighbours_before", None), ("neighbours", state_of(whole)["model"])):
        if state is not None:
            untrained.task.model.online.load_state_dict(state)
        stream = SimpleNamespace(samples=None)
        RunPictures(untrained.task.config, tmp_path, backbone, stream, opened).save_neighbours(name)
        assert rows_of(whole, name) == rows_of(tmp_path, name)
    before, after = rows_of(whole, "neighbours_before"), rows_of(whole, "neighbours")
    assert [row["query"] for row in before] == [row["query"] for row in after]
    assert [row["similarities"] for row in before] != [row["similarities"] for row in after]


def test_a_resumed_run_keeps_what_was_made_of_the_initial_weights(
    start, whole, probe, monkeypatch, tmp_path
):
    with monkeypatch.context() as patched:
        die_before(patched, 3)
        assert start("cut", *OPTIONS, *probe)[0] == 130
    cut = tmp_path / "cut"
    assert not (cut / "pictures" / "neighbours.json").exists()
    kept = (cut / "pictures/neighbours_before.jpg").read_bytes()
    status, _, err = start("cut", *OPTIONS, *probe, "--resume")
    assert status == 0, err
    assert (cut / "pictures/neighbours_before.jpg").read_bytes() == kept
    for name in ("neighbours_before", "neighbours"):
        assert rows_of(cut, name) == rows_of(whole, name)
    assert (cut / MAP).read_bytes() == (whole / MAP).read_bytes()


@pytest.mark.parametrize(("num", "expected"), [(0, []), (8, [8])])
def test_num_map_points_decides_the_points(start, probe, monkeypatch, num, expected):
    drawn = []
    monkeypatch.setattr(pictures, "_draw", lambda path, places, *rest: drawn.append(len(places)))
    _, folder, err = start("run", *OPTIONS, *probe, f"eval.num_map_points={num}")
    assert (folder / "pictures" / "neighbours.json").exists(), err
    assert drawn == expected
