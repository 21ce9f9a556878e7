"""The real pipeline, once as a whole, then again, then killed in the middle."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.smoke_run import copy_smoke_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("random", "pretrained", "random_frozen", "pretrained_frozen")


def start(out: Path, *words: str) -> subprocess.Popen:
    command = ["bash", str(ROOT / "tools/run_pipeline.sh"), "smoke", "--out", str(out), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as the run that it must equal
    )  # fmt: skip


def run(out: Path, *words: str) -> str:
    process = start(out, *words)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return output


def kill_when(out: Path, reached: Callable[[], bool]) -> None:
    """Start the pipeline and end it with SIGKILL as soon as `reached`."""
    process = start(out)
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smoke") / "run"
    if not copy_smoke_run(out):
        run(out)
    return out


def test_everything_is_there(finished):
    results = results_of(finished)
    assert set(results["detection"]) == set(ARMS)
    for rows in results["detection"].values():
        assert [row["seed"] for row in rows] == [0]
        assert all(0 <= rows[0][metric] <= 100 for metric in ("AP", "AP50", "AP75"))
        assert set(rows[0]["per_class"]) <= {"cup", "bottle", "chair", "car"}
    assert results["pretrain"]["images_per_second"] > 0
    assert 0 <= results["pretrain"]["knn_top1"] <= 1
    assert results["conversion"]["max_relative_difference"] < 1e-4
    assert results["unfinished"] == []
    assert all(not stage["skipped"] for stage in results["stages"].values())
    assert results["versions"]["detectron2"]
    page = (finished / "report.html").read_text()
    assert page.count("<img") + page.count("<image") >= 15
    assert "Preliminary" not in page
    sections = ("detections", "figures", "errors", "pretraining", "conversion", "skipped", "ran")
    assert all(f'<section id="{name}"' in page for name in sections)


def test_second_run_skips_everything(finished):
    before = results_of(finished)["stages"]
    output = run(finished)
    after = results_of(finished)["stages"]
    assert all(stage["skipped"] for stage in after.values()), output
    assert {n: s["seconds"] for n, s in after.items()} == {
        n: s["seconds"] for n, s in before.items()
    }


def losses(out: Path) -> list[tuple[int, float]]:
    lines = (out / "pretrain/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return [(row["step"], row["loss"]) for row in rows]


def test_killed_pretraining_goes_on_and_ends_the_same(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "pretrain")
    kill_when(out, (out / "pretrain/checkpoint.pth").exists)
    assert not (out / "pretrain/summary.json").exists(), "killed too late"
    output = run(out)
    assert "pretrain: continues where it stopped" in output
    assert losses(out) == losses(finished)
    results = results_of(out)
    assert not results["stages"]["pretrain"]["skipped"]
    assert results["stages"]["random/seed-0"]["skipped"]
    assert results["stages"]["pretrained/seed-0"]["skipped"], "the same weights: nothing to do"


def test_killed_detection_goes_on_and_ends_the_same(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    folder = out / "detection/random/seed-0"
    shutil.rmtree(folder)
    kill_when(out, (folder / "last_checkpoint").exists)
    assert not (folder / "result.json").exists(), "killed too late"
    output = run(out)
    assert "random/seed-0: continues where it stopped" in output
    before, after = (results_of(o)["detection"]["random"][0] for o in (finished, out))
    assert [after[m] for m in ("AP", "AP50", "AP75")] == [before[m] for m in ("AP", "AP50", "AP75")]
    path = "detection/random/seed-0/model_final.pth"
    ours, whole = (torch.load(o / path, weights_only=True)["model"] for o in (out, finished))
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


def test_more_seeds_run_only_the_new_ones(finished, tmp_path):
    assert run(finished, "--dry-run").splitlines()[-1] == "nothing to do"
    output = run(finished, "--dry-run", "detection.seeds=2")
    plan = {line.split()[1]: line.split()[0] for line in output.splitlines()}
    assert all(plan[f"{arm}/seed-0"] == "skip" for arm in ARMS)
    assert all(plan[f"{arm}/seed-1"] == "run" for arm in ARMS)
