"""Steps that are not finite end the run and are told; so is memory that ran out.

What goes wrong is made to happen: NaN in a picture, an infinite gradient, allocations that fail.
"""

import json
import re
import time

import pytest
import torch

from common.errors import RunFailed, memory_remedy
from pretrain.engine import checkpoint, guards
from pretrain.engine.trainer import Trainer
from tests.pretrain.data.picture_helpers import damage
from tests.pretrain.engine.guard_worker import run_disturbed_pair
from tests.pretrain.engine.run_helpers import LIGHT, SMALL, error_of, train_rows

SECONDS = 2.0  # no step of this network takes so long, also beside other work
BASE = SMALL | LIGHT | {"optim": SMALL["optim"] | {"epochs": 1}}


def written(folder, step):
    return json.loads((folder / "nonfinite" / f"step-{step:08d}.json").read_text())


@pytest.mark.parametrize("kind", ["picture", "gradient"])
def test_a_step_that_is_not_finite_ends_the_run_and_keeps_its_batch(start, disturb, kind):
    seen = disturb({4: kind})
    result = start("run", "engine.log_every_steps=1000", "engine.checkpoint_every_steps=3")
    what = "the loss is nan" if kind == "picture" else "the gradient norm is (inf|nan)"
    message = error_of(result, 1)
    assert re.search(rf"{what} at step 4; its batch is in \S+step-00000004\.json", message)
    assert "holds an earlier state. Lower optim.base_lr" in message
    folder, batch = result[1], seen[4].samples
    row = written(folder, 4)
    assert (row["format"], row["step"], row["epoch"]) == ("fa-nonfinite-1", 4, 0)
    assert (row["loss"] == [None]) == (kind == "picture")
    assert row["gradient_norm"] is None
    for name in ("sample_ids", "repeats", "sample_hashes"):
        assert row[name] == getattr(batch, name).tolist(), name
    state = checkpoint.load(folder / "checkpoint.pth")
    assert state["step"] == 3
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


@pytest.mark.parametrize("where", ["log", "checkpoint"])
def test_where_the_device_is_not_waited_for_the_first_bad_step_is_known(
    start, disturb, monkeypatch, where
):
    """As on a GPU: looked at only when a row or a checkpoint is due, step 5."""
    init = guards.NonFiniteGuard.__init__

    def lazy(self, *arguments):
        init(self, *arguments)
        self._is_always_due = False

    monkeypatch.setattr(guards.NonFiniteGuard, "__init__", lazy)
    seen = disturb({3: "picture"})
    intervals = {"log": "engine.log_every_steps", "checkpoint": "engine.checkpoint_every_steps"}
    options = [f"{key}={5 if name == where else 1000}" for name, key in intervals.items()]
    result = start("run", *options)
    assert "the loss is nan at step 3; its batch is in" in error_of(result, 1)
    assert sorted(seen) == [1, 2, 3, 4, 5]
    assert written(result[1], 3)["sample_ids"] == seen[3].samples.sample_ids.tolist()
    assert not (result[1] / "checkpoint.pth").exists()


def test_pictures_of_earlier_steps_are_let_go(start, disturb, monkeypatch):
    """Only what says which samples they were is kept until the next step that is looked at."""
    init, check, alive = guards.NonFiniteGuard.__init__, guards.NonFiniteGuard.check, []

    def lazy(self, *arguments):
        init(self, *arguments)
        self._is_always_due = False

    def counted(self, samples, *arguments, **more):
        result = check(self, samples, *arguments, **more)
        sizes = (value.numel() for _, taken, _ in self._seen for value in taken.values())
        alive.append((len(self._seen), max(sizes, default=0), len(samples.sample_ids)))
        return result

    monkeypatch.setattr(guards.NonFiniteGuard, "__init__", lazy)
    monkeypatch.setattr(guards.NonFiniteGuard, "check", counted)
    disturb({})
    start("run", "engine.log_every_steps=1000", "engine.checkpoint_every_steps=1000")
    assert alive[2][0] == 3, "nothing is looked at"
    assert all(largest <= num for _, largest, num in alive)


def no_memory_on_a_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58)
    return caught.value


OUT_OF_MEMORY = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": no_memory_on_a_cpu,
    "python": MemoryError,
    "worker": lambda: RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_says_what_to_change(kind):
    with (
        pytest.raises(RunFailed, match=r"out of memory \(.*\); lower it$"),
        memory_remedy("lower it"),
    ):
        raise OUT_OF_MEMORY[kind]()


def test_a_reader_that_died_otherwise_is_told_in_one_line():
    with (
        pytest.raises(RunFailed, match=r"died \(DataLoader .*Hangup\.\); go on with --resume"),
        memory_remedy("lower it"),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Hangup. ")


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match=r"^shape"), memory_remedy("lower it"):
        raise RuntimeError("shape mismatch")


@pytest.fixture
def shards_with_bad_pictures(make_shards):
    folder = make_shards("bad-pictures")
    damage(folder, 3, 11, 20, 27, 33, 38)
    return folder


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_decide_alike_and_count_together(
    config_file, shards_with_bad_pictures, tmp_path
):
    """Only process 1 sees NaN, in its loss of step 8, which is logged."""
    folder = tmp_path / "run"
    results = run_disturbed_pair(
        "poison", 1, 8, config_file, f"out={folder}", f"data.shards={shards_with_bad_pictures}",
        "engine.log_every_steps=2", "data.max_bad_samples=9", "engine.checkpoint_every_steps=5",
        "optim.epochs=2",
    )  # fmt: skip
    for status, printed in results:
        assert status == 1, printed
        assert re.search(r"error: the loss is nan at step 8; its batch is in", printed)
    states = [torch.load(folder / f"rank-{rank}.pth", weights_only=True) for rank in (0, 1)]
    for key, value in states[0].items():
        if "running" not in key:
            assert torch.equal(value, states[1][key]), key
    row = written(folder, 8)
    assert len(row["sample_ids"]) == 8
    assert isinstance(row["loss"][0], float)
    assert row["loss"][1] is None
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {r["rank"] for r in bad} == {0, 1}
    state = checkpoint.load(folder / "checkpoint.pth")
    assert state["step"] == 5  # not a logged step: the sum is made there too
    assert state["position"]["num_bad_samples"] == 6
    last = train_rows(folder)[-1]
    assert (last["step"], last["num_bad_samples"] >= 6) == (6, True)


def test_a_hang_is_reported_and_the_run_goes_on(start, monkeypatch, tmp_path):
    step = Trainer.step

    def pausing(self, batch):
        if self.position.step == 3:
            time.sleep(0.75)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", pausing)
    with open(tmp_path / "stacks", "w+") as stderr:
        monkeypatch.setattr(guards, "STDERR", stderr.fileno())
        status, folder, _ = start("run", "engine.watchdog_seconds=0.25")
        printed = (tmp_path / "stacks").read_text()
    assert status == 0
    assert "Timeout (0:00:00" in printed
    assert "most recent call first" in printed
    assert "in pausing" in printed
    assert (folder / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_on_hang_stop_ends_both_processes_and_the_stacks_name_the_one_that_hangs(
    config_file, shards, tmp_path
):
    folder = tmp_path / "run"
    results = run_disturbed_pair(
        "sleep", 1, 4, config_file, f"out={folder}", f"data.shards={shards}",
        f"engine.watchdog_seconds={SECONDS}", "engine.on_hang=stop", "engine.log_every_steps=1",
    )  # fmt: skip
    (waiting_status, waiting), (hanging_status, hanging) = results
    assert (waiting_status, hanging_status) == (1, 1), waiting + hanging
    assert "in stand_still" in hanging
    assert "in stand_still" not in waiting
    assert [row["step"] for row in train_rows(folder)] == [1, 2, 3]
