"""The command line of linear evaluation: what it prints, what it refuses, what a kill costs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common import checkpoints
from common.network import ResNet
from common.resnet import Arch
from pretrain.data.pack import ShardOptions, SourcePicture, write_shards
from tools import linear_eval as tool

ROOT = Path(__file__).parents[2]
CLASSES = ["dark", "light"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two classes that any network tells apart: dark and light pictures; and weights."""
    folder = tmp_path_factory.mktemp("linear")
    for name, num in (("train", 60), ("val", 20), ("plain", 8)):
        pictures = []
        for i in range(num):
            path = folder / f"{name}-{i:02d}.png"
            noise = np.random.default_rng(1000 + i).integers(0, 60, (40, 40, 3))
            cv2.imwrite(str(path), (noise + 190 * (i % 2)).astype(np.uint8))
            label = -1 if name == "plain" else i % 2
            pictures.append(SourcePicture(str(path), path.name, label))
        classes = None if name == "plain" else CLASSES
        write_shards(pictures, folder / name, options=ShardOptions(), classes=classes)
    torch.manual_seed(0)
    torch.save(ResNet(Arch(18, 8, 8, 8)).state_dict(), folder / "tiny.pth")
    return folder


def options_of(work, out, *more, train="train", val="val", source="tiny.pth"):
    source = source if ":" in source else str(work / source)
    return [
        source, "--train", str(work / train), "--val", str(work / val), "--out", str(out),
        "image_size=32", "num_workers=0", "epochs=2", "batch_size=16", "device=cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", ["cached", "full", "knn"])
def test_easy_classes_are_separated(work, tmp_path, capsys, protocol):
    more = ["--protocol", protocol]
    assert tool.main(options_of(work, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    assert f"{protocol} evaluation of tiny.pth" in printed
    result = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert result["top1"] == 1.0
    assert result["config"]["protocol"] == protocol
    assert tool.main(options_of(work, tmp_path / "out", *more)) == 2
    assert "holds an evaluation already" in capsys.readouterr().err
    assert tool.main(options_of(work, tmp_path / "out", *more, "--resume")) == 0
    assert capsys.readouterr().out == printed


def test_named_options_reach_the_evaluation(work, tmp_path, capsys):
    more = ["--fraction", "0.5", "--seed", "4", "--features", str(tmp_path / "kept")]
    assert tool.main(options_of(work, tmp_path / "out", *more, source="random:thin_R50")) == 0
    result = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert result["config"]["fraction"] == 0.5
    assert result["config"]["seed"] == 4
    assert result["data"]["train"]["num_used"] == 30
    assert len(list((tmp_path / "kept").glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("more", "places", "message"),
    [
        ([], {"train": "plain"}, "8 of 8 samples have no label"),
        ([], {"source": "no.pth"}, "no.pth: no such file"),
        (["--branch", "ema"], {}, "--branch ema: this torchvision checkpoint holds one network"),
        (["--config", "no.yaml"], {}, "unknown config 'no.yaml'; known are imagenet100"),
        (["--fraction", "0.01"], {}, "less than one sample for each of 2 classes"),
    ],
)
def test_mistakes_are_reported_in_one_line(work, tmp_path, capsys, more, places, message):
    assert tool.main(options_of(work, tmp_path / "out", *more, **places)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def start(work, out, *more):
    command = [sys.executable, str(ROOT / "tools" / "linear_eval.py")]
    return subprocess.Popen(
        [*command, *options_of(work, out, *more)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


MORE = ["--protocol", "full", "epochs=120", "checkpoint_every_steps=7"]


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory):
    """The folder of an undisturbed evaluation."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert tool.main(options_of(work, out, *MORE)) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_evaluation_ends_with_the_same_weights(work, whole, tmp_path, number):
    out = tmp_path / "parts"
    process = start(work, out, *MORE)
    while not (out / "checkpoint.pth").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + 15), printed
    assert not (out / "linear.json").exists()
    step = checkpoints.read(out / "checkpoint.pth")["position"]["step"]
    assert 7 <= step < 360
    assert tool.main(options_of(work, out, *MORE, "--resume")) == 0
    a, b = (checkpoints.read(folder / "checkpoint.pth")["heads"] for folder in (whole, out))
    assert all(map(torch.equal, a, b))
