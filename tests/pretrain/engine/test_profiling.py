"""``--profile``: every range is there, what is slow shows in its row, nothing is trained."""

import contextlib
import gzip
import io
import json
import re
import time
from pathlib import Path

import pytest
import torch
import yaml

from pretrain.__main__ import main
from pretrain.data.loader import Loader
from pretrain.engine import profiling
from pretrain.features.feature_augmentation import FeatureAugmenter
from tests.pretrain.engine.run_helpers import SMALL

pytestmark = pytest.mark.slow  # many seconds of a core

BASE = SMALL | {
    "fa": {"method": "nn", "queue_size": 64, "min_fill": 64},
    "optim": SMALL["optim"] | {"epochs": 3},
}
NUM, SLEPT = 2, 0.03


@pytest.fixture(scope="module")
def profiled(shards, tmp_path_factory):
    """Folder of a profile of 2 steps in which loader and FA are slow, and what was printed."""
    place, printed = tmp_path_factory.mktemp("profiled"), io.StringIO()
    folder, config = place / "run", place / "tiny.yaml"
    config.write_text(yaml.safe_dump(BASE))
    epoch, forward = Loader.epoch, FeatureAugmenter.forward

    def slow_epoch(*arguments):
        for item in epoch(*arguments):
            time.sleep(SLEPT)
            yield item

    def slow_forward(*arguments):
        assert (folder / ".lock").exists(), "the folder is held to the end"
        time.sleep(SLEPT)
        return forward(*arguments)

    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patched:
        patched.setattr(Loader, "epoch", slow_epoch)
        patched.setattr(FeatureAugmenter, "forward", slow_forward)
        options = [f"out={folder}", f"data.shards={shards}", f"--profile={NUM}"]
        assert main([str(config), *options]) == 0
    return folder, printed.getvalue()


def test_all_ranges_are_there_and_fit_into_the_step(profiled):
    folder, printed = profiled
    summary = json.loads((folder / "profile" / "summary.json").read_text())
    times = {row["name"]: row["ms"] for row in summary["ranges"]}
    assert set(times) == set(profiling.RANGES) - {"wait for views"}  # a GPU's alone
    assert min(times.values()) >= 0
    traced = summary["traced_step_ms"]
    inside = times["EMA forward"] + times["FA"] + times["loss"]
    assert inside < times["forward"]
    assert 0.7 * traced < sum(times.values()) - inside <= traced
    assert times["loader"] >= 1e3 * SLEPT
    assert times["FA"] >= 2e3 * SLEPT  # two directions
    for row in summary["ranges"]:
        assert row["share"] == pytest.approx(row["ms"] / traced)
        assert row["name"] in printed
    assert summary["images_per_second"] == pytest.approx(8e3 / summary["step_ms"])
    assert summary["step_ms"] >= 3e3 * SLEPT


def test_the_names_in_the_code_are_those_that_are_summed():
    package = Path(profiling.__file__).parents[1]
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    assert set(re.findall(r'record_function\("([^"]+)"\)', code)) == set(profiling.RANGES)


def test_flops_are_those_of_convolutions_and_products_forward_and_backward():
    conv, linear = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.nn.Linear(5, 7)
    images = torch.randn(2, 3, 8, 8)
    forward = 2 * (2 * 64 * 27 * 5 + 2 * 5 * 7)
    work = lambda: linear(conv(images).mean(dim=(2, 3))).sum()  # noqa: E731
    assert profiling.count_flops(work) == forward
    # The gradient of the pixels is not computed; of the linear layer's input it is.
    backward = 2 * (2 * 64 * 27 * 5 + 2 * 2 * 5 * 7)
    assert profiling.count_flops(lambda: work().backward()) == forward + backward


def test_trace_has_every_label_in_every_step_and_nothing_else_is_left(profiled):
    folder, _ = profiled
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"profile"}
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    labels = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    for name in ("transfer", "EMA forward", "forward", "backward", "optimiser", "queue"):
        assert labels.count(name) == profiling.NUM_TRACED, name
    assert labels.count("FA") == 2 * profiling.NUM_TRACED  # both directions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile=0"], "--profile=0 takes 8 steps"),
        (["--profile=20"], "takes 28 steps, warm-up and trace included, and this run has 15"),
        (["--profile=2", "--resume"], "--profile runs by itself"),
    ],
)
def test_what_cannot_be_profiled_is_refused(start, arguments, message):
    status, _, err = start("run", *arguments)
    assert status == 2
    assert message in err


def test_queues_are_full_and_random_state_is_kept(make_run):
    run = make_run("objective.name=moco", "objective.num_negatives=50")
    state = torch.get_rng_state()
    profiling.fill_queues(run.task.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert run.task.model.augmenter.is_ready()
    for queue in run.task.model.memory.children():
        assert int(queue.count) == 50
