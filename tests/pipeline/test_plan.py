import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.config import ARMS, load_config
from pipeline.plan import CODE_VERSIONS, build_stages, config_bases, flags

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs/pipeline").rglob("*.yaml"))
SMOKE = ROOT / "configs/pipeline/smoke.yaml"


def stages_of(path: Path, out: Path, *overrides: str):
    return {s.name: s for s in build_stages(load_config(path, overrides), ROOT, out)}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_gives_whole_stages(path, tmp_path):
    stages = stages_of(path, tmp_path)
    names = list(stages)
    first = ["data", "shards", "probe_train", "probe_val", "pretrain", "convert"]
    assert names == [*first, *(f"{arm}/seed-0" for arm in ARMS), "report"]
    for position, stage in enumerate(stages.values()):
        assert set(stage.upstream) <= set(names[:position]), f"{stage.name} reads a later stage"
        assert all(file.exists() for file in stage.files)
        script = next(word for word in stage.command if word.endswith((".py", ".sh")))
        assert Path(script).is_file()


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_says_purpose_command_time_and_result(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [line[2:].split(":")[0] for line in head[:4]] == ["Purpose", "Command", "Time", "Expect"]
    assert f"run_pipeline.sh {path.stem}" in head[1]


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_pretraining_accepts_the_overrides_of_every_preset(path, tmp_path):
    command = stages_of(path, tmp_path)["pretrain"].command
    assert command[-1] == "--resume"
    program = "import json, sys; from common.config import *; from pretrain.config import *; " + (
        "print(json.dumps(to_plain(load_config(sys.argv[1], sys.argv[2:]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command[2:-1]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["out"] == str(tmp_path / "pretrain")
    assert config["data"]["shards"] == str(tmp_path / "shards")
    assert config["eval"]["probe_val"] == str(tmp_path / "probe_val")


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_arms_differ_in_weights_and_freezing_only(path, tmp_path):
    stages = stages_of(path, tmp_path)
    weights = str(tmp_path / "convert/backbone.pkl")
    seen = []
    for arm in ARMS:
        words = list(stages[f"{arm}/seed-0"].command)
        assert words[2] == ("random" if arm.startswith("random") else weights)
        assert ("--freeze" in words) == arm.endswith("_frozen")
        assert words[words.index("--out") + 1] == str(tmp_path / "detection" / arm)
        own = (words[2], "--freeze", words[words.index("--out") + 1])
        seen.append([word for word in words if word not in own])
    assert all(words == seen[0] for words in seen)


def test_more_seeds_add_stages_and_change_none(tmp_path):
    one = stages_of(SMOKE, tmp_path)
    five = stages_of(SMOKE, tmp_path, "detection.seeds=5")
    assert len(five) - len(one) == 4 * 4
    assert all(five[name] == stage for name, stage in one.items() if name != "report")
    order = [name for name in five if "/" in name]
    assert order[:4] == [f"{arm}/seed-0" for arm in ARMS], "whole pairs come first"


def test_random_arms_do_not_depend_on_pretraining(tmp_path):
    stages = stages_of(SMOKE, tmp_path)
    assert stages["random/seed-0"].upstream == ("data",)
    assert stages["pretrained/seed-0"].upstream == ("data", "convert")


def test_every_stage_counts_its_own_code_version(tmp_path, monkeypatch):
    for number, name in enumerate(CODE_VERSIONS):
        monkeypatch.setitem(CODE_VERSIONS, name, 10 + number)
    found = {name: stage.code_version for name, stage in stages_of(SMOKE, tmp_path).items()}
    assert found == {
        "data": 10, "shards": 11, "probe_train": 11, "probe_val": 11, "pretrain": 12, "convert": 13,
        **{f"{arm}/seed-0": 14 for arm in ARMS}, "report": 15,
    }  # fmt: skip


def test_overrides_reach_the_stages(tmp_path):
    stages = stages_of(
        SMOKE,
        tmp_path,
        "data.options.num_pool=7",
        "pretrain.overrides.optim.epochs=9",
        "detection.overrides.SOLVER.MAX_ITER=11",
        "detection.options.eval_every=3",
        "detection.arms=[random]",
        "shards.options.resize_short=64",
        "convert.format=pth",
    )
    assert "--num-pool 7" in " ".join(stages["data"].command)
    assert "optim.epochs=9" in stages["pretrain"].command
    assert "SOLVER.MAX_ITER 11" in " ".join(stages["random/seed-0"].command)
    assert "--eval-every 3" in " ".join(stages["random/seed-0"].command)
    assert "--resize-short 64" in " ".join(stages["shards"].command)
    assert stages["convert"].outputs[0] == "convert/backbone.pth"
    assert "pretrained/seed-0" not in stages


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("voc", "pool", "shards", "a", "b")}
    for folder in folders.values():
        folder.mkdir()
    (folders["shards"] / "index.json").write_text("{}")
    return folders


def own_config(tmp_path: Path, **data: Path) -> Path:
    path = tmp_path / "own.yaml"
    lines = "".join(f"  {key}: {value}\n" for key, value in data.items())
    path.write_text(f"name: own\ndata:\n  kind: existing\n{lines}")
    return path


def test_own_pictures(tmp_path, own):
    stages = stages_of(own_config(tmp_path, dataset=own["voc"], pool=own["pool"]), tmp_path / "out")
    assert list(stages)[:3] == ["shards", "pretrain", "convert"]
    assert str(own["pool"]) in stages["shards"].command
    assert stages["shards"].files == (own["pool"],)
    words = stages["random/seed-0"].command
    assert words[words.index("--data") + 1] == str(own["voc"])
    assert not any(word.startswith("eval.probe") for word in stages["pretrain"].command)


def test_own_shards_and_probe(tmp_path, own):
    path = own_config(
        tmp_path, dataset=own["voc"], shards=own["shards"], probe_train=own["a"], probe_val=own["b"]
    )
    stages = stages_of(path, tmp_path / "out")
    assert list(stages)[:3] == ["probe_train", "probe_val", "pretrain"]
    assert f"data.shards={own['shards']}" in stages["pretrain"].command
    assert own["shards"] / "index.json" in stages["pretrain"].files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pool": "pool"}, "needs data.dataset"),
        ({"dataset": "voc"}, "needs either data.pool"),
        ({"dataset": "voc", "pool": "pool", "shards": "shards"}, "needs either data.pool"),
        ({"dataset": "voc", "pool": "nowhere"}, "nowhere does not exist"),
        ({"dataset": "voc", "pool": "pool", "probe_train": "a"}, "give both data.probe_train"),
    ],
)
def test_impossible_own_data_is_refused(tmp_path, own, data, message):
    path = own_config(tmp_path, **{key: tmp_path / value for key, value in data.items()})
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("detection.seedz=5", "seedz"),
        ("pretrian.config=x", "pretrian"),
        ("detection.seeds=many", "detection.seeds"),
        ("detection.seeds=0", "at least 1"),
        ("detection.arms=[imagenet]", "imagenet"),
        ("data.kind=fotos", "data.kind"),
        ("detection=3", "detection is 3"),
        ("detection.seeds", "is not of the form key=value"),
        ("detection.seeds.x=1", "seeds holds a value"),
        ("data.pool=x", "needs data.kind: existing"),
        ("name=a/b", "must consist of letters"),
    ],
)
def test_wrong_settings_are_named(override, words):
    with pytest.raises(UserError, match=r"smoke\.yaml|override") as caught:
        load_config(SMOKE, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["pretrain.config", "detection.config"])
def test_missing_config_files_are_named(tmp_path, key):
    with pytest.raises(UserError, match=r"config file nowhere\.yaml does not exist"):
        stages_of(SMOKE, tmp_path, f"{key}=nowhere.yaml")


def test_settings_of_the_pipeline_itself_cannot_be_overridden(tmp_path):
    with pytest.raises(UserError, match=r"overrides\.data\.shards is set by the pipeline"):
        stages_of(SMOKE, tmp_path, "pretrain.overrides.data.shards=x")


def test_flags():
    options = {"num_train": 3, "image_size": [96, 120], "quick": True, "slow": False, "none": None}
    assert flags(options) == ["--num-train", "3", "--image-size", "96", "120", "--quick"]


def test_bases_of_a_detection_config_count(tmp_path):
    (tmp_path / "base.yaml").write_text("A: 1\n")
    (tmp_path / "own.yaml").write_text('_BASE_: "base.yaml"\nB: 2\n')
    assert config_bases(tmp_path / "own.yaml") == [tmp_path / "base.yaml"]
    (tmp_path / "base.yaml").write_text("_BASE_: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        config_bases(tmp_path / "own.yaml")
    (tmp_path / "base.yaml").write_text("_BASE_: base.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml: builds on itself"):
        config_bases(tmp_path / "own.yaml")


def run_pipeline(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/run_pipeline.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "neither a preset (demo, photos, smoke"),
        (["smoke", "detection.seedz=1"], "seedz"),
        (["smoke", "--until", "lunch"], "the stages are data, shards"),
        (["smoke", "--sedes", "3"], "unrecognized arguments: --sedes"),
    ],
)
def test_wrong_arguments_exit_2_without_a_traceback(tmp_path, words, message):
    done = run_pipeline(*words, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path):
    done = run_pipeline("smoke", "--dry-run", "--until", "pretrain", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    names = ["data", "shards", "probe_train", "probe_val", "pretrain"]
    assert lines == [["run", name, "first run"] for name in names]
    assert not list(tmp_path.iterdir())


def test_help_shows_an_example():
    done = run_pipeline("--help")
    assert done.returncode == 0
    assert "bash tools/run_pipeline.sh demo detection.seeds=5" in done.stdout
