"""Whole runs of every base method: exact resume, schedules, figures of the queue."""

import itertools

import pytest
import torch

from pretrain.config import load_config
from pretrain.engine import checkpoint
from pretrain.run import check, make_model
from tests.pretrain.engine.run_helpers import (
    LIGHT,
    SMALL,
    assert_same_state,
    die_before,
    one_step,
    train_rows,
)

BASE = SMALL | LIGHT | {"optim": SMALL["optim"] | {"name": "sgd", "base_lr": 0.5}}


RESUMED = {
    "moco": [
        "objective.name=moco", "objective.num_negatives=20", "objective.ema_tau_end=0.9",
        "objective.mixing.num_pairs=3", "objective.mixing.interpolate=1.6", "fa.method=nn+noise",
    ],
    "simsiam": ["objective.name=simsiam", "optim.predictor_constant_lr=true", "heads.dropout=0.3"],
    "swav": [
        "objective.name=swav", "objective.num_prototypes=6", "objective.frozen_prototype_steps=5",
        "fa.strength_start=0",
    ],
    "swav-multi-crop": [
        "objective.name=swav", "objective.num_prototypes=6", "heads.dropout=0.3", "fa.method=mask",
        "data.augmentation.small_crops={num: 3, image_size: 16}", "optim.micro_batch_size=4",
        "optim.accumulation=cached", "data.num_workers=1",
    ],
    "deepclusterv2": ["objective.name=deepclusterv2", "objective.num_prototypes=6"],
    "simclr-cached": [
        "objective.name=simclr", "optim.micro_batch_size=4", "optim.accumulation=cached",
        "heads.dropout=0.3", "fa.queue_dtype=fp16", "objective.mixing.num_with_anchor=3",
        "objective.mixing.extrapolate=2",
    ],
    "masked_prediction": [
        "objective.name=masked_prediction", "fa.method=mask", "fa.stop_gradient=false",
        "data.image_size=33", "optim.micro_batch_size=4", "engine.precision=bf16",
        "eval.online_probe=true", "heads.dropout=0.3",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_equals_uninterrupted(make_run, make_shards, monkeypatch, name):
    """Two epochs of three steps; the queue of 16 serves from the third step on."""
    shards = make_shards("fewer", num=24)
    overrides = [*RESUMED[name], f"data.shards={shards}", "engine.checkpoint_every_steps=4"]
    whole = make_run(*overrides, name="whole")
    whole.train()
    cut = make_run(*overrides, name="cut")
    die_before(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    monkeypatch.undo()
    torch.manual_seed(999)  # a new process would not know the old one's random state
    resumed = make_run(*overrides, name="cut", resume=True)
    assert resumed.position.step == 4
    resumed.train()
    unlike = ("images_per_second", "data_wait_share")
    first, second = (
        [{k: v for k, v in row.items() if k not in unlike} for row in train_rows(run.task.folder)]
        for run in (whole, resumed)
    )
    assert first == second
    one, two = (checkpoint.load(run.task.folder / "checkpoint.pth") for run in (whole, resumed))
    for part in ("model", "ema", "optimizer", "queue", "negatives", "random", "schedule"):
        assert_same_state(one[part], two[part], part)
    assert (one["negatives"] is None) == (name not in ("moco", "deepclusterv2"))


def moved_by_step(run):
    """The next step, and which of the weights it moved."""
    before = {k: v.clone() for k, v in run.task.model.online.named_parameters()}
    done = one_step(run, is_logged=True)
    return done, {
        k for k, v in run.task.model.online.named_parameters() if not torch.equal(v, before[k])
    }


def test_strength_rises_within_a_run(make_run):
    """More noise with every step: the cosine between feature and augmented feature falls."""
    run = make_run("objective.name=byol", "fa.method=noise", "fa.noise.sigma=1",
                "fa.strength_start=0", "optim.base_lr=1e-6")  # fmt: skip
    run.train()
    cosines = [row["fa_cosine"] for row in train_rows(run.task.folder)]
    assert cosines[0] == pytest.approx(1.0, abs=1e-5)
    assert all(a > b for a, b in zip(cosines[::3], cosines[3::3], strict=False))
    assert cosines[-1] < 0.85


@pytest.mark.parametrize("accumulation", ["plain", "cached"])
def test_micro_batches_of_a_run_pass_through_the_network_alone(make_run, accumulation):
    run = make_run("objective.name=byol", "fa.method=mask", "optim.micro_batch_size=4",
                f"optim.accumulation={accumulation}")  # fmt: skip
    sizes = []
    run.task.model.online.backbone.register_forward_hook(lambda *a: sizes.append(len(a[2])))
    done, _ = moved_by_step(run)
    passes = 1 if accumulation == "plain" else 2
    assert sizes == [4] * (4 * passes)
    assert bool(torch.isfinite(done.output.loss.detach()))


def test_small_crops_of_a_run_are_seen_by_the_online_network_alone(make_run):
    run = make_run("objective.name=byol", "fa.method=mask", "eval.online_probe=true",
                   "data.augmentation.small_crops={num: 3, image_size: 16}")  # fmt: skip
    sides = {"online": [], "ema": []}
    for name, seen in sides.items():
        getattr(run.task.model, name).backbone.register_forward_hook(
            lambda _, arguments, __, seen=seen: seen.append(arguments[0].shape[-1])
        )
    batch = next(iter(run.batches.epoch(0)))
    run.step(batch)
    assert sides == {"online": [32, 32, 16, 16, 16], "ema": [32, 32]}


def test_check_counts_the_area_of_small_crops(config_file, monkeypatch):
    seconds, small = [], "data.augmentation.small_crops"
    for options in ([], [f"{small}.num=6"], [f"{small}={{num: 6, image_size: 16}}"]):
        monkeypatch.setattr("pretrain.run.time.process_time", itertools.count().__next__)
        config = load_config(config_file, options)
        seconds.append(check(config, has_data=False)["seconds_per_sample"])
    assert [s / seconds[0] for s in seconds] == pytest.approx([1, 1 + 3 * 9, 1 + 3 / 4])


def test_checks_after_each_other_say_the_same_and_count_the_momenta(config_file, monkeypatch):
    monkeypatch.setattr("pretrain.run.time.process_time", itertools.count().__next__)
    torch.set_num_threads(2)
    facts = [
        check(
            load_config(config_file, ["engine.num_threads=0", f"optim.name={name}"]), has_data=False
        )
        for name in ("lars", "sgd", "adamw")
    ]
    assert len({one["seconds_per_sample"] for one in facts}) == 1
    assert torch.get_num_threads() == 2
    once, again, twice = (one["disk_bytes"] for one in facts)
    assert once == again
    config = load_config(config_file)
    weights = make_model(config, torch.device("cpu"))[0].online.parameters()
    num_checkpoints = 2 + config.engine.keep_checkpoints
    assert twice - once == num_checkpoints * sum(weight.nbytes for weight in weights)


def test_figures_of_the_queue_stand_in_the_rows(make_run):
    run = make_run("objective.name=infonce", "optim.base_lr=1e-6", "data.augmentation=none")
    run.train()
    rows = train_rows(run.task.folder)
    figures = ("neighbour_age", "self_hit_rate", "neighbour_label_agreement")
    for row in rows[:2]:  # 16 entries are there after two steps
        assert not set(figures) & set(row)
    for number, row in enumerate(rows[2:], start=3):
        assert set(figures) <= set(row)
        assert 1 <= row["neighbour_age"] <= min(number - 1, 4)  # 32 entries of batch 8
        assert 0 <= row["neighbour_label_agreement"] <= 1
    assert all(row["self_hit_rate"] == 0 for row in rows[2:5])  # each picture once in an epoch
    assert any(row["self_hit_rate"] > 0 for row in rows[5:])


def test_deepcluster_s_first_epoch_collects_and_every_option_has_an_effect(make_run):
    losses = {}
    options = {
        "as it is": [], "kmeans": ["objective.kmeans_iterations=1"],
        "heads": ["objective.num_heads=1"], "temperature": ["objective.temperature=1"],
    }  # fmt: skip
    for name, overrides in options.items():
        run = make_run(
            "objective.name=deepclusterv2", "objective.num_prototypes=6", "fa.method=none",
            "optim.weight_decay=0", *overrides, name=name,
        )  # fmt: skip
        before = {k: v.clone() for k, v in run.task.model.online.named_parameters()}
        values, stood = [], []
        for epoch in range(2):
            run.position.epoch, run.position.step_in_epoch = epoch, 0
            for batch in run.batches.epoch(epoch):
                values.append(float(run.step(batch).loss))
            after = dict(run.task.model.online.named_parameters())
            stood.append(all(torch.equal(after[k], v) for k, v in before.items()))
        assert values[:5] == [0] * 5
        assert stood == [True, False]
        assert bool(run.task.model.memory.is_new.all())
        losses[name] = values[5]
    assert len({round(x, 6) for x in losses.values()}) == len(options)
