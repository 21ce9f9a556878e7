"""fp16 with a loss scale, on the CPU: steps that overflow, the scale, resume, two processes."""

from functools import partial

import pytest
import torch

from pretrain.engine import checkpoint
from pretrain.engine.checkpoint import copied
from tests.pretrain.engine.guard_worker import run_disturbed_pair
from tests.pretrain.engine.run_helpers import (
    LIGHT,
    SMALL,
    assert_same_state,
    error_of,
    train_rows,
)

BASE = SMALL | LIGHT | {"engine": SMALL["engine"] | {"precision": "fp16"}}
START = 256.0  # fits from the first step on; at torch's 65,536 the first steps of BASE overflow
WAYS = {"whole": [], "plain": ["optim.micro_batch_size=4"]}
WAYS["cached"] = [*WAYS["plain"], "optim.accumulation=cached"]


@pytest.fixture(autouse=True)
def _start_low(monkeypatch):
    """A lower first scale, which doubles sooner."""
    scaler = partial(torch.amp.GradScaler, init_scale=START, growth_interval=4)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


@pytest.mark.parametrize("way", WAYS)
def test_the_scale_itself_changes_no_bit(make_run, monkeypatch, way):
    """With autocast off, gradients times 2^8 and back are those of fp32: it is applied once."""
    states = []
    for precision in ("fp32", "fp16"):
        run = make_run(f"engine.precision={precision}", *WAYS[way], name=precision)
        monkeypatch.setattr(run.task, "autocast_type", None)
        for batch in list(run.batches.epoch(0))[:3]:  # the third uses the queue
            run.step(batch)
        states.append(copied(run.state_dict()))
    assert states[0].pop("scaler") == {}
    assert states[1].pop("scaler")["scale"] >= START
    for part in ("model", "ema", "optimizer", "queue"):
        assert_same_state(states[0][part], states[1][part], part)


def test_a_step_with_overflow_leaves_all_but_bn_statistics(make_run, disturb):
    disturb({3: "gradient"})
    run, states = make_run("eval.online_probe=true"), []
    for _, batch in zip(range(4), run.batches.epoch(0), strict=False):
        result = run.step(batch)
        assert result.has_overflowed == (run.position.step == 3)
        model, state = run.task.model, run.state_dict()
        parts = {name: state[name] for name in ("queue", "online_probe", "scaler")}
        parts["momentum"] = state["optimizer"]["state"]
        parts |= {"model": [*model.online.parameters()], "ema": [*model.ema.parameters()]}
        states.append(copied(parts))
    _, before, after, later = states
    assert before.pop("scaler")["scale"] == 2 * after.pop("scaler")["scale"] == START
    assert_same_state(before, after)
    for part in after:
        with pytest.raises(AssertionError):
            assert_same_state(after[part], later[part])


def test_the_scale_halves_and_doubles_and_goes_through_a_checkpoint(start, disturb):
    """The run that was cut between two overflows equals the one that was not."""
    disturb({2: "gradient", 7: "gradient"})
    options = ("engine.checkpoint_every_steps=4", "engine.keep_checkpoints=9")
    _, whole, _ = start("whole", *options)
    rows = train_rows(whole)
    scales = [256, 128, 128, 128, 128, 256, 128, 128, 128, 128]
    assert [row["loss_scale"] for row in rows] == scales
    assert [row["num_overflow_steps"] for row in rows] == [0] + [1] * 5 + [2] * 4
    assert not (whole / "nonfinite").exists()
    _, cut, _ = start("cut", *options)
    middle = checkpoint.load(cut / "checkpoints" / "step-00000004.pth")
    checkpoint.save(middle, cut / "checkpoint.pth")
    status, _, err = start("cut", *options, "--resume")
    assert status == 0, err
    one, two = (checkpoint.load(folder / "checkpoint.pth") for folder in (whole, cut))
    for part in ("model", "ema", "optimizer", "queue", "scaler"):
        assert_same_state(one[part], two[part], part)
    assert one["position"]["num_overflow_steps"] == two["position"]["num_overflow_steps"] == 2
    assert [row["loss_scale"] for row in train_rows(cut)] == scales


def test_a_scale_below_the_least_ends_the_run(start, disturb):
    disturb(dict.fromkeys((2, 3, 4), "gradient"))
    message = error_of(start("run", "engine.min_loss_scale=64"), 1)
    assert "the loss scale is 32 at step 4, below engine.min_loss_scale (64)" in message


def test_a_loss_that_is_not_finite_is_not_the_scale_s_fault(start, disturb):
    disturb({4: "picture"})
    result = start("run", "engine.log_every_steps=10")
    assert "the loss is nan at step 4; its batch is in" in error_of(result, 1)
    assert (result[1] / "nonfinite" / "step-00000004.json").exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_leave_out_the_same_step(config_file, shards, tmp_path):
    """Only process 1 overflows, at step 3."""
    folder = tmp_path / "run"
    options = [f"out={folder}", f"data.shards={shards}", "optim.epochs=1"]
    for status, printed in run_disturbed_pair("overflow", 1, 3, config_file, *options):
        assert status == 0, printed
    states = [torch.load(folder / f"rank-{rank}.pth", weights_only=True) for rank in (0, 1)]
    for key, value in states[0].items():
        assert "running" in key or torch.equal(value, states[1][key]), key
    assert [row["num_overflow_steps"] for row in train_rows(folder)] == [0, 0, 1, 1, 1]
    assert checkpoint.load(folder / "checkpoint.pth")["scaler"]["scale"] == START / 2
