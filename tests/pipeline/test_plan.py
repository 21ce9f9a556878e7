import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.config import ARMS, Comparison, DataStageConfig, SeedsConfig, load_config
from pipeline.plan import input_digest
from pipeline.stages import KINDS, build_stages, flags
from tools import run_pipeline

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs/pipeline").rglob("*.yaml"))
SMOKE = ROOT / "configs/pipeline/smoke.yaml"
COMPARE = ROOT / "configs/pipeline/compare.yaml"


def stages_of(path: Path, out: Path, *overrides: str):
    return {s.name: s for s in build_stages(load_config(path, overrides), ROOT, out)}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_gives_whole_stages(path, tmp_path):
    stages = stages_of(path, tmp_path)
    names = list(stages)
    assert names[0].partition("/")[0] == "data"
    assert names[-1] == "report"
    for position, stage in enumerate(stages.values()):
        assert set(stage.upstream) <= set(names[:position]), f"{stage.name} reads a later stage"
        assert all(file.exists() for file in stage.files)
        script = next(word for word in stage.command if word.endswith((".py", ".sh")))
        assert Path(script).is_file()


def test_stages_of_one_pretraining(tmp_path):
    stages = stages_of(SMOKE, tmp_path)
    first = ["data", "shards", "probe_train", "probe_val", "pretrain", "convert"]
    assert list(stages) == [*first, *(f"{arm}/seed-0" for arm in ARMS), "report"]
    words = stages["pretrain"].command
    assert words[-1] == "--resume"
    given = {f"out={tmp_path}/pretrain", f"data.shards={tmp_path}/shards"}
    assert given | {f"eval.probe_val={tmp_path}/probe_val"} <= set(words)


def test_arms_differ_in_weights_and_freezing_only(tmp_path):
    stages = stages_of(SMOKE, tmp_path)
    weights = str(tmp_path / "convert/backbone.pkl")
    rest = []
    for arm in ARMS:
        words = list(stages[f"{arm}/seed-0"].command)
        assert words[2] == ("random" if arm.startswith("random") else weights)
        assert ("--freeze" in words) == arm.endswith("_frozen")
        assert words[words.index("--out") + 1] == str(tmp_path / "detection" / arm)
        own = (words[2], "--freeze", words[words.index("--out") + 1], arm)
        rest.append([word for word in words if word not in own])
    assert all(words == rest[0] for words in rest)


def test_seeds_of_pretraining_share_random_and_come_one_after_another(tmp_path):
    stages = stages_of(COMPARE, tmp_path, "seeds.pretraining=2", "seeds.data=false")
    names = [name for name in stages if "/seed-" in name]
    per_seed = [
        *("pretrain/base", "linear/base", "convert/base", "pretrain/fa", "linear/fa"),
        *("convert/fa", "random", "base", "fa", "random_frozen", "base_frozen", "fa_frozen"),
    ]
    assert names == [f"{name}/seed-{seed}" for seed in (0, 1) for name in per_seed]
    assert stages["random/seed-1"].upstream == ("data",)
    assert stages["fa/seed-1"].upstream == ("data", "convert/fa/seed-1")
    words = stages["pretrain/fa/seed-1"].command
    assert {"seed=1", "fa.method=mask", f"out={tmp_path}/pretrain/fa/seed-1"} <= set(words)
    assert not any(word.startswith("fa.") for word in stages["pretrain/base/seed-1"].command)
    first = load_config(COMPARE).comparisons[0]
    assert first == Comparison("fa - base", {"fa": 1, "base": -1}, decides=True)
    checks = {stage.check for name, stage in stages.items() if "pretrain/base" in name}
    assert len(checks) == 1, "seeds need no check of their own"
    assert len({stage.check for stage in stages.values() if stage.kind == "detection"}) == 1


def test_each_seed_may_have_data_of_its_own(tmp_path):
    words = ("seeds.pretraining=2", "seeds.first=7", "seeds.data=true", "data.shares=[0.5]")
    stages = stages_of(COMPARE, tmp_path, *words)
    made = [name for name in stages if name.startswith(("data", "shards", "probe"))]
    kinds = ("data", "shards", "shards", "probe_train", "probe_val")
    assert [name.partition("/")[0] for name in made] == [*kinds, *kinds]
    for seed in (7, 8):
        data = tmp_path / f"data/seed-{seed}"
        words = stages[f"data/seed-{seed}"].command
        assert words[words.index("--seed") + 1] == str(seed)
        assert str(data) in words
        pretrain = stages[f"pretrain/base/seed-{seed}"]
        assert f"eval.probe_val={tmp_path}/probe_val/seed-{seed}" in pretrain.command
        folders = [f"{tmp_path}/shards/{share}/seed-{seed}" for share in ("0.5", "1")]
        assert f"data.shards={json.dumps(folders)}" in pretrain.command
        assert f"shards/0.5/seed-{seed}" in pretrain.upstream
        detector = stages[f"random/seed-{seed}"]
        assert detector.command[detector.command.index("--data") + 1] == str(data)
        assert detector.upstream == (f"data/seed-{seed}",)
    config = replace(load_config(COMPARE), data=DataStageConfig("photos"))
    config = replace(config, seeds=SeedsConfig(1, 3, data=True))
    words = build_stages(config, ROOT, tmp_path)[0].command
    assert words[words.index("--split-seed") + 1] == words[words.index("--seed") + 1] == "3"


def test_more_seeds_add_stages_and_change_none(tmp_path):
    one = stages_of(SMOKE, tmp_path)
    five = stages_of(SMOKE, tmp_path, "detection.seeds=5")
    assert len(five) - len(one) == 4 * 4
    assert all(five[name] == stage for name, stage in one.items() if name != "report")
    order = [name for name in five if "/" in name]
    assert order[:4] == [f"{arm}/seed-0" for arm in ARMS], "whole pairs come first"


def test_every_stage_counts_the_code_version_of_its_kind(tmp_path, monkeypatch):
    for number, (kind, (script, _, libraries)) in enumerate(KINDS.items()):
        monkeypatch.setitem(KINDS, kind, (script, 10 + number, libraries))
    found = {stage.kind: stage.code_version for stage in stages_of(COMPARE, tmp_path).values()}
    assert found == {kind: 10 + number for number, kind in enumerate(KINDS)}


def test_overrides_reach_the_stages(tmp_path):
    stages = stages_of(
        SMOKE,
        tmp_path,
        "data.options.num_pool=7",
        "pretrain.overrides.optim.epochs=9",
        "detection.overrides.SOLVER.MAX_ITER=11",
        "detection.options.eval_every=3",
        "detection.arms=[random, pretrained_frozen]",
        "shards.options.resize_short=64",
        "detection.options.classes=[a, b]",
        "convert.format=pth",
    )
    assert "--num-pool 7" in " ".join(stages["data"].command)
    assert "optim.epochs=9" in stages["pretrain"].command
    assert "SOLVER.MAX_ITER 11" in " ".join(stages["random/seed-0"].command)
    assert "--classes a,b" in " ".join(stages["random/seed-0"].command)
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
    assert "--labels" not in stages["shards"].command
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
    for probe in ("probe_train", "probe_val"):  # class folders; those of a pool are none
        assert stages[probe].command[-2:] == ("--labels", "folders")
    assert own["shards"] / "index.json" in stages["pretrain"].files


def test_what_reads_ready_probes_follows_them(tmp_path, own):
    for name in "ab":
        (own[name] / "index.json").write_text("{}")
    path = own_config(tmp_path, shards=own["shards"], probe_train=own["a"], probe_val=own["b"])
    path.write_text(path.read_text() + "evaluations: [knn, linear]\n")
    stages = stages_of(path, tmp_path / "out")
    assert list(stages) == ["pretrain", "linear", "report"]
    for name in ("pretrain", "linear"):
        assert {own[x] / "index.json" for x in "ab"} <= set(stages[name].files)
    (own["b"] / "index.json").unlink()  # packed first, and followed as a stage
    stages = stages_of(path, tmp_path / "out")
    assert stages["linear"].upstream == ("pretrain", "probe_val")


def test_linear_evaluation_needs_probes(tmp_path, own):
    path = own_config(tmp_path, shards=own["shards"])
    path.write_text(path.read_text() + "evaluations: [linear]\n")
    with pytest.raises(UserError, match=r"linear needs data\.probe_train"):
        load_config(path)


def test_linear_evaluation_loads_with_the_workers_of_the_pretraining(tmp_path, own):
    """Also where the file writes the key with dots, or leaves `data:` empty."""
    path = own_config(tmp_path, shards=own["shards"], probe_train=own["a"], probe_val=own["b"])
    text = path.read_text() + "evaluations: [linear]\n"
    text += f"pretrain: {{config: {tmp_path}/own_pretrain.yaml}}\n"
    path.write_text(text)
    for content, words in (("data:\n", "2"), ("data.num_workers: 4\n", "4"),
                           ("data: {num_workers: 3}\n", "3")):  # fmt: skip
        (tmp_path / "own_pretrain.yaml").write_text(content)
        command = stages_of(path, tmp_path / "out")["linear"].command
        assert f"num_workers={words}" in command


def test_a_key_sees_files_behind_links(tmp_path):
    real, data = tmp_path / "real", tmp_path / "data"
    for folder in (real, data):
        folder.mkdir()
    (data / "labels").symlink_to(real)
    before = input_digest.__wrapped__(data)
    (real / "a.xml").write_text("<annotation/>")
    assert input_digest.__wrapped__(data) != before


def test_given_weights_are_converted_unless_their_card_is_of_detectron2(tmp_path, own):
    weights = tmp_path / "tv.pth"
    weights.write_bytes(b"")
    path = own_config(tmp_path, dataset=own["voc"])
    path.write_text(path.read_text() + f"variants:\n  ours: {{weights: {weights}}}\n")
    for card, is_converted in (
        ({"format": "fa-torchvision-1"}, True),
        ({"format": "fa-d2-1"}, False),
    ):
        weights.with_suffix(".json").write_text(json.dumps(card))
        assert ("convert/ours" in stages_of(path, tmp_path / "out")) == is_converted


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
        ("detection.seeds=0", "detection.seeds"),
        ("detection.arms=[imagenet]", "imagenet"),
        ("data.kind=fotos", "data.kind"),
        ("detection=3", "detection is 3"),
        ("detection.seeds", "is not of the form key=value"),
        ("detection.seeds.x=1", "seeds holds a value"),
        ("data.pool=x", "needs data.kind: existing"),
        ("name=a/b", "must consist of letters"),
        *((f"detection.parallel={n}", "detection.parallel") for n in ("0", "many", "1.5", "null")),
        ("seeds.pretraining=0", "seeds.pretraining"),
        ("variants={a_frozen: {}}", "variants.a_frozen: name it"),
        ("variants={a: {wieghts: random}}", "unknown key wieghts; did you mean weights"),
        ("variants={a: {pool: 0.5}}", "variant a: no pool 0.5"),
        ("comparisons=[{name: c, terms: {a: 1}}]", "'a' is none of"),
        ("data.kind=fashion", "fashion has no boxes"),
        ("seeds.data=true", "seeds.data needs a generated set with a split"),
        ("detection.seeds=null", "detection.seeds is null"),
        ("variants={1: {}}", "variants.1: name it"),
        ("variants={pretrain: {weights: random}}", "stages are called pretrain"),
        ("variants={a: {weights: 3}}", "variants.a.weights is 3; it takes text"),
    ],
)
def test_wrong_settings_are_named(override, words):
    with pytest.raises(UserError, match=r"smoke\.yaml|override") as caught:
        load_config(SMOKE, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["pretrain.config", "detection.config"])
def test_missing_config_files_are_named(tmp_path, key):
    with pytest.raises(UserError, match=r"unknown config 'nowhere.yaml'"):
        stages_of(SMOKE, tmp_path, f"{key}=nowhere.yaml")


def test_settings_of_the_pipeline_itself_cannot_be_overridden(tmp_path):
    with pytest.raises(UserError, match=r"overrides\.data\.shards is set by the pipeline"):
        stages_of(SMOKE, tmp_path, "pretrain.overrides.data.shards=x")


def test_flags():
    options = {"num_train": 3, "image_size": [96, 120], "quick": True, "slow": False, "none": None}
    assert flags(options) == ["--num-train", "3", "--image-size", "96", "120", "--quick"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "unknown config 'nowhere'; known are compare, compare_demo, compare_photos"),
        (["smoke", "detection.seedz=1"], "seedz"),
        (["smoke", "--until", "lunch"], "--until lunch: the stages are data, shards"),
        (["smoke", "--until", ""], "--until : the stages are data, shards"),
        (["smoke", "--rerun", "lunch"], "--rerun lunch: the stages are data, shards"),
        (["compare", "--max-minutes", "0.1"], "--max-minutes 0.1: the last 20 s are for saving"),
        (["smoke", "--sedes", "3"], "unrecognized arguments: --sedes"),
    ],
)
def test_wrong_arguments_exit_2(tmp_path, words, message, capsys):
    with contextlib.suppress(SystemExit):
        assert run_pipeline.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
