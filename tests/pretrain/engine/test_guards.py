"""Steps that are not finite are found, told, left out or end the run; memory that ran out is told.

What goes wrong is made to happen: NaN in a picture, an infinite gradient, allocations that fail.
"""

import json
import os
import re
import signal

import pytest
import torch

from common.files import read_json_lines
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint, guards
from pretrain.engine.checkpoint import copied
from pretrain.engine.trainer import Trainer
from tests.pretrain.engine.run_helpers import SMALL, assert_same_state, start_pair

BASE = SMALL | {
    "objective": {"name": "infonce"},
    "optim": SMALL["optim"] | {"name": "adamw"},
}
SKIP = "engine.on_nonfinite=skip"
BYOL = ["objective.name=byol", "optim.name=lars", "optim.base_lr=2"]


class Watched:
    """What was seen of each step: the batch, and the state before and after it."""

    def __init__(self):
        self.batch, self.before, self.after, self.loss = {}, {}, {}, {}


def snapshot(run):
    negatives = run.task.model.memory
    parts = {
        "model": run.task.model.state_dict(),
        "optimizer": run.task.optimizer.state_dict()["state"],
        "negatives": {} if negatives is None else negatives.state_dict(),
    }
    return copied(parts)


@pytest.fixture
def disturb(monkeypatch):
    """disturb({3: "picture", 5: "gradient"}): what goes wrong in which step, from 1 on."""
    original = Trainer.step

    def install(what):
        seen = Watched()

        def disturbed(self, batch):
            number = self.position.step + 1
            kind = what.get(number)
            if kind == "picture":
                batch.views[0, 1, 2, 3, 4] = torch.nan
            handle = None
            if kind == "gradient":
                weight = self.task.model.online.projector[0].weight
                handle = weight.register_hook(lambda g: torch.full_like(g, torch.inf))
            seen.batch[number], seen.before[number] = batch, snapshot(self)
            done = original(self, batch)
            if handle is not None:
                handle.remove()
            seen.after[number], seen.loss[number] = snapshot(self), float(done.loss)
            return done

        monkeypatch.setattr(Trainer, "step", disturbed)
        return seen

    return install


def rows_of(folder, kind):
    return [row for row in read_json_lines(folder / "metrics.jsonl") if row["kind"] == kind]


def error_of(status, err):
    """The one line that a run that went wrong prints."""
    assert status == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def written(folder, step):
    return json.loads((folder / "nonfinite" / f"step-{step:08d}.json").read_text())


# --- a step is left out


CELLS = {
    "infonce": [],
    "byol": BYOL,
    "moco": ["objective.name=moco", "objective.num_negatives=20", "optim.name=sgd"],
    "cached": ["optim.micro_batch_size=4", "optim.accumulation=cached"],
    "plain": [*BYOL, "optim.micro_batch_size=4"],
}


@pytest.mark.parametrize("kind", ["picture", "gradient"])
@pytest.mark.parametrize("cell", CELLS)
def test_skip_leaves_everything_as_it_was(start, disturb, cell, kind):
    seen = disturb({4: kind})
    status, folder, err = start("run", SKIP, *CELLS[cell])
    assert status == 0, err
    assert_same_state(seen.before[4], seen.after[4])
    for other in (3, 5):
        before, after = seen.before[other]["model"], seen.after[other]["model"]
        for part in ("weight", "running_mean", "queue.features"):
            changed = [k for k in before if part in k and not torch.equal(before[k], after[k])]
            assert changed, (other, part)
    assert all(bool(t.isfinite().all()) for t in seen.after[10]["model"].values())
    assert [row["step"] for row in rows_of(folder, "train")] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    counts = [row["num_skipped_steps"] for row in rows_of(folder, "train")]
    assert counts == [0] * 3 + [1] * 6
    (event,) = rows_of(folder, "event")
    assert (event["step"], event["num_skipped_steps"]) == (4, 1)
    assert "step 4 was left out" in event["message"]
    assert f"warning: {event['message']}" in err
    row = written(folder, 4)
    assert (row["loss"] == ["nan"]) == (kind == "picture")
    assert row["gradient_norm"] in ("nan", "inf")


def test_the_guard_changes_nothing_where_all_is_finite(start):
    """Skip looks at every step, stop with the same interval, and both leave the same weights."""
    states = []
    for policy in ("stop", "skip"):
        _, folder, _ = start(policy, f"engine.on_nonfinite={policy}", *BYOL)
        states.append(checkpoint.load(folder / "checkpoint.pth"))
        assert not (folder / "nonfinite").exists()
    for part in ("model", "ema", "optimizer", "queue", "random"):
        assert_same_state(states[0][part], states[1][part], part)


def test_more_steps_than_allowed_stop_the_run(start, disturb):
    disturb({2: "picture", 4: "gradient", 6: "picture"})
    options = (SKIP, "engine.checkpoint_every_steps=5")
    status, folder, err = start("run", *options, "engine.max_nonfinite_steps=2")
    message = error_of(status, err)
    assert re.search(r"the loss is nan at step 6, and 2 steps were left out before", message)
    assert "engine.max_nonfinite_steps" in message
    assert sorted(p.name for p in (folder / "nonfinite").iterdir()) == [
        f"step-{n:08d}.json" for n in (2, 4, 6)
    ]
    state = checkpoint.load(folder / "checkpoint.pth")
    assert (state["step"], state["position"]["num_skipped_steps"]) == (5, 2)
    status, _, err = start("run", *options, "engine.max_nonfinite_steps=3", "--resume")
    assert status == 0, err


def test_resume_with_skipped_steps_is_exact(start, disturb, monkeypatch):
    options = (SKIP, "engine.checkpoint_every_steps=4", *BYOL)
    disturb({3: "picture", 7: "gradient"})
    _, whole, _ = start("whole", *options)
    disturbed = Trainer.step

    def interrupted(self, batch):
        if self.position.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return disturbed(self, batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    status, cut, _ = start("cut", *options)
    assert status == 128 + signal.SIGTERM
    assert checkpoint.load(cut / "checkpoint.pth")["step"] == 5
    monkeypatch.setattr(Trainer, "step", disturbed)
    status, _, err = start("cut", *options, "--resume")
    assert status == 0, err
    one, two = (checkpoint.load(f / "checkpoint.pth") for f in (whole, cut))
    for part in ("model", "ema", "optimizer", "queue", "random"):
        assert_same_state(one[part], two[part], part)
    assert one["position"]["num_skipped_steps"] == two["position"]["num_skipped_steps"] == 2
    for kind, keys in (("train", ("step", "loss", "num_skipped_steps")), ("event", ("step",))):
        seen = [[[r[k] for k in keys] for r in rows_of(f, kind) if r["step"]] for f in (whole, cut)]
        assert [r for r in seen[1] if r != [5] or kind == "train"] == seen[0]


def test_checkpoints_from_before_the_counter_load(start):
    _, folder, _ = start("run", "optim.epochs=1")
    state = checkpoint.load(folder / "checkpoint.pth")
    del state["position"]["num_skipped_steps"]
    checkpoint.save(state, folder / "checkpoint.pth")
    status, _, err = start("run", "optim.epochs=1", "--resume")
    assert status == 0, err


# --- a step ends the run


@pytest.mark.parametrize("kind", ["picture", "gradient"])
def test_stop_names_the_step_and_keeps_its_batch(start, disturb, kind):
    seen = disturb({4: kind})
    status, folder, err = start("run", "engine.log_every_steps=1000",
                                   "engine.checkpoint_every_steps=3")  # fmt: skip
    message = error_of(status, err)
    what = "the loss is nan" if kind == "picture" else "the gradient norm is (inf|nan)"
    assert re.search(rf"{what} at step 4; its batch is in \S+step-00000004\.json", message)
    assert "holds an earlier state. Lower optim.base_lr" in message
    row, batch = written(folder, 4), seen.batch[4].samples
    assert (row["format"], row["step"], row["epoch"]) == ("fa-nonfinite-1", 4, 0)
    for name in ("sample_ids", "repeats", "sample_hashes"):
        assert row[name] == getattr(batch, name).tolist(), name
    state = checkpoint.load(folder / "checkpoint.pth")
    assert state["step"] == 3
    for key, value in state["model"].items():
        assert torch.equal(value, seen.before[4]["model"][f"online.{key}"]), key


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
    status, folder, err = start("run", *options)
    assert "the loss is nan at step 3; its batch is in" in error_of(status, err)
    assert sorted(seen.before) == [1, 2, 3, 4, 5]
    assert written(folder, 3)["sample_ids"] == seen.batch[3].samples.sample_ids.tolist()
    assert not (folder / "checkpoint.pth").exists()


# --- memory


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
def test_out_of_memory_says_what_to_change(start, monkeypatch, kind):
    step, error = Trainer.step, OUT_OF_MEMORY[kind]()

    def failing(self, batch):
        if self.position.step == 6:
            raise error
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", failing)
    status, folder, err = start("run", "engine.checkpoint_every_steps=4")
    message = error_of(status, err)
    assert message.startswith("error: out of memory (")
    for named in ("optim.micro_batch_size", "data.num_workers", "data.batch_size", "--resume"):
        assert named in message
    assert checkpoint.load(folder / "checkpoint.pth")["step"] == 4
    monkeypatch.undo()
    status, _, err = start("run", "--resume")
    assert status == 0, err


def test_other_errors_are_no_lack_of_memory(start, monkeypatch):
    def failing(self, batch):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        start("run")


# --- several processes


@pytest.fixture(scope="module")
def shards_with_bad_pictures(make_shards):
    folder = make_shards("bad-pictures")
    index = ShardIndex.open(folder)
    for number in (3, 11, 20, 27, 33, 38):
        row = index.samples[number]
        with open(folder / index.shard_names[int(row["shard"])], "r+b") as file:
            file.seek(int(row["offset"]))
            file.write(bytes(int(row["size"])))
    return folder


@pytest.mark.ddp
def test_two_processes_decide_alike_and_count_together(
    config_file, shards_with_bad_pictures, tmp_path
):
    """Only process 1 sees NaN, in its loss of steps 3 and 8; steps 4 and 8 are logged."""
    folder = tmp_path / "run"
    results = start_pair(
        "poison", 1, "3,8", config_file, f"out={folder}", f"data.shards={shards_with_bad_pictures}",
        SKIP, "engine.max_nonfinite_steps=1", "engine.log_every_steps=2", "data.max_bad_samples=9",
        "engine.checkpoint_every_steps=5", *BYOL,
    )  # fmt: skip
    for status, printed in results:
        assert status == 1, printed
        assert re.search(r"error: the loss is nan at step 8, and 1 steps were left out", printed)
    states = [torch.load(folder / f"rank-{rank}.pth", weights_only=True) for rank in (0, 1)]
    for key, value in states[0].items():
        assert bool(value.isfinite().all()), key
        if "running" not in key:
            assert torch.equal(value, states[1][key]), key
    row = written(folder, 3)
    assert len(row["sample_ids"]) == len(set(row["sample_ids"])) == 8
    assert isinstance(row["loss"][0], float)
    assert row["loss"][1] == "nan"
    (event,) = rows_of(folder, "event")
    assert (event["step"], event["num_skipped_steps"]) == (3, 1)
    assert [r["num_skipped_steps"] for r in rows_of(folder, "train")] == [0, 1, 1]
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {r["rank"] for r in bad} == {0, 1}
    state = checkpoint.load(folder / "checkpoint.pth")
    assert state["step"] == 5  # not a logged step: the sum is made there too
    assert state["position"]["num_bad_samples"] == 6
    last = rows_of(folder, "train")[-1]
    assert (last["step"], last["num_bad_samples"] >= 6) == (6, True)
