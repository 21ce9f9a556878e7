"""An alarm that collapsing runs raise and others do not."""

import re

import pytest

from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.engine import checkpoint
from pretrain.engine.guards import CollapseAlarm
from tests.pretrain.engine.run_helpers import LIGHT, ROOT, TINY, rows_of

DEMO = ROOT / "configs" / "pretrain" / "demo.yaml"
BASE = (
    TINY
    | LIGHT
    | {
        "data": {"image_size": 32, "batch_size": 20, "num_workers": 0},
        "heads": {"projector_hidden_dim": 48, "predictor_hidden_dim": 48, "output_dim": 24},
        "fa": {"method": "none"},
        "optim": {"name": "sgd", "epochs": 12, "base_lr": 8, "warmup_epochs": 0},
    }
)


SPREAD = {"feature_std": 0.9, "effective_rank": 50.0}
CONSTANT = {"feature_std": 0.004, "effective_rank": 40.0}
LINE = {"feature_std": 0.9, "effective_rank": 1.3}


def look(rows, shape=(65, 128), **config):
    alarm = CollapseAlarm(EngineConfig(**config), log=None, checkpoints=None)
    return [
        alarm.look(row["feature_std"], row["effective_rank"], shape, 10 * number)
        for number, row in enumerate(rows, 1)
    ]


@pytest.mark.parametrize("row", [CONSTANT, LINE], ids=["constant", "line"])
def test_alarm_once_per_episode_and_after_patience(row):
    said = look([SPREAD] + [row] * 9 + [SPREAD] + [row] * 4 + [SPREAD] + [row] * 6)
    assert [number for number, message in enumerate(said) if message] == [5, 20]


def test_alarm_says_what_it_saw():
    (message,) = look([CONSTANT | {"effective_rank": 1.21}], collapse_patience=1)
    assert message == (
        "features have collapsed: std 0.00035 of 0.088 expected for spread features, effective "
        "rank 1.2 of 64 possible, for 1 logged rows up to step 10"
    )


@pytest.mark.parametrize(
    ("config", "alarms"),
    [
        ({"collapse_std": 0.003, "collapse_rank": 0}, False),
        ({"collapse_std": 0.005, "collapse_rank": 0}, True),
        ({"collapse_std": 0, "collapse_rank": 1.1}, False),
        ({"collapse_std": 0, "collapse_rank": 1.3}, True),
    ],
)
def test_thresholds_of_the_config_decide(config, alarms):
    row = {"feature_std": 0.004, "effective_rank": 1.2}
    said = look([row] * 3, collapse_patience=3, **config)
    assert [bool(message) for message in said] == [False, False, alarms]


@pytest.mark.parametrize(
    ("shape", "alarms"), [((8, 128), False), ((9, 128), True), ((65, 7), False), ((65, 8), True)]
)
def test_rank_is_judged_where_there_is_room_for_one(shape, alarms):
    (said,) = look([LINE], shape, collapse_patience=1)
    assert bool(said) == alarms
    (said,) = look([CONSTANT], shape, collapse_patience=1)
    assert said, "a constant output needs no room"


def test_a_run_that_collapses_raises_the_alarm(start):
    options = ["objective.name=simsiam", "objective.stop_gradient=false"]
    status, folder, err = start("run", *options)
    assert status == 0, err
    event = rows_of(folder, "event")[0]  # rounding decides whether it recovers and falls again
    assert event["message"].startswith("features have collapsed: std ")
    assert f"warning: {event['message']}" in err
    row = next(row for row in rows_of(folder, "train") if row["step"] == event["step"])
    for key in ("feature_std", "effective_rank"):
        assert event["collapse"][key] == row[key]
    assert event["collapse"]["num_rows"] == 5
    assert event["step"] > 5, "not from the beginning"
    histograms = rows_of(folder, "similarity")
    assert [row["step"] for row in histograms] == [10, 20, 24], "every tenth row and the last"
    assert [len(histograms[-1][name]) for name in ("positives", "negatives")] == [20, 20]


def test_a_run_that_does_not_collapse_raises_none(start):
    options = ["objective.name=byol", "optim.base_lr=0.5", "optim.epochs=5"]
    status, folder, err = start("run", *options, "engine.collapse_patience=1")
    assert status == 0, err
    assert rows_of(folder, "event") == []
    assert "collapsed" not in err
    assert all(-1 <= row["negative_cosine"] <= 1 for row in rows_of(folder, "train"))


def test_the_demo_s_network_raises_none_from_its_first_step(start):
    options = ["data.image_size=32", "data.batch_size=20", "data.num_workers=0", "fa.min_fill=20"]
    options += ["optim.epochs=2", "engine.log_every_steps=1", "engine.collapse_patience=1"]
    options += ["eval.num_pictures=0", "engine.device=cpu", "engine.precision=fp32"]
    status, folder, err = start("demo", *options, config=DEMO)
    assert status == 0, err
    assert rows_of(folder, "event") == []
    assert min(row["feature_std"] for row in rows_of(folder, "train")) > 0.3


ALWAYS = ["objective.name=infonce", "engine.collapse_std=10", "engine.collapse_patience=2"]


def test_stop_ends_the_run_with_a_checkpoint_and_warn_goes_on(start):
    status, folder, err = start("run", *ALWAYS, "engine.on_collapse=stop", "optim.epochs=3")
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(r"error: features have collapsed: .* up to step 2; the checkpoint is", line)
    assert "Traceback" not in err
    assert checkpoint.load(folder / "checkpoint.pth")["step"] == 2
    assert not (folder / "summary.json").exists()
    (event,) = rows_of(folder, "event")
    assert event["step"] == 2, "step 2 ends an epoch: its rows stay when the run goes on"
    status, folder, err = start("run", *ALWAYS, "optim.epochs=3", "--resume")
    assert status == 0, err
    assert [row["step"] for row in rows_of(folder, "train")] == [1, 2, 3, 4, 5, 6]
    events = rows_of(folder, "event")
    assert events[0] == event
    assert [row["step"] for row in events] == [2, 4], "counting starts anew after a resume"


def test_other_processes_stop_with_the_first(start, monkeypatch):
    """What rank 1 does: nothing of its own to say, but the sum over the processes is not 0."""
    monkeypatch.setattr(dist, "total_of", lambda x, device: x + 1)
    options = ["objective.name=infonce", "engine.on_collapse=stop"]
    status, _, err = start("run", *options)
    assert status == 1
    assert "error: the first process saw the features collapse; the checkpoint is saved" in err


def test_the_checkpoint_is_there_before_the_others_hear_of_it(start, monkeypatch, tmp_path):
    saved = []

    def total_of(number, device):
        if isinstance(number, bool):  # the alarm's; the other sum counts bad samples
            saved.append((number, (tmp_path / "run" / "checkpoint.pth").exists()))
        return number

    monkeypatch.setattr(dist, "total_of", total_of)
    assert start("run", *ALWAYS, "engine.on_collapse=stop")[0] == 1
    assert saved == [(0, False), (1, True)]
