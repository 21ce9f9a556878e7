"""Losses of optimiser steps in float64, cell by cell and in two ranks; of whole runs in fp32."""

import json
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main as pretrain
from tests.golden.gate import check, digest
from tests.golden.pictures import labelled_shards
from tests.golden.training import CELLS, TWO_RANKS, float64_is_kept, run, run_ranks
from tests.ranks import assert_well, run_group

ROOT = Path(__file__).parents[2]
RTOL, ATOL = 1e-9, 1e-10  # changing weights by 1e-13 of their value moves losses by 1e-10 at most


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_twenty_steps_in_float64(name: str) -> None:
    with float64_is_kept():
        figures, bits = run(CELLS[name])
    check(f"losses-{name}", figures, rtol=RTOL, atol=ATOL, bits=bits)


@pytest.mark.slow  # engine/test_ddp.py compares two ranks with one, too
@pytest.mark.ddp
def test_ten_steps_in_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert_well(run_group(run_ranks, (out,)))
    results = json.loads(out.read_text())
    assert list(results) == list(TWO_RANKS)
    figures = {name: figures for name, (figures, _) in results.items()}
    bits = {name: bits for name, (_, bits) in results.items()}
    check("losses-two-ranks", figures, rtol=RTOL, atol=ATOL, bits=bits)


# --- the command line

BASE = {
    "seed": 3,
    "arch": {"depth": 18, "width_per_group": 8, "stem_channels": 8, "res2_channels": 8},
    "init": {"residual_gamma": 0.3},
    "data": {"image_size": 32, "batch_size": 12, "num_workers": 0},
    "heads": {"projector_hidden_dim": 24, "predictor_hidden_dim": 24, "output_dim": 12},
    "fa": {"queue_size": 48, "min_fill": 24},
    "optim": {"name": "lars", "epochs": 2, "base_lr": 0.3, "lars_eta": 0.02, "warmup_epochs": 0.5},
    "engine": {
        "device": "cpu", "precision": "fp32", "log_every_steps": 1, "checkpoint_every_steps": 100,
        "num_threads": 1,
    },
    "eval": {"num_pictures": 0, "num_map_points": 0, "knn_every_epochs": 1, "knn_k": 5},
}  # fmt: skip
RUNS = {
    "infonce-nn-lars": ["objective.name=infonce", "fa.method=nn"],
    "byol-masks-plain": [
        "objective.name=byol", "objective.ema_tau=0.9", "fa.method=mask", "fa.num_features=4",
        "fa.feature_loss=free",
        "data.augmentation=asymmetric_strong", "optim.micro_batch_size=6",
    ],
    "moco-mixup-sgd": [
        "objective.name=moco", "objective.num_negatives=48", "objective.ema_tau=0.9",
        "fa.method=mixup+noise", "fa.partner=queue", "optim.name=sgd",
        "data.augmentation=symmetric_weak", "data.photometric=device", "eval.online_probe=true",
        "fa.strength_start=0.5",
    ],
    "swav-nn-cached": [
        "objective.name=swav", "objective.num_prototypes=10", "objective.frozen_prototype_steps=3",
        "fa.method=nn", "fa.nn.top_k=3",
        "optim.micro_batch_size=6", "optim.accumulation=cached",
        "data.augmentation=symmetric_strong", "data.last_batch=pad",
    ],
}  # fmt: skip
LOGGED = ("loss", "lr", "fa_active")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_shards(tmp_path_factory.mktemp("pool"), num=40, seed=1)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_shards(tmp_path_factory.mktemp("val"), num=30, seed=2)


def arguments(folder: Path, shards: Path, val: Path, overrides: list[str]) -> list[str]:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(BASE))
    return [
        str(folder / "tiny.yaml"), f"out={folder / 'run'}", f"data.shards={shards}",
        f"eval.probe_train={shards}", f"eval.probe_val={val}", *overrides,
    ]  # fmt: skip


def compare_log(name: str, folder: Path) -> None:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    train = [row for row in rows if row["kind"] == "train"]
    figures = {key: [row[key] for row in train] for key in LOGGED}
    check(f"run-{name}", figures, rtol=1e-5, bits=digest(json.dumps(figures).encode()))
    knn = [row["knn_top1"] for row in rows if row["kind"] == "knn"]
    assert len(knn) == 3  # before training and after each epoch
    check(f"run-{name}-knn", knn, atol=1.01 / 30)  # one of 30 pictures


@pytest.mark.parametrize("name", RUNS)
def test_losses_of_a_run(tmp_path: Path, shards: Path, val: Path, name: str) -> None:
    assert pretrain(arguments(tmp_path, shards, val, RUNS[name])) == 0
    compare_log(name, tmp_path)


@pytest.mark.slow
def test_losses_of_a_run_in_two_processes(tmp_path: Path, shards: Path, val: Path) -> None:
    words = arguments(tmp_path, shards, val, RUNS["infonce-nn-lars"])
    assert_well(run_group(pretrain, (words,)))
    compare_log("two-processes", tmp_path)
