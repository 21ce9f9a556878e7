"""Detection trials from the command line; training is a stub."""

import json
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from pipeline.grid import data, trials
from pipeline.grid.jobs import CommandJob
from tests.pipeline.grid.stub import StubExecutor, finished
from tools import run_trials

ROOT = Path(__file__).parents[3]
LEVELS = {"random": 20.0, "byol": 24.0, "ours": 30.0}
NOISE = (0.3, -0.2, 0.1, -0.3, 0.2)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\nSOLVER: {STEPS: '(1, 2)'}\n")
    (tmp_path / "base.yaml").write_text("MODEL: {}\n")
    write_set(tmp_path / "data")
    for name in ("byol", "ours"):
        (tmp_path / f"{name}.pkl").write_bytes(name.encode())
        (tmp_path / f"{name}.json").write_text("{}")
    return [
        "--init", "random", "--init", f"byol={tmp_path}/byol.pkl",
        "--init", f"ours={tmp_path}/ours.pkl", "--config", str(tmp_path / "config.yaml"),
        "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def write_set(folder: Path) -> None:
    for name in ("JPEGImages/1.jpg", "Annotations/1.xml", "ImageSets/Main/train.txt"):
        path = folder / "VOC2007" / name
        path.parent.mkdir(parents=True)
        path.write_text(name)


def train(job: CommandJob) -> dict:
    command = job.steps[0].command
    seed, arm = (command[command.index(option) + 1] for option in ("--seeds", "--arm"))
    ap50 = LEVELS[arm] + NOISE[int(seed)] * (1 if arm == "ours" else -1)
    result = {
        "AP": ap50 / 2, "AP50": ap50, "AP75": ap50 / 4,
        "per_class": {"cat": ap50 / 2 + 1, "dog": None},
        "per_class_AP50": {"cat": ap50 + 1, "dog": None},
        "coco": {"AP": ap50 / 2 - 1, "AP50": ap50 - 2, "AP75": ap50 / 4 - 3, "APs": None},
    }  # fmt: skip
    if arm == "byol":
        del result["coco"]  # made by an older version
    return finished(job.steps[0].product, result)


def results(words: list[str]) -> dict:
    return json.loads((Path(words[words.index("--out") + 1]) / "results.json").read_text())


def test_trials_from_runs_to_tables(words: list[str]) -> None:
    executor = StubExecutor(train)
    published = ["--published", str(ROOT / "configs/studies/published/voc0712.yaml")]
    assert run_trials.main([*words, "--compare", "ours:byol", *published], executor) == 0
    assert len(executor.handles) == 15
    found = results(words)
    assert found["arms"]["ours"]["AP50"]["mean"] == pytest.approx(30.02)
    by_name = {row["name"]: row for row in found["comparisons"]["AP50"]}
    assert list(by_name) == ["byol - random", "ours - random", "ours - byol"]
    row = by_name["ours - byol"]
    assert row["differences"] == pytest.approx([6 + 2 * e for e in NOISE])
    assert row["bootstrap"][0] <= row["mean"] <= row["bootstrap"][1]
    assert row["verdict"] == "better"
    assert by_name["byol - random"]["std"] == pytest.approx(0, abs=1e-9)
    classes = found["per_class"]["AP50"]
    assert list(classes["arms"]) == ["cat"]  # a class without test objects has no AP
    assert classes["arms"]["cat"]["ours"]["mean"] == pytest.approx(31.02)
    assert {row["name"] for row in classes["comparisons"]} == {f"cat: {n}" for n in by_name}
    text = (Path(words[words.index("--out") + 1]) / "tables.md").read_text()
    assert "| ours | 5 | 30.02 ± 0.26 |" in text
    assert "| random | - | 60.2 | 33.8 | 33.1 | - | - | - | MoCo (arXiv 1911.05722) [M] |" in text
    assert "| DenseCL, 200 epochs | - | - | 58.7 | - | - | - | - | DenseCL README |" in text
    assert found["arms"]["ours"]["coco_AP50"]["mean"] == pytest.approx(28.02)
    assert found["arms"]["byol"]["coco_AP50"]["n"] == 0
    by_coco = {row["name"]: row for row in found["comparisons"]["coco_AP75"]}
    assert by_coco["ours - random"]["n"] == 5
    assert by_coco["ours - byol"]["n"] == 0
    assert "COCO AP50 | COCO AP | COCO AP75 | source" in text
    ours = next(line for line in text.splitlines() if line.startswith("| ours | 5 |"))
    assert ours.endswith("| 28.02 ± 0.26 | 14.01 ± 0.13 | 4.50 ± 0.06 | measured |")
    old = next(line for line in text.splitlines() if line.startswith("| byol | 5 |"))
    assert old.endswith("| - | - | - | measured |")
    assert "| COCO AP50, ours - random |" in text
    assert "COCO AP50, ours - byol" not in text


def test_the_command_and_what_decides_that_a_run_is_done(words: list[str], tmp_path: Path) -> None:
    executor = StubExecutor(train)
    run = [*words, "--seeds", "2", "--", "--freeze", "SOLVER.MAX_ITER", "5"]
    assert run_trials.main(run, executor) == 0
    command = executor.handles[1].job.steps[0].command
    assert command[:3] == ("bash", str(ROOT / "tools/train_voc.sh"), f"{tmp_path}/byol.pkl")
    assert command[-3:] == ("--freeze", "SOLVER.MAX_ITER", "5")
    again = StubExecutor(train)
    assert run_trials.main(run, again) == 0
    assert again.handles == []
    (tmp_path / "base.yaml").write_text("MODEL: {MASK_ON: false}\n")  # below the config given
    assert run_trials.main(run, again) == 0
    assert len(again.handles) == 6
    (tmp_path / "data/VOC2007/Annotations/1.xml").write_text("other")
    trials.data_digest.cache_clear()
    assert run_trials.main(run, again) == 0
    assert len(again.handles) == 12


def test_a_pretraining_run_and_a_split_for_each_seed(words: list[str], tmp_path: Path) -> None:
    for seed in range(2):
        write_set(tmp_path / f"split-{seed}")
        (tmp_path / f"run-{seed}.pkl").write_bytes(bytes([seed]))
        (tmp_path / f"run-{seed}.json").write_text("{}")
    executor = StubExecutor(train)
    run = ["--init", "random", "--init", f"ours={tmp_path}/run-{{seed}}.pkl", "--seeds", "2",
           *words[6:], "--data", f"{tmp_path}/split-{{seed}}"]  # fmt: skip
    assert run_trials.main(run, executor) == 0
    commands = [handle.job.steps[0].command for handle in executor.handles]
    given = [(c[2], c[c.index("--data") + 1], c[c.index("--seeds") + 1]) for c in commands]
    assert given == [
        (weights if weights == "random" else f"{tmp_path}/run-{seed}.pkl",
         f"{tmp_path}/split-{seed}", str(seed))
        for seed in range(2)
        for weights in ("random", "ours")
    ]  # fmt: skip
    weights = results(run)["arms"]["ours"]["weights_sha256"]
    assert weights["0"] != weights["1"]
    assert results(run)["comparisons"]["AP"][0]["n"] == 2


def test_weights_without_a_card_are_converted_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def convert(command: list[str], **_: object):
        calls.append(command)
        Path(command[3]).write_bytes(b"converted")
        Path(command[3]).with_suffix(".json").write_text("{}")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(data.subprocess, "run", convert)
    raw = tmp_path / "resnet.pth"
    raw.write_bytes(b"raw")
    protocol = trials.Protocol(tmp_path / "config.yaml", str(tmp_path / "data"), ())
    arms = [trials.make_arm("x y", str(raw), s, protocol, tmp_path / "out") for s in (0, 1)]
    assert len(calls) == 1
    assert calls[0][1:3] == [str(ROOT / "tools/convert_to_d2.py"), str(raw)]
    assert arms[0].weights == arms[1].weights
    assert arms[0].weights is not None
    assert arms[0].weights.name.startswith("x_y-")
    assert arms[0].fingerprint == arms[1].fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--init", "weights.pkl"], "--init 'weights.pkl': give NAME=FILE, or random"),
        (["--init", "random"], "--init random: comes twice"),
        (["--init", "x=nowhere.pkl"], "nowhere.pkl does not exist"),
        (["--init", "again=random"], "--init again: the same weights as random"),
        (["--control", "moco"], "--control moco: give one of random, byol, ours"),
        (["--compare", "ours-byol"], "--compare ours-byol: give A:B"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--published", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_are_named(
    words: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    executor = StubExecutor(train)
    assert run_trials.main([*words, *change], executor) == 2
    assert message in capsys.readouterr().err
    assert executor.handles == []


def test_published_rows_have_sources() -> None:
    found = trials.read_published(run_trials.PUBLISHED)
    assert all(row["source"] and set(row) & set(trials.METRICS) for row in found["rows"])
    with_ap = {(row["init"], row["AP50"]) for row in found["rows"] if "AP50" in row}
    assert ("random", 59.02) in with_ap


def test_a_result_without_figures_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(yaml.safe_dump({"AP": 1.0}))
    with pytest.raises(ValueError, match="lacks one of AP50, AP, AP75"):
        trials.read_result(path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("protocol: p\nrows: [{init: a, source: b, AP5: 1}]")
    with pytest.raises(UserError, match="unknown key AP5; did you mean AP75"):
        trials.read_published(bad)
