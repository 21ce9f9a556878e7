"""Grids and presets: what they span, what they merge to, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.config import read_settings
from common.errors import UserError
from pipeline import study
from pipeline.stages import build_stages
from pipeline.study import NAME_LENGTH, Preset
from pretrain.config import load_config
from tests.pretrain.data.picture_helpers import pack_pictures
from tests.slurm.tiny_run import wait_until
from tools import ablate, run_trials

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "configs/studies"
GRIDS = sorted(STUDIES.glob("*.yaml"))
REPRODUCE_CPU = STUDIES / "presets/reproduce-cpu.yaml"
OTHERS = sorted(set((STUDIES / "presets").glob("*.yaml")) - {REPRODUCE_CPU})


def make(grids: list[Path], path: Path = REPRODUCE_CPU):
    preset = read_settings(Preset, path)
    return study.make_config(grids, preset, path, next(iter(preset.sets)))


@pytest.mark.parametrize(
    "path", [REPRODUCE_CPU, *(pytest.param(path, marks=pytest.mark.slow) for path in OTHERS)]
)
def test_every_cell_of_the_committed_grids_loads_and_can_train(path: Path) -> None:
    own = sorted((STUDIES / path.stem).glob("*.yaml"))
    experiment = make([*GRIDS, *own], path)
    base = load_config(experiment.pretrain.config, [])  # a variant leaves out what equals it
    for variant in experiment.all_variants.values():
        words = [f"{key}={json.dumps(value)}" for key, value in variant.overrides.items()]
        config = load_config(experiment.pretrain.config, words)
        assert config.fa.method == variant.overrides.get("fa.method", base.fa.method)
        assert config.optim.epochs == variant.overrides.get("optim.epochs", config.optim.epochs)
    assert all(any(c.decides for c in table.comparisons) for table in experiment.tables)


def test_stages_of_a_study(tmp_path: Path) -> None:
    """All cells of a seed come before the next seed; parts of the pool are packed once."""
    config = make([STUDIES / "data_scarcity.yaml"])
    stages = {s.name: s for s in build_stages(config, ROOT, tmp_path)}
    names = list(stages)
    shards = ["shards/0.1", "shards/0.25", "shards/1"]
    assert names[:6] == ["data", *shards, "probe_train", "probe_val"]
    seeds = [name.rpartition("seed-")[2] for name in names[6:-1]]
    assert seeds == sorted(seeds)
    label = {s.label: s for s in stages.values() if s.kind == "pretrain"}
    shards = {row: next(word for word in label[row].command if word.startswith("data.shards="))
              for row in ("10 %, none", "100 %, none")}  # fmt: skip
    assert shards["10 %, none"] == f'data.shards=["{tmp_path}/shards/0.1"]'
    assert shards["100 %, none"].count("shards/") == 3
    assert label["10 %, none"].upstream == ("shards/0.1", "probe_train", "probe_val")
    assert "optim.epochs=40" in label["10 %, none"].command
    assert "seed=4" in label["10 %, none"].command, "the last seed was put in last"
    linear = [s for s in stages.values() if s.kind == "linear"]
    assert len(linear) == 5 * len(config.all_variants)
    own = linear[0].name.replace("linear", "pretrain", 1)
    assert linear[0].upstream == (own, "probe_train", "probe_val")


def test_cells_that_come_to_the_same_are_one() -> None:
    grids = [STUDIES / f"{name}.yaml" for name in ("stop_gradient", "architecture")]
    one, other = make(grids).tables
    assert one.rows["none"] == other.rows["no FA"]
    assert len(one.rows["none"]) == NAME_LENGTH
    again = {table.name: table for table in make(grids[::-1]).tables}
    assert again["architecture"].rows == other.rows, "names do not follow from the order"


GRID = """
title: t
claim: c
axes:
  FA: {none: {fa.method: none, paradigm: byol}, mask: {fa.method: mask, scale: {optim.epochs: 10}}}
  loss: {mean: {}, free: {fa.feature_loss: free}}
left_out:
  - {cells: {FA: none, loss: free}, reason: one feature}
  - {cells: {FA: mask, loss: free}, reason: small, preset: tiny}
comparisons:
  - name: mask
    treated: {FA: mask, loss: mean}
    control: {FA: none, loss: mean}
  - name: free
    treated: {FA: mask, loss: free}
    control: {FA: mask, loss: mean}
    minus: {treated: {FA: mask, loss: mean}, control: {FA: none, loss: mean}}
    decides: false
"""
PRESET = {
    "base": "base.yaml",
    "seeds": 2,
    "metrics": ["knn"],
    "sets": {"a": {"kind": "fashion", "overrides": {"data": {"image_size": 28}}}},
    "paradigms": {"byol": {"objective.name": "byol", "data.image_size": 30}},
    "overrides": {"data.batch_size": 8},
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "base.yaml").write_text("optim: {epochs: 4, base_lr: 0.1}\nfa: {method: nn}\n")
    for name in ("big", "tiny"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(PRESET))
    return tmp_path


def test_what_is_merged_in_which_order(files: Path) -> None:
    config = make([files / "grid.yaml"], files / "big.yaml")
    (table,) = config.tables
    assert list(table.rows) == ["none, mean", "mask, mean", "mask, free"]
    assert table.left_out == {"none, free": "one feature"}
    none, mask, free = (config.all_variants[name] for name in table.rows.values())
    shared = {"data.batch_size": 8}
    assert none.overrides == shared | {
        "fa.method": "none", "objective.name": "byol", "data.image_size": 30,
    }  # fmt: skip
    assert mask.overrides == shared | {
        "data.image_size": 28, "fa.method": "mask", "optim.epochs": 40,
    }  # fmt: skip
    terms = {item.name: item.terms for item in table.comparisons}
    assert terms["mask"] == {mask.name: 1, none.name: -1}
    assert terms["free"] == {free.name: 1, mask.name: -2, none.name: 1}
    (small,) = make([files / "grid.yaml"], files / "tiny.yaml").tables
    assert [item.name for item in small.comparisons] == ["mask"], "left out with its cell"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: t", "titel: t", "unknown key titel; did you mean title"),
        ("title: t\n", "", "title is missing"),
        ("FA: mask, loss: mean}", "FA: nn, loss: mean}", "FA has no level 'nn'; it has none, mask"),
        ("control: {FA: none, loss: mean}", "control: {FA: none}", "names no level of loss"),
        ("mean: {}", "mean: {pool: 0.5}", "no pool 0.5; data.shares is []"),
        ("mean: {}", "mean: {fa.method: nn}", "two axes set fa.method"),
        ("optim.epochs: 10", "optim.q: 10", "scale optim.q: its value is None, no number"),
        ("paradigm: byol", "paradigm: moco", "has no paradigm 'moco'; it has byol"),
        ("axes:", "axes: [", "is not YAML"),
        ("loss: {mean: {}, free: {fa.feature_loss: free}}", "loss: {}", "loss is empty"),
        ("mean: {}", "mean: none", "of another kind than a grid holds"),
    ],
)
def test_mistakes_in_a_grid_are_named(files: Path, old: str, new: str, message: str) -> None:
    assert old in GRID
    (files / "grid.yaml").write_text(GRID.replace(old, new, 1))
    with pytest.raises(UserError, match=re.escape(message)):
        make([files / "grid.yaml"], files / "big.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds, parallel: give 1 or more"),
        ({"metrics": ["top5"]}, "metrics"),
        ({"base": "nothing.yaml"}, "nothing.yaml: cannot be read"),
        ({"sets": {"a": {}}}, "sets.a: kind is missing"),
        ({"sets": {"a": {"kind": "fashion", "pools": 1}}}, "unknown key pools; did you mean pool"),
        ({"sedes": 3}, "unknown key sedes; did you mean seeds"),
        ({"sets": {}}, "sets is empty"),
        ({"sets": {"a": {"kind": "fotos"}}}, "sets.a: .*kind"),
    ],
)
def test_mistakes_in_a_preset_are_named(files: Path, change: dict, message: str) -> None:
    (files / "big.yaml").write_text(yaml.safe_dump(PRESET | change))
    with pytest.raises(UserError, match=message):
        make([files / "grid.yaml"], files / "big.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "huge"], "known are demo, letters, longer-cpu, reproduce-cpu, reproduce-gpu"),
        (["--data", "cifar"], "--data: unknown set cifar; known are fashion-mnist, photos"),
        (["--metrics", "top5"], "--metrics: unknown metric top5; known are knn, linear"),
        (["--max-minutes", "0.1"], "the last 20 s are for saving"),
    ],
)
def test_mistakes_on_the_command_line(words, message, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert ablate.main([str(GRIDS[0]), "--out", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def write_study(folder: Path, shards: Path, base: dict) -> list[str]:
    """The words of a study of two cells and one seed on ready shards."""
    grid = {
        "title": "t", "claim": "mask helps",
        "axes": {"FA": {"none": {"fa.method": "none"}, "mask": {"fa.method": "mask"}}},
        "comparisons": [{"name": "d", "treated": {"FA": "mask"}, "control": {"FA": "none"}}],
    }  # fmt: skip
    data = dict.fromkeys(("shards", "probe_train", "probe_val"), str(shards))
    preset = {"base": "base.yaml", "seeds": 1, "metrics": ["knn"],
              "sets": {"made": {"kind": "existing"} | data}}  # fmt: skip
    for name, content in (("grid", grid), ("base", base), ("preset", preset)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ("grid.yaml", "--preset", "preset.yaml", "--out", "out")
    return [word if word.startswith("--") else str(folder / word) for word in words]


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


@pytest.mark.slow
def test_a_stopped_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Real runs: one cell, then stopped within the other, resumed, equal to a calm study."""
    words = write_study(tmp_path, pack_pictures(tmp_path, 96), BASE)
    command = [sys.executable, str(ROOT / "tools/ablate.py"), *words]
    assert ablate.main([*words, "--list"]) == 0
    assert len(re.findall("first run", capsys.readouterr().out)) == 3
    assert not Path(words[-1]).exists()
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out = Path(words[-1])

    def is_training() -> bool:
        assert program.poll() is None
        logs = out.glob("pretrain/*/*/metrics.jsonl")
        return any(len(path.read_text().splitlines()) > 3 for path in logs)

    wait_until(is_training, 120, "the first step")
    os.kill(program.pid, signal.SIGTERM)
    said, _ = program.communicate(timeout=60)
    assert program.returncode == 128 + signal.SIGTERM, said
    assert ablate.main([*words, "--only", "none"]) == 0
    assert "Preliminary" in (out / "report.html").read_text()
    assert ablate.main(words) == 0
    page = (out / "report.html").read_text()
    assert "Preliminary" not in page
    assert "d, kNN" in page
    assert ablate.main([*words[:-1], str(tmp_path / "calm")]) == 0
    tables = [json.loads((folder / "results.json").read_text())["tables"]
              for folder in (out, tmp_path / "calm")]  # fmt: skip
    assert tables[0] == tables[1]
    assert [row["n"] for row in tables[0][0]["rows"]] == [1, 1]


# Trials


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


def make_trials(tmp_path: Path, inits: list[str], data: str = "data", seeds: int = 2, **options):
    given = {"control": None, "compare": (), "words": ()} | options
    config = study.trials_config(
        [word.replace("=", f"={tmp_path}/") for word in inits], given["control"],
        given["compare"], seeds, tmp_path / "config.yaml", str(tmp_path / data), given["words"],
    )  # fmt: skip
    return config, build_stages(config, ROOT, tmp_path / "out")


def test_stages_and_comparisons_of_trials(words: list[str], tmp_path: Path) -> None:
    inits = ["random", "byol=byol.pkl", "ours=ours.pkl"]
    more = ("--freeze", "SOLVER.MAX_ITER", "5")
    config, stages = make_trials(tmp_path, inits, compare=["ours:byol"], words=more)
    names = [f"{name}/seed-{seed}" for seed in (0, 1) for name in ("random", "byol", "ours")]
    assert [stage.name for stage in stages] == [*names, "report"]
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
    _, stages = make_trials(tmp_path, ["random", "ours=run-{seed}.pkl"], "split-{seed}")
    given = [(s.command[2], s.command[s.command.index("--data") + 1]) for s in stages[:-1]]
    assert given == [
        (weights.format(seed), f"{tmp_path}/split-{seed}")
        for seed in range(2)
        for weights in ("random", f"{tmp_path}/run-{{}}.pkl")
    ]


def test_weights_without_a_card_are_converted_once(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "resnet.pth").write_bytes(b"raw")
    _, stages = make_trials(tmp_path, ["raw=resnet.pth"])
    names = [stage.name for stage in stages]
    assert names == ["convert/raw", "raw/seed-0", "raw/seed-1", "report"]
    assert stages[0].command[2] == str(tmp_path / "resnet.pth")
    assert stages[0].files == (tmp_path / "resnet.pth",)
    assert {stage.upstream for stage in stages[1:-1]} == {("convert/raw",)}
    assert stages[1].command[2] == stages[2].command[2] == stages[0].command[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--init", "weights.pkl"], "--init 'weights.pkl': give NAME=FILE, or random"),
        (["--init", "random"], "--init random: comes twice"),
        (["--init", "x=nowhere.pkl"], "nowhere.pkl does not exist"),
        (["--init", "a b=random", "--control", "x"], "--control x: give one of"),
        (["--control", "moco"], "--control moco: give one of random, byol, ours"),
        (["--compare", "ours-byol"], "--compare ours-byol: give A:B"),
        (["--compare", "ours:ours"], "--compare ours:ours: give A:B with two different ones"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--config", "nowhere.yaml"], "unknown config 'nowhere.yaml'"),
        (["--published", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_of_trials_are_named(words, change, message, capsys) -> None:
    assert run_trials.main([*words, *change]) == 2
    assert message in capsys.readouterr().err


def test_published_rows_have_sources(tmp_path: Path) -> None:
    raw = study.read_published(run_trials.PUBLISHED)
    assert all(row["source"] for row in raw["rows"])
    (tmp_path / "bad.yaml").write_text("protocol: p\nrows: [{init: a, source: b, AP5: 1}]")
    with pytest.raises(UserError, match="unknown key AP5; did you mean AP75"):
        study.read_published(tmp_path / "bad.yaml")
