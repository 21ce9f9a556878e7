"""Detection trials: what becomes of their words; the tables are those of every experiment."""

import re
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import trials
from pipeline.plan import build_stages
from tools import run_trials

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\nSOLVER: {STEPS: '(1, 2)'}\n")
    (tmp_path / "base.yaml").write_text("MODEL: {}\n")
    (tmp_path / "data/VOC2007").mkdir(parents=True)
    for name in ("byol", "ours"):
        (tmp_path / f"{name}.pkl").write_bytes(name.encode())
        (tmp_path / f"{name}.json").write_text("{}")
    return [
        "--init", "random", "--init", f"byol={tmp_path}/byol.pkl",
        "--init", f"ours={tmp_path}/ours.pkl", "--config", str(tmp_path / "config.yaml"),
        "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def make(tmp_path: Path, inits: list[str], data: str = "data", seeds: int = 2, **options):
    given = {"control": None, "compare": (), "words": ()} | options
    config = trials.make_config(
        [word.replace("=", f"={tmp_path}/") for word in inits], given["control"],
        given["compare"], seeds, tmp_path / "config.yaml", str(tmp_path / data), given["words"],
    )  # fmt: skip
    return config, build_stages(config, ROOT, tmp_path / "out", has_report=False)


def test_stages_and_comparisons(words: list[str], tmp_path: Path) -> None:
    inits = ["random", "byol=byol.pkl", "ours=ours.pkl"]
    more = ("--freeze", "SOLVER.MAX_ITER", "5")
    config, stages = make(tmp_path, inits, compare=["ours:byol"], words=more)
    names = [f"{name}/seed-{seed}" for seed in (0, 1) for name in ("random", "byol", "ours")]
    assert [stage.name for stage in stages] == names
    command = stages[1].command
    assert command[1:3] == (str(ROOT / "tools/train_voc.sh"), f"{tmp_path}/byol.pkl")
    assert command[-3:] == more
    assert tmp_path / "byol.pkl" in stages[1].files
    assert {tmp_path / "base.yaml", tmp_path / "data"} <= set(stages[1].files)
    (table,) = config.all_tables
    compared = [(item.name, item.terms) for item in table.comparisons]
    assert compared == [
        ("byol - random", {"byol": 1, "random": -1}), ("ours - random", {"ours": 1, "random": -1}),
        ("ours - byol", {"ours": 1, "byol": -1}),
    ]  # fmt: skip


def test_a_pretraining_run_and_a_split_for_each_seed(words: list[str], tmp_path: Path) -> None:
    for seed in range(2):
        (tmp_path / f"split-{seed}").mkdir()
        (tmp_path / f"run-{seed}.pkl").write_bytes(bytes([seed]))
        (tmp_path / f"run-{seed}.json").write_text("{}")
    _, stages = make(tmp_path, ["random", "ours=run-{seed}.pkl"], "split-{seed}")
    given = [(s.command[2], s.command[s.command.index("--data") + 1]) for s in stages]
    assert given == [
        (weights.format(seed), f"{tmp_path}/split-{seed}")
        for seed in range(2)
        for weights in ("random", f"{tmp_path}/run-{{}}.pkl")
    ]


def test_weights_without_a_card_are_converted_once(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "resnet.pth").write_bytes(b"raw")
    _, stages = make(tmp_path, ["raw=resnet.pth"])
    names = [stage.name for stage in stages]
    assert names == ["convert/raw", "raw/seed-0", "raw/seed-1"]
    assert stages[0].command[2] == str(tmp_path / "resnet.pth")
    assert stages[0].files == (tmp_path / "resnet.pth",)
    assert {stage.upstream for stage in stages[1:]} == {("convert/raw",)}
    assert stages[1].command[2] == stages[2].command[2] == stages[0].command[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--init", "weights.pkl"], "--init 'weights.pkl': give NAME=FILE, or random"),
        (["--init", "random"], "--init random: comes twice"),
        (["--init", "x=nowhere.pkl"], "nowhere.pkl does not exist"),
        (["--init", "again=random"], "--init again: the same weights as random"),
        (["--init", "a b=random", "--control", "x"], "--control x: give one of"),
        (["--control", "moco"], "--control moco: give one of random, byol, ours"),
        (["--compare", "ours-byol"], "--compare ours-byol: give A:B"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--published", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
    ],
)
def test_mistakes_are_named(words, change, message, capsys) -> None:
    assert run_trials.main([*words, *change]) == 2
    assert message in capsys.readouterr().err


def test_published_rows_have_sources(tmp_path: Path) -> None:
    section, raw = trials.read_published(run_trials.PUBLISHED)
    assert all(row["source"] for row in raw["rows"])
    (table,) = section.tables
    rows = {tuple(row) for row in table.rows}
    assert ("random", "32.83", "59.02", "31.6", "OpenSelfSup model zoo") in rows
    assert any(re.search(r"1911\.05722\) \[M\]$", row[-1]) for row in rows)
    bad = tmp_path / "bad.yaml"
    bad.write_text("protocol: p\nrows: [{init: a, source: b, AP5: 1}]")
    with pytest.raises(UserError, match="unknown key AP5; did you mean AP75"):
        trials.read_published(bad)
