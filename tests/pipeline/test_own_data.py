"""Two folders instead of a YAML: what they hold, sizes by machine, pictures and time."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from common.annotations.record import SetChoice, read_set
from common.config import read_settings
from common.errors import UserError
from detection.training.config import load_config as load_detector
from pipeline import auto, own_data
from pipeline.auto import BUDGETS, Costs, Machine, first_sizes, fit, to_yaml
from pipeline.config import PipelineConfig, load_config
from pipeline.own_data import OwnData, survey
from pipeline.stages import build_stages, joined_options
from pretrain.config import PretrainConfig
from pretrain.model.backbones.resnet import ResNetBackbone
from tests import layouts
from tools.run_pipeline import main

ROOT = Path(__file__).parents[2]
SMALL, LARGE = Machine(2, 8), Machine(64, 256, 80)
DATA = OwnData(
    Path("/pool"), None, 2000, Path("/labels"), "train", "val", 240, 60, ("a", "b"), 15, 720.0,
    1.33, tuple(0.05 * i for i in range(1, 10)), 0.004,
)  # fmt: skip
COSTS = Costs(0.003, 0.03)  # of the thin network on one core


def fitted(data: OwnData, machine: Machine, budget: str, costs: Costs = COSTS):
    return fit(data, machine, budget, first_sizes(data, machine, budget), costs)


@pytest.mark.parametrize("machine", [SMALL, LARGE])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("num_pool", [32, 60, 2000, 10**6])
def test_every_plan_fits_the_time_and_the_pool(machine, budget, num_pool, tmp_path):
    data = replace(DATA, num_pool=num_pool)
    sizes = fitted(data, machine, budget, COSTS if machine == SMALL else Costs(0.002, 0.02))
    assert sizes.seconds <= BUDGETS[budget]
    assert 2 * sizes.batch <= sizes.num_pool <= num_pool
    assert sizes.epochs * (sizes.num_pool // sizes.batch) >= auto._LEAST_STEPS
    assert sizes.iterations >= auto._LEAST_ITERATIONS
    assert (sizes.num_pool < num_pool) == (sizes.part < 1)
    # Every program takes what was written.
    (tmp_path / "own.yaml").write_text(to_yaml(data, machine, sizes, "own", budget))
    config = read_settings(PipelineConfig, tmp_path / "own.yaml")
    overrides = {key: str(value) for key, value in config.detection.overrides.items()}
    cfg = load_detector(ROOT / config.detection.config, overrides, num_gpus=1)
    assert sizes.iterations == cfg.SOLVER.MAX_ITER
    assert sizes.ims_per_batch == cfg.SOLVER.IMS_PER_BATCH
    assert [list(sizes.anchors)] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    words = [f"{key}={json.dumps(value)}" for key, value in config.pretrain.overrides.items()]
    pretrain = read_settings(PretrainConfig, ROOT / config.pretrain.config, words)
    assert pretrain.optim.epochs == sizes.epochs
    assert isinstance(pretrain.arch, ResNetBackbone)
    is_thin = not machine.gpu_memory
    assert (pretrain.arch.width_per_group, cfg.MODEL.RESNETS.WIDTH_PER_GROUP) == (
        (16, 16) if is_thin else (64, 64)
    )


def test_sizes_follow_pictures_objects_memory_and_time():
    tiny = replace(DATA, objects=tuple(value / 10 for value in DATA.objects))
    assert first_sizes(DATA, SMALL, "quick").min_size == 128
    assert first_sizes(tiny, SMALL, "quick").min_size == 256
    assert first_sizes(tiny, SMALL, "night").min_size == 512
    assert first_sizes(replace(tiny, short_side=200.0), SMALL, "night").min_size == 192
    assert first_sizes(DATA, LARGE, "quick").min_size == 800
    assert first_sizes(replace(DATA, short_side=120.0), LARGE, "quick").min_size == 256
    assert [first_sizes(replace(DATA, num_pool=n), SMALL, "quick").batch for n in (60, 120, 900)] \
        == [16, 32, 128]  # fmt: skip
    assert first_sizes(DATA, Machine(2, 4), "quick").parallel == 1
    assert first_sizes(DATA, SMALL, "quick").parallel == 2
    assert first_sizes(DATA, Machine(8, 64, 12), "quick").ims_per_batch == 4
    # More time, cores or simpler steps: more training. Too little: the least, and its time.
    quick, hour = (fitted(DATA, SMALL, budget) for budget in ("quick", "hour"))
    assert hour.epochs > quick.epochs
    assert fitted(DATA, Machine(8, 64), "quick").iterations > quick.iterations
    slow = fitted(DATA, SMALL, "quick", Costs(0.003, 3.0))
    assert slow.iterations == auto._LEAST_ITERATIONS
    assert slow.seconds > BUDGETS["quick"]
    many = fitted(replace(DATA, num_test=10**5), SMALL, "quick")
    assert auto._LEAST_EVALUATED <= many.num_eval < 10**5


def test_smaller_pictures_where_the_objects_would_take_too_long(monkeypatch, tmp_path):
    def measure(data, machine, sizes, name, out):
        return Costs(0.003, 0.2 * (sizes.min_size / 128) ** 2)

    monkeypatch.setattr(auto, "_measure", measure)
    tiny = replace(DATA, objects=tuple(value / 10 for value in DATA.objects))
    sizes = auto.choose(tiny, SMALL, "quick", "own", tmp_path)
    assert sizes.min_size == 128
    assert sizes.anchors == (8, 8, 8)
    sizes = auto.choose(DATA, LARGE, "quick", "own", tmp_path)
    assert (sizes.min_size, sizes.ims_per_batch) == (800, 2)


# -- folders --------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """40 unlabelled pictures in `images`, six with LabelImg's XML in `labels`, an empty folder."""
    for name in layouts.NAMES:
        layouts.paint(tmp_path / "labels" / f"{name}.jpg", name)
        layouts.write(tmp_path / "labels" / f"{name}.xml", layouts.xml(name, f"{name}.jpg"))
        shutil.copy(tmp_path / "labels" / f"{name}.xml", _made(tmp_path / "apart/xml"))
        shutil.copy(tmp_path / "labels" / f"{name}.jpg", _made(tmp_path / "apart/jpg"))
    for i in range(40):
        shutil.copy(tmp_path / "labels/photo 1.jpg", _made(tmp_path / "images") / f"{i}.jpg")
    (tmp_path / "empty").mkdir()
    return tmp_path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_what_two_folders_hold(folders):
    data = survey(folders / "images", folders / "labels")
    assert (data.num_pool, data.num_train + data.num_test) == (40, 6)
    assert data.classes == ("cat", "dog")
    assert data.short_side == 96
    assert data.objects[4] == pytest.approx(41 / 96, abs=0.02)
    cut = folders / "labels/photo 1.jpg"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-400])
    damaged = survey(folders / "images", folders / "labels")
    assert damaged.num_train + damaged.num_test == 5
    assert any("photo 1.jpg: does not decode" in note for note in damaged.notes)
    cut.write_bytes(whole)
    # Labels within the pictures, or the same folder, or the labelled ones alone.
    shutil.move(folders / "labels", folders / "images/labels")
    inside = survey(folders / "images", folders / "images/labels")
    assert inside.num_pool == 46
    assert any("lie in the pool too" in note for note in inside.notes)
    for name in ("train", "valid"):  # as Roboflow's
        shutil.copytree(folders / "images", folders / "parts" / name)
    alone = survey(None, folders / "parts")
    assert (alone.pool_split, alone.num_pool, alone.num_train) == ("train", 46, 6)
    shutil.copy(folders / "images/1.jpg", folders / "parts/overview.jpg")
    loose = survey(None, folders / "parts")
    assert (loose.pool_split, loose.num_pool, loose.num_train) == ("train", 46, 6)
    assert "pool: 1 pictures beside these: left out" in loose.notes


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2007", "pascal/VOC2007"])
def test_masks_of_a_devkit_are_no_pictures_of_the_pool(place, tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "LEAST_POOL", 1)
    layouts.cvat_voc(tmp_path / place)
    layouts.paint(tmp_path / place / "SegmentationClass/photo 0.png", "photo 0")
    if place.startswith("VOCdevkit"):
        layouts.write(tmp_path / "README", "beside it")
    data = survey(None, tmp_path)
    assert (data.pool, data.num_pool) == (tmp_path / place / "JPEGImages", 6)


def two_formats(root: Path) -> None:
    layouts.LAYOUTS["LabelImg"][1](root)
    layouts.LAYOUTS["LabelImg YOLO"][1](root)


def faulty(root: Path) -> None:
    layouts.LAYOUTS["LabelImg"][1](root)
    for name in layouts.NAMES[:4]:
        layouts.write(root / f"{name}.xml", "<a")


LISTS = {"a": layouts.NAMES[:4], "b": layouts.NAMES[4:]}


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (two_formats, {"format": "yolo", "classes": ["dog"]}, "choose one with {0}format=.."),
        (layouts.coco_of("{part}/{name}.jpg", "{part}.json", LISTS),
         {"train_split": ["a"], "test_split": "b"},
         "say which with {0}train_split=.. and {0}test_split=.."),
        (faulty, {"max_left_out": 4}, "({0}max_left_out=4 leaves out all 4)"),
    ],
)  # fmt: skip
def test_what_a_set_does_not_say_is_given_as_settings(
    make, settings, message, folders, monkeypatch
):
    monkeypatch.setattr(auto, "_measure", lambda *_: COSTS)
    place = (folders / "images", folders / "set", folders / "run", "quick")
    make(folders / "set")
    with pytest.raises(UserError) as refused:
        auto.prepare(*place, is_dry=False)
    assert message.format("detection.options.") in str(refused.value)
    assert "--max-left-out" not in str(refused.value)
    given = [f"detection.options.{key}={json.dumps(value)}" for key, value in settings.items()]
    auto.prepare(*place, given, is_dry=False)
    config = load_config(folders / "run" / auto.YAML_FILE)
    assert settings.items() <= config.detection.options.items()
    data = survey(*place[:2], joined_options(config))
    assert data.classes == tuple(settings.get("classes", ("cat", "dog")))
    assert data.num_train + data.num_test == 6 - settings.get("max_left_out", 0)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_labels_of_every_tool_and_their_pictures_as_pool(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "LEAST_POOL", 1)
    layouts.LAYOUTS[layout][1](tmp_path)
    data = survey(None, tmp_path)
    assert (data.num_train + data.num_test, data.classes) == (6, ("cat", "dog"))
    assert data.num_pool in (4, 6)
    # The lists are found again by the names that the YAML holds.
    named = SetChoice(train_split=data.train_split, test_split=data.test_split)
    assert read_set(tmp_path, named).digest() == read_set(tmp_path).digest()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ("labels", "images", "swapped? Give --images {0}/images --labels {0}/labels"),
        ("none", "labels", "--images {0}/none: no such folder"),
        ("images", "none", "--labels {0}/none: no such folder; give a folder"),
        ("images", "label", "--labels {0}/label: no such folder; did you mean {0}/labels?"),
        ("images", "labels/photo 1.jpg", "is a file"),
        ("empty", "labels", "{0}/empty: holds no pictures"),
        ("images", "empty", "--labels {0}/empty: holds no labelled set"),
        ("labels", "labels", "6 pictures; pretraining takes 32 at least, and hundreds"),
        ("apart/jpg", "apart/xml", "Give --labels {0}/apart"),
    ],
)
def test_wrong_folders_are_named_with_a_remedy(images, labels, message, folders, capsys):
    words = ["--images", folders / images, "--labels", folders / labels, "--out", folders / "run"]
    assert main([*map(str, words)]) == 2
    assert message.format(folders) in capsys.readouterr().err
    assert not (folders / "run").exists()


def test_wrong_words(folders, capsys):
    own = ["--images", str(folders / "images"), "--labels", str(folders / "labels")]
    for words in (["demo", *own], own[:2], ["demo", "--budget", "quick"], []):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
    assert main([*own, "--out", str(folders / "images/run")]) == 2
    assert "lies in --images" in capsys.readouterr().err


def test_the_yaml_is_left_in_the_run_and_goes_on(folders, monkeypatch, capsys):
    monkeypatch.setattr(auto, "_measure", lambda *_: COSTS)
    monkeypatch.setattr(own_data, "_decode_seconds", lambda _: 0.001)
    images, labels, out = (folders / name for name in ("my: 'é' \udcff #1", "labels", "run"))
    (folders / "images").rename(images)
    text = auto.prepare(images, labels, out, "quick", is_dry=True)
    assert not out.exists()
    assert auto.prepare(images, labels, out, "quick", is_dry=False) == text
    config = load_config(out / auto.YAML_FILE)
    assert config.name == "run"
    assert "pretrained/seed-0" in {stage.name for stage in build_stages(config, ROOT, out)}
    # A person's changes stay.
    changed = text.replace("seeds: 1", "seeds: 2")
    (out / auto.YAML_FILE).write_text(changed)
    assert auto.prepare(images, labels, out, "quick", is_dry=False) == changed
    with pytest.raises(UserError, match="other folders or another budget"):
        auto.prepare(images, labels, out, "hour", is_dry=False)
    # What the command line changes is written in, into a new file as into that one.
    given = ["detection.arms=[random]", "convert.branch=ema", "shards.options.quality=80",
             "pretrain.overrides.optim.epochs=2", "detection.seeds=3"]  # fmt: skip
    expected = load_config(out / auto.YAML_FILE, given)
    kept = auto.prepare(images, labels, out, "quick", given, is_dry=True)
    assert load_config(out / auto.YAML_FILE) != expected
    assert auto.prepare(images, labels, out, "quick", given, is_dry=False) == kept
    new = auto.prepare(images, labels, folders / "new", "quick", given, is_dry=False)
    for file in (out, folders / "new"):
        assert replace(load_config(file / auto.YAML_FILE), name="run") == expected
    for text in (kept, new):
        assert "# faulty pictures and objects at most; they are counted" in text
        assert "# given: detection.seeds=3\n" in text
    again = auto.prepare(images, labels, out, "quick", ["detection.seeds=4"], is_dry=False)
    assert again.count("# given: detection.seeds=") == 2
    assert again.partition(auto._BEFORE)[2] == kept.partition(auto._BEFORE)[2]
    with pytest.raises(UserError, match=r"did you mean detection\.seeds"):
        auto.prepare(images, labels, folders / "none", "quick", ["detection.seed=3"], is_dry=False)


@pytest.mark.slow
def test_two_folders_become_a_run_that_its_yaml_continues(folders):
    def run(*words: str) -> str:
        command = ["bash", str(ROOT / "tools/run_pipeline.sh"), *words, "--out", "run"]
        done = subprocess.run(
            command, cwd=folders, capture_output=True, text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    layouts.paint(folders / "labels/cut.jpg", "photo 1")
    (folders / "labels/cut.jpg").write_bytes((folders / "labels/cut.jpg").read_bytes()[:-400])
    layouts.write(folders / "labels/cut.xml", layouts.xml("photo 1", "cut.jpg"))
    output = run("--images", "images", "--labels", "labels", *SMALLEST)
    assert "cut.jpg: does not decode" in (folders / "run/report.html").read_text()
    assert "tools/predict.py run PICTURES --out DIR" in output
    assert (folders / "run/report.html").is_file()
    lines = run("run/pipeline.yaml", "--dry-run").splitlines()
    actions = [line.split()[0] for line in lines if line.split()[0] in ("run", "skip", "maybe")]
    assert actions == ["skip"] * 6


SMALLEST = [
    *("pretrain.overrides.optim.epochs=2", "pretrain.overrides.optim.warmup_epochs=1"),
    *("pretrain.overrides.data.image_size=32", "pretrain.overrides.data.num_workers=0"),
    *("detection.overrides.SOLVER.MAX_ITER=4", "detection.overrides.TEST.EVAL_PERIOD=0"),
    *("detection.overrides.TEST.PRECISE_BN.NUM_ITER=2",),
    *("detection.overrides.MODEL.BACKBONE.CALIBRATE_BN_BATCHES=2",),
]
