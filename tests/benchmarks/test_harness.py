"""What the benchmarks share: arguments, turns, generated and real pictures."""

import importlib
import io
import statistics
import time

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from benchmarks import harness
from common.errors import UserError


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fa_overhead", "--cells byol/sideways/nn", "'byol/sideways/nn' names no cell"),
        ("fa_overhead", "--cells byol/post/nn", "none of these can train"),
        ("fa_overhead", "--repeats 0", "--repeats: 0: must be at least 1"),
        ("index_scale", "--samples 100", "--samples: 100: must be at least 256"),
        ("index_scale", "--pictures 100", "--pictures must be two batches"),
        ("kill_resume", "--kills 0", "--kills: 0: must be at least 1"),
        ("loader", "--num-photos 24 --batch-size 16", "a multiple of the batch size, 16"),
        ("loader", "--batch-size 20", "multiple of 16"),
        ("train_step", "--peak-tflops -1", "--peak-tflops -1.0: must be more than 0"),
        ("train_step", "--batch-size 1", "--batch-size: 1: must be at least 2"),
        ("train_step", "--json no/such/folder/step.json", "its folder does not exist"),
        ("train_step", "--batch-size 2 --width 1 --set engine.precision=fp8", "precision"),
        ("worker_memory", "--num-samples 7 --batch-size 8", "must fill a batch of 8"),
    ],
)
def test_wrong_arguments(name, arguments, message, capsys):
    try:
        status = importlib.import_module(f"benchmarks.{name}").main(arguments.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_slower_candidate_has_a_lower_rate_and_takes_its_turns():
    turns = []

    def candidate(name, seconds):
        return harness.picture_rate(lambda: (turns.append(name), spin(seconds)), 10)

    candidates = {"fast": candidate("fast", 0.01), "slow": candidate("slow", 0.03)}
    found = harness.take_turns(candidates, 3)
    assert turns == ["fast", "slow"] * 4  # the first turn of each warms up
    assert [len(values) for values in found.values()] == [3, 3]
    ratio = statistics.median(found["fast"]) / statistics.median(found["slow"])
    assert ratio == pytest.approx(3, rel=0.2)
    assert statistics.median(found["fast"]) == pytest.approx(1000, rel=0.2)


def test_a_turn_counts_processor_time_not_waiting_and_is_repeated():
    rate = harness.picture_rate(lambda: (time.sleep(0.3), spin(0.02)), 1)()
    assert 0.02 <= 1 / rate < 0.2
    calls = []
    turn = harness.picture_rate(lambda: calls.append(spin(0.01)), 5, min_seconds=0.045)
    assert turn() == pytest.approx(500, rel=0.1)
    assert len(calls) == 5


def test_generated_photographs_are_like_real_ones_in_size():
    jpegs = harness.encoded_photos(4)
    assert len(set(jpegs)) == 4
    for data in jpegs:
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(data)
        assert (height, width, subsampling) == (375, 500, "420")
    assert 45e3 < statistics.mean(map(len, jpegs)) < 60e3


def test_pictures_of_a_folder_are_fitted_and_repeated(tmp_path):
    image = np.zeros((900, 1000, 3), np.uint8)
    image[:, :500] = (250, 10, 10)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(np.full((1000, 500, 3), 90, np.uint8)).save(tmp_path / "b.webp", lossless=True)
    Image.fromarray(image[:300]).save(tmp_path / "too_small.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    found = harness.photos_of_folder(tmp_path, 5)
    assert len(found) == 5
    assert found[0] == found[2] == found[4] != found[1] == found[3]
    with Image.open(io.BytesIO(found[0])) as picture:
        assert picture.size == (500, 375)
        pixels = np.asarray(picture).astype(int)
    assert np.abs(pixels[:, :240] - (250, 10, 10)).max() < 20
    assert pixels[:, 260:].max() < 20
    with pytest.raises(UserError, match="no JPEG, PNG or WebP of at least 500 x 375 pixels"):
        harness.photos_of_folder(tmp_path / "nothing", 1)
