"""The harness from its command line: runs, resumes, tables, exit status. Training is a stub."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.grid.jobs import CommandJob
from tests.pipeline.grid.stub import StubExecutor, finished, make_index
from tests.slurm.tiny_run import wait_until
from tools import ablate

ROOT = Path(__file__).parents[3]
GRID = {
    "title": "Masks <b> & more",
    "claim": "mask helps",
    "axes": {"FA": {"none": {"fa.method": "none"}, "mask": {"fa.method": "mask"}}},
    "comparisons": [{"name": "mask - none", "treated": {"FA": "mask"}, "control": {"FA": "none"}}],
}
BASE = {
    "arch": {"depth": 18, "width_per_group": 4, "stem_channels": 4, "res2_channels": 4},
    "data": {"image_size": 32, "batch_size": 16, "num_workers": 0},
    "heads": {"projector_hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 16},
    "objective": {"name": "infonce"},
    "optim": {"name": "sgd", "epochs": 2, "base_lr": 0.1, "warmup_epochs": 0},
    "engine": {
        "device": "cpu", "num_threads": 1, "log_every_steps": 1, "checkpoint_every_steps": 1,
    },
    "eval": {"knn_every_epochs": 2, "knn_k": 5, "num_pictures": 0},
}  # fmt: skip
GAINS = (0.031, 0.028, 0.033, 0.027)


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    """The words of a study of 2 cells and 4 seeds on made-up shards."""
    return write_study(tmp_path, *(str(make_index(tmp_path / n, "a")) for n in ("p", "t", "v")))


def write_study(folder: Path, pool: str, train: str, val: str, seeds: int = 4) -> list[str]:
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    sets = {"made": {"recipe": "shards", "pool": pool, "probe_train": train, "probe_val": val}}
    preset = {"base": "base.yaml", "seeds": seeds, "metrics": ["knn"], "sets": sets}
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    words = ("grid.yaml", "--preset", "preset.yaml", "--out", "out")
    return [word if word.startswith("--") else str(folder / word) for word in words]


def train(job: CommandJob) -> dict:
    """What a run with mask gains differs a little from seed to seed."""
    config, words = job.steps[0].command[2], job.steps[0].command
    seed = int(next(word for word in words if word.startswith("seed=")).removeprefix("seed="))
    is_mask = yaml.safe_load(Path(config).read_text())["fa"]["method"] == "mask"
    return finished(job.steps[0].product, {"knn_top1": 0.5 + 0.01 * seed + is_mask * GAINS[seed]})


def results(words: list[str]) -> dict:
    return json.loads((Path(words[-1]) / "results.json").read_text())


def test_a_study_from_grid_to_tables(study: list[str]) -> None:
    executor = StubExecutor(train)
    assert ablate.main(study, executor) == 0
    found = results(study)
    assert (found["is_complete"], found["counts"]) == (True, {"cells": 8, "finished": 8})
    (table,) = found["tables"]
    none, mask = table["rows"]
    assert none["mean"] == pytest.approx(51.5)
    assert mask["values"]["2"] == pytest.approx(55.3)
    (row,) = table["comparisons"]
    assert row["mean"] == pytest.approx(100 * sum(GAINS) / 4)
    assert row["bootstrap"][0] < row["mean"] < row["bootstrap"][1]
    assert (row["verdict"], table["verdict"]) == ("better", "shown")
    out = Path(study[-1])
    text = (out / "tables.md").read_text()
    assert "| none | 51.50 ± 1.29 | 4 |" in text
    assert "| mask - none | 4 | +2.98 |" in text
    assert "PRELIMINARY" not in text
    assert "mask - none: 2.975 (" in (out / "differences.svg").read_text()


def test_the_command_is_that_of_pretrain_sh(study: list[str]) -> None:
    executor = StubExecutor(train)
    ablate.main(study, executor)
    command = executor.handles[0].job.steps[0].command
    assert command[:2] == ("bash", str(ROOT / "tools/pretrain.sh"))
    assert command[-1] == "--resume"
    assert {"seed=0", f"data.shards={json.dumps([str(Path(study[-1]).parent / 'p')])}"} <= set(
        command
    )
    seeds = [w for h in executor.handles for w in h.job.steps[0].command if w.startswith("seed=")]
    assert seeds == [f"seed={n}" for n in (0, 0, 1, 1, 2, 2, 3, 3)]  # all cells of a seed first


def test_finished_cells_are_not_run_again_until_something_changes(study: list[str]) -> None:
    ablate.main(study, StubExecutor(train))
    again = StubExecutor(train)
    assert ablate.main(study, again) == 0
    assert again.handles == []
    shards = Path(study[-1]).parent / "p/index.json"
    shards.write_text(shards.read_text().replace("a" * 64, "b" * 64))  # another pool
    assert ablate.main(study, again) == 0
    assert len(again.handles) == 8


def test_a_partial_study_says_so_and_goes_on(study: list[str]) -> None:
    one = StubExecutor(train)
    assert ablate.main([*study[:-2], "--only", "mask", *study[-2:]], one) == 0
    assert len(one.handles) == 4
    found = results(study)
    assert (found["is_complete"], found["tables"][0]["verdict"]) == (False, "inconclusive")
    assert "PRELIMINARY" in (Path(study[-1]) / "tables.md").read_text()
    rest = StubExecutor(train)
    assert ablate.main(study, rest) == 0
    assert len(rest.handles) == 4
    assert results(study)["is_complete"]


def test_failed_cells_are_shown_and_run_again_when_asked(study: list[str]) -> None:
    def fail(job: CommandJob) -> dict:
        is_bad = "seed=1" in job.steps[0].command
        return {"status": "failed", "error": "disk | full"} if is_bad else train(job)

    assert ablate.main(study, StubExecutor(fail)) == 1
    assert [entry["reason"] for entry in results(study)["failures"]] == ["disk | full"] * 2
    assert r"disk \| full" in (Path(study[-1]) / "tables.md").read_text()
    idle = StubExecutor(train)
    assert ablate.main(study, idle) == 1
    assert idle.handles == []
    assert ablate.main([*study[:-2], "--retry-failed", *study[-2:]], StubExecutor(train)) == 0
    assert results(study)["failures"] == []


def test_time_is_up(study: list[str]) -> None:
    slow = StubExecutor(train, polls=10**6)
    assert ablate.main([*study[:-2], "--max-minutes", "0.334", *study[-2:]], slow) == 3
    counts = results(study)["counts"]
    assert counts["planned"] + counts.get("stopped", 0) == counts["cells"] == 8


def test_list_shows_and_runs_nothing(study: list[str], capsys: pytest.CaptureFixture) -> None:
    executor = StubExecutor(train)
    assert ablate.main([*study[:-2], "--list", *study[-2:]], executor) == 0
    assert executor.handles == []
    assert "2 cells x 4 seeds = 8 runs" in capsys.readouterr().out
    assert not (Path(study[-1]) / "results.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("none\n", "nonsense\n", "'nonsense' is none of none, identity, nn"),
        ("fa.method: mask", "fa.methd: mask", "unknown key fa.methd; did you mean fa.method?"),
        (
            "fa.method: mask",
            "{fa.method: mask, fa.architecture: post}",
            "cannot train: no gradient",
        ),
    ],
)
def test_cells_that_cannot_run_are_refused_before_any_run(
    study: list[str], old: str, new: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    grid = Path(study[0])
    text = grid.read_text()
    assert old in text
    grid.write_text(text.replace(old, new, 1))
    executor = StubExecutor(train)
    assert ablate.main(study, executor) == 2
    assert message in capsys.readouterr().err
    assert executor.handles == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--preset", "huge"],
            "no such preset; there are longer-cpu, reproduce-cpu, reproduce-gpu",
        ),
        (["--data", "cifar"], "--data cifar: preset has made"),
        (["--metrics", "top5"], "--metrics top5: give some of knn, linear, online"),
        (["--parallel", "0"], "--parallel 0: give 1 or more"),
        (["--max-minutes", "0.1"], "the last 20 s are for saving"),
    ],
)
def test_mistakes_on_the_command_line(
    study: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert ablate.main([*study, *words], StubExecutor(train)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_study_goes_on_through_submitit(tmp_path: Path) -> None:
    """Real runs: stopped by SIGTERM within one, resumed, equal to an undisturbed study."""
    from benchmarks import kill_resume

    shards = str(kill_resume.make_shards(tmp_path))
    words = write_study(tmp_path, shards, shards, shards, seeds=1)
    command = [sys.executable, str(ROOT / "tools/ablate.py"), *words]
    harness = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out = Path(words[-1])

    def is_training() -> bool:
        return any(
            len(p.read_text().splitlines()) > 3 for p in out.glob("cells/*/*/run/metrics.jsonl")
        )

    wait_until(is_training, 120, "the first step")
    harness.send_signal(signal.SIGTERM)
    said, _ = harness.communicate(timeout=60)
    assert harness.returncode == 128 + signal.SIGTERM, said
    counts = results(words)["counts"]
    assert counts.get("finished", 0) < 2
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert time.monotonic() - started < 300
    found = results(words)
    assert found["counts"] == {"cells": 2, "finished": 2}
    calm = [*words[:-1], str(tmp_path / "calm")]
    assert subprocess.run([*command[:2], *calm], timeout=300).returncode == 0
    for one, other in zip(found["cells"], results(calm)["cells"], strict=True):
        assert one["metrics"] == other["metrics"]
        assert one["fingerprint"] == other["fingerprint"]
