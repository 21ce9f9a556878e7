"""The command line: layout, determinism, restarts, and one clear message per mistake."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.annotations.record import read_set
from pipeline.datasets import scene, sets
from pipeline.datasets.shapes import CLASSES
from tests.layouts import LAYOUTS
from tests.pipeline.datasets.package_fixture import COUNTS, SIZES, run, tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    assert run("procedural", out, *SIZES) == 0
    return out


def test_layout_and_card(made: Path):
    card = json.loads((made / "dataset.json").read_text())
    assert card["format"] == "fa-dataset-1"
    assert card["kind"] == "procedural"
    assert card["splits"] == {"train": 5, "test": 3}
    assert (card["pool"], card["probe"]) == (5, {"train": 7, "val": 6})
    assert (card["options"]["short_side"], card["options"]["long_side"]) == (48, 60)
    assert str(made.parent) not in json.dumps(card)
    assert len(list((made / "pool").iterdir())) == 5
    assert all(path.stem.isdigit() for path in (made / "pool").iterdir())  # tell no class
    for split, count in (("train", 7), ("val", 6)):
        folders = sorted((made / "probe" / split).iterdir())
        assert [f.name for f in folders] == sorted(card["classes"])
        assert sum(len(list(f.glob("*.jpg"))) for f in folders) == count
    assert sorted(p.name for p in made.parent.iterdir()) == ["scenes"]


def test_no_two_pictures_are_the_same_and_the_devkit_reads(made: Path):
    pictures = [p.read_bytes() for p in made.rglob("*.jpg")]
    assert len(pictures) == len(set(pictures)) == sum(COUNTS.values())
    data = read_set(made)
    assert (data.classes, data.metric_year) == (tuple(CLASSES), 2012)
    assert (data.num_train, len(data.test.pictures)) == (5, 3)
    assert all(x.objects for split in (*data.train, data.test) for x in split.pictures)


def test_every_byte_is_the_same_for_any_number_of_workers(made: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scene, "_CHUNK", 2)
    assert run("procedural", tmp_path / "scenes", *SIZES, "--num-workers", 3) == 0
    assert tree(tmp_path / "scenes") == tree(made)


def test_the_same_options_keep_the_set_and_others_are_refused_unless_told(made, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    assert run("procedural", copy, *SIZES) == 0
    assert "kept" in capsys.readouterr().out
    assert run("procedural", copy, *SIZES, "--seed", 5) == 2
    message = capsys.readouterr().err
    assert "seed: 0 there, 5 requested" in message
    assert "--overwrite" in message
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    assert run("procedural", copy, *SIZES, "--seed", 5, "--overwrite") == 0
    assert json.loads((copy / "dataset.json").read_text())["options"]["seed"] == 5


@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_a_folder_with_other_things_is_never_touched(tmp_path: Path, capsys, extra):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert run("procedural", tmp_path, *SIZES, *extra) == 2
    assert "missing, damaged or not of this tool; give another" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("place", ["out/VOC2007", "link"])
@pytest.mark.parametrize("kind", ["import", "voc"])
def test_a_source_within_the_set_is_not_removed_with_it(tmp_path, capsys, kind, place):
    out = tmp_path / "out"
    LAYOUTS["LabelImg"][1](tmp_path / "source")
    assert run("import", out, tmp_path / "source", "--num-workers", 1) == 0
    (tmp_path / "link").symlink_to(out / "VOC2007")
    before = tree(out)
    sources = [tmp_path / "source"] * (kind == "voc")
    assert run(kind, out, *sources, tmp_path / place, "--overwrite") == 2
    assert f"{place}: lies in {out}, which is replaced as a whole" in capsys.readouterr().err
    assert tree(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-train", "0"], "--num-train is 0: give 1 or more"),
        (["--min-object", "0.9", "--max-object", "0.5"], "--min-object is 0.9, more than"),
        (["--min-object", "nan"], "--min-object is nan: give 0.05 or more"),
        (["--max-object", "3"], "--max-object is 3.0: give 2.0 or less"),
        (["--image-size", "1", "2", "3"], "--image-size has 3 values"),
        (["--num-classes", "1"], "--num-classes is 1: give 2 to"),
        (["--material-habit", "nan"], "--material-habit is nan: give 0 to 1"),
    ],
)
def test_bad_options(tmp_path: Path, capsys, arguments, message):
    assert run("procedural", tmp_path / "out", *SIZES, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scene, "write_picture", full)
    assert run("procedural", tmp_path / "out", *SIZES) == 1
    assert "disk full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_run_starts_again_cleanly(made: Path, tmp_path: Path, monkeypatch):
    out, partial = tmp_path / "scenes", tmp_path / "scenes.partial"
    command = [sys.executable, str(ROOT / "tools/make_dataset.py"), "procedural", str(out)]
    large = ["--num-pool", "5000", "--image-size", "48", "--num-workers", "2"]
    process = subprocess.Popen([*command, *large], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(partial.glob("pool/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(partial.glob("pool/*.jpg"))
    assert not out.exists()
    monkeypatch.setattr(sets, "LOCK_WAIT_SECONDS", 120)  # until the workers end, too
    assert run("procedural", out, *SIZES) == 0
    assert tree(out) == tree(made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scenes"]


def test_a_killed_worker_is_reported(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(scene, "_render_chunk", _die)
    assert run("procedural", tmp_path / "out", *SIZES, "--num-workers", 2) == 1
    assert "a worker process was killed" in capsys.readouterr().err


def _die(*_: object) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
