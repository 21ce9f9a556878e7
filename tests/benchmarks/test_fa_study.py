"""The study of FA methods: its cells load, its table is right, bad calls end clearly."""

import json
import math

import pytest

from benchmarks import fa_study
from pretrain.config import load_config


@pytest.mark.parametrize("name", fa_study.CELLS)
def test_every_cell_is_a_config(name):
    config = load_config("configs/pretrain/fa_study.yaml", [*fa_study.CELLS[name], "seed=1"])
    assert config.fa.method == name.split(",")[0].split(" ")[0]


def test_table_is_paired_with_none():
    accuracy = {"none": {0: 0.5, 1: 0.6, 2: 0.4}, "nn": {0: 0.6, 1: 0.7, 2: 0.6}}
    none, nn = fa_study.table(accuracy)
    assert none["mean"] == pytest.approx(0.5)
    assert none["std"] == pytest.approx(0.1)
    assert nn["minus_none"] == pytest.approx(0.4 / 3)
    half = 4.302653 * math.sqrt(0.01 / 3) / math.sqrt(3)  # differences .1, .1, .2; t of 2 degrees
    assert nn["interval"] == pytest.approx([0.4 / 3 - half, 0.4 / 3 + half], abs=1e-6)


@pytest.fixture
def words(tmp_path):
    folders = [f"--{name}={tmp_path / name}" for name in ("shards", "probe-train", "probe-val")]
    return [*folders, f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'study.json'}"]


def finished(folder, accuracy):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"knn_top1": accuracy}))


def test_finished_runs_are_kept(words, tmp_path, capsys):
    for seed in (0, 1):
        finished(tmp_path / "out" / f"none-{seed}", 0.25)
        finished(tmp_path / "out" / f"mask-{seed}", 0.5)
    assert fa_study.main([*words, "--methods", "mask", "--seeds", "2"]) == 0
    assert "+25.0" in capsys.readouterr().out
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert [(row["method"], row["mean"]) for row in rows] == [("none", 0.25), ("mask", 0.5)]


def test_a_run_that_fails_ends_the_study(words, capsys):
    assert fa_study.main([*words, "--methods", "none", "--seeds", "1"]) == 1
    assert "none-0 failed" in capsys.readouterr().err


def test_no_seeds_is_refused(words):
    with pytest.raises(SystemExit) as error:
        fa_study.main([*words, "--seeds", "0"])
    assert error.value.code == 2
