"""fp16 with a loss scale, on the CPU: exact powers of two, overflow, collapse, resume."""

import math
import re

import pytest
import torch

from common.errors import UserError
from common.files import read_json_lines
from pretrain.config import load_config
from pretrain.engine import checkpoint, guards
from pretrain.engine.checkpoint import copied
from pretrain.engine.trainer import Trainer
from tests.pretrain.engine.run_helpers import SMALL, assert_same_state, one_step

BASE = SMALL | {
    "optim": SMALL["optim"] | {"base_lr": 0.5},
    "engine": SMALL["engine"] | {"precision": "fp16"},
}
START = 256.0  # fits from the first step on; at torch's 65536 the first steps of BASE overflow
CACHED = ["optim.micro_batch_size=4", "optim.accumulation=cached"]
PLAIN = ["optim.micro_batch_size=4"]


@pytest.fixture(autouse=True)
def _start_low(monkeypatch):
    monkeypatch.setattr(guards, "INITIAL", START)


@pytest.fixture
def overflow(monkeypatch):
    """overflow(3, 5): in these steps, from 1 on, a gradient is too large for the scale."""

    def install(*numbers, kind="gradient"):
        original = Trainer.step

        def disturbed(self, batch):
            handle = None
            if self.position.step + 1 in numbers and kind == "gradient":
                weight = self.task.model.online.projector[0].weight
                handle = weight.register_hook(lambda g: torch.full_like(g, torch.inf))
            elif self.position.step + 1 in numbers:
                batch.views[0, 1, 2, 3, 4] = torch.nan
            done = original(self, batch)
            if handle is not None:
                handle.remove()
            return done

        monkeypatch.setattr(Trainer, "step", disturbed)

    return install


def rows_of(folder, kind="train"):
    return [row for row in read_json_lines(folder / "metrics.jsonl") if row["kind"] == kind]


@pytest.mark.parametrize("options", [[], PLAIN, CACHED], ids=["whole", "plain", "cached"])
def test_the_scale_itself_changes_no_bit(make_run, monkeypatch, options):
    """Without fp16, gradients times 2^8 and back are the gradients: all steps equal those of fp32.

    It also shows that each way of accumulating scales once and no more.
    """
    states = []
    for precision in ("fp32", "fp16"):
        run = make_run(f"engine.precision={precision}", *options, name=precision)
        monkeypatch.setattr(run.task, "autocast_type", None)
        for batch in run.batches.epoch(0):
            run.step(batch)
        assert run.task.loss_scale.is_on == (precision == "fp16")
        states.append(copied(run.state_dict()))
    assert states[0]["scaler"] is None
    assert states[1]["scaler"]["scale"] == START
    for part in ("model", "ema", "optimizer", "queue"):
        assert_same_state(states[0][part], states[1][part], part)


def test_a_run_in_fp16_goes_as_in_fp32(start):
    """At a low rate, at which rounding does not grow."""
    found = {}
    for precision in ("fp32", "fp16"):
        status, folder, err = start(
            precision, f"engine.precision={precision}", "optim.base_lr=0.01"
        )
        assert status == 0, err
        found[precision] = rows_of(folder)
    fp32, fp16 = ([row["loss"] for row in found[p]] for p in ("fp32", "fp16"))
    assert fp16 != fp32
    assert fp16[:5] == pytest.approx(fp32[:5], abs=0.05)
    assert fp16 == pytest.approx(fp32, abs=0.3)  # rounding grows in BN of 8 samples
    assert [row["loss_scale"] for row in found["fp16"]] == [START] * 10
    assert [row["num_overflow_steps"] for row in found["fp16"]] == [0] * 10
    assert "loss_scale" not in found["fp32"][0]


def test_precision_fp16_is_what_the_network_computes_in(make_run):
    run, seen = make_run(), []
    run.task.model.online.projector[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    output = one_step(run).output
    assert seen == [torch.float16] * 2
    assert output.loss.dtype == torch.float32
    for parameter in run.task.model.online.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_overflow_leaves_the_step_out_and_halves_the_scale(start, overflow, policy):
    """It is no step that on_nonfinite counts."""
    overflow(3, 4)
    options = (f"engine.on_nonfinite={policy}", "engine.max_nonfinite_steps=1")
    status, folder, err = start("run", *options, "engine.checkpoint_every_steps=2",
                                "engine.keep_checkpoints=9")  # fmt: skip
    assert status == 0, err
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss_scale"] for row in rows] == [START] * 2 + [START / 2] + [START / 4] * 7
    assert [row["num_overflow_steps"] for row in rows] == [0, 0, 1] + [2] * 7
    assert {row["num_skipped_steps"] for row in rows} == {0}
    assert not (folder / "nonfinite").exists()
    before, after, later = (
        checkpoint.load(folder / "checkpoints" / f"step-{step:08d}.pth") for step in (2, 4, 6)
    )
    for part in ("ema", "queue"):
        kept = {k: v for k, v in before[part].items() if "running" not in k and "num_b" not in k}
        assert_same_state(kept, {k: after[part][k] for k in kept}, part)
    assert_same_state(before["optimizer"]["state"], after["optimizer"]["state"])
    weight = "projector.0.weight"
    assert torch.equal(before["model"][weight], after["model"][weight])
    assert not torch.equal(before["model"][weight], later["model"][weight])


def test_a_scale_that_collapses_ends_the_run(start, overflow):
    overflow(*range(2, 11))
    status, _, err = start("run", "engine.min_loss_scale=64", "engine.on_nonfinite=skip")
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "loss scale has collapsed: it is 32 at step 4, below engine.min_loss_scale (64)" in line
    assert "3 steps whose gradients were not finite in fp16; use engine.precision=bf16" in line
    status, folder, err = start("lower", "engine.min_loss_scale=0.5")
    assert status == 0, err
    assert rows_of(folder)[-1]["loss_scale"] == START / 2**9


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_the_guards_and_not_the_scale_s(start, overflow, policy):
    overflow(4, kind="picture")
    options = (f"engine.on_nonfinite={policy}", "engine.log_every_steps=10")
    status, folder, err = start("run", *options)
    assert (folder / "nonfinite" / "step-00000004.json").exists()
    if policy == "stop":
        assert status == 1
        assert re.search(r"the loss is nan at step 4; its batch is in", err)
        return
    assert status == 0, err
    (row,) = rows_of(folder)
    assert (row["loss_scale"], row["num_overflow_steps"], row["num_skipped_steps"]) == (START, 0, 1)
    assert math.isfinite(row["loss"])


def test_the_scale_goes_through_a_checkpoint(start, overflow):
    """Overflow before and after the cut: the run that was cut equals the one that was not."""
    overflow(2, 7)
    options = ("engine.checkpoint_every_steps=4", "engine.keep_checkpoints=9")
    _, whole, _ = start("whole", *options)
    _, cut, _ = start("cut", *options)
    middle = checkpoint.load(cut / "checkpoints" / "step-00000004.pth")
    assert (middle["scaler"]["scale"], middle["scaler"]["_growth_tracker"]) == (START / 2, 2)
    checkpoint.save(middle, cut / "checkpoint.pth")
    for path in (cut / "checkpoints").glob("*.pth"):
        if path.name > "step-00000004.pth":
            path.unlink()
    status, _, err = start("cut", *options, "--resume")
    assert status == 0, err
    one, two = (checkpoint.load(f / "checkpoint.pth") for f in (whole, cut))
    for part in ("model", "ema", "optimizer", "queue", "scaler"):
        assert_same_state(one[part], two[part], part)
    assert one["scaler"]["scale"] == START / 4
    assert one["position"]["num_overflow_steps"] == two["position"]["num_overflow_steps"] == 2


def test_the_first_scale_falls_until_it_fits(start, monkeypatch):
    """Nothing is made to happen: these gradients are too large for torch's first scale."""
    monkeypatch.setattr(guards, "INITIAL", 2.0**17)
    status, folder, err = start("run")
    assert status == 0, err
    rows = rows_of(folder)
    num = rows[-1]["num_overflow_steps"]
    assert 0 < num < 10
    assert rows[-1]["loss_scale"] == 2.0 ** (17 - num)


def test_precision_may_change_at_resume(start):
    _, folder, _ = start("run", "optim.epochs=1")
    assert checkpoint.load(folder / "checkpoint.pth")["scaler"]["scale"] == START
    for precision in ("bf16", "fp16"):
        options = (f"engine.precision={precision}", "optim.epochs=1", "--resume")
        status, _, err = start("run", *options)
        assert status == 0, err


def test_gradients_are_those_of_the_loss_itself_whatever_the_scale(make_run):
    norms = {}
    for precision in ("fp32", "fp16"):
        run = make_run(f"engine.precision={precision}", name=precision)
        one_step(run)
        gradients = [p.grad for p in run.task.model.online.parameters()]
        norms[precision] = float(torch.nn.utils.get_total_norm(gradients))
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)


def test_fp16_and_adversarial_pictures_do_not_go_together(config_file):
    with pytest.raises(UserError, match=r"engine\.precision=fp16: the gradient at a picture"):
        load_config(config_file, ["adversarial.epsilon=2"])
