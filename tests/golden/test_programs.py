"""Gate (h): exit statuses of the programs. 0 done, 1 it went wrong, 2 a mistake, 130 Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pretrain.__main__ import main as pretrain
from tests.detection.tiny_detection import make_voc
from tests.golden.gate import check, exit_status
from tools.ablate import main as ablate
from tools.convert_to_d2 import main as convert_to_d2
from tools.linear_eval import main as linear_eval
from tools.make_dataset import main as make_dataset
from tools.make_shards import main as make_shards
from tools.run_pipeline import main as run_pipeline
from tools.run_trials import main as run_trials
from tools.train_voc import main as train_voc

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain,
    "convert_to_d2": convert_to_d2,
    "train_voc": train_voc,
    "make_shards": make_shards,
    "make_dataset": make_dataset,
    "run_pipeline": run_pipeline,
    "ablate": ablate,
    "run_trials": run_trials,
    "linear_eval": linear_eval,
}
TINY = {
    "arch": {"depth": 50, "width_per_group": 8, "stem_channels": 8, "res2_channels": 32},
    "data": {"image_size": 32, "batch_size": 8, "num_workers": 0},
    "heads": {"projector_hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 8},
    "objective": {"name": "infonce"},
    "optim": {"name": "sgd", "epochs": 2, "base_lr": 0.1, "warmup_epochs": 0},
    "engine": {"device": "cpu", "precision": "fp32", "log_every_steps": 1, "num_threads": 1},
    "eval": {"num_pictures": 0, "knn_k": 5},
}
QUICK = {
    "pretrain": {
        "unknown key": ["tiny.yaml", "optim.epoch=3"],
        "wrong type": ["tiny.yaml", "optim.epochs=many"],
        "config is missing": ["missing.yaml"],
        "shards are missing": ["tiny.yaml", "data.shards=missing", "out=out"],
        "print config": ["tiny.yaml", "--print-config"],
    },
    "convert_to_d2": {
        "checkpoint is missing": ["missing.pth", "out.pkl"],
        "checkpoint is damaged": ["damaged.pth", "out.pkl"],
        "picture too small": ["damaged.pth", "out.pkl", "--size", "32"],
        "verify and out": ["damaged.pth", "out.pkl", "--verify", "a.pth", "b.pth"],
        "verify what is missing": ["--verify", "missing.pth", "missing.pkl"],
    },
    "train_voc": {
        "config is missing": ["random", "--config", "no.yaml", "--data", "voc", "--out", "out"],
        "data is missing": ["random", "--config", "THIN", "--data", "missing", "--out", "out"],
        "weights are missing": ["no.pkl", "--config", "THIN", "--data", "voc", "--out", "out"],
        "seeds are no numbers": [
            *("random", "--config", "THIN", "--data", "voc", "--out", "out", "--seeds", "a,b"),
        ],
    },
    "make_shards": {
        "source is missing": ["missing", "out"],
        "no pictures": ["empty", "out"],
        "out is missing": ["in"],
        "out is a file": ["in", "tiny.yaml"],
        "verify what is missing": ["missing", "--verify"],
        "pack": ["in", "shards", "--num-workers", "1"],
        "pack and verify again": ["in", "shards", "--verify", "--num-workers", "1"],
    },
    "make_dataset": {
        "unknown kind": ["drawings", "out"],
        "number out of range": ["procedural", "out", "--num-train", "0"],
        "archive is missing": ["voc", "out", "missing.tar"],
        "out is below a file": ["procedural", "tiny.yaml/out", "--num-train", "1"],
    },
    "run_pipeline": {
        "unknown config": ["missing"],
        "unknown key": ["smoke", "--out", "out", "detection.seed=2"],
        "unknown stage": ["smoke", "--out", "out", "--until", "nothing"],
        "out is a file": ["smoke", "--out", "tiny.yaml"],
        "dry run": ["smoke", "--out", "out", "--dry-run", "--until", "data"],
    },
    "ablate": {
        "grid is missing": ["missing.yaml", "--out", "study"],
        "unknown preset": ["STUDY", "--preset", "missing", "--out", "study"],
        "grid is none": ["tiny.yaml", "--out", "study"],
    },
    "run_trials": {
        "weights are missing": [
            *("--init", "random", "--init", "a=no.pkl", "--config", "THIN", "--data", "in"),
            *("--out", "trials"),
        ],
        "unknown control": [
            *("--init", "random", "--control", "b", "--config", "THIN", "--data", "in"),
            *("--out", "trials"),
        ],
        "config is missing": [
            *("--init", "random", "--config", "no.yaml", "--data", "in", "--out", "trials"),
        ],
    },
    "linear_eval": {
        "checkpoint is missing": ["no.pth", "--train", "in", "--val", "in", "--out", "out"],
        "shards are missing": ["random:R18", "--train", "no", "--val", "no", "--out", "out"],
        "unknown key": [
            *("random:R18", "epoch=3", "--train", "in", "--val", "in", "--out", "out"),
        ],
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "empty").mkdir()
    generator = np.random.default_rng(0)
    for i in range(32):
        path = folder / f"in/class-{i % 2}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    make_voc(folder / "voc")
    (folder / "damaged.pth").write_bytes(b"no checkpoint")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture
def _heard_ctrl_c() -> Iterator[None]:
    """Processes started here hear SIGINT, even where this one was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def status(program: str, words: list[str]) -> int:
    places = {
        "THIN": str(CONFIGS / "detection/thin_R50_C4.yaml"),
        "STUDY": str(CONFIGS / "studies/stop_gradient.yaml"),
    }
    return exit_status(PROGRAMS[program], [places.get(word, word) for word in words])


def test_exit_statuses() -> None:
    found = {
        program: {
            "help": status(program, ["--help"]),
            "no arguments": status(program, []),
            **{case: status(program, words) for case, words in cases.items()},
        }
        for program, cases in QUICK.items()
    }
    check("exit_statuses", found)


@pytest.mark.slow
def test_exit_statuses_of_what_went_wrong(place: Path) -> None:
    small = ["--num-pool", "8", "--num-train", "8", "--num-test", "4"]
    both, pool = ["good/checkpoint.pth", "good/backbone.pkl"], "data.shards=wrong/shards"
    junk = ["JPEGImages/1.jpg", "Annotations/1.xml", "ImageSets/Main/train.txt"]
    for path in (place / "junk/VOC2007" / name for name in junk):
        path.parent.mkdir(parents=True)
        path.write_text(path.name)
    runs = {
        "make_shards": ["in", "wrong/shards", "--num-workers", "1", "--labels", "folders"],
        "make_shards --verify": ["wrong/shards", "--verify"],
        "make_dataset": ["procedural", "wrong/set", *small],
        "pretrain": ["tiny.yaml", pool, "out=good"],
        "pretrain, not finite": ["tiny.yaml", pool, "out=bad", "optim.base_lr=1e30"],
        "convert_to_d2": both,
        "convert_to_d2 --verify": ["--verify", *both],
        "run_pipeline, a stage fails": [
            *("smoke", "--out", "flow", "--until", "pretrain"),
            "pretrain.overrides.optim.base_lr=1e30",
        ],
        "linear_eval": [
            *("good/checkpoint.pth", "epochs=1", "image_size=32", "--train", "wrong/shards"),
            *("--val", "wrong/shards", "--out", "good/linear"),
        ],
        "run_trials, a run fails": [
            *("--init", "random", "--config", "THIN", "--data", "voc", "--seeds", "1"),
            *("--out", "wrong/trials", "--", "SOLVER.BASE_LR", "1e30", "SOLVER.MAX_ITER", "4"),
        ],
        "train_voc, set is damaged": [
            *("random", "--config", "THIN", "--data", "junk", "--out", "wrong/voc"),
        ],
    }
    found = {case: status(case.split(",")[0].split()[0], words) for case, words in runs.items()}
    assert status("pretrain", ["tiny.yaml", pool, "out=other", "seed=1"]) == 0
    found["convert_to_d2 --verify, not the same"] = status(
        "convert_to_d2", ["--verify", "other/checkpoint.pth", "good/backbone.pkl"]
    )
    shard = next((place / "wrong/shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    found["make_shards --verify, damaged"] = status("make_shards", ["wrong/shards", "--verify"])
    check("exit_statuses_slow", found)


def interrupted(reached: Callable[[], bool], *words: str) -> int:
    """The exit status of a script of tools/ that gets Ctrl-C as soon as `reached`."""
    interpreter = "bash" if words[0].endswith(".sh") else sys.executable
    process = subprocess.Popen(
        [interpreter, str(ROOT / "tools" / words[0]), *words[1:]],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    try:
        while not reached():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=120)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.usefixtures("_heard_ctrl_c")
def test_exit_statuses_after_ctrl_c(place: Path) -> None:
    assert status("make_shards", ["in", "stopped/shards", "--num-workers", "1"]) == 0
    metrics, log = place / "stopped/run/metrics.jsonl", place / "stopped/flow/logs/data.log"
    found = {
        "pretrain": interrupted(
            lambda: metrics.exists() and metrics.stat().st_size > 0,
            *("pretrain.sh", "tiny.yaml", "data.shards=stopped/shards", "out=stopped/run"),
            "optim.epochs=1000",
        ),
        "run_pipeline": interrupted(
            log.exists,
            *("run_pipeline.py", "smoke", "--out", "stopped/flow", "--until", "data"),
            "data.options.num_pool=20000",
        ),
    }
    check("exit_statuses_ctrl_c", found)
